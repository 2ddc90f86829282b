"""
Writes a data set with a trained generator.

    trl-dpg generate --model runs/qr --prompts prompts.jsonl --num_examples 4096 --output data.jsonl
"""

import json
import logging
import os
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import AutoPeftModelForCausalLM
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.utils import find_adapter_config_file
from trl import TrlParser

from ..hub import FACTS_FILE, local_facts, push_dataset
from .common import check_column, load_rows, run_script


logger = logging.getLogger(__name__)

# What vLLM calls by another name than Transformers
VLLM_NAMES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}


@dataclass
class GenerateArguments:
    """
    Arguments of `trl-dpg generate`.

    Parameters:
        model (`str`):
            Generator: a directory or an id on the Hub, of a full model or an adapter.
        prompts (`str`):
            Prompts, plain or conversational: a file or a data set's id with a column `prompt`. Use those of training, or such
            as are like them.
        output (`str`):
            File of JSON lines to write, with the columns `text` (what to fine-tune on) and `source_prompt`. If it is there
            already from a call with the same arguments, it is continued.
        num_examples (`int`, *optional*):
            Examples to write. One for each prompt if `None`; more than there are prompts takes them again from the first.
        prompts_split (`str`, *optional*, defaults to `"train"`):
            Split of the prompts.
        max_new_tokens (`int`, *optional*), temperature (`float`, *optional*), top_p (`float`, *optional*), top_k (`int`, *optional*):
            Sampling. What is `None` is as in the generator's training, which its `dpg.json` has; without that file 256 tokens are
            sampled at temperature 1.
        batch_size (`int`, *optional*, defaults to `64`):
            Prompts in a batch.
        seed (`int`, *optional*, defaults to `0`):
            Seed. Every batch has its own, so that a file that was continued is the same as one that was not.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Precision of the generator; that of its checkpoint if `"auto"`.
        device (`str`, *optional*):
            Device. A GPU if there is one.
        use_vllm (`bool`, *optional*, defaults to `False`):
            Whether to generate with vLLM, which then must be installed.
        push (`str`, *optional*):
            Repository on the Hub to push the data set to, with a card that links the generator.
        private (`bool`, *optional*, defaults to `False`):
            Whether to make that repository private.
        json (`bool`, *optional*, defaults to `False`):
            Whether to print JSON.
    """

    model: str = field(metadata={"help": "Generator: a directory or an id on the Hub."})
    prompts: str = field(metadata={"help": "Prompts: a file or a data set's id, with a column `prompt`."})
    output: str = field(metadata={"help": "File of JSON lines to write, or to continue."})
    num_examples: int | None = field(default=None, metadata={"help": "Examples to write. One a prompt by default."})
    prompts_split: str = field(default="train", metadata={"help": "Split of the prompts."})
    max_new_tokens: int | None = field(default=None, metadata={"help": "Longest text. As in training by default."})
    temperature: float | None = field(default=None, metadata={"help": "As in training by default."})
    top_p: float | None = field(default=None, metadata={"help": "As in training by default."})
    top_k: int | None = field(default=None, metadata={"help": "As in training by default; 0 is none."})
    batch_size: int = field(default=64, metadata={"help": "Prompts in a batch."})
    seed: int = field(default=0, metadata={"help": "Seed."})
    dtype: str = field(default="auto", metadata={"help": "Precision, 'auto' is that of the checkpoint."})
    device: str | None = field(default=None, metadata={"help": "Device. A GPU if there is one."})
    use_vllm: bool = field(default=False, metadata={"help": "Generate with vLLM."})
    push: str | None = field(default=None, metadata={"help": "Repository on the Hub to push the data set to."})
    private: bool = field(default=False, metadata={"help": "Make that repository private."})
    json: bool = field(default=False, metadata={"help": "Print JSON."})

    def __post_init__(self):
        for name in ("num_examples", "max_new_tokens", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if self.temperature is not None and self.temperature <= 0:
            raise ValueError(f"`temperature` must be above 0, got {self.temperature}: texts are sampled.")
        if not self.output.endswith(".jsonl"):
            raise ValueError(f"`output` must end with '.jsonl', got {self.output!r}.")
        if self.use_vllm and not find_spec("vllm"):
            raise ValueError('`use_vllm` needs vLLM. Install it with `pip install "trl-dpg[vllm]"`, or leave it out.')


def read_facts(model: str) -> dict[str, Any]:
    """
    The `dpg.json` of a generator: what it was trained for and how its texts were sampled.

    Args:
        model (`str`):
            Directory or id on the Hub.

    Returns:
        `dict[str, Any]`: Its content, empty if there is none.

    Raises:
        [`ValueError`]: If there is no such model.
    """
    if os.path.isdir(model):
        path = local_facts(model)
        return json.loads(path.read_text(encoding="utf-8")) if path is not None else {}
    try:
        return json.loads(Path(hf_hub_download(model, FACTS_FILE)).read_text(encoding="utf-8"))
    except LocalEntryNotFoundError:  # offline, and not in the cache
        return {}
    except EntryNotFoundError:
        return {}
    except (HFValidationError, HfHubHTTPError) as error:
        raise ValueError(
            f"{model!r} is neither a directory nor a model on the Hub that can be read ({error})."
        ) from error


def sampling(args: GenerateArguments, facts: dict[str, Any]) -> dict[str, Any]:
    """How to sample: as in training, but for what was asked otherwise."""
    settings = {"max_new_tokens": 256, "temperature": 1.0, **facts.get("generation", {})}
    asked = {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_p", "top_k")}
    return {**settings, **{name: value for name, value in asked.items() if value is not None}}


class TransformersSampler:
    """Samples with Transformers, one completion of each prompt of a batch."""

    def __init__(self, args: GenerateArguments, settings: dict[str, Any]):
        self.settings = {"top_k": 0, "do_sample": True, **settings}
        self.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left", trust_remote_code=False)
            is_adapter = find_adapter_config_file(args.model) is not None
            load = AutoPeftModelForCausalLM if is_adapter else AutoModelForCausalLM
            model: Any = load.from_pretrained(args.model, dtype=args.dtype, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ValueError(f"`model` {args.model!r} cannot be loaded: {error}") from error
        self.model = model.to(self.device).eval()
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    @torch.no_grad()
    def __call__(self, prompts: list[Any], seed: int) -> list[str]:
        set_seed(seed)
        texts = [
            p
            if isinstance(p, str)
            else self.tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True)
            for p in prompts
        ]
        texts = [
            text or self.tokenizer.bos_token or self.tokenizer.eos_token for text in texts
        ]  # something to go on from
        is_chat = not isinstance(prompts[0], str)  # whose template has the special tokens
        inputs = self.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=not is_chat)
        tokens = self.model.generate(
            input_ids=inputs["input_ids"].to(self.device),
            attention_mask=inputs["attention_mask"].to(self.device),
            pad_token_id=self.tokenizer.pad_token_id,
            **self.settings,
        )
        return self.tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


class VLLMSampler:
    """Samples with vLLM."""

    def __init__(self, args: GenerateArguments, settings: dict[str, Any]):
        from vllm import LLM

        self.settings = {VLLM_NAMES.get(name, name): value for name, value in settings.items()}
        if self.settings.get("top_k") == 0:
            self.settings["top_k"] = -1  # vLLM's word for none
        self.model = LLM(args.model, dtype=args.dtype, seed=args.seed)

    def __call__(self, prompts: list[Any], seed: int) -> list[str]:
        from vllm import SamplingParams

        parameters = SamplingParams(seed=seed, **self.settings)
        generate = self.model.generate if isinstance(prompts[0], str) else self.model.chat
        return [output.outputs[0].text for output in generate(prompts, parameters, use_tqdm=False)]


def written(path: Path, settings: dict[str, Any]) -> int:
    """
    Number of examples that an earlier call has written; a line that was cut off is removed.

    Raises:
        [`ValueError`]: If that call had other settings.
    """
    beside = path.with_suffix(".settings.json")
    if not path.exists():
        beside.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return 0
    if not beside.exists():
        raise ValueError(
            f"`output` {str(path)!r} is there already, and not by this command ({beside.name!r} is missing), so it cannot be "
            "continued. Give another file, or remove it."
        )
    earlier = json.loads(beside.read_text(encoding="utf-8"))
    differing = sorted(name for name in settings if settings[name] != earlier.get(name))
    if differing:
        raise ValueError(
            f"`output` {str(path)!r} was written with other settings ({', '.join(differing)}), so it cannot be continued. Give "
            "another file, or remove it."
        )
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with open(path, "r+b") as file:
            file.truncate(whole)
    return content.count(b"\n")


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    dataclasses: Any = GenerateArguments
    parser = TrlParser(dataclasses, prog="trl-dpg generate")
    (args,) = parser.parse_args_and_config(argv)
    facts = read_facts(args.model)
    settings = sampling(args, facts)
    if "generation" not in facts:
        print(
            f"{args.model!r} has no {FACTS_FILE!r} that can be read, which says how texts were sampled in its training. Here they are "
            f"sampled with {', '.join(f'{name} {value}' for name, value in settings.items())}: give what training had as flags.",
            file=sys.stderr,
        )
    rows = load_rows(args.prompts, args.prompts_split, "prompts")
    check_column(rows, "prompt", args.prompts, "prompts")
    number = args.num_examples or len(rows)
    path = Path(args.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    call = {"model": args.model, "prompts": args.prompts, "prompts_split": args.prompts_split, "seed": args.seed}
    call |= {"batch_size": args.batch_size, "use_vllm": args.use_vllm, **settings}
    done = written(path, call)
    done -= done % args.batch_size if done < number else 0  # whole batches, as each has a seed
    _cut(path, done)
    if done < number:
        sample = (VLLMSampler if args.use_vllm else TransformersSampler)(args, settings)
        with open(path, "a", encoding="utf-8") as file, tqdm(total=number, initial=done, unit="example") as bar:
            for start in range(done, number, args.batch_size):
                prompts = [rows[i % len(rows)]["prompt"] for i in range(start, min(start + args.batch_size, number))]
                texts = sample(prompts, args.seed * 1_000_003 + start)
                for prompt, text in zip(prompts, texts, strict=True):
                    file.write(json.dumps({"text": text, "source_prompt": prompt}, ensure_ascii=False) + "\n")
                file.flush()
                bar.update(len(texts))
    result: dict[str, Any] = {"output": str(path), "examples": max(done, number), "generation": settings}
    if args.push is not None:
        commit = push_dataset(
            path, args.push, generator=args.model, private=args.private, prompts=args.prompts, generation=settings
        )
        result["pushed"] = commit.repo_url.repo_id
    if args.json:
        print(json.dumps(result))
    else:
        print(f"{result['examples']:,} examples in {path}" + (f", pushed to {args.push}." if args.push else "."))
    return 0


def _cut(path: Path, lines: int) -> None:
    """Keeps the first lines of a file."""
    if not path.exists():
        return
    with open(path, "r+b") as file:
        for _ in range(lines):
            file.readline()
        file.truncate(file.tell())


if __name__ == "__main__":
    sys.exit(run_script(main, None, "trl-dpg generate"))
