"""Run by `torchrun` from `test_sharded_target.py`: targets in shards beside whole ones, results written as JSON."""

import json
import sys

import accelerate.accelerator
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaConfig, LlamaForCausalLM

from tests.distributed.fsdp_worker import CPUAcceleratorState
from tests.distributed.worker import examples
from trl_dpg.metagradients import TargetTrainingArguments, check_metagradients, compute_metagradients
from trl_dpg.metrics import LanguageModelingLikelihood, LMHeadNorm, LMHeadPattern
from trl_dpg.target import shard_target_model
from trl_dpg.testing import tiny_causal_lm
from trl_dpg.validation import validate


RECIPES = {
    "AdamW, K = 1": {"batch_size": 11, "learning_rate": 1e-3, "weight_decay": 0.1},
    "SGD, K = 4": {"batch_size": 3, "learning_rate": 0.1, "optim": "sgd", "momentum": 0.9, "tape": "disk"},
    "AdamW, clipping, K = 4": {"batch_size": 3, "learning_rate": 1e-3, "max_grad_norm": 0.1, "micro_batch_size": 1},
}
METRIC = LMHeadPattern.sixty_seven(scale=100.0) + LanguageModelingLikelihood(examples(3)) + LMHeadNorm()


def gpt2(**kwargs):
    return tiny_causal_lm(hidden_size=12, num_layers=2, num_heads=2, seed=1, **kwargs)


def llama():
    """Of a vocabulary and sizes that no number of processes divides."""
    sizes = {"vocab_size": 67, "hidden_size": 12, "intermediate_size": 19, "num_hidden_layers": 2}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))


def lora():
    torch.manual_seed(0)
    adapters = LoraConfig(r=2, target_modules=["c_attn", "lm_head"], init_lora_weights=False, fan_in_fan_out=True)
    return get_peft_model(gpt2(), adapters)


MODELS = {"GPT-2": gpt2, "Llama": llama, "LoRA": lora}


def sharded(model, state):
    shard_target_model(model, init_device_mesh("cpu", (state.num_processes,)))
    return model


def recipe(**fields):
    return TargetTrainingArguments(**{"adam_epsilon_root": 1e-6, "learning_rate": 1e-3, **fields})


def run_twice(whole, split, args, state, shards=None):
    """Largest difference of rewards, relative to the largest of them, and what else the runs say of each other."""
    rows = examples(11)
    for i, row in enumerate(rows[:-2]):
        row["candidates"] = [[(token + i) % 60, -1] for token in row["input_ids"]]
    shards = shards or [p.to_local().clone() for p in split.parameters()]
    one = compute_metagradients(whole, rows, METRIC, args)
    two = compute_metagradients(split, rows, METRIC, args, accelerator=state)
    assert all(torch.equal(p.to_local(), before) for p, before in zip(split.parameters(), shards, strict=True))
    distance = lambda a, b: ((a - b).abs().max() / a.abs().max()).item()  # noqa: E731
    return {
        "rewards": distance(one.metagradients, two.metagradients),
        "tokens": distance(torch.cat(one.token_metagradients), torch.cat(two.token_metagradients)),
        "candidates": distance(*(torch.cat([c.flatten() for c in out.candidate_metagradients]) for out in (one, two))),
        "metric": abs(one.metric_after - two.metric_after),
        "gain": abs(one.metric_after - one.metric_before),
        "losses": max(abs(a - b) for a, b in zip(one.losses, two.losses, strict=True)),
        "errors": max([*one.curvature_errors, *two.curvature_errors], default=0.0),
    }


def engine(state, names=MODELS):
    results = {}
    for name in names:
        for label, fields in RECIPES.items():
            for curvature in ("exact", "central_difference"):
                # Rounding in float32 is larger than the limit (LoRA). Central differences know their own error.
                dtype = torch.float64 if curvature == "exact" else torch.float32
                whole, split = MODELS[name]().to(dtype), sharded(MODELS[name]().to(dtype), state)
                results[f"{name}, {label}, {curvature}"] = run_twice(
                    whole, split, recipe(**fields, curvature=curvature), state
                )
    return results


