"""Credit for every word: the three estimators, on a generator whose completions can all be listed, and in the trainer."""

import itertools
import json
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig

from trl_dpg import DatasetPolicyGradientTrainer
from trl_dpg.credit import WordCredit, credit_text, expected_credit, token_advantages
from trl_dpg.credit.candidates import CandidateLogits, with_sampled
from trl_dpg.reporting import write_report


WORDS, LENGTH = 3, 3


@pytest.fixture(scope="module")
def policy():
    """A table of logits for every prefix, and credits of tokens that are held fixed."""
    generator = torch.Generator().manual_seed(0)
    prefixes = [p for n in range(LENGTH) for p in itertools.product(range(WORDS), repeat=n)]
    logits = torch.randn(len(prefixes), WORDS, generator=generator, dtype=torch.float64, requires_grad=True)
    credits = torch.randn(len(prefixes), WORDS, generator=generator, dtype=torch.float64)
    rows = torch.tensor(
        [[prefixes.index(c[:j]) for j in range(LENGTH)] for c in itertools.product(range(WORDS), repeat=LENGTH)]
    )
    words = torch.tensor(list(itertools.product(range(WORDS), repeat=LENGTH)))
    return logits, credits, rows, words


def gradients(policy, assignment, discount, ids=None):
    """The estimator of every completion, shape `(27, parameters)`, and its probability. Candidates are `ids`, or all words."""
    logits, credits, rows, words = policy
    log_probs = logits.log_softmax(dim=1)[rows]  # (27, length, words)
    chosen = log_probs.gather(2, words[..., None])[..., 0]
    own = credits[rows].gather(2, words[..., None])[..., 0]
    if assignment == "sequence":
        objective = chosen.sum(dim=1) * own.sum(dim=1)
    else:
        ids = torch.arange(WORDS).expand_as(log_probs) if ids is None else ids
        candidates = list(credits[rows].gather(2, ids)) if assignment == "expected" else None
        every = [list(range(LENGTH))] * len(words)
        result = token_advantages(list(own), every, [[1] * LENGTH] * len(words), discount, candidates=candidates)
        objective = (chosen * result.advantages).sum(dim=1)
        if candidates is not None:
            objective = objective + expected_credit(log_probs.gather(2, ids), result.candidates).sum(dim=1)
        objective = objective * result.unit
    estimates = torch.stack([torch.autograd.grad(o, logits, retain_graph=True)[0].flatten() for o in objective])
    return estimates, chosen.sum(dim=1).exp()


def test_expectation_over_all_completions(policy, capsys):
    """All three are unbiased without a discount. Their variances are in the order that theory says."""
    logits, credits, rows, words = policy
    probabilities = logits.log_softmax(dim=1)[rows].gather(2, words[..., None]).sum(dim=(1, 2)).exp()
    value = (probabilities * credits[rows].gather(2, words[..., None]).sum(dim=(1, 2))).sum()
    exact = torch.autograd.grad(value, logits)[0].flatten()
    variances = {}
    for assignment in ("sequence", "token", "expected"):
        estimates, p = gradients(policy, assignment, 1.0)
        mean = (p[:, None] * estimates).sum(dim=0)
        assert (mean - exact).abs().max() < 1e-10
        variances[assignment] = (p * (estimates - mean).square().sum(dim=1)).sum().item()
    with capsys.disabled():
        print("\nvariance of one completion's gradient:", {name: round(v, 3) for name, v in variances.items()})
    assert variances["expected"] < variances["token"] < variances["sequence"]


def test_a_discount_is_biased(policy):
    """What a discount leaves out is left out."""
    estimates, p = gradients(policy, "token", 0.0)
    exact, _ = gradients(policy, "token", 1.0)
    assert ((p[:, None] * estimates).sum(dim=0) - (p[:, None] * exact).sum(dim=0)).abs().max() > 1e-3


