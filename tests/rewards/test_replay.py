"""Real examples beside generated ones: in rewards, in validation, and what is refused."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from tests.metagradients.cases import relative_error
from tests.reliability.cases import TOKENIZER, metric, model, tokens_of
from tests.trainer.test_validation import by_hand
from trl_dpg import MetagradientReward
from trl_dpg.metagradients import TargetTrainingArguments, train_and_measure
from trl_dpg.metrics import LMHeadNorm
from trl_dpg.replay import HELD_OUT, draw, num_replayed
from trl_dpg.rewards import NaiveReward
from trl_dpg.testing import tiny_tokenizer


TEXTS = ["a red door", "ab", "old boat", "b a b a"]
REAL = [{"text": f"real {chr(97 + i)}"} for i in range(12)]
RECIPE = {"learning_rate": 1e-2, "adam_epsilon_root": 1e-4, "batch_size": 4}
VARIANTS = [
    {},
    {"learning_rate": 3e-2, "num_train_epochs": 2, "seed": 5},
    {"optim": "sgd", "learning_rate": 0.1, "batch_size": 8},
]


def make(reward_class=MetagradientReward, **kwargs):
    args = TargetTrainingArguments(**{**RECIPE, **kwargs.pop("recipe", {})})
    return reward_class(model(), metric, args, TOKENIZER, **kwargs)


def call(reward, texts=TEXTS, step=0, **hooks):
    ids = [[7, TOKENIZER.eos_token_id]] * len(texts)
    state = SimpleNamespace(global_step=step)
    return reward(["same"] * len(texts), texts, ids, trainer_state=state, **hooks)


@pytest.mark.parametrize("variants", [None, VARIANTS], ids=["recipe", "variants"])
def test_finite_differences(variants):
    """Of the metric's mean over variants, after whole runs on the mix, in the weight of each generated example."""
    reward, columns = make(variants=variants, replay_dataset=REAL, replay_ratio=0.5), {}
    call(reward, step=3, log_extra=columns.__setitem__)
    rows = [{"input_ids": tokens_of(text, True), "weight": 1.0} for text in TEXTS]
    real = reward.replay.beside(len(rows), 3)
    assert len(real) == 4
    recipes = [replace(reward.args, **changes) for changes in variants or [{}]]
    recipes = [replace(recipe, seed=recipe.seed + 3) for recipe in recipes]

    def value(i, shift):
        shifted = [{**row, "weight": 1.0 + shift * (i == j)} for j, row in enumerate(rows)]
        outs = [train_and_measure(model(), shifted + real, metric, recipe) for recipe in recipes]
        return sum(out.metric_after for out in outs) / len(outs)

    h = 1e-4
    slopes = [(value(i, h) - value(i, -h)) / (2 * h) for i in range(4)]
    raw = torch.tensor(columns["metagradient_raw"], dtype=torch.float64)
    assert relative_error(raw, torch.tensor(slopes, dtype=torch.float64)) < 1e-5
    tokens = torch.stack([row.double().sum() for row in reward._tokens])
    assert relative_error(tokens, raw) < 1e-5


def test_which_rows_stand_where():
    reward = make(replay_dataset=Dataset.from_list(REAL), replay_ratio=0.25)
    replay = reward.replay
    tokens = [{"input_ids": tokens_of(row["text"], True)} for row in REAL]
    assert replay.held_out == tokens[::HELD_OUT]
    assert replay.for_training == [row for i, row in enumerate(tokens) if i % HELD_OUT]
    drawn = [replay.beside(6, step) for step in (0, 1, 0)]
    assert drawn[0] == drawn[2] != drawn[1] and len(drawn[0]) == 2
    assert all(example in replay.for_training for example in drawn[0] + drawn[1])
    assert all(example in replay.held_out for example in replay.beside_in_validation(60))
    assert [num_replayed(n, 0.5) for n in (0, 1, 7)] == [0, 1, 7] and num_replayed(100, 0.2) == 25
    assert sorted(draw(5, 10, 2**64 + 1)) == sorted([*range(5)] * 2) and draw(5, 0, 0) == []


def test_generated_examples_alone_have_rewards(monkeypatch):
    seen, metrics, columns = [], {}, {}
    reward = make(replay_dataset=REAL, replay_ratio=0.5, num_generations=2, cross_group_batching=False)
    run_each = reward.run_each
    monkeypatch.setattr(
        reward,
        "run_each",
        lambda run, *args: run_each(lambda _, rows, *a, **k: seen.append(rows) or run(_, rows, *a, **k), *args),
    )
    rewards = call(reward, log_metric=metrics.__setitem__, log_extra=columns.__setitem__)
    assert len(rewards) == len(columns["metagradient_raw"]) == 4 and sum(rewards) == pytest.approx(0, abs=1e-9)
    assert [len(rows) for rows in seen] == [4, 4] and seen[0][2:] == seen[1][2:]
    assert metrics["metagradient/replayed"] == 4


