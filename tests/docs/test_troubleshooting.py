"""Names and facts of docs/troubleshooting.md."""

import dataclasses
import inspect
import json
import re

import torch

from tests.docs.pages import PAGES, ROOT
from trl_dpg import DatasetPolicyGradientConfig, DatasetPolicyGradientTrainer
from trl_dpg.scripts.train import DPGScriptArguments
from trl_dpg.testing import tiny_prompts


TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
PAGE = TEXTS["docs/troubleshooting.md"]

# Logged in special cases, which the tests named here bring about.
SPECIAL = {
    "metagradient/micro_batch_size": "tests/reliability/test_memory.py",
    "metagradient/skipped": "tests/reliability/test_nonfinite.py",
    "metagradient/replayed": "tests/trainer/test_replay.py",
    "metagradient/NAME": "stands for a read-out",
    "metagradient/pixel_accuracy": "a read-out",
    "eval_pixel_accuracy": "a read-out",
    "eval_prefers_wanted": "a read-out",
    "eval_NAME": "stands for a read-out",
    "eval_reward": "a stock GRPOTrainer's",
    "eval_loss": "what other trainers have",
}
FIELDS = {"eval_strategy", "eval_steps", "eval_on_start", "eval_dataset", "eval_dataset_name"}


def test_names_are_those_of_the_logs(make_trainer):
    trainer = make_trainer(
        metric=lambda model: -model.lm_head.weight.double().norm(),
        target_batch_size=4,
        target_curvature="central_difference",
        max_steps=1,
    )
    trainer.train()
    trainer.evaluate()
    logged = {name for row in trainer.state.log_history for name in row}
    for page, text in TEXTS.items():
        for name in re.findall(
            r"`((?:metagradient/|eval_|clip_ratio/)\w+|entropy|grad_norm|reward_std|step_time)`", text
        ):
            assert name in logged | set(SPECIAL) | FIELDS, f"{page}: {name}"


def test_names_of_fields():
    fields = {
        field.name
        for config in (DatasetPolicyGradientConfig, DPGScriptArguments)
        for field in dataclasses.fields(config)
    }
    parameters = set(inspect.signature(DatasetPolicyGradientTrainer).parameters)
    for page, text in TEXTS.items():
        for name in re.findall(r"`-{0,2}(target_\w+)\b", text):
            assert name in fields | parameters | {
                "target_training",
                "target_training_arguments",
                "target_examples",
            } or (
                name == "target_modules"  # PEFT's
            ), f"{page}: {name}"


def test_a_run_that_works():
    """Figures of the first table."""
    path = ROOT / "experiments/results/tiny_67/metagradient/seed_0/log.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    quoted = re.findall(r"^\| `([\w/]+)` \| [^|]+ \| ([−\d.e-]+) \| ([−\d.e-]+) \|$", PAGE, re.MULTILINE)
    assert len(quoted) == 6
    for name, *values in quoted:
        for text, row in zip(values, (rows[0], rows[-1]), strict=True):
            digits = len(text.partition("e")[0].partition(".")[2])
            value = float(text.replace("−", "-"))
            shown = f"{row[name]:.{digits}{'e' if 'e' in text else 'f'}}"
            assert float(shown) == value, name


def test_log_probabilities_are_over_the_whole_vocabulary(make_trainer):
    """Also over tokens that are never sampled."""
    suppressed = list(range(16, 64))
    trainer = make_trainer(
        generation_kwargs={"suppress_tokens": suppressed}, train_dataset=tiny_prompts(16, 1)["train"]
    )
    inputs = [{"prompt": "the red sun"}] * 8
    output = trainer._generate_and_score_completions(inputs)
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
    mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
    length = output["completion_ids"].size(1)
    assert not set(output["completion_ids"].flatten().tolist()) & set(suppressed)
    found, *_ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, length)
    logits = trainer.model(input_ids=ids, attention_mask=mask).logits[:, -length - 1 : -1]
    expected = logits.log_softmax(-1).gather(-1, output["completion_ids"][..., None])[..., 0]
    torch.testing.assert_close(found, expected)
    allowed = logits[..., :16].log_softmax(-1).gather(-1, output["completion_ids"][..., None])[..., 0]
    assert (allowed - found).min() > 0.5  # what sampling saw is something else
