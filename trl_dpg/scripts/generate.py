"""
Writes a data set with a trained generator.

    trl-dpg generate --model runs/qr --prompts prompts.jsonl --num_examples 4096 --output data.jsonl
"""

import hashlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import AutoPeftModelForCausalLM
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.utils import CONFIG_NAME, cached_file, find_adapter_config_file

from ..metagradients.runtime.host import tape_directory
from ..publishing import push_dataset
from ..publishing.facts import FACTS_FILE, read_json
from .common import Parser, at_least_one, check_column, facts_of, load_rows, loading, option, positions_of, running


# Files of a generator's directory that its texts depend on
FILES_OF_A_MODEL = ["*.safetensors", "pytorch_model*.bin", "adapter_model.bin", "*config.json", "*.jinja", "*.model"]
FILES_OF_A_MODEL += ["tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"]

# Settings that are hashes, and what they are hashes of
FINGERPRINTS = {"weights": "the files of `model`", "prompt_rows": "the rows of `prompts`"}

# vLLM's names of settings that Transformers calls otherwise
VLLM_NAMES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}


@dataclass
class GenerateArguments:
    """Arguments of `trl-dpg generate`."""

    model: str = field(metadata={"help": "Generator: a directory or an id on the Hub, of a full model or an adapter."})
    prompts: str = field(
        metadata={
            "help": "Prompts, plain or conversational: a file or a data set's id with a column `prompt`. Use the prompts of "
            "training, or similar ones."
        }
    )
    output: str = field(
        metadata={
            "help": "File of JSON lines to write, with the columns `text` (to fine-tune on) and `source_prompt`. If an earlier call "
            "with the same arguments, weights and prompts wrote it, it is continued."
        }
    )
    num_examples: int | None = option(
        None,
        "Examples to write. One for each prompt by default. If there are fewer prompts, they are used again from the "
        "first.",
    )
    prompts_config: str | None = option(None, "Configuration of the prompts.")
    prompts_split: str = option("train", "Split of the prompts.")
    max_new_tokens: int | None = option(
        None, "Most tokens of a text. By default as in training (from `dpg.json`), or 256 without this file."
    )
    temperature: float | None = option(None, "Sampling temperature. By default as in training, or 1.")
    top_p: float | None = option(None, "Nucleus sampling. By default as in training.")
    top_k: int | None = option(None, "Most likely tokens to sample from; 0 is no limit. By default as in training.")
    batch_size: int = option(64, "Prompts in a batch.")
    seed: int = option(0, "Seed. Every batch has a seed of its own, so a continued file equals one written at once.")
    dtype: str = option("auto", "Precision; 'auto' is that of the checkpoint.")
    device: str | None = option(None, "Device. By default a GPU if there is one. Not for vLLM.")
    use_vllm: bool = option(False, "Generate with vLLM, which must be installed.")
    push: str | None = option(
        None, "Repository on the Hub to push the data set to, with a card that links the generator."
    )
    private: bool = option(False, "Make this repository private.")
    json: bool = option(False, "Print JSON.")

    def __post_init__(self):
        at_least_one(self, "num_examples", "max_new_tokens", "batch_size")
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise ValueError(f"`temperature` must be above 0, got {self.temperature}: texts are sampled.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` must be above 0 and at most 1, got {self.top_p}.")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"`top_k` must be at least 0 (no limit), got {self.top_k}.")
        if self.dtype != "auto" and not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ValueError(
                f"`dtype` must be 'auto' or a precision of torch, such as 'bfloat16', got {self.dtype!r}."
            )
        if self.push is not None:
            try:
                validate_repo_id(self.push)
            except HFValidationError as error:
                raise ValueError(f"`push` {self.push!r} is no name of a repository: {error}") from error
        elif self.private:
            raise ValueError("`private` is for `push`, which is missing. Name a repository, or leave `private` out.")
        if not self.output.endswith(".jsonl"):
            raise ValueError(f"`output` must end with '.jsonl', got {self.output!r}.")
        if self.use_vllm and not find_spec("vllm"):
            raise ValueError(
                '`use_vllm` needs vLLM. Install vLLM with `pip install "trl-dpg[vllm]"`, or leave `use_vllm` out.'
            )
        if self.use_vllm and self.device is not None:
            raise ValueError(
                f"`device` {self.device!r} is not for `use_vllm`: vLLM uses the GPUs that `CUDA_VISIBLE_DEVICES` names, or the CPU "
                "if it was built for it. Leave one of the two out."
            )


