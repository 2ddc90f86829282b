"""Run by `torchrun` from `test_rewards.py`: our trainer with each of the rewards given, results written as JSON."""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset

from tests.distributed.worker import COMMON, deterministic_generation
from trl_dpg import DatasetPolicyGradientConfig, DatasetPolicyGradientTrainer
from trl_dpg.metrics import LMHeadPattern
from trl_dpg.testing import save_tiny_models, tiny_prompts


def sum_of_ids(completion_ids, **kwargs):
    """Tells the completions of a prompt apart, and scores not all of them."""
    return [float(sum(ids)) if len(ids) % 3 else None for ids in completion_ids]


MIXED = {
    "replay_ratio": 0.5,
    "target_variants": [{}, {"learning_rate": 1e-2, "batch_size": 5, "seed": 3}, {"head_seed": 1}],
    "save_generated": True,
}


def run(reward, state, directory):
    """6 rows a process on two: a prompt's group of 4 spans both."""
    world = state.num_processes
    args = DatasetPolicyGradientConfig(
        directory,
        **COMMON,
        credit_assignment="sequence",
        per_device_train_batch_size=12 // world,
        per_device_eval_batch_size=8 // world,
        reward_weights=[1.0, 0.01],
        target_batch_size=2,
        target_learning_rate=1e-3,
        reward={"failing": "naive", "mixed": "metagradient"}.get(reward, reward),
        cross_group_batching=reward != "metagradient",
        **(MIXED if reward == "mixed" else {}),
    )
    with state.main_process_first():
        generator, target = save_tiny_models(os.path.join(directory, "models"))
    prompts = tiny_prompts(12, 3)
    pattern = LMHeadPattern.sixty_seven(scale="auto")

    def failing(model):
        if state.process_index == state.num_processes - 1:
            raise ArithmeticError("planted failure")
        return -model.lm_head.weight.norm()

    trainer = DatasetPolicyGradientTrainer(
        generator,
        target,
        failing if reward == "failing" else pattern,
        args,
        prompts["train"],
        prompts["test"],
        reward_funcs=sum_of_ids,
        replay_dataset=[{"text": text} for text in tiny_prompts(20, 1, seed=1)["train"]["prompt"]]
        if reward == "mixed"
        else None,
    )
    deterministic_generation(trainer)
    score = trainer._generate_and_score_completions
    steps = []

    def recording(inputs):
        output = score(inputs)
        rewards = {name: list(values) for name, values in trainer._logs["rewards"].items()}
        steps.append(
            {
                "used": gather_object(output["advantages"].tolist()),
                "logged": list(trainer._logs["advantages"]),
                "rewards": [str(value) for value in rewards.pop("sum_of_ids")],  # some are NaN
                **rewards,
                "raw": list(trainer._logs["extra"][f"{args.reward}_raw"]),
            }
        )
        return output

    trainer._generate_and_score_completions = recording
    trainer.train()
    figures = {
        key: value
        for row in trainer.state.log_history
        for key, value in row.items()
        if key.startswith(f"{args.reward}/") and not key.endswith("seconds")
    }
    metrics = trainer.evaluate()
    figures |= {key: metrics[f"eval_{key}"] for key in ("metric", "distinct", "completion_length")}
    if reward == "mixed":
        figures |= {key: value for key, value in metrics.items() if key.startswith("eval_variant_")}
        files = sorted(Path(directory, "generated").iterdir())
        figures["saved"] = sum(Dataset.from_parquet(str(path), keep_in_memory=True).num_rows for path in files)
    return {"steps": steps, "figures": figures, "predictions": trainer.predict(prompts["test"]).predictions}


if __name__ == "__main__":
    *rewards, directory, output = sys.argv[1:]
    torch.set_num_threads(1)
    state = PartialState(cpu=True)
    results = {reward: run(reward, state, os.path.join(directory, reward)) for reward in rewards}
    if state.is_main_process:
        with open(output, "w") as file:
            json.dump(results, file)
    state.destroy_process_group()