def test_expectation_of_some_candidates(policy):
    """
    Two of three words. Candidates C move π as the mean of their credits, given that one of them is drawn, times the probability of
    that. With the sampled word among them, that is averaged over all samples, and nearer to the credit of all words.
    """
    logits, credits, rows, words = policy
    probs, likely = logits.softmax(dim=1), logits.topk(2).indices
    own = probs[rows].gather(2, words[..., None])[..., 0]
    reached = own.cumprod(dim=1) / own  # probability of each prefix
    reached = torch.zeros(len(logits), dtype=torch.float64).scatter(0, rows.flatten(), reached.flatten()).detach()

    def moved(chosen):  # of each prefix, by its candidates
        p = probs.gather(1, chosen)
        return p.sum(dim=1).detach() * (p * credits.gather(1, chosen)).sum(dim=1) / p.sum(dim=1)

    def slope(value):
        return torch.autograd.grad((reached * value).sum(), logits, retain_graph=True)[0].flatten()

    with_each = with_sampled(likely[:, None].expand(-1, WORDS, -1), torch.arange(WORDS).expand(len(logits), WORDS))
    expected = slope(sum(probs[:, x].detach() * moved(with_each[:, x]) for x in range(WORDS)))
    found = {}
    for name, ids in (("likely", likely[rows]), ("with_sampled", with_sampled(likely[rows], words))):
        estimates, p = gradients(policy, "expected", 0.0, ids)
        found[name] = (p[:, None] * estimates).sum(dim=0)
    exact = slope((probs * credits).sum(dim=1))
    assert (found["likely"] - slope(moved(likely))).abs().max() < 1e-10
    assert (found["with_sampled"] - expected).abs().max() < 1e-10
    assert (found["with_sampled"] - exact).norm() < (found["likely"] - exact).norm()


def test_reward_to_go():
    """Two completions of two and three tokens: sums from the end, less the mean of those that get there."""
    credits = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0, 7.0])]
    result = token_advantages(credits, [[0, 1], [0, 1, 2]], [[1, 1], [1, 1, 1]], 0.5)
    to_go = torch.tensor([[2.0, 2.0], [7.25, 8.5]])
    expected = torch.cat([to_go - to_go.mean(dim=0), torch.tensor([[0.0], [0.0]])], dim=1)
    unit = (expected.square().sum() / 5).sqrt().item()
    assert result.unit == pytest.approx(unit)
    assert torch.allclose(result.advantages, (expected / unit).double(), atol=1e-7)


def test_credit_of_text_that_was_not_written():
    """A prompt's part is left out, and its share is said."""
    credits = [torch.tensor([3.0, 1.0]), torch.tensor([3.0, -1.0])]
    result = token_advantages(credits, [[-1, 0], [-1, 0]], [[1], [1]], 1.0)
    assert result.advantages.flatten().tolist() == [1.0, -1.0]
    assert result.not_written == pytest.approx(6 / 8)


def test_equal_completions_have_no_advantage():
    """Whatever rounding says."""
    credits = [torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0 + 1e-7])]
    result = token_advantages(credits, [[0, 1]] * 2, [[1, 1]] * 2, 1.0)
    assert (result.advantages == 0).all()


def test_floor():
    credits = [torch.tensor([1.0]), torch.tensor([-1.0])]
    assert token_advantages(credits, [[0]] * 2, [[1], [1]], 1.0, least_unit=4.0).advantages.flatten().tolist() == [
        0.25,
        -0.25,
    ]


@pytest.fixture
def batch(make_trainer):
    """Makes a trainer and the first micro-batch that it would train on."""

    def make(**kwargs):
        trainer = make_trainer(**kwargs)
        trainer.model.train()
        inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        trainer.current_gradient_accumulation_steps = 1
        return trainer, inputs

    return make


