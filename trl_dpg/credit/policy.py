"""Credit in the generator's training step: the choice of the estimator, and the loss term of expected credit."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.utils import pad

from ..data import special_ids
from ..metagradients.runtime.model import vocab_size
from .candidates import (
    ALL_WORDS,
    CANDIDATES,
    CandidateHead,
    changed_logits,
    changed_words,
    expected_credit,
    with_sampled,
)


def obstacle_to_expected_credit(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, target_tokenizer: PreTrainedTokenizerBase
) -> str | None:
    """The reason why expected credit cannot be computed, or `None` if it can."""
    if tokenizer.get_vocab() != target_tokenizer.get_vocab():
        return "generator and target have different vocabularies, and credit is only known for words of the target's"
    if changed := changed_logits(model):
        return f"the generator changes its logits (`config` has {changed})"
    return None


def choose_credit_assignment(args: Any, obstacle: str | None) -> tuple[str, str | None]:
    """
    Chooses the estimator of the policy gradient. If `args` leaves the choice open (`"auto"`), also returns a reason.

    Raises:
        [`ValueError`]: If `args` asks for expected credit and there is an obstacle.
    """
    if args.credit_assignment == "expected" and obstacle is not None:
        raise ValueError(
            f"`credit_assignment='expected'` cannot be used: {obstacle}. Set `credit_assignment='token'`."
        )
    if args.credit_assignment != "auto":
        return args.credit_assignment, None
    if args.reward != "metagradient":
        return "sequence", None
    if args.moves_tokens_alike():
        return "sequence", "`importance_sampling_level='sequence'` moves all tokens of a completion alike"
    if obstacle is not None:
        return "token", obstacle
    return "expected", "generator and target share a vocabulary"


def settings_without_effect(args: Any, credit_assignment: str, num_rewards: int) -> list[str]:
    """Names of the fields that are set, but have no effect with this estimator."""
    if credit_assignment == "sequence":
        unused = {
            "credit_discount": args.credit_discount != 0.5,
            "credit_candidates": args.credit_candidates is not None,
        }
    else:
        unused = {
            "scale_rewards": args.scale_rewards != "none" and num_rewards == 1,
            "credit_candidates": credit_assignment == "token" and args.credit_candidates is not None,
        }
    return [name for name, is_unused in unused.items() if is_unused]


class ExpectedCredit:
    r"""
    Adds the term \\( -\sum_v \pi(v) r(v) \\) of each token to the policy loss. The sum is over the words v that could stand there.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The generator, as for [`CandidateHead`].
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the generator.
        target ([`~trl_dpg.fine_tuning.TargetFineTuning`]):
            The target, which has the same vocabulary.
        eos_token_ids (`list[int]`):
            Tokens at which generation stops.
        temperature (`float`):
            Sampling temperature, which logits are divided by.
        num_candidates (`int`, *optional*):
            Words at each position. `None` means all of a vocabulary of up to 4,096 words, and 64 of a larger one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        target: Any,
        eos_token_ids: list[int],
        temperature: float,
        num_candidates: int | None,
    ):
        self.head = CandidateHead(model, temperature)
        self.pad_token_id = tokenizer.pad_token_id
        vocabulary = tokenizer.get_vocab()
        # The target reads text. Special tokens are not part of it, except for the end. Its tokenizer may read a word as another one.
        known = {i for i in vocabulary.values() if i < vocab_size(target.target_model)}
        words = known - special_ids(tokenizer) - changed_words(target.processing_class) | {*eos_token_ids}
        rows = model.get_output_embeddings().out_features  # type: ignore[union-attr]  # ZeRO-3 leaves no shape of the weight
        self.is_word = torch.tensor([i in words for i in range(rows)])
        rows = min(len(vocabulary), rows)
        self.num_candidates = min(num_candidates or (rows if rows <= ALL_WORDS else CANDIDATES), rows)
        self.all_words = self.num_candidates == rows

    @torch.no_grad()
    def candidates(
        self,
        prompt_ids: list[list[int]],
        completion_ids: list[list[int]],
        forward: Callable[[Tensor, Tensor], Any],
        batch_size: int,
        device: torch.device,
    ) -> list[Tensor]:
        """
        Words that could stand at each token of the completions: all, or the generator's most likely ones and the token itself; -1
        for no word.

        Args:
            prompt_ids, completion_ids (`list[list[int]]`): Tokens of this process's prompts and completions.
            forward (`Callable`): The generator's forward pass on token ids and their mask.
            batch_size (`int`): Completions per forward pass.
            device (`torch.device`): Where the generator is.
        """
        if self.all_words:
            words = torch.arange(self.num_candidates).masked_fill(~self.is_word[: self.num_candidates], -1)
            return [words.expand(len(ids), self.num_candidates) for ids in completion_ids]
        found: list[Tensor] = []
        for start in range(0, len(prompt_ids), batch_size):
            ids, mask = [], []
            rows = completion_ids[start : start + batch_size]
            for part, side in ((prompt_ids[start : start + batch_size], "left"), (rows, "right")):
                ids.append(pad([torch.tensor(row) for row in part], self.pad_token_id, side))
                mask.append(pad([torch.ones(len(row), dtype=torch.long) for row in part], 0, side))
            length = ids[1].shape[1]
            with self.head.most_likely(length, self.num_candidates) as head:
                forward(torch.cat(ids, dim=1).to(device), torch.cat(mask, dim=1).to(device))
                result = with_sampled(head.result.cpu(), ids[1])  # type: ignore[union-attr]
            result = result.masked_fill(~self.is_word[result], -1)
            found += [result[i, : len(row)] for i, row in enumerate(rows)]
        return found

    def loss(self, policy_loss: Callable[[Any, dict[str, Any]], Tensor], model: Any, inputs: dict[str, Any]) -> Tensor:
        """
        TRL's policy loss plus the expected term.

        A token's expected term needs a weight that fits any loss type, clipping and mask. This weight is the second derivative of TRL's
        loss in the token's advantage and in its log-probability.

        Args:
            policy_loss (`Callable`): TRL's loss of a model and a micro-batch.
            model (`nn.Module`): The generator, wrapped by Accelerate.
            inputs (`dict`): The micro-batch, with `candidate_credits` and, unless all words are candidates, `candidate_ids`.
        """
        credits = inputs["candidate_credits"]
        advantages = inputs["advantages"].clone().requires_grad_()
        with self.head.log_probs(credits.shape[1], credits.shape[2], inputs.get("candidate_ids")) as head:
            loss = policy_loss(head.around(model), {**inputs, "advantages": advantages})
            expected = expected_credit(head.result, credits)  # type: ignore[arg-type]
            of_tokens = head.of_tokens
        (of_advantages,) = torch.autograd.grad(loss, advantages, create_graph=True)
        (weights,) = torch.autograd.grad(of_advantages.sum(), of_tokens, retain_graph=True)  # type: ignore[arg-type]
        return loss + (weights[:, -credits.shape[1] :] * expected).sum()
