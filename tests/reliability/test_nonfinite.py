"""Numbers that are not finite: named where they arise, never written into weights, and skipped where that is asked for."""

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from trl_dpg.metrics import LMHeadNorm


ROOT = Path(__file__).parents[2]


class BreaksAt(LMHeadNorm):
    """A norm that is NaN in one generation batch's run, after fine-tuning."""

    def __init__(self, step):
        self.step, self.trainer, self.original = step, None, None

    def setup(self, model):
        self.original = model.lm_head.weight.detach().clone()

    def __call__(self, model):
        value = super().__call__(model)
        moved = not torch.equal(model.lm_head.weight.detach(), self.original)
        is_here = self.trainer is not None and self.trainer.state.global_step == self.step
        return value * math.nan if moved and is_here and self.trainer.model.training else value


class Snapshots(TrainerCallback):
    """Weights and optimizer state after each step."""

    def __init__(self, trainer):
        self.trainer, self.taken = trainer, []

    def on_step_end(self, args, state, control, **kwargs):
        weights = copy.deepcopy(self.trainer.model.state_dict())
        self.taken.append((weights, copy.deepcopy(self.trainer.optimizer.state_dict()["state"])))


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, tuple):
        return all(same(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b)


def test_the_message_names_the_fields_of_the_target(make_trainer):
    """`learning_rate` and `max_grad_norm` are the generator's."""
    trainer = make_trainer(target_learning_rate=1e6, target_batch_size=2, target_seed=2**64 - 1)
    with pytest.raises(FloatingPointError, match="Lower `target_learning_rate`, clip with `target_max_grad_norm`"):
        trainer.train()
    trainer = make_trainer(target_learning_rate=1e30, target_batch_size=2)
    with pytest.raises(FloatingPointError, match="Lower the target's learning rate"):
        trainer.evaluate()


@pytest.fixture
def run(make_trainer):
    def make(metric=None, **kwargs):
        kwargs = {"max_steps": 4, "learning_rate": 1e-3, "entropy_coef": 0.1, "weight_decay": 0.1, **kwargs}
        trainer = make_trainer(metric=metric or LMHeadNorm(), **kwargs)
        if isinstance(metric, BreaksAt):
            metric.trainer = trainer
        snapshots = Snapshots(trainer)
        trainer.add_callback(snapshots)
        return trainer, snapshots.taken

    return make


def test_metric_ends_the_run_and_is_named(run):
    trainer, taken = run(BreaksAt(2), eval_dataset=None)
    with pytest.raises(FloatingPointError, match=r"batch of step 2: `metric` returned nan.*`nonfinite='skip'`"):
        trainer.train()
    assert len(taken) == 2
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())
    assert same(trainer.model.state_dict(), taken[1][0])


def test_skipped_batch_leaves_weights_and_moments(run):
    trainer, taken = run(BreaksAt(2), nonfinite="skip", eval_dataset=None)
    trainer.train()
    assert same(taken[2], taken[1])  # in spite of weight decay, momentum and an entropy bonus
    assert not same(taken[1][0], taken[0][0]) and not same(taken[3][0], taken[2][0])
    logged = [row["metagradient/skipped"] for row in trainer.state.log_history if "loss" in row]
    assert logged == [0, 0, 1, 0]


def test_all_steps_of_a_skipped_batch(run):
    """A generation batch of two optimizer steps, each made twice."""
    kwargs = {"steps_per_generation": 2, "num_iterations": 2, "max_steps": 8, "gradient_accumulation_steps": 1}
    trainer, taken = run(BreaksAt(0), nonfinite="skip", eval_dataset=None, **kwargs)
    trainer.train()
    start = taken[0][0]
    assert all(same(weights, start) and state == {} for weights, state in taken[:4])
    assert all(not same(taken[i][0], taken[i - 1][0]) for i in range(4, 8))


