"""The trainer: a generator whose data fine-tunes a target towards a differentiable metric."""

import copy
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object, is_peft_model
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback, set_seed
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import nanstd, pad

from .callbacks import FiniteStepsCallback
from .checkpoints import ResumingMixin
from .config import DatasetPolicyGradientConfig, with_target_names
from .credit import CandidateHead, changed_logits, credit_text, expected_credit
from .credit.candidates import ALL_WORDS, CANDIDATES, changed_words
from .data import completion_text, indices_to_train_on, special_ids
from .metagradients.runtime.model import vocab_size
from .metagradients.runtime.processes import failing_together
from .publishing.cards import PAPER
from .publishing.hub import PublishingMixin
from .reporting import ReportCallback
from .rewards import (
    EditDistanceReward,
    EmbeddingSimilarityReward,
    LanguageIdentificationReward,
    MetagradientReward,
    NaiveReward,
    TargetReward,
    TargetTraining,
    check_metric,
    measuring_nothing,
)
from .target import load_target_model, load_target_tokenizer
from .validation import validate


logger = logging.get_logger(__name__)

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import BitsAndBytesConfig


class _Generated(Exception):  # noqa: N818
    """Leaves TRL's method that sets up, generates and scores, once it has generated."""

    def __init__(self, prompts: list[Any], output: tuple):
        self.prompts, self.output = prompts, output


