"""
Code in the documentation runs, and links lead somewhere.

- `python` blocks run, those of a page one after the other, on tiny models.
- `bash` blocks are read by the parsers of the commands in them.
- `yaml` blocks are read by `TrlParser`.
- `diff` blocks are run on both sides, in `test_plugging_in.py`.
"""

import argparse
import re
import runpy
import shlex
import sys
import tomllib
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from transformers import HfArgumentParser
from trl import GRPOConfig, ModelConfig, TrlParser
from trl.cli.main import main as trl
from trl.scripts.grpo import GRPOScriptArguments

from tests.docs.pages import MODELS, PAGES, ROOT, read_blocks
from trl_dpg import DatasetPolicyGradientConfig, DatasetPolicyGradientTrainer, cli
from trl_dpg.metagradients import TargetTrainingArguments, compute_metagradients
from trl_dpg.metrics import LMHeadNorm, LMHeadPattern
from trl_dpg.scripts.parsing import Parser
from trl_dpg.scripts.train import DPGScriptArguments
from trl_dpg.testing import tiny_causal_lm, tiny_prompts, tiny_tokenizer


LANGUAGES = {"python", "bash", "yaml", "diff", "text"}


def finished_run():
    """A run in `runs/qr`."""
    tokenizer, prompts = tiny_tokenizer(), tiny_prompts(16, 1)["train"]
    DatasetPolicyGradientTrainer(
        model=tiny_causal_lm(),
        target_model=tiny_causal_lm(seed=1),
        metric=LMHeadPattern.sixty_seven(),
        args=DatasetPolicyGradientConfig("runs/qr"),
        train_dataset=prompts,
        processing_class=tokenizer,
        target_processing_class=tokenizer,
    ).train()
    return {}


# What a page takes as given.
TOKENS = [[1, 2, 3, 4], [4, 5, 6, 7], [8, 9, 1, 2], [3, 3, 5, 1]]
ARGS = TargetTrainingArguments(learning_rate=1e-3, batch_size=2, adam_epsilon_root="auto")
EXAMPLES = [{"input_ids": ids} for ids in TOKENS]
GIVEN = {
    "docs/check.md": lambda: {
        "model": tiny_causal_lm().double(),
        "examples": EXAMPLES,
        "metric": LMHeadNorm(),
        "args": ARGS,
    },
    "docs/engine.md": lambda: {"model": tiny_causal_lm(), "tokenized": TOKENS, "metric": LMHeadNorm()},
    "docs/report.md": finished_run,
}

# What a page's code should have done, beyond running.
EXPECTED = {
    "README.md": lambda scope, out: (
        re.search(r"\['[\d.]+%', '[\d.]+%', '[\d.]+%'\]", out)
        and scope["trainer"].state.global_step == 2
        and scope["after"]["eval_metric"] != scope["before"]["eval_metric"]
    ),
    "docs/check.md": lambda scope, out: "Metagradients: passed" in out,
    "docs/engine.md": lambda scope, out: scope["out"].metagradients.shape == (4,),
    "docs/metrics.md": lambda scope, out: (
        "Metagradients: passed" in out
        and "eval_prefers_wanted" in out
        and compute_metagradients(tiny_causal_lm(), EXAMPLES, scope["small_embeddings"], ARGS).metagradients.all()
    ),
    "docs/recipe.md": lambda scope, out: "Metagradients: passed" in out,
    "docs/report.md": lambda scope, out: Path("runs/qr/report.html").read_text().lower().startswith("<!doctype html>"),
    "docs/scaling.md": lambda scope, out: scope["target_model"].dtype == torch.float32,
}

# Commands of others, and why they are not read here.
NOT_OURS = {
    "cd": "a shell's",
    "git": "a shell's",
    "hf": "the Hub's own",
    "pip-audit": "its own",
    "source": "a shell's",
    "vllm": "needs a server; its flags are held to TRL's in tests/examples/test_scaling_configs.py",
}


