"""Publishing, by the real client of the Hub, to a Hub on localhost."""

import html
import json
import logging
import math
import re
import resource
import traceback
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from unittest.mock import patch

import huggingface_hub
import pytest
import torch
import transformers
from datasets import Dataset
from huggingface_hub import DatasetCard, HfApi, ModelCard, ModelCardData
from peft import IA3Config, LNTuningConfig, LoraConfig, get_peft_model
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from tests.hub.server import Failure, check_card, serve, validate
from trl_dpg.checkpoints import is_whole
from trl_dpg.metagradients.method.updates import SGD
from trl_dpg.metagradients.metric import as_metric
from trl_dpg.metrics import LanguageModelingLikelihood, LMHeadNorm, LMHeadPattern
from trl_dpg.publishing import push_dataset, push_generator
from trl_dpg.publishing.cards import dataset_card, generator_card
from trl_dpg.publishing.client import API
from trl_dpg.publishing.facts import (
    describe_model,
    public_name,
    summarize_validation,
    training_facts,
)
from trl_dpg.publishing.outcome import recipe_text
from trl_dpg.reporting import write_report
from trl_dpg.scripts import train
from trl_dpg.testing import save_tiny_models, tiny_prompts


TOKEN, READ_TOKEN = "hf_" + "w" * 34, "hf_" + "r" * 34
WEIGHTS = "model.safetensors"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that this process's client talks to."""
    with serve(tokens={TOKEN: "write", READ_TOKEN: "read"}, part_size=16_384) as server, ExitStack() as patches:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        here = {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
        }
        here |= {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}
        patches.enter_context(patch.multiple(huggingface_hub.constants, **here))
        patches.enter_context(patch.object(huggingface_hub.utils._http.time, "sleep"))
        patches.enter_context(patch.object(API, "endpoint", server.url))
        patches.enter_context(patch.object(transformers.utils.hub, "_hf_api", HfApi(endpoint=server.url)))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


