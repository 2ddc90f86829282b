"""The HTML page about a run."""

import base64
import json
import os
from pathlib import Path
from typing import Any

import jinja2

from ..publishing.cards import PAPER
from ..publishing.outcome import outcome, recipe_text, validation_rows
from .callback import read_rows


def write_report(run_dir: str | os.PathLike[str], path: str | os.PathLike[str] | None = None) -> Path:
    """
    Writes one HTML page about a run, with its figures, curves, pictures and texts. The page is self-contained, so it can be sent and
    opened anywhere. It loads nothing and runs no script.

    Args:
        run_dir (`str` or `PathLike`):
            The run's `output_dir`, during or after training.
        path (`str` or `PathLike`, *optional*):
            HTML file to write. `None` means `report.html` in `run_dir`.

    Raises:
        [`ValueError`]: If `run_dir` holds no report of a run.

    Example:

    ```python
    from trl_dpg.reporting import write_report

    write_report("runs/qr")
    ```
    """
    folder = Path(run_dir) / "report"
    if not (folder / "run.json").exists():
        raise ValueError(
            f"`run_dir` {os.fspath(run_dir)!r} holds no report of a run (`report/run.json`). Pass the `output_dir` of a run of "
            "`DatasetPolicyGradientTrainer`."
        )
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    history = read_rows(folder / "log.jsonl")
    samples = read_rows(folder / "samples.jsonl")
    patterns = sorted((folder / "patterns").glob("step-*.png"))
    steps = sorted({sample["step"] for sample in samples})
    page = render(
        "report.html",
        name=Path(run_dir).absolute().name,
        run=run,
        outcome=outcome(run),
        recipe=recipe_text(run["recipe"]),
        tables={name: validation_rows(validation) for name, validation in run["validation"].items()},
        progress=_progress(history, run["training"]["steps"]),
        pictures={name: _data_uri(folder / f"{name}.png") for name in ("curve", "entropy", "rewards")},
        pattern=_data_uri(patterns[-1]) if patterns else None,
        animation=_data_uri(folder / "pattern.gif"),
        samples=[
            (step, kind, [sample for sample in samples if (sample["step"], sample["kind"]) == (step, kind)])
            for step in dict.fromkeys([*steps[:1], *steps[-1:]])
            for kind in ("highest", "lowest")
        ],
        paper=PAPER,
    )
    path = Path(path) if path is not None else Path(run_dir) / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def render(template: str, **values: Any) -> str:
    """Fills in a template of this package."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(str(__package__), ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["colored"] = _colored
    return environment.get_template(template).render(**values)


def _colored(words: list[list[Any]]) -> list[dict[str, Any]]:
    """Words for the page, with the strength of their color, from 0 to 100, and a much better candidate if there is one."""
    largest = max(abs(credit) for _, credit, *_ in words) or 1.0
    return [
        {
            "text": text.replace("\n", "↵\n"),
            "kind": "plus" if credit > 0 else "minus",
            "strength": round(100 * abs(credit) / largest),
            "credit": credit,
            # Only much better candidates are shown, since each takes room on the page.
            "better": best if best is not None and best_credit > max(credit, 0) + 0.5 * largest else None,
            "better_credit": best_credit,
        }
        for text, credit, best, best_credit in words
    ]


def _progress(history: list[dict[str, Any]], step: int) -> dict[str, Any]:
    """Progress of the run: the last step, the run's time, and the entropies. `step` is the step in `run.json`, which logs may exceed."""
    trained = [row for row in history if "loss" in row]
    ended = [row for row in history if "train_runtime" in row]
    return {
        "step": max([step, *(row["step"] for row in trained)]) or None,
        "seconds": ended[-1]["train_runtime"] if ended else None,
        "entropy": [row["entropy"] for row in trained if row.get("entropy") is not None],
    }


def _data_uri(path: Path) -> str | None:
    if not path.exists():
        return None
    kind = path.suffix.removeprefix(".")
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
