"""The trainer's methods that save a generator and push it to the Hub."""

import json
import os
import shutil
from concurrent.futures import Future
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging
from transformers.utils.hub import PushInProgress

from .cards import replace, write_card
from .client import API, explained
from .facts import describe_model
from .push import how_to_push_again, published_files, push_checkpoint, push_folder, what_is_kept


if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object

logger = logging.get_logger(__name__)


class PublishingMixin(_Trainer):
    """Overrides how a trainer writes model cards, saves the generator and pushes it to the Hub."""

    push_in_progress: Any = None  # `PushInProgress`, from the first push on

    @cached_property
    def example_prompt(self) -> Any:
        """The first training prompt, for the example on the card. Parts that are not JSON, such as images, become their type's name."""
        prompt = next(iter(self.train_dataset))["prompt"]  # type: ignore[arg-type, index]
        return json.loads(json.dumps(prompt, default=lambda value: f"<{type(value).__name__}>"))

    @property
    def _folder(self) -> Path:
        return Path(self.args.output_dir)  # type: ignore[arg-type]

    def create_model_card(  # type: ignore[override]
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        license: str | None = None,
    ) -> None:
        """
        Writes the generator's card, `dpg.json` and pictures into `output_dir`, see [`~trl_dpg.publishing.generator_card`]. If they
        cannot be written, a warning says why, and training or a push goes on. An existing `README.md` stays as it is, unless it is
        such a card.

        The example on the card is the first training prompt. Set `trainer.example_prompt` to show another.

        Args:
            model_name (`str`, *optional*):
                Name of the generator.
            dataset_name (`str`, *optional*):
                Id of the data set that the prompts come from. It is found automatically if it was loaded from the Hub.
            tags (`str` or `list[str]`, *optional*):
                Further tags.
            license (`str`, *optional*):
                License. If `None`, that of an earlier card in `output_dir`. `push_to_hub` takes that of the base model's card.
        """
        if self.is_world_process_zero():
            tags = [tags] if isinstance(tags, str) else tags or []
            write_card(self, self._folder, model_name, dataset_name, tags, license)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        repo_id = self.args.hub_model_id or self._folder.absolute().name
        advice = "To train first, leave out `push_to_hub=True` and call `trainer.push_to_hub()` in the end."
        if any(self._folder.glob("*.safetensors")):
            advice = how_to_push_again(self._folder, repo_id)
        with explained(repo_id, token or self.args.hub_token, advice):
            super().init_hf_repo(token=token, private=private)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ) -> Any:
        """
        Saves the generator and pushes it, with its card, `dpg.json` and pictures, to `args.hub_model_id`.

        Arguments are those of [`~transformers.Trainer.push_to_hub`], and `**kwargs` those of
        [`~DatasetPolicyGradientTrainer.create_model_card`]. Nothing else in `output_dir` is pushed: `training_args.bin`, for example,
        is a pickle with local paths. If the save fails, files from earlier saves stay as they were.

        Returns:
            [`~huggingface_hub.CommitInfo`], or a `Future` of one if `blocking=False`.

        Raises:
            [`RuntimeError`]: If the generator cannot be saved, or if the Hub refuses or cannot be reached. The message says
                what to do, and what is saved on disk.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token or self.args.hub_token
        try:
            self.save_model(_internal_call=True)
        except (OSError, SafetensorError) as error:
            raise RuntimeError(
                f"The generator could not be saved in {str(self._folder)!r}, so it was not pushed: {error}. Saving needs room "
                "for a second copy, until all of it is written: free space there (or raise the quota), then call "
                f"`trainer.push_to_hub()` again. {what_is_kept(self._folder)}"
            ) from error
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        if not self.is_world_process_zero():
            return None
        if "license" not in kwargs:
            kwargs["license"] = _license_of(describe_model(self.accelerator.unwrap_model(self.model)))
        self.create_model_card(**kwargs)
        self._finish_current_push()
        commit = {"token": token, "revision": revision or self.args.hub_revision}
        commit["commit_message"] = commit_message or "End of training"
        push = partial(push_folder, self._folder, self.hub_model_id, **commit)  # type: ignore[arg-type]
        return push() if blocking else API.run_as_future(push)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Saves the generator in a subfolder, moves it into place when all of it is written, and then writes its card."""
        args: Any = self.args
        folder = Path(output_dir if output_dir is not None else args.output_dir)
        aside = folder / "_saving"
        if args.should_save:
            shutil.rmtree(aside, ignore_errors=True)  # left by a run that was killed
            aside.mkdir(parents=True)
        self.args = args.without_tokens()  # Transformers pickles the arguments as `training_args.bin`
        try:
            super()._save(str(aside), state_dict)
            if args.should_save:
                (aside / "README.md").unlink(missing_ok=True)  # PEFT's own card
                for path in aside.iterdir():
                    if (folder / path.name).is_dir():
                        shutil.rmtree(folder / path.name)
                    os.replace(path, folder / path.name)
        finally:
            self.args = args
            if args.should_save:
                shutil.rmtree(aside, ignore_errors=True)
        if args.should_save:
            write_card(self, folder)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        running = self._running_pushes()
        if running and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        repo_id: str = self.hub_model_id  # type: ignore[assignment]
        checkpoint = Path(checkpoint_folder)
        try:  # the checkpoint may be deleted before it is uploaded
            for name in published_files(checkpoint):
                if name != "README.md":
                    replace(self._folder / name, checkpoint / name)
        except OSError as error:
            logger.warning(f"Step {self.state.global_step} was not pushed to {repo_id!r}: {error}. Training goes on.")
            return
        message = f"Training in progress, step {self.state.global_step}"
        where = {"token": self.args.hub_token, "revision": self.args.hub_revision}
        jobs: list[Future] = [API.run_as_future(push_folder, self._folder, repo_id, commit_message=message, **where)]
        if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            is_last = self.args.hub_strategy == HubStrategy.CHECKPOINT
            place = checkpoint, "last-checkpoint" if is_last else checkpoint.name, repo_id
            where["commit_message"] = f"{message}, checkpoint"
            jobs.append(API.run_as_future(push_checkpoint, *place, **where))
        self.push_in_progress = PushInProgress([*running, *jobs])  # type: ignore[arg-type]

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        self._running_pushes()

    def _running_pushes(self) -> list[Future]:
        """Pushes that are under way. Logs a warning for each push that failed, which would otherwise go unnoticed."""
        jobs = self.push_in_progress.jobs if self.push_in_progress is not None else []
        for job in [job for job in jobs if job.done()]:
            jobs.remove(job)
            if job.exception() is not None:
                logger.warning(f"A push during training failed; training is not affected. {job.exception()}")
        return jobs


def _license_of(model: dict[str, Any]) -> str | None:
    """The license on a base model's card, or `None` if the Hub cannot be asked."""
    if not model["on_hub"]:
        return None
    try:
        card = API.model_info(model["name"], timeout=10).card_data
    except Exception as error:  # a missing license must not make a push fail
        logger.info(f"The license of {model['name']!r} is left out of the card: {error}")
        return None
    return card.get("license") if card is not None else None
