"""`trl-dpg value`: its scores, files, page, and what it says of a person's own data."""

import csv
import json
import os
import random
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from datasets import Dataset, DatasetDict, load_dataset
from peft import LoraConfig

from trl_dpg.cli import main
from trl_dpg.metagradients import TargetTrainingArguments, compute_metagradients
from trl_dpg.metrics import LanguageModelingLikelihood, LMHeadNorm
from trl_dpg.reporting.valuation import Valuation, middle_draws
from trl_dpg.scripts import value
from trl_dpg.target import load_target_model
from trl_dpg.testing import ONE_SPECIAL_TOKEN, WORDS, tiny_causal_lm, tiny_tokenizer


TOKENIZER = tiny_tokenizer(60, ONE_SPECIAL_TOKEN)
RECIPE = {"batch_size": 4, "learning_rate": 3e-3, "max_length": 12}
METRIC_TEXT = "air and sun air and sun air and sun"
RANDOM = random.Random(0)
ROWS = [{"text": " ".join(RANDOM.choices(WORDS[20:60], k=8)), "source": f"s{i}", "index": -i} for i in range(10)]
ROWS[3]["text"] = METRIC_TEXT  # what the metric wants
ROWS[7]["text"] = "air the air the air the air the"  # what it does not want: other words after the same ones


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A directory with a model and data, as the working directory."""
    monkeypatch.chdir(tmp_path)
    sizes = {"hidden_size": 24, "num_layers": 1, "num_heads": 2, "max_position_embeddings": 32}
    tiny_causal_lm(vocab_size=61, seed=1, special_tokens=ONE_SPECIAL_TOKEN, **sizes).save_pretrained("model")
    TOKENIZER.save_pretrained("model")
    Dataset.from_list(ROWS).to_json("data.jsonl")
    Dataset.from_list([{"text": METRIC_TEXT}]).to_json("held_out.jsonl")
    return tmp_path


def flags(**changes):
    given = {"dataset": "data.jsonl", "model": "model", "metric_texts": "held_out.jsonl", "output": "out", **RECIPE}
    return ["value", *(str(word) for k, v in {**given, **changes}.items() if v is not None for word in (f"--{k}", v))]


def scores(folder="out"):
    return [json.loads(line) for line in (Path(folder) / "scores.jsonl").read_text().splitlines()]


def direct(rows, model=None, seed=0, metric=None, labels=None):
    """What the engine says, of texts with an EOS at the end."""
    ids = [TOKENIZER(row["text"])["input_ids"] + [TOKENIZER.eos_token_id] for row in rows]
    metric = metric or LanguageModelingLikelihood([{"text": METRIC_TEXT}], TOKENIZER)
    recipe = TargetTrainingArguments(**RECIPE, seed=seed)
    return compute_metagradients(model or load_target_model("model"), [{"input_ids": i} for i in ids], metric, recipe)


def test_scores_are_metagradients(here, capsys):
    assert main([*flags(num_draws=3, seed=5), "--tokens", "--json"]) == 0
    draws = [direct(ROWS, seed=seed) for seed in (5, 6, 7)]
    written = scores()
    assert [row["score"] for row in written] == sorted((row["score"] for row in written), reverse=True)
    assert sorted(row["index"] for row in written) == list(range(10))
    for row in written:
        values = [draw.metagradients[row["index"]].item() for draw in draws]
        assert row["score"] == pytest.approx(statistics.median(values), abs=1e-12)
        assert row["draw_scores"] == pytest.approx(values, abs=1e-12)
        deviation = statistics.median(abs(value - row["score"]) for value in values)
        assert row["standard_error"] == pytest.approx(1.2533 * 1.4826 * deviation / 3**0.5, abs=1e-12)
        tokens = draws[values.index(statistics.median(values))].token_metagradients[row["index"]].tolist()
        assert row["token_scores"] == pytest.approx(tokens, abs=1e-9)
        assert sum(row["token_scores"]) == pytest.approx(row["score"], abs=1e-7)
        own = ROWS[row["index"]]
        assert "".join(row["token_texts"]) == own["text"] + TOKENIZER.eos_token
        assert (row["text"], row["source"], row["row_index"]) == (own["text"], own["source"], own["index"])
        assert row["tokens"] == len(own["text"].split()) + 1 and row["flags"] == []
    # what the metric wants comes first, what it does not want last
    assert written[0]["index"] == 3 and written[-1]["index"] == 7
    assert written[0]["score"] > 0 > written[-1]["score"]

    table = load_dataset("parquet", data_files="out/scores.parquet", split="train").to_list()
    for of_parquet, of_json in zip(table, written, strict=True):
        assert of_parquet["score"] == pytest.approx(of_json["score"], abs=1e-12)
        assert {**of_parquet, **of_json} == of_json and of_parquet.keys() == of_json.keys()

    summary = json.loads(capsys.readouterr().out)
    assert summary == json.loads(Path("out/valuation.json").read_text())
    assert summary["metric_before"] == draws[0].metric_before
    assert summary["metric_after"] == [draw.metric_after for draw in draws]
    assert summary["negative"] == sum(row["score"] < 0 for row in written)
    assert summary["beyond_two_errors"] == sum(abs(row["score"]) > 2 * row["standard_error"] for row in written)
    assert str(here) not in Path("out/valuation.json").read_text()


def test_spearman():
    def spearman(*draws):
        draws = torch.tensor(draws, dtype=torch.float64)
        return Valuation([], TargetTrainingArguments(), draws, [], 0.0, [], 0.0).spearman

    assert spearman([1, 2, 3]) is None
    assert spearman([1, 2, 3], [0, 0, 0]) is None
    assert spearman([1, 2, 3], [10, 20, 400]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 3, 4], [2, 1, 4, 3]) == pytest.approx(1 - 6 * 4 / (4 * 15))  # 1 - 6 Σd² / n(n² - 1)
    assert spearman([1, 2, 3], [1, 2, 3], [3, 2, 1]) == pytest.approx((1 - 1 - 1) / 3)
    draws = [[0.0, 0.0, 3.0, 1.0, 5.0], [2.0, 0.0, 0.0, 0.0, 9.0]]  # equal scores, as of rows without a token to learn
    assert spearman(*draws) == pytest.approx(pd.DataFrame(draws).T.corr("spearman")[0][1])


def test_scores_are_medians():
    draws = torch.tensor([[3.0, 0.1], [1.0, 0.3], [2.0, 90.0], [8.0, 0.2]])
    valuation = Valuation([], TargetTrainingArguments(), draws, [], 0.0, [0.0] * 4, 0.0)
    assert valuation.scores.tolist() == pytest.approx([2.5, 0.25])
    assert middle_draws(draws).tolist() == [[2, 3], [0, 1]]
    assert middle_draws(draws[:3]).tolist() == [[2, 1], [2, 1]]

    draws = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    medians = draws.view(400, 10, 8).median(1).values  # what 400 valuations of ten draws would say
    of_ten = [Valuation([], TargetTrainingArguments(), part, [], 0.0, [], 0.0) for part in draws.view(400, 10, 8)]
    stated = torch.stack([one.standard_errors for one in of_ten]).mean().item()
    assert stated == pytest.approx(medians.std(0).mean().item(), rel=0.1)


def test_unstable_draws():
    def unstable(draws, before, after):
        draws = torch.tensor(draws).repeat(1, 11)  # 33 rows
        return Valuation([], TargetTrainingArguments(), draws, [], before, after, 0.0).unstable_draws

    draws = [[0.1, -0.2, 0.1], [0.1, -0.9, 2.0], [0.1, -2.5, 0.3]]
    assert unstable(draws, -1.0, [-0.5, 1.5, -3.0]) == 1  # changes of 0.5, 2.5 and 2: the last draw's -2.5 is larger
    assert unstable(draws, -1.0, [-1.1, -0.9, -1.0]) == 3
    draws = [
        [0.01, 0.02, 0.01],
        [0.01, 0.0, -0.01],
        [0.2, -0.2, 0.1],
    ]  # the last one spreads more than ten times as far
    assert unstable(draws, -1.0, [0.0, 0.0, 0.0]) == 1
    few = Valuation([], TargetTrainingArguments(), torch.tensor([[1.0, 2.0]]), [], 0.0, [0.1], 0.0)
    assert few.unstable_draws == 0


def test_an_unstable_run_is_reported(here, capsys):
    Dataset.from_list(ROWS * 4).to_json("data.jsonl")
    assert main(flags(learning_rate=0.03, batch_size=1, adam_epsilon_root=1e-12)) == 0
    assert json.loads(Path("out/valuation.json").read_text())["unstable_draws"] == 1
    assert "`learning_rate`" in capsys.readouterr().out
    assert "scores are out of proportion" in Path("out/index.html").read_text()
    assert main([*flags(batch_size=40), "--overwrite"]) == 0  # one step
    assert json.loads(Path("out/valuation.json").read_text())["unstable_draws"] == 0
    assert "out of proportion" not in capsys.readouterr().out + Path("out/index.html").read_text()


def test_flags(here, capsys):
    texts = ["air " * 20, "", "air and", "sun", "air and", "air " * 25]
    Dataset.from_list([{"text": text.strip()} for text in texts]).to_json("data.jsonl")
    assert main(flags()) == 0
    found = {row["index"]: (row["flags"], row["tokens"]) for row in scores()}
    assert found == {
        0: (["cut"], 21),
        1: (["no supervised token"], 1),
        2: ([], 3),
        3: ([], 2),
        4: (["duplicate"], 3),
        5: (["cut", "duplicate"], 26),  # the first twelve words are those of row 0
    }
    assert {row["index"]: row["score"] for row in scores()}[1] == 0
    printed = capsys.readouterr().out
    assert "'cut': 2" in printed and "'no supervised token': 1" in printed and "'duplicate': 2" in printed
    page = Path("out/index.html").read_text()
    assert "0 (21 tokens), 5 (26 tokens)" in page and "4 (as row 2), 5 (as row 0)" in page


def test_page(here):
    ROWS_OF_PAGE = [*ROWS, {"text": "<b>air</b> & sun", "source": "", "index": 0}]
    Dataset.from_list(ROWS_OF_PAGE).to_json("data.jsonl")
    assert main(flags(num_draws=2)) == 0
    page = Path("out/index.html").read_text()
    for word in {word for row in ROWS for word in row["text"].split()}:
        assert f"<b>{word}</b>" in page
    assert "<b>air</b> &amp;" not in page and "&lt;b&gt;air" not in page  # words that the tokenizer does not know
    assert not re.search(r"<script|<link|src=|https?://(?!huggingface\.co/papers/)", page)
    assert 'name="viewport"' in page and "prefers-color-scheme" in page
    assert "data.jsonl" in page and "learning rate 0.003" in page and "Spearman" in page
    summary = json.loads(Path("out/valuation.json").read_text())
    assert f"{summary['spearman']:.2f}" in page and f"{summary['metric_before']:.5g}" in page
    first, last = scores()[0], scores()[-1]
    assert page.index(f"{first['score']:+.3g}") < page.index(f"{last['score']:+.3g}")
    # green words of the first row, red ones of the last
    sections = page.split("<section>")[1:]
    assert 'class="word plus"' in sections[0].split('<div class="words"')[1]
    assert 'class="word minus"' in sections[1].split('<div class="words"')[1]


def test_existing_output_is_kept(here, capsys):
    assert main(flags()) == 0
    before = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    assert set(before) == {"scores.parquet", "scores.jsonl", "valuation.json", "index.html"}
    assert main(flags(learning_rate=1e-3)) == 2
    assert "`output` 'out' holds a valuation already" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == before
    assert main([*flags(learning_rate=1e-3), "--overwrite"]) == 0
    assert Path("out/scores.jsonl").read_bytes() != before["scores.jsonl"]


def test_other_formats(here):
    """Files and folders of other kinds, their splits, and the first rows alone."""
    rows = Dataset.from_list(ROWS)
    rows.to_csv("data.csv")
    rows.to_parquet("data.parquet")
    rows.save_to_disk("saved")
    DatasetDict(train=rows.take(1), test=rows).save_to_disk("splits")
    Path("data.txt").write_text("\n".join(row["text"] for row in ROWS))
    expected = direct(ROWS[:6]).metagradients
    for name in ("data.csv", "data.parquet", "saved", "splits:test", "data.txt", "data.jsonl:train"):
        assert main([*flags(dataset=name, num_examples=6), "--overwrite"]) == 0
        by_index = [row["score"] for row in sorted(scores(), key=lambda row: row["index"])]
        assert by_index == pytest.approx(expected.tolist(), abs=1e-12), name
    assert len(list(csv.DictReader(open("data.csv")))) == 10


def test_prompts_and_messages(here):
    """A prompt has no loss, by default; messages go through the chat template, also those of the metric."""
    prompts = [{"prompt": f"{row['text']} ", "completion": "air and sun"} for row in ROWS]
    Dataset.from_list(prompts).to_json("data.jsonl")
    for loss, supervised in ((None, 4), (False, len(ROWS[0]["text"].split()) + 3)):
        assert main([*flags(completion_only_loss=loss, max_length=32), "--overwrite", "--tokens"]) == 0
        of_first = next(row for row in scores() if row["index"] == 0)
        assert sum(score != 0 for score in of_first["token_scores"]) == supervised

    TOKENIZER_WITH_TEMPLATE = tiny_tokenizer(60, ONE_SPECIAL_TOKEN)
    TOKENIZER_WITH_TEMPLATE.chat_template = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    TOKENIZER_WITH_TEMPLATE.save_pretrained("model")
    for name, text in (("data", ROWS[0]["text"]), ("held_out", METRIC_TEXT)):
        messages = [{"role": "user", "content": "air and"}, {"role": "assistant", "content": text}]
        Dataset.from_list([{"messages": messages}, {"messages": messages[1:]}]).to_json(f"{name}.jsonl")
    assert main([*flags(), "--overwrite", "--tokens"]) == 0
    of_first = next(row for row in scores() if row["index"] == 0)
    assert "".join(of_first["token_texts"]) == "air and " + ROWS[0]["text"]


def test_tokenizer_is_that_of_the_revision(here, monkeypatch):
    loaded = {}
    for name in ("load_target_tokenizer", "load_target_model"):
        load = getattr(value, name)
        monkeypatch.setattr(
            value, name, lambda *a, f=load, n=name, **k: loaded.update({n: k["revision"]}) or f(*a, **k)
        )
    assert main(flags(model_revision="v2")) == 0
    assert loaded == {"load_target_tokenizer": "v2", "load_target_model": "v2"}


def test_adapter_and_another_metric(here, capsys):
    changes = {"metric_texts": None, "metric": "lm_head_norm", "lora_r": 2, "lora_target_modules": "all-linear"}
    assert main([*flags(**changes), "--json"]) == 2
    assert "`lora_r` 2 is for an adapter, but `use_peft` is False" in capsys.readouterr().err
    changes = {"lora_r": 2, "lora_target_modules": "all-linear"}
    assert main([*flags(**changes), "--use_peft", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["model"]["adapter"] and summary["model"]["trained_parameters"] < summary["model"]["parameters"]
    torch.manual_seed(0)
    adapter = LoraConfig(r=2, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    expected = direct(ROWS, load_target_model("model", peft_config=adapter)).metagradients
    by_index = [row["score"] for row in sorted(scores(), key=lambda row: row["index"])]
    assert by_index == pytest.approx(expected.tolist(), abs=1e-12)

    assert main([*flags(metric_texts=None, metric="lm_head_norm"), "--overwrite"]) == 0
    by_index = [row["score"] for row in sorted(scores(), key=lambda row: row["index"])]
    assert by_index == pytest.approx(direct(ROWS, metric=LMHeadNorm()).metagradients.tolist(), abs=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": None}, "`dataset` is missing"),
        ({"output": None}, "`output` is missing"),
        ({"model": None}, "`model` is missing"),
        ({"model": "nowhere"}, "`model` 'nowhere' cannot be loaded"),
        ({"metric_texts": None}, "`metric_texts` is missing"),
        ({"metric": "qr"}, "`metric_texts` 'held_out.jsonl' is the `metric_dataset` of `metric` 'likelihood'"),
        ({"metric_dataset": "data.jsonl"}, "and `metric_dataset` 'data.jsonl'. Leave out one"),
        ({"metric_texts": "none.jsonl"}, "`metric_texts` 'none.jsonl' cannot be loaded"),
        ({"metric_texts": "one_word.jsonl"}, "`metric_texts` 'one_word.jsonl' cannot be scored"),
        ({"dataset": "none.jsonl"}, "`dataset` 'none.jsonl' cannot be loaded"),
        ({"dataset": "data.jsonl:test"}, "`dataset` 'data.jsonl' has the splits ['train'] but no 'test'"),
        ({"dataset": "columns.jsonl"}, "`dataset` 'columns.jsonl' has the columns ['content']"),
        ({"dataset": "gap.jsonl"}, "`dataset` 'gap.jsonl' has {'text': None} as row 1"),
        ({"dataset": "one_word.jsonl", "max_length": 2}, None),
        ({"dataset": "empty.jsonl"}, "`dataset` 'empty.jsonl' has no token with a loss"),
        ({"assistant_only_loss": True}, "`dataset` 'data.jsonl' cannot be trained on: `assistant_only_loss=True`"),
        ({"num_draws": 0}, "`num_draws` must be at least 1"),
        (
            {"num_draws": 2, "shuffle": False},
            "`num_draws` 2 asks for that many orders of the rows, but `shuffle` is False",
        ),
        ({"learning_rate": -1}, "`learning_rate` must be"),
        ({"output": "data.jsonl"}, "`output` 'data.jsonl/scores.parquet' cannot be written"),
    ],
)
def test_bad_input_is_said_before_a_model_is_loaded(here, capsys, monkeypatch, changes, message):
    def load(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(value, "load_target_model", load)
    Dataset.from_list([{"text": "air"}]).to_json("one_word.jsonl")
    Dataset.from_list([{"text": ""}]).to_json("empty.jsonl")
    Dataset.from_list([{"content": "air"}]).to_json("columns.jsonl")
    Dataset.from_list([{"text": "air"}, {"text": None}]).to_json("gap.jsonl")
    if message is None:
        with pytest.raises(AssertionError, match="a model was loaded"):
            main(flags(**changes))
        return
    assert main(flags(**changes)) == 2
    error = capsys.readouterr().err
    assert "trl-dpg value: error: " in error and message in error and "Traceback" not in error
    assert not Path("out").exists() or not list(Path("out").iterdir())


def test_help(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["value", "--help"])
    assert exit.value.code == 0
    printed = capsys.readouterr().out
    assert "usage: trl-dpg value" in printed and "--lora_r" in printed and "--metric_texts" in printed


@pytest.mark.slow
def test_two_processes(here):
    """Two processes write what one does, once."""
    assert main(flags(output="one")) == 0
    root = Path(__file__).parents[2]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "trl_dpg.scripts.value", *flags(output="two")[1:]]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("Written:") == 1
    one, two = ({row["index"]: row["score"] for row in scores(folder)} for folder in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-5, abs=1e-7)
