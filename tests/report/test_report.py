"""What a run leaves behind to be looked at: files, TensorBoard, and one HTML page."""

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback

from trl_dpg.credit import WordCredit, credit_text
from trl_dpg.metrics import LMHeadNorm
from trl_dpg.reporting import write_report
from trl_dpg.reporting.callback import ReportCallback, read_rows
from trl_dpg.testing import tiny_prompts


VALIDATED = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}


def report_of(trainer):
    return Path(trainer.args.output_dir) / "report"


def test_files(make_trainer, caplog):
    trainer = make_trainer(**VALIDATED)
    trainer.train()
    report = report_of(trainer)
    assert "could not be written" not in caplog.text
    assert {path.name for path in report.iterdir()} == {
        *("run.json", "log.jsonl", "samples.jsonl", "rewards.jsonl", "patterns.jsonl"),
        *("curve.png", "entropy.png", "rewards.png", "pattern.gif", "patterns"),
    }
    assert read_rows(report / "log.jsonl") == trainer.state.log_history
    run = json.loads((report / "run.json").read_text())
    assert run["metric"]["name"] == "LMHeadPattern" and run["settings"]["max_completion_length"] == 6
    assert run["validation"]["eval"]["after"]["step"] == 2
    assert str(report.parent) not in (report / "run.json").read_text()

    # the last step's samples are the best and the worst of its batch, by the raw metagradient
    raw = list(trainer._logs["extra"]["metagradient_raw"])
    samples = [row for row in read_rows(report / "samples.jsonl") if row["step"] == 2]
    assert [row["reward"] for row in samples if row["kind"] == "highest"] == sorted(raw, reverse=True)[:3]
    assert [row["reward"] for row in samples if row["kind"] == "lowest"] == sorted(raw)[:3]
    best = samples[0]
    index = raw.index(best["reward"])
    assert (best["prompt"], best["completion"]) == (trainer._logs["prompt"][index], trainer._logs["completion"][index])
    rewards = read_rows(report / "rewards.jsonl")
    assert [row["step"] for row in rewards] == [1, 2]
    assert rewards[1]["quantiles"][0] == min(raw) and rewards[1]["quantiles"][6] == max(raw)
    assert rewards[1]["quantiles"][3] == pytest.approx(torch.tensor(raw, dtype=torch.float64).quantile(0.5).item())

    patterns = {row["step"]: row["decoded"] for row in read_rows(report / "patterns.jsonl")}
    signs = [[1 if pixel == "1" else -1 for pixel in row] for row in patterns[2]]
    assert signs == trainer.metric.decoded.tolist()
    assert sorted(path.name for path in (report / "patterns").iterdir()) == [f"step-{n:06d}.png" for n in (0, 1, 2)]
    with Image.open(report / "pattern.gif") as animation:
        assert animation.n_frames >= 2  # frames that are alike may be joined


def test_metric_without_a_picture_and_without_validation(make_trainer):
    trainer = make_trainer(metric=LMHeadNorm(), eval_dataset=None)
    trainer.train()
    names = {path.name for path in report_of(trainer).iterdir()}
    assert "curve.png" in names and not names & {"patterns", "pattern.gif", "patterns.jsonl"} - {"patterns.jsonl"}
    page = write_report(trainer.args.output_dir).read_text()
    assert "the norm of its LM head becomes smaller" in page and "<h2>The picture" not in page


def test_baseline_reward(make_trainer):
    trainer = make_trainer(reward="edit_distance", reference_texts=["air and"], scale_rewards="batch")
    trainer.train()
    values = list(trainer._logs["rewards"]["edit_distance"])
    assert read_rows(report_of(trainer) / "rewards.jsonl")[1]["quantiles"][6] == max(values)


def test_a_resumed_run_goes_on_with_its_report(make_trainer):
    config = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(**config)
    whole.train()
    report = report_of(whole)
    files = {name: read_rows(report / name) for name in ("samples.jsonl", "rewards.jsonl", "patterns.jsonl")}
    history = [row.get("loss", row.get("eval_metric")) for row in read_rows(report / "log.jsonl")]
    resumed = make_trainer(**config)
    resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-2"))
    assert [row.get("loss", row.get("eval_metric")) for row in read_rows(report / "log.jsonl")] == history
    for name, rows in files.items():
        assert read_rows(report / name) == rows, name


def test_another_run_in_the_same_place_starts_anew(make_trainer):
    make_trainer(**VALIDATED).train()
    trainer = make_trainer(**{**VALIDATED, "max_steps": 1})
    trainer.train()
    report = report_of(trainer)
    assert {row["step"] for row in read_rows(report / "samples.jsonl")} == {1}
    assert sorted(path.name for path in (report / "patterns").iterdir()) == ["step-000000.png", "step-000001.png"]


