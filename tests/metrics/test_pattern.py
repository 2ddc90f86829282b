import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import GPT2Model

from trl_dpg.metrics import LMHeadPattern
from trl_dpg.metrics.pattern import AUTO_SCALE_FACTOR, decode_qr, pattern_to_image


SIXTY_SEVEN = [
    [1, 1, 1, 1, -1, -1, -1],
    [-1, -1, -1, 1, 1, 1, -1],
    [-1, 1, 1, 1, 1, 1, -1],
    [-1, -1, -1, 1, 1, 1, -1],
    [-1, 1, -1, 1, 1, 1, -1],
    [-1, -1, -1, 1, 1, 1, 1],
]


def write(model, pattern, size=0.01):
    """Move the upper-left patch of the head along the pattern."""
    pattern = torch.as_tensor(pattern)
    rows, columns = pattern.shape
    with torch.no_grad():
        model.lm_head.weight[:columns, :rows] += size * pattern.T


def test_value_equals_numpy(gpt2, move):
    metric = LMHeadPattern.sixty_seven(scale=30.0)
    before = gpt2.lm_head.weight.detach().numpy().copy()
    metric.setup(gpt2)
    assert metric(gpt2).item() == pytest.approx(-math.log(2), rel=1e-15)
    move(gpt2, 0.02)
    change = (gpt2.lm_head.weight.detach().numpy() - before)[:7, :6].T
    expected = -np.log(1 + np.exp(-30 * np.array(SIXTY_SEVEN) * change)).mean()
    assert metric(gpt2).dtype == torch.float64
    assert metric(gpt2).item() == pytest.approx(expected, rel=1e-13)
    accuracy = (np.sign(change) == np.array(SIXTY_SEVEN)).mean()
    assert metric.readouts(gpt2) == {"pixel_accuracy": pytest.approx(accuracy)}
    assert torch.equal(metric.decoded, torch.tensor(np.sign(change), dtype=torch.int8))


def test_large_arguments_stay_exact(gpt2):
    # softplus of PyTorch is linear above 20: an error of 2e-9 at 20
    metric = LMHeadPattern([[1]], scale=1.0)
    metric.setup(gpt2)
    write(gpt2, [[1]], 25.0)
    assert metric(gpt2).item() == pytest.approx(-math.log1p(math.exp(-25.0)), rel=1e-6)


def test_accepts_whatever_as_tensor_takes(gpt2):
    for pattern in [SIXTY_SEVEN, np.array(SIXTY_SEVEN, np.int8), torch.tensor(SIXTY_SEVEN, dtype=torch.bfloat16)]:
        assert torch.equal(LMHeadPattern(pattern).pattern, LMHeadPattern.sixty_seven().pattern)


def test_readouts_of_an_unchanged_head(gpt2):
    metric = LMHeadPattern([[1, -1]])
    metric.setup(gpt2)
    assert metric.readouts(gpt2) == {"pixel_accuracy": 0.0}
    assert metric.decoded.tolist() == [[-1, -1]]


def test_gradient(gpt2, llama, move, assert_gradient):
    for model in [gpt2, llama]:
        for scale in [20.0, "auto"]:
            metric = LMHeadPattern.sixty_seven(scale=scale)
            metric.setup(model)
            move(model, 0.01)
            metric(model)  # freezes the scale
            assert_gradient(metric, model)


def test_tokens(gpt2, tokenizer, move, assert_gradient, tmp_path):
    """Column c of the pattern stands at the c-th of the tokens, and no other column of the head counts."""
    tokenizer.save_pretrained(tmp_path)
    gpt2.config._name_or_path = str(tmp_path)
    ids = [7, 40, 3, 22, 21, 5, 30]
    by_text = [*ids[:2], *tokenizer.convert_ids_to_tokens(ids[2:])]
    for tokens in (ids, by_text):
        metric, first = LMHeadPattern.sixty_seven(scale=30.0, tokens=tokens), LMHeadPattern.sixty_seven(scale=30.0)
        for either in (metric, first):
            either.setup(gpt2)
        before = gpt2.lm_head.weight.detach().clone()
        move(gpt2, 0.02)
        change = (gpt2.lm_head.weight.detach() - before)[ids, :6].T.numpy()
        expected = -np.log(1 + np.exp(-30 * np.array(SIXTY_SEVEN) * change)).mean()
        assert metric(gpt2).item() == pytest.approx(expected, rel=1e-12)
        assert_gradient(metric, gpt2)
        gradient = torch.autograd.grad(metric(gpt2), gpt2.lm_head.weight)[0]
        assert gradient.any(1).nonzero().flatten().tolist() == sorted(ids)
        with torch.no_grad():
            gpt2.lm_head.weight[ids, :6] = before[ids, :6] + 0.01 * torch.tensor(SIXTY_SEVEN).T
        assert metric.readouts(gpt2) == {"pixel_accuracy": 1.0} != first.readouts(gpt2)
        again = LMHeadPattern.from_description(metric.describe())
        assert again.tokens == tokens and torch.equal(again.pattern, metric.pattern)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([3], "`tokens` must be 2 different tokens, one for each column of `pattern`, got 1, of which 1 differ"),
        ([3, 3], "`tokens` must be 2 different tokens, one for each column of `pattern`, got 2, of which 1 differ"),
        ([3, 48], "`tokens` has the id 48, but the model has 48 tokens"),
        ([3, -1], "`tokens` has the id -1, but the model has 48 tokens"),
        ([3, "ab"], "`tokens` has 'ab', which is 2 tokens for the model"),
    ],
)
def test_bad_tokens(gpt2, tokenizer, tmp_path, tokens, message):
    tokenizer.save_pretrained(tmp_path)
    gpt2.config._name_or_path = str(tmp_path)
    with pytest.raises(ValueError, match=message):
        LMHeadPattern([[1, -1]], tokens=tokens).setup(gpt2)


