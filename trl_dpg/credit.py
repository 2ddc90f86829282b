r"""
Credit: which of the generator's tokens earned a completion's metagradient.

The target's loss is a sum over the target's tokens, and so is a metagradient. Its terms go back to the generator's tokens
([`written_by`]) and become advantages of shape `(B, T)` ([`TokenAdvantages`]). Where generator and target share a vocabulary, the
term of a position is also known for words that were not written, so that it needs no sampling ([`CandidateHead`]).
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .data import special_ids
from .data import turns as turns_of
from .metagradients.vocabulary import ADJUSTMENTS


NOT_WRITTEN = -1  # a token of the target that the generator did not write: BOS, a prompt, a template
ALL_WORDS = 4096  # vocabularies up to this size are candidates as a whole, unless told otherwise
CANDIDATES = 64  # of larger ones, the most likely
ROUNDING = 1e-6  # of the largest value: by which values of equal completions may differ, in different rows of a batch


def written_by(
    completion: Sequence[str],
    completion_ids: list[int],
    generator_tokenizer: PreTrainedTokenizerBase,
    text: str,
    input_ids: list[int],
    target_tokenizer: PreTrainedTokenizerBase,
    ended: bool,
    tool_mask: list[int] | None = None,
) -> list[int]:
    """
    For each of the target's tokens, the generator's token that wrote it.

    The two meet in the characters. A token of the target belongs to the generator's token that completes its last character.
    So no token of the generator is left out of what depends on it: its reward-to-go holds all that it took part in.

    Args:
        completion (`Sequence[str]`):
            What the generator wrote, in parts that occur in this order in `text`: several if tools were called.
        completion_ids (`list[int]`):
            The same in the generator's tokens, with the token that ended it.
        generator_tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the generator.
        text (`str`):
            What the target is trained on.
        input_ids (`list[int]`):
            The same in the target's tokens.
        target_tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the target.
        ended (`bool`):
            Whether the last of `completion_ids` ended the completion, and the last of `input_ids` says so to the target.
        tool_mask (`list[int]`, *optional*):
            For each of `completion_ids`, 1 if the generator wrote it and 0 if a tool did. Several parts need it.

    Returns:
        `list[int]`: Indices into `completion_ids`, -1 for a token that the generator did not write.

    Raises:
        [`ValueError`]: If a part of `completion` does not occur in `text`.
    """
    body = completion_ids[:-1] if ended else completion_ids
    end = [len(body)] if ended else []
    num_before = len(input_ids) - len(body) - len(end)  # a BOS token
    same_text = len(completion) == 1 and text == completion[0]
    if same_text and num_before in (0, 1) and input_ids[num_before : num_before + len(body)] == body:
        return [NOT_WRITTEN] * num_before + [*range(len(body)), *end]

    owner = [NOT_WRITTEN] * len(text)  # of each character
    before = len(text)
    turns = turns_of((tool_mask or [1] * len(completion_ids))[: len(body)])
    if len(turns) < len(completion):
        turns = [range(len(body))] * len(completion)
    # From the last to the first: a prompt stands before the completion, and may hold the same words.
    for part, turn in reversed(list(zip(completion, turns, strict=True))):
        start = text.rfind(part, 0, before)
        if start < 0:
            part = part.strip()
            start = text.rfind(part, 0, before)
        if start < 0:
            raise ValueError(
                f"`formatting_func` returned {text!r:.80}, in which the completion {part!r:.80} does not occur as it is, so "
                "`credit_assignment` cannot tell which of its tokens the generator wrote. Keep the completion's text, or set "
                '`credit_assignment="sequence"`.'
            )
        turn_ids = body[turn.start : turn.stop]
        generated = _decode(generator_tokenizer, turn_ids)
        if part not in generated:  # what a parser of tool calls changed is its last token's, which has seen all of it
            generated = part
        ends = _ends(generator_tokenizer, turn_ids, generated)
        found = generated.index(part)
        for i in range(len(part)):
            owner[start + i] = turn.start + min(bisect_right(ends, found + i), len(turn_ids) - 1)
        before = start
    tokens = input_ids[:-1] if ended else input_ids
    return [owner[c] if c >= 0 else NOT_WRITTEN for c in _last_characters(target_tokenizer, tokens, text)] + end


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))  # as TRL does


def _offsets(tokenizer: PreTrainedTokenizerBase, ids: list[int], text: str) -> list[tuple[int, int]] | None:
    """Spans of characters of each token, if that is how the tokenizer takes the text apart. Special tokens are at (0, 0)."""
    if not tokenizer.is_fast:
        return None
    special = special_ids(tokenizer)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    if encoded["input_ids"] != [token for token in ids if token not in special]:
        return None
    spans = iter(encoded["offset_mapping"])
    return [(0, 0) if token in special else next(spans) for token in ids]


def _ends(tokenizer: PreTrainedTokenizerBase, ids: list[int], text: str) -> list[int]:
    """How many characters of a text are complete after each token."""
    offsets = _offsets(tokenizer, ids, text)
    ends: list[int] = []
    done = 0
    for j in range(len(ids)):
        if offsets is None:  # drawn tokens that the tokenizer would have put otherwise
            prefix = _decode(tokenizer, ids[: j + 1])
            while done < min(len(prefix), len(text)) and prefix[done] == text[done]:
                done += 1
        else:
            end = offsets[j][1]
            following = offsets[j + 1] if j + 1 < len(ids) else (end, end)
            # The bytes of one character may be several tokens: only the last completes it.
            done = max(done, min(end, following[0]) if following[1] > 0 else end)
        ends.append(done)
    return ends


def _last_characters(tokenizer: PreTrainedTokenizerBase, ids: list[int], text: str) -> list[int]:
    """Index of the last character that each of a text's tokens has a part in, -1 for those that the tokenizer added."""
    if tokenizer.is_fast:  # which also knows what an unknown token stands for
        encoded = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True)
        places = zip(encoded["special_tokens_mask"], encoded["offset_mapping"], strict=True)
        return [-1 if added else max(end - 1, 0) for added, (_, end) in places][: len(ids)]
    special = special_ids(tokenizer)
    ends = _ends(tokenizer, ids, text)
    if text[max(ends, default=0) :].strip():
        raise ValueError(
            f"`target_processing_class` ({type(tokenizer).__name__}) decodes {text!r:.80} as {_decode(tokenizer, ids)!r:.80}, so "
            "`credit_assignment` cannot tell which of its tokens the generator wrote. Use a fast tokenizer, or set "
            '`credit_assignment="sequence"`.'
        )
    last, before = [], 0
    for token, end in zip(ids, ends, strict=True):
        last.append(-1 if token in special else min(max(end - 1, before), len(text) - 1))
        before = end
    return last