def fingerprint(model: str) -> str:
    """
    Returns a short text that identifies a generator's weights, settings and tokenizer.

    For a directory, it is a hash of the files. For a model on the Hub, it is the commit. For an adapter, that of the base model is
    added.

    Raises:
        [`ValueError`]: If there is no such model.
    """
    with loading(model, "model"):
        adapter = find_adapter_config_file(model)
        config = adapter or cached_file(model, CONFIG_NAME)
    if config is None:
        raise ValueError(f"`model` {model!r} has no {CONFIG_NAME!r}, so it is no model. Correct the path.")
    folder = Path(config).parent
    text = folder.name  # in the Hub's cache, the folder is named after the commit
    if os.path.isdir(model):
        digest = hashlib.sha256()
        for path in sorted({path for pattern in FILES_OF_A_MODEL for path in folder.glob(pattern)}):
            with open(path, "rb") as file:
                digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
        text = digest.hexdigest()
    if adapter is not None:
        text += " on " + fingerprint(json.loads(Path(adapter).read_text())["base_model_name_or_path"])
    return text


def sampling(args: GenerateArguments, facts: dict[str, Any]) -> dict[str, Any]:
    """Sampling settings: those of training, unless the arguments set others."""
    settings = {"max_new_tokens": 256, "temperature": 1.0, **facts.get("generation", {})}
    asked = {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_p", "top_k")}
    return {**settings, **{name: value for name, value in asked.items() if value is not None}}


class TransformersSampler:
    """Samples one completion for each prompt of a batch, with Transformers."""

    def __init__(self, args: GenerateArguments, settings: dict[str, Any], tokenizer: Any):
        self.tokenizer, self.settings = tokenizer, {"top_k": 0, "do_sample": True, **settings}
        self.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = load_model(args)
        self.positions = positions_of(model)
        if settings["max_new_tokens"] >= self.positions:
            raise ValueError(
                f"`max_new_tokens` {settings['max_new_tokens']} does not fit into the {self.positions} positions of `model` "
                f"{args.model!r}. Pass the length that was used in training."
            )
        try:
            self.model = model.to(self.device).eval()
        except (RuntimeError, AssertionError) as error:  # without CUDA, PyTorch raises an `AssertionError`
            raise ValueError(f"`device` {self.device!r} cannot be used: {error}") from error
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token

    @torch.no_grad()
    def __call__(self, prompts: list[Any], seed: int) -> list[str]:
        set_seed(seed)
        ids = encode(self.tokenizer, prompts, self.settings["max_new_tokens"], self.positions)
        inputs = self.tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(self.device)
        tokens = self.model.generate(**inputs, pad_token_id=self.tokenizer.pad_token_id, **self.settings)
        return self.tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


class VLLMSampler:
    """Samples with vLLM. Each text has a seed of its own. With one seed for all, equal prompts would get equal texts."""

    def __init__(self, args: GenerateArguments, settings: dict[str, Any], tokenizer: Any):
        from vllm import LLM, SamplingParams

        try:
            self.parameters = partial(SamplingParams, **vllm_sampling(settings))
            self.parameters(seed=args.seed)
        except TypeError as error:
            raise ValueError(
                f"The generator was trained with sampling that vLLM does not know: {error}. Leave `use_vllm` out."
            ) from error
        with whole_model(args, tokenizer) as model:
            dtype: Any = args.dtype
            if dtype == "auto":  # vLLM's own "auto" would take bfloat16 instead of float32
                dtype = AutoConfig.from_pretrained(model, trust_remote_code=False).dtype or "auto"
            self.model = LLM(model, dtype=dtype, seed=args.seed % 2**32)
        self.tokenizer, self.settings = tokenizer, settings
        self.positions = self.model.llm_engine.model_config.max_model_len

    def __call__(self, prompts: list[Any], seed: int) -> list[str]:
        parameters = [self.parameters(seed=seed + index) for index in range(len(prompts))]
        ids = encode(self.tokenizer, prompts, self.settings["max_new_tokens"], self.positions)
        requests = [{"prompt_token_ids": i} for i in ids]
        outputs = self.model.generate(requests, parameters, use_tqdm=False)
        # vLLM's own text may differ from the decoded tokens, which training uses.
        tokens = [output.outputs[0].token_ids for output in outputs]
        return self.tokenizer.batch_decode(tokens, skip_special_tokens=True)


def vllm_sampling(settings: dict[str, Any]) -> dict[str, Any]:
    """Translates sampling settings of Transformers to those of vLLM."""
    settings = {VLLM_NAMES.get(name, name): value for name, value in settings.items()}
    if settings.get("top_k") == 0:
        settings["top_k"] = -1  # no limit in vLLM
    if not settings.pop("do_sample", True):
        settings["temperature"] = 0.0
    bad_words = settings.pop("bad_words_ids", None) or []
    if any(len(ids) > 1 for ids in bad_words):
        raise ValueError(
            f"The generator was trained with `bad_words_ids` {bad_words}, of which vLLM can leave out single tokens only. Leave "
            "`use_vllm` out."
        )
    if never := [*(settings.pop("suppress_tokens", None) or []), *(ids[0] for ids in bad_words)]:
        settings["logit_bias"] = dict.fromkeys(never, -100.0)
    return settings


@contextmanager
def whole_model(args: GenerateArguments, tokenizer: Any) -> Iterator[str]:
    """The name of a model. For an adapter, a temporary folder with the base model that the adapter is merged into."""
    if find_adapter_config_file(args.model) is None:
        yield args.model
        return
    with tempfile.TemporaryDirectory(dir=tape_directory(None)) as folder:
        load_model(args).merge_and_unload().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        yield folder


def load_model(args: GenerateArguments) -> Any:
    """Loads the generator, a model or an adapter on its base model."""
    with loading(args.model, "model"):
        is_adapter = find_adapter_config_file(args.model) is not None
        load: Any = AutoPeftModelForCausalLM if is_adapter else AutoModelForCausalLM
        return load.from_pretrained(args.model, dtype=args.dtype, trust_remote_code=False)


def encode(tokenizer: Any, prompts: list[Any], num_new_tokens: int, positions: float) -> list[list[int]]:
    """
    Tokenizes prompts, plain or conversational. An empty prompt becomes a single token to start from.

    Raises:
        [`ValueError`]: If a prompt with `num_new_tokens` more tokens does not fit into the model's positions.
    """
    is_chat = not isinstance(prompts[0], str)
    if is_chat:  # the template adds the special tokens
        prompts = tokenizer.apply_chat_template(prompts, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompts, add_special_tokens=not is_chat)["input_ids"]
    ids = [i or [start_token(tokenizer)] for i in ids]
    if (length := max(map(len, ids))) + num_new_tokens > positions:
        raise ValueError(
            f"A prompt of {length} tokens and `max_new_tokens` {num_new_tokens} do not fit into the {positions} positions of "
            "`model`. Shorten the prompt, or lower `max_new_tokens`."
        )
    return ids


def start_token(tokenizer: Any) -> int:
    """The token that replaces an empty prompt."""
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def check_prompts(rows: Dataset, name: str) -> str:
    """Raises a [`ValueError`] if a row is no prompt. Returns a hash of all rows."""
    digest = hashlib.sha256()
    first_is_chat = isinstance(rows[0]["prompt"], list)
    for index, prompt in enumerate(rows["prompt"]):
        is_chat = isinstance(prompt, list) and len(prompt) > 0 and all(isinstance(turn, dict) for turn in prompt)
        if not is_chat and not isinstance(prompt, str):
            raise ValueError(
                f"`prompts` {name!r} has {prompt!r} as the `prompt` of row {index}. Make it a text, or a conversation: a list of "
                "messages with `role` and `content`."
            )
        if is_chat != first_is_chat:
            raise ValueError(
                f"`prompts` {name!r} has texts and conversations (see row {index}). Make all of one kind."
            )
        digest.update(json.dumps(prompt).encode() + b"\n")
    return digest.hexdigest()


def written(path: Path, settings: dict[str, Any]) -> int:
    """
    Number of examples that an earlier call has written. An incomplete last line is removed.

    Raises:
        [`ValueError`]: If the earlier call had other settings.
    """
    beside = path.with_suffix(".settings.json")
    if not path.exists():
        beside.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return 0
    if not beside.exists():
        raise ValueError(
            f"`output` {str(path)!r} exists already, but not from this command ({beside.name!r} is missing), so it cannot be "
            "continued. Write to another place, or remove the file."
        )
    earlier = read_json(beside)
    differing = sorted(name for name in settings if settings[name] != earlier.get(name))
    if differing:
        changed = " and ".join(label for name, label in FINGERPRINTS.items() if name in differing)
        raise ValueError(
            f"`output` {str(path)!r} was written with other settings ({', '.join(differing)}), so it cannot be continued."
            f"{f' Since then {changed} changed.' if changed else ''} Write to another place, or remove the file."
        )
    number = path.read_bytes().count(b"\n")
    keep_lines(path, number)
    return number


def keep_lines(path: Path, number: int) -> None:
    """Cuts a file after `number` lines. A missing file is no error."""
    if path.exists():
        with open(path, "r+b") as file:
            for _ in range(number):
                file.readline()
            file.truncate(file.tell())


def write(args: GenerateArguments) -> dict[str, Any]:
    """
    Writes the data set, or the examples that are missing from it.

    Returns:
        `dict[str, Any]`: `output`, `examples` (in the file), `num_examples` (asked for), `written` (by this call) and `generation`
        (sampling settings). Also `pushed`, if the data set was pushed.

    Raises:
        [`ValueError`]: If an argument cannot be used, or if the file comes from a call with other settings.
    """
    facts = facts_of(args.model, "model")
    settings = sampling(args, facts)
    if "generation" not in facts:
        print(
            f"{args.model!r} has no {FACTS_FILE!r} that can be read, so the sampling settings of its training are unknown. Texts are now "
            f"sampled with {', '.join(f'{name} {value}' for name, value in settings.items())}. If training had others, pass them as flags.",
            file=sys.stderr,
        )
    rows = load_rows(args.prompts, args.prompts_split, "prompts", args.prompts_config)
    check_column(rows, "prompt", args.prompts, "prompts")
    number = args.num_examples or len(rows)
    call: dict[str, Any] = {"model": args.model, "weights": fingerprint(args.model), "prompts": args.prompts}
    call |= {"prompts_split": args.prompts_split, "prompt_rows": check_prompts(rows, args.prompts), "seed": args.seed}
    call |= {"batch_size": args.batch_size, "dtype": args.dtype, "use_vllm": args.use_vllm, **settings}
    path = Path(args.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    there = written(path, call)
    if there < number:
        append(path, rows, range(there - there % args.batch_size, number), args, settings)
    result: dict[str, Any] = {"output": str(path), "examples": max(there, number), "num_examples": number}
    result |= {"written": max(number - there, 0), "generation": settings}
    if args.push is not None:
        about: dict[str, Any] = {"private": args.private, "prompts": args.prompts, "generation": settings}
        result["pushed"] = push_dataset(path, args.push, generator=args.model, **about).repo_url.repo_id
    return result


def append(path: Path, rows: Dataset, examples: range, args: GenerateArguments, settings: dict[str, Any]) -> None:
    """Writes examples to a file. They start with a whole batch, since each batch has a seed of its own."""
    with loading(args.model, "model"):
        tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left", trust_remote_code=False)
    if not isinstance(rows[0]["prompt"], str) and tokenizer.chat_template is None:
        raise ValueError(
            f"`prompts` {args.prompts!r} has conversations, but the tokenizer of `model` {args.model!r} has no chat template. "
            "Pass prompts as plain text, or save the template with the tokenizer."
        )
    sample = (VLLMSampler if args.use_vllm else TransformersSampler)(args, settings, tokenizer)
    keep_lines(path, examples.start)
    with (
        running(lambda: f"What is written stays in {str(path)!r}. The same command goes on from there."),
        open(path, "a", encoding="utf-8") as file,
        tqdm(total=examples.stop, initial=examples.start, unit="example") as bar,
    ):
        for start in examples[:: args.batch_size]:
            stop = min(start + args.batch_size, examples.stop)
            prompts = [rows[i % len(rows)]["prompt"] for i in range(start, stop)]
            texts = sample(prompts, (args.seed * 1_000_003 + start) % 2**32)
            for prompt, text in zip(prompts, texts, strict=True):
                file.write(json.dumps({"text": text, "source_prompt": prompt}, ensure_ascii=False) + "\n")
            file.flush()
            bar.update(len(texts))


def describe(result: dict[str, Any]) -> str:
    """The result of [`write`] in a line."""
    number, asked = result["examples"], result["num_examples"]
    pushed = f", pushed to {result['pushed']}" if "pushed" in result else ""
    text = f"{number:,} examples in {result['output']}{pushed}."
    if number > asked:
        return f"nothing written: {text} These are more than `num_examples` {asked:,}, and none was removed."
    return text if result["written"] else f"already complete, nothing written: {text}"


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    dataclasses: Any = GenerateArguments
    parser = Parser(dataclasses, prog="trl-dpg generate")
    (args,) = parser.parse_args_and_config(argv)
    result = write(args)
    print(json.dumps(result) if args.json else describe(result))
    return 0