@pytest.fixture
def run(hub, make_trainer):
    """A trainer that has trained for a step, validated before and after it."""

    def make(**kwargs):
        kwargs = {"max_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True, **kwargs}
        trainer = make_trainer(hub_model_id="me/generator", **kwargs)
        trainer.train()
        trainer.evaluate()
        return trainer

    return make


@pytest.fixture
def folder(tmp_path, causal_lm, tokenizer):
    """A folder with a generator."""
    path = tmp_path / "generator"
    causal_lm().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_push_to_hub(run, hub):
    trainer = run(hub_private_repo=True, generation_kwargs={"suppress_tokens": [60, 61, 62, 63]})
    (Path(trainer.args.output_dir) / "notes.txt").write_text("my own")
    commit = trainer.push_to_hub(commit_message="A generator", tags="mine", license="apache-2.0")
    repo = hub.repos["models", "me/generator"]
    assert commit.oid == repo.commits[-1] and repo.messages == ["A generator"]
    assert set(repo.files) == {
        *("README.md", "dpg.json", "curve.png", "pattern.png", "pattern.gif", "config.json", "generation_config.json"),
        *(WEIGHTS, "tokenizer.json", "tokenizer_config.json"),
    }
    assert hub.created == [{"name": "generator", "organization": "me", "visibility": "private"}]
    assert repo.private
    for name in ("curve.png", "pattern.png"):
        assert repo.files[name].startswith(b"\x89PNG")
    assert (Path(trainer.args.output_dir) / "training_args.bin").exists()  # stays at home
    assert json.loads(repo.files["dpg.json"])["recipe"]["learning_rate"] == trainer.args.target_learning_rate


def test_the_script_pushes_once_after_training(hub, tmp_path, monkeypatch, caplog):
    """All that there is."""
    monkeypatch.chdir(tmp_path)
    generator, target = save_tiny_models(Path("models"), seed=0, num_words=60)
    for name, rows in tiny_prompts(16, 4).items():
        rows.to_json(f"{name}.jsonl")
    flags = "--metric 67 --target_untie_lm_head True --max_steps 1 --save_strategy no --per_device_train_batch_size 8"
    flags += (
        " --num_generations 4 --max_completion_length 6 --learning_rate 1e-3 --use_cpu --bf16 False --report_to none"
    )
    flags += " --dataset_name train.jsonl --eval_dataset_name test.jsonl --output_dir runs/generator --push_to_hub"
    models = ["--model_name_or_path", str(generator), "--target_model_name_or_path", str(target)]
    assert train.main([*flags.split(), *models]) == 0
    repo = hub.repos["models", "me/generator"]
    assert repo.messages == ["End of training"] and "empty commit" not in caplog.text
    assert {"README.md", "dpg.json", "curve.png", "pattern.png", WEIGHTS} <= set(repo.files)
    assert repo.files[WEIGHTS] == Path("runs/generator", WEIGHTS).read_bytes()


def test_nothing_of_this_machine_is_pushed(run, hub, tmp_path, causal_lm, tokenizer, monkeypatch):
    monkeypatch.setenv("MY_SECRET", "swordfish")
    base = tmp_path / "secret-place" / "base-model"
    causal_lm().save_pretrained(base)
    tokenizer.save_pretrained(base)
    trainer = run(
        model=str(base),
        target_model=str(base),
        hub_token=TOKEN,
        peft_config=LoraConfig(r=2, target_modules=["c_attn"]),
        target_untie_lm_head=True,
        save_strategy="steps",
        save_steps=1,
        push_to_hub=True,
        hub_strategy="checkpoint",
    )
    trainer.push_to_hub(dataset_name=str(base))
    repo = hub.repos["models", "me/generator"]
    assert "adapter_model.safetensors" in repo.files and "last-checkpoint/optimizer.pt" in repo.files
    assert not any(name.endswith("training_args.bin") for name in repo.files)
    for name in [name for name in repo.files if name.startswith("last-checkpoint/")]:
        path = tmp_path / "downloaded" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(repo.files[name])
    assert is_whole(tmp_path / "downloaded" / "last-checkpoint")
    for name, data in repo.files.items():
        for secret in (TOKEN, str(tmp_path), "secret-place", str(Path.home()), "swordfish"):
            assert secret.encode() not in data, f"{secret} is in {name}"
    assert json.loads(repo.files["adapter_config.json"])["base_model_name_or_path"] == "base-model"
    card = ModelCard(repo.files["README.md"].decode())
    assert card.data.library_name == "peft" and card.data.base_model is None and card.data.datasets is None
    assert "the local model `base-model`" in card.text


def test_adapter_of_a_model_on_the_hub(run, hub, folder):
    push_generator(folder, "me/base", token=TOKEN)
    trainer = run(
        model=AutoModelForCausalLM.from_pretrained("me/base"),
        peft_config=LoraConfig(r=2, target_modules=["c_attn"]),
        learning_rate=0.1,
    )
    trainer.push_to_hub(blocking=True)
    files = hub.repos["models", "me/generator"].files
    card = ModelCard(files["README.md"].decode())
    assert card.data.base_model == "me/base" and card.data.library_name == "peft" and "lora" in card.data.tags
    assert WEIGHTS not in files
    loaded = AutoModelForCausalLM.from_pretrained(
        "me/generator"
    ).eval()  # the base model and the adapter, from the Hub
    ids = torch.arange(12)[None]
    trainer.model.eval()
    with torch.no_grad():
        adapted, base = loaded(ids).logits, AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits
        assert torch.allclose(adapted, trainer.model(ids).logits, atol=1e-6)
    assert not torch.allclose(adapted, base, atol=1e-3)


def test_card_says_what_was_validated(run, hub):
    trainer = run(metric=LMHeadPattern([[1, -1], [-1, 1]], scale="auto"))
    trainer.push_to_hub()
    rows = [row for row in trainer.state.log_history if "eval_metric" in row]
    assert [row["step"] for row in rows] == [0, 1, 1]
    text = hub.repos["models", "me/generator"].files["README.md"].decode()
    assert "before training, 1 draw | at step 1, 2 draws" in text
    accuracy = (rows[1]["eval_pixel_accuracy"] + rows[2]["eval_pixel_accuracy"]) / 2
    assert f"| pixel accuracy | {rows[0]['eval_pixel_accuracy']:.4g} | {accuracy:.4g}" in text
    # what the Hub shows beside the card, through the client's own reader and check
    card = ModelCard(text)
    assert {"trl", "dpg"} <= set(card.data.tags)
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results["pixel_accuracy"] == pytest.approx(accuracy)
    assert results["metric"] == pytest.approx((rows[1]["eval_metric"] + rows[2]["eval_metric"]) / 2, rel=1e-5)
    assert ModelCardData(**card.data.__dict__).to_yaml() == card.data.to_yaml()
    validate(card)
    assert hub.checked[-1] == str(card)


@pytest.mark.parametrize("kind", ["commit", "put"])
def test_dropped_connection(hub, folder, kind):
    hub.failures[kind] = Failure(times=6 if kind == "put" else 1)  # the client tries an upload six times
    with pytest.raises(RuntimeError, match=r"(?s)me/gen.*Nothing on disk was lost.*push again"):
        push_generator(folder, "me/gen", token=TOKEN)
    sent = dict(hub.uploads)
    assert (len(sent) > 0) == (kind == "commit")  # the weights in parts of 16 kB, before the commit
    push_generator(folder, "me/gen", token=TOKEN)
    assert hub.repos["models", "me/gen"].files[WEIGHTS] == (folder / WEIGHTS).read_bytes()
    assert len(hub.uploads) == -(-(folder / WEIGHTS).stat().st_size // 16_384)
    assert set(hub.uploads.values()) == {1}  # no part was sent twice
    # and again: nothing to send, no empty commit
    commits = list(hub.repos["models", "me/gen"].commits)
    assert push_generator(folder, "me/gen", token=TOKEN).oid == commits[-1]
    assert hub.repos["models", "me/gen"].commits == commits and set(hub.uploads.values()) == {1}


def test_a_wrong_name_is_no_error_of_the_network(hub, folder):
    with pytest.raises(RuntimeError, match="Correct the repository's name") as caught:
        push_generator(folder, "me/my generator!", token=TOKEN)
    assert "network" not in str(caught.value)


def test_a_card_that_cannot_be_made_is_no_error_of_the_network(run, hub, folder, caplog):
    (folder / "dpg.json").write_text("{}")
    with pytest.raises(ValueError, match="`dpg.json` lacks .*validation"):
        push_dataset(Dataset.from_list([{"text": "blue"}]), "me/data", generator=str(folder))
    assert ("datasets", "me/data") not in hub.repos
    trainer = run()
    trainer.example_prompt = {1, 2}  # no JSON
    trainer.push_to_hub()
    assert "The card of the generator in" in caplog.text and "TypeError" in caplog.text
    assert WEIGHTS in hub.repos["models", "me/generator"].files


def test_upload_goes_on_after_a_short_interruption(hub, folder):
    hub.failures["put"] = Failure(times=1)
    push_generator(folder, "me/gen", token=TOKEN)
    assert hub.repos["models", "me/gen"].files[WEIGHTS] == (folder / WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    ("token", "failures", "message"),
    [
        ("hf_" + "x" * 34, {}, r"401 Unauthorized: Invalid credentials.*write permission.*hf auth login"),
        (READ_TOKEN, {}, r"403 Forbidden: You don't have the rights.*hub_model_id"),
        (TOKEN, {"commit": Failure(403, "Private repository storage limit reached")}, r"403.*storage limit reached"),
        (TOKEN, {"put": Failure(507, "No space left")}, r"507 Insufficient Storage.*No space left.*Free storage"),
        (TOKEN, {"commit": Failure(413, "Payload too large")}, r"413 .*Payload too large.*Free storage"),
        (TOKEN, {"preupload": Failure(429, "Slow down")}, r"429 .*rate limit"),
    ],
)
def test_refusals(hub, folder, token, failures, message):
    hub.failures.update(failures)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(RuntimeError, match=f"(?s)'me/gen' on {hub.url} failed: the Hub answered {message}") as error:
        push_generator(folder, "me/gen", token=token)
    assert f"push_generator('{folder}', 'me/gen')" in str(error.value)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    AutoModelForCausalLM.from_pretrained(folder)
    hub.failures.clear()
    push_generator(folder, "me/gen", token=TOKEN)  # as the message says
    assert WEIGHTS in hub.repos["models", "me/gen"].files


def test_token_is_not_repeated(hub, folder, caplog):
    hub.failures["commit"] = Failure(400, f"Bad request of {TOKEN}")
    with pytest.raises(RuntimeError, match="Bad request of <token>") as error:
        push_generator(folder, "me/gen", token=TOKEN)
    assert TOKEN not in "".join(traceback.format_exception(error.value))
    assert TOKEN not in caplog.text


def test_refused_before_training(hub, make_trainer):
    with pytest.raises(
        RuntimeError, match=r"(?s)'me/generator'.*403 Forbidden.*To train first, leave out `push_to_hub=True`"
    ):
        make_trainer(push_to_hub=True, hub_model_id="me/generator", hub_token=READ_TOKEN)


def test_offline(hub, folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RuntimeError, match="offline mode is on. Unset `HF_HUB_OFFLINE`"):
        push_generator(folder, "me/gen", token=TOKEN)


def test_no_weights(hub, tmp_path):
    with pytest.raises(ValueError, match=r"holds no weights .*trainer.save_model"):
        push_generator(tmp_path, "me/gen", token=TOKEN)
    assert not hub.created


def test_code_is_pushed_only_where_the_model_needs_it(hub, folder):
    (folder / "script.py").write_text("")
    push_generator(folder, "me/gen", token=TOKEN)
    files = hub.repos["models", "me/gen"].files
    assert "script.py" not in files
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoConfig": "script.Config"}}))
    push_generator(folder, "me/gen", token=TOKEN)
    assert "script.py" in files


def test_pushes_in_the_background(run, hub, caplog):
    hub.failures["commit"] = Failure(507, "Full", times=1)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        trainer = run(push_to_hub=True, save_strategy="steps", save_steps=1, max_steps=2, hub_always_push=True)
    finally:
        logger.removeHandler(caplog.handler)
    assert re.search(r"push during training failed; training is not affected.*507", caplog.text)
    repo = hub.repos["models", "me/generator"]
    assert repo.messages == ["Training in progress, step 2"] and WEIGHTS in repo.files
    future = trainer.push_to_hub(blocking=False)
    assert future.result().oid == repo.commits[-1]
    assert not [path for path in Path(trainer.args.output_dir).iterdir() if path.name.startswith("_")]


def test_failed_save_keeps_what_was_saved(run, hub):
    trainer = run()
    trainer.push_to_hub()
    folder = Path(trainer.args.output_dir)
    saved, commits = (folder / WEIGHTS).read_bytes(), len(hub.repos["models", "me/generator"].commits)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(saved) // 2, limits[1]))  # as if the disk were full
    try:
        with pytest.raises(RuntimeError, match=r"could not be saved in .*too large.*push_to_hub\(\)` again.*Nothing"):
            trainer.push_to_hub()
        with pytest.raises((OSError, SafetensorError)):
            trainer.save_model()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (folder / WEIGHTS).read_bytes() == saved and not (folder / "_saving").exists()
    assert len(hub.repos["models", "me/generator"].commits) == commits


def test_push_dataset(run, hub, tmp_path):
    trainer = run()
    trainer.push_to_hub()
    rows = [{"prompt": "say blue", "completion": f"{number} blue"} for number in range(1200)]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    push_dataset(
        path,
        "me/data",
        generator="me/generator",
        private=True,
        prompts="trl-lib/tldr",
        generation={"temperature": 1.0, "max_new_tokens": 6},
        license="mit",
    )
    repo = hub.repos["datasets", "me/data"]
    assert repo.private and set(repo.files) == {"README.md", "data/train-00000-of-00001.parquet"}
    (tmp_path / "back.parquet").write_bytes(repo.files["data/train-00000-of-00001.parquet"])
    assert Dataset.from_parquet(str(tmp_path / "back.parquet")).to_list() == rows
    card = DatasetCard(repo.files["README.md"].decode())
    validate(card)
    assert {"synthetic", "trl", "dpg"} <= set(card.data.tags)
    assert card.data.source_datasets == ["trl-lib/tldr"] and card.data.size_categories == "1K<n<10K"
    assert card.data.license == "mit"
    for text in (
        "1,200 synthetic texts",
        "[me/generator](https://huggingface.co/me/generator)",
        "`temperature` 1.0",
        "a picture (2 × 2 pixels) appears in its LM head",
        "`prompt`, `completion`",
        "pixel accuracy",
    ):
        assert text in card.text
    assert str(tmp_path) not in str(card)


def test_push_dataset_of_a_local_generator(hub, folder, tmp_path, caplog):
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    data = Dataset.from_list([{"text": "blue"}])
    push_dataset(data, "me/data", generator=str(folder), prompts=str(tmp_path / "prompts.jsonl"))
    logger.removeHandler(caplog.handler)
    text = hub.repos["datasets", "me/data"].files["README.md"].decode()
    assert str(tmp_path) not in text and "`generator` (a local model)" in text and "prompts.jsonl" in text
    assert "has no 'dpg.json'" in caplog.text


def test_push_dataset_errors(hub, folder, tmp_path):
    with pytest.raises(ValueError, match="`dataset` is empty"):
        push_dataset(Dataset.from_list([]), "me/data", generator=str(folder))
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a"}\n{"text": ')
    with pytest.raises(ValueError, match="Line 2 of .*data.jsonl' is no JSON"):
        push_dataset(path, "me/data", generator=str(folder))
    data = Dataset.from_list([{"text": "a"}])
    for name in ("me/nobody", "runs/no/such/folder"):
        with pytest.raises(ValueError, match=f"`generator` '{name}' is neither a directory nor a model on {hub.url}"):
            push_dataset(data, "me/data", generator=name)
    hub.failures["create"] = Failure(403, "Not yours", times=1)
    with pytest.raises(RuntimeError, match=r"(?s)'me/data'.*403.*Not yours.*unchanged in memory.*push_dataset"):
        push_dataset(data, "me/data", generator=str(folder))
    assert ("datasets", "me/data") not in hub.repos


def test_summarize_validation_of_the_best_checkpoint():
    def row(step, gain):
        return {"step": step, "eval_metric_gain": gain, "eval_runtime": 1.0, "eval_completions/mean_length": 6.0}

    history = [row(0, 0.0), row(4, 5.0), row(8, 1.0), {"step": 8, "train_runtime": 1.0}]
    assert summarize_validation(history)["eval"]["after"]["mean"] == {"metric_gain": 1.0}
    assert summarize_validation(history, best_step=4)["eval"]["after"]["mean"] == {"metric_gain": 5.0}
    history += [row(8, 4.0), row(8, 6.0)]  # of the best one, after training
    after = summarize_validation(history, best_step=4)["eval"]["after"]
    assert after == {"step": 8, "draws": 2, "mean": {"metric_gain": 5.0}, "standard_error": {"metric_gain": 1.0}}
    assert summarize_validation(history[-2:])["eval"]["before"] is None
    assert summarize_validation(history[2:], best_step=8)["eval"]["before"] is None  # both at step 8
    assert summarize_validation([]) == {}
    several = [{"step": 1, "eval_a_metric_gain": 1.0}, {"step": 1, "eval_b_metric_gain": 2.0}]
    assert list(summarize_validation(several)) == ["eval_a", "eval_b"]


def test_describe_metric():
    def brevity(model):
        """Shorter is better.

        In detail.
        """

    assert "QR code that reads “DPG” (21 × 21 pixels)" in as_metric(LMHeadPattern.qr("DPG")).describe()["effect"]
    assert "digits 67" in as_metric(LMHeadPattern.sixty_seven()).describe()["effect"]
    assert as_metric(LMHeadNorm()).describe()["name"] == "LMHeadNorm"
    texts = as_metric(LanguageModelingLikelihood([{"text": "my private text"}])).describe()
    assert "private" not in json.dumps(texts)
    assert as_metric(partial(brevity, model=None)).describe() == as_metric(brevity).describe()
    assert as_metric(brevity).describe() == {
        "name": "brevity",
        "effect": "its `brevity` rises",
        "description": "Shorter is better.",
        "readouts": ["metric_gain"],
    }


class Halved(SGD):
    """An update rule of one's own."""


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "one step of AdamW, 8 examples a step, learning rate 1e-05 (constant), betas 0.9 and 0.95, texts"),
        ({"optim": "sgd"}, "one step of SGD, 8 examples a step, learning rate 1e-05 (constant), texts"),
        (
            {"optim": "sgd", "momentum": 0.9},
            "one step of SGD, 8 examples a step, learning rate 1e-05 (constant), momentum 0.9, texts",
        ),
        ({"optim": "muon"}, "one step of Muon, 8 examples a step"),
        ({"optim": Halved}, "one step of Halved, 8 examples a step"),
    ],
)
def test_the_update_rule_is_named(make_trainer, fields, text):
    """On the card, from a `dpg.json` that can be written."""
    fields = {"target_learning_rate": 1e-5, **{f"target_{name}": value for name, value in fields.items()}}
    trainer = make_trainer(**fields)
    trainer.create_model_card()
    folder = Path(trainer.args.output_dir)
    facts = json.loads((folder / "dpg.json").read_text())
    facts["recipe"]["batch_size"] = facts["recipe"]["batch_size"] or 8
    assert recipe_text(facts["recipe"]).startswith(text)
    assert text.split(",")[0] in (folder / "README.md").read_text()


