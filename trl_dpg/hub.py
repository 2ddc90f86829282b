"""Publishing on the Hub: generators and the data sets they write, with cards that say what the data does."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from concurrent.futures import Future
from fnmatch import fnmatch
from functools import cached_property, partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from huggingface_hub import CommitInfo, CommitOperationAdd, ModelCard
from huggingface_hub.errors import (
    HFValidationError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging
from transformers.utils.hub import PushInProgress

from .cards import PICTURES, TAGS, dataset_card, generator_card, main_readout
from .checkpoints import NOT_NEEDED
from .facts import describe_model, public_name, training_facts
from .hub_client import API, explained
from .plotting import plot_learning_curve, plot_pattern


if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object

logger = logging.get_logger(__name__)

FACTS_FILE = "dpg.json"  # beside a generator: what its cards, and those of data sets it writes, are made of

# What a generator's repository holds. Anything else in a run's folder stays at home: `training_args.bin`, for one, is a pickle
# with local paths.
PUBLISHED = [
    "README.md",
    FACTS_FILE,
    *PICTURES,
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template.*",
    "additional_chat_templates/*",
    "processor_config.json",
    "*preprocessor_config.json",
]


def push_generator(
    folder: str | PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload generator",
) -> CommitInfo:
    """
    Pushes a trained generator from its folder, as `trainer.push_to_hub()` does: also when the run is long over.

    Only the model or adapter, the tokenizer, the card, `dpg.json` and the pictures are pushed. Files that the Hub has are not
    sent again, so a push that was cut off goes on where it was.

    Args:
        folder (`str` or `PathLike`):
            The run's `output_dir`.
        repo_id (`str`):
            Repository, such as `"me/gpt2-qr"`; made if it does not exist.
        private (`bool`, *optional*):
            Whether to make the repository private when it is made. If `None`, it is public unless the organization's default is private.
        token (`str`, *optional*):
            Token with write permission. That of `hf auth login` or `HF_TOKEN` if `None`.
        revision (`str`, *optional*):
            Branch. `"main"` if `None`.
        commit_message (`str`, *optional*, defaults to `"Upload generator"`):
            Message of the commit.

    Returns:
        [`~huggingface_hub.CommitInfo`]: The commit.

    Raises:
        [`ValueError`]: If the folder holds no generator.
        [`RuntimeError`]: If the Hub cannot be reached, or refuses. The message says what to do.

    Example:

    ```python
    from trl_dpg.hub import push_generator

    push_generator("runs/gpt2-qr", "me/gpt2-qr", private=True)
    ```
    """
    _check_weights(Path(folder), repo_id)
    with explained(repo_id, token, _kept(folder), _again(folder, repo_id)):
        repo_id = API.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    return _upload(Path(folder), repo_id, token=token, revision=revision, commit_message=commit_message)


def push_dataset(
    dataset: Dataset | str | PathLike[str],
    repo_id: str,
    *,
    generator: str,
    private: bool | None = None,
    token: str | None = None,
    prompts: str | None = None,
    generation: dict[str, Any] | None = None,
    license: str | None = None,
    tags: Iterable[str] = (),
    commit_message: str = "Upload data set",
) -> CommitInfo:
    """
    Pushes a data set that a generator wrote, with a card that says what it does to which model.

    Args:
        dataset ([`~datasets.Dataset`], `str` or `PathLike`):
            The data set, or a file of JSON lines.
        repo_id (`str`):
            Repository of the data set; made if it does not exist.
        generator (`str`):
            Id of the generator on the Hub, which the card links to, or its directory. The card says what its `dpg.json` says.
        private (`bool`, *optional*):
            Whether to make the repository private when it is made.
        token (`str`, *optional*):
            Token with write permission. That of `hf auth login` or `HF_TOKEN` if `None`.
        prompts (`str`, *optional*):
            Where the prompts come from, see [`dataset_card`].
        generation (`dict[str, Any]`, *optional*):
            Generation settings, for the card.
        license (`str`, *optional*):
            License, as the Hub abbreviates it.
        tags (`Iterable[str]`, *optional*):
            Further tags.
        commit_message (`str`, *optional*, defaults to `"Upload data set"`):
            Message of the commit.

    Returns:
        [`~huggingface_hub.CommitInfo`]: The commit.

    Raises:
        [`ValueError`]: If the data set is empty, or if there is no such generator.
        [`RuntimeError`]: If the Hub cannot be reached, or refuses. The message says what to do.

    Example:

    ```python
    from trl_dpg.hub import push_dataset

    push_dataset("data.jsonl", "me/gpt2-qr-data", generator="me/gpt2-qr", prompts="trl-lib/tldr")
    ```
    """
    if isinstance(dataset, Dataset):
        kept = "The data set is unchanged in memory."
    else:
        kept = f"The data set is unchanged in {os.fspath(dataset)!r}."
        dataset = read_jsonl(dataset)
    if len(dataset) == 0:
        raise ValueError(f"`dataset` is empty, so there is nothing to push to {repo_id!r}.")
    again = "Then call `push_dataset` again, with the same arguments."
    facts = _read_facts(generator, repo_id, token, kept, again)
    make_card = partial(
        dataset_card,
        facts,
        generator=generator,
        num_examples=len(dataset),
        columns=dataset.column_names,
        prompts=prompts,
        generation=generation,
        license=license,
        tags=list(tags),
    )
    make_card(repo_id=repo_id)  # what cannot be said fails before there is a repository
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "train.parquet"
        dataset.to_parquet(path)
        with explained(repo_id, token, kept, again):
            repo_id = API.create_repo(
                repo_id, repo_type="dataset", private=private, token=token, exist_ok=True
            ).repo_id
        operations = [
            CommitOperationAdd("data/train-00000-of-00001.parquet", path),
            CommitOperationAdd("README.md", str(make_card(repo_id=repo_id)).encode()),
        ]
        with explained(repo_id, token, kept, again):
            return API.create_commit(
                repo_id, operations, repo_type="dataset", token=token, commit_message=commit_message
            )


def read_jsonl(path: str | PathLike[str]) -> Dataset:
    """
    Reads a file of JSON lines.

    Args:
        path (`str` or `PathLike`):
            The file.

    Returns:
        [`~datasets.Dataset`]: One row a line.

    Raises:
        [`ValueError`]: If a line is no JSON object.
    """
    rows = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"Line {number} of {os.fspath(path)!r} is no JSON: {error}.") from None
            if not isinstance(row, dict):
                raise ValueError(
                    f"Line {number} of {os.fspath(path)!r} must be a JSON object, got {line.strip()!r:.60}."
                )
            rows.append(row)
    return Dataset.from_list(rows)


def _read_facts(generator: str, repo_id: str, token: str | None, kept: str, again: str) -> dict[str, Any] | None:
    """The generator's `dpg.json`, from its directory (of a checkpoint, the run's) or the Hub."""
    found: Path | None = None
    is_missing = False
    if os.path.isdir(generator):
        found = local_facts(generator)
    else:
        with explained(repo_id, token, kept, again):
            try:
                found = Path(API.hf_hub_download(generator, FACTS_FILE, token=token))
            except RemoteEntryNotFoundError:
                pass
            except (RepositoryNotFoundError, HFValidationError):
                is_missing = True
    if is_missing:
        raise ValueError(
            f"`generator` {generator!r} is neither a directory nor a model on {API.endpoint} that this token may see. Push the "
            "generator first (`trainer.push_to_hub()`), or pass its directory."
        )
    if found is None:
        logger.warning(
            f"{generator!r} has no {FACTS_FILE!r}, so the data set's card does not say what it was trained for."
        )
        return None
    return json.loads(found.read_text(encoding="utf-8"))


def local_facts(generator: str | PathLike[str]) -> Path | None:
    """The `dpg.json` of a generator in a directory; of a checkpoint without one, that of its run."""
    paths = [Path(generator) / FACTS_FILE, Path(generator).absolute().parent / FACTS_FILE]
    return next((path for path in paths if path.exists()), None)


def _published_files(folder: Path) -> list[str]:
    """Paths in the folder of what may be published."""
    patterns = list(PUBLISHED)
    config = folder / "config.json"
    if config.exists() and "auto_map" in json.loads(config.read_text(encoding="utf-8")):
        patterns.append("*.py")  # a model with code of its own
    found = [*folder.glob("*"), *folder.glob("additional_chat_templates/*")]
    names = [path.relative_to(folder).as_posix() for path in found if path.is_file()]
    return sorted(name for name in names if any(fnmatch(name, pattern) for pattern in patterns))


def _check_weights(folder: Path, repo_id: str) -> None:
    if not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{str(folder)!r} holds no weights (`*.safetensors`), so there is no generator to push to {repo_id!r}. Save one "
            "with `trainer.save_model()`; with FSDP, that needs `fsdp_state_dict_type: FULL_STATE_DICT`."
        )


def _without_paths(path: Path) -> bytes | Path:
    """A file to upload: where it is JSON, without local paths."""
    if path.name == "adapter_config.json":
        config = json.loads(path.read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = public_name(config.get("base_model_name_or_path") or "")[0]
    elif path.name == "trainer_state.json":
        config = json.loads(path.read_text(encoding="utf-8"))
        config["best_model_checkpoint"] = public_name(config.get("best_model_checkpoint") or "")[0]
    else:
        return path
    return json.dumps(config, indent=2).encode()


def _upload(folder: Path, repo_id: str, *, token: str | None, revision: str | None, commit_message: str) -> CommitInfo:
    _check_weights(folder, repo_id)
    operations = [CommitOperationAdd(name, _without_paths(folder / name)) for name in _published_files(folder)]
    with explained(repo_id, token, _kept(folder), _again(folder, repo_id)):
        return API.create_commit(repo_id, operations, token=token, revision=revision, commit_message=commit_message)


def _upload_checkpoint(
    checkpoint: Path, path_in_repo: str, repo_id: str, *, token: str | None, revision: str | None, commit_message: str
) -> CommitInfo:
    """Pushes what training resumes from."""
    paths = [path for path in checkpoint.rglob("*") if path.is_file() and path.name not in NOT_NEEDED]
    operations = [
        CommitOperationAdd(f"{path_in_repo}/{path.relative_to(checkpoint).as_posix()}", _without_paths(path))
        for path in paths
    ]
    with explained(repo_id, token, _kept(checkpoint), "Training goes on."):
        return API.create_commit(repo_id, operations, token=token, revision=revision, commit_message=commit_message)


def _kept(folder: str | PathLike[str]) -> str:
    return f"Nothing on disk was lost: what was saved is in {os.fspath(folder)!r}."


def _again(folder: str | PathLike[str], repo_id: str) -> str:
    return (
        "Then push again, which sends only what the Hub does not have: `trainer.push_to_hub()`, or without the trainer "
        f"`trl_dpg.hub.push_generator({os.fspath(folder)!r}, {repo_id!r})`."
    )


class PublishingMixin(_Trainer):
    """What a trainer of generators does differently on the Hub: its card, what is pushed, and errors that help."""

    @cached_property
    def example_prompt(self) -> Any:
        """First training prompt, for the example on the card. Of what is no text, only the type is kept."""
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
        Writes the generator's card, `dpg.json` and pictures into `output_dir`, see [`~trl_dpg.hub.generator_card`]. Where
        they cannot be written, a warning says why, and training or a push goes on. A `README.md` that is no such card is left as it is.

        The example on the card is the first training prompt: set `trainer.example_prompt` to show another.

        Args:
            model_name (`str`, *optional*):
                Name of the generator.
            dataset_name (`str`, *optional*):
                Id of the data set that the prompts come from. Found out, where it was loaded from the Hub.
            tags (`str` or `list[str]`, *optional*):
                Further tags.
            license (`str`, *optional*):
                License. If `None`, that of an earlier card in `output_dir`, which `push_to_hub` asks the Hub for.
        """
        if self.is_world_process_zero():
            folder = self._folder
            self._write_card(folder, model_name, dataset_name, tags, license, keep_readme=_is_others_readme(folder))

    def _write_card(
        self,
        folder: Path,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        license: str | None = None,
        *,
        keep_readme: bool,
    ) -> None:
        """Writes card, facts and pictures into a folder. Where that fails, it says so: a card is not worth a run."""
        trainer: Any = self
        run, place = self._folder.resolve(), folder.resolve()
        is_inside = run in place.parents  # such as a checkpoint, which has the run's name, and no pictures
        try:
            folder.mkdir(parents=True, exist_ok=True)
            facts = training_facts(trainer)
            _write(folder / FACTS_FILE, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
            if keep_readme:
                logger.warning(
                    f"{str(folder / 'README.md')!r} is no card of a generator, so it is left as it is. For a card, remove it and "
                    "save again."
                )
                return
            pictures = []
            if not is_inside:
                readout = main_readout(facts)
                pictures = add_pictures(folder, run / "report", self.state.log_history, trainer.metric, readout)
            if license is None and (folder / "README.md").exists():
                license = ModelCard.load(folder / "README.md", ignore_metadata_errors=True).data.get("license")
            card = generator_card(
                facts,
                repo_id=self.hub_model_id
                or self.args.hub_model_id
                or model_name
                or (run if is_inside else place).name,
                license=license,
                datasets=[] if dataset_name is None or not public_name(dataset_name)[1] else [dataset_name],
                tags=[tags] if isinstance(tags, str) else tags or [],
                pictures=pictures,
            )
            _write(folder / "README.md", str(card))
        except Exception as error:
            logger.warning(
                f"The card of the generator in {str(folder)!r} could not be written: {type(error).__name__}: {error}. The "
                "generator itself is not affected."
            )

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        repo_id = self.args.hub_model_id or self._folder.absolute().name
        token = token or self.args.hub_token
        kept, again = _kept(self._folder), _again(self._folder, repo_id)
        if not any(self._folder.glob("*.safetensors")):
            kept, again = (
                "",
                "To train first, leave out `push_to_hub=True` and call `trainer.push_to_hub()` in the end.",
            )
        with explained(repo_id, token, kept, again):
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

        Unlike [`~transformers.Trainer`], nothing else in `output_dir` is pushed: `training_args.bin` is a pickle with local
        paths. A save that fails leaves what was saved before as it was.

        Args:
            commit_message (`str`, *optional*, defaults to `"End of training"`):
                Message of the commit.
            blocking (`bool`, *optional*, defaults to `True`):
                Whether to wait until the push is done.
            token (`str`, *optional*):
                Token with write permission. Defaults to `args.hub_token`.
            revision (`str`, *optional*):
                Branch. Defaults to `args.hub_revision`.
            private (`bool`, *optional*):
                Whether to make the repository private when it is made. Defaults to `args.hub_private_repo`.
            **kwargs:
                Arguments of [`~DatasetPolicyGradientTrainer.create_model_card`].

        Returns:
            [`~huggingface_hub.CommitInfo`], or a `Future` of one if `blocking=False`.

        Raises:
            [`RuntimeError`]: If the generator cannot be saved, or the Hub refuses or cannot be reached. The message says
                what to do, and what is still on disk.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        folder = self._folder
        token = token or self.args.hub_token
        self._save_aside(folder)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        if not self.is_world_process_zero():
            return None
        repo_id: str = self.hub_model_id  # type: ignore[assignment]
        if "license" not in kwargs:
            kwargs["license"] = _license_of(describe_model(self.accelerator.unwrap_model(self.model)))
        self.create_model_card(**kwargs)
        self._finish_current_push()
        upload = partial(
            _upload,
            folder,
            repo_id,
            token=token,
            revision=revision or self.args.hub_revision,
            commit_message=commit_message or "End of training",
        )
        return upload() if blocking else API.run_as_future(upload)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        args: Any = self.args
        folder = Path(output_dir if output_dir is not None else args.output_dir)
        others = _is_others_readme(folder)  # before PEFT writes one
        self.args = args.without_tokens()  # what Transformers pickles there, as `training_args.bin`
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.args = args
        if args.should_save:
            self._write_card(folder, keep_readme=others)

    def _save_aside(self, folder: Path) -> None:
        """Saves the generator beside what was saved before, and in its place only when all of it is written."""
        aside = folder / "_saving"
        try:
            if self.args.should_save:
                shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed
                aside.mkdir(parents=True)
            self.save_model(str(aside), _internal_call=True)
            if self.args.should_save:
                (aside / "README.md").unlink(missing_ok=True)  # the card comes with the push
                for path in aside.iterdir():
                    if (folder / path.name).is_dir():
                        shutil.rmtree(folder / path.name)
                    os.replace(path, folder / path.name)
        except (OSError, SafetensorError) as error:
            raise RuntimeError(
                f"The generator could not be saved in {str(folder)!r}, so it was not pushed: {error}. Until all of "
                f"it is written, that takes room for a second copy: free space there (or raise the quota), then call `trainer.push_to_hub()` again. {_kept(folder)}"
            ) from error
        finally:
            if self.args.should_save:
                shutil.rmtree(aside, ignore_errors=True)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        in_progress = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if in_progress and not self.args.hub_always_push:
            return
        self._warn_of_failed_pushes()
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        folder, checkpoint = self._folder, Path(checkpoint_folder)
        try:
            # the checkpoint may be deleted before it is uploaded
            _copy([checkpoint / name for name in _published_files(checkpoint) if name != "README.md"], folder)
        except OSError as error:
            logger.warning(
                f"Step {self.state.global_step} was not pushed to {self.hub_model_id!r}: {error}. Training goes on."
            )
            return
        message = f"Training in progress, step {self.state.global_step}"
        where: dict[str, Any] = {"token": self.args.hub_token, "revision": self.args.hub_revision}
        repo_id: str = self.hub_model_id  # type: ignore[assignment]
        jobs: list[Future] = [API.run_as_future(_upload, folder, repo_id, commit_message=message, **where)]
        if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            last = self.args.hub_strategy == HubStrategy.CHECKPOINT
            path_in_repo = "last-checkpoint" if last else checkpoint.name
            jobs.append(
                API.run_as_future(
                    _upload_checkpoint,
                    checkpoint,
                    path_in_repo,
                    repo_id,
                    commit_message=f"{message}, checkpoint",
                    **where,
                )
            )
        if in_progress:
            self.push_in_progress.jobs.extend(jobs)  # type: ignore[attr-defined]
        else:
            self.push_in_progress = PushInProgress(jobs)  # type: ignore

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        self._warn_of_failed_pushes()

    def _warn_of_failed_pushes(self) -> None:
        """Pushes in the background would otherwise fail without a word."""
        push: Any = (
            self.push_in_progress if self.hub_model_id is not None else None
        )  # there is one from `init_hf_repo` on
        for job in [job for job in (push.jobs if push is not None else []) if job.done()]:
            push.jobs.remove(job)
            if job.exception() is not None:
                logger.warning(f"A push during training failed; training is not affected. {job.exception()}")


def _license_of(model: dict[str, Any]) -> str | None:
    """The license that a base model's card names, where the Hub can be asked."""
    if not model["on_hub"]:
        return None
    try:
        card = API.model_info(model["name"], timeout=10).card_data
    except Exception as error:  # a license is not worth a failed push
        logger.info(f"The license of {model['name']!r} is left out of the card: {error}")
        return None
    return card.get("license") if card is not None else None


def add_pictures(folder: Path, report: Path, history: list[dict[str, Any]], metric: Any, readout: str) -> list[str]:
    """
    Puts a run's pictures beside its card: those of its report, or else drawn here.

    Args:
        folder (`Path`):
            Folder of the card.
        report (`Path`):
            The run's report, where there is one.
        history (`list[dict]`):
            `trainer.state.log_history`.
        metric (`Callable`):
            Metric of the run. What an [`~trl_dpg.metrics.LMHeadPattern`] decoded last is drawn, too.
        readout (`str`):
            Read-out that the curve shows.

    Returns:
        `list[str]`: Names of the pictures.
    """
    for name in ("curve.png", "pattern.gif"):
        if (report / name).exists():
            _copy([report / name], folder)
    if not (report / "curve.png").exists() and any("loss" in row or "eval_metric" in row for row in history):
        plot_learning_curve(history, folder / "curve.png", readout)
    steps, picture = sorted(report.glob("patterns/step-*.png")), metric.picture()
    if steps:
        shutil.copyfile(steps[-1], folder / "pattern.png")
    elif picture is not None:
        plot_pattern(picture[0], picture[1], folder / "pattern.png")
    return [name for name in PICTURES if (folder / name).exists()]


def _is_others_readme(folder: Path) -> bool:
    """Whether the folder has a `README.md` that is no card of ours."""
    path = folder / "README.md"
    return path.is_file() and TAGS[-1] not in path.read_text(encoding="utf-8", errors="replace")


def _write(path: Path, text: str) -> None:
    """Writes a file as a whole, or not at all."""
    aside = path.with_name(f"_{path.name}")
    try:
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _copy(paths: Iterable[Path], folder: Path) -> None:
    """Copies files so that each is replaced as a whole, or not at all: an upload may still be reading the old one."""
    for path in paths:
        aside = folder / f"_{path.name}"
        try:
            shutil.copyfile(path, aside)
            os.replace(aside, folder / path.name)
        finally:
            aside.unlink(missing_ok=True)
