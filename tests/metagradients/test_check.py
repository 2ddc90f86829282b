"""The check finds wrong metagradients, and says why right ones are of no use."""

import ast
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from trl_dpg import metagradients
from trl_dpg.cli import main
from trl_dpg.metagradients import (
    TargetTrainingArguments,
    check_metagradients,
    compute_metagradients,
    train_and_measure,
)
from trl_dpg.metrics import LMHeadNorm, LMHeadPattern
from trl_dpg.testing import save_tiny_models, tiny_prompts


VOCAB = 32
GENERATOR = torch.Generator().manual_seed(5)
EXAMPLES = [{"input_ids": torch.randint(VOCAB, (8,), generator=GENERATOR).tolist()} for _ in range(12)]
TEXT, OTHER_TEXT = torch.randint(VOCAB, (2, 3, 8), generator=GENERATOR)
GENTLE = TargetTrainingArguments(learning_rate=1e-4, batch_size=4, adam_epsilon_root="auto")


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=16, n_embd=16, n_layer=2, n_head=2, initializer_range=0.1,
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def likelihood(model, text=TEXT):
    logits = model(input_ids=text).logits[:, :-1].double()
    return -F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())


def with_gradient_of(value, other):
    """One number with the gradient of another."""
    return value.detach() + other - other.detach()


def run(model=None, metric=likelihood, examples=EXAMPLES, **fields):
    model = gpt2().double() if model is None else model
    return check_metagradients(model, examples, metric, replace(GENTLE, **fields), num_reweightings=4)


def only(result):
    """The one sentence of advice."""
    (sentence,) = result.advice
    return sentence


@pytest.mark.parametrize("fields", [{}, {"optim": "sgd", "learning_rate": 0.1}], ids=["adamw", "sgd"])
def test_passes(fields):
    model = gpt2().double()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = run(model, **fields)
    assert result.passed and result.advice == []
    assert result.correlation > 0.999 and abs(result.slope - 1) < 0.05 and result.smoothness > 0.8
    for probe in result.probes:
        assert probe.verdict == "agrees"
        assert abs(probe.predicted - probe.measured) < 0.01 * abs(probe.measured)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert result.to_dict() == run(model, **fields).to_dict()


def test_passes_in_float32_with_weights_and_an_automatic_scale():
    examples = [{**e, "weight": 0.5 + 0.1 * i} for i, e in enumerate(EXAMPLES)]
    metric = LMHeadPattern([[1, -1], [-1, 1]], scale="auto")
    result = run(gpt2(), metric, examples)
    assert result.passed, str(result)
    assert result.noise > 1e-9  # float32's


def test_automatic_epsilon_root_is_that_of_the_first_run():
    """Each run would find another one, as the weights of its first batch are others."""
    automatic = run(adam_epsilon_root="auto")
    assert run(adam_epsilon_root=automatic.adam_epsilon_root).to_dict() == automatic.to_dict()


@pytest.mark.parametrize("fields", [{"adam_epsilon_root": 1.0}, {"optim": "sgd", "learning_rate": 0.1}])
def test_run_without_epsilon_root(fields):
    """Where an epsilon_root holds AdamW back, ordinary AdamW goes farther. SGD has none."""
    result = run(**fields)
    ordinary = train_and_measure(
        gpt2().double(), EXAMPLES, likelihood, replace(GENTLE, **{**fields, "adam_epsilon_root": 0.0})
    )
    assert result.metric_after_without_epsilon_root == ordinary.metric_after
    change, ordinary_change = (x - result.metric_before for x in (result.metric_after, ordinary.metric_after))
    assert abs(ordinary_change) > 5 * abs(change) if "optim" not in fields else ordinary_change == change
    assert f"ordinary fine-tuning: -> {ordinary.metric_after:.7g}" in str(result)


def test_probes_are_the_largest_and_others():
    result = check_metagradients(gpt2().double(), EXAMPLES, likelihood, GENTLE, num_reweightings=1)
    gradients = compute_metagradients(gpt2().double(), EXAMPLES, likelihood, GENTLE).metagradients
    probed = [p.example for p in result.probes]
    assert probed[:2] == gradients.abs().argsort(descending=True)[:2].tolist()
    assert len(set(probed)) == 4
    few = check_metagradients(gpt2().double(), EXAMPLES[:3], likelihood, GENTLE, 9, 1)
    assert sorted(p.example for p in few.probes) == [0, 1, 2]


