"""The README's script on the model that it names, beside the result that it states."""

import re

import pytest

from experiments.corpora import smollm2
from tests.docs.pages import read_blocks


@pytest.mark.slow
def test_readme_script_on_smollm2(tmp_path, monkeypatch, capsys):
    """Where purple starts is stated to the last digit. Where it ends depends on the machine's rounding."""
    monkeypatch.chdir(tmp_path)
    (block,) = read_blocks("README.md", "python")
    stated = [float(number) for number in re.findall(r"'([\d.]+)%'", block.code)]
    exec(compile(block.code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", smollm2()), "README.md", "exec"), {})
    printed = [float(number) for number in re.findall(r"'([\d.]+)%'", capsys.readouterr().out)]
    assert len(printed) == len(stated) == 3
    assert printed[0] == stated[0]
    assert printed[1] == pytest.approx(stated[1], rel=0.2)
    assert stated[2] / 3 < printed[2] < stated[2] * 3
