"""The target is loaded whole, whatever the generator is sharded with."""

import os

import pytest
import torch
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_enabled
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from trl_dpg.metagradients import TargetTrainingArguments, compute_metagradients
from trl_dpg.target import load_target_model, load_target_tokenizer, shard_target_model, whole_weights
from trl_dpg.testing import tiny_causal_lm, tiny_tokenizer
from trl_dpg.validation import validate


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint without the LM head that its configuration asks for, which `from_pretrained` then makes up."""
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return str(tmp_path)


def load(load_model, checkpoint):
    torch.manual_seed(0)
    return {name: tensor.detach() for name, tensor in load_model(checkpoint, dtype=torch.float32).named_parameters()}


@pytest.fixture
def second_process_under_fsdp(monkeypatch):
    """What Transformers looks at to tell that it loads a model for FSDP, on a process that is not a machine's first."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert is_fsdp_enabled()
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def under_zero3():
    config = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    set_hf_deepspeed_config(config)
    assert is_deepspeed_zero3_enabled()
    yield
    unset_hf_deepspeed_config()


def test_whole_under_fsdp(checkpoint, request):
    expected = load(AutoModelForCausalLM.from_pretrained, checkpoint)
    request.getfixturevalue("second_process_under_fsdp")

    empty = load(AutoModelForCausalLM.from_pretrained, checkpoint)
    assert any(tensor.is_meta or not tensor.equal(expected[name]) for name, tensor in empty.items())

    target = load(load_target_model, checkpoint)
    assert target.keys() == expected.keys()
    assert all(tensor.equal(expected[name]) for name, tensor in target.items())
    assert is_fsdp_enabled()  # again, for the generator


def test_whole_under_zero3(checkpoint, request):
    """Loading for ZeRO-3 needs DeepSpeed, which is not installed here: that it does not ask for it shows that it is off."""
    expected = load(AutoModelForCausalLM.from_pretrained, checkpoint)
    request.getfixturevalue("under_zero3")

    with pytest.raises(ModuleNotFoundError, match="deepspeed"):
        load(AutoModelForCausalLM.from_pretrained, checkpoint)

    target = load(load_target_model, checkpoint)
    assert all(tensor.equal(expected[name]) for name, tensor in target.items())
    adapted = load_target_model(checkpoint, peft_config=LoraConfig(r=2, target_modules="all-linear"))
    assert any("lora_A" in name for name, _ in adapted.named_parameters())
    assert is_deepspeed_zero3_enabled()


@pytest.mark.parametrize("before", [None, "true"])
def test_environment_is_restored_after_an_error(monkeypatch, before):
    name = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    monkeypatch.delenv(name, raising=False)
    if before is not None:
        monkeypatch.setenv(name, before)
    with pytest.raises(OSError, match="no/such/model"):
        load_target_model("no/such/model", local_files_only=True)
    assert os.environ.get(name) == before


def test_meta_weights_are_refused(checkpoint, second_process_under_fsdp):
    empty = AutoModelForCausalLM.from_pretrained(checkpoint).to("meta")
    with pytest.raises(ValueError, match="all of its weights, but .* is on the meta device"):
        load_target_model(empty)
    with whole_weights():
        model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert load_target_model(model) is model


def test_weights_that_are_split_otherwise_are_refused(checkpoint, second_process_under_fsdp):
    """By the engine, before it runs the model: replicated ones, and such as tensor parallelism makes."""
    mesh = init_device_mesh("cpu", (1,))
    for placements in ([Replicate()], [Shard(1)]):
        with whole_weights():
            model = AutoModelForCausalLM.from_pretrained(checkpoint)
        model.lm_head.weight = nn.Parameter(distribute_tensor(torch.zeros(32, 16), mesh, placements))
        for function in (compute_metagradients, validate):
            with pytest.raises(ValueError, match="'lm_head.weight' .* has the placements .* `fully_shard`"):
                function(model, EXAMPLES, lambda model: model.lm_head.weight.sum(), TargetTrainingArguments())


EXAMPLES = [{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5, 6, 7]}]


