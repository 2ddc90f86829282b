"""Advantages of the generator's tokens, from the metagradients of the target's tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from trl.trainer.utils import nanstd

from .alignment import NOT_WRITTEN


ROUNDING = 1e-6  # relative difference between values of equal completions in different rows of a batch


@dataclass
class TokenAdvantages:
    r"""
    Advantages of the tokens of a generation batch, all divided by the same unit.

    Let \\( r_{ij} \\) be the credit of token j of completion i, and \\( \gamma \\) the discount. The token's reward-to-go is
    \\( R_{ij} = \sum_{s \ge j} \gamma^{s-j} r_{is} \\). Its advantage is \\( R_{ij} - \bar R_j \\), with the mean over the completions
    that reach position j. Positions count the tokens that the generator wrote. The unit is the root mean square of these
    advantages over the batch, but not less than a given least unit.

    Attributes:
        advantages (`Tensor`):
            Advantages of the completions' tokens, shape `(n, t)`. If a position has candidates, the token's own credit is left out:
            \\( \gamma (R_{i,j+1} - \bar R_{j+1}) \\).
        candidates (`Tensor`, *optional*):
            Credit of each position's candidates, shape `(n, t, k)`; NaN for none.
        unit (`float`):
            The unit, which both were divided by.
        not_written (`float`):
            Share of the credits' absolute sum that belongs to text that the generator did not write.
    """

    advantages: Tensor
    candidates: Tensor | None
    unit: float
    not_written: float

    def of_rows(self, rows: slice, length: int, weight: float) -> tuple[Tensor, Tensor | None]:
        """`advantages` and `candidates` of some completions, multiplied by `weight` and padded to `length` tokens on the right."""

        def padded(values: Tensor, missing: float) -> Tensor:
            values = weight * values[rows, :length].float()
            return torch.cat(
                [values, values.new_full((len(values), length - values.shape[1], *values.shape[2:]), missing)], 1
            )

        return padded(self.advantages, 0.0), None if self.candidates is None else padded(self.candidates, torch.nan)


def reward_advantages(
    rewards: Tensor, weights: Tensor, group_size: int, scale_rewards: str, aggregation: str
) -> Tensor:
    """
    Computes TRL's advantages of whole completions, with groups of any size.

    `rewards` has the shape `(completions, functions)`, with NaN where a function gave no reward. A completion without any reward has
    the advantage 0. Each group has `group_size` consecutive completions. The last two arguments are `scale_rewards` and
    `multi_objective_aggregation` of [`~trl.GRPOConfig`].
    """
    unscorable = rewards.isnan().all(dim=1)
    normalized = aggregation == "normalize_then_sum"
    if normalized:
        groups = rewards.view(-1, group_size, rewards.shape[1])
        spread = nanstd(groups, dim=1, keepdim=True)
        rewards = ((groups - groups.nanmean(dim=1, keepdim=True)) / (spread + 1e-4)).view(rewards.shape)
    sums = (rewards * weights).nansum(dim=1)
    sums[unscorable] = torch.nan
    groups = sums.view(1, -1) if normalized else sums.view(-1, group_size)
    advantages = groups - groups.nanmean(dim=1, keepdim=True)
    if normalized or scale_rewards == "batch":
        advantages = advantages / (nanstd(sums) + 1e-4)
    elif scale_rewards == "group":
        advantages = advantages / (nanstd(groups, dim=1, keepdim=True) + 1e-4)
    return advantages.flatten().nan_to_num(nan=0.0)


def token_advantages(
    credits: list[Tensor],
    owners: list[list[int]],
    masks: list[list[int]],
    discount: float,
    least_unit: float = 0.0,
    candidates: list[Tensor] | None = None,
) -> TokenAdvantages:
    r"""
    Computes advantages of the generator's tokens from metagradients of the target's tokens.

    Args:
        credits (`list[Tensor]`):
            Metagradients of each completion's tokens, in the target's tokens, shape `(tokens,)`.
        owners (`list[list[int]]`):
            Result of [`written_by`] for each completion.
        masks (`list[list[int]]`):
            For each token of a completion, 1 if the generator wrote it and 0 if a tool did. Discount, baseline and unit only count
            tokens with a 1. An empty mask leaves the completion out.
        discount (`float`):
            Discount \\( \gamma \\) of later tokens' credit.
        least_unit (`float`, *optional*, defaults to `0.0`):
            Least value of the unit.
        candidates (`list[Tensor]`, *optional*):
            Metagradients of each completion's candidates, shape `(tokens, k)`; NaN for none.
    """
    num, length = len(credits), max(map(len, masks))
    by_generator = pad_sequence([torch.tensor(mask, dtype=torch.bool) for mask in masks], batch_first=True)
    # Index of each credit's token among all tokens of the batch. It is only used if the generator wrote the token.
    taking_part = [i for i in range(num) if len(masks[i]) > 0]
    places = torch.cat([i * length + torch.tensor(owners[i], dtype=torch.long) for i in taking_part])
    written = torch.cat([torch.tensor(owners[i]) != NOT_WRITTEN for i in taking_part])
    values = torch.cat([credits[i] for i in taking_part]).double()
    lost, total = values[~written].abs().sum().item(), values.abs().sum().item()
    own = torch.zeros(num * length, dtype=torch.float64)
    own = own.index_add_(0, places[written], values[written]).view(num, length)
    of_candidates = None
    if candidates is not None:
        every = torch.cat([candidates[i] for i in taking_part])
        of_candidates = every.new_full((num * length, every.shape[1]), torch.nan)
        of_candidates[places[written]] = every[written]
        of_candidates = of_candidates.view(num, length, -1)

    # Each row is sorted so that the generator's own tokens come first. So a tool's tokens neither add steps of discount nor enter the
    # baseline. The order is restored at the end.
    order = (~by_generator).int().argsort(dim=1, stable=True)
    by_generator, own = by_generator.gather(1, order), own.gather(1, order)
    to_go = torch.zeros(num, length + 1, dtype=torch.float64)  # the last column stays zero: nothing follows there
    for j in reversed(range(length)):
        to_go[:, j] = own[:, j] + discount * to_go[:, j + 1]
    count = by_generator.sum(dim=0).clamp(min=1)
    mean = (to_go[:, :-1] * by_generator).sum(dim=0) / count
    advantages = (to_go[:, :-1] - mean) * by_generator
    spread = (advantages.square().sum() / by_generator.sum().clamp(min=1)).sqrt().item()
    largest = (to_go[:, :-1] * by_generator).abs().max().item()
    if spread <= ROUNDING * largest:  # all completions are equal, and their differences mere rounding
        advantages.zero_()
        spread = largest
    unit = max(spread, least_unit)
    following = discount * torch.cat([advantages[:, 1:], torch.zeros(num, 1)], dim=1)
    advantages, following = (torch.zeros_like(part).scatter(1, order, part) for part in (advantages, following))
    if of_candidates is not None:
        advantages = torch.where(of_candidates.isnan().all(dim=2), advantages, following)
        of_candidates = of_candidates / (unit or 1.0)
    return TokenAdvantages(advantages / (unit or 1.0), of_candidates, unit, lost / total if total > 0 else 0.0)
