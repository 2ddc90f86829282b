"""What is never run, never written outside the run's folder, and never written at all."""

import ast
import json
import logging
import os
import pickle
import tomllib
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from trl import TrlParser

import trl_dpg
from trl_dpg import DatasetPolicyGradientConfig, MetagradientReward
from trl_dpg.metrics import LMHeadPattern
from trl_dpg.target import load_target_model, load_target_tokenizer
from trl_dpg.testing import save_tiny_models, tiny_prompts


ROOT = Path(__file__).parents[2]
SOURCES = sorted(Path(trl_dpg.__file__).parent.rglob("*.py"))

# Code

PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS = {"eval", "exec", "compile", "__import__", "input"}
METHODS = {
    "torch.load", "torch.save", "torch.hub.load", "torch.jit.load", "yaml.load", "yaml.load_all", "yaml.unsafe_load",
    "yaml.full_load", "os.system", "os.popen", "numpy.load", "np.load",
}  # fmt: skip


def dangers(tree):
    """What of a module may run what it reads, or a shell."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            names = []
        yield from (name for name in names if name.split(".")[0] in PICKLES or name in METHODS)
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in CALLS | METHODS or name.endswith((".extractall", ".extract")):
                yield name
            for keyword in node.keywords:
                value = ast.unparse(keyword.value)
                if (keyword.arg, value) in {
                    ("shell", "True"),
                    ("trust_remote_code", "True"),
                    ("allow_pickle", "True"),
                    ("weights_only", "False"),
                }:
                    yield f"{name}({keyword.arg}={value})"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_runs_what_it_reads(path):
    assert list(dangers(ast.parse(path.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle", "from torch import load", "torch.load(path)", "yaml.load(text, Loader)", "eval(text)", "exec(text)",
        "subprocess.run(command, shell=True)", "archive.extractall()", "f(trust_remote_code=True)", "import cloudpickle as c",
    ],
)  # fmt: skip
def test_the_search_finds(code):
    assert list(dangers(ast.parse(code)))


def test_transformers_reads_checkpoints_as_data():
    """The pickles of a checkpoint are Transformers' own; it reads each of them by `weights_only=True`, and its arguments never."""
    source = Path(transformers.__file__).with_name("trainer.py").read_text(encoding="utf-8")
    loads = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    ]
    assert len(loads) >= 5
    for load in loads:
        assert "weights_only=True" in [ast.unparse(keyword) for keyword in load.keywords]
    uses = [line.strip() for line in source.splitlines() if "TRAINING_ARGS_NAME" in line and "import" not in line]
    assert all("torch.save" in use or use.startswith("TRAINING_ARGS_NAME =") for use in uses)


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_that_holds_code_is_refused(name, make_trainer, tmp_path):
    fields = {"save_strategy": "steps", "save_steps": 1}
    make_trainer(**fields, max_steps=1).train()
    checkpoint = tmp_path / "dpg" / "checkpoint-1"
    marker = tmp_path / "marker"
    (checkpoint / name).write_bytes(pickle.dumps(Bomb(marker)))
    with pytest.raises((pickle.UnpicklingError, RuntimeError), match="[Ww]eights"):
        make_trainer(**fields, max_steps=2).train(resume_from_checkpoint=str(checkpoint))
    assert not marker.exists()


def test_a_configuration_that_holds_code_is_refused(tmp_path):
    marker = tmp_path / "marker"
    config = tmp_path / "config.yaml"
    config.write_text(f"output_dir: {tmp_path}\nrun_name: !!python/object/apply:os.mkdir ['{marker}']\n")
    with pytest.raises(yaml.constructor.ConstructorError):
        TrlParser(DatasetPolicyGradientConfig).parse_args_and_config(["--config", str(config)])
    assert not marker.exists()


@pytest.fixture
def model_with_code(tmp_path, causal_lm):
    """A folder whose configuration names a class in a file beside it, which leaves a mark when it is imported."""
    folder, marker = tmp_path / "model", tmp_path / "marker"
    causal_lm().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "own.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    return str(folder), marker


def test_a_model_that_holds_code_is_refused(model_with_code, make_trainer, tokenizer):
    """Unless the user says otherwise; nobody is asked at a prompt, either."""
    folder, marker = model_with_code
    metric = LMHeadPattern([[1, -1], [-1, 1]])
    for load in (
        lambda: load_target_model(folder),
        lambda: load_target_tokenizer(folder),
        lambda: MetagradientReward(folder, metric, processing_class=tokenizer),
        lambda: make_trainer(target_model=folder),
        lambda: make_trainer(model=folder),
    ):
        with pytest.raises(ValueError, match="trust_remote_code"):
            load()
    assert not marker.exists()


def test_code_of_a_variants_model_runs_if_the_user_says_so(model_with_code, make_trainer):
    folder, marker = model_with_code
    with pytest.raises(AttributeError, match="own"):  # the file has none of the classes
        make_trainer(target_variants=[{}, {"model": folder}], trust_remote_code=True)
    assert marker.exists()


