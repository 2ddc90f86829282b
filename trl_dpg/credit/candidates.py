"""Log-probabilities of candidates (words, that is tokens, that could stand at a position), from TRL's own forward pass."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from ..metagradients.kernels.chunked_head import ADJUSTMENTS


ALL_WORDS = 4096  # by default, all words of a vocabulary of up to this size are candidates
CANDIDATES = 64  # default number of candidates from a larger vocabulary: the most likely words
CHUNK = 1 << 24  # numbers in the rows of the LM head that are copied at a time


def expected_credit(log_probs: Tensor, credits: Tensor) -> Tensor:
    r"""
    \\( \sum_v \pi(v) (r(v) - b) \\) of each position, shape `(b, t)`, where \\( b \\) is the policy's own mean over the candidates.

    The baseline \\( b \\) makes the value 0. The derivative in \\( \log \pi(v) \\) is \\( \pi(v) (r(v) - b) \\). These derivatives sum to
    0 too, so they move probability among the candidates, and leave the total of all other words as it is.

    Args:
        log_probs (`Tensor`): Log-probabilities of the candidates, shape `(b, t, k)`.
        credits (`Tensor`): Credits \\( r(v) \\), of the same shape; NaN for none.
    """
    return _ExpectedCredit.apply(log_probs, credits)


class _ExpectedCredit(torch.autograd.Function):
    @staticmethod
    def forward(ctx, log_probs, credits):
        # Outside the loss, TRL gives tokens the log-probability 0, so that of a candidate can be above 0 there, even huge.
        probs = log_probs.clamp(max=0.0).exp_().masked_fill_(credits.isnan(), 0.0)
        credits = credits.nan_to_num(nan=0.0)
        mean = torch.linalg.vecdot(probs, credits) / probs.sum(dim=2).clamp(min=1e-30)
        ctx.save_for_backward(probs.mul_(credits.sub_(mean[..., None])))
        return torch.zeros_like(mean)

    @staticmethod
    @once_differentiable
    def backward(ctx, cotangent):
        (slopes,) = ctx.saved_tensors
        return slopes * cotangent[..., None], None


def with_sampled(likely: Tensor, sampled: Tensor) -> Tensor:
    """Most likely words, shape `(b, t, k)`, likeliest first. Where the sampled one, `(b, t)`, is missing, it replaces the last."""
    missing = (likely != sampled[..., None]).all(dim=2)
    return torch.cat([likely[..., :-1], torch.where(missing, sampled, likely[..., -1])[..., None]], dim=2)


def changed_logits(model: PreTrainedModel) -> dict[str, Any]:
    """Fields of a model's configuration by which it changes its logits after the LM head."""
    config = model.config.get_text_config().to_dict()
    names = (*ADJUSTMENTS, "output_multiplier")
    return {name: config[name] for name in names if config.get(name) not in (None, 1.0)}


