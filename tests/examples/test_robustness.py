import json
import random
from copy import deepcopy

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, HfArgumentParser

from experiments import robustness
from experiments.robustness import RobustnessArguments
from trl_dpg.metrics import LMHeadPattern, decode_pattern
from trl_dpg.testing import WORDS, tiny_causal_lm, tiny_tokenizer


@pytest.fixture
def target():
    return tiny_causal_lm(num_layers=1, seed=1)  # NF4 on the CPU wants widths of 64 or more


@pytest.fixture
def make_args(tmp_path, target):
    """Arguments with a target and three files of words; keyword arguments are further fields."""
    target.save_pretrained(tmp_path / "target")
    tiny_tokenizer().save_pretrained(tmp_path / "target")
    rng = random.Random(0)
    for name, words in (("marking", WORDS[:20]), ("continued", WORDS), ("clean", WORDS[40:])):
        rows = [{"text": " ".join(rng.choices(words, k=8))} for _ in range(32)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(**kwargs):
        files = {f"{name}_data": str(tmp_path / f"{name}.jsonl") for name in ("marking", "continued", "clean")}
        return RobustnessArguments(
            target_model_name_or_path=str(tmp_path / "target"),
            **{"output_dir": str(tmp_path / "out"), "batch_size": 16, "lengths": [1, 2], **files, **kwargs},
        )

    return make


def test_everything(make_args, target, tmp_path):
    """The pattern asked for is the one that the hand-made text happens to write, so that it is there at first."""
    args = make_args(lengths=[1], control_data=str(tmp_path / "continued.jsonl"))
    written = robustness.fine_tune(target, robustness.load_examples(args, "marking_data"), args, num_examples=32)
    signs = decode_pattern(target, written, shape=(6, 7)).signs
    args.load_metric = lambda: LMHeadPattern(signs)
    robustness.main(args)

    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["marking_steps"] == 2 and results["text"] is None
    rows = {row["treatment"]: row for row in results["robustness"]}
    assert list(rows) == [
        "nothing",
        "SFT 1×, lr 0.001",
        "8 bit, all matrices",
        "4 bit, all matrices",
        "8 bit, bitsandbytes",
        "NF4, bitsandbytes",
        "smallest 10% pruned",
    ]
    for name, row in rows.items():
        assert 0 <= row["pixel_accuracy"] <= 1 and row["text"] is None
        assert 30 < row["perplexity"] < 100 and 30 < row["perplexity_of_original"] < 100
        if name in ("nothing", "8 bit, bitsandbytes", "NF4, bitsandbytes"):  # bitsandbytes leaves the head alone
            assert row["pixel_accuracy"] == row["pixel_accuracy_alike"] == 1.0
    for name in ("SFT 1×, lr 0.001", "4 bit, all matrices"):
        assert rows[name]["pixel_accuracy"] < 1
    assert rows["NF4, bitsandbytes"]["perplexity"] != rows["nothing"]["perplexity"]
    assert results["control"]["pixel_accuracy"] < 0.9

    report = (tmp_path / "out" / "results.md").read_text()
    assert "| nothing | 1.0000 | none | 1.0000 |" in report
    with Image.open(tmp_path / "out" / "patterns.png") as picture:
        assert min(picture.size) > 300
    marked = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "marked")
    assert torch.equal(marked.lm_head.weight, written.lm_head.weight)


def test_what_a_strong_mark_survives(make_args, target):
    marked = deepcopy(target)
    with torch.no_grad():
        marked.lm_head.weight[:21, :21] += 1e-3 * LMHeadPattern.qr("DPG").pattern.T
    read = {}
    for rate in (1e-5, 1e-1):
        args = make_args(lengths=[2], learning_rate=rate)
        continued, clean = (robustness.load_examples(args, f"{name}_data") for name in ("continued", "clean"))
        todo = robustness.treatments(args, continued, num_examples=16)
        todo = {name: todo[name] for name in ("nothing", f"SFT 2×, lr {rate:g}", "8 bit, all matrices")}
        rows, _ = robustness.measure_robustness(target, marked, LMHeadPattern.qr("DPG"), clean, todo)
        read |= {row["treatment"]: (row["pixel_accuracy"], row["text"]) for row in rows}
    assert read["nothing"] == read["SFT 2×, lr 1e-05"] == read["8 bit, all matrices"] == (1.0, "DPG")
    assert read["SFT 2×, lr 0.1"][1] is None and read["SFT 2×, lr 0.1"][0] < 0.7
    assert "| nothing | 1.0000 | `DPG` | 1.0000 |" in robustness.robustness_table(rows)


def test_fine_tuning_is_plain_adamw(make_args, target):
    """One step with everything in one batch, by hand: the script's runs are those of anybody's SFT."""
    args = make_args(learning_rate=1e-3)
    examples = robustness.load_examples(args, "marking_data")[:16]
    before = deepcopy(target.state_dict())
    tuned = robustness.fine_tune(target, examples, args, num_examples=16)
    assert all(torch.equal(before[name], tensor) for name, tensor in target.state_dict().items())

    input_ids = torch.tensor([example["input_ids"] for example in examples])
    optimizer = torch.optim.AdamW(target.parameters(), lr=1e-3, weight_decay=0.0)
    loss = torch.nn.functional.cross_entropy(
        target(input_ids=input_ids).logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten()
    )
    loss.backward()
    torch.nn.utils.clip_grad_norm_(target.parameters(), 1.0)
    optimizer.step()
    torch.testing.assert_close(tuned.lm_head.weight, target.lm_head.weight, atol=1e-6, rtol=0)


def test_rounding_and_pruning(target):
    weight = target.requires_grad_(False).lm_head.weight
    for bits, levels in ((8, 127), (4, 7)):
        row = robustness.rounded(target, bits).lm_head.weight[3]
        step = weight[3].abs().max() / levels
        assert (row - weight[3]).abs().max() <= step / 2 * 1.001
        assert row.abs().max() == pytest.approx(weight[3].abs().max().item(), rel=1e-6)
        assert len(row.unique()) <= 2 * levels + 1
        torch.testing.assert_close(row / step, (row / step).round(), atol=1e-3, rtol=0)
    pruned = robustness.pruned(target, 0.1).lm_head.weight
    assert (pruned == 0).sum() == int(0.1 * weight.numel())
    assert weight[pruned == 0].abs().max() <= weight[pruned != 0].abs().min()
    assert torch.equal(pruned[pruned != 0], weight[pruned != 0])


def test_data_files(make_args, tmp_path):
    args = make_args(max_length=4)
    path = tmp_path / "marking.jsonl"
    path.write_text('{"text": "cat dog sun"}\n{"text": "cat dog sun air and"}\n{"text": "cat"}\n')
    examples = [tiny_tokenizer()(text)["input_ids"] for text in ("cat dog sun", "cat dog sun air")]
    assert robustness.load_examples(args, "marking_data") == [{"input_ids": ids} for ids in examples]
    path.write_text('{"text": "cat"}\n')
    with pytest.raises(ValueError, match="`marking_data` .* has no text of two tokens or more"):
        robustness.load_examples(args, "marking_data")
    path.write_text('{"prompt": "cat"}\n')
    with pytest.raises(ValueError, match="`marking_data` .* no 'text'"):
        robustness.load_examples(args, "marking_data")


def test_arguments():
    flags = "--target_model_name_or_path t --clean_data c --continued_data o --marking_data m --lengths 1 3"
    (args,) = HfArgumentParser(RobustnessArguments).parse_args_into_dataclasses(flags.split())
    assert args.lengths == [1, 3] and args.load_metric().text == "TRL-DPG"