def test_texts_as_tokens_need_a_tokenizer(gpt2, tmp_path):
    gpt2.config._name_or_path = str(tmp_path)
    with pytest.raises(ValueError, match=r"`tokens` has texts, but the tokenizer of the model .* Give ids"):
        LMHeadPattern([[1]], tokens=["a"]).setup(gpt2)


@pytest.mark.parametrize(
    "kwargs",
    [{"target_modules": ["lm_head"]}, {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"]}],
)
@pytest.mark.parametrize("tied", [False, True])
def test_gradient_with_peft(make_gpt2, move, assert_gradient, kwargs, tied):
    # Neither of the two trains the embedding with the head, even where the base weights are tied.
    model = get_peft_model(make_gpt2(tied=tied), LoraConfig(r=4, **kwargs)).double().eval()
    metric = LMHeadPattern.sixty_seven()
    metric.setup(model)
    assert metric(model).item() == pytest.approx(-math.log(2))
    move(model, 0.05)
    assert metric(model).item() != pytest.approx(-math.log(2), abs=1e-6)
    assert_gradient(metric, model, rtol=1e-6)


def test_auto_scale(gpt2, move):
    metric = LMHeadPattern.sixty_seven(scale="auto")
    before = gpt2.lm_head.weight.detach().clone()
    metric.setup(gpt2)
    assert metric(gpt2).item() == pytest.approx(-math.log(2), rel=1e-15)
    assert metric.scale_value is None

    move(gpt2, 1e-3)
    with torch.no_grad():
        first = metric(gpt2)
    value = metric(gpt2)
    change = (gpt2.lm_head.weight.detach() - before)[:7, :6]
    expected = AUTO_SCALE_FACTOR / change.square().mean().sqrt().item()
    assert metric.scale_value == pytest.approx(expected, rel=1e-12)
    assert value.item() == first.item()

    metric.setup(gpt2)
    move(gpt2, 1e-2, seed=1)
    metric(gpt2)
    assert metric.scale_value == pytest.approx(expected, rel=1e-12)


def test_auto_scale_survives_a_checkpoint(gpt2, move):
    metric = LMHeadPattern.sixty_seven(scale="auto")
    metric.setup(gpt2)
    move(gpt2, 1e-3)
    metric(gpt2)
    resumed = LMHeadPattern.sixty_seven(scale="auto")
    resumed.load_state(metric.state())
    assert resumed.scale_value == metric.scale_value is not None


def test_auto_scale_does_not_keep_a_failed_measurement(gpt2):
    metric = LMHeadPattern([[1]], scale="auto")
    metric.setup(gpt2)
    write(gpt2, [[1]], float("nan"))
    assert metric(gpt2).isnan()
    assert metric.scale_value is None


def test_the_default_is_measured():
    """However the pattern is made."""
    pixels = LMHeadPattern.sixty_seven().pattern
    metrics = [LMHeadPattern(pixels), LMHeadPattern.sixty_seven(), LMHeadPattern.qr("DPG")]
    assert [(metric.scale, metric.scale_value) for metric in metrics] == [("auto", None)] * 3


def test_fixed_scale():
    assert LMHeadPattern([[1]], scale=3).scale_value == 3.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(make_gpt2, dtype):
    model = make_gpt2(dtype)
    metric = LMHeadPattern.sixty_seven()
    metric.setup(model)
    write(model, SIXTY_SEVEN)
    value = metric(model)
    assert value.dtype == torch.float64
    assert torch.autograd.grad(value, [model.lm_head.weight])[0].dtype == dtype
    assert metric.readouts(model) == {"pixel_accuracy": 1.0}


@pytest.mark.parametrize("text", ["DPG", "1234567890123", "Grüße", "https://arxiv.org/abs/2604.08423"])
@pytest.mark.parametrize("error", ["l", "h"])
def test_qr_round_trip(make_gpt2, text, error):
    metric = LMHeadPattern.qr(text, error=error)
    rows, columns = metric.pattern.shape
    assert rows == columns
    assert decode_qr(metric.pattern) == text
    assert decode_qr(-metric.pattern) is None
    model = make_gpt2()
    if rows <= 32:
        metric.setup(model)
        write(model, metric.pattern)
        assert metric.readouts(model) == {"pixel_accuracy": 1.0, "qr_decoded": 1.0}
        assert decode_qr(metric.decoded) == text


def test_qr_decodes_until_too_much_is_flipped(gpt2):
    metric = LMHeadPattern.qr("DPG")
    assert tuple(metric.pattern.shape) == (21, 21)
    metric.setup(gpt2)
    few, many = metric.pattern.clone(), metric.pattern.clone()
    few[-1, -3:] *= -1
    many[:7, :7] *= -1  # a finder pattern
    write(gpt2, few)
    assert metric.readouts(gpt2) == {"pixel_accuracy": pytest.approx(1 - 3 / 441), "qr_decoded": 1.0}
    metric.setup(gpt2)
    write(gpt2, many)
    assert metric.readouts(gpt2) == {"pixel_accuracy": pytest.approx(1 - 49 / 441), "qr_decoded": 0.0}


def test_qr_readout_wants_the_original_text(gpt2):
    metric = LMHeadPattern.qr("DPG")
    metric.setup(gpt2)
    write(gpt2, LMHeadPattern.qr("DPO").pattern)
    assert metric.readouts(gpt2)["qr_decoded"] == 0.0


def test_image_round_trip(tmp_path):
    pattern = LMHeadPattern.qr("DPG").pattern
    pattern_to_image(pattern, module_size=1, border=0).save(tmp_path / "code.png")
    assert torch.equal(LMHeadPattern.from_image(tmp_path / "code.png").pattern, pattern)

    picture = pattern_to_image(pattern)
    assert picture.size == (8 * 29, 8 * 29)
    with_border = np.pad(pattern.numpy(), 4, constant_values=-1)
    picture.resize((29, 29), Image.Resampling.NEAREST).save(tmp_path / "small.png")
    assert LMHeadPattern.from_image(tmp_path / "small.png").pattern.tolist() == with_border.tolist()


def test_image_threshold_and_transparency(tmp_path):
    Image.fromarray(np.array([[0, 100, 200]], np.uint8)).save(tmp_path / "gray.png")
    assert LMHeadPattern.from_image(tmp_path / "gray.png").pattern.tolist() == [[1, 1, -1]]
    assert LMHeadPattern.from_image(tmp_path / "gray.png", threshold=50).pattern.tolist() == [[1, -1, -1]]
    Image.new("RGBA", (2, 1), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert LMHeadPattern.from_image(tmp_path / "clear.png").pattern.tolist() == [[-1, -1]]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ([1, -1], r"`pattern` must be a non-empty matrix, got the shape \(2,\)"),
        (torch.zeros(0, 3), r"`pattern` must be a non-empty matrix, got the shape \(0, 3\)"),
        ([[1, 0]], "`pattern` must hold only 1 and -1, got 0"),
        ([[1.0, float("nan")]], "`pattern` must hold only 1 and -1, got nan"),
        ([[1, -1], [1]], "`pattern` cannot be made a tensor"),
        ("67", "`pattern` cannot be made a tensor .* got '67'"),
    ],
)
def test_bad_patterns(pattern, message):
    with pytest.raises(ValueError, match=message):
        LMHeadPattern(pattern)


@pytest.mark.parametrize("scale", [0, -1.0, math.inf, math.nan, "automatic", None])
def test_bad_scales(scale):
    with pytest.raises(ValueError, match="`scale` must be a positive number or 'auto', got "):
        LMHeadPattern([[1]], scale=scale)


def test_too_long_for_a_qr_code():
    with pytest.raises(ValueError):
        LMHeadPattern.qr("x" * 3000)


def test_setup_errors(make_gpt2):
    metric = LMHeadPattern.sixty_seven()
    model = make_gpt2()
    for use in [metric, metric.readouts]:
        with pytest.raises(ValueError, match=r"`LMHeadPattern.setup\(model\)` must be called"):
            use(model)
    with pytest.raises(ValueError, match=r"tied .*`target_untie_lm_head=True`.*`trl_dpg.untie_lm_head\(model\)`"):
        metric.setup(make_gpt2(tied=True))
    with pytest.raises(ValueError, match=r"\(33, 48\) does not fit .* \(32, 48\) in \(hidden, vocab\) layout"):
        LMHeadPattern(torch.ones(33, 48)).setup(model)
    with pytest.raises(ValueError, match=r"\(32, 49\) does not fit"):
        LMHeadPattern(torch.ones(32, 49)).setup(model)
    LMHeadPattern(torch.ones(32, 48)).setup(model)
    with pytest.raises(ValueError, match="no LM head"):
        metric.setup(GPT2Model(model.config))
    with pytest.raises(ValueError, match="No parameter of the LM head of `target_model` is trainable"):
        metric.setup(get_peft_model(make_gpt2(), LoraConfig(target_modules=["c_attn"])))
    with pytest.raises(ValueError, match="No parameter of the LM head of `target_model` is trainable"):
        metric.setup(model.requires_grad_(False))
