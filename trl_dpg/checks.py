"""Errors and warnings about the trainer's arguments and prompts, raised before any model is loaded where possible."""

import copy
import math
from typing import Any

from datasets import Dataset, IterableDataset
from transformers.utils import logging

from .config import DatasetPolicyGradientConfig
from .metagradients import TargetTrainingArguments
from .metagradients.metric import as_metric
from .replay import check_replay


logger = logging.get_logger(__name__)

# TRL needs no prompts there, but puts this one in their place.
OF_AN_ENVIRONMENT = (
    "If an environment's `reset` writes the prompts, give each row the prompt [{'role': 'user', 'content': ''}]."
)


def check_arguments(model, target_model, metric, args, train_dataset, eval_dataset, replay_dataset) -> None:
    """Raises a [`ValueError`] if arguments of the trainer do not fit together."""
    if not isinstance(args, DatasetPolicyGradientConfig):
        raise ValueError(
            f"`args` must be a `DatasetPolicyGradientConfig`, got {type(args).__name__}. Use `DatasetPolicyGradientConfig` "
            "instead: it has all fields of `GRPOConfig`."
        )
    if target_model is None:
        raise ValueError(
            "`target_model` is missing. Pass the model that the generated data is to fine-tune, or the model's name."
        )
    if target_model is model and not isinstance(model, str):
        raise ValueError(
            "`target_model` and `model` are the same object, so training the generator would change the target. Load the "
            "target separately, or pass both by name."
        )
    as_metric(metric)
    check_replay(replay_dataset, args.replay_ratio)
    _check_train_dataset(args, train_dataset)
    evals = eval_dataset if isinstance(eval_dataset, dict) else {"eval_dataset": eval_dataset}
    if not evals:
        raise ValueError("`eval_dataset` is a dict without data sets. Pass at least one, or leave `eval_dataset` out.")
    for name, dataset in evals.items():
        check_prompts(name, dataset)


def _check_train_dataset(args: DatasetPolicyGradientConfig, dataset: Any) -> None:
    if not isinstance(dataset, (Dataset, IterableDataset)):
        remedy = (
            f"Pass one. {OF_AN_ENVIRONMENT}" if dataset is None else "Make one, for example by `Dataset.from_list`."
        )
        raise ValueError(
            "`train_dataset` must be a `datasets.Dataset` or `IterableDataset` of prompts, got "
            f"{type(dataset).__name__}. {remedy}"
        )
    check_prompts("train_dataset", dataset)
    if isinstance(dataset, IterableDataset):
        return
    if taken := {"prompts", "completions"} & set(dataset.column_names):
        raise ValueError(
            f"`train_dataset` has the columns {sorted(taken)}, names that TRL passes to rewards itself. Rename them."
        )
    needed = math.ceil(args.generation_batch_size / args.num_generations)  # type: ignore[operator]
    if len(dataset) < needed:
        raise ValueError(
            f"`train_dataset` has {len(dataset)} prompts, but one generation batch needs {needed} "
            f"(`generation_batch_size` {args.generation_batch_size} / `num_generations` {args.num_generations}), so "
            "TRL would train on nothing. Add prompts or lower `per_device_train_batch_size`."
        )


def check_prompts(name: str, dataset: Any) -> None:
    """Raises a [`ValueError`] for a data set without prompts, as far as this shows without reading a stream."""
    if not isinstance(dataset, (Dataset, IterableDataset)):
        return
    if dataset.column_names is not None and "prompt" not in dataset.column_names:
        remedy = OF_AN_ENVIRONMENT if "environment" in dataset.column_names else "Rename or add one."
        raise ValueError(f"`{name}` has the columns {dataset.column_names} but no `prompt`. {remedy}")
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError(f"`{name}` is empty. Pass at least one prompt.")


def check_prompt_texts(prompts: list[Any]) -> None:
    """Raises a [`ValueError`] for a value that is no prompt, before TRL tokenizes it."""
    for prompt in prompts:
        if not isinstance(prompt, (str, list)):
            raise ValueError(
                f"Column `prompt` holds {prompt!r}, which is neither a text nor a list of messages. Correct or remove the row."
            )


