"""The site builds without a warning, holds every public name, and its links lead somewhere."""

import importlib
import os
import re
import subprocess
import sys
from urllib.parse import unquote

import pytest

from tests.docs.pages import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    path = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(path)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return path


@pytest.mark.slow
def test_links(site):
    pages = {path.resolve(): path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    names = {path: set(re.findall(r'\bid="?([^"\s>]+)', text)) for path, text in pages.items()}
    for path, text in pages.items():
        for target in re.findall(r'<(?:a|img)\b[^>]*?\b(?:href|src)="([^"]*)"', text):
            if re.match(r"\w+:", target) or path.name == "404.html":
                continue
            file, _, anchor = unquote(target).partition("#")
            found = (path.parent / file).resolve() if file else path
            found = found / "index.html" if found.is_dir() else found
            assert found.exists(), f"{path.relative_to(site)}: {target}"
            if anchor and found in names and not anchor.startswith("__"):
                assert anchor in names[found], f"{path.relative_to(site)}: {target}"


@pytest.mark.slow
def test_every_public_name_is_there(site):
    text = "".join(path.read_text(encoding="utf-8") for path in (site / "api").glob("*.html"))
    for module in ("trl_dpg", "trl_dpg.metrics", "trl_dpg.metagradients", "trl_dpg.rewards"):
        for name in importlib.import_module(module).__all__:
            assert f'id="{module}.{name}"' in text or f"#trl_dpg.{name}" in text, f"{module}.{name}"
