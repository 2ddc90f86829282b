"""The working directory of a page's code, and what makes it small."""

import sys
from unittest.mock import create_autospec

import datasets
import pytest
from trl import GRPOConfig, SFTConfig

import trl_dpg.publishing
from tests.docs.pages import Directory, load_tiny_dataset, on_cpu, shrink
from trl_dpg.testing import save_tiny_models


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory):
    """Directories of a generator and a target."""
    return save_tiny_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def directory(tmp_path, tiny_models, monkeypatch):
    """The working directory of a page's code, with tiny models."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield Directory(tmp_path, *tiny_models)
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):  # of a file on a page
            del sys.modules[name]


@pytest.fixture
def change_configs(monkeypatch):
    """Changes every trainer's configuration before it is checked."""

    def change(function):
        for config in (GRPOConfig, SFTConfig):

            def post_init(self, original=config.__post_init__):
                function(self)
                original(self)

            monkeypatch.setattr(config, "__post_init__", post_init)

    return change


@pytest.fixture
def cpu(change_configs):
    """Configurations can be made without a GPU; nothing else about them changes."""
    change_configs(on_cpu)


@pytest.fixture
def tiny(change_configs, monkeypatch):
    """Data and configurations are tiny, and nothing is pushed."""
    change_configs(shrink)
    monkeypatch.setattr(datasets, "load_dataset", load_tiny_dataset)
    for name in ("push_generator", "push_dataset"):  # they run against a server on localhost in tests/hub
        monkeypatch.setattr(trl_dpg.publishing, name, create_autospec(getattr(trl_dpg.publishing, name)))