class Parsed(Exception):
    """A command's arguments were read without complaint."""


def blocks(language):
    """Parameters: one for each block of a language."""
    found = [block for page in PAGES for block in read_blocks(page, language)]
    return pytest.mark.parametrize("block", found, ids=[f"{block.page}:{block.line}" for block in found])


def test_every_language_is_tested():
    assert {block.language for page in PAGES for block in read_blocks(page)} <= LANGUAGES
    # and no block is overlooked because its fence is written another way
    for page in PAGES:
        lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
        assert sum(line.lstrip().startswith(("```", "~~~")) for line in lines) == 2 * len(read_blocks(page)), page


# ---- python ----


@pytest.mark.parametrize("page", [page for page in PAGES if read_blocks(page, "python")])
def test_python(page, directory, tiny, capsys):
    directory.write_files()
    scope = {"__name__": "__main__", **GIVEN.get(page, dict)()}
    for block in read_blocks(page, "python"):
        if ">>>" in block.code or block.file is not None:
            continue  # a docstring's, which `--doctest-modules` runs; a file's, which is imported where it is used
        code = "\n" * (block.line - 1) + directory.substitute(block.code)
        exec(compile(code, page, "exec"), scope)
    if page in EXPECTED:
        assert EXPECTED[page](scope, capsys.readouterr().out)


# ---- bash ----


def commands(code):
    """The commands of a block, as lists of words without comments and variables before them."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            command, words = words[:end], words[end + 1 :]
            while re.match(r"[A-Z_]+=", command[0]):
                command = command[1:]
            yield command


@pytest.fixture
def stop_once_parsed(monkeypatch):
    """Programs raise `Parsed` where they have read their arguments."""

    def stop(*args, **kwargs):
        raise Parsed

    def stop_after(owner, name):
        original = getattr(owner, name)

        def parse(self, *args, **kwargs):
            result = original(self, *args, **kwargs)
            if kwargs.get("return_remaining_strings") or "check_rest" in kwargs:
                return result  # the rest is for another parser
            raise Parsed

        monkeypatch.setattr(owner, name, parse)

    stop_after(argparse.ArgumentParser, "parse_args")
    stop_after(HfArgumentParser, "parse_args_into_dataclasses")
    stop_after(TrlParser, "parse_args_and_config")
    stop_after(Parser, "parse_args_and_config")
    # `trl-dpg train` and `trl grpo` check what is left over, and launch
    monkeypatch.setattr("trl_dpg.scripts.train.AutoConfig.from_pretrained", lambda *args, **kwargs: None)
    monkeypatch.setattr("trl_dpg.scripts.common.load_splits", stop)
    monkeypatch.setattr("trl_dpg.scripts.verify.facts_of", lambda *args: {})


def launch_arguments(argv):
    """What Accelerate's launcher makes of its arguments."""
    args, unknown = argparse.ArgumentParser.parse_known_args(launch_command_parser(), argv)
    assert not unknown
    return args


def run(script, argv, monkeypatch):
    """Runs a script or module as from the shell."""
    monkeypatch.setattr(sys, "argv", [script, *argv])
    if script.endswith(".py"):
        runpy.run_path(script, run_name="__main__")
    else:
        runpy.run_module(script, run_name="__main__")


def launch_trl(script_name, launch_args, training_script_args):
    """As TRL's own, up to the launch."""
    launch_arguments([*launch_args, script_name])
    parser = TrlParser((GRPOScriptArguments, GRPOConfig, ModelConfig))
    parser.parse_args_and_config(training_script_args, fail_with_unknown_args=True)


