"""The scripts of `examples` that people copy: short, about real models, and they run, here on tiny ones."""

import ast

import pytest

from tests.docs.pages import MODELS, ROOT


SCRIPTS = ["first_run", "own_metric", "two_goals", "real_data", "lora", "from_grpo"]
READOUTS = {"own_metric": "eval_probability", "lora": "eval_exact_match"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_script(name, directory, tiny, capsys):
    code = (ROOT / "examples" / f"{name}.py").read_text()
    assert len(code.splitlines()) < 60 and any(model in code for model in MODELS)
    scope = {"__name__": "__main__"}
    exec(compile(directory.substitute(code), f"{name}.py", "exec"), scope)
    figures = ast.literal_eval(capsys.readouterr().out.splitlines()[-1])
    assert {"eval_metric_gain", READOUTS.get(name, "eval_pixel_accuracy")} <= figures.keys()
    trainer = scope["trainer"]
    rewards = [row["metagradient/std"] for row in trainer.state.log_history if "metagradient/std" in row]
    assert len(rewards) == trainer.state.global_step == 2 and all(rewards)


def test_every_script_is_run():
    others = {"__init__", "data_valuation"}  # the latter has tests of its own
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == {*SCRIPTS, *others}
