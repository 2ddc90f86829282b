import numpy as np
import pytest
import torch
import zxingcpp
from PIL import Image

from trl_dpg.metrics import LMHeadPattern
from trl_dpg.reporting.plotting import (
    plot_learning_curve,
    plot_learning_curves,
    plot_pattern,
    plot_patterns,
    plot_series,
)


def titles(figure):
    return [axes.get_title() for axes in figure.axes]


def codes(path):
    with Image.open(path) as picture:
        return [code.text for code in zxingcpp.read_barcodes(picture)]


def colors(picture):
    return {tuple(np.round(color * 255).astype(int)) for color in picture.reshape(-1, 3)}


def test_pattern_can_be_scanned(tmp_path):
    pattern = LMHeadPattern.qr("DPG").pattern
    decoded = pattern.clone()
    decoded[-1, -1] *= -1
    figure = plot_pattern(decoded, pattern, tmp_path / "pattern.png", text="DPG")
    assert titles(figure) == ["asked for", "read: 99.7%, “DPG”"]
    assert codes(tmp_path / "pattern.png") == ["DPG", "DPG"]


def test_wrong_pixels_are_red(tmp_path):
    pattern = LMHeadPattern.sixty_seven().pattern
    decoded = pattern.clone()
    decoded[0, 0], decoded[0, -1], decoded[1, 1] = -1, 1, 0
    figure = plot_pattern(decoded, pattern, tmp_path / "pattern.png")
    asked, read = (axes.images[0].get_array() for axes in figure.axes)
    assert asked.shape == read.shape == (6, 7, 3)
    assert colors(asked) == {(0, 0, 0), (255, 255, 255)}
    assert tuple(np.round(read[1, 1] * 255)) == (150, 150, 150)
    for pixel in (read[0, 0], read[0, -1]):
        assert pixel[0] > pixel[1] + 0.2
    assert colors(read) >= colors(asked) and len(colors(read)) == 5


def test_strip(tmp_path):
    pattern = LMHeadPattern.qr("DPG").pattern
    patterns = {f"seed {seed}": pattern for seed in range(5)}
    patterns["seed 5"] = torch.zeros_like(pattern)
    figure = plot_patterns(patterns, tmp_path / "strip.png", pattern)
    assert titles(figure) == [*(f"seed {seed}\n100%" for seed in range(5)), "seed 5\n0.0%"]
    assert codes(tmp_path / "strip.png") == ["DPG"] * 5
    assert titles(plot_patterns({"alone": pattern}, tmp_path / "strip.png")) == ["alone"]


def test_curve(tmp_path):
    log = [
        {"step": 0, "eval_metric_gain": 0.1},
        {"step": 1, "metagradient/metric_gain": 0.2, "metagradient/std": 1e-4},
        {"step": 2, "metagradient/metric_gain": 0.3, "metagradient/std": 1e-5},
        {"step": 2, "train_loss": 1.0},
    ]
    top, bottom = plot_learning_curve(log, tmp_path / "curve.png").axes
    assert [line.get_xydata().tolist() for line in top.lines] == [[[1, 0.2], [2, 0.3]], [[0, 0.1]]]
    assert bottom.lines[0].get_xydata().tolist() == [[1, 1e-4], [2, 1e-5]]
    assert bottom.get_legend() is None
    plot_learning_curve([{"step": 2, "train_loss": 1.0}], tmp_path / "empty.png")


def test_curve_of_another_reward_and_of_several_validation_sets(tmp_path):
    log = [
        {"step": 1, "naive/metric_gain": 0.2, "naive/std": 1e-4},
        {"step": 1, "eval_a_metric_gain": 0.1, "eval_a_metric": 9.0},
        {"step": 1, "eval_b_metric_gain": 0.3},
    ]
    top, bottom = plot_learning_curve(log, tmp_path / "curve.png", reward="naive").axes
    assert {line.get_label(): line.get_ydata().tolist() for line in top.lines} == {
        "training batches": [0.2],
        "validation on a": [0.1],
        "validation on b": [0.3],
    }
    assert len({line.get_color() for line in top.lines}) == 3
    assert bottom.lines[0].get_ydata().tolist() == [1e-4]


def test_curves_of_several_runs(tmp_path):
    def log(*values):
        return [{"step": step, "eval_pixel_accuracy": value, "epoch": 0} for step, value in values]

    runs = {
        "metagradient": [log((0, 0.4), (0, 0.6), (10, 0.8), (20, 1.0)), log((0, 0.3), (10, 1.0), (15, 1.0))],
        "naive": [log((0, 0.5), (20, 0.5))],
    }
    (axes,) = plot_learning_curves(runs, tmp_path / "curves.png", "pixel_accuracy").axes
    assert [line.get_label() for line in axes.lines] == ["metagradient (2 seeds)", "naive"]
    assert axes.lines[0].get_xydata().tolist() == [[0, pytest.approx(0.4)], [10, pytest.approx(0.9)]]
    assert axes.lines[1].get_xydata().tolist() == [[0, 0.5], [20, 0.5]]
    assert axes.get_ylabel() == "pixel accuracy, validation"
    with pytest.raises(ValueError, match="The runs 'metagradient' have no step with an `eval_perplexity` in common"):
        plot_learning_curves(runs, tmp_path / "curves.png", "perplexity")


@pytest.mark.parametrize("values", [[0.5, float("nan"), 1.5], [float("nan")], [float("-inf"), float("inf")]])
def test_figures_that_are_not_finite(tmp_path, values):
    history = [{"step": step, "entropy": value} for step, value in enumerate(values)]
    (axes,) = plot_series(history, "entropy", tmp_path / "entropy.png", "entropy").axes
    low, high = axes.get_ylim()
    assert low == 0 and high == pytest.approx(1.62 if len(values) == 3 else 1)


def test_a_text_of_dollars_is_no_formula(tmp_path):
    figure = plot_pattern([[1, -1]], [[1, -1]], tmp_path / "pattern.png", text="$5^{ or $7")
    assert titles(figure)[1].endswith(r"“\$5^{ or \$7”")
