"""The base class of metrics: what a metric of one's own may leave out, and what it may not return."""

import pytest
import torch

from trl_dpg.metagradients.metric import as_metric, description
from trl_dpg.metrics import Metric
from trl_dpg.publishing.facts import training_facts
from trl_dpg.publishing.outcome import outcome


class Level(Metric):
    """Level of the final bias."""

    values: dict = {}

    def __call__(self, model):
        return model.transformer.ln_f.bias.sum()

    def readouts(self, model):
        return self.values

    def describe(self):
        return {"effect": "its level rises"}


def test_what_describe_leaves_out_has_a_default():
    assert description(Level()) == {
        "name": "Level",
        "effect": "its level rises",
        "description": "Level of the final bias.",
        "readouts": ["metric_gain"],
    }
    assert description(as_metric(lambda model: None))["readouts"] == ["metric_gain"]


class Stranger:
    """Mean of the final bias."""

    def __call__(self, model):
        return model.transformer.ln_f.bias.mean()

    def describe(self):
        return {"effect": "its mean rises", "readouts": ["mean_bias"]}

    def readouts(self, model):
        return {"mean_bias": self(model).item()}

    def picture(self):
        return torch.ones(1, 2), torch.ones(1, 2)

    def judge(self, data, other):
        return True, "always"


def test_methods_of_an_object_that_is_no_metric_are_called(make_trainer):
    """On the card and the page of a run, too."""
    metric = as_metric(Stranger())
    assert description(metric) == {
        "name": "Stranger",
        "effect": "its mean rises",
        "description": "Mean of the final bias.",
        "readouts": ["mean_bias"],
    }
    assert metric.picture()[0].tolist() == [[1, 1]] and metric.judge({}, {}) == (True, "always")
    trainer = make_trainer(metric=Stranger(), max_steps=1)
    trainer.train()
    facts = training_facts(trainer)
    assert facts["metric"]["effect"] == "its mean rises" and facts["metric"]["readouts"] == ["mean_bias"]


def test_a_run_with_it_ends_in_a_checkpoint_and_a_verdict(make_trainer):
    trainer = make_trainer(metric=Level(), max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.evaluate()
    assert "reached" in outcome(training_facts(trainer))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"metric": 123.0, "std": 55.0}, r"returned \['metric', 'std'\], which the logs have already"),
        ({"level": "high"}, "must return a dict of numbers"),
        ([1.0], "must return a dict of numbers"),
    ],
)
def test_readouts_of_no_use(make_trainer, values, message):
    metric = Level()
    metric.values = values
    with pytest.raises(ValueError, match=message):
        make_trainer(metric=metric).train()
    with pytest.raises(ValueError, match=message):
        make_trainer(metric=metric).evaluate()


def test_a_method_that_is_missing():
    class Nothing(Metric):
        pass

    with pytest.raises(TypeError, match="abstract method '?__call__'?"):
        Nothing()