def plain_log_probs(trainer, inputs):
    """Log-probabilities of all words at the tokens of completions, without any shortcut."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    logits = trainer.model(input_ids=ids, attention_mask=mask).logits / trainer.temperature
    return logits[:, -inputs["completion_ids"].shape[1] - 1 : -1].log_softmax(dim=2)


def gradient(trainer, loss):
    trainer.model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


@pytest.mark.parametrize("candidates", [None, 5], ids=["all", "five"])
@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=2, target_modules=["c_attn"])], ids=["full", "lora"])
def test_gradient_of_the_expected_term(batch, candidates, peft_config):
    """The trainer's loss beside the same written out with the logits of an ordinary forward pass."""
    trainer, inputs = batch(
        credit_assignment="expected", credit_candidates=candidates, temperature=0.7, peft_config=peft_config
    )
    if peft_config is not None:  # off the point where B = 0
        for name, p in trainer.model.named_parameters():
            if "lora_B" in name:
                p.data.normal_()
    log_probs = plain_log_probs(trainer, inputs)
    ids, credits = inputs.get("candidate_ids"), inputs["candidate_credits"]
    assert (ids is None) == (candidates is None) and credits.shape[2] == (candidates or 64)
    of_candidates = log_probs[..., : credits.shape[2]] if ids is None else log_probs.gather(2, ids.clamp(min=0))
    chosen = log_probs.gather(2, inputs["completion_ids"][..., None])[..., 0]
    mask = inputs["completion_mask"]
    terms = chosen * inputs["advantages"] + expected_credit(of_candidates, credits)
    expected = gradient(trainer, -(terms * mask).sum() / mask.sum())
    actual = gradient(trainer, trainer._compute_loss(trainer.model, inputs))
    assert (actual - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("candidates", [None, 5], ids=["all", "five"])
@pytest.mark.parametrize("autocast", [False, True])
def test_log_probs_with_the_head_in_float32(batch, causal_lm, candidates, autocast):
    """The rest of the model is in bfloat16, by its weights or by autocast."""
    model = causal_lm() if autocast else causal_lm().to(torch.bfloat16)
    trainer, inputs = batch(
        model=model,
        bf16=autocast,
        cast_lm_head_to_fp32=True,
        credit_assignment="expected",
        credit_candidates=candidates,
    )
    whole = [torch.cat([inputs[f"prompt_{part}"], inputs[f"completion_{part}"]], dim=1) for part in ("ids", "mask")]
    length, ids = inputs["completion_ids"].shape[1], inputs.get("candidate_ids")
    with torch.no_grad(), trainer.accelerator.autocast():
        hidden = model.base_model(whole[0], attention_mask=whole[1]).last_hidden_state
        with trainer._expected_credit.head.log_probs(length, candidates or 64, ids) as head:
            trainer._get_per_token_logps_and_entropies(model, *whole, length)
            found = head.result
    assert hidden.dtype == (torch.float32 if autocast else torch.bfloat16)
    expected = F.linear(hidden[:, -length - 1 : -1].float(), model.lm_head.weight).log_softmax(dim=2)
    expected = expected if ids is None else expected.gather(2, ids.clamp(min=0))
    written = inputs["completion_mask"] == 1
    torch.testing.assert_close(found[written], expected[written], rtol=1e-5, atol=1e-5)


def test_the_loss_is_not_differentiated_in_what_the_model_returns(batch):
    """FSDP and DeepSpeed would take that for the beginning of a backward pass."""
    trainer, inputs = batch(credit_assignment="expected")
    seen = []

    def model(*args, **kwargs):
        output = trainer.model(*args, **kwargs)
        output.log_probs.register_hook(seen.append)
        return output

    loss = trainer._compute_loss(model, inputs)
    assert not seen
    loss.backward()
    assert seen


def test_the_sampled_token_is_a_candidate(batch):
    """Once, with its own credit, and in place of the least likely one only."""
    words_alone = {"suppress_tokens": [60, 61, 62, 63]}
    trainer, inputs = batch(credit_assignment="expected", credit_candidates=5, generation_kwargs=words_alone)
    ids, own, written = inputs["candidate_ids"], inputs["completion_ids"][..., None], inputs["completion_mask"] == 1
    assert ((ids == own).sum(dim=2)[written] == 1).all()
    likely = plain_log_probs(trainer, inputs).topk(5).indices
    missing = (likely != own).all(dim=2)
    assert (missing & written).any()
    likely[..., -1] = torch.where(missing, own[..., 0], likely[..., -1])
    is_word = trainer._expected_credit.is_word[likely]
    assert torch.equal(ids[written], likely.masked_fill(~is_word, -1)[written])
    reward = trainer.target_training
    for example, tokens, known in zip(reward._examples, reward._tokens, reward._candidates, strict=True):
        places = example["candidates"] == torch.tensor(example["input_ids"])[:, None]
        assert places.any() and torch.allclose(known[places], tokens[places.any(dim=1)], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"])
@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=2, target_modules=["c_attn"])], ids=["full", "lora-beta"])
def test_the_expected_term_weighs_as_much_as_sampled_ones(batch, loss_type, peft_config):
    """With credit A / π for the token itself and none for other words, its gradient is TRL's own for advantage A."""
    beta = 0.0 if peft_config is None else 0.1  # the reference is the model without its adapter
    trainer, inputs = batch(
        credit_assignment="expected", loss_type=loss_type, top_entropy_quantile=0.5, beta=beta, peft_config=peft_config
    )
    generator = torch.Generator().manual_seed(0)
    advantages = torch.randn(inputs["completion_ids"].shape, generator=generator)
    nothing = {**inputs, "advantages": torch.zeros_like(advantages)}
    del nothing["candidate_credits"]
    sampled = gradient(trainer, trainer._compute_loss(trainer.model, {**nothing, "advantages": advantages}))
    log_probs, chosen = plain_log_probs(trainer, inputs).detach(), inputs["completion_ids"][..., None]
    credits = torch.zeros_like(log_probs).scatter(2, chosen, advantages[..., None] / log_probs.gather(2, chosen).exp())
    actual = gradient(trainer, trainer._compute_loss(trainer.model, {**nothing, "candidate_credits": credits}))
    assert (actual - sampled).norm() < 1e-4 * sampled.norm()


