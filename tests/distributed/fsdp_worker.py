"""
Run by `torchrun` from `test_fsdp.py` and `test_deepspeed.py`: two steps of our trainer, the generator under FSDP2 or DeepSpeed if the
environment asks for it, the target whole or in shards.
"""

import json
import os
import sys

import accelerate.accelerator
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, set_seed
from torch.distributed.tensor import DTensor

from tests.distributed.worker import COMMON, deterministic_generation, record
from trl_dpg import DatasetPolicyGradientConfig, DatasetPolicyGradientTrainer
from trl_dpg.metrics import LMHeadPattern
from trl_dpg.testing import save_tiny_models, tiny_prompts


class CPUAcceleratorState(AcceleratorState):
    """Accelerate turns to FSDP where processes have accelerators only, although FSDP2 itself runs on CPUs too."""

    def __init__(self, *args, fsdp_plugin=None, **kwargs):
        super().__init__(*args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def main(directory, output, num_words=60, **fields):
    on_cpu = {"use_cpu": True}
    if "ACCELERATE_USE_DEEPSPEED" in os.environ:  # which Accelerate leaves out if it is asked for a CPU
        on_cpu = {"use_cpu": False, "ddp_backend": "gloo"}
    processes = int(os.environ["WORLD_SIZE"])
    args = DatasetPolicyGradientConfig(
        os.path.join(directory, "generator"),
        **{**COMMON, "gradient_checkpointing": True, **on_cpu},
        per_device_train_batch_size=12 // processes,
        per_device_eval_batch_size=8 // processes,
        eval_strategy="steps",
        eval_steps=2,
        eval_on_start=True,
        learning_rate=1e-2,
        adam_epsilon=1e-4,  # at 1e-8, Adam blows up the rounding of gradients near zero
        target_batch_size=5,
        target_learning_rate=1e-3,
        **fields,
    )
    state = args.distributed_state
    with state.main_process_first():
        generator, target = save_tiny_models(os.path.join(directory, "models"), num_words=num_words)
    prompts = tiny_prompts(12, 3)
    metric = LMHeadPattern.sixty_seven(scale="auto")
    trainer = DatasetPolicyGradientTrainer(generator, target, metric, args, prompts["train"], prompts["test"])
    deterministic_generation(trainer)
    rows = record(trainer)
    trainer.train()

    del trainer._generate_single_turn  # from here on, what the model itself generates
    set_seed(0, device_specific=True)
    validation = trainer.evaluate()
    trainer.save_model()

    target_params = list(trainer.target_training.target_model.parameters())
    results = {
        "rows": rows,
        "eval_mean_length": validation["eval_completions/mean_length"],
        "is_sharded": all(isinstance(param, DTensor) for param in trainer.model.parameters()),
        "target_is_whole": not any(isinstance(p, DTensor) or p.is_meta for p in target_params),
        "target_is_sharded": all(isinstance(p, DTensor) for p in target_params),
        "target_share": sum(p.to_local().numel() for p in target_params if isinstance(p, DTensor)),
        "target_size": sum(p.numel() for p in target_params),
        "distributed_type": str(trainer.accelerator.distributed_type.value),
    }
    if state.is_main_process:
        with open(output, "w") as file:
            json.dump(results, file)
    state.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    accelerate.accelerator.AcceleratorState = CPUAcceleratorState
    main(*sys.argv[1:3], **json.loads(sys.argv[3]))