def test_naive(monkeypatch):
    columns, metrics = {}, {}
    naive = make(NaiveReward, num_generations=2, replay_dataset=REAL, replay_ratio=0.5, variants=VARIANTS)
    call(naive, log_extra=columns.__setitem__, log_metric=metrics.__setitem__)
    rows = [{"input_ids": tokens_of(text, True)} for text in TEXTS]
    expected = []
    for number in range(2):
        data = rows[number::2] + naive.replay.beside(2, 0)
        recipes = [replace(naive.args, **changes) for changes in VARIANTS]
        outs = [train_and_measure(model(), data, metric, recipe) for recipe in recipes]
        expected.append(sum(out.metric_after - out.metric_before for out in outs) / 3)
    assert columns["naive_raw"] == pytest.approx(expected * 2, rel=1e-9)
    assert metrics["naive/replayed"] == 4


def test_validation_is_an_ordinary_run_on_the_mix(causal_lm):
    """Of completions and held-out rows, by a plain PyTorch loop."""
    tokenizer = tiny_tokenizer()
    real = [
        {"text": text} for text in ("the red sun", "you see", "a dog", "walk to the moon", "six seven", "blue sea")
    ]
    args = TargetTrainingArguments(batch_size=3, learning_rate=1e-2)
    reward = MetagradientReward(
        causal_lm(seed=1).double(), LMHeadNorm(), args, tokenizer, replay_dataset=real, replay_ratio=0.4,
        variants=[{"learning_rate": 3e-2}, {}],
    )  # fmt: skip
    completions = [{"input_ids": tokenizer(text)["input_ids"]} for text in ("old boat", "cold snow and wind", "go on")]
    figures = reward.validate([*completions, {"input_ids": []}], torch.device("cpu"))
    eos = tokenizer.eos_token_id
    held_out = [[*tokenizer(real[i]["text"])["input_ids"], eos] for i in (0, 5)]
    added = [row["input_ids"] for row in reward.replay.beside_in_validation(3)]
    assert sorted(added) == sorted(held_out)
    for prefix, recipe in {"": args, "variant_0_": replace(args, learning_rate=3e-2), "variant_1_": args}.items():
        other = causal_lm(seed=1).double()
        loss = by_hand(other, [*completions, *({"input_ids": row} for row in added)], recipe)
        assert figures[f"{prefix}target_loss"] == pytest.approx(loss, rel=1e-9)
        assert figures[f"{prefix}lm_head_norm"] == pytest.approx(other.lm_head.weight.norm().item(), rel=1e-9)
        assert figures[f"{prefix}target_steps"] == 2


REFUSED = {
    "ratio alone": ({"replay_ratio": 0.5}, "`replay_ratio` is 0.5, but there is no `replay_dataset`"),
    "data alone": ({"replay_dataset": REAL}, "`replay_dataset` is given, but `replay_ratio` is 0"),
    "all of it": ({"replay_dataset": REAL, "replay_ratio": 1.0}, r"`replay_ratio` must be a number in \[0, 1\), got 1.0"),
    "one row": ({"replay_dataset": REAL[:1], "replay_ratio": 0.5}, "`replay_dataset` must be .*at least two rows, got 1"),
    "columns": ({"replay_dataset": [{"prompt": "a"}] * 2, "replay_ratio": 0.5}, r"`replay_dataset` has the columns \['pro"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_a_model_is_loaded(case, make_trainer):
    arguments, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        MetagradientReward("no/such/model", metric, **arguments)
    with pytest.raises(ValueError, match=message):
        make_trainer(model="no/generator", target_model="no/target", **arguments)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a b"}, {"text": ""}], "`replay_dataset` has nothing to train on in row 1"),
        ([{"text": "a b"}, {"text": 5}], "`replay_dataset` cannot be used: .* is nothing to train on"),
    ],
)
def test_rows_that_cannot_be_used(rows, message):
    with pytest.raises(ValueError, match=message):
        make(replay_dataset=rows, replay_ratio=0.5)


def test_prompts_and_completions():
    """The loss of a real row is on its completion, as in SFT."""
    rows = [{"prompt": "say: ", "completion": "ab"}] * 2
    (example,) = make(replay_dataset=rows, replay_ratio=0.5).replay.for_training
    assert example["labels"][:5] == [-100] * 5 and example["labels"][5:] == example["input_ids"][5:]
