"""Preference data as a metric, beside TRL's own DPO."""

import copy

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

from trl_dpg.metrics import PreferenceMargin


ROWS = [
    {"prompt": "the cat ", "chosen": "sat on the mat.", "rejected": "ran"},
    {"prompt": "one ", "chosen": "two</s>", "rejected": "three and four"},
    {"prompt": "a ", "chosen": "b", "rejected": "c d e f g"},
]


@pytest.fixture
def with_padding(make_tokenizer):
    return make_tokenizer(bos_token="<s>", eos_token="</s>", pad_token="<unk>")


def test_equals_trl(make_gpt2, with_padding, move, tmp_path):
    reference = make_gpt2(torch.float32)
    model = copy.deepcopy(reference)
    metric = PreferenceMargin(ROWS, with_padding, beta=0.3, batch_size=2)
    metric.setup(model)
    move(model, 0.02)
    args = DPOConfig(
        str(tmp_path), beta=0.3, per_device_train_batch_size=len(ROWS), use_cpu=True, bf16=False, report_to="none",
        gradient_checkpointing=False,
    )  # fmt: skip
    trainer = DPOTrainer(
        copy.deepcopy(model), reference, args, train_dataset=Dataset.from_list(ROWS), processing_class=with_padding
    )
    trainer.model.eval()
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, batch)
    assert metric(model).item() == pytest.approx(-loss.item(), abs=1e-6)
    logged, values = trainer._metrics["eval"], metric.readouts(model)
    assert values["preference_accuracy"] == pytest.approx(logged["rewards/accuracies"][0])
    assert values["preference_margin"] == pytest.approx(logged["rewards/margins"][0], abs=1e-6)


def test_tokens_equal_trl_where_they_merge(tmp_path):
    """The answers start where either whole text diverges from the prompt."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    bpe = BPE(vocab={"</s>": 0, "a": 3, "b": 4, "c": 5, "ab": 6}, merges=[("a", "b")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(bpe), eos_token="</s>", pad_token="</s>")
    metric = PreferenceMargin([{"prompt": "ca", "chosen": "bc", "rejected": "cc"}], tokenizer)
    assert metric._rows == [([5, 6, 5, 0], [-100, 6, 5, 0]), ([5, 3, 5, 5, 0], [-100, 3, 5, 5, 0])]


def test_gradient_and_start(gpt2, with_padding, move, assert_gradient):
    metric = PreferenceMargin(Dataset.from_list(ROWS), with_padding, batch_size=4)
    metric.setup(gpt2)
    assert metric(gpt2).item() == pytest.approx(-0.6931471805599453, rel=1e-12)
    assert metric.readouts(gpt2) == {"preference_accuracy": 0.0, "preference_margin": 0.0}
    move(gpt2, 0.05)
    assert metric(gpt2).dtype == torch.float64 and metric(gpt2).shape == ()
    assert_gradient(metric, gpt2)


def test_tokenizer_of_the_model(gpt2, with_padding, tmp_path):
    metric = PreferenceMargin(ROWS)
    with pytest.raises(ValueError, match=r"`PreferenceMargin.setup\(model\)` must be called"):
        metric(gpt2)
    with pytest.raises(ValueError, match="`processing_class` is None and the tokenizer of `target_model`"):
        metric.setup(gpt2)
    with_padding.save_pretrained(tmp_path)
    gpt2.config._name_or_path = str(tmp_path)
    metric.setup(gpt2)
    assert metric._rows == PreferenceMargin(ROWS, AutoTokenizer.from_pretrained(tmp_path))._rows


@pytest.mark.parametrize(
    ("rows", "kwargs", "message"),
    [
        ([], {}, "`dataset` is empty"),
        ([{"prompt": "a", "chosen": "b"}], {}, "row 0 has the columns .* 'rejected' is a NoneType"),
        ([{"prompt": [{}], "chosen": "b", "rejected": "c"}], {}, "row 0 .* 'prompt' is a list.*chat template"),
        ([ROWS[0]], {"max_length": 3}, "row 0, 'chosen', has no token of the answer .*`max_length` = 3"),
        ([ROWS[0]], {"max_length": 1}, "`max_length` must be at least 2"),
        ([ROWS[0]], {"beta": 0}, "`beta` must be a positive number, got 0"),
        ([ROWS[0]], {"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
    ],
)
def test_bad_input(with_padding, rows, kwargs, message):
    with pytest.raises(ValueError, match=message):
        PreferenceMargin(rows, with_padding, **kwargs)


def test_rows_that_do_not_fit_the_target(make_gpt2, with_padding):
    long = [{"prompt": "a", "chosen": "b" * 70, "rejected": "c"}]
    with pytest.raises(ValueError, match="row 0, 'chosen', has 72 tokens, but `target_model` has 64 positions"):
        PreferenceMargin(long, with_padding).setup(make_gpt2())
    with pytest.raises(ValueError, match="row 0, 'chosen', has the token id"):
        PreferenceMargin(ROWS, with_padding).setup(make_gpt2(vocab_size=10))
