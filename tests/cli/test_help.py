"""What `--help` shows, what it costs, and what is said of flags that are none."""

import dataclasses
import re
import subprocess
import sys

import pytest

from trl_dpg import DatasetPolicyGradientConfig
from trl_dpg.cli import main
from trl_dpg.scripts.train import DPGScriptArguments


def help_of(capsys, *argv):
    with pytest.raises(SystemExit) as exit:
        main([*argv])
    assert exit.value.code == 0
    return capsys.readouterr().out


@pytest.fixture(autouse=True)
def terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "118")


def entries(page):
    """Flag → its text."""
    found = re.findall(r"^  (-{1,2}[a-z]\S*)(.*(?:\n {8,}.*)*)", page, re.MULTILINE)
    return {flag: " ".join(text.split()) for flag, text in found}


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["decode", "--help"], ["report", "--help"]])
def test_help_needs_no_pytorch(argv):
    code = (
        "import sys\nfrom trl_dpg.cli import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "print([name for name in ('torch', 'transformers', 'datasets', 'accelerate', 'peft') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]" and done.stderr == ""


@pytest.mark.parametrize("command", ["train", "generate", "verify", "decode", "check", "value", "report"])
def test_every_flag_has_a_text_within_two_screens(capsys, command):
    page = help_of(capsys, command, "--help")
    flags = entries(page)
    assert flags and all(flags.values()), [flag for flag, text in flags.items() if not text]
    assert page.count("\n") <= 130 and all(len(line) <= 120 for line in page.splitlines())


def test_train_shows_this_projects_fields_and_then_all(capsys):
    short, whole = (entries(help_of(capsys, "train", flag)) for flag in ("--help", "--help-all"))
    own = {f"--{name}" for name in DatasetPolicyGradientConfig.__annotations__ if name != "_VALID_DICT_FIELDS"}
    own |= {f"--{name}" for name in DPGScriptArguments.__annotations__}
    fields = {f"--{f.name}" for f in dataclasses.fields(DatasetPolicyGradientConfig) if f.init}
    assert own <= short.keys() < whole.keys() and fields <= whole.keys() and all(whole.values())


def test_defaults_are_true(capsys, tmp_path):
    """Beside each flag stands what an untouched configuration has in the end."""
    config = DatasetPolicyGradientConfig(str(tmp_path), use_cpu=True, bf16=False)
    said = {
        flag: re.search(r"\[([^\]]*)\]$", text) for flag, text in entries(help_of(capsys, "train", "--help")).items()
    }
    checked = 0
    for flag, default in said.items():
        if default is not None and hasattr(config, flag[2:]) and flag != "--use_cpu":
            value = getattr(config, flag[2:])
            value = getattr(value, "value", value)
            value = ",".join(value) or "none" if isinstance(value, list) else value  # `report_to`
            assert str(value) == default[1], flag
            checked += 1
    assert checked > 40


@pytest.mark.parametrize(
    ("argv", "meant"),
    [
        (["train", "--target_learning_rte", "1e-3"], "`--target_learning_rate`"),
        (["train", "--target-lerning-rate=-1e-3"], "`--target-learning-rate`"),
        (["train", "--num_proceses", "2"], "`--num_processes`"),
        (["train", "--config", "a.yaml"], "`--qr_text`"),
        (
            ["generate", "--model", "m", "--prompts", "p", "--output", "o.jsonl", "--num_exampels", "3"],
            "`--num_examples`",
        ),
        (["check", "--modle", "m"], "`--model`"),
        (["decode", "a", "b", "--shap", "6", "7", "--outptu", "c"], "`--output`"),
        (["report", "run", "--ouput", "page.html"], "`--output`"),
    ],
)
def test_misspelt_flags(capsys, tmp_path, monkeypatch, argv, meant):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text("qr_txt: HELLO\n")
    if argv[0] == "check":  # without data
        argv = [*argv, "--model", "m", "--dataset", "d"]
    assert main(argv) == 2
    assert f"Did you mean {meant}?" in capsys.readouterr().err


def test_what_is_like_no_flag_gets_no_suggestion(capsys):
    assert main(["report", "run", "--zzz"]) == 2
    error = capsys.readouterr().err
    assert "Unknown arguments: --zzz" in error and "Did you mean" not in error
