"""The README's examples run as they stand, with tiny models in the place of those on the Hub."""

import re
from pathlib import Path

import datasets
import pytest
import yaml

from examples.resources import save_tiny_models, tiny_causal_lm, tiny_prompts
from trl_dpg import DatasetPolicyGradientConfig
from trl_dpg.metrics import LMHeadNorm


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_there_are_two_examples():
    assert len(BLOCKS) == 2


def test_trainer_example(tmp_path, monkeypatch, capsys):
    generator, target = save_tiny_models(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: tiny_prompts(8, 2)["train"])
    names = {"HuggingFaceTB/SmolLM2-135M-Instruct": generator, "openai-community/gpt2": target}
    config = DatasetPolicyGradientConfig.__init__

    def small(self, *args, **kwargs):
        tiny = {"bf16": False, "use_cpu": True, "max_steps": 1, "max_completion_length": 4, "report_to": "none"}
        config(self, str(tmp_path / args[0]), *args[1:], **kwargs, **tiny)

    monkeypatch.setattr(DatasetPolicyGradientConfig, "__init__", small)
    code = BLOCKS[0]
    for name, path in names.items():
        assert name in code
        code = code.replace(name, path)
    exec(compile(code, "README.md", "exec"), {})
    assert "eval_pixel_accuracy" in capsys.readouterr().out


def test_engine_example():
    tokenized = [[1, 2, 3], [4, 5, 6, 7]]
    scope = {"model": tiny_causal_lm(), "tokenized": tokenized, "metric": LMHeadNorm()}
    exec(compile(BLOCKS[1], "README.md", "exec"), scope)
    assert scope["out"].metagradients.shape == (2,)


@pytest.mark.parametrize("path", sorted((ROOT / "examples/configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_configurations_hold_known_fields(path):
    """Every example configuration is in the README, and no number in it is text."""
    assert path.stem in README
    for name, value in yaml.safe_load(path.read_text()).items():
        assert (
            not (isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d+)?(e[-+]?\d+)?", value)) or name == "metric"
        )
