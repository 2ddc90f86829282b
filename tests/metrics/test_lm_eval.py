"""Benchmarks as metrics, beside the harness itself. Their data are local files in its format."""

import copy
import json
import sys

import pytest
import torch
import yaml

from trl_dpg.metrics import LMEvalLikelihood


pytest.importorskip("lm_eval")

QUESTIONS = [
    {"question": "the cat sat on", "choices": ["the mat", "a moon", "it"], "answer": 0},
    {"question": "one and one is", "choices": ["one", "two", "three or more"], "answer": 1},
    {"question": "a very long question that does not fit with its answers into the positions", "choices": ["x", "yes"], "answer": 1},
    {"question": "seven", "choices": ["six", "8"], "answer": 0},
]  # fmt: skip
PASSAGES = [
    {"text": "the cat sat on the mat", "context": "the cat sat on the ", "target": "mat"},
    {"text": "", "context": "", "target": "one two"},
    {"text": "", "context": "a b c d e f g h i j k l m n o p q r s t u v w x y z 0 1 2", "target": " 3 4"},
]  # the first context ends in a space, the second is empty, the third is as long as can be


@pytest.fixture
def choice(tmp_path):
    """A task of multiple choice, with an example before each question."""
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    return {
        "task": "local_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_target": "answer",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }


@pytest.fixture
def passages(tmp_path):
    """A task of one continuation."""
    path = tmp_path / "passages.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PASSAGES))
    return {
        "task": "local_passages",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "output_type": "loglikelihood",
        "test_split": "test",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{target}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "perplexity", "aggregation": "perplexity"}, {"metric": "acc"}],
    }


