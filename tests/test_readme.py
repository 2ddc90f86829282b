"""The README names what there is. Its code runs in tests/docs."""

import re
from pathlib import Path

import pytest
import yaml


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("path", sorted((ROOT / "examples/configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_configurations_hold_known_fields(path):
    """Every example configuration is in the README, and no number in it is text."""
    assert path.stem in README
    for name, value in yaml.safe_load(path.read_text()).items():
        assert (
            not (isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d+)?(e[-+]?\d+)?", value)) or name == "metric"
        )
