"""Configuration of [`DatasetPolicyGradientTrainer`]."""

import copy
import dataclasses
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from accelerate.utils import parse_flag_from_env
from transformers.utils import is_in_notebook
from trl import GRPOConfig

from .metagradients import TargetTrainingArguments
from .replay import check_ratio, num_replayed
from .variants import variant_recipes


# Fields of `TargetTrainingArguments` that this configuration repeats with the prefix `target_`.
_TARGET_FIELDS = [f.name for f in dataclasses.fields(TargetTrainingArguments) if f.name != "disable_tqdm"]

_CHOICES = {
    "reward": ["metagradient", "naive", "embedding_similarity", "edit_distance", "language_identification"],
    "credit_assignment": ["auto", "sequence", "token", "expected"],
    "nonfinite": ["raise", "skip"],
}


def _field(default: Any, text: str, choices: list[str] | None = None) -> Any:
    """A field of the configuration, with its text for `--help` and its choices."""
    return field(default=default, metadata={"help": text} if choices is None else {"help": text, "choices": choices})


def with_target_names(text: str) -> str:
    """Puts `target_` before the names of recipe fields in a text, since `learning_rate` here is that of the generator."""
    return re.sub(rf"`({'|'.join(_TARGET_FIELDS)})`", r"`target_\1`", text)


@contextmanager
def naming_target_fields() -> Iterator[None]:
    """Makes errors of the target's run name the fields of this configuration, with the prefix `target_`."""
    try:
        yield
    except (FloatingPointError, MemoryError) as error:
        error.args = (with_target_names(str(error)),)
        raise


