"""Models and data, for all benchmarks."""

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from experiments.corpora import smollm2, wikipedia_leads
from trl_dpg.metagradients import TargetTrainingArguments


# batch size and tokens per example of a step
SHAPES = {"gpt2-shaped": (8, 64), "gpt2": (8, 512), "smollm2": (2, 64)}


def load(name: str, device: str, dtype: torch.dtype = torch.float32, **kwargs) -> PreTrainedModel:
    """A random GPT-2 of 5.3M parameters with an untied head, a random GPT-2 of 124M, or pretrained SmolLM2-135M-Instruct."""
    if name == "smollm2":
        model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=dtype, **kwargs)
    elif name == "gpt2":
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(**kwargs)).to(dtype)
    else:
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=4096, n_positions=64, n_embd=256, n_layer=4, n_head=4, tie_word_embeddings=False, bos_token_id=0,
            eos_token_id=0, **kwargs,
        )  # fmt: skip
        model = GPT2LMHeadModel(config).to(dtype)
    return model.to(device)


def with_lora(model: PreTrainedModel) -> Any:
    """LoRA of rank 8 on every linear layer of the blocks."""
    torch.manual_seed(0)
    gpt2 = model.config.model_type == "gpt2"
    return get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", fan_in_fan_out=gpt2))


def make_examples(name: str, num_examples: int, length: int, skip: int = 0) -> list[dict[str, list[int]]]:
    """Random tokens for a random model, first paragraphs of Wikipedia articles for the pretrained one."""
    if name != "smollm2":
        generator = torch.Generator().manual_seed(skip)
        return [
            {"input_ids": torch.randint(4096, (length,), generator=generator).tolist()} for _ in range(num_examples)
        ]
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    leads = [tokenizer(text)["input_ids"] for text in wikipedia_leads()["text"][: 8 * (skip + num_examples)]]
    leads = [ids[:length] for ids in leads if len(ids) >= length]
    return [{"input_ids": ids} for ids in leads[skip : skip + num_examples]]


def make_args(name: str, num_steps: int, **fields) -> TargetTrainingArguments:
    """AdamW as in the paper, `adam_epsilon_root` 1e-9 unless given."""
    batch_size, length = SHAPES[name]
    given = {"batch_size": batch_size, "max_length": length, "adam_epsilon_root": 1e-9, **fields}
    return TargetTrainingArguments(learning_rate=1e-5, disable_tqdm=True, **given)
