"""
Trials of vLLM, each in a process of its own: prints what it found as JSON in the last line.

    python tests/vllm/worker.py training FOLDER
"""

import json
import os
import sys
from functools import partial
from pathlib import Path


os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import torch
import trl.generation.vllm_generation as generation
import vllm
import vllm._custom_ops
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from vllm import LLM

from trl_dpg import DatasetPolicyGradientConfig, DatasetPolicyGradientTrainer
from trl_dpg.metrics import LMHeadPattern
from trl_dpg.scripts.generate import main as generate
from trl_dpg.testing import tiny_causal_lm, tiny_prompts, tiny_tokenizer


# A CPU's own layout of weights cannot be written to, and vLLM would take bfloat16 for float32
vllm._custom_ops._supports_onednn = False
generation.LLM = partial(LLM, dtype="float32", enforce_eager=True)

TOKENIZER = tiny_tokenizer()
PROMPTS = tiny_prompts(16, 4)


def save_generator(folder: Path, kind: str) -> str:
    """Saves a tiny generator with heads as wide as vLLM's kernels want them."""
    if kind == "gpt2":
        model = tiny_causal_lm(tie_word_embeddings=True)
    else:
        torch.manual_seed(0)
        ids = {"bos_token_id": None, "eos_token_id": TOKENIZER.eos_token_id, "pad_token_id": TOKENIZER.pad_token_id}
        sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 128}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=64, **sizes, **ids))
    model.save_pretrained(folder / kind)
    TOKENIZER.save_pretrained(folder / kind)
    return str(folder / kind)


def make_trainer(folder: Path, kind: str = "llama", seed: int = 42, **config) -> DatasetPolicyGradientTrainer:
    """Makes a trainer with a colocated engine."""
    settings = {"max_steps": 3, "per_device_train_batch_size": 16, "num_generations": 4, "max_completion_length": 8}
    settings |= {"gradient_checkpointing": False, "bf16": False, "use_cpu": True, "report_to": "none"}
    settings |= {"logging_steps": 1, "save_strategy": "no", "learning_rate": 3e-3, "use_vllm": True, **config}
    args = DatasetPolicyGradientConfig(str(folder / "run"), seed=seed, **settings)
    return DatasetPolicyGradientTrainer(
        model=save_generator(folder, kind),
        target_model=tiny_causal_lm(seed=1),
        metric=LMHeadPattern([[1, -1], [-1, 1]]),
        args=args,
        train_dataset=PROMPTS["train"],
        eval_dataset=PROMPTS["test"],
        processing_class=TOKENIZER,
        target_processing_class=TOKENIZER,
    )


@torch.no_grad()
def greedy(model, prompts: list[list[int]]) -> list[list[int]]:
    """Transformers' completions, one prompt at a time."""
    texts = []
    for ids in prompts:
        whole = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=8)
        texts.append(whole[0, len(ids) :].tolist())
    return texts


def training(folder: Path, kind: str) -> dict:
    """Greedy completions before and after training, by vLLM and by Transformers."""
    trainer = make_trainer(folder, kind, generation_kwargs={"temperature": 0.0})
    ids = TOKENIZER(PROMPTS["train"]["prompt"][:8])["input_ids"]
    found: dict = {"vllm": [], "transformers": []}
    for _ in range(2):
        found["transformers"].append(greedy(trainer.model, ids))
        found["vllm"].append([list(c) for c in trainer._generate_single_turn(ids, None, {}, 1)[0]])
        trainer.vllm_generation.generation_kwargs = {}  # training samples
        trainer.train()
        trainer.vllm_generation.generation_kwargs = {"temperature": 0.0}
    return found


def seeds(folder: Path, seed: str) -> dict:
    """The first batch's completions."""
    trainer = make_trainer(folder, seed=int(seed))
    ids = TOKENIZER([PROMPTS["train"]["prompt"][0]] * 16)["input_ids"]
    return {"completions": [list(c) for c in trainer._generate_single_turn(ids, None, {}, 16)[0]]}


def best(folder: Path) -> dict:
    """What is generated after the best checkpoint was loaded, by vLLM and by Transformers."""
    saving = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    kwargs = {"load_best_model_at_end": True, "metric_for_best_model": "eval_metric", "greater_is_better": False}
    trainer = make_trainer(folder, **saving, **kwargs, learning_rate=0.1)
    values = iter([1.0, 2.0, 3.0])  # the first is the best
    trainer._validate = lambda examples: {"metric": next(values, 0.0)}
    trainer.train()
    ids = TOKENIZER(PROMPTS["train"]["prompt"][:8])["input_ids"]
    trainer.vllm_generation.generation_kwargs = {"temperature": 0.0}
    return {
        "best": Path(trainer.state.best_model_checkpoint).name,
        "transformers": greedy(trainer.model, ids),
        "vllm": [list(c) for c in trainer._generate_single_turn(ids, None, {}, 1)[0]],
    }


def of_command(folder: Path) -> dict:
    """Texts of `trl-dpg generate --use_vllm`; those of an adapter also by Transformers, greedily."""
    vllm.LLM = partial(LLM, enforce_eager=True)
    prompts = [*PROMPTS["train"]["prompt"][:15], ""]
    Dataset.from_dict({"prompt": prompts}).to_json(folder / "prompts.jsonl")
    generator = save_generator(folder, "llama")
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(generator),
        LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"]),
    )
    adapted.save_pretrained(folder / "adapter")
    TOKENIZER.save_pretrained(folder / "adapter")
    never = {"suppress_tokens": list(range(10)), "bad_words_ids": [[10], [11]]}
    found = {}
    for name, settings in {"llama": {"do_sample": True, **never}, "adapter": {"do_sample": False}}.items():
        facts = {"generation": {"max_new_tokens": 8, "temperature": 1.0, "top_k": 0, **settings}}
        (folder / name / "dpg.json").write_text(json.dumps(facts))
        for how in ["vllm", "transformers"]:
            argv = ["--model", str(folder / name), "--prompts", str(folder / "prompts.jsonl"), "--num_examples", "64"]
            argv += ["--output", str(folder / f"{name}_{how}.jsonl"), *(["--use_vllm"] if how == "vllm" else [])]
            assert generate(argv) == 0
            rows = (folder / f"{name}_{how}.jsonl").read_text().splitlines()
            found[f"{name}_{how}"] = [json.loads(row)["text"] for row in rows]
    return found


TRIALS = {"training": training, "seeds": seeds, "best": best, "command": of_command}

if __name__ == "__main__":
    print(json.dumps(TRIALS[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])))
