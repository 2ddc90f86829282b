"""
Writes what the tiny examples need, without a network: a random generator and a random target of a few thousand parameters, which
know a few dozen words, and prompts of three words.

    python examples/make_tiny.py --output_dir tiny
    trl-dpg train --config examples/configs/cli_qr.yaml

The directory then holds `generator`, `target`, `prompts.jsonl`, `held_out.jsonl` and `random.jsonl`: text of words drawn at random, to
compare with what a trained generator writes.
"""

import argparse
import json
import random
import shutil
from pathlib import Path

from resources import ONE_SPECIAL_TOKEN, WORDS, save_tiny_models, tiny_prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="tiny")
    parser.add_argument("--words", type=int, default=100, help="Words of the vocabulary.")
    parser.add_argument("--num_prompts", type=int, default=4096)
    parser.add_argument("--num_held_out", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0, help="Seed of the models.")
    options = parser.parse_args()
    output_dir = Path(options.output_dir)
    for path in save_tiny_models(output_dir, options.seed, options.words, ONE_SPECIAL_TOKEN):
        shutil.copytree(path, output_dir / Path(path).name, dirs_exist_ok=True)
    shutil.rmtree(output_dir / f"words-{options.words}-seed-{options.seed}")
    prompts = tiny_prompts(options.num_prompts, options.num_held_out, num_words=options.words)
    prompts["train"].to_json(output_dir / "prompts.jsonl")
    prompts["test"].to_json(output_dir / "held_out.jsonl")
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS[: options.words], k=24)) for _ in range(options.num_prompts)]
    (output_dir / "random.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    print(f"Written: {output_dir}")


if __name__ == "__main__":
    main()
