"""The cards in `model_cards` say what the runs in `experiments/results` measured."""

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, ModelCardData

from tests.hub.server import check_card
from trl_dpg.publishing.outcome import outcome


ROOT = Path(__file__).parents[2]
NAMES = ["tiny_qr", "tiny_67", "tiny_l2", "tiny_uuid", "tiny_language"]


@pytest.mark.parametrize("name", NAMES)
def test_card_of_an_experiment(name):
    folder = ROOT / "model_cards" / name
    card = ModelCard.load(folder / "README.md")
    assert check_card(str(card), "model") == []
    assert ModelCardData(**card.data.__dict__).to_yaml() == card.data.to_yaml()
    runs = ROOT / "experiments" / "results" / name
    run = next(runs / run for run in ("metagradient_expected_credit", "metagradient") if (runs / run).exists())
    results = json.loads((run / "seed_0" / "results.json").read_text())
    shown = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert len(shown) > 3
    for readout, value in shown.items():
        # the log may hold a draw more, taken at the last step of training
        trained = results[f"eval_{readout}"]["trained"]
        spread = max(trained["draws"]) - min(trained["draws"])
        assert value == pytest.approx(trained["mean"], rel=1e-3, abs=spread + 1e-4)
    assert f"{results['steps']} steps, {results['completions_per_generation_batch']} texts" in card.text
    assert results["hardware"] in card.text
    assert outcome(json.loads((folder / "dpg.json").read_text())) in card.text
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", card.text):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    for text in (str(card), (folder / "dpg.json").read_text()):
        assert not re.search(r"/(tmp|home|root|work|Users)/|hf_\w{20}", text)


def test_overview_names_every_card():
    overview = (ROOT / "model_cards" / "README.md").read_text()
    folders = [path.name for path in (ROOT / "model_cards").iterdir() if path.is_dir()]
    assert sorted(folders) == sorted(NAMES)
    for link in re.findall(r"\]\((.*?)\)", overview):
        assert (ROOT / "model_cards" / link).exists(), link