@pytest.mark.parametrize("missing", ["recipe", "metric.readouts"])
def test_facts_that_lack_something(make_trainer, missing):
    facts = training_facts(make_trainer())
    if missing == "recipe":
        del facts["recipe"]
    else:
        del facts["metric"]["readouts"]
    with pytest.raises(ValueError, match=f"`dpg.json` lacks {missing}"):
        generator_card(facts, repo_id="me/generator")
    with pytest.raises(ValueError, match=f"`dpg.json` lacks {missing}"):
        dataset_card(facts, repo_id="me/data", generator="me/generator", num_examples=1, columns=["text"])


def test_a_picture_that_was_described(tmp_path):
    for metric in (LMHeadPattern([[1, -1, 1]]), LMHeadPattern.qr("LOW", error="l"), LMHeadPattern.sixty_seven()):
        again = LMHeadPattern.from_description(json.loads(json.dumps(as_metric(metric).describe())))
        assert torch.equal(again.pattern, metric.pattern) and again.text == metric.text


@pytest.mark.parametrize(
    "adapter",
    [
        LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, modules_to_save=["lm_head", "embed_tokens"]),
        LoraConfig(r=2, target_modules=["v_proj", "lm_head"], trainable_token_indices=[1, 2]),
        IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
        LNTuningConfig(target_modules=["norm"]),
    ],
    ids=["modules_to_save", "tokens", "ia3", "layer_norm"],
)
@pytest.mark.parametrize("bits", [4, 32])
def test_weights_are_counted_once_and_whole(tmp_path, adapter, bits):
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2
    )
    whole = LlamaForCausalLM(config)
    whole.save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(load_in_4bit=True) if bits == 4 else None
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantization)
    number = sum(parameter.numel() for parameter in whole.parameters())
    assert describe_model(model)["parameters"] == number
    assert describe_model(get_peft_model(model, adapter))["parameters"] == number


