"""The trainer with real data beside generated, with variants, and with its generation batches as files."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset

from trl_dpg.data import completion_text


REAL = Dataset.from_dict({"text": ["the red sun", "you see", "a dog", "walk to the moon", "six seven", "blue sea"]})
ROBUST = {
    "replay_dataset": REAL,
    "replay_ratio": 0.5,
    "target_batch_size": 8,
    "target_variants": [{}, {"learning_rate": 1e-2, "seed": 3}],
    "save_generated": True,
    "learning_rate": 1e-2,
}


def rows(trainer, key):
    return [row[key] for row in trainer.state.log_history if key in row]


def files(trainer):
    return sorted((Path(trainer.args.output_dir) / "generated").iterdir())


def test_figures_and_files(make_trainer, monkeypatch):
    kept = []
    trainer = make_trainer(**ROBUST, max_steps=2, eval_strategy="steps", eval_steps=2)
    score = trainer._generate_and_score_completions

    def recording(inputs):
        output = score(inputs)
        logs = trainer._logs
        kept.append((list(logs["prompt"]), list(logs["completion"]), list(logs["extra"]["metagradient_raw"])))
        return output

    monkeypatch.setattr(trainer, "_generate_and_score_completions", recording)
    trainer.train()
    assert rows(trainer, "metagradient/replayed") == [8, 8]
    gains = [rows(trainer, f"metagradient/variant_{i}/metric_gain") for i in range(2)]
    assert rows(trainer, "metagradient/metric_gain") == pytest.approx(
        [sum(pair) / 2 for pair in zip(*gains, strict=True)]
    )
    (row,) = [row for row in trainer.state.log_history if "eval_metric" in row]
    assert row["eval_target_steps"] == 3  # 12 completions and as many real examples, 8 a step
    assert row["eval_variant_0_metric_gain"] == row["eval_metric_gain"] != row["eval_variant_1_metric_gain"]
    assert [path.name for path in files(trainer)] == ["step-000001.parquet", "step-000002.parquet"]
    for step, (path, (prompts, completions, raw)) in enumerate(zip(files(trainer), kept, strict=True), start=1):
        table = Dataset.from_parquet(str(path), keep_in_memory=True)
        assert table["step"][:] == [step] * 8 and table["prompt"][:] == prompts
        assert table["completion"][:] == completions and table["raw"][:] == raw
        assert table["text"][:] == [completion_text(completion) for completion in completions]


def test_resume(make_trainer, tmp_path, weights):
    """As if it had not stopped: weights, logs, and files, none of which is there twice."""
    config = {**ROBUST, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    config |= {"steps_per_generation": 2, "num_iterations": 1, "gradient_accumulation_steps": 1}
    whole = make_trainer(**config)
    whole.train()
    resumed = make_trainer(**config, output_dir=str(tmp_path / "resumed"))
    later = tmp_path / "resumed" / "generated" / "step-000009.parquet"
    later.parent.mkdir(parents=True)
    later.touch()
    resumed.train(resume_from_checkpoint=str(tmp_path / "dpg" / "checkpoint-2"))
    a, b = weights(whole.model), weights(resumed.model)
    assert all(torch.equal(a[name], b[name]) for name in a)
    keys = ["metagradient/mean", "metagradient/variant_1/metric_gain", "metagradient/adam_epsilon_root"]
    assert all(rows(resumed, key) == rows(whole, key) for key in keys)
    assert resumed.target_training.state() == whole.target_training.state()
    assert [path.name for path in files(whole)] == ["step-000001.parquet", "step-000003.parquet"]
    assert [path.name for path in files(resumed)] == ["step-000003.parquet"]
    assert files(whole)[1].read_bytes() == files(resumed)[0].read_bytes()


def test_other_real_data_is_said(make_trainer, caplog):
    config = {"save_strategy": "steps", "save_steps": 1, "replay_ratio": 0.5}
    make_trainer(**config, max_steps=1, replay_dataset=REAL).train()
    with caplog.at_level("WARNING", logger="trl_dpg"):
        make_trainer(**config, max_steps=2, replay_dataset=REAL.select(range(4))).train(resume_from_checkpoint=True)
    assert "`replay_dataset` '6 rows (" in caplog.text


def test_a_baseline_validates_on_the_mix(make_trainer):
    """It trains no target, so real data stands in validation alone."""
    arguments = {"reference_texts": ["the red sun"], "reward": "edit_distance", "save_generated": True, "max_steps": 1}
    trainer = make_trainer(**arguments, replay_dataset=REAL, replay_ratio=0.5, target_batch_size=8)
    trainer.train()
    assert trainer.evaluate()["eval_target_steps"] == 3
    assert len(files(trainer)) == 1
