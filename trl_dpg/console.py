"""Console output of a run during training and at its end. `report/log.jsonl` and trackers get all logs."""

import time
from typing import TYPE_CHECKING, Any

from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from .metagradients.metric import description
from .publishing.facts import training_facts
from .publishing.outcome import heading, outcome
from .reporting.callback import whatever_happens


if TYPE_CHECKING:
    from .trainer import DatasetPolicyGradientTrainer

LINES_UNDER_A_HEADER = 20
LONGEST_HEADING = 24


class Figures:
    """
    Chooses the few figures of a log that a person watches: the gain of Φ, the metric's first read-out, the generator's entropy and
    the length of its texts. A reward that trains no target is shown, too.
    """

    def __init__(self, trainer: "DatasetPolicyGradientTrainer"):
        self.reward = trainer.args.reward  # type: ignore[attr-defined]
        readouts = [name for name in description(trainer.metric)["readouts"] if name != "metric_gain"]
        self.names = {"gain": "metric_gain", **{heading(name)[:LONGEST_HEADING]: name for name in readouts[:1]}}
        if self.reward not in ("metagradient", "naive"):
            self.names = {"reward": "reward", **self.names}

    def of_training(self, logs: dict[str, Any]) -> dict[str, float | None]:
        """Figures of a training step. Empty for any other log."""
        if "entropy" not in logs and "loss" not in logs:
            return {}
        figures = {text: logs.get(f"{self.reward}/{name}", logs.get(name)) for text, name in self.names.items()}
        return {**figures, "entropy": logs.get("entropy"), "length": logs.get("completions/mean_length")}

    def of_validation(self, logs: dict[str, Any]) -> dict[str, float | None]:
        """Figures of a validation. Empty for any other log."""
        prefix = next((key.removesuffix("metric_gain") for key in logs if key.endswith("_metric_gain")), None)
        if prefix is None:
            return {}
        figures = {text: logs.get(f"{prefix}{name}") for text, name in self.names.items()}
        return {**figures, "entropy": None, "length": logs.get(f"{prefix}completion_length")}


def shown(value: float | None) -> str:
    """A figure with four digits."""
    return "-" if value is None else f"{value:.4g}"


class LinesCallback(PrinterCallback):
    """Prints a line with aligned columns for each log of the main process. It is used if there is no terminal."""

    def __init__(self, trainer: "DatasetPolicyGradientTrainer"):
        self.figures = Figures(trainer)
        self.num_lines = 0
        self.start_time, self.start_step = time.monotonic(), 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.start_time, self.start_step = time.monotonic(), state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        cells = self.figures.of_training(logs)
        what, seconds, left = f"{state.global_step}/{state.max_steps}", logs.get("step_time"), "-"
        if cells and state.global_step > self.start_step:
            pace = (time.monotonic() - self.start_time) / (state.global_step - self.start_step)
            left = tqdm.format_interval(pace * (state.max_steps - state.global_step))
        elif cells := self.figures.of_validation(logs):
            what, seconds = f"{state.global_step} validation", None
        if not cells:
            return
        if self.num_lines % LINES_UNDER_A_HEADER == 0:
            print(line("step", [*cells, "s/step", "left"], cells), flush=True)
        self.num_lines += 1
        print(line(what, [*map(shown, cells.values()), shown(seconds), left], cells), flush=True)


def line(first: str, values: list[str], headings: Any) -> str:
    """A row of the table below its headings."""
    widths = [max(9, len(text)) for text in [*headings, "s/step", "left"]]
    return f"{first:>17}  " + "  ".join(f"{value:>{width}}" for value, width in zip(values, widths, strict=True))


class BarCallback(ProgressCallback):
    """Shows Transformers' progress bar with the same figures, and prints a line for each validation."""

    def __init__(self, trainer: "DatasetPolicyGradientTrainer"):
        super().__init__()
        self.figures = Figures(trainer)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        if figures := self.figures.of_validation(logs):
            tqdm.write(f"Validation at step {state.global_step}: {in_words(figures)}")
        elif self.training_bar is not None and (figures := self.figures.of_training(logs)):
            self.training_bar.set_postfix_str(in_words(figures))


def in_words(figures: dict[str, float | None]) -> str:
    return ", ".join(f"{text} {shown(value)}" for text, value in figures.items() if value is not None)


class SummaryCallback(TrainerCallback):
    """Prints the outcome at the end of training, and where the report is."""

    def __init__(self, trainer: "DatasetPolicyGradientTrainer"):
        self.trainer = trainer

    @whatever_happens
    def on_train_end(self, args, state, control, **kwargs):
        print(summary(self.trainer), f"A page of them: `trl-dpg report {args.output_dir}`", sep="\n", flush=True)


def summary(trainer: "DatasetPolicyGradientTrainer") -> str:
    """The outcome of a run, compared with the untrained generator if it was validated, and the place of the pictures."""
    facts, figures = training_facts(trainer), Figures(trainer)
    said = outcome(facts)
    rows = [(row["step"], figures.of_training(row)) for row in trainer.state.log_history]
    rows = [(step, shown) for step, shown in rows if shown]
    if not facts["validation"] and rows:
        ends = rows[:1] + rows[1:][-1:]
        said += " In training, " + "; ".join(f"step {step}: {in_words(shown)}" for step, shown in ends) + "."
    return f"{said}\nPictures and all figures: {trainer.args.output_dir}/report"


def replace_console(trainer: "DatasetPolicyGradientTrainer") -> None:
    """Replaces Transformers' own callbacks by those of this module. Callbacks for notebooks, or of the user, stay."""
    replacements: dict[type, Any] = {ProgressCallback: BarCallback, PrinterCallback: LinesCallback}
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback) in replacements:
            trainer.remove_callback(callback)
            trainer.add_callback(replacements[type(callback)](trainer))
    trainer.add_callback(SummaryCallback(trainer))
