"""
The whole chain from the shell, with nothing but `trl-dpg` and a Hub on localhost: train, push, pull in a fresh place, generate, push the
data, fine-tune with stock tools, and the picture is there.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hub.server import serve


pytestmark = pytest.mark.slow

TOKEN = "hf_" + "w" * 34
ROOT = Path(__file__).parents[2]

TRAIN = """
model_name_or_path: data/tiny-60/generator
target_model_name_or_path: data/tiny-60/target
dataset_name: data/tiny-60/prompts.jsonl
eval_dataset_name: data/tiny-60/held_out.jsonl
num_eval_prompts: 32
metric: 67
output_dir: runs/67
target_learning_rate: 1.0e-3
target_untie_lm_head: true
learning_rate: 3.0e-3
max_steps: 100
per_device_train_batch_size: 256
num_generations: 8
max_completion_length: 24
gradient_checkpointing: false
bf16: false
use_cpu: true
eval_strategy: "no"
eval_on_start: true
per_device_eval_batch_size: 256
logging_steps: 50
save_strategy: "no"
report_to: none
push_to_hub: true
hub_model_id: me/writes-67
hub_private_repo: true
"""


def test_from_training_to_a_picture_in_the_weights_of_another(tmp_path):
    with serve(tokens={TOKEN: "write"}) as hub:

        def run(directory: str, *command: str, code: int = 0) -> str:
            """Runs a command as a user with a home directory, and a cache, of their own."""
            place = tmp_path / directory
            place.mkdir(exist_ok=True)
            variables = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
            variables |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(place / "cache"), "HF_TOKEN": TOKEN}
            variables |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(ROOT)}
            done = subprocess.run(
                [sys.executable, *command], cwd=place, env=variables, capture_output=True, text=True, timeout=600
            )
            assert done.returncode == code, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
            return done.stdout

        cli = ("-m", "trl_dpg.cli")
        run("author", "-m", "experiments.prepare", "tiny-60")
        (tmp_path / "author" / "train.yaml").write_text(TRAIN)
        out = run("author", *cli, "train", "--config", "train.yaml")
        assert "It is on the Hub, too: me/writes-67." in out
        assert hub.repos["models", "me/writes-67"].private

        # someone else, who has the prompts
        prompts = tmp_path / "writer" / "prompts.jsonl"
        prompts.parent.mkdir()
        prompts.write_bytes((tmp_path / "author" / "data" / "tiny-60" / "held_out.jsonl").read_bytes())
        generate = ["generate", "--model", "me/writes-67", "--prompts", "prompts.jsonl", "--output", "data.jsonl"]
        generate += ["--num_examples", "1024", "--push", "me/data-67", "--private", "--json"]
        result = json.loads(run("writer", *cli, *generate))
        assert (result["examples"], result["pushed"]) == (1024, "me/data-67")
        assert result["generation"]["max_new_tokens"] == 24  # as in training, by the `dpg.json` on the Hub
        assert "me/writes-67" in hub.repos["datasets", "me/data-67"].files["README.md"].decode()

        # and a third party, who has the target and the data
        author = tmp_path / "author" / "data" / "tiny-60"
        verify = ["verify", "--dataset", "me/data-67", "--target", str(author / "target"), "--metric", "67"]
        verify += ["--untie_lm_head", "--learning_rate", "3e-4", "--lr_scheduler_type", "constant", "--use_cpu"]
        verify += ["--per_device_train_batch_size", "256", "--json", "--output_dir", "out"]
        result = json.loads(run("third", *cli, *verify))
        assert result["data"]["steps"] == 4 and result["data"]["pixel_accuracy"] > 0.9
        decode = ["decode", str(author / "target"), "out/after_data", "--shape", "6", "7", "--json"]
        rows = json.loads(run("third", *cli, *decode))["rows"]
        assert len(rows) == 6 and {len(row) for row in rows} == {7}

        # which the target does not learn from words at random
        words = (author / "prompts.jsonl").read_text().splitlines()[:1024]
        control = tmp_path / "third" / "control.jsonl"
        control.write_text("".join(json.dumps({"text": json.loads(line)["prompt"]}) + "\n" for line in words))
        verify[verify.index("me/data-67")] = "control.jsonl"
        assert not json.loads(run("third", *cli, *verify, code=1))["passed"]