@blocks("bash")
def test_bash(block, directory, cpu, stop_once_parsed, monkeypatch):
    directory.write_files()
    monkeypatch.setattr("trl.cli.accelerate_launcher.launch_training_script", launch_trl)
    monkeypatch.setattr(
        "accelerate.commands.launch.launch_command",
        lambda args: run(args.training_script, args.training_script_args, monkeypatch),
    )
    for words in commands(block.code):
        program, *argv = words
        if program in NOT_OURS:
            continue
        if program == "make":
            for target in argv:
                assert re.search(rf"^{target}( \w[\w -]*)?:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
        elif program == "pip":
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            for asked in re.findall(r"\[(.*?)\]", " ".join(argv)):
                assert set(asked.split(",")) <= set(extras)
        else:
            with pytest.raises(Parsed):
                if program == "trl-dpg":
                    cli.main(argv)
                elif program == "trl":
                    trl(argv)
                elif program == "accelerate":
                    assert argv[0] == "launch"
                    args = launch_arguments(argv[1:])
                    run(args.training_script, args.training_script_args, monkeypatch)
                else:
                    assert program == "python", f"{program} is in none of the tests"
                    argv = argv[1:] if argv[0] == "-m" else argv
                    run(argv[0], argv[1:], monkeypatch)


# ---- yaml ----


@blocks("yaml")
def test_yaml(block, directory, cpu):
    """A file named `grpo...` is for TRL's own script, any other for ours."""
    script = GRPOScriptArguments if (block.file or "").startswith("grpo") else DPGScriptArguments
    config = GRPOConfig if script is GRPOScriptArguments else DatasetPolicyGradientConfig
    path = directory.path / "block.yaml"
    path.write_text(block.code)
    TrlParser((script, config, ModelConfig)).parse_args_and_config(["--config", str(path), "--output_dir", "out"])


# ---- links ----


def markdown_files():
    """All of the repository's, but for templates, which are filled in where their links lead somewhere."""
    folders = [
        path for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".") and path.name != "runs"
    ]
    paths = [*ROOT.glob("*.md"), *(path for folder in folders for path in folder.rglob("*.md"))]
    return [str(path.relative_to(ROOT)) for path in sorted(paths) if "templates" not in path.parts]


def without_code(text):
    text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", lambda match: "`" * 2, text)


def anchors(text):
    """Names that GitHub gives to headings."""
    found = []
    for heading in re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE), re.M):
        heading = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading).strip().lower()
        name = re.sub(r"[^\w\- ]", "", heading).replace(" ", "-")
        found.append(name if name not in found else f"{name}-{found.count(name)}")
    return found


@pytest.mark.parametrize("page", markdown_files())
def test_links(page):
    text = without_code((ROOT / page).read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", target):
            continue  # the network's
        path, _, anchor = unquote(target).partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page}: {target}"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file.read_text(encoding="utf-8")), f"{page}: {target}"


@pytest.mark.parametrize("page", PAGES)
def test_code_that_pages_point_to(page):
    """Of a link whose text is a name in a Python file, the file defines the name."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for name, path in re.findall(r"\[`(\w+)`\]\(([\w./]+\.py)\)", text):
        source = ((ROOT / page).parent / path).read_text(encoding="utf-8")
        assert re.search(rf"^ *(def|class) {name}\b|^{name}\b.* = ", source, re.MULTILINE), f"{page}: {name} in {path}"


def test_every_page_is_in_the_index():
    index = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    for page in PAGES[1:]:
        assert page == "docs/index.md" or f"]({page.removeprefix('docs/')})" in index, page


def test_models_are_those_of_the_documentation():
    texts = "".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    assert all(name in texts for name in MODELS)


def test_settings_are_those_of_the_results():
    """Figures of docs/recipe.md."""
    table = (ROOT / "experiments/results/README.md").read_text(encoding="utf-8").partition("(`tiny_settings`)")[2]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")]
    column = rows[0].index("pixel accuracy, trained")
    measured = {row[0]: float(row[column].split()[0]) for row in rows[1:]}
    quoted = re.findall(
        r"^\| ([^|]+) \| (\d\.\d\d) \|$", (ROOT / "docs/recipe.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert len(quoted) == 10
    for name, value in quoted:
        assert float(value) == round(measured[name], 2), name