def test_tensorboard_gets_pictures_and_texts(make_trainer):
    trainer = make_trainer(report_to="tensorboard", **VALIDATED)
    trainer.train()
    (events,) = Path(trainer.args.output_dir).rglob("events.out.tfevents*")
    found = EventAccumulator(str(events.parent)).Reload()
    assert {f"report/{name}" for name in ("curve", "rewards", "entropy", "pattern")} <= set(found.Tags()["images"])
    image = found.Images("report/pattern")[-1]
    with Image.open(report_of(trainer) / "patterns" / "step-000002.png") as picture:
        assert (image.step, image.width, image.height) == (2, *picture.size)
    text = found.Tensors("report/highest_rewards/text_summary")[-1]
    best = read_rows(report_of(trainer) / "samples.jsonl")[6]
    words = credit_text([WordCredit(*word) for word in best["words"]])
    assert words.encode() in text.tensor_proto.string_val[0]


def test_training_goes_on_where_no_report_can_be_written(make_trainer, tmp_path, caplog):
    trainer = make_trainer(**VALIDATED)
    Path(trainer.args.output_dir).mkdir(exist_ok=True)
    report_of(trainer).write_text("a file where the folder should be")
    trainer.train()
    assert trainer.state.global_step == 2
    assert "The report of step 0 could not be written" in caplog.text


def test_training_goes_on_whatever_goes_wrong_in_a_report_or_a_card(make_trainer, caplog):
    class Odd(TrainerCallback):
        """Puts what is no JSON into the log while the report looks at it."""

        def on_log(self, args, state, control, **kwargs):
            state.log_history[-1]["odd"] = {1, 2}

    class Even(TrainerCallback):
        def on_log(self, args, state, control, **kwargs):
            del state.log_history[-1]["odd"]

    trainer = make_trainer(save_strategy="steps", save_steps=1, eval_dataset=None)
    trainer.callback_handler.callbacks.insert(0, Odd())
    trainer.add_callback(Even())
    (Path(trainer.args.output_dir) / "README.md").mkdir(parents=True)
    trainer.train()
    assert trainer.state.global_step == 2
    assert "The report of step 2 could not be written: TypeError" in caplog.text
    assert "The card of the generator in" in caplog.text


class Page(HTMLParser):
    """Collects what a page loads, its tags, and its text."""

    def __init__(self, html):
        super().__init__()
        self.loaded, self.tags, self.texts = [], set(), []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.loaded += [value for name, value in attributes if name in ("src", "srcset", "data") or tag == "link"]

    def handle_data(self, data):
        self.texts.append(data.strip())


@pytest.mark.parametrize("has_words", [False, True])
def test_page_holds_everything_and_escapes_it(make_trainer, tmp_path, has_words):
    class Hostile(TrainerCallback):
        """Puts markup into a completion and its words before the report sees them."""

        def on_log(self, args, state, control, **kwargs):
            markup = "<script>alert(1)</script> & <b>bold</b>"
            for index in range(len(trainer._logs["completion"])):
                trainer._logs["completion"][index] = markup
            words = [WordCredit(markup, 1.0, f"better {markup}", 2.0)] if has_words else []
            trainer.target_training.credit_by_word = lambda index: words

    trainer = make_trainer(**VALIDATED)
    trainer.callback_handler.callbacks.insert(0, Hostile())
    trainer.train()
    path = write_report(trainer.args.output_dir, tmp_path / "page.html")
    assert path == tmp_path / "page.html"
    html = path.read_text()
    page = Page(html)
    assert "script" not in page.tags and "<script>alert(1)</script> & <b>bold</b>" in page.texts
    assert len(page.loaded) == 5 and all(value.startswith("data:image/") for value in page.loaded)
    assert not re.search(r"url\(|@import", html)
    assert str(tmp_path) not in html
    for fact in (
        "pixel accuracy",
        "before training, 1 draw",
        "GPT2LMHeadModel",
        "<code>max_completion_length</code></td><td>6<",
    ):
        assert fact in html


class Stripes(LMHeadNorm):
    """A metric with a picture of its own."""

    described: dict = {}

    def picture(self):
        return torch.tensor([[1, -1]]), torch.tensor([[1, 1]])

    def describe(self):
        return {**super().describe(), **self.described}


@pytest.mark.parametrize("picture", [None, "stripes of the embedding"])
def test_captions_say_what_the_picture_is(make_trainer, picture):
    metric = Stripes()
    metric.described = {} if picture is None else {"picture": picture}
    trainer = make_trainer(metric=metric, **{**VALIDATED, "max_steps": 1})
    trainer.train()
    trainer.save_model()
    said = "the picture read from a target" if picture is None else "the stripes of the embedding of a target"
    page = write_report(trainer.args.output_dir).read_text()
    card = (Path(trainer.args.output_dir) / "README.md").read_text()
    for text in (page, card):
        assert (
            f"Left: the picture asked for. Right: {said} that was fine-tuned" in text
            and "change in the LM head" not in text
        )
    trainer = make_trainer(**{**VALIDATED, "max_steps": 1})
    trainer.train()
    assert "the signs of the change in the LM head of a target" in write_report(trainer.args.output_dir).read_text()


