"""Words that were not written: what the policy says of them, from the forward pass that TRL makes anyway."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..metagradients.kernels.chunked_head import ADJUSTMENTS


ALL_WORDS = 4096  # vocabularies up to this size are candidates as a whole, unless told otherwise
CANDIDATES = 64  # of larger ones, the most likely
CHUNK = 1 << 24  # numbers: rows of the LM head that are taken at a time


def expected_credit(log_probs: Tensor, credits: Tensor) -> Tensor:
    r"""
    \\( \sum_v \pi(v) (r(v) - b) \\) of each position, shape `(b, t)`, with the policy's own mean of the candidates as \\( b \\): of
    words that are no candidates nothing is known, and nothing is done to them as a whole.

    Args:
        log_probs (`Tensor`): Of the candidates, shape `(b, t, k)`.
        credits (`Tensor`): \\( r(v) \\), of the same shape; NaN for none.
    """
    known = ~credits.isnan()
    credits = torch.where(known, credits, 0.0)
    probs = torch.where(known, log_probs, -torch.inf).exp()
    fixed = probs.detach()
    mean = (fixed * credits).sum(dim=2, keepdim=True) / fixed.sum(dim=2, keepdim=True).clamp(min=1e-30)
    return (probs * (credits - mean)).sum(dim=2)


def changed_logits(model: PreTrainedModel) -> dict[str, Any]:
    """What a model's configuration says that it does to its logits, beyond the LM head's product."""
    config = model.config.get_text_config().to_dict()
    names = (*ADJUSTMENTS, "output_multiplier")
    return {name: config[name] for name in names if config.get(name) not in (None, 1.0)}


def changed_words(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Words that a tokenizer reads as other ones, such as "Cat" where it lower-cases all text."""
    normalizer = tokenizer.backend_tokenizer.normalizer if tokenizer.is_fast else None  # type: ignore[attr-defined]
    if normalizer is None:
        return set()
    ids, space = list(tokenizer.get_vocab().values()), " \u2581"
    texts = [text.strip(space) for text in tokenizer.batch_decode([[i] for i in ids])]
    # A part of a character is no text yet.
    return {
        i
        for i, t in zip(ids, texts, strict=True)
        if "\ufffd" not in t and normalizer.normalize_str(t).strip(space) != t
    }


class CandidateLogits(torch.autograd.Function):
    r"""
    Logits \\( z_{jm} = \langle h_j, W_{v_{jm}} \rangle \\) of some words at each position, shape `(n, k)`, in float32.

    The rows of W that belong to them, `n * k * d` numbers, are taken in chunks of positions, here and in the backward pass.
    """

    @staticmethod
    def forward(ctx, hidden, weight, ids):
        ctx.save_for_backward(hidden, weight, ids)
        logits = torch.empty(ids.shape, dtype=torch.float32, device=hidden.device)
        for c in CandidateLogits.chunks(hidden, ids):
            logits[c] = torch.bmm(weight[ids[c]].float(), hidden[c].float()[:, :, None])[:, :, 0]
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx, cotangent):
        hidden, weight, ids = ctx.saved_tensors
        of_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        of_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for c in CandidateLogits.chunks(hidden, ids):
            if of_hidden is not None:
                of_hidden[c] = torch.bmm(cotangent[c][:, None], weight[ids[c]].float())[:, 0].to(hidden.dtype)
            if of_weight is not None:
                rows = cotangent[c][:, :, None] * hidden[c].float()[:, None]
                of_weight.index_add_(0, ids[c].flatten(), rows.flatten(0, 1).to(weight.dtype))
        return of_hidden, of_weight, None

    @staticmethod
    def chunks(hidden: Tensor, ids: Tensor) -> list[slice]:
        size = max(1, CHUNK // (ids.shape[1] * hidden.shape[1]))
        return [slice(start, start + size) for start in range(0, len(ids), size)]


class CandidateHead:
    r"""
    Log-probabilities of candidates, from the very forward pass in which TRL computes those of the completions.

    TRL's forward pass returns log-probabilities instead of logits. This wraps it once more, and takes the hidden states from
    its backbone. With \\( z \\) the logits, \\( \log \pi(v) = \log \pi(x) + z_v - z_x \\) needs no logits but the candidates'.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The generator, without adapters around it, after TRL gave it a fused LM head.
        temperature (`float`):
            What logits are divided by.
    """

    def __init__(self, model: PreTrainedModel, temperature: float):
        self.temperature = temperature
        self.result: Tensor | None = None
        self.of_tokens: Tensor | None = None  # log-probabilities of the sequences' own tokens, as TRL gets them
        self._compute: Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor], Tensor] | None = None
        self._hidden: Tensor | None = None
        model.base_model.register_forward_hook(self._keep_hidden)
        forward = model.forward

        def with_candidates(*args, **kwargs):
            output = forward(*args, **kwargs)
            if self._compute is not None:
                head: Any = model.get_output_embeddings()
                weight, bias = head.weight, head.bias
                if isinstance(weight, DTensor):  # in shards, as TRL's own
                    weight, bias = weight.full_tensor(), None if bias is None else bias.full_tensor()
                self.of_tokens = output.log_probs
                self.result = self._compute(self._hidden, kwargs["labels"], weight, bias, output.log_probs)  # type: ignore[arg-type]
                # FSDP gathers weights again for the backward pass of what a module returns, so it is returned in a free field.
                output.mean_logits = self.result
            return output

        model.forward = with_candidates

    @contextmanager
    def most_likely(self, num_tokens: int, num_candidates: int) -> Iterator["CandidateHead"]:
        """While it is open, a forward pass leaves the most likely words at its last tokens in `result`: `(b, num_tokens, k)`."""

        def compute(hidden, labels, weight, bias, log_probs):
            rows = hidden[:, -num_tokens - 1 : -1]
            return torch.stack([F.linear(row, weight, bias).topk(num_candidates, dim=1).indices for row in rows])

        with self._computing(compute):
            yield self

    @contextmanager
    def log_probs(self, num_tokens: int, num_candidates: int, ids: Tensor | None) -> Iterator["CandidateHead"]:
        """
        While it is open, a forward pass leaves log-probabilities at its last tokens in `result`, shape `(b, num_tokens, k)`: of
        candidates `ids`, of that shape, or else of the first `num_candidates` words.
        """

        def compute(hidden, labels, weight, bias, log_probs):
            hidden = hidden[:, -num_tokens - 1 : -1]
            if ids is None:
                logits = F.linear(hidden, weight, bias).float() / self.temperature
                return logits.log_softmax(dim=2)[..., :num_candidates]
            every = torch.cat([ids, labels[:, -num_tokens:, None]], dim=2).clamp(min=0)
            logits = CandidateLogits.apply(hidden.flatten(0, 1), weight, every.flatten(0, 1)).view(every.shape)
            logits = (logits if bias is None else logits + bias[every]) / self.temperature
            return log_probs[:, -num_tokens:, None] + logits[..., :-1] - logits[..., -1:]

        with self._computing(compute):
            yield self

    @contextmanager
    def _computing(self, compute) -> Iterator[None]:
        self._compute = compute
        try:
            yield
        finally:
            self._compute = self._hidden = self.result = self.of_tokens = None

    def _keep_hidden(self, module, args, output) -> None:
        if self._compute is not None:
            self._hidden = output.last_hidden_state
