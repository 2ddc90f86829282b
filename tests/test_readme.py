"""The README is short and easy to read; the page of results names every configuration. Code of both runs in tests/docs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from docs.readability import measure


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "docs/results.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted((ROOT / "examples/configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_configurations_hold_known_fields(path):
    """Every example configuration is on the page of results, and no number in it is text."""
    assert path.stem in RESULTS
    for name, value in yaml.safe_load(path.read_text()).items():
        assert (
            not (isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d+)?(e[-+]?\d+)?", value)) or name == "metric"
        )


def test_readme_is_read_in_three_minutes():
    figures = measure(README)
    assert figures.lines <= 150
    assert figures.longest_paragraph <= 60
    assert figures.average_sentence <= 18


def test_readme_shows_the_two_commands_first():
    first_screen = "\n".join(README.splitlines()[:20])
    assert "make demo" in first_screen and "make test" in first_screen


def test_readability_counts_prose_alone():
    page = """# A heading of many words that are not counted

[![Badge](https://example.org/badge)](LICENSE) ![A picture](picture.png)

One two three. Four [five six](page.md) `code that is one word`!

```bash
make nothing of this
```

| a | table |
|---|---|

- An item of five words,
  on two lines.
1. Another.
"""
    figures = measure(page)
    assert figures.longest_paragraph == 8  # the first item
    assert figures.average_sentence == pytest.approx((3 + 4 + 8 + 1) / 4)


def test_readability_is_a_command():
    done = subprocess.run(
        [sys.executable, "docs/readability.py", "README.md"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert re.fullmatch(
        r"README\.md: \d+ lines, longest paragraph \d+ words, average sentence \d+\.\d words\n", done.stdout
    )
