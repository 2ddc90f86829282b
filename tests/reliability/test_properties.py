"""Drawn inputs: either the right answer, found by autograd through the unrolled run, or an error that says what is wrong."""

import json
import subprocess
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reliability.cases import (
    COMPLETIONS,
    POSITIONS,
    RECIPES,
    TEXTS,
    TOKENIZER,
    VOCAB,
    close,
    drawn_examples,
    metric,
    model,
    reference,
    reference_of_tokens,
    standardized,
    tokens_of,
)
from tests.reliability.test_processes import command, environment
from trl_dpg import MetagradientReward
from trl_dpg.data import completion_text, indices_to_train_on, to_target_examples
from trl_dpg.metagradients import TargetTrainingArguments, compute_metagradients
from trl_dpg.metagradients.runtime.examples import micro_batches, prepare_examples
from trl_dpg.metagradients.runtime.processes import Processes
from trl_dpg.validation import validate


def process(index, count):
    """One of several."""
    return Processes(SimpleNamespace(process_index=index, num_processes=count, device=torch.device("cpu")))


def drawn(max_examples):
    """The same draws in every run."""
    return settings(max_examples=max_examples, deadline=None, derandomize=True, database=None)


@drawn(120)
@given(rows=COMPLETIONS, recipe=RECIPES)
def test_completions_to_rewards(rows, recipe):
    """The whole way: texts, tokens, what can be trained on, a fine-tuning run, metagradients, rewards."""
    args = TargetTrainingArguments(**recipe)
    target = model()
    reward = MetagradientReward(target, metric, args, TOKENIZER)
    texts, ends = zip(*rows, strict=True)
    ids = [[7, TOKENIZER.eos_token_id] if ended else [7, 8] for ended in ends]
    columns = {}
    call = {"prompts": ["same"] * len(texts), "completions": list(texts), "completion_ids": ids}
    tokens = [tokens_of(*row) for row in rows]
    trained = [i for i, row in enumerate(tokens) if len(row) > 1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not trained:
            with pytest.raises(ValueError, match="empty or one token long.*max_completion_length"):
                reward(**call)
            return
        rewards = reward(**call, log_extra=columns.__setitem__)
    expected = torch.zeros(len(texts), dtype=torch.float64)
    expected[trained] = reference(target, [(tokens[i], tokens[i], 1.0) for i in trained], args)
    raw = torch.tensor(columns["metagradient_raw"], dtype=torch.float64)
    assert close(raw, expected)
    assert (raw[[i not in trained for i in range(len(texts))]] == 0).all()
    assert rewards == pytest.approx(standardized(raw).tolist(), rel=1e-9, abs=1e-9)


@drawn(150)
@given(rows=drawn_examples(), recipe=RECIPES)
def test_examples_to_metagradients(rows, recipe):
    args = TargetTrainingArguments(**recipe)
    target = model()
    complete = [(row["input_ids"], row.get("labels", row["input_ids"]), row.get("weight", 1.0)) for row in rows]
    expected = reference_of_tokens(target, complete, args)
    if expected is None and args.optim == "sgd":  # which has no root to measure
        args = replace(args, adam_epsilon_root=1e-3)
        expected = reference_of_tokens(target, complete, args)
    if expected is None:
        with pytest.raises(ValueError, match='`adam_epsilon_root="auto"` needs a gradient.*two or more tokens'):
            compute_metagradients(target, rows, metric, args)
        return
    out = compute_metagradients(target, rows, metric, args)
    assert close(out.metagradients, torch.stack([tokens.sum() for tokens in expected]))
    assert [len(tokens) for tokens in out.token_metagradients] == [len(tokens) for tokens in expected]
    zero = torch.zeros(1)  # where no example has a token
    assert close(torch.cat([*out.token_metagradients, zero]), torch.cat([*expected, zero]))


@drawn(300)
@given(text=TEXTS, ended=st.booleans(), split=st.integers(0, 4), conversation=st.booleans())
def test_text_to_tokens(text, ended, split, conversation):
    completion = text
    if conversation:  # in two messages, with one between that has no text: each is a line of its own
        completion = [{"role": "assistant", "content": part} for part in (text[:split], None, text[split:])]
        parts = [{"type": "text", "text": text[:split]}, {"type": "image"}, {"type": "text", "text": text[split:]}]
        assert completion_text([{"role": "assistant", "content": parts}]) == text
        text = "\n".join(part for part in (text[:split], text[split:]) if part)
    assert completion_text(completion) == text
    (example,) = to_target_examples(["prompt"], [completion], [ended], TOKENIZER)
    assert example == {"input_ids": tokens_of(text, ended), "text": text if text.strip() else ""}
    assert all(0 <= token < VOCAB for token in example["input_ids"])
    trained = [len(example["input_ids"]) > 1]
    if any(trained):
        assert indices_to_train_on([example]) == [0]
    else:
        with pytest.raises(ValueError, match="empty or one token long"):
            indices_to_train_on([example])


@drawn(300)
@given(rows=drawn_examples(), recipe=RECIPES, processes=st.integers(1, 5))
def test_every_example_is_in_one_micro_batch(rows, recipe, processes):
    """Of one process, once, padded on the right, whatever does not divide what; and the loss's denominator is the batch's."""
    args = TargetTrainingArguments(**recipe)
    examples = prepare_examples(rows, args.max_length, VOCAB)
    for batch in args.batches(len(examples)):
        shares = [
            micro_batches(examples, batch, args, args.micro_batch_size, torch.zeros(1), process(index, processes))
            for index in range(processes)
        ]
        supervised = [i for i in batch if examples[i].num_supervised > 0]
        assert sorted(i for share in shares for micro_batch in share for i in micro_batch.indices) == sorted(
            supervised
        )
        sizes = [sum(len(micro_batch.indices) for micro_batch in share) for share in shares]
        assert max(sizes) - min(sizes) <= 1
        total = 0.0
        for micro_batch in [micro_batch for share in shares for micro_batch in share]:
            assert len(micro_batch.indices) <= (args.micro_batch_size or len(batch))
            if args.micro_batch_tokens and len(micro_batch.indices) > 1:
                assert micro_batch.input_ids.numel() <= args.micro_batch_tokens
            for row, i in enumerate(micro_batch.indices):
                length = len(examples[i].input_ids)
                assert micro_batch.attention_mask[row].tolist() == [1] * length + [0] * (
                    micro_batch.input_ids.shape[1] - length
                )
                assert micro_batch.input_ids[row, :length].tolist() == examples[i].input_ids
                assert micro_batch.labels[row, :length].tolist() == examples[i].labels
                assert (micro_batch.labels[row, length:] == -100).all()
            total += (micro_batch.inverse_z * micro_batch.num_supervised).sum().item()
        if args.loss_normalization != "max_length":
            assert total == pytest.approx(1.0 if supervised else 0.0)


ANYTHING = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=3), st.binary(max_size=3)
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)


