"""Checkpoints that are whole or not there, and hold all that a run needs to go on as if it had not stopped."""

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging
from trl.trainer.utils import RepeatSampler


if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object

logger = logging.get_logger(__name__)

STATE_FILE = "dpg_state.json"  # what `"auto"` settings were measured to be, and what else the reward carries on
BATCH_FILE = (
    "generation_batch_{}.safetensors"  # of each process: what is left to train on of the last generation batch
)


class ResumingMixin(_Trainer):
    """
    What a trainer of generators does differently with checkpoints.

    Transformers writes `trainer_state.json` last, before it deletes older checkpoints: one that has it, and where it can be read, is
    whole. Until then the checkpoint before is there.
    """

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """
        As of [`~transformers.Trainer`], but `resume_from_checkpoint=True` takes the last checkpoint that is whole, and deletes
        those after it that a run was killed over.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                Checkpoint, or `True` for the last one in `args.output_dir`.
            *args, **kwargs:
                As of [`~transformers.Trainer`].

        Raises:
            [`ValueError`]: If there is no whole checkpoint to resume from.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self._last_whole_checkpoint()
        elif isinstance(resume_from_checkpoint, str) and not is_whole(Path(resume_from_checkpoint)):
            raise ValueError(
                f"`resume_from_checkpoint` {resume_from_checkpoint!r} is no whole checkpoint: {TRAINER_STATE_NAME!r}, which is written "
                "last, is missing or broken. Give an earlier one, or `True` for the last whole one in `output_dir`."
            )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _get_train_sampler(self, *args, **kwargs):
        sampler = super()._get_train_sampler(*args, **kwargs)
        return ResumableSampler.like(sampler) if isinstance(sampler, RepeatSampler) else sampler

    def _last_whole_checkpoint(self) -> str:
        folder = Path(self.args.output_dir)  # type: ignore[arg-type]
        paths = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if re.fullmatch(r".*-\d+", path.name)]
        paths.sort(key=lambda path: int(path.name.rsplit("-", 1)[1]))
        broken = []
        while paths and not is_whole(paths[-1]):
            broken.append(paths.pop())
        self.accelerator.wait_for_everyone()  # all have looked
        if not paths:
            found = f" ({', '.join(path.name for path in broken)}: not whole)" if broken else ""
            raise ValueError(
                f"`resume_from_checkpoint` is True, but there is no whole checkpoint in `output_dir` {str(folder)!r}{found}. Start "
                "without it."
            )
        if self.is_world_process_zero():
            for path in broken:
                logger.warning(f"{str(path)!r} was being written when its run was killed, and is deleted.")
                shutil.rmtree(path)
        self.accelerator.wait_for_everyone()
        return str(paths[-1])

    def _save_checkpoint(self, model, trial):
        if self.args.should_save:  # of a run that went on from an earlier checkpoint
            folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        """The last that Transformers writes before `trainer_state.json`."""
        super()._save_rng_state(output_dir)
        trainer: Any = self
        if self.args.should_save:
            state = {**trainer.target_training.state(), "generator": {"entropy_coef": trainer.entropy_coef}}
            if trainer.use_adaptive_entropy:
                state["generator"]["last_world_entropy"] = trainer._last_world_entropy
            (Path(output_dir) / STATE_FILE).write_text(json.dumps(state))
        self._save_generation_batch(Path(output_dir))
        self.accelerator.wait_for_everyone()  # every process's files are there before the checkpoint counts as whole

    def _save_generation_batch(self, folder: Path) -> None:
        trainer: Any = self
        facts = {
            "step": trainer._step,
            "num_processes": self.accelerator.num_processes,
            "metrics": trainer._metrics["train"],  # those that the next log is the mean of
            "parts": [],
        }
        tensors = {}
        if trainer._step % (trainer.args.steps_per_generation * trainer.num_iterations) != 0:
            for index, part in enumerate(trainer._buffered_inputs):
                facts["parts"].append([name for name, value in part.items() if value is None])
                for name, value in part.items():
                    if isinstance(value, torch.Tensor):
                        tensors[f"{index}.{name}"] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
                    elif value is not None:  # pictures
                        logger.warning(f"{name!r} cannot be kept in a checkpoint, so a resumed run generates anew.")
                        facts["parts"], tensors = [], {}
                        break
                else:
                    continue
                break
        save_file(tensors, folder / BATCH_FILE.format(self.accelerator.process_index), {"facts": json.dumps(facts)})

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not (Path(checkpoint) / STATE_FILE).exists():
            return
        trainer: Any = self
        state = json.loads((Path(checkpoint) / STATE_FILE).read_text())
        trainer.target_training.load_state(state)
        if trainer.use_adaptive_entropy and "last_world_entropy" in state["generator"]:
            trainer.entropy_coef = state["generator"]["entropy_coef"]
            trainer._last_world_entropy = state["generator"]["last_world_entropy"]
        self._load_generation_batch(Path(checkpoint) / BATCH_FILE.format(self.accelerator.process_index))

    def _load_generation_batch(self, path: Path) -> None:
        trainer: Any = self
        try:
            with safe_open(path, "pt", device=str(self.args.device)) as file:
                facts = json.loads(file.metadata()["facts"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (FileNotFoundError, SafetensorError):
            facts = {"num_processes": 0}
        if facts["num_processes"] != self.accelerator.num_processes:
            logger.warning("The checkpoint is of another number of processes, so the generation batch is made anew.")
            return
        trainer._step = facts["step"]
        trainer._metrics["train"].update(facts["metrics"])
        if facts["parts"]:
            parts: list[dict[str, Any]] = [dict.fromkeys(names) for names in facts["parts"]]
            for name, tensor in tensors.items():
                index, key = name.split(".", 1)
                parts[int(index)][key] = tensor
            trainer._buffered_inputs = parts


class ResumableSampler(RepeatSampler):
    """
    TRL's sampler of prompts, whose order in an epoch does not depend on where the run began: TRL's own draws the next order from
    a generator that a resumed run starts anew.
    """

    @classmethod
    def like(cls, sampler: RepeatSampler) -> "ResumableSampler":
        """The same as TRL's, in the first epoch and, in a run that is not interrupted, in the others."""
        repeats = sampler.mini_repeat_count, sampler.batch_size, sampler.repeat_count
        return cls(sampler.data_source, *repeats, sampler.shuffle, sampler.seed)

    def set_epoch(self, epoch: int) -> None:
        """Called by Transformers and Accelerate as an epoch begins."""
        if self.shuffle and self.seed is not None:
            self.generator.manual_seed(self.seed)
            for _ in range(epoch):
                torch.randperm(self.num_samples, generator=self.generator)


def is_whole(checkpoint: Path) -> bool:
    """Whether all of a checkpoint was written."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
    except (OSError, json.JSONDecodeError):
        return False
    return True
