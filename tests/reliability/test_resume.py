"""A run that is killed, at any moment, and resumed ends as the run that was never killed: same weights, same logs, bit for bit."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from trl.trainer.utils import RepeatSampler

from trl_dpg.checkpoints import UNFINISHED, ResumableSampler, is_whole, last_whole_checkpoint
from trl_dpg.metrics import LMHeadPattern
from trl_dpg.testing import save_tiny_models, tiny_prompts


ROOT = Path(__file__).parents[2]

# Moments of a run of six steps (three checkpoints of which have half a generation batch left to train on)
MOMENTS = {
    "generation": ["generation:2"],
    "half_a_state": ["half_a_state:4"],
    "rng_saved": ["rng_saved:2"],
}
MORE = {
    **{f"optimizer_saved_{n}": [f"optimizer_saved:{n}"] for n in (2, 4, 5, 6)},
    **{f"rng_saved_{n}": [f"rng_saved:{n}"] for n in (3, 4, 5, 6)},
    **{f"half_a_state_{n}": [f"half_a_state:{n}"] for n in (2, 3, 5, 6)},
    **{f"rotation_{n}": [f"rotation:{n}"] for n in (2, 3, 4)},
    **{f"metric_{n}": [f"metric:{n}"] for n in (8, 10)},
    "inner_loop": ["inner_loop:5"],
    "metric": ["metric:9"],
    "optimizer_saved": ["optimizer_saved:3"],
    "rotation": ["rotation:1"],
    "validation_2": ["validation:2"],
    "validation_3": ["validation:3"],
    "again_and_again": ["half_a_state:2", "rng_saved:2", "validation:1", "optimizer_saved:1", "generation:1"],
}
# Other settings that a checkpoint must carry
SETTINGS = {
    "micro_batch": {"target_micro_batch_size": 4},
    "best": {"load_best_model_at_end": True, "save_steps": 2},
    "adaptive_entropy": {"use_adaptive_entropy": True, "entropy_coef": 0.01},
    "logged_now_and_then": {"logging_steps": 4},
    "whole_batches": {"steps_per_generation": 1, "num_iterations": 1},
    "replay_and_variants": {
        "replay_ratio": 0.5,
        "target_variants": [{}, {"learning_rate": 1e-2, "seed": 3}, {"head_seed": 1}],
        "save_generated": True,
    },
    "second_epoch": {"steps_per_generation": 1, "num_iterations": 1, "max_steps": 12},
}


def run(directory: Path, scenarios: dict[str, dict]) -> dict[str, dict]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        str(Path(__file__).with_name("resume_worker.py")),
        str(directory),
        json.dumps(scenarios),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULTS "))[8:])


def check(killed: dict, whole: dict, moments: list[str]) -> None:
    assert killed["kills"] == [9] * len(moments) + [0]
    for what in ("weights", "history", "reward", "checkpoints", "log", "generated"):
        assert killed[what] == whole[what], what


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    scenarios = {"whole": {"kills": []}, **{name: {"kills": places} for name, places in MOMENTS.items()}}
    return run(tmp_path_factory.mktemp("resume"), scenarios)


def test_a_run_is_reproducible_and_its_weights_move(results, tmp_path):
    again = run(tmp_path, {"whole": {"kills": []}})["whole"]
    assert again == results["whole"]
    losses = [row["loss"] for row in again["history"] if "loss" in row]
    assert len(losses) == 6 and any(losses)


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_resumed(results, moment):
    check(results[moment], results["whole"], MOMENTS[moment])


@pytest.mark.slow
def test_killed_at_many_more_moments(tmp_path):
    scenarios = {"whole": {"kills": []}, **{name: {"kills": places} for name, places in MORE.items()}}
    found = run(tmp_path, scenarios)
    for name, places in MORE.items():
        check(found[name], found["whole"], places)


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_killed_with_other_settings(tmp_path, setting):
    places = ["half_a_state:10" if setting == "second_epoch" else "half_a_state:2", "validation:1"]
    config = SETTINGS[setting]
    scenarios = {"whole": {"kills": [], "config": config}, "killed": {"kills": places, "config": config}}
    found = run(tmp_path, scenarios)
    check(found["killed"], found["whole"], places)


def test_order_of_prompts_in_later_epochs():
    """An epoch's order is that of TRL's sampler in a run that was not interrupted, wherever a run begins."""
    settings = {"data_source": range(10), "mini_repeat_count": 2, "batch_size": 3, "repeat_count": 2, "seed": 5}
    trl = RepeatSampler(**settings)
    epochs = [list(trl) for _ in range(4)]
    assert epochs[0] != epochs[1]
    for epoch in (2, 0, 3, 1):
        sampler = ResumableSampler.like(RepeatSampler(**settings))
        sampler.set_epoch(epoch)
        assert list(sampler) == epochs[epoch]


@pytest.mark.parametrize(
    ("config", "steps"),
    [({}, [2, 3, 5, 7]), ({"steps_per_generation": 2, "gradient_accumulation_steps": 2, "num_iterations": 2}, [5, 7])],
)
@pytest.mark.parametrize("streamed", [True, False])
def test_order_of_prompts_in_later_passes(make_trainer, tmp_path, streamed, config, steps):
    """A pass takes three steps; its end and every later one are met by a run that is resumed as by one that is not."""
    prompts = tiny_prompts(6 * config.get("steps_per_generation", 1), 1)["train"]
    prompts = prompts.to_iterable_dataset() if streamed else prompts
    config = {**SAVED, "max_steps": 8, "learning_rate": 1e-2, "eval_strategy": "no", **config}
    whole = make_trainer(train_dataset=prompts, **config)
    whole.train()
    for step in steps:
        resumed = make_trainer(train_dataset=prompts, **config, output_dir=str(tmp_path / f"from-{step}"))
        resumed.train(resume_from_checkpoint=str(tmp_path / "dpg" / f"checkpoint-{step}"))
        for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
            assert torch.equal(a, b)
        assert [row.get("epoch") for row in resumed.state.log_history] == [
            row["epoch"] for row in whole.state.log_history
        ]


# ---- What counts as a checkpoint ----

SAVED = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}


def break_off(checkpoint, *names):
    """Leaves a checkpoint as a run does that is killed over it."""
    (checkpoint / UNFINISHED).touch()
    for name in names:
        (checkpoint / name).unlink()


def test_the_last_whole_one_is_taken_and_what_is_broken_is_deleted(make_trainer):
    trainer = make_trainer(**SAVED)
    trainer.train()
    folder = Path(trainer.args.output_dir)
    assert not list(folder.rglob(UNFINISHED))
    break_off(folder / "checkpoint-3")
    (folder / "checkpoint-3" / "trainer_state.json").write_text('{"global_st')
    break_off(folder / "checkpoint-2", "trainer_state.json")
    assert [is_whole(folder / f"checkpoint-{n}") for n in (1, 2, 3)] == [True, False, False]
    resumed = make_trainer(**{**SAVED, "max_steps": 1})
    resumed.train(resume_from_checkpoint=True)
    assert not (folder / "checkpoint-3").exists()
    assert not (folder / "checkpoint-2").exists()
    (folder / "checkpoint-2").mkdir()
    with pytest.raises(ValueError, match="'.*checkpoint-2' is no whole checkpoint"):
        make_trainer(**SAVED).train(resume_from_checkpoint=folder / "checkpoint-2")


def test_what_has_no_mark_is_left_alone_and_named(make_trainer, caplog):
    """Whatever it is called, and whatever is in it."""
    trainer = make_trainer(**SAVED)
    trainer.train()
    folder = Path(trainer.args.output_dir)
    trainer.save_model(str(folder / "checkpoint-merged-7"))
    trainer.save_model(str(folder / "checkpoint-9"))
    trainer.save_model(str(folder / "checkpoint-3-merged"))
    shutil.copytree(folder / "checkpoint-2", folder / "checkpoint-8")
    (folder / "checkpoint-8" / "optimizer.pt").unlink()  # to save room
    shutil.copytree(folder / "checkpoint-2", folder / "checkpoint-copied-8")
    (folder / "checkpoint-notes.txt").write_text("mine")
    mine = [*folder.glob("checkpoint-*[!1-3]"), *folder.glob("checkpoint-*[!1-3]/*")]
    assert len(mine) > 20
    for config in ({}, {"save_total_limit": 1}):
        resumed = make_trainer(**{**SAVED, **config, "max_steps": resumed_steps(folder) + 1})
        with caplog.at_level("WARNING", logger="trl_dpg"):
            resumed.train(resume_from_checkpoint=True)
        assert all(path.exists() for path in mine)
        (said,) = [r.getMessage() for r in caplog.records if "Left alone" in r.getMessage()]
        for name in (
            "checkpoint-merged-7",
            "checkpoint-9",
            "checkpoint-3-merged",
            "checkpoint-8",
            "checkpoint-copied-8",
        ):
            assert name in said
        caplog.clear()
    assert sorted(path.name for path in folder.glob("checkpoint-[1-7]")) == [
        "checkpoint-5"
    ]  # the limit holds for the rest


def resumed_steps(folder):
    return int(last_whole_checkpoint(folder).name.removeprefix("checkpoint-"))


def test_the_limit_at_the_end_of_training(make_trainer):
    """Of the best checkpoint and the last one, the best is kept; folders that are no checkpoints are kept as they are."""

    def best_at_step_1(model):
        return 1e-3 * model.lm_head.weight.norm() + [0.0, 9.0, 1.0, 5.0][trainer.state.global_step]

    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "save_total_limit": 1}
    trainer = make_trainer(**SAVED, **best, metric=best_at_step_1)
    folder = Path(trainer.args.output_dir)
    trainer.save_model(str(folder / "checkpoint-7"))
    trainer.train()
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-7"]
    assert trainer.args.save_total_limit == 1


def test_no_checkpoint_is_written_over_another_folder(make_trainer):
    trainer = make_trainer(**SAVED)
    folder = Path(trainer.args.output_dir) / "checkpoint-2"
    trainer.save_model(str(folder))
    with pytest.raises(ValueError, match="checkpoint-2' is no whole checkpoint, and that of step 2 would"):
        trainer.train()
    assert trainer.state.global_step == 0
    make_trainer(**{**SAVED, "save_steps": 3}).train()
    assert (folder / "model.safetensors").exists() and not (folder / "trainer_state.json").exists()


def test_a_checkpoint_is_written_anew(make_trainer):
    """Nothing is left in it of the run that went on from an earlier one."""
    trainer = make_trainer(**SAVED)
    trainer.train()
    folder = Path(trainer.args.output_dir)
    (folder / "checkpoint-2" / "generation_batch_1.safetensors").write_text("of another process")
    make_trainer(**SAVED).train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    assert not (folder / "checkpoint-2" / "generation_batch_1.safetensors").exists()
    assert is_whole(folder / "checkpoint-2")


def test_only_the_model_is_saved(make_trainer):
    trainer = make_trainer(**SAVED, save_only_model=True, save_total_limit=2)
    trainer.train()
    folder = Path(trainer.args.output_dir)
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    with pytest.raises(ValueError, match=r"\(checkpoint-2, checkpoint-3: not whole\).*saved with `save_only_model`"):
        make_trainer(**SAVED).train(resume_from_checkpoint=True)


def test_the_last_whole_one_is_named(make_trainer, tmp_path):
    assert last_whole_checkpoint(tmp_path / "nowhere") is None
    trainer = make_trainer(**{**SAVED, "max_steps": 2})
    trainer.train()
    folder = Path(trainer.args.output_dir)
    shutil.copytree(folder / "checkpoint-1", folder / "checkpoint-10")  # 10 is after 2
    shutil.copytree(folder / "checkpoint-1", folder / "checkpoint-copied-30")
    trainer.save_model(str(folder / "checkpoint-20"))
    before = sorted(folder.rglob("*"))
    assert last_whole_checkpoint(folder) == last_whole_checkpoint(str(folder)) == folder / "checkpoint-10"
    (folder / "checkpoint-10" / "optimizer.pt").unlink()
    assert last_whole_checkpoint(folder) == folder / "checkpoint-2"
    assert sorted(folder.rglob("*")) == [path for path in before if path != folder / "checkpoint-10" / "optimizer.pt"]


def test_no_whole_checkpoint(make_trainer):
    trainer = make_trainer(**SAVED)
    folder = Path(trainer.args.output_dir)
    (folder / "checkpoint-1").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"no whole checkpoint in `output_dir` .*\(checkpoint-1: not whole\)"):
        trainer.train(resume_from_checkpoint=True)
    assert (folder / "checkpoint-1").exists()


def test_a_full_disk_leaves_the_checkpoint_before(make_trainer, monkeypatch):
    trainer = make_trainer(**SAVED, save_total_limit=1)

    def full(*args, **kwargs):
        if trainer.state.global_step == 2:
            raise OSError(28, "No space left on device")
        return original(*args, **kwargs)

    original = torch.save
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    monkeypatch.undo()
    resumed = make_trainer(**SAVED, save_total_limit=1)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3
    whole = make_trainer(**SAVED, output_dir=f"{trainer.args.output_dir}-whole")
    whole.train()
    for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_run_that_was_over_stays_over(make_trainer):
    make_trainer(**SAVED).train()
    resumed = make_trainer(**SAVED)
    resumed.train(resume_from_checkpoint=True)
    saved = torch.load(Path(resumed.args.output_dir) / "checkpoint-3" / "optimizer.pt", weights_only=True)
    assert resumed.state.global_step == 3
    assert {int(state["step"]) for state in resumed.optimizer.state_dict()["state"].values()} == {3}
    assert {int(state["step"]) for state in saved["state"].values()} == {3}


# ---- Other settings, inside a generation batch ----

INSIDE = {**SAVED, "steps_per_generation": 4, "gradient_accumulation_steps": 1, "learning_rate": 1e-3}


@pytest.fixture
def resume_inside(make_trainer, tmp_path, caplog):
    """Resumes a run after three of the four steps of a generation batch: the trainer, the batches it made, what it warned of."""
    kwargs = {"model": save_tiny_models(tmp_path)[0], "metric": LMHeadPattern([[1, -1], [-1, 1]], scale="auto")}
    make_trainer(**kwargs, **INSIDE).train()

    def resume(**changes):
        trainer = make_trainer(**{**kwargs, **INSIDE, "save_strategy": "no", "max_steps": 4, **changes})
        made, generate = [], trainer._generate_and_score_completions
        trainer._generate_and_score_completions = lambda inputs: made.append(len(inputs)) or generate(inputs)
        caplog.clear()
        with caplog.at_level("WARNING", logger="trl_dpg"):
            trainer.train(resume_from_checkpoint=str(tmp_path / "dpg" / "checkpoint-3"))
        assert trainer.state.global_step == 4
        return trainer, made, "".join(record.getMessage() for record in caplog.records)

    return resume


OTHER = [
    ({"beta": 0.1}, 32, "`beta` 0.0, now 0.1"),
    ({"steps_per_generation": 8}, 64, "`steps_per_generation` 4, now 8"),
    ({"per_device_train_batch_size": 4}, 16, "`per_device_train_batch_size` 8, now 4"),
    ({"gradient_accumulation_steps": 2}, 32, "`gradient_accumulation_steps` 1, now 2"),
    ({"train_dataset": tiny_prompts(20, 1)["train"]}, 32, "`train_dataset` '16 prompts"),
]


def test_a_batch_of_other_settings_is_made_anew(resume_inside):
    for changes, size, said in OTHER:
        _, made, warning = resume_inside(**changes)
        assert made[0] == size, changes
        assert f"written with other settings: {said}" in warning and "made anew" in warning


def test_the_batch_is_kept_where_nothing_of_it_changed(resume_inside):
    for changes in ({}, {"target_micro_batch_size": 4, "log_completions": False}):
        assert resume_inside(**changes)[1:] == ([], ""), changes


def test_what_was_measured_for_another_metric_is_not_taken_up(resume_inside):
    """Rewards would be scaled by the largest of the metric before, which is thousands of times larger."""
    before = resume_inside()[0].target_training.largest_std
    trainer, made, warning = resume_inside(metric=LMHeadPattern([[1, -1], [-1, 1]], scale=5.0))
    assert trainer.metric.scale_value == 5.0
    assert 0 < trainer.target_training.largest_std < before / 1000
    assert made == [32] and "`metric` 'LMHeadPattern" in warning


def test_the_optimizer_keeps_its_own_settings_and_says_so(resume_inside):
    trainer, made, warning = resume_inside(learning_rate=1e-4)
    assert [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row][-1] <= 1e-3 / 4
    assert made == [] and "Its optimizer goes on with the checkpoint's `learning_rate`." in warning


def test_what_does_not_fit_is_refused(resume_inside):
    with pytest.raises(ValueError, match="`optim` is 'sgd', but .* was written with 'adamw_torch'"):
        resume_inside(optim="sgd")
    with pytest.raises(ValueError, match="`peft_config` is {.*'r': 2.*}, but .* was written with None"):
        resume_inside(peft_config=LoraConfig(r=2))