@drawn(300)
@given(
    rows=st.lists(
        st.fixed_dictionaries({}, optional={"input_ids": ANYTHING, "labels": ANYTHING, "weight": ANYTHING}) | ANYTHING,
        max_size=3,
    )
)
def test_anything_is_taken_or_refused_by_name(rows):
    """An example that makes no sense is a `ValueError` that names it, and nothing else."""
    try:
        prepared = prepare_examples(rows, POSITIONS, VOCAB)
    except ValueError as error:
        assert "`examples" in str(error)
    else:
        for example in prepared:
            assert all(0 <= token < VOCAB for token in example.input_ids)
            assert len(example.labels) == len(example.input_ids) <= POSITIONS


@drawn(60)
@given(rows=drawn_examples(), recipe=RECIPES)
def test_validation_is_the_stock_optimizer(rows, recipe):
    """Of what the reward differentiates, too: with `adam_epsilon_root` 0 both end at the same metric."""
    args = TargetTrainingArguments(**{**recipe, "adam_epsilon_root": 0.0})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = compute_metagradients(model(), rows, metric, args)
    assert validate(model(), rows, metric, args)["metric"] == pytest.approx(out.metric_after, rel=1e-9)


@pytest.mark.slow
def test_any_number_of_processes_gives_the_same(tmp_path):
    """One, two and three processes, 60 drawn batches each, among them fewer completions than processes."""
    results = {}
    for processes in (1, 2, 3):
        directory = tmp_path / str(processes)
        directory.mkdir()
        launched = subprocess.run(
            command("drawn", "", str(directory), processes=processes),
            env=environment(directory),
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert launched.returncode == 0, launched.stderr[-3000:]
        results[processes] = [json.loads((directory / f"{i}.json").read_text()) for i in range(processes)]
    (alone,) = results[1]
    assert len(alone) == 60 and sum("error" in case for case in alone) in range(1, 30)
    for processes in (2, 3):
        for number, expected in enumerate(alone):
            parts = [result[number] for result in results[processes]]
            if "error" in expected:
                assert all(part["error"] == expected["error"] for part in parts)
                continue
            for name in ("raw", "rewards"):
                whole = [value for part in parts for value in part[name]]
                size = max(abs(value) for value in expected[name])
                assert whole == pytest.approx(expected[name], rel=0, abs=2e-6 * size + 1e-12)


REAL = ["real", "data", "beside", "what", "was", "written"]
CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "learning_rate": st.just(3e-3),
        "num_train_epochs": st.just(2),
        "seed": st.integers(0, 3),
        "optim": st.just("sgd"),
    },
)


@drawn(30)
@given(
    rows=COMPLETIONS,
    recipe=RECIPES,
    ratio=st.sampled_from([0.0, 0.3, 0.6]),
    variants=st.lists(CHANGES, min_size=1, max_size=2),
)
def test_mixed_and_varied_completions_to_rewards(rows, recipe, ratio, variants):
    """Real examples stand in each variant's run, and have no reward of their own; the reward is the mean over variants."""
    args = TargetTrainingArguments(**recipe)
    target = model()
    real = [{"text": text} for text in REAL] if ratio else None
    reward = MetagradientReward(
        target, metric, args, TOKENIZER, replay_dataset=real, replay_ratio=ratio, variants=variants
    )
    tokens = [tokens_of(*row) for row in rows]
    trained = [i for i, row in enumerate(tokens) if len(row) > 1]
    if not trained:
        return
    texts, ends = zip(*rows, strict=True)
    ids = [[7, TOKENIZER.eos_token_id] if ended else [7, 8] for ended in ends]
    columns = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rewards = reward(["same"] * len(texts), list(texts), ids, log_extra=columns.__setitem__)
    data = [(tokens[i], tokens[i], 1.0) for i in trained]
    if ratio:
        beside = [row["input_ids"] for row in reward.replay.beside(len(trained), 0)]
        assert len(beside) == round(len(trained) * ratio / (1 - ratio))
        assert all(row in [tokens_of(text, True) for text in REAL[1:5]] for row in beside)
        data += [(row, row, 1.0) for row in beside]
    expected = torch.zeros(len(texts), dtype=torch.float64)
    for changes in variants:
        expected[trained] += reference(target, data, replace(args, **changes))[: len(trained)] / len(variants)
    raw = torch.tensor(columns["metagradient_raw"], dtype=torch.float64)
    assert close(raw, expected)
    assert rewards == pytest.approx(standardized(raw).tolist(), rel=1e-9, abs=1e-9)