def test_step_with_one_skipped_batch_of_two(run):
    kwargs = {"steps_per_generation": 1, "gradient_accumulation_steps": 2, "max_steps": 2}
    metric = BreaksAt(1)
    trainer, taken = run(metric, nonfinite="skip", eval_dataset=None, **kwargs)
    calls = []

    class Once(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            calls.append(state.global_step)
            metric.step = None if state.global_step == 1 else 1  # only the first of its two batches

    trainer.add_callback(Once())
    trainer.train()
    assert calls and same(taken[1], taken[0])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_the_generators_own_loss(run, value, max_grad_norm):
    def break_step_2(trainer):
        """While gradients are taken, not while texts are generated."""

        def hook(module, inputs, output):
            is_here = trainer.state.global_step == 1 and torch.is_grad_enabled()
            return output * value if is_here else output

        trainer.model.transformer.ln_f.register_forward_hook(hook)

    trainer, taken = run(max_steps=3, max_grad_norm=max_grad_norm, eval_dataset=None)
    break_step_2(trainer)
    with pytest.raises(FloatingPointError, match="the gradient of the generator's step 2"):
        trainer.train()
    assert same(trainer.model.state_dict(), taken[0][0])

    trainer, taken = run(max_steps=3, max_grad_norm=max_grad_norm, nonfinite="skip", eval_dataset=None)
    break_step_2(trainer)
    trainer.train()
    assert same(taken[1], taken[0]) and not same(taken[2][0], taken[1][0])
    assert [row.get("nonfinite_steps") for row in trainer.state.log_history if "loss" in row] == [0, 1, 0]


def test_naive_reward(run):
    trainer, taken = run(BreaksAt(1), nonfinite="skip", reward="naive", eval_dataset=None, max_steps=2)
    trainer.train()
    assert same(taken[1], taken[0])
    assert [row["naive/skipped"] for row in trainer.state.log_history if "loss" in row] == [0, 1]


def test_validation(make_trainer):
    def broken(model):
        return model.lm_head.weight.norm() * (math.nan if not trainer.model.training else 1)

    trainer = make_trainer(metric=broken)
    with pytest.raises(FloatingPointError, match="a validation's metric"):
        trainer.evaluate()
    trainer = make_trainer(metric=broken, nonfinite="skip")
    figures = trainer.evaluate()
    assert {name for name, value in figures.items() if value == -math.inf} == {"eval_metric", "eval_metric_gain"}


@pytest.mark.parametrize("best", ["target_loss", "eval_pixel_accuracy", "eval_metric", "share"])
def test_a_broken_validation_is_never_the_best(make_trainer, best):
    """Whatever is compared, whatever is better."""

    class Broken(LMHeadNorm):
        def __call__(self, model):
            return super().__call__(model) * (math.nan if step() == 2 and not trainer.model.training else 1)

        def readouts(self, model):
            return {"pixel_accuracy": 0.5}

    def step():
        return trainer.state.global_step

    greater = best not in ("target_loss", "eval_metric")
    trainer = make_trainer(
        metric=Broken(), nonfinite="skip", eval_strategy="steps", eval_steps=1, save_strategy="best", metric_for_best_model=best,
        greater_is_better=greater, text_evaluation=lambda texts: {"share": float(step())},
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_global_step == 1
    rows = [row for row in trainer.state.log_history if "eval_metric" in row]
    assert rows[1][f"eval_{best.removeprefix('eval_')}"] == (-math.inf if greater else math.inf)


def test_bad_settings(make_config, monkeypatch):
    with pytest.raises(ValueError, match="`nonfinite` must be 'raise' or 'skip', got 'ignore'"):
        make_config(nonfinite="ignore")
    with pytest.raises(ValueError, match="`nonfinite='skip'` does not go with DeepSpeed"):
        make_config(nonfinite="skip", deepspeed={"train_batch_size": "auto"})
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")  # as by `accelerate launch --use_deepspeed`
    with pytest.raises(ValueError, match="`nonfinite='skip'` does not go with DeepSpeed"):
        make_config(nonfinite="skip")


WORKER = """
import json, math, sys, torch
from accelerate import PartialState
sys.path.insert(0, {root!r})
from tests.conftest import CONFIG, _causal_lm
from trl_dpg.testing import tiny_prompts, tiny_tokenizer
from trl_dpg import DatasetPolicyGradientConfig, DatasetPolicyGradientTrainer
from trl_dpg.metrics import LMHeadNorm

class Broken(LMHeadNorm):
    def __call__(self, model):
        value = super().__call__(model)
        return value * math.nan if PartialState().process_index == 1 and trainer.state.global_step == 1 else value

config = {{**CONFIG, "per_device_train_batch_size": 4, "max_steps": 3, "nonfinite": sys.argv[1], "learning_rate": 1e-3}}
trainer = DatasetPolicyGradientTrainer(
    _causal_lm(), _causal_lm(seed=1), Broken(), DatasetPolicyGradientConfig(sys.argv[2], **config),
    train_dataset=tiny_prompts(16, 1)["train"], processing_class=tiny_tokenizer(), target_processing_class=tiny_tokenizer(),
)
try:
    trainer.train()
    error = None
except FloatingPointError as e:
    error = str(e)
skipped = [row.get("metagradient/skipped") for row in trainer.state.log_history if "loss" in row]
total = sum(p.double().sum().item() for p in trainer.model.parameters())
rank = PartialState().process_index
with open(f"{{sys.argv[3]}}/rank_{{rank}}.json", "w") as file:
    json.dump([rank, error, skipped, total], file)
"""


@pytest.mark.parametrize("policy", ["skip", "raise"])
def test_two_processes_of_which_one_sees_it(tmp_path, policy):
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(root=str(ROOT)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, policy, str(tmp_path / "out"), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    rows = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("rank_*.json"))]
    assert [row[0] for row in rows] == [0, 1], done.stderr[-3000:]
    assert rows[0][3] == rows[1][3]
    if policy == "skip":
        assert all(row[1] is None for row in rows) and rows[0][2] == [0, 1, 0]
    else:
        assert all("`metric` returned nan" in row[1] for row in rows) and rows[0][2] == [None]