def test_progress_before_the_first_log(make_trainer):
    trainer = make_trainer(eval_strategy="steps", eval_steps=2, logging_steps=50)
    pages = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            pages.append(write_report(args.output_dir).read_text())

    trainer.add_callback(Look())
    trainer.train()
    assert "Nothing logged in training yet" in pages[0] and "Step 0" not in pages[0]
    assert ">Step 2" in write_report(trainer.args.output_dir).read_text()


def test_two_validations_at_one_step_are_not_compared(make_trainer):
    """In training, and after it of the best checkpoint."""
    best = {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(eval_strategy="steps", eval_steps=1, max_steps=1, **best)
    trainer.train()
    trainer.evaluate()
    validation = json.loads((report_of(trainer) / "run.json").read_text())["validation"]["eval"]
    assert validation["before"] is None and validation["after"]["step"] == 1
    assert "generator at step 1" not in write_report(trainer.args.output_dir).read_text()


def test_folder_without_a_run(tmp_path):
    with pytest.raises(ValueError, match=re.escape(f"`run_dir` {str(tmp_path)!r} holds no report of a run")):
        write_report(tmp_path)


def test_prompts_of_typed_parts(make_trainer, chat_tokenizer, caplog):
    def message(role, *texts):
        return {"role": role, "content": [{"type": "text", "text": text} for text in texts]}

    chat_tokenizer.chat_template = (
        "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] + ' ' }}{% else %}"
        "{% for part in m['content'] %}{{ part['text'] + ' ' }}{% endfor %}{% endif %}{% endfor %}"
    )
    prompts = [[message("user", "say ", "blue")], [message("system", "be brief"), message("user", "say", " air")]] * 8
    trainer = make_trainer(
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        eval_dataset=Dataset.from_dict({"prompt": prompts[:2]}),
        processing_class=chat_tokenizer,
        **VALIDATED,
    )
    trainer.train()
    shown = {row["prompt"] for row in read_rows(report_of(trainer) / "samples.jsonl")}
    assert shown and shown <= {"say blue", "system: be brief\nuser: say air"}
    assert "could not be written" not in caplog.text


def test_prompts_of_a_conversation(make_trainer, chat_tokenizer):
    prompts = [[{"role": "user", "content": row["prompt"]}] for row in tiny_prompts(16, 1)["train"]]
    trainer = make_trainer(
        train_dataset=Dataset.from_dict({"prompt": prompts}), processing_class=chat_tokenizer, eval_dataset=None
    )
    trainer.train()
    (sample, *_) = read_rows(report_of(trainer) / "samples.jsonl")
    assert sample["prompt"] in [prompt[0]["content"] for prompt in prompts] and isinstance(sample["completion"], str)


def test_trackers_get_one_table_of_samples(make_trainer, monkeypatch):
    """With and without credit of words, as in a run whose batches are skipped now and then; by a stand-in for Trackio."""
    trainer = make_trainer()
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, ReportCallback))
    tables = []
    tracker = SimpleNamespace(
        __name__="trackio", Table=lambda **kwargs: tables.append(kwargs), log=lambda values: None
    )
    monkeypatch.setitem(sys.modules, "trackio", tracker)
    trainer.args.report_to = ["trackio"]
    sample = {"step": 1, "kind": "highest", "reward": 1.0, "prompt": "a", "completion": "b c"}
    callback._track_text([{**sample, "words": [("b", 1.0, None, None), ("\n", -1.0, None, None)]}, sample], 1)
    (table,) = tables
    assert table["columns"][-1] == "credit"
    assert [row[-1] for row in table["data"]] == ["b +1.0 | \\n -1.0", ""]


def test_long_texts_are_cut(make_trainer):
    trainer = make_trainer()
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, ReportCallback))
    trainer.target_training.credit_by_word = lambda index: [WordCredit("word ", 1.0)] * 1000
    words = callback._words(0)["words"]
    assert 2_000 <= sum(len(text) for text, *_ in words) <= 2_010 and words[-1][0] == " …"


def test_a_validation_that_is_not_finite_has_no_picture(make_trainer):
    trainer = make_trainer(**VALIDATED, nonfinite="skip")
    trainer.evaluate()
    assert trainer.metric.decoded is not None
    with torch.no_grad():
        next(trainer.target_training.target_model.parameters()).fill_(torch.nan)
    trainer.evaluate()
    assert trainer.metric.decoded is None
