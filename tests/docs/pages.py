"""Documentation as tests see it: its pages, their blocks of code, and a directory in which these run on tiny models."""

import re
from pathlib import Path
from typing import NamedTuple

import datasets
from trl import GRPOConfig

from trl_dpg.testing import tiny_prompts


ROOT = Path(__file__).parents[2]
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]

# Every model that the documentation names, and which of the two tiny models stands in for it.
MODELS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": "generator",
    "Qwen/Qwen2.5-0.5B-Instruct": "generator",
    "meta-llama/Llama-3.2-1B-Instruct": "generator",
    "openai-community/gpt2": "target",
}


class Block(NamedTuple):
    """A block of code, and the line of the page on which it begins."""

    page: str
    line: int
    language: str
    code: str

    @property
    def file(self) -> str | None:
        """Name of the file that the block is, if its first line is a comment with a name."""
        match = re.match(r"# ([\w.]+\.(?:py|yaml))\n", self.code)
        return match and match[1]


def read_blocks(page: str, language: str | None = None) -> list[Block]:
    """The blocks of a page, named by its path in the repository."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = []
    for match in re.finditer(r"^```(\w+)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE):
        found.append(Block(page, text[: match.start()].count("\n") + 2, match[1], match[2]))
    return [block for block in found if language in (None, block.language)]


class Directory:
    """The working directory of a page's code."""

    def __init__(self, path: Path, generator: str, target: str):
        self.path = path
        self.models = {name: {"generator": generator, "target": target}[role] for name, role in MODELS.items()}
        for folder in ("examples", "experiments", "benchmarks", "trl_dpg"):
            (path / folder).symlink_to(ROOT / folder)

    def substitute(self, code: str) -> str:
        """Code with tiny models in the place of those on the Hub."""
        for name, model in self.models.items():
            code = code.replace(name, model)
        return code

    def write_files(self) -> None:
        """Writes the blocks that are files, of all pages: one page may use a file of another."""
        for page in PAGES:
            for block in read_blocks(page):
                if block.file is not None:
                    assert not (self.path / block.file).exists(), f"{block.file} is on two pages"
                    (self.path / block.file).write_text(self.substitute(block.code), encoding="utf-8")


def load_tiny_dataset(name, *args, split=None, streaming=False, **kwargs):
    """As `datasets.load_dataset`: whatever is asked for is a few tiny prompts."""
    splits = tiny_prompts(16, 2)
    splits = datasets.DatasetDict(train=splits["train"], test=splits["test"], validation=splits["test"])
    chosen = splits if split is None else splits[re.match(r"\w+", split)[0]]
    return chosen.to_iterable_dataset() if streaming else chosen


def on_cpu(config) -> None:
    """What any configuration needs to be made on a machine without a GPU."""
    config.use_cpu, config.bf16 = True, False


def shrink(config) -> None:
    """Makes a configuration one of seconds on a CPU."""
    on_cpu(config)
    config.gradient_checkpointing, config.disable_tqdm = False, True
    config.report_to, config.save_strategy = "none", "no"
    config.logging_steps = 1
    config.per_device_train_batch_size = config.per_device_eval_batch_size = 8
    if isinstance(config, GRPOConfig):
        config.max_steps = config.max_steps if 0 < config.max_steps < 3 else 2
        config.num_generations, config.max_completion_length = 4, 6
