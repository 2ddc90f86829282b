"""Pushes generators, and data sets that they write, from files to the Hub."""

import io
import json
import os
from fnmatch import fnmatch
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from datasets import Dataset
from huggingface_hub import CommitInfo, CommitOperationAdd
from transformers.utils import logging

from .cards import PICTURES, dataset_card
from .client import API, explained
from .facts import FACTS_FILE, public_name, read_facts


logger = logging.get_logger(__name__)

# Files of a generator's repository. No other file in a run's folder is pushed: `training_args.bin`, for example, is a pickle with
# local paths.
PUBLISHED = ["README.md", FACTS_FILE, *PICTURES, "config.json", "generation_config.json", "adapter_config.json"]
PUBLISHED += ["*.safetensors", "*.safetensors.index.json", "processor_config.json", "*preprocessor_config.json"]
PUBLISHED += ["tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model"]
PUBLISHED += ["*.tiktoken", "chat_template.*", "additional_chat_templates/*"]

UNFINISHED = "dpg_unfinished"  # an empty file in a checkpoint that is being written or deleted
NOT_NEEDED = {"training_args.bin", "README.md", UNFINISHED}  # files of a checkpoint that resuming does not need


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
    Pushes a trained generator from its folder, as `trainer.push_to_hub()` does, but without a trainer.

    Only the model or adapter, the tokenizer, the card, `dpg.json` and the pictures are pushed. Files that the Hub has already are
    not sent again, so an interrupted push goes on where it stopped.

    Args:
        folder (`str` or `PathLike`):
            The run's `output_dir`.
        repo_id (`str`):
            Repository, such as `"me/gpt2-qr"`. It is created if it does not exist.
        private (`bool`, *optional*):
            Whether a newly created repository is private. `None` means public, unless the organization's default is private.
        token (`str`, *optional*):
            Token with write permission. `None` means that of `hf auth login` or `HF_TOKEN`.
        revision (`str`, *optional*):
            Branch. `"main"` if `None`.
        commit_message (`str`, *optional*, defaults to `"Upload generator"`):
            Message of the commit.

    Raises:
        [`ValueError`]: If the folder holds no generator.
        [`RuntimeError`]: If the Hub cannot be reached, or if it refuses. The message says what to do.

    Example:

    ```python
    from trl_dpg.publishing import push_generator

    push_generator("runs/gpt2-qr", "me/gpt2-qr", private=True)
    ```
    """
    folder = Path(folder)
    _check_weights(folder, repo_id)
    with explained(repo_id, token, how_to_push_again(folder, repo_id)):
        repo_id = API.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    return push_folder(folder, repo_id, token=token, revision=revision, commit_message=commit_message)


def push_dataset(
    dataset: Dataset | str | PathLike[str],
    repo_id: str,
    *,
    generator: str,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload data set",
    **card: Any,
) -> CommitInfo:
    """
    Pushes a data set that a generator wrote, in one commit with a card that says what the data does to which model.

    Args:
        dataset ([`~datasets.Dataset`], `str` or `PathLike`):
            The data set, or a file of JSON lines.
        repo_id (`str`):
            Repository of the data set. It is created if it does not exist.
        generator (`str`):
            Id of the generator on the Hub, which the card links to, or its directory. The card takes its facts from its `dpg.json`.
        private (`bool`, *optional*):
            Whether a newly created repository is private.
        token (`str`, *optional*):
            Token with write permission. `None` means that of `hf auth login` or `HF_TOKEN`.
        commit_message (`str`, *optional*, defaults to `"Upload data set"`):
            Message of the commit.
        **card:
            Further arguments of [`~trl_dpg.publishing.dataset_card`]: `prompts` (their source), `generation` (settings), `license`
            and `tags`.

    Raises:
        [`ValueError`]: If the data set is empty, or if there is no such generator.
        [`RuntimeError`]: If the Hub cannot be reached, or if it refuses. The message says what to do.

    Example:

    ```python
    from trl_dpg.publishing import push_dataset

    push_dataset("data.jsonl", "me/gpt2-qr-data", generator="me/gpt2-qr", prompts="trl-lib/tldr")
    ```
    """
    where = "in memory" if isinstance(dataset, Dataset) else f"in {os.fspath(dataset)!r}"
    dataset = dataset if isinstance(dataset, Dataset) else _read_jsonl(Path(dataset))
    if len(dataset) == 0:
        raise ValueError(f"`dataset` is empty, so there is nothing to push to {repo_id!r}.")
    advice = f"The data set is unchanged {where}. Then call `push_dataset` again, with the same arguments."
    with explained(repo_id, token, advice):
        facts = read_facts(generator, "generator", token)
    if facts is None:
        logger.warning(f"{generator!r} has no {FACTS_FILE!r}: the data set's card does not say what it is for.")
    card |= {"generator": generator, "num_examples": len(dataset), "columns": dataset.column_names}
    make_card = partial(dataset_card, facts, **card)
    make_card(repo_id=repo_id)  # a card that cannot be made raises here, before a repository is created
    parquet = io.BytesIO()
    dataset.to_parquet(parquet)
    kind: dict[str, Any] = {"repo_type": "dataset", "token": token}
    with explained(repo_id, token, advice):
        repo_id = API.create_repo(repo_id, private=private, exist_ok=True, **kind).repo_id
        operations = [
            CommitOperationAdd("data/train-00000-of-00001.parquet", parquet.getvalue()),
            CommitOperationAdd("README.md", str(make_card(repo_id=repo_id)).encode()),
        ]
        return API.create_commit(repo_id, operations, commit_message=commit_message, **kind)


def _read_jsonl(path: Path) -> Dataset:
    """Reads a file of JSON lines. Unlike `Dataset.from_json`, errors name the line."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"Line {number} of {str(path)!r} is no JSON: {error}.") from None
            if not isinstance(rows[-1], dict):
                raise ValueError(f"Line {number} of {str(path)!r} must be a JSON object, got {line.strip()!r:.60}.")
    return Dataset.from_list(rows)


