"""A model for experiments in little."""

import pytest
from datasets import DatasetDict

from experiments.corpora import language_texts
from experiments.pretrain import pretrain


@pytest.fixture
def few_leads():
    leads = language_texts("en")
    return DatasetDict({"train": leads["train"].take(100), "test": leads["test"].take(400)})


@pytest.fixture
def little_model(tmp_path, few_leads):
    """The directory of a model that has hardly learned anything."""
    sizes = {"num_steps": 2, "batch_size": 2, "hidden_size": 24, "num_layers": 1, "vocab_size": 300}
    for part in pretrain({"en": few_leads["train"]["text"][:]}, switch=0.0, **sizes):
        part.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")