def aligned_candidates(
    candidates: Tensor,
    owners: list[int],
    completion_ids: list[int],
    input_ids: list[int],
    eos_token_ids: list[int],
    eos: int | None,
) -> Tensor:
    """
    The generator's candidates where the target's tokens stand, shape `(len(input_ids), k)`, -1 for none.

    A position has candidates if the two tokenizers agree on it: one token of each, the same one.

    Args:
        candidates (`Tensor`):
            Candidates at each of `completion_ids`, shape `(len(completion_ids), k)`, -1 for none.
        owners (`list[int]`):
            What [`written_by`] returned.
        completion_ids, input_ids (`list[int]`):
            As there.
        eos_token_ids (`list[int]`):
            Tokens that end a completion; any of them is the target's `eos`.
        eos (`int`, *optional*):
            The target's EOS token. Without one, no end is a candidate.
    """
    ending = torch.isin(candidates, torch.tensor(eos_token_ids))
    candidates = candidates.masked_fill(ending, -1 if eos is None else eos)
    tokens = Counter(owners)
    result = torch.full((len(input_ids), candidates.shape[1]), -1)
    for position, owner in enumerate(owners):
        if position == 0 or owner == NOT_WRITTEN or tokens[owner] > 1:  # nothing predicts the first
            continue
        written = eos if completion_ids[owner] in eos_token_ids else completion_ids[owner]
        if written == input_ids[position]:
            result[position] = candidates[owner]
    return result


