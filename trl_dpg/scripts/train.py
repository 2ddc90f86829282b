"""
Trains a generator with Dataset Policy Gradients.

    trl-dpg train --config dpg.yaml
    accelerate launch -m trl_dpg.scripts.train --config dpg.yaml

Every field of [`DPGScriptArguments`], [`DatasetPolicyGradientConfig`] and TRL's `ModelConfig` is a flag, and may stand in the
YAML file. A file for `trl grpo` also works.
"""

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from accelerate.commands.launch import launch_command_parser
from transformers import AutoConfig, TrainerCallback
from trl import DatasetMixtureConfig, ModelConfig, get_dataset, get_peft_config, get_quantization_config
from trl.cli.accelerate_config import resolve_accelerate_config_argument
from trl.scripts.grpo import GRPOScriptArguments

from ..checkpoints import last_whole_checkpoint
from ..config import DatasetPolicyGradientConfig
from ..console import SummaryCallback, summary
from ..metrics import evaluate_texts
from ..reporting import write_report
from ..target import adapter_config
from ..trainer import DatasetPolicyGradientTrainer
from .common import (
    MetricArguments,
    Parser,
    at_least_one,
    checkpoint_to_resume,
    load_callable,
    load_rows,
    load_splits,
    loading,
    option,
    run_script,
    take_split,
)


@dataclass
class DPGScriptArguments(MetricArguments, GRPOScriptArguments):
    """
    Arguments of the training script, added to those of TRL's GRPO script and [`MetricArguments`]. `reward_funcs` of TRL (names in
    `trl.rewards`, or dotted import paths) are further rewards.
    """

    target_model_name_or_path: str | None = option(
        None, "Target: id or directory of a model or of an adapter, with its tokenizer."
    )
    eval_dataset_name: str | None = option(
        None,
        "Held-out prompts, a file or a data set's id. By default the split `dataset_test_split` of `dataset_name`, "
        "if there is one.",
    )
    eval_dataset_config: str | None = option(None, "Configuration of `eval_dataset_name`.")
    num_eval_prompts: int | None = option(None, "Held-out prompts to use, from the first. All by default.")
    evaluation_language: str | None = option(
        None, "Language to look for in validation's texts, as a code such as 'es'."
    )
    evaluation_reference: str | None = option(
        None, "String to look for in generated texts during validation, such as a UUID."
    )
    validation_draws: int = option(1, "Validations after training, and before it with `eval_on_start`.")
    reference_texts: list[str] | None = option(None, "Texts that rewards of similarity compare completions to.")
    replay_dataset_name: str | None = option(
        None, "Real data to mix into every run of the target: a file or a data set's id."
    )
    replay_dataset_config: str | None = option(None, "Configuration of `replay_dataset_name`.")
    replay_dataset_split: str = option("train", "Split of `replay_dataset_name`.")

    def __post_init__(self):
        super().__post_init__()
        at_least_one(self, "validation_draws")


DESCRIPTION = """Trains a generator of data for a target. A flag's default is in brackets. `--help-all` also shows the flags of
GRPOConfig and TrainingArguments. Accelerate's flags (`--num_processes`, `--config_file`) are accepted, too."""

GROUPS = {
    "metric (the goal for the fine-tuned target)": [field.name for field in dataclasses.fields(MetricArguments)],
    "target (and how it is fine-tuned)": [
        field.name
        for arguments in (DPGScriptArguments, DatasetPolicyGradientConfig)
        for field in dataclasses.fields(arguments)
        if field.name.startswith("target_")
    ],
    "credit (which tokens earned the reward)": ["credit_assignment", "credit_discount", "credit_candidates"],
    "reward": "reward cross_group_batching nonfinite reward_language scale_rewards reference_texts reward_funcs".split(),
    "generator": "model_name_or_path use_peft learning_rate lr_scheduler_type max_steps per_device_train_batch_size "
    "num_generations max_completion_length temperature entropy_coef use_vllm use_cpu seed".split(),
    "data": "dataset_name dataset_config dataset_train_split dataset_test_split eval_dataset_name eval_dataset_config "
    "num_eval_prompts evaluation_language evaluation_reference validation_draws replay_dataset_name replay_dataset_config "
    "replay_dataset_split replay_ratio".split(),
    "output": "output_dir logging_steps eval_strategy eval_steps eval_on_start save_steps resume_from_checkpoint "
    "report_to save_generated push_to_hub hub_model_id disable_tqdm".split(),
}


