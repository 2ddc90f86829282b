"""Where the target's loss stands: token for token, and step for step, as in TRL's own `SFTTrainer`."""

import copy

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from trl_dpg.data import dataset_examples, to_target_examples
from trl_dpg.fine_tuning import TargetFineTuning
from trl_dpg.metagradients import TargetTrainingArguments, compute_metagradients


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("s", "e"), ("se", "a"), ("Ġ", "sea")]


def byte_tokenizer(eos="<|im_end|>", bos=False, template=CHATML):
    """Bytes with a few merges, also across the space before a word."""
    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, MERGES)]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[(special[0], 0)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=eos, pad_token="<|endoftext|>", additional_special_tokens=special
    )
    tokenizer.chat_template = template
    return tokenizer


PROMPTS = [
    "the sky",
    "a",
    "the sea is",
    "walk to",
    "a prompt that fills all of the tokens there are",
    "o",
    "say the",
    "go",
]
WRITTEN = [" is blue", " sea", " the sea", " the old boat on the sea", " cut off", " the", " end", " far  "]


def user(text):
    return {"role": "user", "content": text}


def said(text):
    return {"role": "assistant", "content": text}


def turns(prompt):
    """What was said before: of every other prompt more than one turn."""
    return [user("the"), said("sea"), user(prompt)] if len(prompt) % 2 else [user(prompt)]


PAIRS = list(zip(PROMPTS, WRITTEN, strict=True))
TEXTS = [{"text": p + c} for p, c in PAIRS]
PLAIN = [{"prompt": p, "completion": c} for p, c in PAIRS]
CHATS = [{"prompt": turns(p), "completion": [said(c)]} for p, c in PAIRS]
MESSAGES = [{"messages": row["prompt"] + row["completion"]} for row in CHATS]
CASES = {
    "text": (TEXTS, {}),
    "plain": (PLAIN, {}),
    "plain-completion-only": (PLAIN, {"completion_only_loss": True}),
    "plain-everything": (PLAIN, {"completion_only_loss": False}),
    "chat": (CHATS, {}),
    "chat-everything": (CHATS, {"completion_only_loss": False}),
    "chat-assistant-only": (CHATS, {"completion_only_loss": False, "assistant_only_loss": True}),
    "chat-both": (CHATS, {"assistant_only_loss": True}),
    "messages": (MESSAGES, {}),
    "messages-assistant-only": (MESSAGES, {"assistant_only_loss": True}),
}


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(byte_tokenizer()), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, initializer_range=0.1, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def sft(model, rows, tokenizer, directory, **fields):
    config = SFTConfig(
        output_dir=str(directory), learning_rate=1e-2, lr_scheduler_type="constant", adam_epsilon=1e-4, max_grad_norm=0.0,
        per_device_train_batch_size=3, train_sampling_strategy="sequential", bf16=False, use_cpu=True,
        gradient_checkpointing=False, report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=1, **fields,
    )  # fmt: skip
    model = copy.deepcopy(model)
    return SFTTrainer(model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


def prepared(trainer):
    return [(row["input_ids"], row["labels"]) for row in trainer.train_dataset]


def labelled(examples):
    return [(example["input_ids"], example.get("labels", example["input_ids"])) for example in examples]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bos", [False, True])
def test_rows_of_a_data_set(case, bos, tmp_path):
    """Tokens and labels of stock preparation, uncut."""
    rows, loss = CASES[case]
    tokenizer = byte_tokenizer("<|endoftext|>", bos)
    expected = prepared(sft(llama(), rows, tokenizer, tmp_path, max_length=256, **loss))
    examples = dataset_examples(rows, tokenizer, **loss)
    assert labelled(examples) == expected
    assert any("labels" in example for example in examples) == any(ids != labels for ids, labels in expected)