@dataclass
class TokenAdvantages:
    r"""
    Advantages of the tokens of a generation batch, in one unit.

    With \\( r_{ij} \\) the credit of token j of completion i and \\( \gamma \\) the discount, its reward-to-go is
    \\( R_{ij} = \sum_{s \ge j} \gamma^{s-j} r_{is} \\). The baseline is its mean over the completions that reach position j. The
    unit is the root mean square over all tokens of the batch, but no less than 5 % of the largest so far.

    Attributes:
        sampled (`Tensor`):
            What the policy gradient weighs each token's log-probability with, shape `(n, t)`. Where a position has
            candidates, only what follows it: \\( \gamma (R_{i,j+1} - \bar R_{j+1}) \\).
        candidates (`Tensor`, *optional*):
            Credit of each position's candidates, shape `(n, t, k)`; NaN where there is none.
        unit (`float`):
            What both were divided by.
        not_written (`float`):
            Share of the credits' absolute sum that belongs to text that the generator did not write.
    """

    sampled: Tensor
    candidates: Tensor | None
    unit: float
    not_written: float


def token_advantages(
    credits: list[Tensor],
    owners: list[list[int]],
    masks: list[list[int]],
    discount: float,
    least_unit: float = 0.0,
    candidates: list[Tensor] | None = None,
) -> TokenAdvantages:
    r"""
    Advantages from metagradients of the target's tokens.

    Args:
        credits (`list[Tensor]`):
            Metagradients of each completion's tokens, in the target's tokens, shape `(tokens,)`.
        owners (`list[list[int]]`):
            What [`written_by`] returned for each completion.
        masks (`list[list[int]]`):
            For each of the generator's tokens, 1 if it wrote the token and 0 if a tool did; empty for a completion that is to have
            no part in this. Discount, baseline and unit are those of the generator's own tokens.
        discount (`float`):
            \\( \gamma \\).
        least_unit (`float`, *optional*, defaults to `0.0`):
            The unit is at least this.
        candidates (`list[Tensor]`, *optional*):
            Metagradients of each completion's candidates, shape `(tokens, k)`; NaN where there is none.
    """
    num, length = len(credits), max(map(len, masks))
    own = torch.zeros(num, length, dtype=torch.float64)
    of_candidates = None
    if candidates is not None:
        of_candidates = torch.full((num, length, candidates[0].shape[1]), torch.nan, dtype=candidates[0].dtype)
    lost = total = 0.0
    for i, (values, positions) in enumerate(zip(credits, owners, strict=True)):
        owner = torch.tensor(positions, dtype=torch.long)
        if not masks[i]:
            continue
        written = owner != NOT_WRITTEN
        own[i].index_add_(0, owner[written], values[written].double())
        lost += values[~written].double().abs().sum().item()
        total += values.double().abs().sum().item()
        if of_candidates is not None:
            of_candidates[i, owner[written]] = candidates[i][written]  # type: ignore[index]

    exists = torch.zeros(num, length, dtype=torch.bool)
    for row, mask in zip(exists, masks, strict=True):
        row[: len(mask)] = torch.tensor(mask, dtype=torch.bool)
    # The generator's own tokens come first in each row until the end, so that a tool's neither delay credit nor share the baseline.
    order = (~exists).int().argsort(dim=1, stable=True)
    exists, own = exists.gather(1, order), own.gather(1, order)
    to_go = torch.zeros(num, length + 1, dtype=torch.float64)
    for j in reversed(range(length)):
        to_go[:, j] = own[:, j] + discount * to_go[:, j + 1]
    count = exists.sum(dim=0).clamp(min=1)
    mean = (to_go[:, :-1] * exists).sum(dim=0) / count
    advantages = (to_go[:, :-1] - mean) * exists
    spread = (advantages.square().sum() / exists.sum().clamp(min=1)).sqrt().item()
    largest = (to_go[:, :-1] * exists).abs().max().item()
    if spread <= ROUNDING * largest:  # equal completions
        advantages.zero_()
        spread = largest
    unit = max(spread, least_unit)
    following = discount * torch.cat([advantages[:, 1:], torch.zeros(num, 1)], dim=1)
    advantages, following = (torch.zeros_like(values).scatter(1, order, values) for values in (advantages, following))
    if of_candidates is not None:
        advantages = torch.where(of_candidates.isnan().all(dim=2), advantages, following)
        of_candidates = of_candidates / (unit or 1.0)
    return TokenAdvantages(advantages / (unit or 1.0), of_candidates, unit, lost / total if total > 0 else 0.0)


