"""The versions that were tested, as the pages show them."""

import tomllib
from importlib.util import module_from_spec, spec_from_file_location

import pytest
from packaging.requirements import Requirement

from tests.docs.pages import ROOT


spec = spec_from_file_location("versions", ROOT / "tests" / "versions.py")
versions = module_from_spec(spec)
spec.loader.exec_module(versions)


@pytest.mark.parametrize("page", ["README.md", "docs/dependencies.md"])
def test_the_table_is_shown(page):
    assert versions.table() in (ROOT / page).read_text()


def test_what_passed_is_allowed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    allowed = {r.name: r.specifier for r in map(Requirement, project["dependencies"])}
    rows = versions.read_record()
    assert all(row["failed"] == 0 for row in rows)
    assert all(row[name] in allowed[name] for row in rows for name in versions.CORE)
