"""The training loss and its gradient: from the examples of a micro-batch to the losses of their tokens."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import ChunkedHead
from ..runtime.examples import MicroBatch
from ..runtime.host import double
from ..runtime.model import TargetModel
from ..runtime.workspace import Workspace


class TokenLosses(nn.Module):
    r"""
    Maps a micro-batch to the losses of its supervised tokens, \\( \ell_{ij}(\phi) / Z_t \\), shape `(t, 1)`.

    Weighted by \\( w_i \\) and summed over a batch, these losses give \\( L_t(\phi; w) \\). With `candidates`, the shape is
    `(t, 1 + k)`: the columns after the first hold losses of candidates, \\( -\log p(v \mid x_{<j}) / Z_t \\), or 0 for none.

    If there are many logits and the model allows it, they are computed chunk by chunk, see [`~trl_dpg.metagradients.kernels`].

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): The model, already in evaluation mode.
        bf16 (`bool`): Whether the model runs under bfloat16 autocast.
    """

    def __init__(self, model: TargetModel, bf16: bool):
        super().__init__()
        self.model = model
        self.bf16 = bf16
        self.head = ChunkedHead(model)

    def forward(self, batch: MicroBatch, candidates: bool = False) -> Tensor:
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
        targets = batch.labels[:, 1:, None]
        if candidates and batch.candidates.shape[2] > 0:
            targets = torch.cat([targets, batch.candidates[:, 1:]], dim=2)
        rows, columns = batch.supervised()
        if not self.bf16 and self.head.suits(targets[..., 0].numel()):
            targets = targets[rows, columns]
            losses = self.head.losses(inputs, (rows, columns), targets, batch.inverse_z)
        else:
            with torch.autocast(targets.device.type, torch.bfloat16, enabled=self.bf16):
                logits = self.model(**inputs).logits[:, :-1]
            if logits.dtype in (torch.float16, torch.bfloat16):
                logits = logits.float()
            losses = -F.log_softmax(logits, dim=-1).gather(2, targets.clamp(min=0)).flatten(0, 1)
            targets = targets.flatten(0, 1)
            if len(rows) < len(losses):  # padding, or tokens that are not supervised
                supervised = rows * logits.shape[1] + columns
                losses, targets = losses.index_select(0, supervised), targets.index_select(0, supervised)
        losses = losses * batch.inverse_z[rows, None]  # Z_t may depend on the example, see `loss_normalization`
        return losses if targets.shape[1] == 1 else losses.masked_fill(targets < 0, 0.0)


def accumulate_gradient(
    losses: TokenLosses,
    space: Workspace,
    batches: list[MicroBatch],
    example_losses: Tensor,
    before_backward: Callable[[], None],
) -> float:
    r"""
    Accumulates the gradient \\( g_t = \nabla_\phi L_t(\phi_t; w) \\) of micro-batches, and returns their loss. Writes
    \\( \ell_i(\phi_t) / Z_t \\) to `example_losses`, shape `(n,)`. Calls `before_backward` before each backward pass. Takes about as long
    as 3 forward passes.
    """
    total = 0.0
    for batch in batches:
        values = losses(batch)
        before_backward()
        values.backward(batch.token_weights(), inputs=space.params)
        examples = batch.example_sums(values.detach()[:, 0])
        example_losses[batch.indices] = examples
        total += torch.dot(examples, double(batch.weights)).item()
    return total