@dataclass
class WordCredit:
    """
    What one of the generator's tokens earned, to be shown.

    Attributes:
        text (`str`): Its text.
        credit (`float`): Metagradient of what it wrote.
        best (`str`, *optional*): The candidate with the highest metagradient at its place, if there are candidates.
        best_credit (`float`, *optional*): Metagradient of that one.
    """

    text: str
    credit: float
    best: str | None = None
    best_credit: float | None = None


def credit_text(words: Sequence[WordCredit]) -> str:
    """
    Credit of each word in plain text, in units of the mean absolute credit, and the best word behind it if it is better.

    Example:

    ```python
    >>> from trl_dpg.credit import WordCredit, credit_text

    >>> print(credit_text([WordCredit("the", 2e-5), WordCredit(" cat", -4e-5, "sea", 6e-5)]))
    the +0.7 | cat -1.3 (sea +2.0)

    ```
    """
    unit = sum(abs(word.credit) for word in words) / max(len(words), 1) or 1.0
    parts = []
    for word in words:
        better = ""
        if word.best is not None and word.best_credit is not None and word.best_credit > word.credit:
            better = f" ({word.best.strip()} {word.best_credit / unit:+.1f})"
        parts.append(f"{word.text.strip()} {word.credit / unit:+.1f}{better}")
    return " | ".join(parts)


def word_credits(
    tokenizer: PreTrainedTokenizerBase, example: dict[str, Any], credits: Tensor, candidates: Tensor | None
) -> list[WordCredit]:
    """
    Credit of each of the generator's tokens.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the generator.
        example (`dict`):
            `completion_ids`, `written_by` and, with `candidates`, the `candidates` of a completion.
        credits (`Tensor`):
            Metagradients of the target's tokens, shape `(tokens,)`.
        candidates (`Tensor`, *optional*):
            Metagradients of the candidates, shape `(tokens, k)`.
    """
    ids, special = example["completion_ids"], special_ids(tokenizer)
    text = _decode(tokenizer, ids)
    ends = _ends(tokenizer, ids, text)
    words = [
        WordCredit(str(tokenizer.decode([token])) if token in special else text[start:end], 0.0)
        for token, start, end in zip(ids, [0, *ends[:-1]], ends, strict=True)
    ]
    for position, owner in enumerate(example["written_by"]):
        if owner == NOT_WRITTEN:
            continue
        words[owner].credit += credits[position].item()
        if candidates is not None and (example["candidates"][position] >= 0).any():
            known = candidates[position].masked_fill(example["candidates"][position] < 0, -torch.inf)
            best = int(known.argmax())
            words[owner].best = str(tokenizer.decode([int(example["candidates"][position, best])]))
            words[owner].best_credit = known[best].item()
    return words


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
            logits = torch.einsum("btd,btkd->btk", hidden.float(), weight[every].float())
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