@pytest.mark.parametrize("assignment", ["token", "expected"])
def test_advantages_of_tokens(batch, assignment):
    trainer, inputs = batch(credit_assignment=assignment, credit_discount=1.0)
    advantages, mask = inputs["advantages"], inputs["completion_mask"]
    assert advantages.shape == inputs["completion_ids"].shape
    assert (advantages[mask == 0] == 0).all() and (advantages.std(dim=1) > 0).any()
    assert ("candidate_credits" in inputs) == (assignment == "expected")
    assert trainer._metrics["train"]["metagradient/credit_not_written"] == [0.0]


@pytest.mark.parametrize("candidates", [None, 40], ids=["all", "likely"])
def test_special_tokens_are_no_words(batch, tokenizer, causal_lm, candidates):
    """The target is never given one, but for the end, nor a word that it has no row for."""
    target = causal_lm(seed=1)
    target.lm_head.weight.data[:] = 0
    target.resize_token_embeddings(63, mean_resizing=False)  # all but "<unk>"
    tokenizer.add_special_tokens({"additional_special_tokens": ["the"]})
    trainer, inputs = batch(
        credit_assignment="expected",
        credit_candidates=candidates,
        target_model=target,
        processing_class=tokenizer,
        target_processing_class=tokenizer,
    )
    found = {int(i) for example in trainer.target_training._examples for i in example["candidates"].flatten()}
    never = {tokenizer.convert_tokens_to_ids(token) for token in ("<pad>", "<bos>", "<unk>", "the")}
    assert tokenizer.eos_token_id in found and not never & found
    offered = {int(i) for ids in trainer.target_training.candidate_ids for i in ids.flatten()}
    assert tokenizer.eos_token_id in offered and not never & offered


def test_the_paper_is_unchanged(batch):
    """One number a completion, as of TRL."""
    trainer, inputs = batch(credit_assignment="sequence")
    assert inputs["advantages"].shape == (8,) and "candidate_credits" not in inputs