class DatasetPolicyGradientTrainer(ResumingMixin, PublishingMixin, GRPOTrainer):
    """
    Trainer for Dataset Policy Gradients (DPG), proposed in [Synthetic Data for any Differentiable
    Target](https://huggingface.co/papers/2604.08423).

    A generator writes training examples. A target model is fine-tuned on them, and each example is rewarded with its
    metagradient: how much a differentiable metric of the fine-tuned target would rise if the example's loss weight rose.
    GRPO trains the generator on these rewards. `args.reward` chooses other rewards to compare with.

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
            `args.target_model_init_kwargs`). Its `requires_grad` parameters are what is fine-tuned. A model object is
            used as it is, and holds its original weights again after every reward.
        metric (`Callable`):
            Differentiable metric of the fine-tuned target, higher is better: `metric(model)` returns a scalar tensor.
            See [`~trl_dpg.metrics`].
        args ([`DatasetPolicyGradientConfig`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Prompts, as in [`~trl.GRPOTrainer`]: a column `"prompt"`, plain or conversational.
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or a `dict` of these, *optional*):
            Held-out prompts for validation, see [`~DatasetPolicyGradientTrainer.evaluation_loop`].
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer of the generator, as in [`~trl.GRPOTrainer`].
        target_processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer of the target. Loaded from the target's name if `None`.
        formatting_func (`Callable`, *optional*):
            Maps `{"prompt": ..., "completion": ...}` to the text that the target is trained on, as in
            [`~trl.SFTTrainer`]. By default it is the completion's text alone.
        reward_funcs (`RewardFunc | list[RewardFunc]`, *optional*):
            Further rewards beside that of `args.reward`, as in [`~trl.GRPOTrainer`]. `args.reward_weights` starts with the
            weight of `args.reward`.
        reward_processing_classes (`list`, *optional*):
            Processing classes of the further rewards.
        callbacks (list of [`~transformers.TrainerCallback`], *optional*):
            As in [`~transformers.Trainer`].
        optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            Optimizer and scheduler of the generator.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            For loading the generator by name.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Adapters of the generator.
        target_peft_config ([`~peft.PeftConfig`], *optional*):
            Adapters of the target, which are then what is fine-tuned.
        tools (list of `Callable`, *optional*):
            As in [`~trl.GRPOTrainer`]. The target is trained on the assistant's texts alone.
        rollout_func (`RolloutFunc`, *optional*):
            As in [`~trl.GRPOTrainer`].
        reference_texts (`list[str]`, *optional*):
            What completions are compared to with `args.reward` `"embedding_similarity"` or `"edit_distance"`: of several,
            the most similar one counts. Not used by other rewards.
        text_evaluation (`Callable`, *optional*):
            Read-outs of what validation generates: takes the list of texts, returns a dict of floats, which are reported with
            `eval_metric`. For example `functools.partial(evaluate_texts, language="es")`, see
            [`~trl_dpg.metrics.evaluate_texts`], or a judge of your own.

    Raises:
        [`ValueError`]: If models, data, metric or configuration do not fit together; checked, where possible, before any
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
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset
        | IterableDataset
        | DatasetDict
        | IterableDatasetDict
        | dict[str, Dataset | IterableDataset]
        | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        target_processing_class: PreTrainedTokenizerBase | None = None,
        formatting_func: Callable[[dict[str, Any]], str] | None = None,
        reward_funcs: Any = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: "BitsAndBytesConfig | None" = None,
        peft_config: "PeftConfig | None" = None,
        target_peft_config: "PeftConfig | None" = None,
        tools: list[Callable] | None = None,
        rollout_func: Any = None,
        reference_texts: list[str] | None = None,
        text_evaluation: Callable[[list[str]], dict[str, float]] | None = None,
    ):
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = DatasetPolicyGradientConfig(f"{name.split('/')[-1]}-DPG")
        _check_arguments(model, target_model, metric, args, train_dataset, eval_dataset)
        args = _with_best_metric_of_one_dataset(args, eval_dataset)
        reward: Any = None
        if args.reward == "embedding_similarity":
            reward = EmbeddingSimilarityReward(reference_texts)  # type: ignore[arg-type]
        elif args.reward == "edit_distance":
            reward = EditDistanceReward(reference_texts)  # type: ignore[arg-type]
        elif args.reward == "language_identification":
            reward = LanguageIdentificationReward(args.reward_language)  # type: ignore[arg-type]

        target_args = args.target_training_arguments()
        model_init_kwargs = dict(args.target_model_init_kwargs or {})  # type: ignore[arg-type]
        model_init_kwargs.setdefault("trust_remote_code", args.trust_remote_code)
        if target_processing_class is None and isinstance(target_model, str):
            target_processing_class = load_target_tokenizer(
                target_model,
                trust_remote_code=model_init_kwargs["trust_remote_code"],
                revision=model_init_kwargs.get("revision"),
            )
        # As TRL does for the generator: new adapters are random, and must be alike on every process
        set_seed(args.seed)
        target_model = load_target_model(
            target_model, args.target_untie_lm_head, target_peft_config, **model_init_kwargs
        )
        target = target_model, metric, target_args, target_processing_class, formatting_func
        # What validation needs, too: a reward that fine-tunes the target is one with its training
        self.target_training: TargetTraining
        if args.reward == "metagradient":
            reward = self.target_training = MetagradientReward(
                *target,
                cross_group_batching=args.cross_group_batching,
                num_generations=args.num_generations,
                nonfinite=args.nonfinite,
            )
        elif args.reward == "naive":
            reward = self.target_training = NaiveReward(
                *target,
                num_generations=args.num_generations,  # type: ignore[arg-type]
                nonfinite=args.nonfinite,
            )
        else:
            self.target_training = TargetTraining(*target)
        self._validating = False
        self.step_skipped = False  # whether a batch of the optimizer step to come was
        self.metric = self.target_training.metric
        self.text_evaluation = text_evaluation

        # TRL expects lists of equal length; ours comes first
        reward_funcs = (
            [] if reward_funcs is None else reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        )
        if reward_processing_classes is not None and not isinstance(reward_processing_classes, list):
            reward_processing_classes = [reward_processing_classes]
        super().__init__(
            model,
            [reward, *reward_funcs],
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
        )
        self.target_training.generator_processing_class = self._tokenizer
        self._set_up_credit()
        self.add_callback(FiniteStepsCallback(self))
        self.add_callback(ReportCallback(self))
        # TRL calls a completion ended if its last token is one of these
        self.target_training.eos_token_ids = [*self.eos_token_ids, self._tokenizer.pad_token_id]

    def training_step(self, model, inputs, num_items_in_batch):
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.step_skipped |= self.target_training.skipped
        return loss

    def _set_up_credit(self) -> None:
        """Decides which estimator of the policy gradient to use, and says so."""
        args: Any = self.args
        model: Any = self.accelerator.unwrap_model(self.model)
        model = model.get_base_model() if is_peft_model(model) else model
        vocabulary = self._tokenizer.get_vocab()
        obstacle = None
        if vocabulary != self.target_training.processing_class.get_vocab():
            obstacle = "generator and target have different vocabularies, and a word's credit is known for words of the target"
        elif changed := changed_logits(model):
            obstacle = f"the generator changes its logits (`config` has {changed})"
        self.credit_assignment = args.credit_assignment
        if self.credit_assignment == "auto" and args.reward != "metagradient":
            self.credit_assignment = "sequence"
        elif self.credit_assignment == "auto":
            self.credit_assignment = "expected" if obstacle is None else "token"
            reason = obstacle or "generator and target share a vocabulary"
            if args.moves_tokens_alike():
                self.credit_assignment = "sequence"
                reason = "`importance_sampling_level='sequence'` moves all tokens of a completion alike"
            self.accelerator.print(f"credit_assignment: {self.credit_assignment!r}, as {reason}.", file=sys.stderr)
        if self.credit_assignment == "expected" and obstacle is not None:
            raise ValueError(
                f"`credit_assignment='expected'` cannot be used: {obstacle}. Set `credit_assignment='token'`."
            )
        unused = {
            "credit_discount": args.credit_discount != 0.5,
            "credit_candidates": args.credit_candidates is not None,
        }
        if self.credit_assignment != "sequence":
            unused = {"scale_rewards": args.scale_rewards != "none" and len(self.reward_funcs) == 1}
            unused["credit_candidates"] = self.credit_assignment == "token" and args.credit_candidates is not None
        for name in [name for name, is_unused in unused.items() if is_unused]:
            logger.warning(
                f"`{name}` {getattr(args, name)!r} has no effect, as `credit_assignment` is {self.credit_assignment!r}. Leave out "
                "one of the two."
            )
        self._candidate_head = None
        if isinstance(self.target_training, MetagradientReward) and self.credit_assignment != "sequence":
            self.target_training.credit_of_tokens = True
        if self.credit_assignment == "expected":
            self._candidate_head = CandidateHead(model, self.temperature)
            rows = model.get_output_embeddings().weight.shape[0]
            # The target reads text, in which special tokens are not, but for the end, and what its tokenizer makes of other words.
            ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}
            known = {i for i in vocabulary.values() if i < vocab_size(self.target_training.target_model)}
            words = ends | (
                known - special_ids(self._tokenizer) - changed_words(self.target_training.processing_class)
            )
            self._is_word = torch.tensor([i in words for i in range(rows)])
            rows = min(len(vocabulary), rows)
            number = args.credit_candidates or (rows if rows <= ALL_WORDS else CANDIDATES)
            self._num_candidates = min(number, rows)
            self._all_words = self._num_candidates == rows

    def _generate(self, prompts):
        output = super()._generate(prompts)
        prompt_ids, completion_ids, self.target_training.tool_masks = output[:3]
        if self._validating:
            raise _Generated(prompts, output)
        if self._candidate_head is not None and self.model.training:
            self.target_training.candidate_ids = self._candidates(prompt_ids, completion_ids)  # type: ignore[attr-defined]
        return output

    def _generate_only(self, inputs: list[dict[str, Any]]) -> tuple[list[Any], tuple]:
        """Prompts as TRL sets them up with tools and images, and what `_generate` returns, without rewards."""
        with failing_together(self.accelerator):
            if "prompt" not in inputs[0]:
                raise ValueError(
                    f"`eval_dataset` has the columns {sorted(inputs[0])} but no `prompt`. Rename or add it."
                )
        self._validating = True
        try:
            super()._generate_and_score_completions(inputs)
        except _Generated as generated:
            return generated.prompts, generated.output
        finally:
            self._validating = False
        raise AssertionError("TRL generated nothing")

    @torch.no_grad()
    def _candidates(self, prompt_ids: list[list[int]], completion_ids: list[list[int]]) -> list[torch.Tensor]:
        """Words that could stand at each token of the completions: all, or the generator's most likely ones; -1 for no word."""
        number = self._num_candidates
        if self._all_words:
            words = torch.arange(number).masked_fill(~self._is_word[:number], -1)
            return [words.expand(len(ids), number) for ids in completion_ids]
        found: list[torch.Tensor] = []
        size = self.args.per_device_train_batch_size
        padding = {"padding_value": self._tokenizer.pad_token_id}
        model: Any = self.model
        kwargs: Any = self.args.gradient_checkpointing_kwargs
        with disable_gradient_checkpointing(model, kwargs):
            for start in range(0, len(prompt_ids), size):
                rows = completion_ids[start : start + size]
                both = [[torch.tensor(ids) for ids in part] for part in (prompt_ids[start : start + size], rows)]
                parts = [
                    pad(ids, **padding, padding_side=side) for ids, side in zip(both, ("left", "right"), strict=True)
                ]
                masks = [
                    pad([torch.ones_like(row) for row in ids], padding_value=0, padding_side=side)
                    for ids, side in zip(both, ("left", "right"), strict=True)
                ]
                ids, mask = (torch.cat(tensors, dim=1).to(self.accelerator.device) for tensors in (parts, masks))
                length = parts[1].shape[1]
                with self._candidate_head.most_likely(length, number) as head:  # type: ignore[union-attr]
                    self._get_per_token_logps_and_entropies(model, ids, mask, length)
                    result = head.result.cpu()  # type: ignore[union-attr]
                result = result.masked_fill(~self._is_word[result], -1)
                found += [result[i, : len(row)] for i, row in enumerate(rows)]
        return found

    def _tokenize_prompts(self, prompts):
        with failing_together(self.accelerator):
            for prompt in prompts:
                if not isinstance(prompt, (str, list)):
                    raise ValueError(
                        f"Column `prompt` holds {prompt!r}, which is neither a text nor a list of messages. Correct or remove the row."
                    )
        output = super()._tokenize_prompts(prompts)
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)  # type: ignore[union-attr]
        length = self.max_completion_length or 0
        with failing_together(self.accelerator):
            for prompt, ids in zip(prompts, output[0], strict=True):
                if not ids:
                    raise ValueError(
                        f"The prompt {prompt!r} has no tokens, so there is nothing to generate from. Put at least one in "
                        "column `prompt`, for example the tokenizer's BOS or EOS token."
                    )
                if positions is not None and len(ids) + length > positions:
                    raise ValueError(
                        f"A prompt of {len(ids)} tokens and `max_completion_length` {length} do not fit into the {positions} "
                        f"positions of the generator: {prompt!r:.80}. Remove or shorten the prompt, or lower `max_completion_length`."
                    )
        return output

    def _calculate_rewards(self, *args, **kwargs):
        with _target_names():
            self._rewards_per_func = super()._calculate_rewards(*args, **kwargs)
        return self._rewards_per_func

    def _generate_and_score_completions(self, inputs):
        weights = self.reward_weights.clone()
        if self.credit_assignment != "sequence" and len(self.reward_funcs) > 1:
            self.reward_weights[0] = (
                0.0  # TRL's advantages are those of the other rewards, which are of whole completions
            )
        try:
            output = super()._generate_and_score_completions(inputs)
        finally:
            self.reward_weights = weights
        if self.credit_assignment != "sequence":
            self._give_credit(output)
            rewards = (self._rewards_per_func * weights.to(self._rewards_per_func.device)).nansum(dim=1)
            rewards[self._rewards_per_func.isnan().all(dim=1)] = torch.nan
            self._metrics["train"]["reward"][-1] = rewards.nanmean().item()  # with ours, too
            self._metrics["train"]["reward_std"][-1] = nanstd(rewards).item()
        if self.args.reward == "naive":
            advantages = _groupless_advantages(
                self._rewards_per_func,
                self.reward_weights.to(self._rewards_per_func.device),
                self.scale_rewards,
                self.multi_objective_aggregation,
            )
            first = self.accelerator.process_index * len(inputs)
            output["advantages"] = advantages[first : first + len(inputs)]
            for _ in advantages:  # in the completions table, too
                self._logs["advantages"].pop()
            self._logs["advantages"].extend(advantages.tolist())
        return output

    def _give_credit(self, output: dict[str, Any]) -> None:
        """Replaces the advantages of completions by those of their tokens, of shape `(b, t)`."""
        training: Any = self.target_training
        result = training.token_advantages(self.args.credit_discount)  # type: ignore[attr-defined]
        completion_ids = output["completion_ids"]
        if result is None:  # the batch was skipped
            if self.log_completions:  # else the table would show the last batch's
                count = len(completion_ids) * self.accelerator.num_processes
                self._logs["extra"]["metagradient_credit"].extend([""] * count)  # type: ignore[index]
            return
        num, length = completion_ids.shape
        first = self.accelerator.process_index * num
        place = {"device": completion_ids.device, "dtype": torch.float32}
        weight = self.reward_weights[0].item()

        def mine(values: torch.Tensor, missing: float) -> torch.Tensor:
            """This process's completions, padded as TRL pads them."""
            values = values[first : first + num, :length].to(**place)
            return torch.cat([values, values.new_full((num, length - values.shape[1], *values.shape[2:]), missing)], 1)

        others = output["advantages"].unsqueeze(1) if len(self.reward_funcs) > 1 else 0.0
        output["advantages"] = others + weight * mine(result.sampled, 0.0)
        if result.candidates is not None:
            output["candidate_credits"] = weight * mine(result.candidates, torch.nan)
            if not self._all_words:
                ids = [F.pad(row, (0, 0, 0, length - len(row)), value=-1) for row in training.candidate_ids]
                output["candidate_ids"] = torch.stack(ids).to(completion_ids.device)
        if self.log_completions and self.accelerator.is_main_process:  # which prints and sends the table
            texts = [credit_text(training.credit_by_word(i)) for i in range(len(result.sampled))]
            self._logs["extra"]["metagradient_credit"].extend(texts)  # type: ignore[index]
        metrics = self._metrics["train"]
        metrics["metagradient/credit_unit"].append(result.unit)
        metrics["metagradient/credit_not_written"].append(result.not_written)

    def _compute_loss(self, model, inputs):
        r"""
        TRL's loss, and with `credit_assignment="expected"` the term \\( -\sum_v \pi(v) r(v) \\) of each token.

        Per unit of advantage, TRL's loss pulls at a token's log-probability with the derivative in both, whatever its loss type,
        its clipping and its masks. The token's new term gets this weight.
        """
        if "candidate_credits" not in inputs:
            return super()._compute_loss(model, inputs)
        credits = inputs["candidate_credits"]
        advantages = inputs["advantages"].clone().requires_grad_()
        with self._candidate_head.log_probs(*credits.shape[1:], inputs.get("candidate_ids")) as head:  # type: ignore[union-attr]
            loss = super()._compute_loss(model, {**inputs, "advantages": advantages})
            expected = expected_credit(head.result, credits)
            of_tokens = head.of_tokens
        (of_advantages,) = torch.autograd.grad(loss, advantages, create_graph=True)
        (weights,) = torch.autograd.grad(of_advantages.sum(), of_tokens, retain_graph=True)
        return loss + (weights[:, -credits.shape[1] :] * expected).sum()

    def get_eval_dataloader(self, eval_dataset=None):
        if eval_dataset is None or isinstance(eval_dataset, str):
            return super().get_eval_dataloader(eval_dataset)
        _check_prompts("eval_dataset", eval_dataset)
        # The loaders that Transformers keeps for persistent workers go by a name, whatever data set is asked for
        kept = self.__dict__.pop("_eval_dataloaders", {})
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self._eval_dataloaders = kept

    def get_test_dataloader(self, test_dataset):
        _check_prompts("test_dataset", test_dataset)
        return self.get_eval_dataloader(test_dataset)  # TRL's own, which takes streams of prompts

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """
        The paper's validation: generates from held-out prompts, fine-tunes a fresh target on that with ordinary SFT
        (PyTorch's own optimizer, see [`~trl_dpg.validation.validate`]) and reports the metric and its read-outs as
        `eval_metric`, `eval_metric_before`, `eval_metric_gain`, `eval_target_loss`, `eval_pixel_accuracy`, ...; beside them
        `eval_distinct`, the share of distinct texts among the completions, and `eval_completion_length`, their mean length
        in the generator's tokens.

        Called by `evaluate()`, with `num_generations_eval` completions per prompt. Each call samples anew. The recipe is that of
        training, so a validation of more examples than a generation batch takes more steps (`eval_target_steps`).
        `predict(prompts)` does the same and returns the generated texts as `predictions`, too.
        """
        self.model.eval()  # type: ignore[union-attr]
        training = self.target_training
        examples: list[dict[str, Any]] = []
        for inputs in dataloader:
            prompts, (_, completion_ids, _, completions, *_) = self._generate_only(inputs)
            with failing_together(self.accelerator):
                local = training.target_examples(prompts, completions, completion_ids)
            for example, completion in zip(local, completions, strict=True):
                example["completion"] = completion_text(completion)
            examples.extend(gather_object(local))
        if not examples:
            raise ValueError("`eval_dataset` is empty: there is nothing to validate on. Pass at least one prompt.")
        # The last batch is filled up with repeated rows. `gather_for_metrics` would count them by the dataset's length,
        # but TRL's sampler gives every row `num_generations_eval` times.
        if isinstance(dataloader.dataset, Dataset):
            examples = examples[: len(dataloader.dataset) * self.num_generations_eval]  # type: ignore[operator]
        # Every process runs the same validation: it is one short fine-tuning run.
        with failing_together(self.accelerator):
            training.place_target(self.accelerator.device)
            trained = [examples[i] for i in indices_to_train_on(examples)]
            self._warn_of_other_steps(len(examples))
            try:
                with measuring_nothing(self.metric), _target_names():
                    results = validate(training.target_model, trained, self.metric, training.args)
            except FloatingPointError as error:
                if self.args.nonfinite == "raise":  # type: ignore[attr-defined]
                    raise
                logger.warning(f"The validation at step {self.state.global_step} counts as the worst: {error}")
                results = {"metric": -math.inf, "metric_gain": -math.inf}
            texts = [example["completion"] for example in examples]
            if self.text_evaluation is not None:
                results.update(self.text_evaluation(texts))
        results["empty"] = len(examples) - len(trained)
        results["distinct"] = len(set(texts)) / len(texts)
        results["completion_length"] = sum(example["length"] for example in examples) / len(examples)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in results.items()}
        return EvalLoopOutput(predictions=texts, label_ids=None, metrics=metrics, num_samples=len(texts))  # type: ignore[arg-type]

    def _warn_of_other_steps(self, num_examples: int) -> None:
        """A generator is trained for K steps of the target; a validation of more or fewer is about something else."""
        if not isinstance(self.target_training, TargetReward):  # nothing is trained for the target
            return
        args: Any = self.args
        num_trained = args.num_target_examples()
        trained, validated = (self.target_training.args.num_steps(n) for n in (num_trained, num_examples))
        if trained != validated:
            logger.warning_once(
                f"Validation fine-tunes the target for {validated} steps, but training for {trained}: `eval_dataset` times "
                f"`num_generations_eval` gives {num_examples} examples, a batch of training {num_trained}. Choose them alike to "
                "validate what is trained for."
            )


