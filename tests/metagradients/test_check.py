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

import trl_dpg.metagradients.check as check
from examples.resources import save_tiny_models, tiny_prompts
from trl_dpg import metagradients
from trl_dpg.cli import main
from trl_dpg.metagradients import TargetTrainingArguments, TrainingOutput
from trl_dpg.metrics import LMHeadNorm, LMHeadPattern


VOCAB = 32
GENERATOR = torch.Generator().manual_seed(5)
EXAMPLES = [{"input_ids": torch.randint(VOCAB, (8,), generator=GENERATOR).tolist()} for _ in range(12)]
TEXT = torch.randint(VOCAB, (3, 8), generator=GENERATOR)
GENTLE = TargetTrainingArguments(learning_rate=1e-4, batch_size=4, adam_epsilon_root="auto")


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=16, n_embd=16, n_layer=2, n_head=2, initializer_range=0.1,
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def likelihood(model):
    logits = model(input_ids=TEXT).logits[:, :-1].double()
    return -F.cross_entropy(logits.flatten(0, 1), TEXT[:, 1:].flatten())


def run(model=None, metric=likelihood, examples=EXAMPLES, **fields):
    model = gpt2().double() if model is None else model
    return check.check_metagradients(model, examples, metric, replace(GENTLE, **fields), num_reweightings=4)


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


def test_automatic_epsilon_root_is_that_of_the_first_run(monkeypatch):
    seen = set()
    measure = check.train_and_measure

    def spy(model, examples, metric, args, accelerator):
        seen.add(args.adam_epsilon_root)
        return measure(model, examples, metric, args, accelerator)

    monkeypatch.setattr(check, "train_and_measure", spy)
    assert seen == set()
    assert {run().adam_epsilon_root} == seen


def test_probes_are_the_largest_and_others():
    result = check.check_metagradients(gpt2().double(), EXAMPLES, likelihood, GENTLE, num_reweightings=1)
    gradients = check.compute_metagradients(gpt2().double(), EXAMPLES, likelihood, GENTLE).metagradients
    probed = [p.example for p in result.probes]
    assert probed[:2] == gradients.abs().argsort(descending=True)[:2].tolist()
    assert len(set(probed)) == 4
    few = check.check_metagradients(gpt2().double(), EXAMPLES[:3], likelihood, GENTLE, 9, 1)
    assert sorted(p.example for p in few.probes) == [0, 1, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("wrong", ["scaled", "permuted", "negated"])
def test_wrong_metagradients_are_found(monkeypatch, wrong, dtype):
    compute = check.compute_metagradients
    change = {"scaled": lambda g: 1.3 * g, "permuted": lambda g: g.roll(1), "negated": lambda g: -g}[wrong]

    def broken(*args):
        out = compute(*args)
        return replace(out, metagradients=change(out.metagradients))

    monkeypatch.setattr(check, "compute_metagradients", broken)
    result = run(gpt2().to(dtype))
    assert result.verdict == "failed"
    assert any(probe.verdict == "disagrees" for probe in result.probes)
    assert "its slope is not what metagradients say" in only(result)
    if wrong == "scaled":
        assert abs(result.slope - 1 / 1.3) < 0.05 and result.correlation > 0.999


def test_metric_with_a_gradient_of_another_value_is_found():
    def straight_through(model):
        value = likelihood(model)
        return 2 * value.detach() - value

    result = run(metric=straight_through)
    assert result.verdict == "failed" and result.slope < 0
    assert "`detach`" in only(result)


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


def test_smoothness_of_known_curves(monkeypatch):
    """Φ after training is made a polynomial of the weights: s + a s², with s in radii."""

    def smoothness(curvature):
        def polynomial(model, examples, metric, args, accelerator):
            s = (examples[0]["weight"] - 1) / 0.1
            return TrainingOutput(metric_before=0.0, metric_after=s + curvature * s**2, adam_epsilon_root=1e-9)

        monkeypatch.setattr(check, "train_and_measure", polynomial)
        return run().smoothness

    assert smoothness(0.0) == pytest.approx(1.0, abs=1e-6)
    # Σ s² = 2.5 is the line's share of Σ c², and a² Σ s⁴ = 2.125 a² the rest
    assert smoothness(0.5) == pytest.approx(1 - (0.53125 / 3.03125) ** 0.5, abs=1e-6)
    assert smoothness(1e6) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    "name, value", [("num_probes", 0), ("num_reweightings", 0), ("radius", 0), ("radius", float("nan"))]
)
def test_bad_arguments(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be .*, got {value}"):
        check.check_metagradients(gpt2(), EXAMPLES, likelihood, GENTLE, **{name: value})


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
    package = str(check.__file__).split("metagradients")[0]
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
