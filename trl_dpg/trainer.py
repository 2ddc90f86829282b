"""The trainer: trains a generator whose texts, as training data, move a target model towards a differentiable metric."""

import copy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback, set_seed
from transformers.utils import logging
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing

from .callbacks import FiniteStepsCallback
from .checkpoints import ResumingMixin
from .checks import (
    check_arguments,
    check_prompt_lengths,
    check_prompt_texts,
    warn_of_settings,
    with_best_metric_of_one_dataset,
)
from .config import DatasetPolicyGradientConfig, naming_target_fields
from .console import replace_console
from .credit import credit_text, reward_advantages
from .credit.policy import (
    ExpectedCredit,
    choose_credit_assignment,
    obstacle_to_expected_credit,
    settings_without_effect,
)
from .data import completion_text
from .evaluation import EvaluationMixin, Generated
from .fine_tuning import TargetFineTuning
from .metagradients.runtime.processes import failing_together
from .publishing.cards import PAPER
from .publishing.hub import PublishingMixin
from .reporting import ReportCallback
from .rewards import MetagradientReward, NaiveReward, TargetReward, text_reward
from .sft_rows import Row, check_loss
from .target import load_target_model, load_target_tokenizer
from .variants import with_models
from .waiting import bound_waiting


logger = logging.get_logger(__name__)

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import BitsAndBytesConfig

    Prompts: TypeAlias = Dataset | IterableDataset