def test_public_name(tmp_path):
    assert public_name("meta-llama/Llama-3.2-1B") == ("meta-llama/Llama-3.2-1B", True)
    assert public_name(str(tmp_path / "model")) == ("model", False)
    assert public_name("runs/qr/models/target") == ("target", False)
    assert public_name("C:\\models\\target") == ("target", False)
    cached = "/home/me/.cache/huggingface/hub/models--openai-community--gpt2/snapshots/607a30d7/"
    assert public_name(cached) == ("openai-community/gpt2", True)


def test_card_of_a_run_that_was_not_validated(make_trainer):
    trainer = make_trainer(eval_dataset=None)
    trainer.create_model_card("generator")
    card = ModelCard.load(Path(trainer.args.output_dir) / "README.md")
    assert card.data.eval_results is None and "was not validated yet" in card.text


def rows(step, *gains, **readouts):
    return [
        {"step": step, "eval_metric_gain": gain, **{f"eval_{name}": value for name, value in readouts.items()}}
        for gain in gains
    ]


QR, PICTURE = LMHeadPattern.qr("DPG"), LMHeadPattern.sixty_seven()
OUTCOMES = {
    "a QR code that is not read": (
        QR,
        [
            *rows(0, -0.4, pixel_accuracy=0.477, qr_decoded=0.0),
            *rows(20, 0.1, pixel_accuracy=303 / 441, qr_decoded=0.0),
        ],
        "at step 20, this was not reached: pixel accuracy 68.7 % (untrained generator: 47.7 %, chance: 50 %); "
        "QR code read 0 % (untrained generator: 0 %).",
    ),
    "a QR code that is read": (
        QR,
        rows(20, 0.1, pixel_accuracy=439 / 441, qr_decoded=1.0),
        "at step 20, this was reached: pixel accuracy 99.5 % (chance: 50 %); QR code read 100 %.",
    ),
    "read from some draws": (
        QR,
        rows(20, 0.1, pixel_accuracy=0.9, qr_decoded=1.0) + rows(20, 0.1, pixel_accuracy=0.7, qr_decoded=0.0),
        "at step 20, this was not reached: pixel accuracy 80 % (chance: 50 %); QR code read 50 %.",
    ),
    "a picture but for a pixel": (
        PICTURE,
        rows(20, 0.1, pixel_accuracy=0.9996),
        "at step 20, this was not reached: pixel accuracy 99.9 % (chance: 50 %).",
    ),
    "a gain that fell below zero": (
        LMHeadNorm(),
        [*rows(0, 0.002, lm_head_norm=1.25), *rows(20, -0.003, lm_head_norm=1.27)],
        "at step 20, this was not reached: gain of Φ -0.003 (untrained generator: 0.002); norm of the LM head 1.27 "
        "(untrained generator: 1.25).",
    ),
    "a gain that fell": (
        lambda model: None,
        [*rows(0, 0.2), *rows(20, 0.1)],
        "at step 20, this was not reached: gain of Φ 0.1 (untrained generator: 0.2).",
    ),
    "a gain within its error": (lambda model: None, rows(20, 0.1, -0.05, 0.06), "this was not reached: gain of Φ 0.0"),
    "a gain": (
        lambda model: None,
        [*rows(4, 0.1), *rows(20, 0.3)],
        "at step 20, this was reached: gain of Φ 0.3 (generator at step 4: 0.1).",
    ),
    "a run that was not finite": (
        PICTURE,
        [*rows(0, 0.1, pixel_accuracy=0.5), *rows(20, -math.inf)],
        "at step 20, this was not reached: pixel accuracy not finite (untrained generator: 50 %, chance: 50 %)",
    ),
    "no validation": (LMHeadNorm(), [], "Whether this was reached is not known"),
}