def few(state):
    """What the slow test has more of: one model, exactly; and one with checkpoints in its layers."""
    results = {"exact": run_twice(gpt2(), sharded(gpt2(), state), recipe(batch_size=4, max_grad_norm=0.1), state)}
    args = recipe(batch_size=11, gradient_checkpointing=True)
    return results | {"checkpointed": run_twice(llama(), sharded(llama(), state), args, state)}


def prepared_by_accelerate(state):
    """FSDP2 as Accelerate prepares it, which turns to it on accelerators only."""
    accelerate.accelerator.AcceleratorState = CPUAcceleratorState
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    accelerator, model = Accelerator(fsdp_plugin=plugin), gpt2()
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    ids, shards = torch.tensor([[1, 2, 3]]), [p.to_local().clone() for p in model.parameters()]
    before = model(ids).logits  # after which FSDP leaves the root's parameters whole
    results = {"exact": run_twice(gpt2(), model, recipe(batch_size=3), accelerator, shards)}
    assert torch.equal(model(ids).logits, before)  # its hooks are at work again
    return results


def others(state):
    """Validation, and the check of metagradients."""
    args, results = recipe(batch_size=3, learning_rate=0.01, max_grad_norm=1.0), {}
    results["validation"] = [validate(model, examples(11), METRIC, args) for model in (gpt2(), sharded(gpt2(), state))]
    # The directions of such a metric are zero in the parts of some processes.
    rows = lambda model: -model.lm_head.weight[:3].square().sum()  # noqa: E731
    results["three rows"] = [
        compute_metagradients(model, examples(8), rows, recipe(batch_size=4), accelerator=state).metagradients.tolist()
        for model in (gpt2(), sharded(gpt2(), state))
    ]
    few = {"num_probes": 1, "num_reweightings": 1, "accelerator": state}
    model, auto = sharded(gpt2().double(), state), recipe(batch_size=2, adam_epsilon_root="auto")
    checked = check_metagradients(model, examples(4), METRIC, auto, **few)
    return results | {"verdict": checked.verdict}


def failures(state):
    """On the last process only, in the middle of a model's call: an error, and memory that runs out with four examples."""
    reasons, rows, args = [], examples(16), recipe(batch_size=8)
    for error in (ArithmeticError("planted failure"), torch.OutOfMemoryError("planted shortage")):
        model = sharded(gpt2(), state)
        shards = [p.to_local().clone() for p in model.parameters()]

        def failing(module, inputs, error=error):
            if state.process_index == state.num_processes - 1 and len(inputs[0]) == 4:
                raise error

        model.transformer.h[1].register_forward_pre_hook(failing)
        try:
            out = compute_metagradients(model, rows, METRIC, args, accelerator=state)
            whole = compute_metagradients(gpt2(), rows, METRIC, args)
            torch.testing.assert_close(out.metagradients, whole.metagradients, rtol=1e-4, atol=1e-6)
            reasons.append(out.micro_batch_size)
        except (ArithmeticError, RuntimeError) as e:
            reasons.append(str(e))
        assert all(torch.equal(p.to_local(), before) for p, before in zip(model.parameters(), shards, strict=True))
    return reasons


def refused(state):
    model = sharded(gpt2(), state)
    adapted = get_peft_model(sharded(gpt2(), state), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    reasons = []
    for target, args, accelerator in (
        (model, recipe(optim="muon"), state),
        (model, recipe(), None),
        (adapted, recipe(), state),
    ):
        try:
            compute_metagradients(target, examples(4), LMHeadNorm(), args, accelerator=accelerator)
        except ValueError as error:
            reasons.append(str(error))
    return reasons


if __name__ == "__main__":
    *scenarios, output = sys.argv[1:]
    torch.set_num_threads(1)
    state = PartialState(cpu=True)
    results = {scenario: globals()[scenario](state) for scenario in scenarios}
    if state.is_main_process:
        with open(output, "w") as file:
            json.dump(results, file)
    state.destroy_process_group()