class DatasetPolicyGradientTrainer(EvaluationMixin, ResumingMixin, PublishingMixin, GRPOTrainer):
    """
    Trainer for Dataset Policy Gradients (DPG), proposed in [Synthetic Data for any Differentiable
    Target](https://huggingface.co/papers/2604.08423).

    A generator writes training examples. A target model is fine-tuned on them, and each example is rewarded with its
    metagradient: how much a differentiable metric of the fine-tuned target would rise if the example's loss weight rose.
    GRPO trains the generator on these rewards. With `args.reward`, other rewards can be used for comparison.

    Example:

    ```python
    from datasets import load_dataset
    from trl_dpg import DatasetPolicyGradientConfig, DatasetPolicyGradientTrainer
    from trl_dpg.metrics import LMHeadPattern

    trainer = DatasetPolicyGradientTrainer(
        model="meta-llama/Llama-3.2-1B-Instruct",
        target_model="openai-community/gpt2",
        metric=LMHeadPattern.qr("TRL-DPG"),
        args=DatasetPolicyGradientConfig(target_learning_rate=5e-6, target_untie_lm_head=True),
        train_dataset=load_dataset("trl-lib/tldr", split="train"),
    )
    trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Generator, as in [`~trl.GRPOTrainer`].
        target_model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Target: a causal language model, or its id or directory (then loaded in float32, with
            `args.target_model_init_kwargs`). Parameters with `requires_grad` are fine-tuned. A model object is used directly,
            without a copy. After every reward, its original weights are restored.
        metric (`Callable`):
            Differentiable metric of the fine-tuned target, higher is better: `metric(model)` returns a scalar tensor.
            See [`~trl_dpg.metrics`].
        args ([`DatasetPolicyGradientConfig`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Prompts, as in [`~trl.GRPOTrainer`]: a column `"prompt"`, plain or conversational. Needed with `environment_factory`,
            too: if an environment's `reset` writes the prompts, each row holds `[{"role": "user", "content": ""}]`.
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or a `dict` of these, *optional*):
            Held-out prompts for validation, see [`~DatasetPolicyGradientTrainer.evaluation_loop`].
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer of the generator, as in [`~trl.GRPOTrainer`].
        target_processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer of the target. Loaded from the target's name if `None`.
        formatting_func (`Callable`, *optional*):
            Maps `{"prompt": ..., "completion": ...}` to the text that the target is trained on, as in [`~trl.SFTTrainer`]. It may
            also return a dict with the same keys, whose values are texts, or lists of messages for the target's chat template. By
            default, the target is trained on the completion's text alone.
        reward_funcs (`RewardFunc | list[RewardFunc]`, *optional*):
            Further rewards, in addition to that of `args.reward`, as in [`~trl.GRPOTrainer`]. The first of `args.reward_weights`
            belongs to `args.reward`.
        reward_processing_classes (`list`, *optional*):
            Processing classes of the further rewards.
        callbacks (`list`), optimizers (`tuple`), quantization_config, peft_config, rollout_func (*optional*):
            As in [`~trl.GRPOTrainer`]. They belong to the generator.
        target_peft_config ([`~peft.PeftConfig`], *optional*):
            Adapters to put on the target. Only the adapters are then fine-tuned.
        tools (list of `Callable`), environment_factory (`Callable` or `dict`, *optional*):
            As in [`~trl.GRPOTrainer`]. The target is trained on the assistant's texts alone.
        reference_texts (`list[str]`, *optional*):
            Texts that completions are compared to with `args.reward` `"embedding_similarity"` or `"edit_distance"`. The most
            similar text counts. Not used by other rewards.
        text_evaluation (`Callable`, *optional*):
            Evaluates the texts that validation generates: takes the list of texts, and returns a dict of floats, which are reported
            with `eval_metric`. For example `functools.partial(evaluate_texts, language="es")`, see
            [`~trl_dpg.metrics.evaluate_texts`], or a judge of your own. It is called on the main process alone.
        replay_dataset ([`~datasets.Dataset`] or `list[dict]`, *optional*):
            Real data to mix into every run of the target, with the share `args.replay_ratio`. Rows have `text`, `prompt` and
            `completion`, or `messages`. Every fifth row, from the first on, is used in validations only, the other rows in training
            only. Real examples have no reward.

    Raises:
        [`ValueError`]: If models, data, metric or configuration do not fit together. Where possible, this is checked before any
            model is loaded.
    """

    _tag_names = ["trl", "dpg"]
    _name = "DPG"
    _paper = PAPER

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        target_model: "str | PreTrainedModel | PeftModel",
        metric: Callable[[Any], torch.Tensor],
        args: DatasetPolicyGradientConfig | None = None,
        train_dataset: "Prompts | None" = None,
        eval_dataset: "Prompts | dict[str, Prompts] | None" = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        target_processing_class: PreTrainedTokenizerBase | None = None,
        formatting_func: Callable[[Row], str | Row] | None = None,
        reward_funcs: Any = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: "BitsAndBytesConfig | None" = None,
        peft_config: "PeftConfig | None" = None,
        target_peft_config: "PeftConfig | None" = None,
        tools: list[Callable] | None = None,
        rollout_func: Any = None,
        environment_factory: Any = None,
        reference_texts: list[str] | None = None,
        text_evaluation: Callable[[list[str]], dict[str, float]] | None = None,
        replay_dataset: "Dataset | list[dict[str, Any]] | None" = None,
    ):
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = DatasetPolicyGradientConfig(f"{name.split('/')[-1]}-DPG")
        check_arguments(model, target_model, metric, args, train_dataset, eval_dataset, replay_dataset)
        warn_of_settings(args, reference_texts)
        bound_waiting(args)
        args = with_best_metric_of_one_dataset(args, eval_dataset)
        args.dataloader_pin_memory &= args.device.type != "cpu"  # PyTorch would warn that it has no effect on the CPU
        reward = text_reward(args.reward, reference_texts, args.reward_language)  # before any model is loaded
        self.target_training = self._load_target(
            args, target_model, metric, target_processing_class, formatting_func, target_peft_config, replay_dataset
        )
        self.metric = self.target_training.metric
        self.text_evaluation = text_evaluation
        self.step_skipped = False  # whether a generation batch of the next optimizer step was skipped

        # TRL expects lists of equal length. The reward of `args.reward` comes first.
        if not isinstance(reward_funcs, list):
            reward_funcs = [] if reward_funcs is None else [reward_funcs]
        if reward_processing_classes is not None and not isinstance(reward_processing_classes, list):
            reward_processing_classes = [reward_processing_classes]
        super().__init__(
            model,
            [reward or self.target_training, *reward_funcs],  # type: ignore[list-item]
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            reward_processing_classes=reward_processing_classes and [None, *reward_processing_classes],
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
            tools=tools,
            rollout_func=rollout_func,
            environment_factory=environment_factory,
        )
        if args.use_vllm and args.vllm_mode == "colocate":
            # A vLLM engine resets the seed of its process, without regard to `args.seed`.
            set_seed(args.seed + self.accelerator.process_index // args.vllm_tensor_parallel_size)
        self.target_training.generator_processing_class = self._tokenizer
        # TRL counts a completion as ended if its last token is one of these. Generation itself does not stop at the padding token.
        self.target_training.eos_token_ids = [*self.eos_token_ids, self._tokenizer.pad_token_id]
        self._set_up_credit()
        self.add_callback(FiniteStepsCallback(self))
        self.add_callback(ReportCallback(self))
        replace_console(self)

    @staticmethod
    def _load_target(
        args, target_model, metric, processing_class, formatting_func, peft_config, replay_dataset
    ) -> TargetFineTuning:
        """Loads the target for validation. If the reward fine-tunes the target, the result is also the reward."""
        recipe = args.target_training_arguments()
        kwargs = {"trust_remote_code": args.trust_remote_code, **(args.target_model_init_kwargs or {})}
        if processing_class is None and isinstance(target_model, str):
            processing_class = load_target_tokenizer(
                target_model, trust_remote_code=kwargs["trust_remote_code"], revision=kwargs.get("revision")
            )
        loss = {
            "completion_only_loss": args.target_completion_only_loss,
            "assistant_only_loss": args.target_assistant_only_loss,
        }
        check_loss(formatting_func, processing_class=processing_class, **loss)
        # New adapters are random, and must be equal on every process. TRL does the same for the generator.
        set_seed(args.seed)

        def load(model, **kwargs):
            untie, adapters = args.target_untie_lm_head, copy.deepcopy(peft_config)
            return load_target_model(model, untie, adapters, args.target_fsdp, **kwargs)

        target_model = load(target_model, **kwargs)
        kwargs.pop("revision", None)  # belongs to the target alone, not to the models of variants
        trust = kwargs["trust_remote_code"]
        variants = with_models(args.target_variants, processing_class, partial(load, **kwargs), trust)
        data = {"replay_dataset": replay_dataset, "replay_ratio": args.replay_ratio, "variants": variants or None}
        target = target_model, metric, recipe, processing_class, formatting_func
        batch = {"num_generations": args.num_generations, "nonfinite": args.nonfinite, **loss, **data}
        if args.reward == "metagradient":
            return MetagradientReward(*target, cross_group_batching=args.cross_group_batching, **batch)
        if args.reward == "naive":
            return NaiveReward(*target, **batch)
        return TargetFineTuning(*target, **loss, **data)  # type: ignore[misc]

    def _set_up_credit(self) -> None:
        """Chooses the estimator of the policy gradient, and prints the choice."""
        args: Any = self.args
        target = self.target_training
        model: Any = self.accelerator.unwrap_model(self.model)
        model = model.get_base_model() if is_peft_model(model) else model
        obstacle = obstacle_to_expected_credit(model, self._tokenizer, target.processing_class)
        self.credit_assignment, reason = choose_credit_assignment(args, obstacle)
        if reason is not None:
            self.accelerator.print(f"credit_assignment: {self.credit_assignment!r}, as {reason}.", file=sys.stderr)
        for name in settings_without_effect(args, self.credit_assignment, len(self.reward_funcs)):
            logger.warning(
                f"`{name}` {getattr(args, name)!r} has no effect, as `credit_assignment` is {self.credit_assignment!r}. Leave one "
                "of the two out."
            )
        if isinstance(target, MetagradientReward):
            target.credit_of_tokens = self.credit_assignment != "sequence"
        self._expected_credit = None
        if self.credit_assignment == "expected":
            self._expected_credit = ExpectedCredit(
                model, self._tokenizer, target, self.eos_token_ids, self.temperature, args.credit_candidates
            )

    # A generation batch: prompts, completions, rewards, advantages

    def _tokenize_prompts(self, prompts):
        with failing_together(self.accelerator):
            check_prompt_texts(prompts)
        output = super()._tokenize_prompts(prompts)
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)  # type: ignore[union-attr]
        with failing_together(self.accelerator):
            check_prompt_lengths(prompts, output[0], self.max_completion_length or 0, positions)
        return output

    def _generate(self, prompts):
        output = super()._generate(prompts)
        prompt_ids, completion_ids, self.target_training.tool_masks = output[:3]
        if self._validating:
            raise Generated(prompts, output)
        if self._expected_credit is not None and self.model.training:
            self.target_training.candidate_ids = self._candidates(prompt_ids, completion_ids)  # type: ignore[attr-defined]
        return output

    def _candidates(self, prompt_ids: list[list[int]], completion_ids: list[list[int]]) -> list[torch.Tensor]:
        """Tokens that could stand at each position of the completions."""
        args: Any = self.args

        def forward(ids, mask):
            with self.accelerator.autocast():
                return self.model(input_ids=ids, attention_mask=mask)

        with disable_gradient_checkpointing(self.model, args.gradient_checkpointing_kwargs):  # type: ignore[arg-type]
            return self._expected_credit.candidates(  # type: ignore[union-attr]
                prompt_ids, completion_ids, forward, args.per_device_train_batch_size, self.accelerator.device
            )

    def _calculate_rewards(self, *args):
        # TRL's logs have one column for all rewards of one name.
        self._rewards = super()._calculate_rewards(*args)
        return self._rewards

    def _generate_and_score_completions(self, inputs):
        """
        Generates and scores a batch as TRL does, with advantages that suit `args.reward`.

        A naive reward does not compare the completions of one prompt, so its advantages are taken over the whole batch. With credit of
        tokens, the advantages of completions come from further rewards alone. Each token's own advantage is added to them.
        """
        with naming_target_fields():
            output = super()._generate_and_score_completions(inputs)
        if self.args.save_generated and self.model.training:
            self._save_generated(len(inputs) * self.accelerator.num_processes)
        gives_credit = self.credit_assignment != "sequence"
        if not gives_credit and self.args.reward != "naive":
            return output
        total = len(inputs) * self.accelerator.num_processes
        mine = slice(self.accelerator.process_index * len(inputs), (self.accelerator.process_index + 1) * len(inputs))
        weights = self.reward_weights.to(self._rewards.device, copy=True)
        if gives_credit:
            weights[0] = 0.0
        group_size = self.num_generations if gives_credit else total
        advantages = reward_advantages(
            self._rewards, weights, group_size, self.scale_rewards, self.multi_objective_aggregation
        )
        output["advantages"] = advantages[mine]
        if gives_credit:
            self._give_credit(output, mine)
        else:  # the completions table shows these advantages, too
            kept = list(self._logs["advantages"])[:-total]
            self._logs["advantages"].extend([*kept, *advantages.tolist()])
        return output

    def _save_generated(self, total: int) -> None:
        """Writes the generation batch of all processes to a file. If a resumed run repeats a step, it overwrites the step's file."""
        if not self.accelerator.is_main_process:
            return
        args: Any = self.args
        training, name = self.target_training, self.reward_func_names[0]
        logs: Any = self._logs
        completions = list(logs["completion"])[-total:]
        texts, raw = [completion_text(completion) for completion in completions], self._rewards[:, 0].tolist()
        if isinstance(training, TargetReward):
            texts, raw = training.texts, logs["extra"][f"{name}_raw"]
        step = self.state.global_step + 1
        rows = {
            "step": [step] * total,
            "prompt": list(logs["prompt"])[-total:],
            "completion": completions,
            "text": texts,
            "raw": list(raw)[-total:],
        }
        part = self._step % args.gradient_accumulation_steps // args.steps_per_generation  # of several in one step
        folder = Path(args.output_dir) / "generated"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"step-{step:06d}{f'-{part}' if part else ''}.parquet"
        Dataset.from_dict(rows).to_pandas().to_parquet(path)  # type: ignore[union-attr]  # without a progress bar

    def _give_credit(self, output: dict[str, Any], mine: slice) -> None:
        """Adds each token's own advantage to that of its completion. The sum has the shape `(b, t)`."""
        training: Any = self.target_training
        completion_ids = output["completion_ids"]
        length, place = completion_ids.shape[1], completion_ids.device
        result = training.token_advantages(self.args.credit_discount)  # type: ignore[attr-defined]
        if result is None:  # the batch was skipped
            if self.log_completions:  # otherwise the table would show the credit of the last batch
                count = len(completion_ids) * self.accelerator.num_processes
                self._logs["extra"]["metagradient_credit"].extend([""] * count)  # type: ignore[index]
            return
        advantages, candidates = result.of_rows(mine, length, self.reward_weights[0].item())
        output["advantages"] = output["advantages"].unsqueeze(1) + advantages.to(place)
        if candidates is not None:
            output["candidate_credits"] = candidates.to(place)
            if not self._expected_credit.all_words:  # type: ignore[union-attr]
                ids = [
                    torch.nn.functional.pad(row, (0, 0, 0, length - len(row)), value=-1)
                    for row in training.candidate_ids
                ]
                output["candidate_ids"] = torch.stack(ids).to(place)
        if self.log_completions and self.accelerator.is_main_process:  # this process prints and sends the table
            texts = [credit_text(training.credit_by_word(i)) for i in range(len(result.advantages))]
            self._logs["extra"]["metagradient_credit"].extend(texts)  # type: ignore[index]
        metrics = self._metrics["train"]
        metrics["metagradient/credit_unit"].append(result.unit)
        metrics["metagradient/credit_not_written"].append(result.not_written)

    def _load_best_model(self):
        super()._load_best_model()
        self._last_loaded_step = -1  # TRL only sends weights to vLLM if the step has changed

    # An optimizer step on a generation batch

    def training_step(self, model, inputs, num_items_in_batch):
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.step_skipped |= self.target_training.skipped
        return loss

    def _compute_loss(self, model, inputs):
        r"""TRL's loss, and with `credit_assignment="expected"` the term \\( -\sum_v \pi(v) r(v) \\) of each token."""
        policy_loss = super()._compute_loss
        if "candidate_credits" not in inputs:
            return policy_loss(model, inputs)
        return self._expected_credit.loss(policy_loss, model, inputs)  # type: ignore[union-attr]
