"""The callback that writes a run's report: figures, pictures and texts, in files and in trackers."""

import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from functools import wraps
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.utils import logging

from ..credit import WordCredit, credit_text
from ..data import message_text
from ..publishing.facts import describe_machine, training_facts
from ..publishing.outcome import main_readout
from ..rewards import MetagradientReward
from .plotting import animate, plot_distribution, plot_learning_curve, plot_pattern, plot_series


if TYPE_CHECKING:
    from ..trainer import DatasetPolicyGradientTrainer

logger = logging.get_logger(__name__)

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
NUM_SAMPLES = 3  # number of best completions, and of worst ones, for each logged step
MAX_CHARACTERS = 2_000  # most characters of a text


def whatever_happens(method: Callable) -> Callable:
    """Makes any error in a method a warning, since a failed report must not end the training."""

    @wraps(method)
    def wrapped(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        try:
            method(self, args, state, control, **kwargs)
        except Exception as error:
            logger.warning(
                f"The report of step {state.global_step} could not be written: {type(error).__name__}: {error}. Training goes on."
            )

    return wrapped


class ReportCallback(TrainerCallback):
    """
    Writes a report of a run into `<output_dir>/report`. [`DatasetPolicyGradientTrainer`] always has this callback.

    - `run.json`: models, metric, recipe, settings that are not the defaults, machine, versions.
    - `log.jsonl`: all logs, as in `trainer.state.log_history`.
    - `curve.png`, `entropy.png`, `rewards.png`: the main read-out, the generator's entropy, quantiles of the raw rewards.
    - `rewards.jsonl`: these quantiles.
    - `samples.jsonl`: for each logged step, the completions with the highest and the lowest raw rewards.
    - For an [`~trl_dpg.metrics.LMHeadPattern`], `patterns.jsonl` and `patterns/step-000120.png`: the pattern that each validation
      decoded. `pattern.gif` shows all of them, one after the other.

    Pictures are drawn when the generator is validated and when training ends. With `report_to`, TensorBoard, Weights &
    Biases and Trackio get the same pictures and texts. A resumed run continues the report from its checkpoint on, and drops later
    entries. If a report cannot be written, training goes on with a warning.

    [`~trl_dpg.reporting.write_report`] makes an HTML page of the report.
    """

    def __init__(self, trainer: "DatasetPolicyGradientTrainer"):
        self.trainer = trainer
        self.folder = Path(trainer.args.output_dir) / "report"  # type: ignore[arg-type]

    @whatever_happens
    def on_train_begin(self, args, state, control, **kwargs):
        self.folder.mkdir(parents=True, exist_ok=True)
        history = "".join(json.dumps(row) + "\n" for row in state.log_history)
        (self.folder / "log.jsonl").write_text(history)
        for name in ("samples.jsonl", "rewards.jsonl", "patterns.jsonl"):
            rows = [row for row in read_rows(self.folder / name) if row["step"] <= state.global_step]
            rows = rows if state.global_step > 0 else []  # the old rows belong to another run
            (self.folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        pictures, generated = (
            self.folder.glob("patterns/step-*.png"),
            self.folder.parent.glob("generated/step-*.parquet"),
        )
        for path in [*pictures, *(generated if args.save_generated else ())]:
            if state.global_step == 0 or int(path.stem.split("-")[1]) > state.global_step:
                path.unlink()
        self._write_run()

    @whatever_happens
    def on_log(self, args, state, control, logs=None, **kwargs):
        self.folder.mkdir(parents=True, exist_ok=True)  # for an evaluation without training
        self._append("log.jsonl", [state.log_history[-1]])
        if "reward" not in (logs or {}):
            return
        step, logged = state.global_step, self.trainer._logs
        first = self.trainer.reward_func_names[0]
        values = np.array(logged["extra"].get(f"{first}_raw") or logged["rewards"][first], dtype=float)
        finite = np.flatnonzero(np.isfinite(values))
        if len(finite) == 0:
            return
        quantiles = np.quantile(values[finite], QUANTILES).tolist()
        self._append("rewards.jsonl", [{"step": step, "reward": first, "quantiles": quantiles}])
        order = finite[np.argsort(values[finite], kind="stable")]
        chosen = {"highest": order[::-1][:NUM_SAMPLES], "lowest": order[:NUM_SAMPLES]}
        samples = [
            {
                "step": step,
                "kind": kind,
                "reward": float(values[i]),
                "prompt": _text(logged["prompt"][i]),
                "completion": _text(logged["completion"][i]),
                **self._words(int(i)),
            }
            for kind, indices in chosen.items()
            for i in indices
        ]
        self._append("samples.jsonl", samples)
        self._track_text(samples, step)

    @whatever_happens
    def on_evaluate(self, args, state, control, **kwargs):
        self.folder.mkdir(parents=True, exist_ok=True)
        step, picture = state.global_step, self.trainer.metric.picture()
        if picture is not None:
            rows = ["".join("1" if sign > 0 else "-" for sign in row) for row in picture[0].tolist()]
            self._append("patterns.jsonl", [{"step": step, "decoded": rows}])
            (self.folder / "patterns").mkdir(exist_ok=True)
            plot_pattern(*picture, self.folder / "patterns" / f"step-{step:06d}.png", title=f"step {step}")
        self._draw(state)

    @whatever_happens
    def on_train_end(self, args, state, control, **kwargs):
        self._draw(state)

    def _words(self, index: int) -> dict[str, Any]:
        """Credit of each token of a completion in the last batch, if tokens have credit of their own."""
        training = self.trainer.target_training
        words = training.credit_by_word(index) if isinstance(training, MetagradientReward) else []
        shown, length = [], 0
        for word in words:
            length += len(word.text)
            if length > MAX_CHARACTERS:
                shown.append(WordCredit(" …", 0.0))
                break
            shown.append(word)
        return {"words": [dataclasses.astuple(word) for word in shown]} if words else {}

    def _append(self, name: str, rows: list[dict[str, Any]]) -> None:
        with open(self.folder / name, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    def _write_run(self) -> dict[str, Any]:
        facts = training_facts(self.trainer)
        facts["settings"] = changed_settings(self.trainer.args)
        processes, machine = self.trainer.accelerator.num_processes, describe_machine(self.trainer.args.device)
        facts["hardware"] = f"{processes} processes, {machine}" if processes > 1 else machine
        facts["date"] = datetime.now(UTC).date().isoformat()
        facts["command"] = public_command(sys.argv, self.trainer.args.tokens())  # type: ignore[attr-defined]
        (self.folder / "run.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        return facts

    def _draw(self, state) -> None:
        history, facts = state.log_history, self._write_run()
        if any("loss" in row or "eval_metric" in row for row in history):
            plot_learning_curve(history, self.folder / "curve.png", main_readout(facts), facts["reward"])
        if any(row.get("entropy") is not None for row in history):
            plot_series(history, "entropy", self.folder / "entropy.png", "entropy, nats per token")
        rewards = read_rows(self.folder / "rewards.jsonl")
        if rewards:
            label = f"raw {rewards[-1]['reward']}"
            plot_distribution({row["step"]: row["quantiles"] for row in rewards}, self.folder / "rewards.png", label)
        patterns = sorted(self.folder.glob("patterns/step-*.png"))
        if len(patterns) > 1:
            animate(patterns, self.folder / "pattern.gif")
        self._track_pictures(state.global_step)

    def _track_pictures(self, step: int) -> None:
        paths = {name: self.folder / f"{name}.png" for name in ("curve", "entropy", "rewards")}
        paths["pattern"] = self.folder / "patterns" / f"step-{step:06d}.png"
        pictures = {name: path for name, path in paths.items() if path.exists()}
        writer = self._tensorboard()
        if writer is not None:
            for name, path in pictures.items():
                with Image.open(path) as picture:
                    writer.add_image(f"report/{name}", np.array(picture.convert("RGB")), step, dataformats="HWC")
            writer.flush()
        for tracker in self._trackers():
            images = {f"report/{name}": tracker.Image(str(path)) for name, path in pictures.items()}
            tracker.log({**images, "train/global_step": step})

    def _track_text(self, samples: list[dict[str, Any]], step: int) -> None:
        writer = self._tensorboard()
        if writer is not None:
            for kind in ("highest", "lowest"):
                lines = [
                    f"{sample['reward']:.3g}\n\n" + "\n".join(f"    {line}" for line in _shown(sample).splitlines())
                    for sample in samples
                    if sample["kind"] == kind
                ]
                writer.add_text(f"report/{kind}_rewards", "\n\n".join(lines), step)
        for tracker in self._trackers():
            columns = ["step", "kind", "reward", "prompt", "completion"]
            rows = [[*(sample[name] for name in columns), _shown(sample) * ("words" in sample)] for sample in samples]
            table = tracker.Table(columns=[*columns, "credit"], data=rows)
            tracker.log({"report/samples": table, "train/global_step": step})

    def _tensorboard(self) -> Any:
        """TensorBoard's writer, or `None` if TensorBoard is not in `report_to`."""
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback):
                return callback.tb_writer
        return None

    def _trackers(self) -> list[Any]:
        """The modules of Weights & Biases and Trackio that are in use. Both take the same calls."""
        names = [name for name in ("wandb", "trackio") if name in (self.trainer.args.report_to or ())]
        modules = map(import_module, names)
        return [module for module in modules if module.__name__ == "trackio" or module.run is not None]


def _shown(sample: dict[str, Any]) -> str:
    """A sample as plain text, with the credit of its words if there is any."""
    return credit_text([WordCredit(*word) for word in sample["words"]]) if "words" in sample else sample["completion"]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a file of JSON lines. Incomplete lines are left out. A missing file has no rows."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with suppress(json.JSONDecodeError):  # the process was killed while it wrote this line
            rows.append(json.loads(line))
    return rows


def public_command(argv: list[str], tokens: list[str]) -> str:
    """
    A command line without paths and tokens. Hides `tokens`, and the values of all flags whose names end in "token".

    Example:

    ```python
    >>> public_command(["/bin/train", "--my_token", "a", "--kwargs", "token: b", "--output_dir=/home/me/run"], tokens=["b"])
    "train --my_token HIDDEN --kwargs 'token: HIDDEN' --output_dir=run"
    >>> public_command(["/home/me/trl_dpg/scripts/train.py", "--seed", "1"], tokens=[])
    'trl-dpg train --seed 1'

    ```
    """
    script = Path(argv[0])
    # `trl-dpg train` and `accelerate launch -m trl_dpg.scripts.train` both run this file.
    words = ["trl-dpg", "train"] if script.parts[-3:] == ("trl_dpg", "scripts", "train.py") else [script.name]
    for flag, word in pairwise(argv):
        start, value = "", word
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            start = flag + equals
        if value and flag.startswith("--") and flag.endswith("token"):
            value = "HIDDEN"
        words.append(start + (Path(value).name if os.path.isabs(value) else value))
    command = shlex.join(words)
    for token in tokens:
        command = command.replace(token, "HIDDEN")
    return command


def changed_settings(args: Any) -> dict[str, Any]:
    """Fields of a configuration that differ from their defaults: numbers, switches and words, but no path or token."""
    settings = {}
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        value = getattr(value, "value", value)  # an enumeration has its value there
        if (
            "dir" in field.name
            or "token" in field.name
            or field.name in ("run_name", "resume_from_checkpoint", "dataloader_pin_memory")
        ):
            continue
        is_path = isinstance(value, str) and (os.path.isabs(value) or os.path.exists(value))
        if isinstance(value, (bool, int, float, str)) and value != field.default and not is_path:
            settings[field.name] = value
    return settings


def _text(text: Any) -> str:
    """Text of a prompt or completion, plain or conversational, cut to a maximum length."""
    if isinstance(text, list):
        texts = [(message["role"], message_text(message)) for message in text]
        text = texts[0][1] if len(texts) == 1 else "\n".join(f"{role}: {said}" for role, said in texts)
    return text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]} …"