@contextmanager
def _target_names() -> Iterator[None]:
    """Errors of the target's run name the fields that its recipe has in this trainer's configuration."""
    try:
        yield
    except (FloatingPointError, MemoryError) as error:
        error.args = (with_target_names(str(error)),)
        raise


def _groupless_advantages(
    rewards_per_func: torch.Tensor, weights: torch.Tensor, scale_rewards: str, aggregation: str
) -> torch.Tensor:
    """TRL's advantages of rewards of shape `(completions, functions)`, NaN where there is none, with one group for all."""
    unscorable = rewards_per_func.isnan().all(dim=1)
    if aggregation == "normalize_then_sum":
        centered = rewards_per_func - rewards_per_func.nanmean(dim=0)
        rewards_per_func = centered / (nanstd(rewards_per_func, dim=0) + 1e-4)
    rewards = (rewards_per_func * weights).nansum(dim=1)
    rewards[unscorable] = torch.nan
    advantages = rewards - rewards.nanmean()
    if scale_rewards != "none" or aggregation == "normalize_then_sum":
        advantages = advantages / (nanstd(rewards) + 1e-4)
    return advantages.nan_to_num(nan=0.0)


def _with_best_metric_of_one_dataset(args, eval_dataset):
    """Of several evaluation sets, each has figures of its own, so the best generator is chosen by the first one's."""
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
        f"`metric_for_best_model` is {args.metric_for_best_model!r}, that of the first evaluation set. Set another of them as "
        f"'eval_NAME_{name.removeprefix('eval_')}'."
    )
    return args