def parse(argv: list[str] | None = None) -> tuple[Any, list[str]]:
    """
    Parses the command line and its YAML file.

    Returns:
        `tuple`: The four sets of arguments, and the flags for `accelerate launch` (`--num_processes`, `--config_file`, ...). As with
        the `trl` command, `--accelerate_config` works too.

    Raises:
        [`ValueError`]: If an argument is unknown, missing or out of its range.
    """
    kinds: Any = (DPGScriptArguments, DatasetPolicyGradientConfig, ModelConfig, DatasetMixtureConfig)
    parser = Parser(kinds, prog="trl-dpg train", description=DESCRIPTION, groups=GROUPS)
    launcher = launch_command_parser()
    launcher.error = parser.error  # type: ignore[method-assign]

    def check_rest(rest: list[str], where: str = "") -> None:
        known, unknown = launcher.parse_known_args([*resolve_accelerate_config_argument(rest), "script"])
        if known.training_script != "script":  # a word without a flag
            unknown.append(known.training_script)
        remedy = ", `accelerate launch --help` those about processes and devices"
        parser.refuse(unknown, where, launcher._option_string_actions, remedy)

    *parsed, rest = parser.parse_args_and_config(argv, check_rest=check_rest)
    launch_args = resolve_accelerate_config_argument(rest)
    check_arguments(*parsed)
    return parsed, launch_args


def check_arguments(script_args: Any, training_args: Any, model_args: Any, mixture: Any) -> None:
    """Raises a [`ValueError`] if an argument is missing or names nothing. This check comes before anything is loaded."""
    names = {
        "model_name_or_path": model_args.model_name_or_path,
        "target_model_name_or_path": script_args.target_model_name_or_path,
    }
    for name, value in {**names, "dataset_name": script_args.dataset_name or mixture.datasets or None}.items():
        if value is None:
            raise ValueError(f"`{name}` is missing. Pass `--{name}`, or set it in the file of `--config`.")
    for name, value in names.items():
        with loading(value, name):
            # An adapter has no configuration of a model.
            if name == "model_name_or_path" or adapter_config(value) is None:
                AutoConfig.from_pretrained(value, trust_remote_code=training_args.trust_remote_code)
    for name in script_args.reward_funcs or []:
        load_reward(name)
    training_args.resume_from_checkpoint = checkpoint_to_resume(training_args.resume_from_checkpoint)
    if training_args.resume_from_checkpoint is True and last_whole_checkpoint(training_args.output_dir) is None:
        raise ValueError(
            f"`resume_from_checkpoint` is True, but there is no whole checkpoint in `output_dir` {training_args.output_dir!r}. Start "
            "without `resume_from_checkpoint`, or correct the folder."
        )


def load_reward(name: str) -> Callable:
    """Loads a further reward from a name in `trl.rewards`, or from a dotted import path."""
    reward = load_callable(name if "." in name else f"trl.rewards.{name}", ".", "reward_funcs")
    if name == "get_soft_overlong_punishment":  # this function makes a reward; `trl grpo` calls it in the same way
        return reward(max_completion_len=1280, soft_punish_cache=256)
    return reward


def load_datasets(script_args: Any, training_args: Any, mixture: Any) -> tuple[str, Any, Any]:
    """Returns the name of the prompts, the prompts to train on, and the held-out prompts or `None`."""
    if mixture.datasets:  # as in TRL, a mixture takes precedence
        splits: Any = get_dataset(mixture)
        dataset_name = ", ".join(dataset.path for dataset in mixture.datasets)
    else:
        dataset_name = script_args.dataset_name
        splits = load_splits(dataset_name, "dataset_name", script_args.dataset_config, script_args.dataset_streaming)
    train_dataset = take_split(splits, script_args.dataset_train_split, dataset_name, "dataset_name")
    test_split, number = script_args.dataset_test_split, script_args.num_eval_prompts
    eval_dataset = splits.get(test_split)
    if script_args.eval_dataset_name is not None:
        held_out = load_splits(script_args.eval_dataset_name, "eval_dataset_name", script_args.eval_dataset_config)
        name = test_split if test_split in held_out else "train"
        eval_dataset = take_split(held_out, name, script_args.eval_dataset_name, "eval_dataset_name")
    elif eval_dataset is None and training_args.eval_strategy != "no":
        raise ValueError(
            f"`eval_strategy` is {training_args.eval_strategy.value!r}, but `dataset_name` {dataset_name!r} has no split "
            f"{test_split!r}. Name held-out prompts with `--eval_dataset_name`."
        )
    if number is None:
        return dataset_name, train_dataset, eval_dataset
    if eval_dataset is None or number < 1:
        problem = "there are no held-out prompts" if eval_dataset is None else "it must be at least 1"
        raise ValueError(
            f"`num_eval_prompts` is {number}, but {problem}. Leave `num_eval_prompts` out, or name held-out prompts with "
            "`--eval_dataset_name`."
        )
    return dataset_name, train_dataset, eval_dataset.take(number)