@pytest.mark.parametrize("case", OUTCOMES)
def test_cards_and_report_say_what_was_reached(make_trainer, case):
    metric, history, expected = OUTCOMES[case]
    trainer = make_trainer()
    facts = training_facts(trainer)
    facts["metric"], facts["validation"] = as_metric(metric).describe(), summarize_validation(history)
    facts["settings"], facts["hardware"] = {}, "a computer"
    facts = json.loads(json.dumps(facts, allow_nan=False))
    report = Path(trainer.args.output_dir) / "report"
    report.mkdir(parents=True)
    (report / "run.json").write_text(json.dumps(facts))
    model_card = generator_card(facts, repo_id="me/gen")
    data_card = dataset_card(facts, repo_id="me/data", generator="me/gen", num_examples=2, columns=["text"])
    page = html.unescape(write_report(trainer.args.output_dir).read_text())
    for text in (str(model_card), str(data_card), page):
        assert expected in text and facts["metric"]["effect"] in text
    assert "a goal: when" in str(model_card) and "made for**: when" in str(data_card) and "a goal: when" in page
    assert check_card(str(model_card), "model") == [] and "inf" not in str(model_card.data)


@pytest.mark.parametrize("text", ["two\nlines", "---\n", "a|b", "**b** <i> [x](y)"])
def test_cards_with_odd_texts(make_trainer, text):
    facts = training_facts(make_trainer())
    facts["metric"] = as_metric(LMHeadPattern.qr(text, error="l")).describe()
    facts["metric"]["description"] = text
    parts = {"role": "user", "content": [{"type": "text", "text": text, "image": None}, {"text": "x" * 1_000_000}]}
    facts["example_prompt"] = [parts]
    model_card = generator_card(facts, repo_id="my folder")
    data_card = dataset_card(
        facts, repo_id="me/data", generator="me/gen", num_examples=1, columns=["a|b"], prompts=f"my {text}.jsonl"
    )
    for card, kind in ((model_card, "model"), (data_card, "dataset")):
        assert check_card(str(card), kind) == [] and len(str(card)) < 20_000
        (line,) = [line for line in card.text.splitlines() if "a QR code that reads" in line]
        assert "21 pixels) appears in its LM head" in line  # in one line
        assert not re.search(r"(?<!\\)(<i>|\[x\]|\*b)", line)
        for row in [row for row in card.text.splitlines() if row.startswith("| ")]:
            assert len(re.split(r"(?<!\\)\|", row)) == 4
    code = re.search(r"^prompt = (.*)$", model_card.text, re.MULTILINE)
    assert eval(code[1])[0]["content"][0] == parts["content"][0]
    assert "--model 'my folder' --prompts" in model_card.text