def length(completions, **kwargs):
    return [float(len(text)) for text in completions]


@pytest.mark.parametrize("scale_rewards", ["none", "group"])
def test_other_rewards_are_added(batch, scale_rewards):
    """As TRL would without ours, to each token of a completion; and the weight of ours counts."""
    trainer, inputs = batch(
        credit_assignment="token", reward_funcs=length, reward_weights=[3.0, 0.5], scale_rewards=scale_rewards, seed=1
    )
    rewards = torch.tensor(list(trainer._logs["rewards"]["length"])) * 0.5
    groups = rewards.view(2, 4)
    others = groups - groups.mean(dim=1, keepdim=True)
    if scale_rewards == "group":
        others = others / (groups.std(dim=1, keepdim=True) + 1e-4)
    ours = 3.0 * trainer.target_training.token_advantages(0.5).advantages.float()
    padded = F.pad(ours, (0, inputs["advantages"].shape[1] - ours.shape[1])) + others.view(8, 1)
    found = sorted(inputs["advantages"].tolist())
    assert torch.allclose(torch.tensor(found), torch.tensor(sorted(padded.tolist())), atol=1e-5)
    assert trainer.reward_weights.tolist() == [3.0, 0.5]


def scaled_length(completions, factor, **kwargs):
    return [factor * len(text) for text in completions]


@pytest.mark.parametrize("fields", [{"credit_assignment": "token"}, {"reward": "naive"}], ids=["token", "naive"])
def test_other_rewards_of_one_name(batch, fields):
    """Partials have the name of their function, and so one column in TRL's logs. Each of them counts."""
    opposite = [partial(scaled_length, factor=factor) for factor in (1.0, -1.0)]
    _, without = batch(**fields)
    trainer, inputs = batch(**fields, reward_funcs=opposite)
    assert trainer.reward_func_names[1:] == ["scaled_length"] * 2
    assert without["advantages"].any()
    torch.testing.assert_close(inputs["advantages"], without["advantages"])


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"credit_assignment": "word"}, "credit_assignment"),
        ({"credit_assignment": "token", "reward": "naive"}, "credit_assignment"),
        ({"credit_discount": 1.5}, "credit_discount"),
        ({"credit_discount": "0.5"}, "credit_discount"),
        ({"credit_candidates": 0}, "credit_candidates"),
        ({"credit_candidates": 1}, "credit_candidates"),  # its expected credit is nothing
        ({"credit_candidates": 2.5}, "credit_candidates"),
        ({"credit_assignment": "token", "importance_sampling_level": "sequence"}, "credit_assignment"),
        (
            {"credit_assignment": "expected", "importance_sampling_level": "sequence", "loss_type": "luspo"},
            "credit_ass",
        ),
    ],
)
def test_refused_by_name(make_config, fields, name):
    with pytest.raises(ValueError, match=f"`{name}"):
        make_config(**fields)


def test_expected_needs_one_vocabulary(make_trainer, bos_tokenizer):
    with pytest.raises(ValueError, match="credit_assignment='expected'.*vocabular"):
        make_trainer(credit_assignment="expected", target_processing_class=bos_tokenizer)


