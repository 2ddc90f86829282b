"""Cross-entropy of an LM head in chunks. The loss and its two derivatives never hold the logits of a whole batch."""

from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from ..runtime.model import TargetModel, is_compiled
from ..runtime.sharding import ShardedParameter, is_gathered
from .linear import zeros
from .switches import SWITCHES


# Logits of one chunk. Each chunk reads the whole weight of the head, which takes most of the time if chunks are small.
CHUNK = {"cpu": 1 << 21, "cuda": 1 << 25}
ADJUSTMENTS = ("final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier")


class ChunkedHead:
    """
    Computes the losses of tokens from logits that it computes chunk by chunk.

    If the head is in half precision and the model allows it, logits are always computed in chunks, in the precision of the trained
    parameters. Otherwise rounding would depend on the size of micro-batches.
    """

    def __init__(self, model: TargetModel):
        self.model = model

    def suits(self, num_tokens: int) -> bool:
        """Whether to compute in chunks: the tokens have many logits, and the model allows it."""
        head = self.model.get_output_embeddings().weight
        # Processes with shards must make the same calls, whatever their number of tokens.
        always = isinstance(head, ShardedParameter) or head.dtype in (torch.float16, torch.bfloat16)
        return (always or num_tokens * len(head) > SWITCHES.logits_at_once) and self.is_plain

    @cached_property
    def is_plain(self) -> bool:
        """See [`has_plain_head`]."""
        return has_plain_head(self.model)

    def losses(self, inputs: dict[str, Any], places: tuple[Tensor, Tensor], targets: Tensor, like: Tensor) -> Tensor:
        """Cross-entropies of `targets`, shape `(t, m)`, as predicted at `places` (rows and columns), in the dtype of `like`."""
        decoder, head = decoder_and_head(self.model)
        hidden = decoder(**inputs).last_hidden_state[places]
        return token_losses(hidden.to(like), head.weight.to(like), targets.clamp(min=0))


