import json
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoModelForCausalLM

from trl_dpg.testing import tiny_causal_lm, tiny_tokenizer


EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def run_example(monkeypatch, tmp_path):
    """Runs `examples/dpg.py` with a configuration and flags, in an empty directory."""

    def run(config, *flags):
        arguments = ["dpg.py", "--config", str(EXAMPLES / "configs" / config), *flags]
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(EXAMPLES)
        monkeypatch.setattr(sys, "argv", arguments)
        runpy.run_path(str(EXAMPLES / "dpg.py"), run_name="__main__")

    return run


FLAGS = {
    "--max_steps": 2,
    "--per_device_train_batch_size": 16,
    "--per_device_eval_batch_size": 16,
    "--eval_steps": 1,
    "--logging_steps": 1,
    "--max_completion_length": 8,
    "--validation_prompts": 3,
    "--use_cpu": "true",
}


def test_a_run_too_short_to_log(run_example, tmp_path):
    flags = {**FLAGS, "--max_steps": 1, "--logging_steps": 10}
    run_example("tiny_67.yaml", *(str(item) for pair in flags.items() for item in pair), "--output_dir", "there")
    results = json.loads((tmp_path / "there" / "results.json").read_text())
    assert results["steps"] == 1 and results["entropy"] is None


def test_tiny_67(run_example, tmp_path, capsys):
    flags = [str(item) for pair in FLAGS.items() for item in pair]
    run_example("tiny_67.yaml", *flags, "--output_dir", "there", "--validation_draws", "2")
    output_dir = tmp_path / "there"

    results = json.loads((output_dir / "results.json").read_text())
    assert results["steps"] == 2
    for stage in ("untrained", "trained"):
        accuracy = results["eval_pixel_accuracy"][stage]
        assert len(accuracy["draws"]) == 2
        assert accuracy["mean"] == sum(accuracy["draws"]) / 2
        assert 0 <= accuracy["mean"] <= 1 and accuracy["standard_error"] >= 0
        assert results["eval_metric"][stage]["mean"] < 0

    table = (output_dir / "results.md").read_text()
    assert table.startswith("| validation | untrained generator | trained generator |\n|---|---|---|\n")
    assert "| `eval_pixel_accuracy` |" in table
    assert table in capsys.readouterr().out

    log = [json.loads(line) for line in (output_dir / "log.jsonl").read_text().splitlines()]
    assert len([row for row in log if "metagradient/pixel_accuracy" in row]) == 2
    assert len([row for row in log if "eval_pixel_accuracy" in row]) == 6  # 2 before training, 2 during and 2 after

    for name in ("curve.png", "pattern.png"):
        with Image.open(output_dir / name) as picture:
            assert min(picture.size) > 100
            assert len(set(picture.convert("L").resize((64, 64)).getdata())) > 1

    model = AutoModelForCausalLM.from_pretrained(output_dir)
    assert model.config.vocab_size == 61
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


@pytest.mark.parametrize(
    ("config", "readout"),
    [("tiny_qr", "qr_decoded"), ("tiny_uuid", "longest_common_substring"), ("tiny_uuid", "reference_soft")],
)
def test_other_experiments(run_example, tmp_path, config, readout):
    flags = [str(item) for pair in FLAGS.items() for item in pair]
    run_example(f"{config}.yaml", *flags, "--output_dir", "there", "--validation_draws", "1")
    results = json.loads((tmp_path / "there" / "results.json").read_text())
    for stage in ("untrained", "trained"):
        assert 0 <= results[f"eval_{readout}"][stage]["mean"] < 1
        assert 0 < results["eval_distinct"][stage]["mean"] <= 1
    assert results["steps"] == 2 and results["entropy"]["first"] > 0


@pytest.mark.parametrize("reward", ["metagradient", "edit_distance"])
def test_language(run_example, tmp_path, reward):
    """With a random model in place of the one that `examples/pretrain_tiny.py` trains."""
    model, tokenizer = tiny_causal_lm(hidden_size=16, num_layers=1, max_position_embeddings=128), tiny_tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    flags = [str(item) for pair in FLAGS.items() for item in pair]
    names = ["--model_name_or_path", "model", "--target_model_name_or_path", "model"]
    run_example(
        "tiny_language.yaml", *flags, *names, "--output_dir", "there", "--metric_examples", "4", "--reward", reward
    )
    results = json.loads((tmp_path / "there" / "results.json").read_text())
    for stage in ("untrained", "trained"):
        assert results["eval_language_share"][stage]["mean"] <= 1
        assert results["eval_held_out_perplexity"][stage]["mean"] > 1
        assert results["eval_perplexity"][stage]["mean"] > 1


def test_resumed_run_keeps_the_untrained_generator(run_example, tmp_path):
    flags = [str(item) for pair in (FLAGS | {"--save_steps": 1, "--eval_steps": 1}).items() for item in pair]
    flags += ["--output_dir", "there", "--validation_draws", "1"]
    run_example("tiny_67.yaml", *flags)
    first = json.loads((tmp_path / "there" / "results.json").read_text())
    run_example("tiny_67.yaml", *flags, "--max_steps", "3", "--resume_from_checkpoint", "true")
    second = json.loads((tmp_path / "there" / "results.json").read_text())
    assert (first["steps"], second["steps"]) == (2, 3)
    assert first["eval_metric"]["untrained"] == second["eval_metric"]["untrained"]


def test_norm_has_no_pattern(run_example, tmp_path):
    flags = [str(item) for pair in FLAGS.items() for item in pair]
    run_example("tiny_l2.yaml", *flags, "--output_dir", "norm", "--max_steps", "1")
    written = {path.name for path in (tmp_path / "norm").iterdir()}
    assert {"results.json", "results.md", "log.jsonl", "curve.png"} <= written
    assert "pattern.png" not in written
    assert "eval_lm_head_norm" in json.loads((tmp_path / "norm" / "results.json").read_text())


@pytest.mark.parametrize(("flag", "value"), [("metric", "l2_norm"), ("dataset", "wiki")])
def test_unknown_choice_in_yaml(run_example, tmp_path, flag, value):
    """YAML values pass the command line's own check."""
    config = tmp_path / "wrong.yaml"
    config.write_text(f"{flag}: {value}\n")
    with pytest.raises(ValueError, match=f"argument --{flag}: invalid choice: '{value}'"):
        run_example(config, "--bf16", "false")