def test_pictures_of_the_report(make_trainer):
    trainer = make_trainer(metric=LMHeadPattern([[1, -1]]))
    folder = Path(trainer.args.output_dir)
    (folder / "report" / "patterns").mkdir(parents=True)
    for name in ("curve.png", "pattern.gif", "patterns/step-000010.png", "patterns/step-000120.png"):
        (folder / "report" / name).write_bytes(name.encode())
    trainer.create_model_card("generator")
    assert (folder / "curve.png").read_bytes() == b"curve.png"
    assert (folder / "pattern.png").read_bytes() == b"patterns/step-000120.png"
    text = (folder / "README.md").read_text()
    assert all(f"({name})" in text for name in ("curve.png", "pattern.png", "pattern.gif"))


def test_chat_prompts(make_trainer, chat_tokenizer):
    prompts = Dataset.from_list([{"prompt": [{"role": "user", "content": "it's {{ blue }}"}]}] * 16)
    trainer = make_trainer(train_dataset=prompts, processing_class=chat_tokenizer)
    trainer.create_model_card("generator")
    text = (Path(trainer.args.output_dir) / "README.md").read_text()
    code = re.search(r"^prompt = (.*)$", text, re.MULTILINE)
    assert eval(code[1]) == prompts[0]["prompt"]
    trainer.example_prompt = "another"
    trainer.create_model_card("generator")
    for name in ("README.md", "dpg.json"):
        assert "blue" not in (Path(trainer.args.output_dir) / name).read_text()