def decoder_and_head(model: TargetModel) -> tuple[nn.Module, Any]:
    """The model without its LM head, and the LM head."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return base.base_model, base.get_output_embeddings()


def has_plain_head(model: TargetModel) -> bool:
    """
    Whether the logits are the product of the head's weight and the decoder's last hidden state, and nothing more.

    The configuration says whether a model scales or caps its logits. Anything else that a model may do shows in a trial on a few
    tokens. For compiled models, the answer is no.
    """
    decoder, head = decoder_and_head(model)
    config = model.config.get_text_config().to_dict()
    adjusted = any(config.get(name) not in (None, 1.0) for name in ADJUSTMENTS)
    is_linear = type(head).forward is nn.Linear.forward  # `fully_shard` makes a class of its own
    is_linear = is_linear and head.bias is None and isinstance(decoder, PreTrainedModel)
    if not is_linear or adjusted or is_compiled(model):
        return False
    ids = torch.arange(min(8, len(head.weight)), device=head.weight.device)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    with torch.no_grad():
        logits = model(**inputs).logits
        # The "decoder" may be the model itself (one without a `base_model_prefix`), which returns no hidden state.
        hidden = getattr(decoder(**inputs), "last_hidden_state", None)
        if hidden is None or hidden.shape[-1] != head.in_features or not logits.any():
            return False
        return torch.allclose(head(hidden), logits, rtol=1e-4, atol=1e-5 * logits.abs().max().item())


def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    r"""
    Cross-entropies \\( \ell_{jm} = \log \sum_k e^{z_{jk}} - z_{j y_{jm}} \\) with \\( z_j = W h_j \\), twice differentiable.

    \\( h \\) has the shape `(n, d)`, \\( W \\) `(v, d)`, and \\( y \\) `(n, m)`: `m` tokens whose loss is wanted at each position.
    """
    if torch.is_grad_enabled():
        return _TokenLosses.apply(hidden, weight, targets)
    h, w = forward_ad.unpack_dual(hidden), forward_ad.unpack_dual(weight)
    if h.tangent is None and w.tangent is None:
        return _forward(hidden, weight, targets)
    change = _forward_mode(h, w, targets)
    return forward_ad.make_dual(torch.zeros_like(change), change)  # zeros, as only the tangent is read


def _forward(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return torch.cat(
        [-F.log_softmax(hidden[c] @ weight.T, dim=1).gather(1, targets[c]) for c in _chunks(hidden, weight)]
    )


def _forward_mode(hidden, weight, targets: Tensor) -> Tensor:
    r"""\\( \langle p_j, u_j \rangle - u_{j y_{jm}} \\), where \\( u_j \\) is the tangent of the logits. Either input may lack a tangent."""
    changes = []
    for c in _chunks(hidden.primal, weight.primal):
        h = hidden.primal[c]
        change: Any = 0 if hidden.tangent is None else hidden.tangent[c] @ weight.primal.T
        if weight.tangent is not None:
            change = change + h @ weight.tangent.T
        change -= change.gather(1, targets[c, :1])  # see the constant in the docstring of `_TokenLossGradients`
        mean = torch.linalg.vecdot(_softmax(h @ weight.primal.T), change)
        changes.append(mean[:, None] - change.gather(1, targets[c]))
    return torch.cat(changes)


def _chunks(hidden: Tensor, weight: Tensor):
    chunk = SWITCHES.chunk or CHUNK.get(weight.device.type, CHUNK["cuda"])
    size = max(1, chunk // len(weight))
    return [slice(i, i + size) for i in range(0, max(len(hidden), 1), size)]


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets):
        ctx.save_for_backward(hidden, weight, targets)
        return _forward(hidden, weight, targets)

    @staticmethod
    def backward(ctx, cotangent):
        hidden, weight, targets = ctx.saved_tensors
        second_order = torch.is_grad_enabled() and (weight.is_leaf or is_gathered(weight))
        wanted = (*ctx.needs_input_grad[:2], second_order)
        return *_TokenLossGradients.apply(cotangent, hidden, weight, targets, *wanted), None


def _error_(p: Tensor, targets: Tensor, cotangent: Tensor) -> Tensor:
    """\\( e_j \\) of [`_TokenLossGradients`]. Overwrites the probabilities `p`."""
    return p.mul_(cotangent.sum(dim=1, keepdim=True)).scatter_add_(1, targets, -cotangent)


class _TokenLossGradients(torch.autograd.Function):
    r"""
    The gradients of the cross-entropies, as a function with a derivative of its own.

    Forward: let \\( c_{jm} \\) be the cotangent of \\( \ell_{jm} \\), \\( C_j = \sum_m c_{jm} \\) and
    \\( e_j = C_j p_j - \sum_m c_{jm} \mathrm{onehot}(y_{jm}) \\). The gradients are \\( a_j = W^\top e_j \\) of \\( h_j \\) and
    \\( B = \sum_j e_j h_j^\top \\) of \\( W \\).

    Backward: let \\( \alpha_j, \beta \\) be the cotangents of \\( a_j, B \\), \\( u_j = W \alpha_j + \beta h_j \\) the change of the
    logits, and \\( q_j = C_j p_j \odot (u_j - \langle p_j, u_j \rangle) \\). Then
    \\( \bar c_{jm} = \langle p_j, u_j \rangle - u_{j y_{jm}} \\), \\( \bar h_j = W^\top q_j + \beta^\top e_j \\),
    \\( \bar W = \sum_j (q_j h_j^\top + e_j \alpha_j^\top) \\).

    Adding a constant to \\( u_j \\) changes none of the results. The constant that makes \\( u_{j y_{j1}} = 0 \\) is added. Without it,
    \\( \bar c \\) of a token whose probability is near 1 would be a difference of nearly equal numbers.
    """

    @staticmethod
    def forward(ctx, cotangent, hidden, weight, targets, for_hidden, for_weight, second_order):
        ctx.save_for_backward(cotangent, hidden, weight, targets)
        ctx.set_materialize_grads(False)
        of_hidden = torch.empty_like(hidden) if for_hidden else None
        of_weight = None
        if for_weight:  # a second-order graph differentiates this gradient, but does not read its value
            of_weight = zeros(weight, weight.shape) if second_order else torch.zeros_like(weight)
        for c in _chunks(hidden, weight):
            error = _error_(_softmax(hidden[c] @ weight.T), targets[c], cotangent[c])
            if for_hidden:
                torch.mm(error, weight, out=of_hidden[c])
            if for_weight and not second_order:
                of_weight.addmm_(error.T, hidden[c])
        return of_hidden, of_weight

    @staticmethod
    @once_differentiable
    def backward(ctx, alpha, beta):
        cotangent, hidden, weight, targets = ctx.saved_tensors
        if alpha is None and beta is None:
            return (None,) * 7
        of_cotangent = torch.empty_like(cotangent)
        of_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[1] else None
        of_weight = torch.zeros_like(weight) if ctx.needs_input_grad[2] else None
        for c in _chunks(hidden, weight):
            h = hidden[c]
            if alpha is None:
                change = h @ beta.T
            else:
                change = alpha[c] @ weight.T if beta is None else torch.addmm(alpha[c] @ weight.T, h, beta.T)
            change -= change.gather(1, targets[c, :1])
            p = _softmax(h @ weight.T)
            mean = (p * change).sum(dim=1, keepdim=True)
            of_cotangent[c] = mean - change.gather(1, targets[c])
            q = change.sub_(mean).mul_(p).mul_(cotangent[c].sum(dim=1, keepdim=True))
            error = _error_(p, targets[c], cotangent[c])
            if of_hidden is not None:
                torch.mm(q, weight, out=of_hidden[c])
                if beta is not None:
                    of_hidden[c].addmm_(error, beta)
            if of_weight is not None:
                of_weight.addmm_(q.T, h)
                if alpha is not None:
                    of_weight.addmm_(error.T, alpha[c])
            del change, p, error, q  # frees the memory before the next chunk
        return of_cotangent, of_hidden, of_weight, None, None, None, None


def _softmax(logits: Tensor) -> Tensor:
    """Overwrites the logits."""
    return torch.softmax(logits, dim=1, out=logits)