def test_weights_are_safetensors(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model()
    pickles = {path.name for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")}
    assert pickles == {"training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"}  # Transformers' own
    assert {path.parent.name for path in tmp_path.rglob("model.safetensors")} == {"dpg", "checkpoint-1"}


# Files and tokens


def written(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", ["../../../escaped", "/escaped", "a/../../../../escaped"])
def test_names_do_not_lead_out_of_the_folder(name, make_config, make_trainer, tmp_path):
    """Of a run, a repository, a generator, a validation set, a data set."""
    prompts = tiny_prompts(16, 3)
    args = make_config(
        output_dir=str(tmp_path / "one" / "two" / "run"), run_name=name, hub_model_id=name, max_steps=1, save_strategy="steps",
        save_steps=1, eval_strategy="steps", eval_steps=1, report_to="tensorboard", log_completions=True,
    )  # fmt: skip
    trainer = make_trainer(args=args, eval_dataset={name: prompts["test"]})
    trainer.model.config._name_or_path = name
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(model_name=name, dataset_name=name)
    assert written(tmp_path / "one" / "two" / "run")
    assert [path for path in written(tmp_path) if (tmp_path / "one" / "two" / "run") not in path.parents] == []
    assert not Path("/escaped").exists()


def test_no_token_is_written_anywhere(make_config, make_trainer, tmp_path, monkeypatch, caplog, capfd):
    """Every byte of what a run writes: checkpoints, arguments, events, cards, completions, logs, report, the terminal."""
    tokens = {name: f"hf_{name}{'x' * 20}" for name in ("environment", "argument", "keyword", "target", "own")}
    monkeypatch.setenv("HF_TOKEN", tokens["environment"])
    command = [
        "train.py",
        "--hub_tok",
        tokens["argument"],
        f"--hub-token={tokens['argument']}",
        "--my_token",
        tokens["own"],
    ]
    command += [
        "--model_init_kwargs",
        json.dumps({"token": tokens["keyword"]}),
        "--dataset_name",
        "/home/me/data.jsonl",
    ]
    command += [f'--target_model_init_kwargs={{"token": "{tokens["target"]}"}}', "--output_dir=/home/me/run"]
    monkeypatch.setattr("sys.argv", command)
    generator, target = save_tiny_models(str(tmp_path / "models"))
    output = tmp_path / "run"
    args = make_config(
        output_dir=str(output), hub_token=tokens["argument"], model_init_kwargs={"token": tokens["keyword"]},
        target_model_init_kwargs={"token": tokens["target"]}, max_steps=1, save_strategy="steps", save_steps=1,
        eval_strategy="steps", eval_steps=1, report_to="tensorboard", log_completions=True,
    )  # fmt: skip
    with caplog.at_level(logging.DEBUG):
        trainer = make_trainer(
            model=generator, target_model=target, args=args, processing_class=None, target_processing_class=None
        )
        trainer.train()
        trainer.save_model()
        trainer.create_model_card()
        print(args, repr(args))
    assert args.hub_token == tokens["argument"] and args.target_model_init_kwargs == {"token": tokens["target"]}
    names = [path.name for path in written(output)]
    for expected in (
        "training_args.bin",
        "trainer_state.json",
        "README.md",
        "dpg.json",
        "dpg_state.json",
        "rng_state.pth",
    ):
        assert expected in names
    assert any(name.startswith("events.out.tfevents") for name in names)
    out, err = capfd.readouterr()
    contents = {str(path): path.read_bytes() for path in written(output)}
    contents |= {"log": caplog.text.encode(), "stdout": out.encode(), "stderr": err.encode()}
    assert [
        (where, name) for where, data in contents.items() for name, token in tokens.items() if token.encode() in data
    ] == []
    shown = json.loads((output / "report" / "run.json").read_text())["command"]
    assert "--my_token HIDDEN" in shown and "--dataset_name data.jsonl" in shown and "--output_dir=run" in shown
    assert "/home" not in shown
    saved = torch.load(output / "training_args.bin", weights_only=False)
    assert saved.hub_token is None and saved.target_learning_rate == args.target_learning_rate


# Dependencies


def test_every_dependency_has_its_reason():
    """One row of docs/dependencies.md for each package that `pyproject.toml` asks for, and no other."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    asked = {
        requirement.split("[")[0].split(">")[0].split("<")[0].strip() for group in groups for requirement in group
    }
    rows = [
        line.split("|")
        for line in (ROOT / "docs" / "dependencies.md").read_text().splitlines()
        if line.startswith("| `")
    ]
    named = {row[1].strip().strip("`") for row in rows}
    assert named == asked - {"trl-dpg"} and len(named) == len(rows)
    assert all(cell.strip() for row in rows for cell in row[1:-1])