def changed_words(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Words that a tokenizer reads as other words, such as "Cat" if it lower-cases all text."""
    normalizer = tokenizer.backend_tokenizer.normalizer if tokenizer.is_fast else None  # type: ignore[attr-defined]
    if normalizer is None:
        return set()
    ids, space = list(tokenizer.get_vocab().values()), " \u2581"
    texts = [text.strip(space) for text in tokenizer.batch_decode([[i] for i in ids])]
    # A word that holds only a part of a character has no text to compare.
    return {
        i
        for i, t in zip(ids, texts, strict=True)
        if "\ufffd" not in t and normalizer.normalize_str(t).strip(space) != t
    }


class CandidateLogits(torch.autograd.Function):
    r"""
    Logits \\( z_{jm} = \langle h_j, W_{v_{jm}} \rangle \\) of some words at each position, shape `(n, k)`, in float32.

    Both passes copy rows of W, `n * k * d` numbers in all, for one chunk of positions at a time.
    """

    @staticmethod
    def forward(ctx, hidden, weight, ids):
        ctx.save_for_backward(hidden, weight, ids)
        logits = torch.empty(ids.shape, dtype=torch.float32, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
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
    Computes log-probabilities of candidates from the hidden states of TRL's own forward pass.

    TRL replaces the model's `forward` by one that returns log-probabilities instead of logits. This class wraps that one.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The generator, without adapters around it, after TRL gave it a fused LM head.
        temperature (`float`):
            Sampling temperature, which logits are divided by.
    """

    def __init__(self, model: PreTrainedModel, temperature: float):
        self.temperature = temperature
        self.result: Tensor | None = None
        self.of_tokens: Tensor | None = None  # log-probabilities of the sequences' own tokens, which TRL computes
        self._most_likely: tuple[int, int] | None = None  # number of tokens and of candidates
        self._log_probs: tuple[int, int, Tensor | None] | None = None  # tokens, candidates, and their ids
        self._hidden: Tensor | None = None
        model.base_model.register_forward_hook(self._keep_hidden)
        forward = model.forward

        def with_candidates(*args, **kwargs):
            if self._most_likely is not None:
                hidden = model.base_model(*args, **kwargs, use_cache=False).last_hidden_state
                self.result = self._find_most_likely(hidden, *_head(model))
                return ModelOutput()
            output = forward(*args, **kwargs)
            if self._log_probs is not None:
                self.result = self._compute(self._hidden, kwargs["labels"], *_head(model), output.log_probs.detach())
                # FSDP only gathers weights again to differentiate what a module returns, so an unused field returns the result.
                output.mean_logits = self.result
            return output

        model.forward = with_candidates

    @contextmanager
    def most_likely(self, num_tokens: int, num_candidates: int) -> Iterator["CandidateHead"]:
        """
        While it is open, a forward pass returns nothing, and leaves the most likely words at its last tokens in `result`, shape
        `(b, num_tokens, k)`, the likeliest first.
        """
        self._most_likely = num_tokens, num_candidates
        try:
            yield self
        finally:
            self._most_likely = self.result = None

    @contextmanager
    def log_probs(self, num_tokens: int, num_candidates: int, ids: Tensor | None) -> Iterator["CandidateHead"]:
        r"""
        Inside the context, a forward pass also puts log-probabilities at its last tokens into `result`, shape `(b, num_tokens, k)`.
        The words are `ids`, of the same shape, or else the first `num_candidates` of the vocabulary.

        The log-probabilities are logits minus the normalizer \\( \log \sum_v e^{z_v} = z_x - \log \pi(x) \\). The normalizer is
        detached from the graph. The slopes of [`expected_credit`] sum to 0, so its gradient would be zero anyway.
        """
        self._log_probs = num_tokens, num_candidates, ids
        try:
            yield self
        finally:
            self._log_probs = self._hidden = self.result = self.of_tokens = None

    def around(self, model: Callable[..., Any]) -> Callable[..., Any]:
        """
        The model, as TRL calls it, that keeps its log-probabilities in `of_tokens` as a tensor of their own. To differentiate in what
        the model itself returns would start a backward pass of FSDP or DeepSpeed.
        """

        def forward(*args, **kwargs):
            output = model(*args, **kwargs)
            output.log_probs = self.of_tokens = output.log_probs.view_as(output.log_probs)
            return output

        return forward

    def _find_most_likely(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        num_tokens, num_candidates = self._most_likely  # type: ignore[misc]
        rows = hidden[:, -num_tokens - 1 : -1].to(weight.dtype)  # which `cast_lm_head_to_fp32` changes
        return torch.stack([F.linear(row, weight, bias).topk(num_candidates).indices for row in rows])

    def _compute(self, hidden, labels, weight, bias, log_probs) -> Tensor:
        num_tokens, num_candidates, ids = self._log_probs  # type: ignore[misc]
        hidden = hidden[:, -num_tokens - 1 : -1]
        if ids is None:
            with torch.autocast(hidden.device.type, enabled=False):
                logits = F.linear(hidden.to(weight.dtype), weight, bias).float() / self.temperature
            return logits[..., :num_candidates] - logits.detach().logsumexp(dim=2, keepdim=True)
        every = torch.cat([ids, labels[:, -num_tokens:, None]], dim=2).clamp(min=0)
        logits = CandidateLogits.apply(hidden.flatten(0, 1), weight, every.flatten(0, 1)).view(every.shape)
        logits = (logits if bias is None else logits + bias[every]) / self.temperature
        return logits[..., :-1] - (logits[..., -1:].detach() - log_probs[:, -num_tokens:, None])

    def _keep_hidden(self, module, args, output) -> None:
        if self._log_probs is not None:
            self._hidden = output.last_hidden_state


def _head(model: PreTrainedModel) -> tuple[Tensor, Tensor | None]:
    head: Any = model.get_output_embeddings()
    weight, bias = head.weight, head.bias
    if isinstance(weight, DTensor):  # in shards; TRL gathers it in the same way
        return weight.full_tensor(), None if bias is None else bias.full_tensor()
    return weight, bias
