"""Tiny models, tokenizers and trainers for the tests of rewards and trainers."""

import os

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from trl_dpg import DatasetPolicyGradientConfig, DatasetPolicyGradientTrainer
from trl_dpg.metrics import LMHeadPattern
from trl_dpg.testing import WORDS, tiny_causal_lm, tiny_prompts, tiny_tokenizer


collect_ignore = ["vllm/worker.py"]  # a script of its own, which needs vLLM


# Two prompts with four completions of at most six words each, all on the CPU.
CONFIG = {
    "max_steps": 2,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "num_generations": 4,
    "max_completion_length": 6,
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """Cores that this process may use, not those of the machine; each worker takes half a gigabyte."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 8)


def _causal_lm(seed=0, **kwargs):
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "max_position_embeddings": 32}
    return tiny_causal_lm(seed=seed, **{**sizes, **kwargs})


@pytest.fixture
def causal_lm():
    """Makes a GPT-2 over the 64 tokens of the tiny tokenizer, as small as it gets."""
    return _causal_lm


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def chat_tokenizer():
    """The tiny tokenizer with a chat template: contents one after the other."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"
    return tokenizer


@pytest.fixture
def bos_tokenizer():
    """The same words under other ids, other special tokens, and a BOS before every text."""
    vocab = {token: index for index, token in enumerate(["<s>", "</s>", "[UNK]", *reversed(WORDS)])}
    backend = Tokenizer(WordLevel(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="[UNK]")


@pytest.fixture
def make_grpo_trainer(tmp_path):
    """Makes a stock GRPO trainer; keyword arguments are fields of its configuration."""

    def make(
        reward,
        train_dataset=None,
        trainer_class=GRPOTrainer,
        processing_class=None,
        model=None,
        eval_dataset=None,
        **config,
    ):
        return trainer_class(
            model=model or _causal_lm(),
            reward_funcs=reward,
            args=GRPOConfig(output_dir=str(tmp_path / "grpo"), **{**CONFIG, **config}),
            train_dataset=train_dataset or tiny_prompts(16, 1)["train"],
            eval_dataset=eval_dataset,
            processing_class=processing_class or tiny_tokenizer(),
        )

    return make


@pytest.fixture
def make_config(tmp_path):
    """Makes a configuration; keyword arguments are its fields."""

    def make(**config):
        return DatasetPolicyGradientConfig(**{"output_dir": str(tmp_path / "dpg"), **CONFIG, **config})

    return make


@pytest.fixture
def make_trainer(make_config):
    """Makes a DPG trainer; keyword arguments are its own, or else fields of its configuration."""

    def make(trainer_class=DatasetPolicyGradientTrainer, **kwargs):
        prompts = tiny_prompts(16, 3)
        arguments = {
            "model": _causal_lm(),
            "target_model": _causal_lm(seed=1),
            "metric": LMHeadPattern([[1, -1], [-1, 1]]),
            "args": None,
            "train_dataset": prompts["train"],
            "eval_dataset": prompts["test"],
            "processing_class": tiny_tokenizer(),
            "target_processing_class": tiny_tokenizer(),
        }
        others = ["formatting_func", "reward_funcs", "reward_processing_classes", "reference_texts"]
        others += ["peft_config", "target_peft_config", "tools", "rollout_func", "text_evaluation", "replay_dataset"]
        others += ["environment_factory"]
        given = {name: kwargs.pop(name) for name in [*arguments, *others] if name in kwargs}
        arguments = {**arguments, **given}
        if arguments["args"] is None:
            arguments["args"] = make_config(**kwargs)
        elif kwargs:
            raise TypeError(f"`args` is given, and so are its fields {sorted(kwargs)}.")
        return trainer_class(**arguments)

    return make


@pytest.fixture
def weights():
    """Copies a model's weights."""
    return lambda model: {name: tensor.clone() for name, tensor in model.state_dict().items()}