def _check_prompts(name: str, dataset: Any) -> None:
    """Refuses a data set without prompts, as far as it can be seen without reading a stream."""
    if not isinstance(dataset, (Dataset, IterableDataset)):
        return
    if dataset.column_names is not None and "prompt" not in dataset.column_names:
        raise ValueError(f"`{name}` has the columns {dataset.column_names} but no `prompt`. Rename or add it.")
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError(f"`{name}` is empty. Pass at least one prompt.")


def _check_arguments(model, target_model, metric, args, train_dataset, eval_dataset):
    """Refuses what can be refused before any model is loaded."""
    if not isinstance(args, DatasetPolicyGradientConfig):
        raise ValueError(
            f"`args` must be a `DatasetPolicyGradientConfig`, got {type(args).__name__}. It takes every field of "
            "`GRPOConfig`, so `DatasetPolicyGradientConfig` can stand in for it where it is made."
        )
    if target_model is None:
        raise ValueError(
            "`target_model` is missing. Pass the model that the generated data is to fine-tune, or its name."
        )
    if target_model is model and not isinstance(model, str):
        raise ValueError(
            "`target_model` and `model` are the same object, so training the generator would change the target. Load the "
            "target separately, or pass both by name."
        )
    check_metric(metric)
    if not isinstance(train_dataset, (Dataset, IterableDataset)):
        raise ValueError(
            f"`train_dataset` must be a `datasets.Dataset` or `IterableDataset` of prompts, got "
            f"{type(train_dataset).__name__}."
        )
    evals = eval_dataset if isinstance(eval_dataset, dict) else {"eval_dataset": eval_dataset}
    if not evals:
        raise ValueError("`eval_dataset` is a dict without data sets. Pass at least one, or leave it out.")
    for name, dataset in {"train_dataset": train_dataset, **evals}.items():
        _check_prompts(name, dataset)
    num_prompts = args.generation_batch_size // args.num_generations
    if num_prompts < 4:
        logger.warning_once(
            f"A generation batch has {num_prompts} prompts (`generation_batch_size` {args.generation_batch_size} / `num_generations` "
            f"{args.num_generations}). Credit is relative to the batch, so few prompts make it noisy. Raise "
            "`per_device_train_batch_size` or `steps_per_generation`, or lower `num_generations`."
        )
    num_examples = args.num_target_examples()
    if args.reward in ("metagradient", "naive") and (args.target_batch_size or 0) > num_examples:
        logger.warning_once(
            f"`target_batch_size` is {args.target_batch_size}, but a run of the target has {num_examples} completions, so each of its "
            "epochs is one step on fewer. Leave it out for that, or raise `per_device_train_batch_size`."
        )
    if isinstance(train_dataset, Dataset):
        if taken := {"prompts", "completions"} & set(train_dataset.column_names):
            raise ValueError(
                f"`train_dataset` has the columns {sorted(taken)}, by which TRL calls what it gives to rewards. Rename them."
            )
        needed = math.ceil(args.generation_batch_size / args.num_generations)
        if len(train_dataset) < needed:
            raise ValueError(
                f"`train_dataset` has {len(train_dataset)} prompts, but one generation batch needs {needed} "
                f"(`generation_batch_size` {args.generation_batch_size} / `num_generations` {args.num_generations}), so "
                "TRL would train on nothing. Add prompts or lower `per_device_train_batch_size`."
            )