def test_the_default_is_by_vocabulary(make_trainer, bos_tokenizer):
    assert make_trainer().credit_assignment == "expected"
    assert make_trainer(target_processing_class=bos_tokenizer).credit_assignment == "token"
    assert make_trainer(reward="naive").credit_assignment == "sequence"
    assert make_trainer(importance_sampling_level="sequence").credit_assignment == "sequence"
    cispo = {"loss_type": "cispo", "epsilon_high": 5.0}
    assert make_trainer(importance_sampling_level="sequence", **cispo).credit_assignment == "expected"


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_losses_that_move_tokens_alike_are_known(batch, make_config, loss_type, level):
    """The derivative of TRL's loss in the log-probabilities of a completion's tokens, beside their advantages."""

    class Constant(DatasetPolicyGradientTrainer):
        def _get_per_token_logps_and_entropies(self, *args, **kwargs):
            return log_probs, torch.ones_like(log_probs), None

    config = {"loss_type": loss_type, "importance_sampling_level": level}
    epsilon = {"epsilon_high": 5.0 if loss_type == "cispo" else 0.2}
    trainer, inputs = batch(
        trainer_class=Constant, reward="edit_distance", reference_texts=["sun"], **config, **epsilon
    )
    shape = inputs["completion_ids"].shape
    inputs["advantages"] = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    log_probs = -torch.ones(shape, requires_grad=True)
    (slope,) = torch.autograd.grad(trainer._compute_loss(trainer.model, inputs), log_probs)
    row = inputs["completion_mask"].sum(dim=1).argmax()
    slopes = slope[row][inputs["completion_mask"][row] == 1]
    alike = bool((slopes.max() - slopes.min()) < 1e-5 * slopes.abs().max())
    assert alike == make_config(loss_type=loss_type, importance_sampling_level=level).moves_tokens_alike()


@pytest.mark.parametrize(
    ("fields", "ignored"),
    [
        (
            {
                "credit_assignment": "sequence",
                "credit_discount": 0.9,
                "credit_candidates": 8,
                "scale_rewards": "batch",
            },
            2,
        ),
        ({"credit_assignment": "token", "credit_candidates": 8, "credit_discount": 0.9}, 1),
        ({"credit_assignment": "expected", "scale_rewards": "group", "credit_candidates": 8}, 1),
        ({"credit_assignment": "token", "scale_rewards": "group", "reward_funcs": length}, 0),
    ],
)
def test_settings_without_effect_are_named(make_trainer, caplog, fields, ignored):
    with caplog.at_level("WARNING", logger="trl_dpg.trainer"):
        make_trainer(**fields)
    assert ["has no effect" in text for text in caplog.messages] == [True] * ignored


def test_the_log_of_the_reward_is_of_all_rewards(batch):
    trainer, _ = batch(credit_assignment="token", reward_funcs=length, reward_weights=[3.0, 0.5])
    columns = [list(trainer._logs["rewards"][name]) for name in ("metagradient", "length")]
    rewards = torch.tensor(columns).T @ torch.tensor([3.0, 0.5])
    metrics = trainer._metrics["train"]
    assert metrics["reward"] == pytest.approx([rewards.mean().item()])
    assert metrics["reward_std"] == pytest.approx([rewards.std().item()])


def test_credit_by_word(batch):
    """Words in order, credits that sum to the metagradient, and the best word at each place."""
    trainer, _ = batch(credit_assignment="expected")
    reward = trainer.target_training
    raws = trainer._logs["extra"]["metagradient_raw"]
    for index, (completion, raw) in enumerate(zip(trainer._logs["completion"], raws, strict=True)):
        words = reward.credit_by_word(index)
        assert "".join(word.text for word in words if not word.text.startswith("<")) == completion
        assert sum(word.credit for word in words) == pytest.approx(raw, rel=1e-5, abs=1e-9)
        assert words[0].best is None  # nothing stands before it
        for word in words[1:]:
            assert word.best is None or word.best_credit >= word.credit - 1e-9
    assert any(word.best is not None for word in words)


