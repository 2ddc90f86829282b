"""Ways to generate that TRL offers beside Transformers' `generate`; vLLM itself is in `tests/vllm`."""

import pytest
from datasets import Dataset

from tests.trainer.test_tools import byte_tokenizer, conversations  # noqa: F401


def test_continuous_batching(make_trainer):
    sizes = {"max_batch_tokens": 64, "num_blocks": 16, "page_size": 16}
    trainer = make_trainer(
        use_transformers_continuous_batching=True,
        transformers_continuous_batching_config={**sizes, "max_memory_percent": 0.05},
        max_steps=2,
    )
    trainer.train()
    rows = [row for row in trainer.state.log_history if "metagradient/std" in row]
    assert len(rows) == 2 and all(row["metagradient/std"] > 0 for row in rows)
    assert trainer.evaluate()["eval_distinct"] > 0.5


@pytest.mark.parametrize("use_vllm", [False, True])
def test_a_seed_of_all_requests_is_refused(make_config, use_vllm):
    with pytest.raises(ValueError, match="`generation_kwargs` has the `seed` 3"):
        make_config(generation_kwargs={"seed": 3}, use_vllm=use_vllm)


def test_best_weights_are_sent_to_vllm(make_trainer, tmp_path):
    """The steps at which TRL sends weights; those of the best checkpoint are loaded at the last one."""
    saving = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    trainer = make_trainer(**saving, load_best_model_at_end=True, max_steps=2)
    trainer._last_loaded_step = -1
    generate = trainer._generate_single_turn

    def sending(*args, **kwargs):  # as in TRL
        if trainer.state.global_step != trainer._last_loaded_step:
            sent.append(trainer.state.global_step)
            trainer._last_loaded_step = trainer.state.global_step
        return generate(*args, **kwargs)

    sent = []
    trainer._generate_single_turn = sending
    trainer.train()
    assert sent == [0, 1, 2]
    trainer.evaluate()
    assert sent == [0, 1, 2, 2]


class Calculator:
    """An environment with one tool, whose reward is further to the metagradient."""

    instances = 0

    def __init__(self):
        Calculator.instances += 1

    def reset(self, **row):
        self.calls = 0
        return " Go."

    def multiply(self, a: int, b: int) -> int:
        """
        Multiplies.

        Args:
            a: One number.
            b: Another one.
        """
        self.calls += 1
        return a * b

    def get_reward(self) -> float:
        return float(self.calls)


@pytest.mark.parametrize("writes_prompts", [False, True])
def test_environment_is_passed_on(make_trainer, causal_lm, byte_tokenizer, writes_prompts):  # noqa: F811
    call = '<tool_call>\n{"name": "multiply", "arguments": {"a": 6, "b": 7}}\n</tool_call>'
    prompts = []

    def generate(prompt_ids, *args, **kwargs):
        texts = []
        for i, ids in enumerate(prompt_ids):
            prompts.append(byte_tokenizer.decode(ids))
            answered = "<tool_response>" in prompts[-1].split("<|im_start|>user")[-1]
            texts.append("42" if answered else f"I ask.{call}" if i % 2 == 0 else "No.")
        return [[*byte_tokenizer(text)["input_ids"], byte_tokenizer.eos_token_id] for text in texts], None

    sizes = {"vocab_size": len(byte_tokenizer), "max_position_embeddings": 2048}
    data: dict[str, Dataset] = {"train_dataset": conversations(8), "eval_dataset": conversations(2)}
    if writes_prompts:
        empty = [{"role": "user", "content": ""}]
        data = {name: Dataset.from_dict({"prompt": [empty] * len(rows)}) for name, rows in data.items()}
    trainer = make_trainer(
        model=causal_lm(**sizes),
        target_model=causal_lm(seed=1, **sizes),
        processing_class=byte_tokenizer,
        target_processing_class=byte_tokenizer,
        environment_factory=Calculator,
        max_completion_length=300,
        max_steps=1,
        **data,
    )
    trainer._generate_single_turn = generate
    trainer.train()
    assert trainer.reward_func_names == ["metagradient", "Calculator"]
    assert list(trainer._logs["rewards"]["Calculator"]) == [1.0, 0.0] * 4
    assert all(("user\n Go." if writes_prompts else "times Go.") in prompt for prompt in prompts)
    assert [e["text"] for e in trainer.target_training._examples] == ["I ask.\n42", "No."] * 4
    assert trainer.predict(data["eval_dataset"]).predictions[0] == "I ask.\n42"
