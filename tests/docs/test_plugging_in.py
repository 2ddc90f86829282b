"""What docs/plugging_in.md promises to users of TRL."""

import dataclasses
import importlib
import os
import subprocess
import sys

import datasets
import pytest
import torch
from datasets import load_dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from trl import DatasetMixtureConfig, GRPOConfig, GRPOTrainer, ModelConfig, TrlParser
from trl.scripts import grpo

from tests.docs.pages import ROOT, read_blocks, shrink
from trl_dpg import DatasetPolicyGradientConfig, DatasetPolicyGradientTrainer
from trl_dpg.metrics import LMHeadNorm
from trl_dpg.scripts import train
from trl_dpg.testing import tiny_prompts, tiny_tokenizer


PAGE = "docs/plugging_in.md"
LORA = {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"}
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


def rows(trainer, key):
    return [row[key] for row in trainer.state.log_history if key in row]


def side_of_diff(sign, page=PAGE):
    """One side of a page's diff."""
    (block,) = read_blocks(page, "diff")
    lines = block.code.splitlines()
    assert all(line[0] in " +-" for line in lines)
    return "\n".join(line[1:] for line in lines if line[0] in f" {sign}")


# ---- A script ----


@pytest.mark.parametrize(
    ("sign", "trainer_class", "reward"),
    [("-", GRPOTrainer, "brevity"), ("+", DatasetPolicyGradientTrainer, "metagradient")],
)
def test_both_sides_of_the_diff(sign, trainer_class, reward, directory, tiny):
    scope = {}
    exec(compile(directory.substitute(side_of_diff(sign)), PAGE, "exec"), scope)
    trainer = scope["trainer"]
    assert type(trainer) is trainer_class
    assert len(rows(trainer, f"rewards/{reward}/mean")) == trainer.state.global_step == 2
    assert trainer.args.learning_rate == 1e-6


@pytest.mark.parametrize(("sign", "trainer_class"), [("-", GRPOTrainer), ("+", DatasetPolicyGradientTrainer)])
def test_both_sides_of_the_diff_in_the_readme(sign, trainer_class, directory, tiny):
    scope = {
        "dataset": datasets.load_dataset("any", split="train"),
        "my_metric": LMHeadNorm(),
        "my_reward": lambda completions, **kwargs: [0.0] * len(completions),
    }
    exec(compile(directory.substitute(side_of_diff(sign, "README.md")), "README.md", "exec"), scope)
    assert type(scope["trainer"]) is trainer_class
    scope["trainer"].train()


def test_the_old_reward_beside_the_new_one(directory, tiny):
    code = side_of_diff("+").replace("    target_model=", "    reward_funcs=brevity,\n    target_model=")
    code = code.replace("learning_rate=1e-6,", "learning_rate=1e-6,\n        reward_weights=[1.0, 0.01],")
    scope = {}
    exec(compile(directory.substitute(code), PAGE, "exec"), scope)
    assert scope["trainer"].reward_func_names == ["metagradient", "brevity"]
    assert scope["trainer"].reward_weights.tolist() == pytest.approx([1.0, 0.01])


# ---- A YAML file ----


def parse(script_arguments, config, *flags):
    return TrlParser((script_arguments, config, ModelConfig, DatasetMixtureConfig)).parse_args_and_config(
        [*flags, "--output_dir", "out"]
    )


def test_a_yaml_file_of_trl_means_the_same_here(directory, cpu):
    directory.write_files()
    script, stock, model, _ = parse(grpo.GRPOScriptArguments, GRPOConfig, "--config", "grpo.yaml")
    our_script, ours, our_model, _ = parse(
        train.DPGScriptArguments, DatasetPolicyGradientConfig, "--config", "grpo.yaml", "--metric", "67"
    )
    assert isinstance(ours, GRPOConfig)
    assert our_model == model
    assert our_script.dataset_name == script.dataset_name == "trl-lib/tldr"
    differ = {
        field.name
        for field in dataclasses.fields(GRPOConfig)
        if getattr(ours, field.name) != getattr(stock, field.name)
    }
    assert differ <= {"scale_rewards", "disable_tqdm", "logging_dir"}  # our defaults


@pytest.fixture
def prompts(directory):
    """A data set that both scripts can load."""
    os.mkdir("prompts")
    tiny_prompts(16, 1)["train"].to_json("prompts/train.jsonl")
    return "prompts"


def test_a_yaml_file_of_trl_trains(directory, prompts, change_configs, monkeypatch):
    change_configs(shrink)
    directory.write_files()
    target = directory.models["openai-community/gpt2"]
    flags = ["--target_model_name_or_path", target, "--metric", "67", "--target_untie_lm_head", "true"]
    assert train.main(["--config", "grpo.yaml", "--dataset_name", prompts, *flags]) == 0
    assert os.path.exists("qwen/adapter_config.json")  # `use_peft: true`


def test_rewards_of_the_file_come_after_the_metagradient(directory, prompts, change_configs, monkeypatch):
    change_configs(shrink)
    directory.write_files()
    trainers = []
    monkeypatch.setattr(DatasetPolicyGradientTrainer, "save_model", lambda self, *_, **__: trainers.append(self))
    (directory.path / "brevity.py").write_text(
        "def brevity(completions, **kwargs): return [-len(c) for c in completions]"
    )
    with open("grpo.yaml", "a") as file:
        file.write("reward_funcs: [brevity.brevity]\nreward_weights: [1.0, 0.1]\n")
    target = directory.models["openai-community/gpt2"]
    flags = ["--target_model_name_or_path", target, "--metric", "lm_head_norm", "--dataset_name", prompts]
    assert train.main(["--config", "grpo.yaml", *flags]) == 0
    assert trainers[0].reward_func_names == ["metagradient", "brevity"]
    assert trainers[0].reward_weights.tolist() == pytest.approx([1.0, 0.1])


# ---- A reward for `trl grpo` ----

FLAGS = ["--reward_funcs", "my_rewards.metagradient", "--scale_rewards", "none"]


def test_reward_of_a_module_in_trl_grpo(directory, prompts, change_configs, monkeypatch):
    change_configs(shrink)
    directory.write_files()
    trainers = []
    monkeypatch.setattr(GRPOTrainer, "save_model", lambda self, *args, **kwargs: trainers.append(self))
    parsed = grpo.make_parser().parse_args_and_config(["--config", "grpo.yaml", "--dataset_name", prompts, *FLAGS])
    grpo.main(*parsed)
    (trainer,) = trainers
    assert type(trainer) is GRPOTrainer
    assert trainer.reward_func_names == ["metagradient"]
    assert trainer.reward_funcs[0] is importlib.import_module("my_rewards").metagradient
    assert len(rows(trainer, "metagradient/pixel_accuracy")) == 2
    assert min(rows(trainer, "metagradient/std")) > 0


@pytest.mark.slow
def test_reward_of_a_module_in_the_command(directory, prompts):
    """The page's command itself, through Accelerate's launcher."""
    directory.write_files()
    small = ["--num_processes", "1", "--use_cpu", "--bf16", "false", "--max_steps", "1", "--num_generations", "4"]
    small += ["--per_device_train_batch_size", "8", "--max_completion_length", "6", "--dataset_name", prompts]
    command = [sys.executable, "-m", "trl.cli.main", "grpo", "--config", "grpo.yaml", *FLAGS, *small]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert "metagradient/pixel_accuracy" in result.stdout + result.stderr


# ---- What works as in `GRPOTrainer` ----


def test_adapters_that_are_there_already(make_trainer, causal_lm):
    generator, target = (get_peft_model(causal_lm(seed=seed), LoraConfig(**LORA)) for seed in (0, 1))
    trainer = make_trainer(model=generator, target_model=target, metric=last_logit)
    trainer.train()
    assert isinstance(trainer.model, PeftModel)
    assert min(rows(trainer, "metagradient/std")) > 0


def last_logit(model):
    return model(input_ids=torch.tensor([[1, 2]])).logits[0, -1].float().log_softmax(-1)[3]


@pytest.fixture
def llama(tmp_path):
    """A tiny Llama with its tokenizer, large enough for blocks of 4 bits."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    return str(tmp_path / "llama")


def test_quantized_generator_and_target(llama, make_config):
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights="gaussian")
    trainer = DatasetPolicyGradientTrainer(
        model=llama,
        target_model=llama,
        metric=last_logit,
        args=make_config(
            target_model_init_kwargs={"quantization_config": NF4},
            learning_rate=1e-2,
            lr_scheduler_type="constant",
        ),
        train_dataset=tiny_prompts(16, 1)["train"],
        quantization_config=NF4,
        peft_config=lora,
        target_peft_config=lora,
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    for model in (trainer.model, trainer.target_training.target_model):
        assert model.base_model.model.is_loaded_in_4bit
    assert before and all("lora" in name for name in before)
    after = dict(trainer.model.named_parameters())
    assert any(not torch.equal(after[name], value) for name, value in before.items())
    assert min(rows(trainer, "metagradient/std")) > 0


def test_streamed_data_set(make_trainer, tmp_path):
    tiny_prompts(16, 1)["train"].to_json(tmp_path / "prompts.jsonl")
    stream = load_dataset("json", data_files=str(tmp_path / "prompts.jsonl"), split="train", streaming=True)
    assert isinstance(stream, datasets.IterableDataset)
    trainer = make_trainer(train_dataset=stream, eval_dataset=stream.take(2))
    trainer.train()
    assert trainer.state.global_step == 2
    assert "eval_metric" in trainer.evaluate()


def test_streaming_in_the_command(directory, prompts, change_configs):
    change_configs(shrink)
    models = [directory.models[name] for name in ("Qwen/Qwen2.5-0.5B-Instruct", "openai-community/gpt2")]
    flags = ["--model_name_or_path", models[0], "--target_model_name_or_path", models[1], "--metric", "lm_head_norm"]
    assert train.main([*flags, "--dataset_name", prompts, "--dataset_streaming", "true", "--output_dir", "out"]) == 0


@pytest.mark.parametrize(
    ("config", "calls"),
    [
        ({"num_iterations": 2, "max_steps": 4}, 2),
        ({"steps_per_generation": 2, "max_steps": 4}, 2),
        ({"loss_type": "grpo", "beta": 0.1}, 2),
        ({"loss_type": "dr_grpo"}, 2),
    ],
)
def test_one_reward_call_a_generation_batch(make_trainer, directory, config, calls):
    model = directory.models["Qwen/Qwen2.5-0.5B-Instruct"]  # a name, for the reference model of `beta`
    trainer = make_trainer(model=model, **config, train_dataset=tiny_prompts(64, 1)["train"])
    reward, seen = trainer.reward_funcs[0], []
    trainer.reward_funcs[0] = counted = lambda **kwargs: seen.append(kwargs["completions"]) or reward(**kwargs)
    counted.__name__ = "metagradient"
    trainer.train()
    assert len(seen) == calls


def test_the_generators_tokenizer_is_not_the_targets(directory):
    """The page's module takes the tokens that end a completion from the generator."""
    directory.write_files()
    name = directory.models["Qwen/Qwen2.5-0.5B-Instruct"]
    (block,) = [block for block in read_blocks(PAGE, "python") if block.file == "my_rewards.py"]
    scope = {}
    exec(compile(directory.substitute(block.code), "my_rewards.py", "exec"), scope)
    assert scope["metagradient"].eos_token_ids == [AutoTokenizer.from_pretrained(name).eos_token_id]