WRONG = {
    "scaled": lambda model: with_gradient_of(likelihood(model), 1.3 * likelihood(model)),
    "negated": lambda model: with_gradient_of(likelihood(model), -likelihood(model)),
    "another text's": lambda model: with_gradient_of(likelihood(model), likelihood(model, OTHER_TEXT)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("wrong", WRONG)
def test_metric_with_a_gradient_of_another_value_is_found(wrong, dtype):
    """Metagradients are wrong, in size, in sign, or for each example in its own way."""
    result = run(gpt2().to(dtype), WRONG[wrong])
    assert result.verdict == "failed"
    assert any(probe.verdict == "disagrees" for probe in result.probes)
    assert "its slope is not what metagradients say" in only(result) and "`detach`" in only(result)
    if wrong == "another text's":
        assert abs(result.correlation) < 0.9
    else:
        factor = {"scaled": 1.3, "negated": -1}[wrong]
        assert abs(result.slope - 1 / factor) < 0.05 and abs(result.correlation) > 0.999


def test_absurd_learning_rate():
    result = run(learning_rate=1.0)
    assert result.verdict == "failed" and result.smoothness < 0.5
    assert "Lower `learning_rate` 1" in only(result)
    assert "the loss rose" in only(result)


@pytest.mark.parametrize("epsilon_root", [0.0, 1e-16, 1e-9])
@pytest.mark.filterwarnings("ignore:`adam_epsilon_root` is 0")
def test_epsilon_root_too_small(epsilon_root):
    result = run(gpt2(), LMHeadNorm(), adam_epsilon_root=epsilon_root)
    assert result.verdict == "failed"
    assert f"`adam_epsilon_root` {epsilon_root:.3g} is far below" in only(result)


@pytest.mark.parametrize("learning_rate", [1e-7, 1e-8])
def test_steps_lost_in_rounding(learning_rate):
    result = run(gpt2(), LMHeadNorm(), learning_rate=learning_rate)
    assert result.verdict == "inconclusive"
    assert "round" in only(result) and "check `model.double()`" in only(result)
    assert run(gpt2().double(), LMHeadNorm(), learning_rate=learning_rate).passed


@pytest.mark.parametrize("learning_rate", [1e-5, 1e-6])
def test_metric_without_enough_digits(learning_rate):
    result = run(gpt2(), lambda model: likelihood(model).float(), learning_rate=learning_rate)
    assert result.verdict == "inconclusive"
    assert "compute it in float64" in only(result)


def test_metric_that_differs_between_equal_runs():
    generator = torch.Generator().manual_seed(0)
    result = run(metric=lambda model: likelihood(model) + 1e-2 * torch.rand((), generator=generator).double())
    assert result.verdict == "inconclusive"
    assert "Two equal runs differ" in only(result)


def run_on_curve(curve):
    """One step of SGD on one example moves the LM head in proportion to its weight, so that a metric can read s, its shift in radii."""
    recipe = {"examples": EXAMPLES[:1], "optim": "sgd", "learning_rate": 0.1}
    start, ends = gpt2().double().lm_head.weight.detach(), []

    def norm(model):
        ends.append(model.lm_head.weight.detach().clone())
        return model.lm_head.weight.norm()

    run(metric=norm, **recipe)
    step = ends[1] - start  # after the first run, whose weight is 1

    def metric(model):
        weight = ((model.lm_head.weight - start) * step).sum() / step.square().sum()
        return curve((weight - 1) / 0.1)

    return run(metric=metric, **recipe)


def test_figures_of_known_curves():
    line, bent, parabola = (run_on_curve(lambda s, a=a: s + a * s**2) for a in (0.0, 0.5, 1e6))
    assert line.passed and line.smoothness == pytest.approx(1.0, abs=1e-6)
    # Σ s² = 2.5 is the line's share of Σ c², and a² Σ s⁴ = 2.125 a² the rest
    assert bent.smoothness == pytest.approx(1 - (0.53125 / 3.03125) ** 0.5, abs=1e-6)
    assert bent.r_squared == pytest.approx(2.5 / 3.03125, abs=1e-6)
    assert bent.noise == pytest.approx(0.5 * 0.01**2)  # half the second difference at a hundredth of the radius
    assert parabola.smoothness == pytest.approx(0.0, abs=1e-6)
    for result in (line, bent):  # curvature cancels
        assert [result.slope, result.correlation] == pytest.approx([1, 1], abs=1e-6)
        assert [abs(p) for p in result.predicted] == pytest.approx([1] * 4, abs=1e-6)
        (probe,) = result.probes
        assert [probe.predicted, probe.measured] == pytest.approx([10, 10], abs=1e-5)


def test_radius_too_large_for_probes():
    """The curve is 0.63 at half a radius and 0.91 at one: a slope of 1.26 or of 0.91, where metagradients say 1."""
    result = run_on_curve(lambda s: s + 4.25 / 3 * s**3 - 4.52 / 3 * s**5)
    assert result.slope == pytest.approx(0.91, abs=1e-6)
    (probe,) = result.probes
    assert probe.verdict == "unclear" and probe.step_error == pytest.approx(3.5, abs=1e-5)
    assert result.verdict == "inconclusive"
    assert "lower `radius`" in only(result)


@pytest.mark.parametrize(
    "name, value", [("num_probes", 0), ("num_reweightings", 0), ("radius", 0), ("radius", float("nan"))]
)
def test_bad_arguments(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be .*, got {value}"):
        check_metagradients(gpt2(), EXAMPLES, likelihood, GENTLE, **{name: value})


def test_table_and_plot(tmp_path):
    result = run()
    table = str(result)
    assert table.startswith("Metagradients: passed")
    for probe in result.probes:
        assert f"{probe.measured:.4e}" in table
    result.plot(tmp_path / "check.png")
    assert (tmp_path / "check.png").read_bytes().startswith(b"\x89PNG")


def test_import_needs_neither_matplotlib_nor_metrics():
    """Nothing of the package but its engine is imported."""
    code = (
        "import sys, types; package = types.ModuleType('trl_dpg'); package.__path__ = [sys.argv[1]]; "
        "sys.modules['trl_dpg'] = package; import trl_dpg.metagradients.check; "
        "print([m for m in ('trl', 'matplotlib', 'trl_dpg.metrics') if m in sys.modules])"
    )
    package = str(Path(metagradients.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", code, package], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture
def command_line(tmp_path, monkeypatch):
    """Runs the command on a tiny target and a JSON file; keyword arguments are further flags."""
    _, target = save_tiny_models(tmp_path)
    texts = tiny_prompts(12, 4)
    for name, split in (("data", "train"), ("scored", "test")):
        (tmp_path / f"{name}.json").write_text(json.dumps([{"text": text} for text in texts[split]["prompt"]]))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    flags = {
        "model": target, "dataset": tmp_path / "data.json", "learning_rate": "1e-4", "adam_epsilon_root": "auto",
        "batch_size": 4, "num_probes": 2, "num_reweightings": 2, "disable_tqdm": True, "dtype": "float64",
    }  # fmt: skip

    def arguments(**further):
        pairs = {**flags, **further}.items()
        return ["check", *(part for name, value in pairs for part in (f"--{name}", str(value)))]

    return arguments


def test_command_line(command_line, tmp_path, capsys):
    assert main(command_line(plot=tmp_path / "check.png", json=True)) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["passed"] and result["verdict"] == "passed"
    assert len(result["probes"]) == 2 and len(result["changes"]) == 2
    assert (tmp_path / "check.png").stat().st_size > 10_000
    assert main(command_line(metric="likelihood", metric_dataset=tmp_path / "scored.json")) == 0
    assert capsys.readouterr().out.startswith("Metagradients: passed")
    assert main(command_line(learning_rate=1e-3, adam_epsilon_root="1e-20")) == 1
    assert "adam_epsilon_root" in capsys.readouterr().out


def test_command_line_with_a_metric_of_ones_own(command_line, tmp_path, monkeypatch):
    """As a user calls it, with a metric in the working directory."""
    (tmp_path / "mine.py").write_text(
        "class Square:\n    def __call__(self, model):\n        return -model.lm_head.weight.double().square().sum()\n"
        "def cube(model):\n    return model.lm_head.weight.double().pow(3).sum()\n"
    )
    command = [sys.executable, "-m", "trl_dpg.cli", *command_line(metric="mine:Square")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "RuntimeWarning" not in done.stderr
    monkeypatch.syspath_prepend(tmp_path)
    assert main(command_line(metric="mine:cube")) == 0


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"adam_epsilon_root": "small"}, "`adam_epsilon_root` must be"),
        ({"learning_rate": -1}, "`learning_rate` must be"),
        ({"text_column": "content"}, "--text_column"),
        ({"dataset": "missing.json"}, "missing.json"),
        ({"model": "missing"}, "`model` 'missing' cannot be loaded"),
        ({"no_such_flag": 1}, "no_such_flag"),
        ({"num_examples": 0}, "`num_examples` must be"),
        ({"radius": -1}, "`radius`"),
        ({"metric": "likelihood"}, "`metric_dataset`"),
        ({"metric": "norm"}, "module:attribute"),
        ({"metric": "math:nothing"}, "nothing"),
        ({"metric": "no_such_module:metric"}, "no_such_module"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_command_line_bad_input(command_line, capsys, flags, message):
    assert main(command_line(**flags)) == 2
    assert message in capsys.readouterr().err


def test_the_engine_imports_no_metrics():
    """Metrics know the engine, not the other way around."""
    for path in Path(metagradients.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert not (node.module or "").endswith(("metrics", "rewards")), path
