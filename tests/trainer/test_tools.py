"""A generator that calls tools: the target is trained on what the generator wrote, in training and in validation."""

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast
from trl.chat_template_utils import qwen3_chat_template


CALL = '<tool_call>\n{"name": "multiply", "arguments": {"a": 6, "b": 7}}\n</tool_call>'
ANSWER = "42"  # as the tool's output


def multiply(a: int, b: int) -> int:
    """
    Multiplies.

    Args:
        a: One number.
        b: Another one.
    """
    return a * b


def conversations(number):
    return Dataset.from_dict(
        {"prompt": [[{"role": "user", "content": f"6 times 7, {i} times"}] for i in range(number)]}
    )


@pytest.fixture
def byte_tokenizer():
    backend = Tokenizer(BPE({letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))}, []))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = qwen3_chat_template
    return tokenizer


@pytest.fixture
def make_tool_trainer(make_trainer, causal_lm, byte_tokenizer):
    """Makes a trainer whose generator calls the tool in every other completion, and then answers."""

    def generate(prompt_ids, *args, **kwargs):
        texts = []
        for i, ids in enumerate(prompt_ids):
            answered = "<tool_response>" in byte_tokenizer.decode(ids).split("<|im_start|>user")[-1]
            texts.append(ANSWER if answered else f"I ask.{CALL}" if i % 2 == 0 else "No.")
        return [[*byte_tokenizer(text)["input_ids"], byte_tokenizer.eos_token_id] for text in texts], None

    def make(**kwargs):
        sizes = {"vocab_size": len(byte_tokenizer), "max_position_embeddings": 2048}
        tokenizers = {"processing_class": byte_tokenizer, "target_processing_class": byte_tokenizer}
        data = {"train_dataset": conversations(8), "eval_dataset": conversations(3)}
        models = {"model": causal_lm(**sizes), "target_model": causal_lm(seed=1, **sizes)}
        trainer = make_trainer(
            **models, **tokenizers, **{**data, **kwargs}, tools=[multiply], max_completion_length=300
        )
        trainer._generate_single_turn = generate
        return trainer

    return make


def test_target_reads_the_assistant_alone(make_tool_trainer):
    trainer = make_tool_trainer(max_steps=1)
    trainer.train()
    texts = [example["text"] for example in trainer.target_training._examples]
    assert texts == ["I ask.\n42", "No."] * 4


@pytest.mark.parametrize("credit", ["token", "expected"])
def test_credit_is_of_the_assistants_tokens(make_tool_trainer, byte_tokenizer, credit):
    trainer = make_tool_trainer(max_steps=1, credit_assignment=credit)
    trainer.train()
    example = trainer.target_training._examples[0]
    owners = example["written_by"]
    assert owners[6] == -1  # the line break between what came before the tool's output and what came after
    owners.remove(-1)
    assert byte_tokenizer.decode([example["completion_ids"][i] for i in owners]) == "I ask.42<|im_end|>"
    assert owners[:6] == list(range(6))
    assert owners[6:] == list(range(len(example["completion_ids"]))[-3:])  # and not the tool's 42
    words = trainer.target_training.credit_by_word(0)
    assert {word.text for word in words if word.credit != 0} <= {*"I ask.42", "<|im_end|>"}


def test_validation_calls_tools(make_tool_trainer):
    """Before training, in training and after it, with fewer prompts than a generation batch and with more."""
    trainer = make_tool_trainer(eval_on_start=True, eval_strategy="steps", eval_steps=2)
    trainer.train()
    evaluations = [row for row in trainer.state.log_history if "eval_metric" in row]
    assert [row["step"] for row in evaluations] == [0, 2]
    for row in evaluations:
        assert row["eval_tools/call_frequency"] == 0.5
        assert row["eval_completion_length"] == pytest.approx((len(f"I ask.{CALL}") + 1 + 3 + 4) / 2)
    assert trainer.predict(conversations(3)).predictions == ["I ask.\n42", "No."] * 6
    larger = make_tool_trainer(max_steps=1, per_device_eval_batch_size=16)
    larger.train()
    assert larger.evaluate(conversations(6))["eval_tools/call_frequency"] == 0.5


@pytest.mark.parametrize("conversational", [False, True])
def test_what_an_environment_says_is_not_trained_on(make_trainer, causal_lm, byte_tokenizer, conversational):
    """A `rollout_func` puts an environment's text between the generator's, and `env_mask` says so."""

    def rollout(prompts, trainer):
        texts = ["look", "a lamp", "take it"]
        pieces = [byte_tokenizer(text)["input_ids"] for text in texts]
        ids = [*sum(pieces, []), byte_tokenizer.eos_token_id]
        mask = [1] * len(pieces[0]) + [0] * len(pieces[1]) + [1] * (len(pieces[2]) + 1)
        num = len(prompts)
        return {
            "prompt_ids": [byte_tokenizer("go")["input_ids"]] * num,
            "completion_ids": [ids] * num,
            "logprobs": [[[0.0]] * len(ids)] * num,
            "env_mask": [mask] * num,
        }

    sizes = {"vocab_size": len(byte_tokenizer), "max_position_embeddings": 512}
    prompts = conversations(8) if conversational else Dataset.from_dict({"prompt": ["go"] * 8})
    trainer = make_trainer(
        model=causal_lm(**sizes),
        target_model=causal_lm(seed=1, **sizes),
        processing_class=byte_tokenizer,
        target_processing_class=byte_tokenizer,
        train_dataset=prompts,
        eval_dataset=prompts.select(range(2)),
        rollout_func=rollout,
        credit_assignment="token",
        max_steps=1,
    )
    trainer.train()
    example = trainer.target_training._examples[0]
    assert example["text"] == "look\ntake it"
    written = [example["completion_ids"][i] for i in example["written_by"] if i >= 0]
    assert byte_tokenizer.decode(written) == "looktake it<|im_end|>"
    assert trainer.evaluate()["eval_completion_length"] == len("looktake it") + 1
