"""The house: rooms that are in the picture, no cycles, and additions that take one file."""

import re
import subprocess
import sys

import pytest

from docs import make_architecture as house
from tests.docs.pages import ROOT


def test_the_picture_is_up_to_date():
    assert house.PICTURE.read_text(encoding="utf-8") == house.draw(), "Run `python docs/make_architecture.py`."


def test_every_module_is_in_a_room():
    packages = {"", "metagradients"}  # the public names
    assert {module for module in house.graph() if house.room_of(module) is None} == packages


def test_imports_go_down():
    level = {name: i for i, row in enumerate(house.ROWS) for name, _ in row}
    for module, targets in house.graph().items():
        for target in targets:
            pair = house.room_of(module), house.room_of(target)
            assert None in pair or level[pair[0]] <= level[pair[1]], f"{module} imports {target}"


def test_no_module_imports_itself_by_others():
    modules, ended, open_ = house.graph(), set(), []

    def visit(module):
        assert module not in open_, f"{' -> '.join(open_)} -> {module}"
        if module not in ended:
            open_.append(module)
            for target in modules[module]:
                visit(target)
            ended.add(open_.pop())

    for module in modules:
        visit(module)


ADDITIONS = ["metric", "optimizer", "reward", "kernel"]


@pytest.mark.parametrize("addition", ADDITIONS)
def test_an_addition_is_one_short_file(addition, tmp_path, monkeypatch):
    """What docs/architecture.md says, done in a file of its own. `test_docs` runs the same on its way."""
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    (code,) = re.findall(rf"## To add an? {addition}\n.*?```python\n(.*?)```", page, re.DOTALL)
    path = tmp_path / f"{addition}.py"
    path.write_text(code, encoding="utf-8")
    assert len(code.splitlines()) <= 40 and "assert" in code
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(path), "exec"), {"__name__": addition})


def test_the_engine_needs_neither_trl_nor_vllm():
    """Which take seconds to import."""
    code = "import sys, trl_dpg.metagradients, trl_dpg.metrics; assert not {'trl', 'vllm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
