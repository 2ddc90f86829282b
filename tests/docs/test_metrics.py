"""The contract of docs/metrics.md, and its metric from the shell."""

import json
import sys

import pytest
import torch
from datasets import Dataset

from trl_dpg import cli
from trl_dpg.scripts import train


class Recording:
    def __init__(self):
        self.calls = []

    def setup(self, model):
        self.calls.append("setup")

    def __call__(self, model):
        assert not model.training and not torch.is_autocast_enabled("cpu")
        self.calls.append("metric")
        return -model.lm_head.weight.double().norm()

    def readouts(self, model):
        self.calls.append("readouts")
        return {"half": 0.5}

    def state(self):
        return {"calls": len(self.calls)}

    def load_state(self, state):
        self.loaded = state


def test_what_is_called_when(make_trainer, tmp_path):
    metric = Recording()
    trainer = make_trainer(metric=metric, max_steps=1, save_strategy="steps", save_steps=1)
    assert metric.calls == ["setup"]
    run = ["setup", "metric", "metric", "readouts"]
    trainer.train()
    assert metric.calls == ["setup", *run, *run]  # the first batch has one more run, without `epsilon_root`
    checkpoint = next((tmp_path / "dpg").glob("checkpoint-*"))
    assert json.loads((checkpoint / "dpg_state.json").read_text())["metric"] == {"calls": 9}
    assert trainer.evaluate()["eval_half"] == 0.5
    assert metric.calls == ["setup", *run, *run, *run]
    assert [row["metagradient/half"] for row in trainer.state.log_history if "metagradient/half" in row] == [0.5]
    again = Recording()
    make_trainer(metric=again, max_steps=2).train(resume_from_checkpoint=str(checkpoint))
    assert again.loaded == {"calls": 9}


@pytest.fixture
def elsewhere(directory, monkeypatch):
    """The page's module is in the current directory, which Python does not search by itself, as with any command."""
    directory.write_files()
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(directory.path))])
    return directory


def test_metric_of_a_module_in_check(elsewhere, capsys):
    Dataset.from_dict({"text": ["good ask blue old", "air and sun cat"] * 4}).to_json("texts.jsonl")
    target = elsewhere.models["openai-community/gpt2"]
    argv = ["check", "--model", target, "--dataset", "texts.jsonl", "--metric", "my_metrics:Preference"]
    assert cli.main([*argv, "--adam_epsilon_root", "auto", "--learning_rate", "1e-4", "--dtype", "float64"]) == 0
    assert "Metagradients: passed" in capsys.readouterr().out


def test_metric_of_a_module_in_train(elsewhere, tiny):
    generator = elsewhere.models["HuggingFaceTB/SmolLM2-135M-Instruct"]
    target = elsewhere.models["openai-community/gpt2"]
    Dataset.from_dict({"prompt": ["good ask blue old", "air and sun cat"] * 2}).to_json("prompts.jsonl")
    flags = ["--model_name_or_path", generator, "--target_model_name_or_path", target, "--output_dir", "out"]
    assert train.main([*flags, "--dataset_name", "prompts.jsonl", "--metric", "my_metrics:Preference"]) == 0
    facts = json.loads((elsewhere.path / "out" / "dpg.json").read_text())
    assert facts["metric"]["name"] == "Preference"
    assert facts["metric"]["description"] == "The target finds one answer likelier than another."
