"""
Credit: which of the generator's tokens earned a completion's metagradient.

The target's loss is a sum over the target's tokens, and so is a metagradient. Its terms go back to the generator's tokens
([`written_by`]) and become advantages of shape `(B, T)` ([`TokenAdvantages`]). Where generator and target share a vocabulary, the
term of a position is also known for words that were not written, so that it needs no sampling ([`CandidateHead`]).
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
