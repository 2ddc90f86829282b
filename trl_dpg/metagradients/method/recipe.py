"""The recipe of the target's fine-tuning, which metagradients differentiate through."""

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from transformers import get_scheduler

from ..runtime.recipes import checked, recipe_of_sft
from .updates import UPDATES, Update


if TYPE_CHECKING:
    from trl import SFTConfig


@dataclass(frozen=True)
class TargetTrainingArguments:
    r"""
    Recipe of the supervised fine-tuning (SFT) run that metagradients differentiate through.

    Names follow [`~transformers.TrainingArguments`]. Dropout is off during the whole run, because the derivative of a run needs a
    deterministic run.

    Args:
        optim (`str` or `type`, *optional*, defaults to `"adamw"`):
            Update rule: `"adamw"`, `"sgd"`, `"muon"` (Muon for matrices in hidden layers, AdamW for all other parameters), or a
            subclass of [`~trl_dpg.metagradients.method.updates.Update`].
        learning_rate (`float`, *optional*, defaults to `1e-5`): Peak learning rate.
        weight_decay (`float`, *optional*, defaults to `0.0`):
            As in PyTorch: decoupled with AdamW and Muon, and added to the gradient with SGD. A parameter without a gradient is
            treated as if its gradient were zero: the parameter and its moments decay. [`torch.optim.AdamW`] skips it instead.
        weight_decay_on_norm_and_bias (`bool`, *optional*, defaults to `True`):
            Whether weight decay also applies to normalization weights and biases, as in a bare [`~torch.optim.AdamW`]. `False` leaves
            them out, as [`~transformers.Trainer`] does.
        momentum (`float`, *optional*): Momentum of SGD and Muon. `None` means PyTorch's default: 0 for SGD, 0.95 for Muon.
        nesterov (`bool`, *optional*):
            Whether SGD and Muon use Nesterov's momentum. `None` means PyTorch's default: `False` for SGD, `True` for Muon.
        adam_beta1 (`float`, *optional*, defaults to `0.9`): Decay of AdamW's first moment.
        adam_beta2 (`float`, *optional*, defaults to `0.95`): Decay of AdamW's second moment.
        adam_epsilon (`float`, *optional*, defaults to `1e-8`): Added to the denominator of AdamW's update, outside the square root.
        adam_epsilon_root (`float` or `str`, *optional*, defaults to `"auto"`):
            Added inside the square root of AdamW's denominator, which makes the update differentiable where the gradient is zero.
            `"auto"` means four times the mean square of the run's first gradient. `0.0` gives [`~torch.optim.AdamW`], whose
            metagradients are ill-conditioned. The paper uses `1e-9`. With a value far below the squares of the gradients,
            \\( \Phi \\) is hardly a smooth function of the example weights, see [`check_metagradients`].
        lr_scheduler_type (`str`, *optional*, defaults to `"constant"`):
            `"constant"`, `"constant_with_warmup"`, `"linear"` or `"cosine"`, as in [`~transformers.get_scheduler`].
        warmup_steps (`float`, *optional*, defaults to `0`):
            Number of linear warm-up steps. A value below 1 is a share of all steps. The first warm-up step has a learning rate of 0.
            Must be 0 with `"constant"`.
        max_grad_norm (`float`, *optional*, defaults to `0.0`): Global norm that gradients are clipped to. `0.0` means no clipping.
        num_train_epochs (`int`, *optional*, defaults to `1`): Passes over the examples.
        batch_size (`int`, *optional*, defaults to `16`):
            Examples per optimizer step, over all processes. The last batch of an epoch may be smaller.
        micro_batch_size (`int`, *optional*):
            Examples per forward pass and process. `None` means a whole batch at once. The size is halved when memory runs out. It
            changes the memory a run needs, and results by no more than rounding.
        micro_batch_tokens (`int`, *optional*):
            Most tokens per forward pass and process, padding included. Like `micro_batch_size`, this limit changes results by no
            more than rounding. With or without it, examples of similar length share a micro-batch, which saves padding.
        max_length (`int`, *optional*, defaults to `128`): Most tokens of an example. Later tokens are cut off.
        shuffle (`bool`, *optional*, defaults to `True`): Whether examples are shuffled. Each epoch has an order of its own.
        seed (`int`, *optional*, defaults to `0`): Seed of the shuffle. The global random state is neither read nor changed.
        loss_normalization (`str`, *optional*, defaults to `"batch_tokens"`):
            - `"batch_tokens"`: summed cross-entropy over a batch's supervised tokens, divided by their number, as in `SFTTrainer`.
            - `"example"`: mean over each example's supervised tokens, then mean over examples.
            - `"max_length"`: each example's sum divided by `max_length`, then mean over examples, as in the paper's code.

            None of them counts examples without a supervised token.
        bf16 (`bool`, *optional*, defaults to `False`):
            Whether the model runs under bfloat16 autocast. Metagradients then differ from those in float32 by tens of per cent. With
            a small `adam_epsilon_root`, they differ completely, see `benchmarks/results/precision.md`.
        gradient_checkpointing (`bool`, *optional*, defaults to `False`):
            Whether activations are recomputed in the backward pass instead of kept. This saves memory with
            `curvature="central_difference"`, and hardly any with `"exact"`.
        curvature (`str`, *optional*, defaults to `"exact"`): How Hessian-vector products are computed.

            - `"exact"`: by double backward, see [`~trl_dpg.metagradients.method.exact.Exact`].
            - `"central_difference"`: from two gradients, one on each side, see
              [`~trl_dpg.metagradients.method.central_difference.CentralDifference`]. This takes less time and the memory of ordinary
              training. In float32, results have about three correct digits.
        curvature_tolerance (`float`, *optional*, defaults to `1e-2`):
            Largest accepted relative error of a central difference, as estimated. A step with a larger error is repeated exactly.
        tape (`str`, *optional*, defaults to `"auto"`):
            Where the tape lies, the gradients of all steps that the adjoint sweep needs: in the memory of the `"device"` or of the
            `"host"`, or on `"disk"`. Per step, it takes at most 1.1 times the size of the trained parameters. On host and disk,
            cotangents of the optimizer's state take up to twice the size of the trained parameters for a while. `"auto"` takes the
            first of the three with enough room: half of the free memory, or all of the disk's free room.
        tape_dir (`str`, *optional*):
            Directory of a tape on disk. `None` means the system's directory for temporary files, or `/var/tmp` if the first one is in
            memory (tmpfs). If both are in memory, there is no tape on disk.
        disable_tqdm (`bool`, *optional*): Whether to hide the progress bar. `None` shows the bar on a terminal only.

    Raises:
        [`ValueError`]: If a field is out of its range. The message names the field, its value and the remedy.

    Example:

    ```python
    >>> from trl_dpg.metagradients import TargetTrainingArguments

    >>> args = TargetTrainingArguments(learning_rate=1e-3, batch_size=2, lr_scheduler_type="linear")
    >>> args.num_steps(num_examples=5)
    3
    >>> args.learning_rates(num_examples=4)
    [0.001, 0.0005]

    ```
    """

    optim: str | type[Update] = "adamw"
    learning_rate: float = 1e-5
    weight_decay: float = 0.0
    weight_decay_on_norm_and_bias: bool = True
    momentum: float | None = None
    nesterov: bool | None = None
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_epsilon: float = 1e-8
    adam_epsilon_root: float | Literal["auto"] = "auto"
    lr_scheduler_type: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant"
    warmup_steps: float = 0
    max_grad_norm: float = 0.0
    num_train_epochs: int = 1
    batch_size: int = 16
    micro_batch_size: int | None = None
    micro_batch_tokens: int | None = None
    max_length: int = 128
    shuffle: bool = True
    seed: int = 0
    loss_normalization: Literal["batch_tokens", "example", "max_length"] = "batch_tokens"
    bf16: bool = False
    gradient_checkpointing: bool = False
    curvature: Literal["exact", "central_difference"] = "exact"
    curvature_tolerance: float = 1e-2
    tape: Literal["auto", "device", "host", "disk"] = "auto"
    tape_dir: str | None = None
    disable_tqdm: bool | None = None

    def __post_init__(self):
        known = isinstance(self.optim, str) and self.optim in UPDATES
        if not known and not (isinstance(self.optim, type) and issubclass(self.optim, Update)):
            raise ValueError(
                f"`optim` must be one of {', '.join(map(repr, UPDATES))} or an `Update`, got {self.optim!r}."
            )
        for name, value in checked(self).items():
            object.__setattr__(self, name, value)

    @classmethod
    def from_sft_config(cls, config: "SFTConfig", **overrides) -> "TargetTrainingArguments":
        r"""
        Makes the recipe of a plain [`~trl.SFTTrainer`] run from its configuration. `overrides` replace fields that are read from it.

        The batch size is the config's per-device batch size times its accumulation steps times its processes.
        `adam_epsilon_root` is `0.0`, as in [`~torch.optim.AdamW`]; override it to make metagradients well-conditioned.

        The recipe does not say which tokens have a loss: the examples do. A config with `completion_only_loss=False` or
        `assistant_only_loss=True` is therefore refused, unless you name the field among the overrides. By naming it you state that
        the examples were tokenized accordingly (by `target_` fields of the trainer, or by arguments of [`MetagradientReward`] or
        [`~trl_dpg.data.dataset_examples`]).

        The run of the recipe differs from one of [`~trl.SFTTrainer`] in four ways:

        - There is no dropout and no mixed precision.
        - Shuffled examples have another order. With `train_sampling_strategy="sequential"`, batches are the same.
        - `SFTTrainer` drops examples without any label before it forms batches. Rewards and validation do so too; [`compute_metagradients`] does not.
        - If a model's class is not named `...ForCausalLM` (GPT-2), Transformers counts an example's first label in the loss's
          denominator, although nothing predicts the first token. With this label at -100, the two agree.

        Raises:
            [`ValueError`]: If the config asks for something that this recipe cannot express.
        """
        return cls(**recipe_of_sft(config, overrides))

    @property
    def rule_class(self) -> type[Update]:
        """The class of update rules that `optim` names."""
        return UPDATES[self.optim] if isinstance(self.optim, str) else self.optim

    def num_steps(self, num_examples: int) -> int:
        """Optimizer steps K over `num_examples` examples."""
        return self.num_train_epochs * math.ceil(num_examples / self.batch_size)

    def learning_rates(self, num_examples: int) -> list[float]:
        """Learning rate of each of the K steps, from [`~transformers.get_scheduler`]."""
        num_steps = self.num_steps(num_examples)
        if num_steps == 1 and self.warmup_steps > 0:
            warnings.warn(
                f"The only step on {num_examples} examples is the first of `warmup_steps` {self.warmup_steps}: its learning rate is 0, "
                "and nothing is trained. Set `warmup_steps` to 0, or lower `batch_size` for more steps.",
                stacklevel=2,
            )
        warmup = int(self.warmup_steps) if self.warmup_steps >= 1 else math.ceil(num_steps * self.warmup_steps)
        (factor,) = get_scheduler(
            self.lr_scheduler_type, torch.optim.SGD([torch.zeros(1)]), warmup, num_steps
        ).lr_lambdas
        return [self.learning_rate * factor(step) for step in range(num_steps)]

    def batches(self, num_examples: int) -> Iterator[list[int]]:
        """Indices of the examples of each of the K batches, in order."""
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.num_train_epochs):
            order = torch.randperm(num_examples, generator=generator) if self.shuffle else torch.arange(num_examples)
            yield from (batch.tolist() for batch in order.split(self.batch_size))