@dataclass
class DatasetPolicyGradientConfig(GRPOConfig):
    r"""
    Configuration class for the [`DatasetPolicyGradientTrainer`].

    This class includes only the parameters that are specific to Dataset Policy Gradients. For a full list of training
    arguments, please refer to the [`~trl.GRPOConfig`] and [`~transformers.TrainingArguments`] documentation. Those
    configure the generator. Parameters with the prefix `target_` configure the fine-tuning run of the target, see
    [`~trl_dpg.metagradients.TargetTrainingArguments`].

    Parameters:
        reward (`str`, *optional*, defaults to `"metagradient"`):
            The reward of the generator. Validation is the same for all rewards.

            - `"metagradient"`: derivative of the metric with respect to each example's weight, see [`MetagradientReward`].
            - `"naive"`: gain of the metric of a target fine-tuned on the example's dataset. The generation batch is split into
              `num_generations` datasets. Advantages are taken over the whole batch, not per prompt. See
              [`~rewards.NaiveReward`].
            - `"embedding_similarity"`, `"edit_distance"`: similarity to the trainer's `reference_texts`. See
              [`~rewards.EmbeddingSimilarityReward`] and [`~rewards.EditDistanceReward`].
            - `"language_identification"`: probability that the text is in `reward_language`. See
              [`~rewards.LanguageIdentificationReward`].

            The last three train no target. They need the extra `trl-dpg[baselines]`. Their values are not standardized, but
            `scale_rewards="group"` or `"batch"` standardizes the advantages.
        cross_group_batching (`bool`, *optional*, defaults to `True`):
            Whether one run of the target on the whole generation batch gives all metagradients. If `False`, there are
            `num_generations` runs, each on one completion per prompt. Has no effect on other rewards.
        credit_assignment (`str`, *optional*, defaults to `"auto"`):
            How the tokens of a completion share its metagradient, which is a sum over tokens, see
            [`~trl_dpg.credit.token_advantages`]. Only for `reward="metagradient"`.

            - `"sequence"`: every token gets the whole sum, as in the paper.
            - `"token"`: a token gets the discounted sum of its own term and all later ones.
            - `"expected"`: like `"token"`, but in place of the sampled token's own term, the policy gradient takes the expectation
              over all tokens that could stand there. Generator and target must share a vocabulary.
            - `"auto"`: `"expected"` if they share a vocabulary, else `"token"`. It is `"sequence"` for other rewards, and with
              `importance_sampling_level="sequence"`, where TRL's loss treats all tokens of a completion alike.
        credit_discount (`float`, *optional*, defaults to `0.5`):
            Discount of later tokens' credit, from 0 to 1. At 1 the gradient is unbiased. A smaller discount has less variance.
        credit_candidates (`int`, *optional*):
            Words whose credit `"expected"` takes into account at each position: the generator's most likely ones, the
            sampled one among them. `None` means all of a vocabulary of up to 4,096 words, and 64 of a larger one. At least 2.
        nonfinite (`str`, *optional*, defaults to `"raise"`):
            What to do if a loss, gradient, cotangent or metric is not finite, in the target's run or in the generator's
            step. Such a value never changes any weights.

            - `"raise"`: the run ends with a `FloatingPointError` that names the step and the quantity.
            - `"skip"`: this generation batch leaves generator and optimizer unchanged. It is counted as `metagradient/skipped`, or
              as `nonfinite_steps` if the generator's own step was not finite. A validation that is not finite gets an `eval_metric`
              of minus infinity, and the worst possible figure of `metric_for_best_model`. Not with DeepSpeed or fp16, which decide
              about steps themselves.
        reward_language (`str`, *optional*):
            Language for `reward="language_identification"`, as a code such as `"es"`.
        scale_rewards (`str`, *optional*, defaults to `"none"`):
            As in [`~trl.GRPOConfig`]. The default is `"none"`, since the reward is already standardized over the whole batch, see
            [`MetagradientReward`]. Credit of tokens has a unit of its own. With it, this setting only concerns further rewards.
        disable_tqdm (`bool`, *optional*):
            As in [`~transformers.TrainingArguments`], but by default bars are shown on a terminal or in a notebook only.
        target_model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for `from_pretrained` when the target is given by name. `dtype` is float32 unless given:
            metagradients need it.
        target_untie_lm_head (`bool`, *optional*, defaults to `False`):
            Whether to give the target's LM head a weight of its own if it is tied to the input embedding.
        target_batch_size (`int`, *optional*):
            Examples per step of the target, over all processes. `None` means the whole generation batch, that is one step (K = 1).
            Otherwise K is `generation_batch_size / target_batch_size`. If the batch is split (`reward="naive"`,
            `cross_group_batching=False`), this is divided by `num_generations`. Real examples (`replay_ratio`) count, too.
        target_max_length (`int`, *optional*):
            Most tokens of an example; later ones are cut off. `None` means `max_completion_length` plus one for a BOS token. The
            log entry `metagradient/cut` counts cut texts. The target's tokenizer may make more tokens of a text than the generator's.
        target_completion_only_loss (`bool`, *optional*):
            Whether the target's loss is on the completion alone, as in [`~trl.SFTConfig`]. `None` means yes if `formatting_func`
            returns a prompt and a completion. If it returns a text, all tokens have a loss.
        target_assistant_only_loss (`bool`, *optional*, defaults to `False`):
            Whether the target's loss is on the assistant's messages alone, as in [`~trl.SFTConfig`]. This needs messages, and a chat
            template that marks the assistant's parts with `{% generation %}`.
        target_adam_epsilon_root (`float` or `str`, *optional*, defaults to `"auto"`):
            Added inside the square root of AdamW's denominator. `"auto"` measures a value on the first generation batch and keeps it.
        target_seed (`int`, *optional*, defaults to `0`):
            Seed of the shuffle of a generation batch. The global step is added to it.
        target_variants (`list[dict]`, *optional*):
            Variants of the target's recipe. The reward is the mean over the variants, so that data works for all of them. Each variant
            costs a run of the target. A dict holds changed fields of the recipe (without `target_`), and maybe two other keys:
            `"model"`, name or directory of another target with the same tokenizer, and `"head_seed"`, seed of a new random LM
            head. An empty dict is the recipe itself. On the command line, write JSON.
        target_fsdp (`bool`, *optional*, defaults to `False`):
            Whether to shard the target: as with FSDP2, each process holds its share of weights, gradients, optimizer state and tape,
            and one whole layer at a time. It does not matter how the generator is trained. Not with `target_optim="muon"`,
            quantization or `head_seed`.
        replay_ratio (`float`, *optional*, defaults to `0.0`):
            Share of real examples, from the trainer's `replay_dataset`, in every run of the target. 0.5 means as many real examples as
            generated ones. Each step draws new ones, with the seed `target_seed` plus the global step. They are cut at
            `target_max_length`.
        save_generated (`bool`, *optional*, defaults to `False`):
            Whether to write every generation batch to `generated/step-000123.parquet` in `output_dir`. The number is that of the first
            step that uses the batch. Columns: `step`, `prompt`, `completion`, `text` (the target's training text) and `raw`
            (metagradient).
        target_* (*optional*):
            All other fields of [`~trl_dpg.metagradients.TargetTrainingArguments`], with the same defaults:
            `target_optim`, `target_learning_rate`, `target_weight_decay`, `target_weight_decay_on_norm_and_bias`, `target_momentum`,
            `target_nesterov`, `target_adam_beta1`, `target_adam_beta2`, `target_adam_epsilon`, `target_lr_scheduler_type`,
            `target_warmup_steps`, `target_max_grad_norm`, `target_num_train_epochs`, `target_micro_batch_size`,
            `target_micro_batch_tokens`, `target_shuffle`, `target_loss_normalization`, `target_bf16`,
            `target_gradient_checkpointing`, `target_curvature`, `target_curvature_tolerance`, `target_tape`, `target_tape_dir`.
    """

    _VALID_DICT_FIELDS = GRPOConfig._VALID_DICT_FIELDS + ["target_model_init_kwargs"]

    reward: str = _field("metagradient", "The reward of the generator.", _CHOICES["reward"])
    cross_group_batching: bool = _field(
        True, "Whether the target trains once on the whole batch, not once per rollout index."
    )
    credit_assignment: str = _field(
        "auto",
        "Credit of a token: the whole metagradient ('sequence'), its own and later terms ('token'), or the same in "
        "expectation over the tokens that could stand there ('expected').",
        _CHOICES["credit_assignment"],
    )
    credit_discount: float = _field(0.5, "Discount of later tokens' credit, 0 to 1; unbiased at 1.")
    credit_candidates: int | None = _field(
        None, "Words that 'expected' considers. `None` is all of up to 4,096, else 64."
    )
    nonfinite: str = _field(
        "raise",
        "At a loss, gradient or metric that is not finite: 'raise' or 'skip' the batch.",
        _CHOICES["nonfinite"],
    )
    reward_language: str | None = _field(
        None, "Language for `reward='language_identification'`, as a code such as 'es'."
    )
    scale_rewards: str = _field("none", "How TRL scales advantages: `'none'` (default here), `'batch'` or `'group'`.")
    disable_tqdm: bool | None = _field(
        None, "Whether to print lines instead of a bar. Default: only without a terminal."
    )
    target_model_init_kwargs: dict[str, Any] | str | None = _field(
        None, "Keyword arguments for `from_pretrained` when the target is given by name."
    )
    target_variants: list[dict[str, Any]] | str | None = _field(
        None, "Variants of the target's recipe, as a JSON list of objects. The reward is the mean over them."
    )
    replay_ratio: float = _field(0.0, "Share of real examples in every run of the target, from 0 to below 1.")
    save_generated: bool = _field(False, "Whether to write every generation batch to a Parquet file.")
    target_untie_lm_head: bool = _field(False, "Whether a tied LM head gets its own weight.")
    target_fsdp: bool = _field(False, "Whether each process holds only its share of the target.")
    target_optim: str = _field("adamw", "Update rule of the target: `'adamw'`, `'sgd'` or `'muon'`.")
    target_learning_rate: float = _field(1e-5, "Peak learning rate of the target.")
    target_weight_decay: float = _field(0.0, "Weight decay of the target.")
    target_weight_decay_on_norm_and_bias: bool = _field(
        True, "Whether weight decay applies to normalization weights and biases."
    )
    target_momentum: float | None = _field(None, "Momentum of SGD (`None`: 0) and Muon (`None`: 0.95).")
    target_nesterov: bool | None = _field(None, "Whether momentum is Nesterov's. `None`: with Muon only.")
    target_adam_beta1: float = _field(0.9, "Decay of the target's first Adam moment.")
    target_adam_beta2: float = _field(0.95, "Decay of the target's second Adam moment.")
    target_adam_epsilon: float = _field(1e-8, "Added to AdamW's denominator, outside the root.")
    # The type is `str` because transformers' parser treats `float | str` as `float`. `__post_init__` converts numbers.
    target_adam_epsilon_root: str = _field(
        "auto", "Added inside the square root; `'auto'` measures it on the first generation batch."
    )
    target_lr_scheduler_type: str = _field(
        "constant", "`'constant'`, `'constant_with_warmup'`, `'linear'` or `'cosine'`."
    )
    target_warmup_steps: float = _field(0, "Warm-up steps; below 1, their share of all steps.")
    target_max_grad_norm: float = _field(0.0, "Clipping norm of gradients; 0 means no clipping.")
    target_num_train_epochs: int = _field(1, "Passes of the target over the examples.")
    target_batch_size: int | None = _field(None, "Examples per step. `None` is the whole generation batch (one step).")
    target_micro_batch_size: int | None = _field(None, "Examples per forward pass and process of the target.")
    target_micro_batch_tokens: int | None = _field(None, "Tokens per forward pass and process, padding included.")
    target_max_length: int | None = _field(None, "Tokens kept of each example. `None` is `max_completion_length` + 1.")
    target_completion_only_loss: bool | None = _field(
        None, "Whether the loss is on the completion alone. `None`: if the target gets a prompt, too."
    )
    target_assistant_only_loss: bool = _field(False, "Whether the loss is on the assistant's messages alone.")
    target_shuffle: bool = _field(True, "Whether examples are shuffled before batching.")
    target_seed: int = _field(0, "Seed of the shuffle.")
    target_loss_normalization: str = _field("batch_tokens", "`'batch_tokens'`, `'example'` or `'max_length'`.")
    target_bf16: bool = _field(False, "Whether to run under bfloat16 autocast, which is less exact.")
    target_gradient_checkpointing: bool = _field(False, "Whether activations are recomputed in the backward pass.")
    target_curvature: str = _field("exact", "Hessian-vector products: `'exact'` or by `'central_difference'`.")
    target_curvature_tolerance: float = _field(1e-2, "Largest error of a central difference that is accepted.")
    target_tape: str = _field("auto", "Where gradients are kept: `'auto'`, `'device'`, `'host'` or `'disk'`.")
    target_tape_dir: str | None = _field(None, "Directory of the tape on disk.")

    def __post_init__(self):
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be {' or '.join(map(repr, choices))}, got {getattr(self, name)!r}.")
        self._check_credit()
        check_ratio(self.replay_ratio)
        # `accelerate launch` sets this variable, and `self.deepspeed` stays empty.
        uses_deepspeed = self.deepspeed or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
        if self.nonfinite == "skip" and (uses_deepspeed or self.fp16):
            raise ValueError(
                f"`nonfinite='skip'` does not go with {'DeepSpeed' if uses_deepspeed else '`fp16`'}, which makes or skips steps "
                "itself. Set `nonfinite='raise'`."
            )
        if self.reward == "language_identification" and self.reward_language is None:
            raise ValueError(
                "`reward='language_identification'` needs `reward_language`, the code of the wanted language, such as 'es'."
            )
        with suppress(ValueError):  # "auto"; the recipe below refuses any other text
            if isinstance(self.target_adam_epsilon_root, str):
                self.target_adam_epsilon_root = float(self.target_adam_epsilon_root)  # type: ignore[assignment]
        # Otherwise transformers would look for an `eval_loss`, which a generator's validation does not have.
        if (self.load_best_model_at_end or self.save_strategy == "best") and self.metric_for_best_model is None:
            self.metric_for_best_model = "eval_metric"
            if self.greater_is_better is None:
                self.greater_is_better = True
        if self.disable_tqdm is None:  # bars in a log file are noise
            self.disable_tqdm = not (sys.stderr.isatty() or is_in_notebook())
        super().__post_init__()
        for name in ("model_init_kwargs", "target_model_init_kwargs"):
            if not isinstance(getattr(self, name) or {}, dict):
                raise ValueError(
                    f"`{name}` must be keyword arguments, got {getattr(self, name)!r}. Write them as an object, such as "
                    '\'{"dtype": "float32"}\'.'
                )
        if "seed" in (self.generation_kwargs or {}):
            raise ValueError(
                f"`generation_kwargs` has the `seed` {self.generation_kwargs['seed']!r}. It makes all completions of a prompt the same, "
                "and so their rewards. Set the field `seed` instead: each process then draws numbers of its own."
            )
        if self.metric_for_best_model in ("loss", "eval_loss"):  # the default of Transformers for some schedulers
            raise ValueError(
                f"`metric_for_best_model` is {self.metric_for_best_model!r}, but validation has no such loss. Use 'eval_metric' "
                "(higher is better), or 'eval_target_loss', the loss of the fine-tuned target."
            )
        self._check_variants()

    def _check_variants(self) -> None:
        recipe = self.target_training_arguments()
        if isinstance(self.target_variants, str):
            try:
                self.target_variants = json.loads(self.target_variants)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"`target_variants` {self.target_variants!r} is no JSON: {error}. Write a list, such as "
                    "'[{}, {\"learning_rate\": 1e-4}]'."
                ) from error
        recipes = [recipe, *variant_recipes(recipe, self.target_variants, "target_variants")]
        if not self.target_fsdp:
            return
        for optim in [r.optim for r in recipes if not r.rule_class.elementwise]:
            raise ValueError(
                f"`target_fsdp=True` does not go with `target_optim={optim!r}`, which needs whole matrices. Set "
                '`target_fsdp=False`, or `target_optim="adamw"`.'
            )
        if any("head_seed" in variant for variant in self.target_variants or []):
            raise ValueError(
                "`target_fsdp=True` does not go with a `head_seed` in `target_variants`, since every process would need the whole new "
                "LM head. Leave one of the two out."
            )

    def _check_credit(self) -> None:
        if self.credit_assignment in ("token", "expected") and self.reward != "metagradient":
            raise ValueError(
                f"`credit_assignment={self.credit_assignment!r}` needs metagradients of tokens, but `reward` is {self.reward!r}, "
                'which gives one number per completion. Set `credit_assignment="sequence"`.'
            )
        if self.credit_assignment in ("token", "expected") and self.moves_tokens_alike():
            raise ValueError(
                f"`credit_assignment={self.credit_assignment!r}` does not go with `importance_sampling_level='sequence'`, which "
                "moves all tokens of a completion alike, by the mean of their credits. Set "
                "`importance_sampling_level='token'`, or `credit_assignment='sequence'`."
            )
        if not isinstance(self.credit_discount, (int, float)) or not 0 <= self.credit_discount <= 1:
            raise ValueError(f"`credit_discount` must be a number from 0 to 1, got {self.credit_discount!r}.")
        number = self.credit_candidates  # with one candidate alone, there is nothing to compare
        if number is not None and not (isinstance(number, int) and number >= 2):
            raise ValueError(f"`credit_candidates` must be None or a whole number of at least 2, got {number!r}.")

    def tokens(self) -> list[str]:
        """The access tokens in this configuration."""
        kwargs = (self.model_init_kwargs, self.target_model_init_kwargs)
        tokens = [self.hub_token, *(of_model.get("token") for of_model in kwargs if isinstance(of_model, dict))]
        return [token for token in tokens if token and isinstance(token, str)]

    def without_tokens(self) -> "DatasetPolicyGradientConfig":
        """A copy without access tokens, which may be written to a file."""
        public = copy.copy(self)
        public.hub_token = None
        for name in ("model_init_kwargs", "target_model_init_kwargs"):
            kwargs = getattr(self, name)
            if isinstance(kwargs, dict):
                setattr(public, name, {key: value for key, value in kwargs.items() if key != "token"})
        return public

    def to_dict(self) -> dict[str, Any]:
        """As in [`~transformers.TrainingArguments`], but without any access token."""
        return super(DatasetPolicyGradientConfig, self.without_tokens()).to_dict()

    def __str__(self) -> str:
        return super(DatasetPolicyGradientConfig, self.without_tokens()).__str__()

    __repr__ = __str__  # a data class would print all fields

    def num_target_examples(self) -> int:
        """Number of examples in one run of the target: completions and real examples."""
        split = self.reward == "naive" or not self.cross_group_batching
        generated = self.generation_batch_size // (self.num_generations if split else 1)  # type: ignore[operator]
        return generated + num_replayed(generated, self.replay_ratio)

    def moves_tokens_alike(self) -> bool:
        """Whether TRL's loss (GSPO) moves all tokens of a completion by the mean of their advantages."""
        return self.importance_sampling_level == "sequence" and self.loss_type not in ("cispo", "vespo")

    def target_training_arguments(self) -> TargetTrainingArguments:
        """
        Makes the target's recipe from the `target_` fields.

        Raises:
            [`ValueError`]: If a `target_` field is out of its range.
        """
        fields = {name: getattr(self, f"target_{name}") for name in _TARGET_FIELDS}
        if fields["max_length"] is None:
            fields["max_length"] = max(2, (self.max_completion_length or 511) + 1)
        if fields["batch_size"] is None:
            whole: int = self.generation_batch_size  # type: ignore[assignment]
            fields["batch_size"] = whole + num_replayed(whole, self.replay_ratio)
        try:
            recipe = TargetTrainingArguments(**fields, disable_tqdm=self.disable_tqdm or None)
            if recipe.warmup_steps > 0 and recipe.num_steps(self.num_target_examples()) == 1:
                raise ValueError(
                    f"`warmup_steps` {recipe.warmup_steps} leaves nothing to train: the target takes one step, and the first step of "
                    "a warm-up has a learning rate of 0. Set `warmup_steps` to 0, or lower `batch_size` for more steps."
                )
            return recipe
        except ValueError as error:
            raise ValueError(with_target_names(str(error))) from None