@pytest.mark.parametrize("assignment", ["token", "expected"])
def test_a_text_that_repeats_the_completion(batch, assignment):
    """Each copy is the generator's, so nothing of a metagradient is lost, and a token has the credit of all its copies."""

    def twice(row):
        return f"{row['completion']} {row['completion']}"

    fields = {"generation_kwargs": {"suppress_tokens": [60, 61, 62, 63]}, "formatting_func": twice}
    trainer, _ = batch(credit_assignment=assignment, target_max_length=16, **fields)
    assert trainer._metrics["train"]["metagradient/credit_not_written"] == [0.0]
    for example in trainer.target_training._examples:
        assert example["written_by"] == [*range(6), *range(6)]
    for index, raw in enumerate(trainer._logs["extra"]["metagradient_raw"]):
        credits = [word.credit for word in trainer.target_training.credit_by_word(index)]
        assert sum(credits) == pytest.approx(raw, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("assignment", ["token", "expected"])
def test_a_prompt_without_a_loss(batch, assignment):
    """All credit is the generator's, the first word of a completion has its own, and so have the words that could stand there."""

    def formatting_func(row):
        return {"prompt": row["prompt"] + " ", "completion": row["completion"]}

    fields = {"generation_kwargs": {"suppress_tokens": [60, 61, 62, 63]}, "formatting_func": formatting_func}
    trainer, _ = batch(credit_assignment=assignment, target_max_length=16, **fields)
    assert trainer._metrics["train"]["metagradient/credit_not_written"] == [0.0]
    reward = trainer.target_training
    for example in reward._examples:
        start = len(example["input_ids"]) - 6
        assert start > 0 and example["labels"] == [-100] * start + example["input_ids"][start:]
    for index, raw in enumerate(trainer._logs["extra"]["metagradient_raw"]):
        words = reward.credit_by_word(index)
        assert sum(word.credit for word in words) == pytest.approx(raw, rel=1e-5, abs=1e-9)
        assert all(word.credit != 0 and (word.best is not None) == (assignment == "expected") for word in words)
    trainer, _ = batch(credit_assignment=assignment, target_max_length=16, target_completion_only_loss=False, **fields)
    assert not any("labels" in example for example in trainer.target_training._examples)
    assert trainer._metrics["train"]["metagradient/credit_not_written"][0] > 0


def test_credit_in_plain_text():
    words = [WordCredit("the", 2e-5), WordCredit(" cat", -4e-5, "sea", 6e-5)]
    assert credit_text(words) == "the +0.7 | cat -1.3 (sea +2.0)"


def test_credit_is_seen(make_trainer):
    """In the table of completions, in the samples of the report and on its page."""
    trainer = make_trainer(credit_assignment="expected", log_completions=True, max_steps=1)
    trainer.train()
    column = list(trainer._logs["extra"]["metagradient_credit"])
    assert len(column) == 8 and any(" | " in text and "(" in text for text in column)
    folder = Path(trainer.args.output_dir)
    samples = [json.loads(line) for line in (folder / "report" / "samples.jsonl").read_text().splitlines()]
    for sample in samples:
        assert sum(word[1] for word in sample["words"]) == pytest.approx(sample["reward"], rel=1e-4, abs=1e-8)
    page = write_report(folder).read_text()
    assert page.count('class="word plus"') + page.count('class="word minus"') == sum(len(s["words"]) for s in samples)
    assert "&lt;eos&gt;" in page or all(word[0] != "<eos>" for s in samples for word in s["words"])


def test_positions_outside_the_loss_have_no_gradient():
    """TRL gives their tokens the log-probability 0, so candidates can seem to have any."""
    log_probs = torch.tensor([[[100.0, 0.0, -3.0]]], requires_grad=True)
    (0.0 * expected_credit(log_probs, torch.tensor([[[1.0, -1.0, 0.5]]]))).sum().backward()
    assert (log_probs.grad == 0).all()


@pytest.mark.parametrize("size", [4, 2048], ids=["one-chunk", "three-chunks"])
def test_logits_of_candidates_in_chunks(size):
    """As by plain operations, with their derivatives."""
    hidden = torch.randn(5, size, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, size, dtype=torch.float64, requires_grad=True)
    ids, cotangent = torch.randint(7, (5, 2 * size)), torch.randn(5, 2 * size)
    assert len(CandidateLogits.chunks(hidden, ids)) == (1 if size == 4 else 3)
    plain = (hidden @ weight.T).gather(1, ids)
    expected = torch.autograd.grad(plain, (hidden, weight), cotangent.double())
    logits = CandidateLogits.apply(hidden, weight, ids)
    assert torch.allclose(logits.double(), plain, atol=1e-3)
    found = torch.autograd.grad(logits, (hidden, weight), cotangent)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-3) for a, b in zip(found, expected, strict=True))
