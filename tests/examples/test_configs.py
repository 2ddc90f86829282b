"""The configurations of `examples/configs` train in little, on what `experiments.prepare` writes, and leave results for a table."""

import json

import pytest
from PIL import Image
from transformers import AutoModelForCausalLM

from experiments.prepare import UUID, prepare
from experiments.tables import CONFIGS, collect
from trl_dpg.scripts import train
from trl_dpg.testing import tiny_causal_lm, tiny_tokenizer


FLAGS = {
    "--max_steps": 2,
    "--per_device_train_batch_size": 16,
    "--per_device_eval_batch_size": 16,
    "--eval_steps": 1,
    "--logging_steps": 1,
    "--max_completion_length": 8,
    "--num_eval_prompts": 3,
    "--validation_draws": 1,
    "--use_cpu": "true",
}


@pytest.fixture
def run_config(monkeypatch, tmp_path):
    """Trains by a configuration with a few flags changed, in an empty directory, and returns the results."""

    def run(config, kind, *more, **changes):
        monkeypatch.chdir(tmp_path)
        if kind is not None:
            prepare(kind)
        flags = FLAGS | {f"--{name}": value for name, value in changes.items()}
        command = ["--config", str(CONFIGS / f"{config}.yaml"), "--output_dir", "run"]
        assert train.main([*command, *(str(item) for pair in flags.items() for item in pair), *more]) == 0
        collect(tmp_path / "run", tmp_path / "results", 60)
        return json.loads((tmp_path / "results" / "results.json").read_text())

    return run


def test_a_run_too_short_to_log(run_config):
    results = run_config("tiny_67", "tiny-60", max_steps=1, logging_steps=10)
    assert results["steps"] == 1 and results["entropy"] is None


def test_tiny_67(run_config, tmp_path):
    results = run_config("tiny_67", "tiny-60", validation_draws=2)
    assert (results["steps"], results["completions"], results["target_steps"], results["seconds"]) == (2, 32, 1, 60)
    for stage in ("untrained", "trained"):
        accuracy = results["eval_pixel_accuracy"][stage]
        assert len(accuracy["draws"]) == 2
        assert accuracy["mean"] == sum(accuracy["draws"]) / 2
        assert 0 <= accuracy["mean"] <= 1 and accuracy["standard_error"] >= 0
        assert results["eval_metric"][stage]["mean"] < 0

    table = (tmp_path / "results" / "results.md").read_text()
    assert table.startswith("| validation | before training, 2 draws | at step 2, 2 draws |\n|---|---|---|\n")
    assert "| pixel accuracy |" in table

    log = [json.loads(line) for line in (tmp_path / "results" / "log.jsonl").read_text().splitlines()]
    assert len([row for row in log if "metagradient/pixel_accuracy" in row]) == 2
    assert len([row for row in log if "eval_pixel_accuracy" in row]) == 6  # 2 before training, 2 during and 2 after

    for name in ("curve.png", "pattern.png"):
        with Image.open(tmp_path / "results" / name) as picture:
            assert min(picture.size) > 100
            assert len(set(picture.convert("L").resize((64, 64)).getdata())) > 1

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert model.config.vocab_size == 61
    assert {path.name for path in tmp_path.iterdir()} == {"data", "run", "results"}


@pytest.mark.parametrize(
    ("config", "kind", "readout"),
    [
        ("tiny_qr", "tiny", "qr_decoded"),
        ("tiny_uuid", "hex", "longest_common_substring"),
        ("tiny_uuid", "hex", "reference_soft"),
    ],
)
def test_other_experiments(run_config, config, kind, readout):
    results = run_config(config, kind)
    for stage in ("untrained", "trained"):
        assert 0 <= results[f"eval_{readout}"][stage]["mean"] < 1
        assert 0 < results["eval_distinct"][stage]["mean"] <= 1
    assert results["steps"] == 2 and results["entropy"]["first"] > 0


@pytest.mark.parametrize("reward", ["metagradient", "edit_distance"])
def test_language(run_config, tmp_path, reward):
    """With a random model in place of the one that `experiments.pretrain` trains."""
    model, tokenizer = tiny_causal_lm(hidden_size=16, num_layers=1, max_position_embeddings=128), tiny_tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data = {"dataset_name": "prompts.jsonl", "eval_dataset_name": "prompts.jsonl"}
    names = {"model_name_or_path": "model", "target_model_name_or_path": "model"}
    rows = [{"prompt": f"the {word}"} for word in ("sun", "sea", "moon", "rain", "wind")]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = ["--reference_texts", "el sol", "la luna"]
    results = run_config("tiny_language", None, *texts, reward=reward, **names, **data)
    for stage in ("untrained", "trained"):
        assert results["eval_language_share"][stage]["mean"] <= 1
        assert results["eval_held_out_perplexity"][stage]["mean"] > 1
        assert results["eval_perplexity"][stage]["mean"] > 1


def test_resumed_run_keeps_the_untrained_generator(run_config):
    first = run_config("tiny_67", "tiny-60", save_steps=1)
    second = run_config("tiny_67", "tiny-60", save_steps=1, max_steps=3, resume_from_checkpoint="true")
    assert (first["steps"], second["steps"]) == (2, 3)
    assert first["eval_metric"]["untrained"] == second["eval_metric"]["untrained"]


def test_norm_has_no_pattern(run_config, tmp_path):
    results = run_config("tiny_l2", "tiny-60", max_steps=1)
    written = {path.name for path in (tmp_path / "results").iterdir()}
    assert written == {"results.json", "results.md", "log.jsonl", "curve.png"}
    assert "eval_lm_head_norm" in results


def test_reference_of_validation_is_that_of_the_metric():
    for path in CONFIGS.glob("*_uuid.yaml"):
        assert f"evaluation_reference: {UUID}\n" in path.read_text()


def test_unknown_metric_in_yaml(tmp_path):
    """YAML values pass the command line's own check."""
    config = tmp_path / "wrong.yaml"
    config.write_text("metric: l2_norm\n")
    with pytest.raises(ValueError, match="`metric` must be .*, got 'l2_norm'"):
        train.parse(["--config", str(config), "--bf16", "false", "--output_dir", "there"])
