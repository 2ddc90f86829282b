"""
Checks from files alone what a trained generator's text does: writes a data set with the generator, fine-tunes the target on
it with TRL's stock `SFTTrainer`, and reads the picture back from the two checkpoints.

    python examples/verify.py --generator runs/tiny_qr --target runs/tiny_qr/models/words-100-seed-0/target

Nothing of the training run is used but its checkpoint: no reward, no metagradient. The picture, and the length of texts, are those
of the checkpoint's `dpg.json` unless a flag says otherwise. Every call writes a new data set. Written to `--output_dir`:
`samples.jsonl` (the data set), `marked` (the fine-tuned target), `decoded.png` and `verification.json`.
"""

from trl_dpg.quiet import for_a_command  # isort: skip (before the imports that warn)

import argparse
import copy
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from resources import ONE_SPECIAL_TOKEN, tiny_prompts
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, set_seed
from trl import SFTConfig, SFTTrainer

from trl_dpg import untie_lm_head
from trl_dpg.metrics import LMHeadPattern, decode_pattern
from trl_dpg.publishing import read_facts
from trl_dpg.reporting.plotting import plot_pattern


@torch.no_grad()
def generate(generator_path: str, prompts: list[str], max_new_tokens: int, batch_size: int) -> list[str]:
    """One completion of each prompt, sampled at temperature 1."""
    model = AutoModelForCausalLM.from_pretrained(generator_path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(generator_path, padding_side="left")
    texts = []
    for start in range(0, len(prompts), batch_size):
        inputs = tokenizer(prompts[start : start + batch_size], return_tensors="pt", padding=True)
        tokens = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=True,
            temperature=1.0,
            top_k=0,
        )
        texts += tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def fine_tune(target, tokenizer, texts: list[str], learning_rate: float, batch_size: int, seed: int):
    """A copy of the target after one pass of TRL's `SFTTrainer`, which adds EOS to every text."""
    trained = copy.deepcopy(target)
    with tempfile.TemporaryDirectory() as directory:
        config = SFTConfig(
            directory,
            learning_rate=learning_rate,
            lr_scheduler_type="constant",
            per_device_train_batch_size=batch_size,
            num_train_epochs=1,
            bf16=False,
            report_to="none",
            save_strategy="no",
            seed=seed,
            disable_tqdm=True,
            dataloader_pin_memory=torch.accelerator.is_available(),
        )
        dataset = Dataset.from_dict({"text": texts})
        trainer = SFTTrainer(model=trained, args=config, train_dataset=dataset, processing_class=tokenizer)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    result = copy.deepcopy(target)  # the trainer replaces its model's `forward`
    result.load_state_dict(trained.cpu().state_dict())
    return result


def wanted_pattern(pattern: str | None, qr_text: str | None, described: dict[str, Any]) -> LMHeadPattern:
    """The picture that was asked for, or else that of `dpg.json`."""
    if pattern == "67":
        return LMHeadPattern.sixty_seven()
    if described.get("pattern") is not None and (pattern is None or described["text"] is not None):
        if qr_text in (None, described["text"]):
            return LMHeadPattern.from_description(described)
    return LMHeadPattern.qr(qr_text or "TRL-DPG")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generator", required=True, help="Checkpoint of the trained generator.")
    parser.add_argument("--target", required=True, help="Checkpoint of the original target.")
    parser.add_argument("--output_dir", help="Defaults to `verification` in the generator's directory.")
    parser.add_argument("--pattern", choices=["qr", "67"], help="As in the generator's training by default.")
    parser.add_argument("--qr_text", help="As in the generator's training by default, or else TRL-DPG.")
    parser.add_argument(
        "--words", type=int, help="Words that prompts are made of. All that the target knows by default."
    )
    parser.add_argument("--num_examples", type=int, default=4096)
    parser.add_argument("--batch_size", type=int, default=512)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--max_new_tokens", type=int, help="As in the generator's training, or 24.")
    parser.add_argument("--seed", type=int, default=1234)
    options = parser.parse_args(argv)
    facts = read_facts(options.generator, "generator") or {}
    wanted = wanted_pattern(options.pattern, options.qr_text, facts.get("metric", {}))
    max_new_tokens = options.max_new_tokens or facts.get("generation", {}).get("max_new_tokens", 24)
    output_dir = Path(options.output_dir or Path(options.generator) / "verification")
    output_dir.mkdir(parents=True, exist_ok=True)

    set_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.target)
    words = options.words or len(tokenizer) - len(ONE_SPECIAL_TOKEN)
    prompts = tiny_prompts(1, options.num_examples, seed=options.seed, num_words=words)["test"]["prompt"]
    texts = generate(options.generator, prompts, max_new_tokens, options.batch_size)
    with open(output_dir / "samples.jsonl", "w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)

    model = AutoModelForCausalLM.from_pretrained(options.target, dtype=torch.float32)
    untie_lm_head(model)
    marked = fine_tune(model, tokenizer, texts, options.learning_rate, options.batch_size, options.seed)
    marked.save_pretrained(output_dir / "marked")
    tokenizer.save_pretrained(output_dir / "marked")

    found = decode_pattern(options.target, str(output_dir / "marked"), shape=tuple(wanted.pattern.shape))
    accuracy = (found.signs == wanted.pattern).double().mean().item()
    plot_pattern(found.signs, wanted.pattern, output_dir / "decoded.png", found.text)
    result = {
        "pixel_accuracy": accuracy,
        "text": found.text,
        "steps": math.ceil(len(texts) / options.batch_size),
        "examples": len(texts),
        "learning_rate": options.learning_rate,
        "seed": options.seed,
    }
    (output_dir / "verification.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    if wanted.text is not None and found.text != wanted.text:
        raise SystemExit(f"The QR code does not read {wanted.text!r}.")


if __name__ == "__main__":
    for_a_command()
    main()
