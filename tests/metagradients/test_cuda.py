"""On a GPU, without which all of this is skipped: results as on the CPU, the kernels of its own, memory."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from tests.metagradients.cases import CASES, PROBE, make_examples, relative_error
from trl_dpg.metagradients import TargetTrainingArguments, compute_metagradients
from trl_dpg.metagradients.check import check_metagradients
from trl_dpg.metagradients.kernels import switched
from trl_dpg.metagradients.method.updates import optimizer
from trl_dpg.metagradients.runtime.storage import HostStorage
from trl_dpg.metrics import LMHeadNorm, LMHeadPattern


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CURVATURES = ["exact", "central_difference"]
PLACES = ["device", "host", "disk"]
ADAMW = {"learning_rate": 1e-3, "adam_epsilon_root": "auto"}


def metric(model):
    probe = PROBE.to(model.device)
    logits = model(input_ids=probe).logits[:, :-1].double()
    return -(F.cross_entropy(logits.flatten(0, 1), probe[:, 1:].flatten()) ** 2)


def llama(dtype=torch.float32, num_layers=2, **kwargs):
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=num_layers, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, bos_token_id=0, eos_token_id=0, **kwargs,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(dtype)


def random_examples(num_examples, length, vocab_size=256):
    generator = torch.Generator().manual_seed(1)
    return [
        {"input_ids": torch.randint(vocab_size, (length,), generator=generator).tolist()} for _ in range(num_examples)
    ]


@pytest.mark.parametrize("tape", PLACES)
@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize(
    "name", ["adamw-k9", "sgd-k4", "tied-adamw-k4", "clipping-adamw", "micro-batches", "lora-adamw"]
)
def test_as_on_the_cpu(name, curvature, tape):
    make_model, fields = CASES[name]
    model, examples = make_model(), make_examples()
    expected = compute_metagradients(model, examples, metric, TargetTrainingArguments(**fields))
    args = TargetTrainingArguments(**fields, curvature=curvature, tape=tape)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    out = compute_metagradients(model.cuda(), examples, metric, args)
    assert relative_error(out.metagradients, expected.metagradients.double()) < 1e-6
    assert out.num_exact_fallbacks == 0 and out.metagradients.device.type == "cpu"
    assert out.plan is None or out.plan.tape == tape
    assert all(torch.equal(value.cpu(), weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("curvature", CURVATURES)
def test_float32_over_eight_steps(curvature):
    examples, fields = random_examples(64, 24), {**ADAMW, "batch_size": 8}
    expected = compute_metagradients(llama(torch.float64), examples, metric, TargetTrainingArguments(**fields))
    args = TargetTrainingArguments(**fields, curvature=curvature)
    out = compute_metagradients(llama().cuda(), examples, metric, args)
    assert out.num_exact_fallbacks == 0
    assert relative_error(out.metagradients, expected.metagradients.double()) < 1e-2


def test_central_differences_under_fused_attention_alone():
    args = TargetTrainingArguments(**ADAMW, batch_size=8, curvature="central_difference")
    examples, model = random_examples(16, 24), llama(attn_implementation="sdpa").cuda()
    expected = compute_metagradients(model, examples, metric, replace(args, curvature="exact"))
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        out = compute_metagradients(model, examples, metric, args)
    assert out.num_exact_fallbacks == 0
    assert relative_error(out.metagradients, expected.metagradients.double()) < 1e-2


WAYS = [(way, curvature) for way in ("compile", "gradient_checkpointing") for curvature in CURVATURES]


@pytest.mark.parametrize(("way", "curvature"), [*WAYS, ("bf16", "exact")])
def test_faster_or_smaller(way, curvature):
    examples, model = random_examples(16, 24), llama(num_layers=1).cuda()  # to compile more takes minutes
    args = TargetTrainingArguments(**ADAMW, batch_size=8, curvature=curvature)
    expected = compute_metagradients(model, examples, metric, replace(args, curvature="exact"))
    if way == "compile":
        model.compile(dynamic=True)
    else:
        args = replace(args, **{way: True})
    out = compute_metagradients(model, examples, metric, args)
    cosine = F.cosine_similarity(out.metagradients, expected.metagradients, dim=0).item()
    assert cosine > (0.98 if way == "bf16" else 0.9999)


QUANTIZED = {
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
    "nf4-bf16": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16, bnb_4bit_use_double_quant=True
    ),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}  # fmt: skip


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("name", QUANTIZED)
def test_adapters_on_a_quantized_model(name, curvature, tmp_path):
    llama().save_pretrained(tmp_path)

    def load():
        return AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=QUANTIZED[name], dtype=torch.float32, device_map={"": 0}
        )

    def with_adapters(model):
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
        generator = torch.Generator().manual_seed(1)
        for name, param in model.named_parameters():
            if "lora_" in name:
                param.data = (torch.randn(param.shape, generator=generator) * 0.1).to("cuda", torch.float32)
        return model

    examples, args = random_examples(16, 24), TargetTrainingArguments(**ADAMW, batch_size=8)
    expected = compute_metagradients(with_adapters(load().dequantize().float()), examples, metric, args)
    out = compute_metagradients(with_adapters(load()), examples, metric, replace(args, curvature=curvature))
    cosine = F.cosine_similarity(out.metagradients, expected.metagradients, dim=0).item()
    assert cosine > (0.9999 if name == "nf4" else 0.98)


@pytest.mark.parametrize("curvature", CURVATURES)
def test_logits_in_chunks(curvature):
    examples, args = random_examples(16, 24), TargetTrainingArguments(**ADAMW, batch_size=8, curvature=curvature)
    model = llama(torch.float64)
    expected = compute_metagradients(model, examples, metric, args)
    with switched(logits_at_once=0, chunk=5 * 256):
        out = compute_metagradients(model.cuda(), examples, metric, args)
    assert relative_error(out.metagradients, expected.metagradients.double()) < 1e-5


@pytest.mark.parametrize("curvature", CURVATURES)
def test_slow_copies_change_nothing(curvature, monkeypatch):
    """What is copied is not written to before, nor read from too early."""
    make_model, fields = CASES["adamw-k9"]
    args = TargetTrainingArguments(**fields, curvature=curvature, tape="device")
    model = make_model().cuda()
    expected = compute_metagradients(model, make_examples(), metric, args)

    def slowly(method):
        def wrapped(self, *arguments):
            with torch.cuda.stream(self.side):
                torch.cuda._sleep(10_000_000)
            return method(self, *arguments)

        return wrapped

    for name in ("put", "_fetch"):
        monkeypatch.setattr(HostStorage, name, slowly(getattr(HostStorage, name)))
    out = compute_metagradients(model, make_examples(), metric, replace(args, tape="host"))
    assert relative_error(out.metagradients, expected.metagradients.double()) < 1e-6


def wide_model(vocab_size=4096, width=512, num_layers=4):
    config = GPT2Config(
        vocab_size=vocab_size, n_positions=128, n_embd=width, n_layer=num_layers, n_head=8, bos_token_id=0, eos_token_id=0
    )  # fmt: skip
    torch.manual_seed(0)
    return GPT2LMHeadModel(config).cuda()


def peak_memory(model, num_steps, **fields):
    """Bytes of the device beyond the model; nothing is left there."""
    args = TargetTrainingArguments(**ADAMW, batch_size=4, **fields)
    examples = random_examples(4 * num_steps, 128, 4096)
    compute_metagradients(model, examples[:8], LMHeadNorm(), args)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    compute_metagradients(model, examples, LMHeadNorm(), args)
    assert torch.cuda.memory_allocated() == before
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("tape", PLACES[1:])
def test_memory_does_not_grow_with_steps(tape, curvature, monkeypatch):
    """Beside a few blocks, which are small here: with more steps, more of them are on their way at a time."""
    monkeypatch.setitem(optimizer.BLOCK, "cuda", 1 << 18)
    model = wide_model()
    few, many = (peak_memory(model, n, curvature=curvature, tape=tape) for n in (8, 24))
    assert many <= 1.02 * few


def test_the_tape_that_no_memory_is_left_for_goes_to_the_host():
    model, examples = wide_model(), random_examples(48, 32, 4096)
    args = TargetTrainingArguments(**ADAMW, batch_size=2)
    expected = compute_metagradients(model, examples, LMHeadNorm(), args)
    assert expected.plan.tape == "device"
    room = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    filling = torch.empty(room - 3 * expected.plan.tape_bytes // 2, dtype=torch.uint8, device="cuda")
    out = compute_metagradients(model, examples, LMHeadNorm(), args)
    del filling
    assert out.plan.tape == "host"
    torch.testing.assert_close(out.metagradients, expected.metagradients, rtol=1e-3, atol=1e-7)


def test_check():
    report = check_metagradients(
        llama(torch.float64).cuda(), random_examples(8, 12), metric, TargetTrainingArguments(**ADAMW, batch_size=4)
    )
    assert report.passed, str(report)


@pytest.mark.parametrize(
    "fields", [{}, {"target_curvature": "central_difference", "bf16": True}], ids=["float32", "bf16"]
)
def test_trainer(make_trainer, fields, weights):
    trainer = make_trainer(use_cpu=False, metric=LMHeadPattern([[1, -1], [-1, 1]]), **fields)
    assert trainer.accelerator.device.type == "cuda"
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert len(logged) == 2 and all(entry["reward_std"] > 0 for entry in logged)
