"""
Credit: splits a completion's metagradient among the tokens that the generator wrote.

The target's loss is a sum over the target's tokens, and so is a metagradient. [`written_by`] assigns the terms of this sum to the
generator's tokens. [`TokenAdvantages`] turns them into advantages of shape `(B, T)`. If generator and target share a vocabulary, the
metagradient also tells what other tokens would have earned at a position. The policy gradient can then use the expectation over these
tokens instead of the sampled one ([`CandidateHead`]).
"""

from .advantages import TokenAdvantages, reward_advantages, token_advantages
from .alignment import aligned_candidates, written_by
from .candidates import CandidateHead, changed_logits, expected_credit
from .words import WordCredit, credit_text, word_credits


__all__ = [
    "CandidateHead",
    "TokenAdvantages",
    "WordCredit",
    "aligned_candidates",
    "changed_logits",
    "credit_text",
    "expected_credit",
    "reward_advantages",
    "token_advantages",
    "word_credits",
    "written_by",
]
