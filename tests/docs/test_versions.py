"""The versions that were tested, as the pages show them."""

import tomllib
from importlib.util import module_from_spec, spec_from_file_location

from packaging.requirements import Requirement

from tests.docs.pages import ROOT


spec = spec_from_file_location("versions", ROOT / "tests" / "versions.py")
versions = module_from_spec(spec)
spec.loader.exec_module(versions)


def test_the_table_is_shown():
    assert versions.table() in (ROOT / "docs" / "dependencies.md").read_text()


def test_what_passed_is_allowed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    allowed = {r.name: r.specifier for r in map(Requirement, project["dependencies"])}
    rows = versions.read_record()
    assert all(row["failed"] == 0 for row in rows)
    assert all(row[name] in allowed[name] for row in rows for name in versions.CORE)
