"""Checkpoints that are complete or not used at all, and from which a run continues as if it had not stopped."""

import hashlib
import json
import math
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints
from transformers.utils import logging
from trl.trainer.utils import RepeatSampler

from .metagradients.metric import description
from .publishing.facts import describe_model
from .publishing.push import NOT_NEEDED, UNFINISHED


if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object

logger = logging.get_logger(__name__)

STATE_FILE = "dpg_state.json"  # values measured for `"auto"` settings, and other state of the reward
# For each process: the part of the last generation batch that is not trained on yet
BATCH_FILE = "generation_batch_{}.safetensors"

# Fields that Transformers takes from the checkpoint's optimizer, not from the configuration
KEPT_BY_THE_OPTIMIZER = {"optim", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"}
# Fields that `"auto"` values and the scale of rewards depend on, in addition to all fields of the target
MEASURED_WITH = {"metric", "reward", "cross_group_batching", "replay_ratio", "replay_dataset"}
# Fields of TRL and of this project that say how and where something is computed or shown, but not what
WITHOUT_EFFECT = re.compile(
    r"log_.*|num_completions_to_print|num_generations_eval|generation_batch_size|ds3_.*|(target_)?model_init_kwargs|nonfinite|"
    r"save_generated|target_(tape|tape_dir|micro_batch_size|micro_batch_tokens|gradient_checkpointing|fsdp)|"
    r"vllm_(mode|server_.*|group_port|gpu_.*|tensor_.*|enable_.*)"
)


class ResumingMixin(_Trainer):
    """
    Overrides how a trainer writes checkpoints and resumes from them.

    Transformers writes `trainer_state.json` last. A checkpoint is whole if this file can be read and all files that were written
    before it exist. (An interrupted deletion may leave this file, but not the others.) The previous checkpoint is kept until the new
    one is whole. While a checkpoint is written or deleted, a file marks it as unfinished. Only folders with this mark count as
    leftovers.
    """

    _loss_to_log: tuple[float, int] | None = None  # of a checkpoint: loss since the last log, and that step

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """
        Trains as [`~transformers.Trainer`] does, but `resume_from_checkpoint=True` takes the last whole checkpoint.

        It also deletes leftovers: checkpoints that a killed run did not finish writing or, with `save_total_limit`, deleting. Other
        folders are left alone.

        Args:
            resume_from_checkpoint (`str`, `Path` or `bool`, *optional*):
                Checkpoint, or `True` for the last whole one in `args.output_dir`.
            *args, **kwargs:
                As in [`~transformers.Trainer`].

        Raises:
            [`ValueError`]: If there is no whole checkpoint to resume from, or if a checkpoint would overwrite a folder that is no
                checkpoint.
        """
        checkpoint = resume_from_checkpoint or None
        if checkpoint is True:
            checkpoint = self._checkpoint_to_resume()
        folder = Path(self.args.output_dir)  # type: ignore[arg-type]
        patterns = (f"{PREFIX_CHECKPOINT_DIR}-*", "report", "*.safetensors")
        there = sorted(path.name for pattern in patterns for path in folder.glob(pattern))
        if there and checkpoint is None:
            logger.warning(
                f"`output_dir` {str(folder)!r} holds {', '.join(there[:4])} of another run. Files with the same name are overwritten. "
                "Pass `resume_from_checkpoint=True` to continue that run, or choose another directory."
            )
        self._check_folders(checkpoint and _step_of(Path(checkpoint)))
        if checkpoint is not None:
            checkpoint = str(checkpoint)
            self._check_checkpoint(Path(checkpoint))
        return super().train(checkpoint, *args, **kwargs)

    def _check_checkpoint(self, path: Path) -> None:
        """Raises or warns if the run cannot continue from a checkpoint as if it had not stopped."""
        args: Any = self.args
        if (path / TRAINER_STATE_NAME).exists() and not (path / STATE_FILE).exists():
            logger.warning(
                f"{str(path)!r} is from another trainer, or was saved with `save_only_model`: the run continues from it, but not as "
                "if it had not stopped."
            )
            return
        if not is_whole(path):
            raise ValueError(
                f"`resume_from_checkpoint` {str(path)!r} is no whole checkpoint: {TRAINER_STATE_NAME!r}, which is written last, or "
                f"a file that {STATE_FILE!r} lists is missing or broken. Pass an earlier checkpoint, or `True` for the last whole one "
                "in `output_dir`."
            )
        now, before = describe_run(self), json.loads((path / STATE_FILE).read_text()).get("run", {})
        for name in ("peft_config", "optim"):
            if name in before and before[name] != now[name]:
                raise ValueError(
                    f"`{name}` is {now[name]!r}, but {str(path)!r} was written with {before[name]!r}, so its weights or the state "
                    "of its optimizer do not fit. Set the same value, or start a new run with the checkpoint as `model`."
                )
        if args.beta and args.sync_ref_model:
            logger.warning(
                "Checkpoints do not contain the reference model (`sync_ref_model`), so it starts again from `model`."
            )

    def _get_train_sampler(self, *args, **kwargs):
        sampler = super()._get_train_sampler(*args, **kwargs)
        return ResumableSampler.like(sampler) if isinstance(sampler, RepeatSampler) else sampler

    def get_batch_samples(self, *args, **kwargs):
        """As in [`~transformers.Trainer`], except that resuming a finished run does not train for one more step."""
        if self._loss_to_log is not None:  # Transformers would start from a loss of 0 when it resumes
            loss, self._globalstep_last_logged = self._loss_to_log
            self._tr_loss += loss
            self._loss_to_log = None
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(*args, **kwargs)

    def _checkpoint_to_resume(self) -> str:
        folder = Path(self.args.output_dir)  # type: ignore[arg-type]
        last = last_whole_checkpoint(folder)
        folders = [path for path in sorted(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")) if path.is_dir()]
        others = [path for path in folders if _step_of(path) is None or not is_whole(path)]
        left_alone = [path.name for path in others if not _is_checkpoint(path)]
        leftovers = [path for path in others if _is_checkpoint(path) and (path / UNFINISHED).exists()]
        self.accelerator.wait_for_everyone()  # until all processes have read the folder
        if last is None:
            found = f" ({', '.join(path.name for path in others)}: not whole)" if others else ""
            raise ValueError(
                f"`resume_from_checkpoint` is True, but there is no whole checkpoint in `output_dir` {str(folder)!r}{found}. Start "
                "without `resume_from_checkpoint`, or pass the name of a checkpoint that was saved with `save_only_model`."
            )
        if self.is_world_process_zero():
            for path in leftovers:
                # A half-deleted checkpoint was changed last. `save_total_limit` would keep it, and delete a whole one instead.
                if _step_of(path) > _step_of(last) or self.args.save_total_limit:  # type: ignore[operator]
                    logger.warning(f"{str(path)!r} is deleted: it is not whole, since its run was killed meanwhile.")
                    _delete(path)
            if left_alone:
                logger.warning(
                    f"Left alone in {str(folder)!r}: {', '.join(left_alone)}. They are no whole checkpoints of this trainer, and no "
                    "leftovers of a killed run."
                )
        self.accelerator.wait_for_everyone()
        return str(last)

    def _check_folders(self, first: int | None) -> None:
        """Raises a [`ValueError`] if a checkpoint later than step `first` would overwrite a folder that is no checkpoint."""
        args: Any = self.args
        for path in sorted(Path(args.output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")):
            step = _step_of(path)
            if step is None or step <= (first or 0) or step > args.max_steps > 0 or args.save_strategy == "no":
                continue
            by_steps = args.save_strategy == "steps" and args.save_steps >= 1
            if by_steps and step % args.save_steps and step != args.max_steps:
                continue
            if not _is_checkpoint(path) and (path.is_file() or any(path.iterdir())):
                raise ValueError(
                    f"{str(path)!r} is no whole checkpoint, and that of step {step} would be written over it. "
                    "Rename this folder, or choose another `output_dir`."
                )
        self.accelerator.wait_for_everyone()  # until all processes have read the folder

    def _save_checkpoint(self, model, trial):
        run_dir = Path(self._get_output_dir(trial=trial))
        folder = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            if _is_checkpoint(folder):  # an old one, if the run resumed from an earlier checkpoint
                _delete(folder)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / UNFINISHED).touch()
        self.accelerator.wait_for_everyone()
        with self._deleting_nothing():
            super()._save_checkpoint(model, trial)
        if self.args.should_save:
            (folder / UNFINISHED).unlink()
            limit = self.args.save_total_limit or 0
            kept = {folder.name, Path(self.state.best_model_checkpoint or folder).name}
            others = self._older_checkpoints(run_dir, kept) if limit > 0 else []
            for path in others[: max(0, len(others) - max(limit - len(kept), 0))]:
                _delete(path)

    def _finalize_training(self, trial, *args, **kwargs):
        with self._deleting_nothing():
            output = super()._finalize_training(trial, *args, **kwargs)
        best = self.state.best_model_checkpoint
        if self.args.should_save and best is not None and self.args.save_total_limit == 1:
            for path in self._older_checkpoints(Path(self._get_output_dir(trial=trial)), {Path(best).name}):
                _delete(path)
        return output

    @contextmanager
    def _deleting_nothing(self) -> Iterator[None]:
        """Stops Transformers from deleting checkpoints. It would delete any folder whose name begins with `checkpoint-`."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            yield
        finally:
            self.args.save_total_limit = limit

    def _older_checkpoints(self, run_dir: Path, kept: set[str]) -> list[Path]:
        """Checkpoints that `save_total_limit` may delete, the oldest first."""
        paths = map(Path, sort_checkpoints(str(run_dir), use_mtime=True))
        return [path for path in paths if _is_checkpoint(path) and path.name not in kept]

    def _save_rng_state(self, output_dir: str) -> None:
        """Also writes this project's files. Transformers calls this method last before it writes `trainer_state.json`."""
        super()._save_rng_state(output_dir)
        trainer: Any = self
        folder = Path(output_dir)
        self._save_generation_batch(folder)
        self.accelerator.wait_for_everyone()  # the files of all processes must exist before they are listed
        if self.args.should_save:
            state = trainer.target_training.state()
            state["run"] = describe_run(trainer)
            state["files"] = sorted(
                path.relative_to(folder).as_posix()
                for path in folder.rglob("*")
                if path.is_file() and path.name not in NOT_NEEDED
            )
            if isinstance(trainer.train_dataset, IterableDataset):
                state["stream"] = self._place_in_stream()
            if trainer.use_adaptive_entropy:
                state["entropy"] = {"coef": trainer.entropy_coef, "last_world": trainer._last_world_entropy}
            (folder / STATE_FILE).write_text(json.dumps(state))

    def _save_generation_batch(self, folder: Path) -> None:
        trainer: Any = self
        is_over = trainer._step % (trainer.args.steps_per_generation * trainer.num_iterations) == 0
        parts = [] if is_over else trainer._buffered_inputs
        if any(isinstance(value, list) for part in parts for value in part.values()):
            logger.warning("A checkpoint cannot contain pictures, so a resumed run generates a new batch.")
            parts = []
        facts = {
            "step": trainer._step,
            "num_processes": self.accelerator.num_processes,
            "metrics": trainer._metrics["train"],  # values that the next log averages
            "loss": [self._tr_loss.item(), self._globalstep_last_logged],
            "parts": [[name for name, value in part.items() if value is None] for part in parts],
        }
        tensors = {
            f"{index}.{name}": value.detach().cpu().clone(memory_format=torch.contiguous_format)
            for index, part in enumerate(parts)
            for name, value in part.items()
            if value is not None
        }
        save_file(tensors, folder / BATCH_FILE.format(self.accelerator.process_index), {"facts": json.dumps(facts)})

    def _place_in_stream(self) -> dict[str, int]:
        """Number of finished passes over a streamed data set, and number of batches in the current pass."""
        epoch: float = self.state.epoch  # type: ignore[assignment]
        passes = math.ceil(epoch) - 1  # Transformers assumes that a pass has `max_steps` steps, and no pass has more
        num_batches = self.state.max_steps * self.args.gradient_accumulation_steps
        return {"passes": passes, "batches": round((epoch - passes) * num_batches)}

    def _init_training_state(self, max_steps, num_update_steps_per_epoch, num_train_epochs, checkpoint, trial):
        """As in [`~transformers.Trainer`], but for a streamed data set, takes the finished passes from the checkpoint."""
        start = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, checkpoint, trial
        )
        path = Path(checkpoint or "", STATE_FILE)
        if checkpoint is None or not isinstance(self.train_dataset, IterableDataset) or not path.exists():
            return start
        place = json.loads(path.read_text()).get("stream", {"passes": start[0], "batches": start[1]})
        return place["passes"], 0 if self.args.ignore_data_skip else place["batches"]

    def _load_optimizer_and_scheduler(self, checkpoint):
        path = Path(checkpoint or "", STATE_FILE)
        if checkpoint is None or not path.exists():
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        trainer: Any = self
        state = json.loads(path.read_text())
        changed = self._changes(state.get("run", {}))
        super()._load_optimizer_and_scheduler(checkpoint)
        if not any(name in MEASURED_WITH or name.startswith("target") for name in changed):
            trainer.target_training.load_state(state)
        if trainer.use_adaptive_entropy and "entropy" in state:  # TRL's own file may be missing: it is written last
            trainer.entropy_coef = state["entropy"]["coef"]
            trainer._last_world_entropy = state["entropy"]["last_world"]
        path = Path(checkpoint) / BATCH_FILE.format(self.accelerator.process_index)
        self._load_generation_batch(path, keep_parts=changed <= KEPT_BY_THE_OPTIMIZER)

    def _changes(self, before: dict[str, Any]) -> set[str]:
        """Names of the settings that differ from those of the checkpoint. Logs a warning about them."""
        now = describe_run(self)
        changed = [name for name in now if name in before and before[name] != now[name]]
        kept = [f"`{name}`" for name in changed if name in KEPT_BY_THE_OPTIMIZER]
        if changed and self.is_world_process_zero():
            values = "; ".join(f"`{name}` {before[name]!r}, now {now[name]!r}" for name in changed)
            logger.warning(
                f"The checkpoint was written with other settings: {values}. The run does not end as if it had not stopped."
                + (f" Its optimizer goes on with the checkpoint's {' and '.join(kept)}." if kept else "")
                + (" The generation batch is made anew, with the new settings." if len(changed) > len(kept) else "")
            )
        return set(changed)

    def _load_generation_batch(self, path: Path, keep_parts: bool) -> None:
        trainer: Any = self
        try:
            with safe_open(path, "pt") as file:
                facts = json.loads(file.metadata()["facts"])
                tensors = {name: file.get_tensor(name).to(self.args.device) for name in file.keys()}  # noqa: SIM118
        except (FileNotFoundError, SafetensorError):
            facts = {"num_processes": 0}
        if facts["num_processes"] != self.accelerator.num_processes:
            logger.warning("The checkpoint is of another number of processes, so the generation batch is made anew.")
            return
        trainer._metrics["train"].update(facts["metrics"])
        self._loss_to_log = tuple(facts["loss"])
        if not keep_parts:  # a new batch is generated, as in TRL, whose count of steps starts with it
            return
        trainer._step = facts["step"]
        if facts["parts"]:
            parts: list[dict[str, Any]] = [dict.fromkeys(names) for names in facts["parts"]]
            for name, tensor in tensors.items():
                index, key = name.split(".", 1)
                parts[int(index)][key] = tensor
            trainer._buffered_inputs = parts


class ResumableSampler(RepeatSampler):
    """
    TRL's sampler of prompts, with an order that does not depend on the step where a run was resumed. TRL's own sampler draws each
    epoch's order from a random generator, which a resumed run starts from its seed again.
    """

    @classmethod
    def like(cls, sampler: RepeatSampler) -> "ResumableSampler":
        """Makes a sampler with the settings of TRL's. Without an interruption, both give the same orders."""
        repeats = sampler.mini_repeat_count, sampler.batch_size, sampler.repeat_count
        return cls(sampler.data_source, *repeats, sampler.shuffle, sampler.seed)

    def set_epoch(self, epoch: int) -> None:
        """Sets the order of an epoch. Transformers and Accelerate make this call when an epoch begins."""
        if self.shuffle and self.seed is not None:
            self.generator.manual_seed(self.seed)
            for _ in range(epoch):
                torch.randperm(self.num_samples, generator=self.generator)


def describe_run(trainer: Any) -> dict[str, Any]:
    """Settings that must be the same in a run and its checkpoint, so that the run ends as if it had not stopped."""
    args = trainer.args
    own = {field.name for field in fields(args)} - {field.name for field in fields(TrainingArguments)}
    names = {name for name in own if not WITHOUT_EFFECT.fullmatch(name)} | KEPT_BY_THE_OPTIMIZER
    names |= {"per_device_train_batch_size", "gradient_accumulation_steps", "seed"}
    run = {name: value for name, value in args.to_dict().items() if name in names}
    run["optim"] = run["optim"].removesuffix("_fused")  # both have the same state
    model = trainer.accelerator.unwrap_model(trainer.model)
    run["model"], run["peft_config"] = describe_model(model)["name"], None
    if isinstance(model, PeftModel):
        config = model.peft_config[model.active_adapters[0]].to_dict()
        parts = ("peft_type", "r", "lora_alpha", "target_modules", "modules_to_save")
        run["peft_config"] = {name: config[name] for name in parts if config.get(name) is not None}
    run["target_model"] = describe_model(trainer.target_training.target_model)["name"]
    metric = description(trainer.metric)
    run["metric"] = f"{metric['name']} ({_digest(metric)})"
    if isinstance(trainer.train_dataset, Dataset):
        count = len(trainer.train_dataset)
        prompts = trainer.train_dataset.select(range(0, count, max(1, count // 100)))["prompt"]
        run["train_dataset"] = f"{count} prompts ({_digest(list(prompts))})"
    replay = trainer.target_training.replay
    if replay is not None:
        examples = [*replay.held_out, *replay.for_training]
        run["replay_dataset"] = f"{len(examples)} rows ({_digest(examples[:: max(1, len(examples) // 100)])})"
    plain = json.dumps(
        run, default=lambda value: sorted(value) if isinstance(value, set) else str(value), sort_keys=True
    )
    return json.loads(plain)


def _digest(value: Any) -> str:
    """A short hash of a value."""
    text = json.dumps(value, default=lambda part: type(part).__name__, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written completely, and no file of it was deleted."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
        files = json.loads((checkpoint / STATE_FILE).read_text())["files"]
    except (OSError, json.JSONDecodeError):
        return False
    return all((checkpoint / name).exists() for name in files)


def last_whole_checkpoint(output_dir: str | Path) -> Path | None:
    """The whole checkpoint of the highest step in a run's folder, or `None`. Changes nothing there."""
    paths = [path for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if _step_of(path) is not None]
    return max(filter(is_whole, paths), key=_step_of, default=None)  # type: ignore[arg-type]


def _is_checkpoint(path: Path) -> bool:
    """Whether a folder may be deleted or overwritten: it is a whole checkpoint, an unfinished one, or one without training state."""
    if _step_of(path) is None or path.is_symlink():
        return False
    if (path / UNFINISHED).exists() or is_whole(path):
        return True
    return (path / TRAINER_STATE_NAME).exists() and not (path / STATE_FILE).exists()  # of `save_only_model`


def _delete(checkpoint: Path) -> None:
    """Marks a checkpoint as unfinished, and deletes it, its mark last. As in Transformers, a failure does not end the run."""
    with suppress(OSError):  # the disk may be full
        (checkpoint / UNFINISHED).touch()
    try:
        for path in checkpoint.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != UNFINISHED:
                path.unlink()
        shutil.rmtree(checkpoint)
    except OSError as error:
        logger.warning(f"{str(checkpoint)!r} could not be deleted: {error}. Training goes on.")


def _step_of(path: Path) -> int | None:
    """The step in the name of a checkpoint. `None` for any other name."""
    match = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)
    return int(match[1]) if match else None