def _check_weights(folder: Path, repo_id: str) -> None:
    if not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{str(folder)!r} holds no weights (`*.safetensors`), so there is no generator to push to {repo_id!r}. Save one "
            "with `trainer.save_model()`; with FSDP, that needs `fsdp_state_dict_type: FULL_STATE_DICT`."
        )


def published_files(folder: Path) -> list[str]:
    """Paths of the files that may be published, relative to the folder."""
    patterns = list(PUBLISHED)
    config = folder / "config.json"
    if config.exists() and "auto_map" in json.loads(config.read_text(encoding="utf-8")):
        patterns.append("*.py")  # the model has code of its own
    found = [*folder.glob("*"), *folder.glob("additional_chat_templates/*")]
    names = [path.relative_to(folder).as_posix() for path in found if path.is_file()]
    return sorted(name for name in names if any(fnmatch(name, pattern) for pattern in patterns))


def _without_paths(path: Path) -> bytes | Path:
    """A file to upload. In JSON files with a local path, only the last part of this path is kept."""
    keys = {"adapter_config.json": "base_model_name_or_path", "trainer_state.json": "best_model_checkpoint"}
    if path.name not in keys:
        return path
    content = json.loads(path.read_text(encoding="utf-8"))
    content[keys[path.name]] = public_name(content.get(keys[path.name]) or "")[0]
    return json.dumps(content, indent=2).encode()


def push_folder(folder: Path, repo_id: str, **commit: Any) -> CommitInfo:
    """Pushes a generator. `commit` has `token`, `revision` and `commit_message`."""
    _check_weights(folder, repo_id)
    operations = [CommitOperationAdd(name, _without_paths(folder / name)) for name in published_files(folder)]
    with explained(repo_id, commit["token"], how_to_push_again(folder, repo_id)):
        return API.create_commit(repo_id, operations, **commit)


def push_checkpoint(checkpoint: Path, path_in_repo: str, repo_id: str, **commit: Any) -> CommitInfo:
    """Pushes the files of a checkpoint that resuming needs. `commit` is that of [`push_folder`]."""
    paths = [path for path in checkpoint.rglob("*") if path.is_file() and path.name not in NOT_NEEDED]
    names = [f"{path_in_repo}/{path.relative_to(checkpoint).as_posix()}" for path in paths]
    operations = [CommitOperationAdd(name, _without_paths(path)) for name, path in zip(names, paths, strict=True)]
    with explained(repo_id, commit["token"], f"{what_is_kept(checkpoint)} Training goes on."):
        return API.create_commit(repo_id, operations, **commit)


def what_is_kept(folder: Path) -> str:
    return f"Nothing on disk was lost: all saved files are in {str(folder)!r}."


def how_to_push_again(folder: Path, repo_id: str) -> str:
    return (
        f"{what_is_kept(folder)} Then push again, which sends only what the Hub does not have: `trainer.push_to_hub()`, or without the "
        f"trainer `trl_dpg.publishing.push_generator({str(folder)!r}, {repo_id!r})`."
    )