def make_trainer(script_args: Any, training_args: Any, model_args: Any, datasets: list[Any]) -> Any:
    """Makes the trainer. `datasets` are the prompts to train on, and the held-out prompts."""
    text_evaluation: Callable[[list[str]], dict[str, float]] | None = None
    wanted = {"language": script_args.evaluation_language, "reference": script_args.evaluation_reference}
    if any(value is not None for value in wanted.values()):
        text_evaluation = partial(evaluate_texts, **wanted)
    reward_funcs: list[Any] = [load_reward(name) for name in script_args.reward_funcs or []]
    if script_args.reward_model_name_or_path:
        reward_funcs.insert(0, script_args.reward_model_name_or_path)
    replay_dataset = None
    if script_args.replay_dataset_name is not None:
        replay_dataset = load_rows(
            script_args.replay_dataset_name,
            script_args.replay_dataset_split,
            "replay_dataset_name",
            script_args.replay_dataset_config,
        )
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype or "float32",
        **(training_args.model_init_kwargs or {}),
    }
    return DatasetPolicyGradientTrainer(
        model=model_args.model_name_or_path,
        target_model=script_args.target_model_name_or_path,
        metric=script_args.load_metric(),
        args=training_args,
        train_dataset=datasets[0],
        eval_dataset=datasets[1],
        reward_funcs=reward_funcs,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
        reference_texts=script_args.reference_texts,
        text_evaluation=text_evaluation,
        replay_dataset=replay_dataset,
    )


class ValidateAgain(TrainerCallback):
    """Repeats the validation of `eval_on_start` when training begins. Only then is the generator in place if it is sharded."""

    def __init__(self, trainer: Any, number: int):
        self.trainer, self.number = trainer, number

    def on_train_begin(self, args, state, control, **kwargs):
        for _ in range(self.number if state.global_step == 0 else 0):
            self.trainer.evaluate()


def print_end(trainer: Any, dataset_name: str) -> None:
    """Prints the result, the path of the report and the next command."""
    folder = trainer.args.output_dir
    print(f"\n{summary(trainer)}")
    try:
        print(f"Open this in a browser: {write_report(folder)}")
    except (OSError, ValueError) as error:  # a failed report must not fail the run
        print(f"The report could not be written: {error}", file=sys.stderr)
    print(f"Next: trl-dpg generate --model {folder} --prompts {dataset_name} --output data.jsonl")


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    (script_args, training_args, model_args, mixture), _ = parse(argv)  # other flags are for the launcher
    dataset_name, *datasets = load_datasets(script_args, training_args, mixture)
    trainer = make_trainer(script_args, training_args, model_args, datasets)
    trainer.remove_callback(SummaryCallback)  # `print_end` prints the summary after the last validation
    if training_args.eval_on_start:
        trainer.add_callback(ValidateAgain(trainer, script_args.validation_draws - 1))
    try:
        trainer.train(training_args.resume_from_checkpoint)
        for _ in range(script_args.validation_draws if trainer.eval_dataset is not None else 0):
            trainer.evaluate()
        trainer.save_model(training_args.output_dir, _internal_call=True)  # which does not push yet
        trainer.create_model_card()
        if trainer.is_world_process_zero():
            print_end(trainer, dataset_name)
        trainer.accelerator.print(f"The generator is in {training_args.output_dir}.")
        if training_args.push_to_hub:
            trainer.push_to_hub(dataset_name=dataset_name)
            trainer.accelerator.print(f"It is on the Hub, too: {trainer.hub_model_id}.")
    except Exception as error:
        if trainer.state.max_steps > 0:  # training had begun, so the arguments alone are not the cause
            last = last_whole_checkpoint(training_args.output_dir)
            note = f"The last whole checkpoint is {str(last)!r}: go on from it with `--resume_from_checkpoint True`."
            if last is None:
                note = f"There is no whole checkpoint in {training_args.output_dir!r}."
            error.add_note(f"The run failed at step {trainer.state.global_step}. {note}")
        raise
    trainer.accelerator.end_training()
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main, None, "trl-dpg train"))
