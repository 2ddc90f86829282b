"""What a run prints: lines where there is no terminal, figures beside a bar where there is one, and what it came to."""

import re

import pytest
from transformers import PrinterCallback, ProgressCallback

from trl_dpg import console


def rows_of(text):
    """Tables of a run: its header's words, and the lines below."""
    lines = text.splitlines()
    heads = [index for index, line in enumerate(lines) if line.split()[:1] == ["step"]]
    return lines, heads


def test_lines(make_trainer, capsys, monkeypatch):
    """Aligned, short, and what was logged, with the header again after some."""
    monkeypatch.setattr(console, "LINES_UNDER_A_HEADER", 2)
    trainer = make_trainer(max_steps=3, eval_strategy="steps", eval_steps=3)
    capsys.readouterr()
    trainer.train()
    lines, heads = rows_of(capsys.readouterr().out)
    assert len(heads) == 2 and lines[heads[0]] == lines[heads[1]]
    table = [*lines[heads[0] : heads[0] + 3], *lines[heads[1] + 1 : heads[1] + 3]]
    assert {len(line) for line in table} == {len(table[0])} and len(table[0]) < 120
    assert not any("{" in line for line in lines) and all(len(line) < 180 for line in lines)
    columns = [(m.start(), m.end()) for m in re.finditer(r"\S+(?: \S+)*", table[0])]
    names = ["step", "gain", "pixel accuracy", "entropy", "length", "s/step", "left"]
    assert [table[0][a:b] for a, b in columns] == names
    cells = [[line[max(0, b - 16) : b].split("  ")[-1].strip() for _, b in columns] for line in table[1:]]
    history = trainer.state.log_history
    training = [row for row in history if "entropy" in row]
    keys = ["metagradient/metric_gain", "metagradient/pixel_accuracy", "entropy", "completions/mean_length"]
    for row, shown in zip(training, cells[:3], strict=True):
        assert shown[0] == f"{row['step']}/3" and shown[1:5] == [f"{row[key]:.4g}" for key in keys]
    (validation,) = [row for row in history if "eval_metric_gain" in row]
    keys = ["eval_metric_gain", "eval_pixel_accuracy", "eval_completion_length"]
    assert cells[3][0] == "3 validation"
    assert [cells[3][i] for i in (1, 2, 4)] == [f"{validation[key]:.4g}" for key in keys]


def test_lines_come_with_logging_steps(make_trainer, capsys):
    trainer = make_trainer(max_steps=4, logging_steps=2)
    trainer.train()
    assert re.findall(r"^ +(\d)/4 ", capsys.readouterr().out, re.MULTILINE) == ["2", "4"]


def test_bar(make_trainer, capsys):
    trainer = make_trainer(max_steps=2, disable_tqdm=False, eval_strategy="steps", eval_steps=2)
    trainer.train()
    out, err = capsys.readouterr()
    last = [row for row in trainer.state.log_history if "entropy" in row][-1]
    assert f"gain {last['metagradient/metric_gain']:.4g}, pixel accuracy" in err and "2/2 [" in err
    assert f"entropy {last['entropy']:.4g}" in err
    assert "Validation at step 2: gain" in out and "{" not in out + err


@pytest.mark.parametrize(("reward", "column"), [("naive", "gain"), ("edit_distance", "reward")])
def test_other_rewards(make_trainer, capsys, reward, column):
    texts = ["good ask blue"] if reward == "edit_distance" else None
    trainer = make_trainer(reward=reward, reference_texts=texts, max_steps=1)
    trainer.train()
    lines, (head,) = rows_of(capsys.readouterr().out)
    name = {"naive": "naive/metric_gain", "edit_distance": "reward"}[reward]
    (row,) = [row for row in trainer.state.log_history if "entropy" in row]
    assert lines[head].split()[1] == column and lines[head + 1].split()[1] == f"{row[name]:.4g}"


def test_the_end(make_trainer, capsys):
    trainer = make_trainer(max_steps=1, eval_on_start=True, eval_strategy="steps", eval_steps=1)
    trainer.train()
    out = capsys.readouterr().out
    first, last = [row["eval_pixel_accuracy"] for row in trainer.state.log_history if "eval_metric" in row]
    assert f"pixel accuracy {100 * last:g} % (untrained generator: {100 * first:g} %, chance: 50 %)" in out
    assert f"trl-dpg report {trainer.args.output_dir}" in out


def test_the_end_without_validation(make_trainer, capsys):
    trainer = make_trainer(max_steps=2, eval_dataset=None)
    trainer.train()
    first, last = [row["metagradient/metric_gain"] for row in trainer.state.log_history if "entropy" in row]
    out = capsys.readouterr().out
    assert "not known" in out and f"In training, step 1: gain {first:.4g}" in out and f"step 2: gain {last:.4g}" in out


def test_what_a_user_takes_away_or_adds(make_trainer, capsys):
    class Mine(ProgressCallback):
        def on_log(self, *args, **kwargs): ...

    trainer = make_trainer(max_steps=1)
    trainer.add_callback(Mine)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(console.SummaryCallback)
    capsys.readouterr()
    trainer.train()
    assert capsys.readouterr().out == ""
    assert any(type(callback) is Mine for callback in trainer.callback_handler.callbacks)
