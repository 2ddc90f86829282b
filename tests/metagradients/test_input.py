"""Bad input is refused by name and with a remedy; examples that cannot be learned from are harmless."""

import math
import re

import pytest
import torch
from datasets import Dataset
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model

from trl_dpg.metagradients import TargetTrainingArguments, compute_metagradients
from trl_dpg.metagradients.compute import train_and_measure
from trl_dpg.metagradients.runtime.examples import prepare_examples
from trl_dpg.validation import validate


VOCAB = 17
POSITIONS = 16


def config():
    torch.manual_seed(0)
    return GPT2Config(
        vocab_size=VOCAB, n_positions=POSITIONS, n_embd=8, n_layer=1, n_head=2, tie_word_embeddings=False,
        initializer_range=0.3, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip


def gpt2(dtype=torch.float64):
    return GPT2LMHeadModel(config()).to(dtype)


def metric(model):
    return -sum((p.double() ** 2).sum() for p in model.parameters())


# Arguments

NUMBERS = ["learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "adam_epsilon_root"]
NUMBERS += ["warmup_steps", "max_grad_norm", "curvature_tolerance"]
WHOLE_NUMBERS = ["num_train_epochs", "batch_size", "micro_batch_size", "micro_batch_tokens", "max_length", "seed"]
CHOICES = ["optim", "lr_scheduler_type", "loss_normalization", "curvature", "tape"]
SWITCHES = ["weight_decay_on_norm_and_bias", "shuffle", "bf16", "gradient_checkpointing"]
NOT_NUMBERS = [math.nan, math.inf, -math.inf, True, "1e-6", "", [1], -1]

BAD_ARGUMENTS = [(name, value) for name in NUMBERS + WHOLE_NUMBERS for value in NOT_NUMBERS]
BAD_ARGUMENTS += [
    (name, None) for name in NUMBERS + WHOLE_NUMBERS if name not in ("micro_batch_size", "micro_batch_tokens")
]
BAD_ARGUMENTS += [("learning_rate", 0), ("adam_beta1", 1), ("adam_beta2", 1.0), ("adam_beta2", 2)]
BAD_ARGUMENTS += [(name, 1.5) for name in WHOLE_NUMBERS]
BAD_ARGUMENTS += [(name, 0) for name in WHOLE_NUMBERS if name != "seed"]
BAD_ARGUMENTS += [("max_length", 1), ("seed", 2**64)]
BAD_ARGUMENTS += [(name, value) for name in CHOICES for value in ("nonsense", "", None, 1, math.nan, True, ["adamw"])]
BAD_ARGUMENTS += [(name, value) for name in SWITCHES for value in ("false", 0, 1, None, math.nan)]
BAD_ARGUMENTS += [("momentum", value) for value in (1, -0.1, "0.9", math.nan, True)]
BAD_ARGUMENTS += [("nesterov", value) for value in ("true", 2, math.nan)]
BAD_ARGUMENTS += [("tape_dir", value) for value in ("no/such/directory", "", 1, ["/tmp"], __file__)]


@pytest.mark.parametrize(("name", "value"), BAD_ARGUMENTS)
def test_bad_argument(name, value):
    """The message names the field and the value, and says what is wanted."""
    with pytest.raises(ValueError, match=rf"^`{name}` must be .*, got {re.escape(repr(value))}"):
        TargetTrainingArguments(**{name: value})


def test_every_argument_is_checked():
    fields = set(TargetTrainingArguments.__dataclass_fields__) - {"disable_tqdm"}
    assert {name for name, _ in BAD_ARGUMENTS} == fields


@pytest.mark.parametrize("name", NUMBERS + WHOLE_NUMBERS)
def test_number_as_text_names_the_cause(name):
    """YAML reads 1e-6 as text."""
    with pytest.raises(ValueError, match="in YAML, write 1.0e-6"):
        TargetTrainingArguments(**{name: "1e-6"})


def test_adamw_that_divides_by_zero():
    with pytest.raises(ValueError, match="`adam_epsilon` and `adam_epsilon_root` are both 0.*1e-9"):
        TargetTrainingArguments(adam_epsilon=0.0, adam_epsilon_root=0.0)
    TargetTrainingArguments(adam_epsilon=0.0, adam_epsilon_root=0.0, optim="sgd")


def test_warm_up_without_effect():
    with pytest.raises(ValueError, match="`warmup_steps` 10 has no effect.*'constant'.*constant_with_warmup"):
        TargetTrainingArguments(warmup_steps=10)
    args = TargetTrainingArguments(warmup_steps=0.1, lr_scheduler_type="linear", batch_size=4)
    with pytest.warns(
        UserWarning, match="only step on 4 examples is the first of `warmup_steps` 0.1.*nothing is trained"
    ):
        assert args.learning_rates(4) == [0.0]
    assert max(args.learning_rates(5)) > 0


@pytest.mark.parametrize(
    ("name", "value"),
    [("learning_rate", 1), ("adam_beta1", 0), ("adam_epsilon_root", 0), ("adam_epsilon_root", "auto"), ("seed", 0)]
    + [
        ("warmup_steps", 0),
        ("micro_batch_size", None),
        ("micro_batch_tokens", None),
        ("max_length", 2),
        ("max_grad_norm", 0),
    ],
)
def test_argument_at_its_bound(name, value):
    assert getattr(TargetTrainingArguments(**{name: value}), name) == value


@pytest.mark.parametrize("name", WHOLE_NUMBERS)
def test_whole_numbers_become_integers(name):
    """8.0 is as good as 8, and works as such."""
    args = TargetTrainingArguments(**{name: 8.0})
    assert getattr(args, name) == 8 and isinstance(getattr(args, name), int)
    out = compute_metagradients(gpt2(), [{"input_ids": [1, 2, 3]}], metric, args)
    assert out.metagradients.any()


# Examples

GOOD = {"input_ids": [1, 2, 3]}
BAD_EXAMPLES = {
    "empty": ([], "`examples` is empty.*Pass at least one"),
    "columns": ({"input_ids": [[1, 2]]}, r"`examples` must be a sequence of dicts.*item 0 is of type str.*Write"),
    "list-of-lists": ([GOOD, [1, 2]], r"`examples` must be a sequence of dicts.*item 1 is of type list.*Write"),
    "none": ([None], r"`examples` must be a sequence of dicts.*item 0 is of type NoneType.*Write"),
    "no-input-ids": ([GOOD, {"text": "a"}], r"`examples\[1\]` has the keys \['text'\] but no `input_ids`.*Tokenize"),
    "nested": (
        [{"input_ids": [[1, 2]]}],
        r"`examples\[0\]` needs `input_ids` to be a flat list.*one example per dict",
    ),
    "ragged": ([{"input_ids": [[1, 2], [3]]}], r"`examples\[0\]` needs `input_ids` to be a flat list.*per dict"),
    "nested-tensor": ([{"input_ids": torch.ones(1, 2, dtype=torch.long)}], r"` needs `input_ids` to be a flat list"),
    "scalar": ([{"input_ids": 3}], r"`examples\[0\]` needs `input_ids` to be a flat list.*got 3.*tokenized"),
    "text": ([{"input_ids": "abc"}], r"`examples\[0\]` needs `input_ids` to be a flat list.*got 'abc'.*tokenized"),
    "null": ([{"input_ids": None}], r"`examples\[0\]` needs `input_ids` to be a flat list.*got None.*tokenized"),
    "null-token": ([{"input_ids": [1, None]}], r"`examples\[0\]` needs `input_ids` to be a flat list"),
    "fractions": ([{"input_ids": [1.0, 2.5]}], r"`examples\[0\]` needs `input_ids` to be a flat list"),
    "bools": ([{"input_ids": [True, False]}], r"`examples\[0\]` needs `input_ids` to be a flat list"),
    "huge-token": ([{"input_ids": [1, 2**70]}], r"`examples\[0\]` needs `input_ids` to be a flat list"),
    "token-above": (
        [{"input_ids": [1, VOCAB]}],
        rf"holds token {VOCAB} in `input_ids`, outside the target's vocabulary of {VOCAB}.*own",
    ),
    "token-below": (
        [{"input_ids": [16, -1]}],
        rf"holds token -1 in `input_ids`, outside the target's vocabulary of {VOCAB}.*own",
    ),
    "few-labels": (
        [{**GOOD, "labels": [1, 2]}],
        r"`examples\[0\]` needs `labels` to be a flat list of 3 .*got \[1, 2\].*-100",
    ),
    "many-labels": (
        [{**GOOD, "labels": [1] * 4}],
        r"`examples\[0\]` needs `labels` to be a flat list of 3 .*one for each",
    ),
    "nested-labels": ([{**GOOD, "labels": [[1, 2, 3]]}], r"`examples\[0\]` needs `labels` to be a flat list"),
    "fraction-labels": ([{**GOOD, "labels": [1.5, 2.0, 3.0]}], r"`examples\[0\]` needs `labels` to be a flat list"),
    "label-above": ([{**GOOD, "labels": [1, 2, VOCAB]}], rf"holds token {VOCAB} in `labels`.* of {VOCAB}.*or -100"),
    "label-below": ([{**GOOD, "labels": [1, 2, -1]}], rf"holds token -1 in `labels`.* of {VOCAB}.*or -100"),
    "weight-nan": (
        [{**GOOD, "weight": math.nan}],
        r"`examples\[0\]` needs `weight` to be a finite number.*leave it out",
    ),
    "weight-inf": ([{**GOOD, "weight": -math.inf}], r"`examples\[0\]` needs `weight` to be a finite number, got -inf"),
    "weight-text": (
        [{**GOOD, "weight": "a lot"}],
        r"`examples\[0\]` needs `weight` to be a finite number, got 'a lot'",
    ),
    "weight-vector": ([{**GOOD, "weight": [1.0, 2.0]}], r"`examples\[0\]` needs `weight` to be a finite number"),
    "hole": (
        [{**GOOD, "attention_mask": [1, 0, 1]}],
        r"`examples\[0\]` has an `attention_mask` with a 0 between ones, at position 1.*Remove the tokens",
    ),
    "short-mask": (
        [{**GOOD, "attention_mask": [1, 1]}],
        r"`examples\[0\]` needs `attention_mask` to be 3 zeros and ones.*got \[1, 1\].*leave it out",
    ),
    "no-mask": ([{**GOOD, "completion_mask": [0, 1, 2]}], r"needs `completion_mask` to be 3 zeros and ones"),
    "text-mask": ([{**GOOD, "assistant_masks": "011"}], r"needs `assistant_masks` to be 3 zeros and ones.*got '011'"),
    "packed": (
        [{**GOOD, "seq_lengths": [2, 1]}],
        r"`examples\[0\]` has `seq_lengths` \[2, 1\]: several texts, packed.*one example per text",
    ),
    "positions": (
        [GOOD, {**GOOD, "position_ids": [0, 1, 0]}],
        r"`examples\[1\]` has `position_ids` \[0, 1, 0\].*Only \[0, 1, 2\] .*one example per text",
    ),
    "segments": (
        [{**GOOD, "token_type_ids": [0, 0, 1]}],
        r"has `token_type_ids` \[0, 0, 1\].*Only \[0, 0, 0\] ",
    ),
    "image": ([{**GOOD, "pixel_values": [[0.0]]}], r"`examples\[0\]` has `pixel_values`, but.*Remove the column"),
    "too-long": (
        [{"input_ids": [1] * 17}],
        "An example has 17 tokens, but `model` has 16 positions.*`max_length` to 16",
    ),
}


@pytest.mark.parametrize("function", [compute_metagradients, validate])
@pytest.mark.parametrize("name", BAD_EXAMPLES)
def test_bad_examples(name, function):
    examples, message = BAD_EXAMPLES[name]
    with pytest.raises(ValueError, match=message):
        function(gpt2(), examples, metric, TargetTrainingArguments())


@pytest.mark.parametrize(
    "example",
    [
        {"input_ids": torch.tensor([1, 2, 3])},
        {"input_ids": torch.tensor([1, 2, 3], dtype=torch.int32), "labels": torch.tensor([1, 2, 3])},
        {"input_ids": (1, 2, 3), "labels": [1, 2, 3], "weight": torch.tensor(1.0), "text": "unused"},
    ],
)
def test_forms_of_an_example(example):
    """Tensors, tuples and further keys do as well as lists."""
    expected = compute_metagradients(gpt2(), [GOOD], metric)
    assert torch.equal(compute_metagradients(gpt2(), [example], metric).metagradients, expected.metagradients)


PADDED = {
    "right": {"input_ids": [1, 2, 3, VOCAB], "attention_mask": [1, 1, 1, 0], "token_type_ids": [0] * 4},
    "left": {"input_ids": [VOCAB, VOCAB, 1, 2, 3], "attention_mask": torch.tensor([0, 0, 1, 1, 1])},
    "both": {"input_ids": [0, 1, 2, 3, 0], "attention_mask": [False, True, True, True, False]},
    "labels": {"input_ids": [0, 1, 2, 3], "labels": [5, 1, 2, 3], "attention_mask": [0, 1, 1, 1]},
    "positions": {"input_ids": [0, 1, 2, 3], "attention_mask": [0, 1, 1, 1], "position_ids": [1, 0, 1, 2]},
    "none": {**GOOD, "attention_mask": [1, 1, 1], "position_ids": torch.arange(3), "seq_lengths": [3]},
    "missing": {**GOOD, "attention_mask": None, "completion_mask": None, "position_ids": None, "images": None},
}


@pytest.mark.parametrize("function", [compute_metagradients, validate])
@pytest.mark.parametrize("name", PADDED)
def test_padding_is_left_out(name, function):
    """On either side, also where its token is not in the vocabulary and where it would be cut first."""
    args = TargetTrainingArguments(batch_size=2, adam_epsilon_root=1e-4, max_length=3)
    other = {"input_ids": [4, 5, 6, 7]}
    out, expected = (function(gpt2(), [example, other], metric, args) for example in (PADDED[name], GOOD))
    if function is compute_metagradients:
        assert torch.equal(out.metagradients, expected.metagradients)
        out, expected = out.metric_after, expected.metric_after
    assert out == expected


def prepared(*examples):
    """Tokens, labels and weights of examples."""
    return [example[:3] for example in prepare_examples(examples, 16, VOCAB)]


def test_masks_say_what_is_supervised():
    """Both at once, as in SFT, and padding too; `labels`, where there are any, say it instead."""
    tokens = {"input_ids": [1, 2, 3, 4, 5, 0]}
    masks = {"completion_mask": [0, 0, 1, 1, 1, 1], "assistant_masks": [1, 1, 1, 0, 1, 1]}
    padding = {"attention_mask": [1, 1, 1, 1, 1, 0]}
    expected = [{"input_ids": [1, 2, 3, 4, 5], "labels": [-100, -100, 3, -100, 5]}]
    labels = {"labels": [-100, -100, 3, -100, 5, 0]}
    for example in ({**tokens, **masks, **padding}, {**tokens, **labels, **padding, "completion_mask": [1] * 6}):
        assert prepared(example) == prepared(*expected)


def test_an_example_that_is_all_padding_is_empty():
    """As one that has no token: harmless."""
    padding = {"input_ids": [0, 0, 0], "attention_mask": [0, 0, 0]}
    assert prepared(padding, GOOD) == prepared({"input_ids": []}, GOOD)


def test_longer_than_the_model_but_cut():
    """Only what is left after `max_length` has to fit."""
    out = compute_metagradients(gpt2(), [{"input_ids": [1] * 17}], metric, TargetTrainingArguments(max_length=16))
    assert out.metagradients.any()


# Metrics


class UncalledMetric:
    def __call__(self, model):
        return metric(model)


BAD_METRICS = {
    "missing": (None, ValueError, "`metric` must be a function.*got None.*Pass"),
    "class": (UncalledMetric, ValueError, "`metric` must be a function.*UncalledMetric.*an instance"),
    "vector": (lambda m: m.lm_head.weight.sum(0), ValueError, r"`metric` must return a scalar.*shape \(8,\).*Reduce"),
    "float": (lambda m: 1.0, ValueError, "`metric` must return a scalar tensor, got one of type float"),
    "none": (lambda m: None, ValueError, "`metric` must return a scalar tensor, got one of type NoneType"),
    "nan": (
        lambda m: m.lm_head.weight.sum() * math.nan,
        FloatingPointError,
        "`metric` returned nan.*Check its formula",
    ),
    "inf": (
        lambda m: m.lm_head.weight.sum() + math.inf,
        FloatingPointError,
        "`metric` returned inf.*Check its formula",
    ),
    "constant": (
        lambda m: torch.tensor(1.0),
        ValueError,
        "`metric` returned a tensor that is cut off.*without `detach",
    ),
    "integer": (lambda m: torch.tensor(1), ValueError, "`metric` returned a tensor that is cut off.*without `detach"),
    "detached": (
        lambda m: metric(m).detach(),
        ValueError,
        "`metric` returned a tensor that is cut off.*without `detach",
    ),
    "unrelated": (
        lambda m: torch.ones((), requires_grad=True) * 2,
        ValueError,
        "`metric` does not depend on what is trained.*Check that it reads trained parameters",
    ),
    "times-zero": (
        lambda m: (m.lm_head.weight * 0).sum(),
        ValueError,
        "`metric` does not depend on what is trained.*Check that it reads trained parameters",
    ),
    "infinite-slope": (
        lambda m: (m.lm_head.weight * 0).sum().sqrt(),
        FloatingPointError,
        "Not finite: the gradient of `metric`",
    ),
}


@pytest.mark.parametrize("name", BAD_METRICS)
def test_bad_metric(name):
    bad_metric, error, message = BAD_METRICS[name]
    with pytest.raises(error, match=message):
        compute_metagradients(gpt2(), [GOOD], bad_metric)


def test_metric_of_a_frozen_part():
    """As that of a head beside adapters: the message names this cause too."""
    model = gpt2()
    model.lm_head.requires_grad_(False)
    with pytest.raises(ValueError, match="`metric`.*does not require a gradient.*trained parameters .with adapters"):
        compute_metagradients(model, [GOOD], lambda m: m.lm_head.weight.sum())


def test_metric_that_breaks_in_training():
    """Right on the original model, not on the trained one: the message says where to look."""
    args = TargetTrainingArguments(learning_rate=1.0)
    with pytest.raises(FloatingPointError, match="`metric` returned nan.*lower `learning_rate`"):
        compute_metagradients(gpt2(), [GOOD], lambda m: (m.lm_head.weight.square().sum() - 20.0).neg().sqrt(), args)


def test_a_metric_of_one_element_is_a_scalar():
    out = compute_metagradients(gpt2(), [GOOD], lambda m: metric(m).reshape(1, 1))
    assert torch.equal(out.metagradients, compute_metagradients(gpt2(), [GOOD], metric).metagradients)


# Models


def frozen():
    return gpt2().requires_grad_(False)


def half():
    return gpt2(torch.bfloat16)


def compiled_part():
    model = gpt2()
    model.transformer.h[0] = torch.compile(model.transformer.h[0])
    return model


def prompt_tuned():
    return get_peft_model(gpt2(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


def made_for_inference():
    with torch.inference_mode():
        return gpt2()


def partly_half():
    model = gpt2(torch.float32)
    model.transformer.h[0].mlp.to(torch.float16)
    return model


BAD_MODELS = {
    "no-head": (
        lambda: GPT2Model(config()),
        ValueError,
        "`model` is a GPT2Model.*no language-modeling head.*AutoModelForC",
    ),
    "no-language-model": (lambda: nn.Linear(2, 2), ValueError, "`model` is a Linear.*no language-modeling head"),
    "frozen": (frozen, ValueError, "`model` .*no trainable parameter.*Train adapters"),
    "bfloat16": (
        half,
        ValueError,
        "`model` has the trainable parameter `.*` in torch.bfloat16.*`dtype=torch.float32`",
    ),
    "compiled": (
        lambda: torch.compile(gpt2()),
        ValueError,
        r"The target model is a wrapper that `torch.compile.*Pass the module itself.*`model.compile\(\)`",
    ),
    "compiled-part": (
        compiled_part,
        ValueError,
        "`transformer.h.0` of the target model is a wrapper that `torch.compile",
    ),
    "data-parallel": (
        lambda: nn.DataParallel(gpt2()),
        ValueError,
        "The target model is wrapped in DataParallel.*Unwrap the model",
    ),
    "meta": (lambda: gpt2().to("meta"), ValueError, "all of its weights.*on the meta device"),
    "prompt-tuning": (prompt_tuned, ValueError, "gives 6 logits for 4 tokens.*prompt tuning.*another adapter"),
    "inference": (made_for_inference, ValueError, "`model` was made or loaded under `torch.inference_mode"),
    "partly-float16": (
        partly_half,
        ValueError,
        r"`transformer.h.0.mlp.c_fc.weight` in torch.float16.*dtype=torch.float32",
    ),
}


@pytest.mark.parametrize("function", [compute_metagradients, validate])
@pytest.mark.parametrize("name", BAD_MODELS)
def test_bad_model(name, function):
    make_model, error, message = BAD_MODELS[name]
    with pytest.raises(error, match=message):
        function(make_model(), [GOOD], metric, TargetTrainingArguments())


@pytest.mark.parametrize("function", [compute_metagradients, train_and_measure, validate])
def test_inference_mode(function):
    """Nothing can be trained under it, and gradients cannot be turned on; under `no_grad` they can."""
    with torch.inference_mode(), pytest.raises(ValueError, match="called under `torch.inference_mode.*`torch.no_grad"):
        function(gpt2(), [GOOD], metric, TargetTrainingArguments())
    model = gpt2()
    with torch.no_grad():
        out = function(model, [GOOD], metric, TargetTrainingArguments())
    again = function(model, [GOOD], metric, TargetTrainingArguments())
    names = ("metric_after", "losses")  # `validate` returns a dict
    assert out == again if isinstance(out, dict) else all(getattr(out, n) == getattr(again, n) for n in names)


def test_prefix_counts_as_positions():
    """As tokens before the text do."""
    model = get_peft_model(gpt2(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).double()
    examples = [{"input_ids": [1] * 15}]
    with pytest.raises(ValueError, match="15 tokens, and 2 for .*virtual tokens.* 16 positions.*`max_length` to 14"):
        compute_metagradients(model, examples, lambda m: m(input_ids=torch.tensor([[1, 2]])).logits.square().mean())


def test_half_precision_where_it_is_not_trained():
    """A frozen half-precision layer is no obstacle."""
    model = gpt2(torch.bfloat16).requires_grad_(False)
    model.lm_head.float().requires_grad_(True)
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0].float(),))
    assert compute_metagradients(model, [GOOD], metric).metagradients.any()


# Not finite


def test_diverging_loss():
    """The message names the step and what to lower."""
    model = gpt2()
    with torch.no_grad():
        model.lm_head.weight[3] = math.nan
    with pytest.raises(FloatingPointError, match="the loss of step 1.*Lower `learning_rate`"):
        compute_metagradients(model, [GOOD], lambda m: m.transformer.wte.weight.sum())


def test_diverging_cotangent():
    """A metric whose slope overflows on the way back through AdamW."""
    args = TargetTrainingArguments(adam_epsilon=0.0, adam_epsilon_root=1e-60)
    with pytest.raises(FloatingPointError, match="the cotangent of the gradient of step 1.*`adam_epsilon_root`"):
        compute_metagradients(gpt2(), [GOOD], lambda m: m.transformer.wpe.weight.sum() * 1e300, args)


def test_auto_epsilon_root_without_a_gradient():
    """There is nothing to measure, for want of a supervised token or of weight."""
    args = TargetTrainingArguments(adam_epsilon_root="auto")
    for example in ({"input_ids": [1]}, {**GOOD, "labels": [-100] * 3}, {**GOOD, "weight": 0.0}):
        with pytest.raises(ValueError, match='`adam_epsilon_root="auto"` needs a gradient.*Give a number'):
            compute_metagradients(gpt2(), [example], metric, args)


# Examples that nothing can be learned from

LEARNABLE = [
    {"input_ids": [1, 2, 3]},
    {"input_ids": [4, 5, 6, 7, 8], "labels": [-100, -100, 6, 7, 8]},
    {"input_ids": [9, 10]},
]
UNLEARNABLE = [
    {"input_ids": [5]},
    {"input_ids": []},
    {"input_ids": [1, 2, 3], "labels": [-100] * 3},
    {"input_ids": [1, 2, 3], "labels": [1, -100, -100]},  # nothing comes before the first token
    {"input_ids": [1] * 6 + [2, 3], "labels": [-100] * 6 + [2, 3]},  # cut off by `max_length`
]
RECIPES = {
    "adamw": {"learning_rate": 1e-2, "adam_epsilon_root": 1e-4, "weight_decay": 0.1},
    "sgd": {"optim": "sgd", "learning_rate": 0.1, "weight_decay": 0.1},
}


@pytest.mark.parametrize("loss_normalization", ["batch_tokens", "example", "max_length"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_unlearnable_examples_do_nothing(recipe, loss_normalization):
    """Their metagradient is 0, and with or without them the others' are the same, to the last bit."""
    fields = {**RECIPES[recipe], "loss_normalization": loss_normalization, "num_train_epochs": 2, "max_length": 6}
    args = TargetTrainingArguments(**fields, shuffle=False)
    with_them = [LEARNABLE[0], *UNLEARNABLE[:3], LEARNABLE[1], *UNLEARNABLE[3:], LEARNABLE[2]]
    learnable = torch.tensor([example in LEARNABLE for example in with_them])
    out = compute_metagradients(gpt2(), with_them, metric, args)
    expected = compute_metagradients(gpt2(), LEARNABLE, metric, args)
    assert (out.metagradients[~learnable] == 0).all() and out.metagradients[learnable].all()
    assert torch.equal(out.metagradients[learnable], expected.metagradients)
    assert (out.metric_after, out.losses) == (expected.metric_after, expected.losses)
    assert validate(gpt2(), with_them, metric, args) == validate(gpt2(), LEARNABLE, metric, args)


@pytest.mark.parametrize("loss_normalization", ["batch_tokens", "example", "max_length"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_batch_without_a_supervised_token(recipe, loss_normalization):
    """
    It is a step with gradient 0: its loss is 0, weight decay and momentum act, and metagradients pass through it. Seen
    against a batch of weight 0, which is such a step too.
    """
    fields = {**RECIPES[recipe], "loss_normalization": loss_normalization, "batch_size": 3, "max_length": 6}
    args = TargetTrainingArguments(**fields, shuffle=False, num_train_epochs=2)
    weightless = [{**example, "weight": 0.0} for example in LEARNABLE]
    out = compute_metagradients(gpt2(), [*LEARNABLE, *UNLEARNABLE[:3]], metric, args)
    expected = compute_metagradients(gpt2(), [*LEARNABLE, *weightless], metric, args)
    assert out.losses == expected.losses and out.losses[1] == out.losses[3] == 0.0
    assert out.metric_after == expected.metric_after
    assert (out.metagradients[3:] == 0).all() and out.metagradients[:3].all()
    torch.testing.assert_close(out.metagradients[:3], expected.metagradients[:3], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "fields", [{"optim": "sgd"}, {"optim": "adamw", "adam_epsilon_root": 0.0}], ids=["sgd", "adamw"]
)
@pytest.mark.filterwarnings("ignore:`adam_epsilon_root` is 0")
def test_batch_without_a_supervised_token_in_validate(fields):
    """The stock optimizers take the same step of gradient 0."""
    args = TargetTrainingArguments(
        **fields,
        learning_rate=1e-2,
        weight_decay=0.1,
        batch_size=3,
        num_train_epochs=2,
        shuffle=False,
        max_grad_norm=1.0,
    )
    examples = [*LEARNABLE, *UNLEARNABLE[:3]]
    engine, stock = (function(gpt2(), examples, metric, args) for function in (compute_metagradients, validate))
    assert stock["metric_gain"] == pytest.approx(engine.metric_after - engine.metric_before, rel=1e-9)


@pytest.mark.parametrize("loss_normalization", ["batch_tokens", "example", "max_length"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_nothing_to_learn_at_all(recipe, loss_normalization):
    """Every number is finite, every metagradient 0, and only weight decay has changed the model."""
    args = TargetTrainingArguments(**RECIPES[recipe], loss_normalization=loss_normalization, max_length=6)
    out = compute_metagradients(gpt2(), UNLEARNABLE, metric, args)
    assert (out.metagradients == 0).all() and out.losses == [0.0]
    decay = 1 - args.learning_rate * args.weight_decay
    assert out.metric_after == pytest.approx(decay**2 * out.metric_before, rel=1e-12)
    assert validate(gpt2(), UNLEARNABLE, metric, args)["metric"] == pytest.approx(out.metric_after, rel=1e-12)


def test_missing_fields_of_a_dataset_are_defaults():
    """A `datasets.Dataset` fills up what some rows lack with None."""
    rows = [{**GOOD, "labels": [-100, *GOOD["input_ids"][1:]], "weight": 2.0}, GOOD]
    dataset = Dataset.from_list(rows)
    assert dataset[1]["weight"] is None
    prepared = prepare_examples(dataset, max_length=16, vocab_size=VOCAB)
    expected = prepare_examples(rows, max_length=16, vocab_size=VOCAB)
    assert [e[:3] for e in prepared] == [e[:3] for e in expected]  # input_ids, labels, weight