@pytest.mark.parametrize("curvature", ["exact", "central_difference"])
def test_a_fully_sharded_model_is_accepted(checkpoint, second_process_under_fsdp, curvature):
    """On one process, which then holds all shards, results are those of the whole model. Metrics see ordinary weights."""

    def metric(model):
        weight = model.lm_head.weight
        return -(weight * torch.ones(weight.shape)).norm() - model(torch.tensor([[1, 2]])).logits.norm() / len(weight)

    args = TargetTrainingArguments(batch_size=1, learning_rate=1e-3, curvature=curvature)
    with whole_weights():
        models = [AutoModelForCausalLM.from_pretrained(checkpoint) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    shard_target_model(models[1], init_device_mesh("cpu", (1,)))
    whole, split = (compute_metagradients(model, EXAMPLES, metric, args) for model in models)
    limit = 1e-5 if curvature == "exact" else 2 * max(whole.curvature_errors + split.curvature_errors)
    assert limit < 1e-2
    torch.testing.assert_close(split.metagradients, whole.metagradients, rtol=limit, atol=0)
    assert all(isinstance(param, DTensor) for param in models[1].parameters())
    assert models[1](torch.tensor([[1, 2]])).logits.equal(
        models[0](torch.tensor([[1, 2]])).logits
    )  # FSDP's hooks are back


def test_quantized_weights_are_not_sharded(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    model.lm_head.weight = nn.Parameter(torch.zeros(32, 16, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="`target_fsdp=True` .* quantized .*'lm_head.weight'"):
        shard_target_model(model, None)


def test_partitioned_weights_are_refused(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    model.lm_head.weight.ds_id = 0  # DeepSpeed's mark
    with pytest.raises(ValueError, match="'lm_head.weight' is partitioned by ZeRO-3"):
        load_target_model(model)


IDS = torch.tensor([[3, 5, 8, 4]])
LORA = LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM")


@pytest.fixture
def adapter(tmp_path):
    """A directory with a trained adapter of a model in another one, and what the two compute."""
    tiny_causal_lm(hidden_size=16, num_layers=1, num_heads=2).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), LORA).eval()
    for name, param in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(param)
    model.save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter"), model(IDS).logits


@pytest.mark.parametrize("untie_head", [False, True])
def test_a_trained_adapter_is_what_is_trained(adapter, untie_head):
    """It is neither dropped nor frozen, the model under it is as it was, and the tokenizer is that model's."""
    directory, logits = adapter
    target = load_target_model(directory, untie_head)
    assert torch.equal(target.eval()(IDS).logits, logits)
    trained = [name for name, param in target.named_parameters() if param.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    out = compute_metagradients(target, [{"input_ids": [3, 5, 8]}], lambda model: -model(IDS, labels=IDS).loss)
    assert out.metagradients.any()
    assert load_target_tokenizer(directory).get_vocab() == tiny_tokenizer().get_vocab()


def test_an_adapter_on_an_adapter_is_refused(adapter):
    """The new one would take the other's place: from a directory, in a PEFT model, and as Transformers loads it."""
    directory, _ = adapter
    base = AutoModelForCausalLM.from_pretrained(directory[: -len("adapter")] + "base")
    models = [directory, PeftModel.from_pretrained(base, directory), AutoModelForCausalLM.from_pretrained(directory)]
    for model in models:
        with pytest.raises(ValueError, match="(?s)`target_model`.*adapter.*Leave `target_peft_config` out"):
            load_target_model(model, peft_config=LORA)


def test_an_adapter_beside_a_model_is_refused(adapter):
    directory, _ = adapter
    tiny_causal_lm(hidden_size=16, num_layers=1, num_heads=2).save_pretrained(directory)
    with pytest.raises(ValueError, match="holds a model .* and an adapter .* Keep them in two directories"):
        load_target_model(directory)


def test_a_frozen_adapter_is_refused_with_its_remedy(adapter):
    base = AutoModelForCausalLM.from_pretrained(adapter[0])
    with pytest.raises(ValueError, match="no trainable parameter.*`is_trainable=True`"):
        compute_metagradients(base, [{"input_ids": [3, 5, 8]}], lambda model: -model(IDS, labels=IDS).loss)
