"""Publishing and downloading in processes of their own, which know of the Hub only by environment variables."""

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

PREAMBLE = """
import json, os, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

def write(name):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    ids = model.generate(**tokenizer("good ask blue", return_tensors="pt"), max_new_tokens=12, do_sample=False)
    return tokenizer.decode(ids[0])
"""

PUBLISH = (
    PREAMBLE
    + """
from trl_dpg.testing import save_tiny_models, tiny_prompts
from trl_dpg import DatasetPolicyGradientConfig, DatasetPolicyGradientTrainer
from trl_dpg.metrics import LMHeadPattern
from trl_dpg.publishing import push_dataset

generator, target = save_tiny_models(Path("models"), seed=0, num_words=60)
prompts = tiny_prompts(16, 2)
trainer = DatasetPolicyGradientTrainer(
    model=generator,
    target_model=target,
    metric=LMHeadPattern.sixty_seven(scale="auto"),
    args=DatasetPolicyGradientConfig(
        "runs/generator", max_steps=2, per_device_train_batch_size=8, num_generations=4, max_completion_length=6,
        target_untie_lm_head=True, eval_strategy="steps", eval_steps=1, eval_on_start=True, save_strategy="steps",
        save_steps=1, push_to_hub=True, hub_private_repo=True, hub_token=os.environ["WRITE_TOKEN"], bf16=False,
        use_cpu=True, report_to="none", learning_rate=1e-2, per_device_eval_batch_size=8,
        generation_kwargs={"suppress_tokens": [60, 61, 62, 63]},
    ),
    train_dataset=prompts["train"],
    eval_dataset=prompts["test"],
)
trainer.train()
trainer.save_model()  # pushes, as `push_to_hub` is set
rows = [{"prompt": "good ask blue", "completion": "word word"}] * 4
Path("data.jsonl").write_text("".join(json.dumps(row) + chr(10) for row in rows))
push_dataset("data.jsonl", "me/data", generator="me/generator", private=True, token=os.environ["WRITE_TOKEN"])
print("TEXT", json.dumps(write("runs/generator")))
"""
)

DOWNLOAD = (
    PREAMBLE
    + """
import re
from huggingface_hub import ModelCard, DatasetCard
from tests.hub.server import validate

print("TEXT", json.dumps(write("me/generator")))
for card, repo_type in ((ModelCard, "model"), (DatasetCard, "dataset")):
    loaded = card.load({"model": "me/generator", "dataset": "me/data"}[repo_type])
    validate(loaded)
    for code in re.findall(r"```python\\n(.*?)```", loaded.text, re.DOTALL):
        exec(code)  # what readers are told to run
print("TEXTS", json.dumps(texts))
print("ROWS", json.dumps(dataset.to_list()))
"""
)

FULL_DISK = (
    PUBLISH.split("trainer.train()")[0].replace("push_to_hub=True, ", "")
    + """
import resource, signal

trainer.train()
commit = trainer.push_to_hub()
before = write("runs/generator")
files = {path.name: path.read_bytes() for path in Path("runs/generator").iterdir() if path.is_file()}
for parameter in trainer.model.parameters():
    parameter.data.add_(1.0)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))  # as if the disk were full
try:
    trainer.push_to_hub()
except RuntimeError as error:
    message = str(error)
finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print("MESSAGE", json.dumps(message))
assert {path.name: path.read_bytes() for path in Path("runs/generator").iterdir() if path.is_file()} == files
assert write("runs/generator") == before and write("runs/generator/checkpoint-2") == before
again = trainer.push_to_hub()  # as the message says
print("COMMITS", json.dumps([commit.oid, again.oid]))
"""
)


def run(code: str, directory: Path, hub, processes: int = 1, **variables: str) -> subprocess.CompletedProcess:
    environment = {
        k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_TOKEN", "TRANSFORMERS_OFFLINE")
    }
    environment |= {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(directory / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(ROOT),
        **variables,
    }
    script = directory / "script.py"
    script.write_text(code)
    command = [sys.executable, str(script)]
    if processes > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        environment["ACCELERATE_USE_CPU"] = "true"
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=300)


def printed(result: subprocess.CompletedProcess, what: str):
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(
        next(line for line in result.stdout.splitlines() if line.startswith(f"{what} "))[len(what) + 1 :]
    )


def test_publish_and_download(tmp_path):
    with serve(tokens={TOKEN: "write"}, part_size=100_000) as hub:
        here, there = tmp_path / "here", tmp_path / "there"
        here.mkdir(), there.mkdir()
        published = run(PUBLISH, here, hub, WRITE_TOKEN=TOKEN)
        local_text = printed(published, "TEXT")
        repos = hub.repos
        assert all(repo.private for repo in repos.values()) and len(repos) == 2
        assert [body.get("visibility") for body in hub.created] == ["private"] * len(hub.created)
        for repo in repos.values():
            for name, data in repo.files.items():
                assert TOKEN.encode() not in data and str(tmp_path).encode() not in data, name
        assert TOKEN not in published.stdout + published.stderr
        # with the token, a fresh process gets the same generator; without it, nothing
        loaded = run(DOWNLOAD, there, hub, HF_TOKEN=TOKEN)
        assert printed(loaded, "TEXT") == local_text
        texts = printed(loaded, "TEXTS")
        assert len(texts) == 8 and all(texts)
        assert printed(loaded, "ROWS") == [{"prompt": "good ask blue", "completion": "word word"}] * 4
        (tmp_path / "elsewhere").mkdir()
        assert run(DOWNLOAD, tmp_path / "elsewhere", hub).returncode != 0


def test_full_disk(tmp_path):
    with serve(tokens={TOKEN: "write"}) as hub:
        result = run(FULL_DISK, tmp_path, hub, WRITE_TOKEN=TOKEN)
        message = printed(result, "MESSAGE")
        assert "could not be saved in 'runs/generator'" in message and "File too large" in message
        assert "free space there" in message and "Nothing on disk was lost" in message
        assert len(set(printed(result, "COMMITS"))) == 2
        assert hub.repos["models", "me/generator"].commits[-1] == printed(result, "COMMITS")[1]


def test_two_processes(tmp_path):
    with serve(tokens={TOKEN: "write"}) as hub:
        end = "trainer.accelerator.wait_for_everyone()\ntrainer.end()\n"
        code = PUBLISH.split("rows = ")[0] + end
        result = run(code, tmp_path, hub, processes=2, WRITE_TOKEN=TOKEN)
        assert result.returncode == 0, result.stderr[-3000:]
        repo = hub.repos["models", "me/generator"]
        assert repo.files["model.safetensors"] == (tmp_path / "runs/generator/model.safetensors").read_bytes()
        assert len(hub.created) == 1  # one process speaks to the Hub
        assert len(set(repo.messages)) == len(repo.messages)  # nor is anything pushed twice
        assert repo.files["README.md"] == (tmp_path / "runs/generator/README.md").read_bytes()
