"""Notebooks run from top to bottom, and print what they show."""

import json
import re
import sys

import pytest

from tests.docs.pages import ROOT


NUMBER = r"[-+]?\d+\.\d+"


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "docs/notebooks").glob("*.ipynb")))
def test_notebook(name, monkeypatch, capsys):
    monkeypatch.chdir(ROOT / "docs/notebooks")
    monkeypatch.setattr(sys, "path", list(sys.path))
    cells = json.loads((ROOT / "docs/notebooks" / name).read_text(encoding="utf-8"))["cells"]
    scope = {"__name__": "__main__"}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), scope)
            shown, printed = "".join("".join(o["text"]) for o in cell["outputs"]), capsys.readouterr().out
            assert re.sub(NUMBER, "", printed) == re.sub(NUMBER, "", shown)
            # machines round differently
            numbers = [[float(number) for number in re.findall(NUMBER, text)] for text in (printed, shown)]
            assert numbers[0] == pytest.approx(numbers[1], rel=0.05)