def harness(model, tokenizer, task):
    """The harness's own log-likelihoods of each question, and its results."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm = HFLM(pretrained=copy.deepcopy(model), tokenizer=copy.deepcopy(tokenizer), batch_size=2)
    out = simple_evaluate(model=lm, tasks=[task], bootstrap_iters=0, task_manager=TaskManager(include_defaults=False))
    samples = sorted(out["samples"][task["task"]], key=lambda sample: sample["doc_id"])
    log_likelihoods = [[ll for ((ll, _),) in sample["resps"]] for sample in samples]
    results = {
        name.split(",")[0]: value for name, value in out["results"][task["task"]].items() if name.endswith(",none")
    }
    return log_likelihoods, {name: value for name, value in results.items() if not name.endswith("_stderr")}


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("fewshot", [0, 1])
def test_choice_equals_the_harness(make_gpt2, tokenizer, choice, adds_bos, fewshot):
    from tokenizers.processors import TemplateProcessing

    if adds_bos:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    if fewshot:
        choice |= {"num_fewshot": 1, "fewshot_split": "test"}
    model = make_gpt2(torch.float32)
    metric = LMEvalLikelihood(copy.deepcopy(choice), processing_class=tokenizer)
    metric.setup(model)
    expected, results = harness(model, tokenizer, choice)
    for scores, own in zip(metric._scores(model)[0], expected, strict=True):
        assert scores.tolist() == pytest.approx(own, abs=1e-5)
    assert metric.readouts(model) == pytest.approx(results) and set(results) == {"acc", "acc_norm"}
    margins = [torch.tensor(own).log_softmax(0)[row["answer"]] for own, row in zip(expected, QUESTIONS, strict=True)]
    assert metric(model).item() == pytest.approx(torch.stack(margins).mean().item(), abs=1e-5)
    alone = LMEvalLikelihood(copy.deepcopy(choice), margin=False, processing_class=tokenizer)
    alone.setup(model)
    right = [own[row["answer"]] for own, row in zip(expected, QUESTIONS, strict=True)]
    assert alone(model).item() == pytest.approx(sum(right) / len(right), abs=1e-5)


def test_continuation_equals_the_harness(make_gpt2, tokenizer, passages):
    model = make_gpt2(torch.float32)
    metric = LMEvalLikelihood(copy.deepcopy(passages), processing_class=tokenizer)
    metric.setup(model)
    expected, results = harness(model, tokenizer, passages)
    values = [score for scores in metric._scores(model)[0] for score in scores.tolist()]
    assert values == pytest.approx([own for (own,) in expected], abs=1e-5)
    assert metric.readouts(model) == pytest.approx(results, rel=1e-5) and set(results) == {"perplexity", "acc"}
    assert metric(model).item() == pytest.approx(sum(values) / len(values), abs=1e-5)
    assert max(len(tokens) for tokens, _ in metric._rows) <= 65


def test_accuracy_of_a_model_that_knows(make_gpt2, tokenizer, choice):
    model = make_gpt2(torch.float32)
    metric = LMEvalLikelihood(copy.deepcopy(choice), processing_class=tokenizer)
    metric.setup(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        (-metric(model)).backward()
        optimizer.step()
    assert metric.readouts(model)["acc"] == harness(model, tokenizer, choice)[1]["acc"] == 1.0


@pytest.mark.parametrize("margin", [True, False])
def test_gradient(gpt2, tokenizer, choice, assert_gradient, margin):
    metric = LMEvalLikelihood(choice, margin=margin, processing_class=tokenizer, batch_size=3)
    metric.setup(gpt2)
    assert metric(gpt2).dtype == torch.float64 and metric(gpt2).shape == ()
    assert_gradient(metric, gpt2)


def test_several_right_answers(gpt2, tokenizer, choice):
    """Any of them will do. An answer may be given as a string."""
    choice["doc_to_target"] = lambda row: [0, 1]
    metric = LMEvalLikelihood(choice, limit=1, processing_class=tokenizer)
    metric.setup(gpt2)
    scores = metric._scores(gpt2)[0][0]
    assert metric(gpt2).item() == pytest.approx(scores.log_softmax(0)[:2].logsumexp(0).item(), rel=1e-12)
    assert "acc" in metric.readouts(gpt2)
    text = LMEvalLikelihood({**choice, "doc_to_target": lambda row: "a moon"}, limit=1, processing_class=tokenizer)
    assert text._answers == [(3, [1])]


def test_a_yaml_file_and_a_limit(gpt2, tokenizer, choice, tmp_path):
    path = tmp_path / "task.yaml"
    path.write_text(yaml.safe_dump(choice))
    metric = LMEvalLikelihood(path, limit=2, processing_class=tokenizer)
    metric.setup(gpt2)
    assert len(metric._scores(gpt2)[0]) == 2
    assert metric.describe()["effect"] == "it answers the benchmark `local_choice` better"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"output_type": "generate_until", "metric_list": [{"metric": "exact_match"}]},
            "output type 'generate_until'",
        ),
        ({"doc_to_target": lambda row: 7}, "`task` .* cannot be loaded"),
        ({"doc_to_target": lambda row: 7 * row["answer"]}, r"right answer, \[7\], is not among its 3 choices"),
        ({"doc_to_target": lambda row: "nothing"}, r"right answer, \['nothing'\], is not among"),
        ({"dataset_kwargs": {"data_files": {"test": "missing.jsonl"}}}, "`task` .* cannot be loaded"),
    ],
)
def test_bad_tasks(choice, change, message):
    with pytest.raises(ValueError, match=message):
        LMEvalLikelihood({**choice, **change})


def test_bad_arguments(gpt2, choice, tokenizer, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="`limit` must be at least 1, got 0"):
        LMEvalLikelihood(choice, limit=0)
    with pytest.raises(ValueError, match="`task` .*missing.yaml.* cannot be loaded"):
        LMEvalLikelihood(tmp_path / "missing.yaml")
    metric = LMEvalLikelihood(choice)
    with pytest.raises(ValueError, match=r"`LMEvalLikelihood.setup\(model\)` must be called"):
        metric(gpt2)
    with pytest.raises(ValueError, match="`processing_class` is None and the tokenizer of `target_model`"):
        metric.setup(gpt2)
    long = LMEvalLikelihood({**choice, "doc_to_choice": lambda row: ["b" * 70, "c", "d"]}, processing_class=tokenizer)
    with pytest.raises(ValueError, match="has 71 tokens, but must have 1 to 64"):
        long.setup(gpt2)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ImportError, match=r"pip install trl-dpg\[lm-eval\]"):
        LMEvalLikelihood(choice)


@pytest.mark.slow
def test_an_unknown_name():
    with pytest.raises(ValueError, match="`task` 'no_such_task' cannot be loaded"):
        LMEvalLikelihood("no_such_task")
