"""The site builds without a warning, holds every public name, and its links lead somewhere."""

import os
import re
import subprocess
import sys
from urllib.parse import unquote

import pytest

from tests.docs.pages import ROOT
from tests.docs.test_api import MODULES, PUBLIC


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    path = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(path)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return path


def test_links(site):
    pages = {path.resolve(): path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    names = {path: set(re.findall(r'\bid="?([^"\s>]+)', text)) for path, text in pages.items()}
    for path, text in pages.items():
        # The page of an error is shown at any address, so its links begin at the root of the site
        folder = site if path.name == "404.html" else path.parent
        for target in re.findall(r'<(?:a|img)\b[^>]*?\b(?:href|src)="([^"]*)"', text):
            if re.match(r"\w+:", target):
                continue  # the network's
            file, _, anchor = unquote(target).partition("#")
            file = file.removeprefix("/") if folder == site else file
            found = (folder / file).resolve() if file else path
            found = found / "index.html" if found.is_dir() else found
            assert found.exists(), f"{path.relative_to(site)}: {target}"
            if anchor and found in names:
                assert anchor in names[found], f"{path.relative_to(site)}: {target}"


def test_every_public_name_has_its_heading(site):
    """As the only ones at that level: each stands on the page of its module."""
    for module in MODULES:
        page = site / "api" / f"{module.removeprefix('trl_dpg.')}.html"
        headings = re.findall(r'<h2 id="([\w.]+)"', page.read_text(encoding="utf-8"))
        assert sorted(headings) == sorted(name for name in PUBLIC if name.rpartition(".")[0] == module)


def test_formulas_need_no_script(site):
    text = (site / "method.html").read_text(encoding="utf-8")
    assert text.count("<math") > 50 and "\\frac" not in text and "\\(" not in text
    assert not re.search(r'<(?:script|link|img)\b[^>]*(?:src|href)="https?:', text)