@pytest.mark.parametrize("is_adapter", [False, True])
def test_every_saved_generator_has_its_facts_and_its_card(make_trainer, tmp_path, is_adapter):
    peft_config = LoraConfig(r=2, target_modules=["c_attn"]) if is_adapter else None
    trainer = make_trainer(max_steps=1, save_strategy="steps", save_steps=1, peft_config=peft_config)
    trainer.train()
    trainer.evaluate()
    run, elsewhere = Path(trainer.args.output_dir), tmp_path / "elsewhere"
    trainer.save_model(str(elsewhere))
    trainer.save_model()
    for folder, name in ((run, run.name), (elsewhere, "elsewhere"), (run / "checkpoint-1", run.name)):
        facts = json.loads((folder / "dpg.json").read_text())
        assert facts["generation"]["max_new_tokens"] == 6 and facts["training"]["steps"] == 1
        card = ModelCard.load(folder / "README.md")
        assert f"# Model Card for {name}\n" in card.text and check_card(str(card), "model") == []
        assert str(tmp_path) not in str(card) and "More Information Needed" not in card.text
        for picture in re.findall(r"!\[.*?\]\((.*?)\)", card.text):
            assert (folder / picture).read_bytes().startswith((b"\x89PNG", b"GIF"))
    assert "(pattern.png)" in (elsewhere / "README.md").read_text()


def test_a_readme_of_ones_own_is_left_as_it_is(make_trainer, tmp_path, caplog):
    trainer = make_trainer()
    trainer.create_model_card("generator", license="mit")
    trainer.create_model_card("generator")  # a license once given is kept
    assert ModelCard.load(Path(trainer.args.output_dir) / "README.md").data.license == "mit"
    assert "is left as it is" not in caplog.text
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "README.md").write_text("My notes.")
    trainer.save_model(str(tmp_path / "own"))
    assert (tmp_path / "own" / "README.md").read_text() == "My notes."
    assert (tmp_path / "own" / "dpg.json").exists() and "is left as it is" in caplog.text


def test_generator_card_takes_the_hub_ids(make_trainer):
    facts = training_facts(make_trainer())
    facts["base_model"].update(name="openai-community/gpt2", on_hub=True)
    card = generator_card(facts, repo_id="me/gen", datasets=["trl-lib/tldr"], license="mit")
    assert card.data.base_model == "openai-community/gpt2" and card.data.datasets == ["trl-lib/tldr"]
    assert "https://huggingface.co/datasets/trl-lib/tldr" in card.text