def check_prompt_lengths(prompts: list[Any], prompt_ids: list[list[int]], length: int, positions: int | None) -> None:
    """Raises a [`ValueError`] for prompts without tokens, or without room for `length` tokens of a completion."""
    for prompt, ids in zip(prompts, prompt_ids, strict=True):
        if not ids:
            raise ValueError(
                f"The prompt {prompt!r} has no tokens, so there is nothing to generate from. Put at least one token into "
                "column `prompt`, for example the tokenizer's BOS or EOS token."
            )
        if positions is not None and len(ids) + length > positions:
            raise ValueError(
                f"A prompt of {len(ids)} tokens and `max_completion_length` {length} do not fit into the {positions} "
                f"positions of the generator: {prompt!r:.80}. Remove or shorten the prompt, or lower `max_completion_length`."
            )


def warn_of_settings(args: DatasetPolicyGradientConfig, reference_texts: list[str] | None) -> None:
    """Warns of settings that have no effect, or that make learning hard."""
    num_prompts = args.generation_batch_size // args.num_generations  # type: ignore[operator]
    if num_prompts < 4:
        logger.warning_once(
            f"A generation batch has {num_prompts} prompts (`generation_batch_size` {args.generation_batch_size} / `num_generations` "
            f"{args.num_generations}). Credit is relative to the batch, so few prompts make it noisy. Raise "
            "`per_device_train_batch_size` or `steps_per_generation`, or lower `num_generations`."
        )
    num_examples = args.num_target_examples()
    if args.reward in ("metagradient", "naive") and (args.target_batch_size or 0) > num_examples:
        logger.warning_once(
            f"`target_batch_size` is {args.target_batch_size}, but a run of the target has {num_examples} examples, so each epoch "
            "is a single step. If you want this, leave `target_batch_size` out. If not, raise `per_device_train_batch_size`."
        )
    ignored = {
        "reward_language": args.reward_language if args.reward != "language_identification" else None,
        "reference_texts": reference_texts if args.reward not in ("embedding_similarity", "edit_distance") else None,
    }
    for name, value in ignored.items():
        if value is not None:
            logger.warning_once(
                f"`{name}` {value!r:.80} has no effect, as `reward` is {args.reward!r}, which does not use it. Leave `{name}` out, or "
                "set another `reward`."
            )


def warn_of_other_steps(recipe: TargetTrainingArguments, num_trained: int, num_examples: int) -> None:
    """Warns if validation fine-tunes the target for another number of steps than training."""
    trained, validated = recipe.num_steps(num_trained), recipe.num_steps(num_examples)
    if trained != validated:
        logger.warning_once(
            f"Validation fine-tunes the target for {validated} steps, but training for {trained}: `eval_dataset` times "
            f"`num_generations_eval` gives {num_examples} examples, a batch of training {num_trained}. Choose equal numbers, so "
            "that validation matches training."
        )


def with_best_metric_of_one_dataset(
    args: DatasetPolicyGradientConfig, eval_dataset: Any
) -> DatasetPolicyGradientConfig:
    """Makes `metric_for_best_model` that of the first evaluation set, since each of several sets has figures of its own."""
    name = args.metric_for_best_model
    if name is None or not isinstance(eval_dataset, dict) or not eval_dataset:
        return args
    name = name if name.startswith("eval_") else f"eval_{name}"
    if any(name.startswith(f"eval_{dataset}_") for dataset in eval_dataset):
        return args
    args = copy.copy(args)
    first = next(iter(eval_dataset))
    args.metric_for_best_model = f"eval_{first}_{name.removeprefix('eval_')}"
    logger.warning(
        f"`metric_for_best_model` is {args.metric_for_best_model!r}, that of the first evaluation set. To choose another set, use "
        f"'eval_NAME_{name.removeprefix('eval_')}'."
    )
    return args
