"""Validation in the trainer: generates from held-out prompts, fine-tunes the target in the ordinary way, and reports figures."""

import math
from collections.abc import Callable
from functools import partial
from numbers import Real
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging
from trl import GRPOTrainer
from trl.trainer.utils import RepeatSampler

from .checks import check_prompts, warn_of_other_steps
from .config import naming_target_fields
from .data import indices_to_train_on
from .fine_tuning import TargetFineTuning
from .metagradients.runtime.processes import failing_together
from .replay import num_replayed
from .rewards import TargetReward


logger = logging.get_logger(__name__)


class Generated(Exception):  # noqa: N818
    """Raised after generation to leave TRL's method, which would otherwise compute rewards next."""

    def __init__(self, prompts: list[Any], output: tuple):
        self.prompts, self.output = prompts, output


class EvaluationMixin(GRPOTrainer):
    """Evaluation of [`DatasetPolicyGradientTrainer`]."""

    target_training: TargetFineTuning
    text_evaluation: Callable[[list[str]], dict[str, float]] | None
    _validating = False  # whether `_generate` raises `Generated`

    def get_eval_dataloader(self, eval_dataset=None):
        if eval_dataset is None or isinstance(eval_dataset, str):
            return super().get_eval_dataloader(eval_dataset)
        check_prompts("eval_dataset", eval_dataset)
        # For persistent workers, Transformers keeps loaders by a name that does not depend on the data set.
        kept = self.__dict__.pop("_eval_dataloaders", {})
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self._eval_dataloaders = kept

    def get_test_dataloader(self, test_dataset):
        check_prompts("test_dataset", test_dataset)
        if isinstance(test_dataset, IterableDataset):
            test_dataset = Dataset.from_list(list(test_dataset), features=test_dataset.features)
        # TRL would shuffle the prompts, and `predictions` would not say which text answers which prompt.
        in_order = partial(RepeatSampler, mini_repeat_count=self.num_generations_eval, shuffle=False)
        return self._get_dataloader(test_dataset, "test", self.args.eval_batch_size, sampler_fn=in_order)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """
        Validates as in the paper: generates from held-out prompts, fine-tunes a fresh target on the completions with ordinary SFT
        (PyTorch's own optimizer, see [`~trl_dpg.validation.validate`]), and measures the metric.

        It reports the metric and its read-outs as `eval_metric`, `eval_metric_before`, `eval_metric_gain`, `eval_target_loss`,
        `eval_pixel_accuracy`, ... It also reports `eval_distinct`, the share of distinct texts among the completions, and
        `eval_completion_length`, their mean length in the generator's tokens.

        `evaluate()` makes this call, with `num_generations_eval` completions per prompt. Each call samples anew. The recipe is that
        of training. If there are more examples than in a generation batch, the target takes more steps (`eval_target_steps`). Held-out
        rows of `replay_dataset` are mixed in. With `args.target_variants`, each variant adds its own figures as
        `eval_variant_0_metric_gain`, ... All others belong to the recipe itself. `predict(prompts)` does the same, and also returns
        the generated texts as `predictions`: `num_generations_eval` for the first prompt, then those for the second, and so on.
        """
        self.model.eval()  # type: ignore[union-attr]
        examples = self._generate_examples(dataloader)
        texts = [example["completion"] for example in examples]
        trained = indices_to_train_on(examples, self.target_training.args.max_length)
        with failing_together(self.accelerator):
            # Every process runs the same validation, since it is one short fine-tuning run.
            figures = self._validate(examples)
            figures["empty"] = len(examples) - len(trained)
            figures["distinct"] = len(set(texts)) / len(texts)
            figures["completion_length"] = sum(example["length"] for example in examples) / len(examples)
            # A judge may be paid for each call, or answer differently.
            of_texts = [self._evaluate_texts(texts, figures) if self.accelerator.is_main_process else {}]
        figures |= broadcast_object_list(of_texts)[0]
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        if figures["metric"] == -math.inf and self.args.metric_for_best_model is not None:
            best = f"eval_{self.args.metric_for_best_model.removeprefix('eval_')}"
            if best.startswith(f"{metric_key_prefix}_"):  # so that this generator is never the best one
                metrics[best] = -math.inf if self.args.greater_is_better else math.inf
        return EvalLoopOutput(predictions=texts, label_ids=None, metrics=metrics, num_samples=len(texts))  # type: ignore[arg-type]

    def _evaluate_texts(self, texts: list[str], figures: dict[str, float]) -> dict[str, float]:
        """The figures of `text_evaluation`, beside those of the validation itself."""
        if self.text_evaluation is None:
            return {}
        values = self.text_evaluation(texts)
        if not isinstance(values, dict) or not all(isinstance(value, Real) for value in values.values()):
            raise ValueError(
                f"`text_evaluation` must return a dict of numbers, got {values!r:.120}. Return names and floats."
            )
        if taken := sorted(name for name in figures.keys() & values.keys() if figures[name] != values[name]):
            raise ValueError(
                f"`text_evaluation` returned {taken}, which validation has with other values. Choose other names."
            )
        return values

    def _generate_examples(self, dataloader: DataLoader) -> list[dict[str, Any]]:
        """Generates completions of held-out prompts, and makes training examples of those of all processes."""
        examples: list[dict[str, Any]] = []
        for inputs in dataloader:
            prompts, (_, completion_ids, _, completions, *_) = self._generate_only(inputs)
            with failing_together(self.accelerator):
                local = self.target_training.target_examples(prompts, completions, completion_ids)
            examples.extend(gather_object(local))
        if not examples:
            raise ValueError("`eval_dataset` is empty: there is nothing to validate on. Pass at least one prompt.")
        # The last batch is filled up with repeated rows, which are dropped here. `gather_for_metrics` would keep as many rows as
        # the dataset has, but TRL's sampler gives every row `num_generations_eval` times.
        if isinstance(dataloader.dataset, Dataset):
            examples = examples[: len(dataloader.dataset) * self.num_generations_eval]  # type: ignore[operator]
        return examples

    def _generate_only(self, inputs: list[dict[str, Any]]) -> tuple[list[Any], tuple]:
        """Prompts as TRL prepares them with tools and images, and the result of `_generate`, without rewards."""
        with failing_together(self.accelerator):
            if "prompt" not in inputs[0]:
                raise ValueError(
                    f"`eval_dataset` has the columns {sorted(inputs[0])} but no `prompt`. Rename a column or add one."
                )
        self._validating = True
        try:
            super()._generate_and_score_completions(inputs)
        except Generated as generated:
            return generated.prompts, generated.output
        finally:
            self._validating = False
        raise AssertionError("TRL generated nothing")

    def _validate(self, examples: list[dict[str, Any]]) -> dict[str, float]:
        """Figures of a fresh target after fine-tuning on the examples. If they are not finite, the worst possible figures."""
        if isinstance(self.target_training, TargetReward):  # other rewards do not train the target
            num_trained = self.args.num_target_examples()  # type: ignore[attr-defined]
            replayed = num_replayed(len(examples), self.args.replay_ratio)  # type: ignore[attr-defined]
            warn_of_other_steps(self.target_training.args, num_trained, len(examples) + replayed)
        try:
            with naming_target_fields():
                return self.target_training.validate(examples, self.accelerator.device)
        except FloatingPointError as error:
            if self.args.nonfinite == "raise":  # type: ignore[attr-defined]
                raise
            logger.warning(f"The validation at step {self.state.global_step} counts as the worst: {error}")
            return {"metric": -math.inf, "metric_gain": -math.inf}
