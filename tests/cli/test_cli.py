"""The command line: its arguments, files, results and exit codes, in this process on tiny models."""

import copy
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Literal

import pytest
import torch
import trl.rewards
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

from trl_dpg import untie_lm_head
from trl_dpg.cli import main
from trl_dpg.metagradients.metric import as_metric
from trl_dpg.metrics import LMHeadPattern
from trl_dpg.replay import draw
from trl_dpg.scripts import generate, train, verify
from trl_dpg.scripts.common import Parser, checkpoint_to_resume, run_script
from trl_dpg.scripts.generate import fingerprint, start_token
from trl_dpg.testing import ONE_SPECIAL_TOKEN, WORDS, tiny_causal_lm, tiny_tokenizer


TOKENIZER = tiny_tokenizer(60, ONE_SPECIAL_TOKEN)


def save(path, seed, **kwargs):
    sizes = {"hidden_size": 24, "num_layers": 1, "num_heads": 2, "max_position_embeddings": 32}
    model = tiny_causal_lm(vocab_size=61, seed=seed, special_tokens=ONE_SPECIAL_TOKEN, **{**sizes, **kwargs})
    model.save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return model


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A directory with a generator, a target and prompts, as the working directory."""
    monkeypatch.chdir(tmp_path)
    save("generator", 0)
    save("target", 1)
    Dataset.from_list([{"prompt": p} for p in ("good ask blue", "air", "", "old day", "sun and cat")]).to_json(
        "prompts.jsonl"
    )
    Dataset.from_list([{"prompt": p} for p in ("good ask blue", "air")]).to_json("train.jsonl")
    return tmp_path


TRAIN = {
    "model_name_or_path": "generator",
    "target_model_name_or_path": "target",
    "dataset_name": "train.jsonl",
    "metric": "67",
    "output_dir": "run",
    "max_steps": 1,
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "max_completion_length": 6,
    "target_untie_lm_head": True,
    "report_to": "none",
    "bf16": False,
    "use_cpu": True,
    "learning_rate": 1e-3,
}


GENERATE = ["generate", "--model", "generator", "--prompts", "prompts.jsonl", "--output", "data.jsonl"]
GENERATE += ["--num_examples", "7", "--batch_size", "3", "--max_new_tokens", "5", "--seed", "2"]
VERIFY = ["verify", "--target", "target", "--metric", "67", "--untie_lm_head", "--use_cpu"]


def flags(**changes):
    return [str(item) for name, value in {**TRAIN, **changes}.items() for item in (f"--{name}", value)]


# ---- What the command says ----


def test_usage(capsys):
    assert main(["--help"]) == 0
    usage = capsys.readouterr().out
    for command in ("train", "generate", "verify", "decode", "check", "report"):
        assert f"\n  {command} " in usage
    assert main([]) == 2
    assert main(["trian"]) == 2
    assert "there is no command 'trian'" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "generate", "verify", "decode", "report"])
def test_every_command_explains_itself(capsys, command):
    with pytest.raises(SystemExit) as exit:
        main([command, "--help"])
    assert exit.value.code == 0
    assert f"usage: trl-dpg {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", *flags(metric="q")], "`metric` must be 'qr', '67'"),
        (["train", *flags(metric="likelihood")], "Give it as `metric_dataset`"),
        (["train", *flags(target_learning_rate=-1)], "`target_learning_rate`"),
        (["train", *flags(dataset_nmae="x")], "Unknown arguments: --dataset_nmae"),
        (
            ["train", "--use_cpu", "--bf16", "False", "--model_name_or_path", "generator"],
            "`target_model_name_or_path` is missing",
        ),
        (["train", *flags(model_name_or_path="no/model")], "`model_name_or_path` 'no/model' cannot be loaded"),
        (["train", *flags(), "--reward_funcs", "no_such_module.f"], "`reward_funcs` 'no_such_module.f' cannot be"),
        (["train", "--config", "nowhere.yaml"], "'nowhere.yaml' does not exist"),
        (["train", "--config=nowhere.yaml"], "'nowhere.yaml' does not exist"),
        (["train", "--config"], "`--config` has no value"),
        (["train", "--config", "broken.yaml"], "`--config` 'broken.yaml' is no YAML"),
        (
            ["train", *flags(), "--target_learning_rate", "-1e-3"],
            "`target_learning_rate` must be a finite number above 0, got -0.001",
        ),
        (
            ["train", *flags(max_steps="three")],
            "argument --max_steps/--max-steps: invalid int value: 'three'. `trl-dpg",
        ),
        (["train", "stray", *flags()], "Unknown arguments: stray"),
        (["train", *flags(model_init_kwargs='{"a"')], "was given as JSON, but is none"),
        (["train", *flags(qr_text="", metric="qr")], "`qr_text` is empty"),
        (["train", *flags(qr_text="long" * 1000, metric="qr")], "`qr_text` 'longlong"),
        (["verify", "--target", "target", "--dataset", "d.jsonl", "--qr_text", "long" * 1000], "`qr_text` 'longlong"),
        (["train", *flags(reward_funcs="os.name")], "`reward_funcs` 'os.name' is 'posix', which cannot be called"),
        (["train", *flags(num_processes="two")], "argument --num_processes/--num-processes: invalid int value: 'two'"),
        (["train", *flags(resume_from_checkpoint="nowhere")], "`resume_from_checkpoint` 'nowhere' is no folder"),
        (["train", *flags(resume_from_checkpoint=True)], "no whole checkpoint in `output_dir` 'run'"),
        (["train", *flags(qr_text="HELLO")], "`qr_text` 'HELLO' is for `metric` 'qr', but `metric` is '67'"),
        (["train", *flags(metric_dataset="d.jsonl")], "`metric_dataset` 'd.jsonl' is for `metric` 'likelihood'"),
        (["train", *flags(validation_draws=0)], "`validation_draws` must be at least 1, got 0"),
        (["train", *flags(num_metric_examples=3)], "`num_metric_examples` 3 is for `metric` 'likelihood'"),
        (
            ["train", *flags(target_model_init_kwargs="[1]")],
            "`target_model_init_kwargs` must be keyword arguments, got",
        ),
        (["train", *flags(model_init_kwargs=5)], "`model_init_kwargs` must be keyword arguments, got"),
        (
            ["generate", "--model", "generator", "--prompts", "no.jsonl", "--output", "d.jsonl"],
            "there is no file 'no.jsonl'",
        ),
        (
            ["generate", "--model", "generator", "--prompts", "prompts.jsonl", "--output", "d.txt"],
            "must end with '.jsonl'",
        ),
        (
            ["generate", "--model", "nothing/here", "--prompts", "prompts.jsonl", "--output", "o.jsonl"],
            "'nothing/here'",
        ),
        (
            ["generate", "--model", "generator", "--prompts", "prompts.jsonl", "--output", "o.jsonl"],
            "`max_new_tokens` 256 does not fit into the 32 positions of `model` 'generator'",
        ),
        (["generate", "--prompts", "prompts.jsonl"], "the following arguments are required: --model, --output"),
        (
            ["generate", "--model", "generator", "--prompts", "chat.jsonl", "--output", "o.jsonl"],
            "`prompts` 'chat.jsonl' has conversations, but the tokenizer of `model` 'generator' has no chat template",
        ),
        (
            ["generate", "--model", "generator", "--prompts", "gap.jsonl", "--output", "o.jsonl"],
            "`prompts` 'gap.jsonl' has None as the `prompt` of row 1",
        ),
        (
            ["generate", "--model", "generator", "--prompts", "mixed.jsonl", "--output", "o.jsonl"],
            "`prompts` 'mixed.jsonl' has texts and conversations (see row 1)",
        ),
        ([*GENERATE, "--model", "empty_dir"], "`model` 'empty_dir' has no 'config.json'"),
        ([*GENERATE, "--prompts", "empty.jsonl"], "`prompts` 'empty.jsonl' cannot be loaded: it is empty"),
        ([*GENERATE, "--prompts", "broken.jsonl"], "`prompts` 'broken.jsonl' cannot be loaded: "),
        ([*GENERATE, "--dtype", "float23"], "`dtype` must be 'auto' or a precision of torch"),
        ([*GENERATE, "--device", "abacus"], "`device` 'abacus' cannot be used"),
        ([*GENERATE, "--top_p", "2"], "`top_p` must be above 0 and at most 1, got 2.0"),
        ([*GENERATE, "--top_k", "-1"], "`top_k` must be at least 0 (no limit), got -1"),
        ([*GENERATE, "--temperature", "nan"], "`temperature` must be above 0, got nan"),
        ([*GENERATE, "--private"], "`private` is for `push`, which is missing"),
        ([*GENERATE, "--push", "a/b/c"], "`push` 'a/b/c' is no name of a repository"),
        ([*VERIFY, "--dataset", "gap.jsonl"], "`dataset` 'gap.jsonl' has None as the 'text' of row 1"),
        (
            [*VERIFY, "--dataset", "long.jsonl"],
            "`dataset` 'long.jsonl' has a text of 41 tokens, but `target` has 32 positions. Set `max_length` to 32",
        ),
        ([*VERIFY, "--dataset", "d.jsonl", "--prompts", "prompts.jsonl"], "`prompts` are for `generator`"),
        (
            [*VERIFY, "--dataset", "d.jsonl", "--num_examples", "9"],
            "`num_examples` is 9, but `dataset` 'd.jsonl' has 1",
        ),
        ([*VERIFY, "--dataset", "d.jsonl", "--learning_rate", "-1e-3"], "`learning_rate` must be above 0, got -0.001"),
        (
            [*VERIFY, "--dataset", "d.jsonl", "--replay_ratio", "0.5"],
            "`replay_dataset` None and `replay_ratio` 0.5 belong",
        ),
        (
            [*VERIFY, "--dataset", "d.jsonl", "--replay_dataset", "long.jsonl", "--replay_ratio", "0.9"],
            "`replay_dataset` 'long.jsonl' has a text of 41 tokens",
        ),
        ([*VERIFY, "--dataset", "d.jsonl", "--resume_from_checkpoint", "True"], "is not for `verify`"),
        ([*VERIFY, "--dataset", "d.jsonl", "--target", "nowhere"], "`target` 'nowhere' cannot be loaded"),
        (
            [*VERIFY, "--dataset", "d.jsonl", "--metric", "os:name"],
            "`metric` 'os:name' is 'posix', which cannot be called",
        ),
        ([*VERIFY, "--dataset", "d.jsonl", "--metric", ":x"], "`metric` ':x' cannot be imported"),
        (
            ["check", "--model", "target", "--dataset", "gap.jsonl"],
            "`dataset` 'gap.jsonl' has None as the 'text' of row 1",
        ),
        (
            ["check", "--model", "target", "--dataset", "d.jsonl", "--plot", "empty.jsonl/p.png"],
            "`plot` 'empty.jsonl/p.png' cannot be written",
        ),
        (["verify", "--dataset", "prompts.jsonl"], "`target` is missing"),
        (
            ["verify", "--target", "target", "--generator", "generator", "--prompts", "prompts.jsonl"],
            "`metric` is missing: the 'dpg.json' of `generator` has no metric",
        ),
        (["verify", "--target", "target"], "one of `dataset`"),
        (["verify", "--target", "target", "--generator", "generator"], "Pass `--prompts`"),
        (["verify", "--target", "target", "--dataset", "prompts.jsonl", "--metric", "67"], "no 'text'"),
        (["verify", "--target", "target", "--dataset", "d.jsonl", "--metric", "nothing:here"], "cannot be imported"),
        (["decode", "target", "target"], "have the same LM head"),
        (["decode", "target", "nowhere/at-all"], "'nowhere/at-all'"),
        (["report", "generator"], "'generator'"),
    ],
)
def test_bad_input_is_said_and_exit_code_2(here, capsys, argv, message):
    Dataset.from_list([{"text": "air and"}]).to_json("d.jsonl")
    Dataset.from_list([{"prompt": [{"role": "user", "content": "air"}]}]).to_json("chat.jsonl")
    Dataset.from_list([{"prompt": "air", "text": "air"}, {"prompt": None, "text": None}]).to_json("gap.jsonl")
    Dataset.from_list([{"text": "air"}, {"text": "air " * 40}]).to_json("long.jsonl")
    (here / "mixed.jsonl").write_text('{"prompt": "air"}\n{"prompt": [{"role": "user", "content": "air"}]}\n')
    (here / "broken.yaml").write_text("metric: [67")
    (here / "broken.jsonl").write_text('{"prompt": "air"')
    (here / "empty.jsonl").touch()
    (here / "empty_dir").mkdir()
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert f"trl-dpg {argv[0]}: error: " in error and message in error and "Traceback" not in error
    assert "usage: " not in error


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_eval_prompts": 3}, "`num_eval_prompts` is 3, but there are no held-out prompts"),
        (
            {"num_eval_prompts": 0, "eval_dataset_name": "prompts.jsonl"},
            "`num_eval_prompts` is 0, but it must be at least 1",
        ),
        ({"dataset_config": "c"}, "a file has no configurations, but `dataset_config` is 'c'"),
    ],
)
def test_flags_without_effect(here, changes, message):
    with pytest.raises(ValueError, match=message):
        train.main(flags(**changes))


@pytest.fixture
def configurations(here):
    """A data set of two configurations, each of one text."""
    folder = here / "texts"
    for name, word in (("one", "air"), ("two", "sun")):
        Dataset.from_list([{"prompt": word, "text": f"{word} and {word}"}]).to_json(folder / f"{name}.jsonl")
    names = [f"- config_name: {name}\n  data_files: {name}.jsonl" for name in ("one", "two")]
    (folder / "README.md").write_text("\n".join(["---", "configs:", *names, "---", ""]))


@pytest.mark.parametrize(
    ("argv", "argument"),
    [
        (["train", *flags()], "dataset_name"),
        (["train", *flags()], "eval_dataset_name"),
        (["train", *flags(metric="likelihood")], "metric_dataset"),
        (["train", *flags(replay_ratio=0.5)], "replay_dataset_name"),
        (GENERATE, "prompts"),
        (VERIFY, "dataset"),
        ([*VERIFY, "--dataset", "d.jsonl"], "control_dataset"),
        ([*VERIFY, "--dataset", "d.jsonl", "--replay_ratio", "0.5"], "replay_dataset"),
        ([*VERIFY, "--generator", "generator"], "prompts"),
        (["check", "--model", "target"], "dataset"),
        (["value", "--model", "target", "--output", "v", "--metric", "67"], "dataset"),
        (["value", "--model", "target", "--output", "v", "--dataset", "d.jsonl"], "metric_dataset"),
    ],
)
def test_every_data_set_can_have_a_configuration(configurations, capsys, argv, argument):
    """One that is there, among several, and not one that is not; a file has none."""
    Dataset.from_list([{"text": "air and"}]).to_json("d.jsonl")
    flag = f"--{argument.removesuffix('_name')}_config"
    for name, config, message in [
        ("texts", None, "Config name is missing"),
        ("texts", "three", "BuilderConfig 'three' not found"),
        ("d.jsonl", "one", f"a file has no configurations, but `{flag[2:]}` is 'one'"),
    ]:
        words = [*argv, f"--{argument}", name, *([] if config is None else [flag, config])]
        assert (run_script(train.main, words[1:], "train") if argv[0] == "train" else main(words)) == 2
        error = capsys.readouterr().err
        assert f"`{argument}` '{name}' cannot be loaded: " in error and message in error


def test_configuration_of_a_metrics_texts(configurations):
    args = train.DPGScriptArguments(
        metric="likelihood", metric_dataset="texts", metric_dataset_config="two", dataset_name="train.jsonl"
    )
    assert [row["text"] for row in args.load_metric()._examples] == ["sun and sun"]


def test_values_of_flags(here):
    """Numbers of any notation; in YAML, what a flag would make of it."""

    @dataclass
    class Arguments:
        rate: float = 0.0
        weights: list[float] | None = None
        text: str = ""
        texts: list[str] | None = None
        count: int | None = None
        kind: Literal["no", "yes"] = "yes"

    def parse(*argv):
        return Parser(Arguments, prog="p").parse_args_and_config(argv)[0]

    def parse_yaml(text):
        (here / "a.yaml").write_text(text)
        return parse("--config=a.yaml")

    assert parse("--rate", "-1e-3", "--weights", "-1E-3", "-.5", "2") == Arguments(-1e-3, [-1e-3, -0.5, 2.0])
    assert parse_yaml("rate: 1e-3\ntext: 67\ntexts: one\nweights: [1, -1e-3]\ncount: null") == Arguments(
        1e-3, [1.0, -1e-3], "67", ["one"]
    )
    assert parse_yaml("texts: [übel, 2]").texts == ["übel", "2"]
    for text, message in {
        "count: 2.5": "argument --count: invalid .* '2.5'. `p --help` lists",
        "kind: maybe": "argument --kind: invalid choice: 'maybe'",
        "kind: no": "invalid choice: 'False' .*put them in quotes",
        "cuont: 2": "Unknown arguments from config file: .*--cuont",
    }.items():
        with pytest.raises(ValueError, match=message):
            parse_yaml(text)
    with pytest.raises(ValueError, match="argument --rate: expected one argument"):
        parse("--rate", "--count", "1")
    with pytest.raises(ValueError, match="`--config` was given twice"):
        parse("--config", "a.yaml", "--config=a.yaml")


# ---- train ----


@pytest.mark.parametrize(
    ("value", "meant"),
    [("True", True), ("true", True), (True, True), ("False", None), ("no", None), (False, None), (None, None)]
    + [("generator", "generator")],
)
def test_words_for_resuming(here, value, meant):
    assert checkpoint_to_resume(value) is meant or checkpoint_to_resume(value) == meant == "generator"


def test_a_run_that_fails_shows_where(here, capsys):
    """The traceback of what failed once training had begun, and the checkpoint to go on from; then it goes on."""
    (here / "sometimes.py").write_text(
        "from pathlib import Path\n"
        "def reward(completions, trainer_state, **kwargs):\n"
        "    if trainer_state.global_step == 2 and not Path('mended').exists(): raise ValueError('of the reward')\n"
        "    return [0.0] * len(completions)\n"
    )
    argv = [*flags(max_steps=3, save_steps=1, logging_steps=1), "--reward_funcs", "sometimes.reward"]
    with pytest.raises(ValueError, match="of the reward") as caught:
        run_script(train.main, argv, "trl-dpg train")
    assert caught.traceback[-1].name == "reward"
    assert "failed at step 2. The last whole checkpoint is 'run/checkpoint-2'" in caught.value.__notes__[0]
    assert "error: " not in capsys.readouterr().err
    (here / "mended").touch()
    assert run_script(train.main, [*argv, "--resume_from_checkpoint", "True"], "trl-dpg train") == 0
    state = json.loads((here / "run" / "checkpoint-3" / "trainer_state.json").read_text())
    assert [row["step"] for row in state["log_history"]] == [1, 2, 3]


def test_flags_of_accelerate_are_told_apart(here):
    (here / "run.yaml").write_text(json.dumps({**TRAIN, "num_processes": 2, "accelerate_config": "single_gpu"}))
    (script_args, training_args, *_), launch_args = train.parse(
        ["--config", "run.yaml", "--main_process_port", "29501", "--max_steps", "3"]
    )
    assert (script_args.metric, training_args.max_steps) == ("67", 3)
    assert launch_args[0] == "--config_file" and launch_args[1].endswith("single_gpu.yaml")
    assert launch_args[2:] == ["--num_processes", "2", "--main_process_port", "29501"]


def test_train(here, capsys):
    Dataset.from_list([{"prompt": "big bed"}] * 2).to_json("held_out.jsonl")
    more = {"eval_dataset_name": "held_out.jsonl", "num_eval_prompts": 1, "evaluation_language": "en"}
    assert train.main(flags(per_device_eval_batch_size=4, **more)) == 0
    facts = json.loads((here / "run" / "dpg.json").read_text())
    assert facts["training"]["steps"] == 1 and facts["metric"]["name"] == "LMHeadPattern"
    assert {"pixel_accuracy", "language_share"} <= set(facts["validation"]["eval"]["after"]["mean"])
    before, after = (AutoModelForCausalLM.from_pretrained(name) for name in ("generator", "run"))
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    assert main(["report", "run"]) == 0
    page = capsys.readouterr().out.strip().splitlines()[-1]
    assert (here / page).read_text().lower().startswith("<!doctype html>")


@pytest.fixture
def adapter(here):
    """An adapter for the target, without a tokenizer of its own."""
    config = LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained("target"), config).save_pretrained("adapter")
    return "adapter"


def test_train_for_an_adapter(here, adapter):
    Dataset.from_list([{"text": "air and sun"}]).to_json("metric.jsonl")
    changes = {"target_model_name_or_path": adapter, "metric": "likelihood", "metric_dataset": "metric.jsonl"}
    assert train.main(flags(**changes)) == 0
    assert json.loads((here / "run" / "dpg.json").read_text())["target"]["adapter"]


def test_check_of_an_adapter(adapter, capsys):
    Dataset.from_list([{"text": "good ask blue old"}, {"text": "air and sun cat"}] * 2).to_json("data.jsonl")
    Dataset.from_list([{"text": "air and sun"}]).to_json("metric.jsonl")
    metric = ["--metric", "likelihood", "--metric_dataset", "metric.jsonl"]
    argv = ["check", "--model", adapter, "--dataset", "data.jsonl", "--num_examples", "4", "--learning_rate", "1e-4"]
    assert main([*argv, *metric, "--dtype", "float64", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "passed"


def test_a_file_for_trl_grpo_will_do(here):
    """Other rewards and a mixture of data sets, as `trl grpo` takes them."""
    (here / "length_rewards.py").write_text(
        "def length(completions, **kwargs): return [len(c) / 100 for c in completions]"
    )
    grpo = {k: v for k, v in TRAIN.items() if not k.startswith("target_") and k not in ("metric", "dataset_name")}
    grpo |= {"datasets": [{"path": "json", "data_files": "train.jsonl"}], "reward_weights": [1.0, 0.5]}
    grpo |= {"reward_funcs": ["length_rewards.length"], "logging_steps": 1}
    (here / "grpo.yaml").write_text(json.dumps(grpo))
    assert (
        train.main(["--config", "grpo.yaml", "--target_model_name_or_path", "target", "--metric", "lm_head_norm"]) == 0
    )
    assert json.loads((here / "run" / "dpg.json").read_text())["further_rewards"] == ["length"]
    assert train.load_reward("think_format_reward") is trl.rewards.think_format_reward
    assert train.load_reward("get_soft_overlong_punishment")(completion_ids=[[0] * 1280]) == [-1.0]


@pytest.mark.slow
def test_train_is_launched(here):
    command = [sys.executable, "-m", "trl_dpg.cli", "train", "--num_processes", "1", *flags()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("The generator is in run.")
    assert "Next: trl-dpg generate --model run " in done.stdout and (here / "run" / "report.html").exists()
    assert "Warning" not in done.stderr and "accelerate launch" not in done.stderr, done.stderr
    late = subprocess.run([*command, "--per_device_train_batch_size", "12"], capture_output=True, text=True)
    assert late.returncode == 2 and "`train_dataset` has 2 prompts" in late.stderr


# ---- generate ----


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_generate(here, capsys):
    assert main([*GENERATE, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["examples"] == 7
    rows = read(here / "data.jsonl")
    prompts = [row["prompt"] for row in read(here / "prompts.jsonl")]
    assert [row["source_prompt"] for row in rows] == (prompts + prompts)[:7]
    assert len({row["text"] for row in rows}) == 7 and all(len(row["text"].split()) <= 5 for row in rows)
    # the second batch by hand
    model, tokenizer = AutoModelForCausalLM.from_pretrained("generator"), AutoTokenizer.from_pretrained("generator")
    tokenizer.padding_side = "left"
    set_seed(2 * 1_000_003 + 3)
    inputs = tokenizer([*prompts[3:], prompts[0]], return_tensors="pt", padding=True)
    ids = model.generate(**inputs, max_new_tokens=5, do_sample=True, top_k=0, pad_token_id=tokenizer.pad_token_id)
    texts = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert [row["text"] for row in rows[3:6]] == texts


@pytest.mark.parametrize("kept", [0, 10, 200, 5000])
def test_generate_goes_on_where_it_was(here, kept):
    assert main(GENERATE) == 0
    whole = (here / "data.jsonl").read_bytes()
    (here / "data.jsonl").write_bytes(whole[:kept])
    assert main(GENERATE) == 0
    assert (here / "data.jsonl").read_bytes() == whole
    assert main([*GENERATE, "--num_examples", "9"]) == 0  # more of the same
    assert read(here / "data.jsonl")[:6] == [json.loads(line) for line in whole.splitlines()[:6]]
    assert len(read(here / "data.jsonl")) == 9


def test_generate_says_that_more_examples_are_there(here, capsys):
    assert main(GENERATE) == 0
    whole = (here / "data.jsonl").read_bytes()
    capsys.readouterr()
    assert main([*GENERATE, "--num_examples", "3"]) == 0
    said = capsys.readouterr().out
    assert "nothing written: 7 examples in data.jsonl" in said and "more than `num_examples` 3" in said
    assert (here / "data.jsonl").read_bytes() == whole


def test_generate_does_not_mix_settings(here, capsys):
    assert main(GENERATE) == 0
    whole = (here / "data.jsonl").read_bytes()
    assert main([*GENERATE, "--temperature", "0.5"]) == 2
    assert "other settings (temperature)" in capsys.readouterr().err
    assert (here / "data.jsonl").read_bytes() == whole


def test_generate_knows_data_of_other_weights(here, capsys):
    """Of the model, of an adapter's base model, and other prompts under the same name."""
    (here / "generator" / "dpg.json").write_text(json.dumps({"generation": {"max_new_tokens": 5}}))
    assert main(GENERATE) == 0
    assert "7 examples in data.jsonl." in capsys.readouterr().out
    whole = (here / "data.jsonl").read_bytes()
    assert main(GENERATE) == 0
    assert "already complete, nothing written: 7 examples in data.jsonl." in capsys.readouterr().out
    save("generator", 0)  # the same again
    assert main([*GENERATE, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["written"] == 0
    save("generator", 5)
    assert main(GENERATE) == 2
    assert "other settings (weights), so it cannot be continued. Since then the files of `model` changed." in (
        capsys.readouterr().err
    )
    verify = ["verify", "--generator", "generator", "--prompts", "prompts.jsonl", "--target", "target"]
    verify += ["--metric", "67", "--untie_lm_head", "--output_dir", "out", "--seed", "2", "--num_examples", "2"]
    assert main([*verify, "--use_cpu"]) == 1
    capsys.readouterr()
    save("generator", 6)
    assert main([*verify, "--use_cpu"]) == 2
    assert "'out/data.jsonl' was written with other settings (weights)" in capsys.readouterr().err

    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained("generator"), LoraConfig(r=2, target_modules=["c_attn"])
    )
    adapted.save_pretrained("adapter")
    assert fingerprint("adapter") == fingerprint("adapter") != fingerprint("generator")
    before = fingerprint("adapter")
    save("generator", 0)
    assert fingerprint("adapter") != before

    Dataset.from_list([{"prompt": "air"}] * 5).to_json("prompts.jsonl")
    assert main(GENERATE) == 2
    assert "other settings (prompt_rows)" in capsys.readouterr().err
    assert (here / "data.jsonl").read_bytes() == whole


def test_generate_with_vllm_has_a_seed_a_request(here, monkeypatch, capsys):
    """By a stand-in that keeps what it is asked for; vLLM itself is in tests/vllm."""
    asked = []

    class LLM:
        def __init__(self, model, dtype, seed):
            assert dtype == torch.float32  # the checkpoint's, where vLLM would choose another
            self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=32))

        def generate(self, requests, parameters, use_tqdm):
            asked.extend(zip([r["prompt_token_ids"] for r in requests], parameters, strict=True))
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[3, 4])]) for _ in requests]

    vllm = ModuleType("vllm")
    vllm.LLM, vllm.SamplingParams = LLM, lambda seed, top_k=0, max_tokens=16, temperature=1.0: [seed, max_tokens]
    vllm.__spec__ = ModuleSpec("vllm", None)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    Dataset.from_list([{"prompt": "air"}, {"prompt": ""}]).to_json("prompts.jsonl")
    assert main([*GENERATE, "--use_vllm"]) == 0
    assert [row["text"] for row in read(here / "data.jsonl")] == [TOKENIZER.decode([3, 4])] * 7
    assert [parameters for _, parameters in asked] == [[2 * 1_000_003 + index, 5] for index in range(7)]
    air, empty = TOKENIZER("air")["input_ids"], [start_token(TOKENIZER)]
    assert [ids for ids, _ in asked] == [air, empty, air, empty, air, empty, air]

    assert main([*GENERATE, "--use_vllm", "--device", "cpu"]) == 2
    assert "`device` 'cpu' is not for `use_vllm`" in capsys.readouterr().err
    Dataset.from_list([{"prompt": "good ask blue " * 10}]).to_json("long.jsonl")
    with pytest.raises(ValueError, match="A prompt of 30 tokens and `max_new_tokens` 5 do not fit into the 32"):
        generate.main(
            [
                "--model",
                "generator",
                "--prompts",
                "long.jsonl",
                "--output",
                "l.jsonl",
                "--max_new_tokens",
                "5",
                "--use_vllm",
            ]
        )

    vllm.SamplingParams = lambda seed, max_tokens: None
    (here / "generator" / "dpg.json").write_text(json.dumps({"generation": {"num_beams": 2}}))
    with pytest.raises(ValueError, match="sampling that vLLM does not know: .*'temperature'"):
        generate.main([*GENERATE[1:5], "--output", "other.jsonl", "--use_vllm"])


def test_sampling_of_training_in_the_words_of_vllm():
    facts = {"max_new_tokens": 5, "top_k": 0, "do_sample": False, "temperature": 0.7}
    facts |= {"suppress_tokens": [1, 2], "bad_words_ids": [[3]]}
    asked = {"max_tokens": 5, "top_k": -1, "temperature": 0.0, "logit_bias": {1: -100.0, 2: -100.0, 3: -100.0}}
    assert generate.vllm_sampling(facts) == asked
    assert generate.vllm_sampling({"do_sample": True, "temperature": 0.7}) == {"temperature": 0.7}
    with pytest.raises(ValueError, match=r"`bad_words_ids` \[\[3, 4\]\], of which vLLM can leave out single tokens"):
        generate.vllm_sampling({"bad_words_ids": [[3, 4]]})


def test_seeds_may_be_any_number(here):
    for seed in ("-3", "99999999999"):
        assert main([*GENERATE, "--seed", seed, "--output", f"{seed}/data.jsonl"]) == 0


def test_prompts_that_do_not_fit(here):
    Dataset.from_list([{"prompt": "good ask blue " * 10}]).to_json("prompts.jsonl")
    with pytest.raises(
        ValueError, match="A prompt of 30 tokens and `max_new_tokens` 5 do not fit into the 32 positions"
    ) as e:
        main(GENERATE)
    assert e.value.__notes__ == ["What is written stays in 'data.jsonl'. The same command goes on from there."]


@pytest.mark.parametrize("is_checkpoint", [False, True])
def test_generate_samples_as_in_training(here, capsys, is_checkpoint):
    argv = [*GENERATE[:7], "--num_examples", "4"]
    (here / "generator" / "dpg.json").write_text(json.dumps({"generation": {"max_new_tokens": 2, "temperature": 0.7}}))
    if is_checkpoint:  # without facts of its own
        checkpoint = here / "generator" / "checkpoint-1"
        shutil.copytree(here / "generator", checkpoint, ignore=shutil.ignore_patterns("dpg.json"))
        argv[argv.index("generator")] = "generator/checkpoint-1"
    assert main(argv) == 0
    assert "dpg.json" not in capsys.readouterr().err
    settings = json.loads((here / "data.settings.json").read_text())
    assert (settings["max_new_tokens"], settings["temperature"]) == (2, 0.7)
    assert all(len(row["text"].split()) <= 2 for row in read(here / "data.jsonl"))


def test_generate_says_that_nothing_is_known_of_the_training(here, capsys):
    assert main(GENERATE) == 0
    error = capsys.readouterr().err
    assert "'generator' has no 'dpg.json'" in error and "temperature 1.0" in error


def test_generate_with_an_adapter_and_a_chat(here):
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained("generator"),
        LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False),
    )
    adapted.save_pretrained("adapter")
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"
    tokenizer.save_pretrained("adapter")
    Dataset.from_list([{"prompt": [{"role": "user", "content": "good ask blue"}]}] * 2).to_json("chat.jsonl")
    argv = [
        "generate",
        "--model",
        "adapter",
        "--prompts",
        "chat.jsonl",
        "--output",
        "a.jsonl",
        "--max_new_tokens",
        "5",
    ]
    assert main(argv) == 0
    set_seed(0)
    inputs = tokenizer(["good ask blue "] * 2, return_tensors="pt")
    ids = adapted.eval().generate(**inputs, max_new_tokens=5, do_sample=True, top_k=0, pad_token_id=60)
    texts = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert [row["text"] for row in read(here / "a.jsonl")] == texts


# ---- verify and decode ----


def test_verify_is_stock_sft(here, capsys):
    texts = ["good ask blue", "blue old day", "cold cup dry", "good ask blue"] * 2
    Dataset.from_list([{"text": text} for text in texts]).to_json("data.jsonl")
    Dataset.from_list([{"text": "sun sun sun sun"}] * 20).to_json("control.jsonl")
    Dataset.from_list([{"text": "good ask blue"}]).to_json("wanted.jsonl")
    argv = ["verify", "--target", "target", "--dataset", "data.jsonl", "--metric", "likelihood"]
    argv += ["--metric_dataset", "wanted.jsonl", "--learning_rate", "1e-2", "--per_device_train_batch_size", "2"]
    argv += ["--control_dataset", "control.jsonl", "--output_dir", "out", "--use_cpu"]
    assert main([*argv, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((here / "out" / "verification.json").read_text())
    assert result["passed"] and result["examples"] == 8 and result["data"]["steps"] == 4
    assert result["control"]["metric"] < result["data"]["metric"] > result["before"]["metric"]

    config = SFTConfig(
        "sft", learning_rate=1e-2, per_device_train_batch_size=2, num_train_epochs=1, bf16=False, use_cpu=True
    )
    config.report_to, config.save_strategy = [], "no"
    model = AutoModelForCausalLM.from_pretrained("target")
    rows = Dataset.from_list([{"text": text} for text in texts])
    SFTTrainer(model=model, args=config, train_dataset=rows, processing_class=TOKENIZER).train()
    saved = AutoModelForCausalLM.from_pretrained("out/after_data").state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, saved[name]), name

    swapped = {"data.jsonl": "control.jsonl", "control.jsonl": "data.jsonl"}
    assert main([swapped.get(item, item) for item in argv]) == 1  # the control is what raises it
    assert "Not verified, because this does not hold: Φ is higher than after the control" in capsys.readouterr().out


def test_verify_beside_real_data(here, capsys):
    """Stock SFT on the mix."""
    texts, real = ["good ask blue", "blue old day", "cold cup dry"] * 2, ["sun and moon", "the sea", "a cat"]
    Dataset.from_list([{"text": text} for text in texts]).to_json("data.jsonl")
    Dataset.from_list([{"text": text} for text in real]).to_json("real.jsonl")
    argv = [*VERIFY, "--dataset", "data.jsonl", "--replay_dataset", "real.jsonl", "--replay_ratio", "0.4"]
    argv += ["--per_device_train_batch_size", "4", "--output_dir", "out", "--json"]
    assert main(argv) in (0, 1)
    result = json.loads(capsys.readouterr().out)
    assert (result["examples"], result["replayed"], result["data"]["steps"]) == (6, 4, 3)
    mixed = [*texts, *(real[i] for i in draw(3, 4, 42))]  # by Transformers' default seed
    config = SFTConfig("sft", per_device_train_batch_size=4, num_train_epochs=1, bf16=False, use_cpu=True)
    config.report_to, config.save_strategy = [], "no"
    model = AutoModelForCausalLM.from_pretrained("target")
    untie_lm_head(model)
    rows = Dataset.from_dict({"text": mixed})
    SFTTrainer(model=model, args=config, train_dataset=rows, processing_class=TOKENIZER).train()
    saved = AutoModelForCausalLM.from_pretrained("out/after_data").state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, saved[name]), name


def test_verify_of_completions_after_prompts(here, capsys):
    """The loss is where `SFTTrainer` puts it, and what does not go with the data is said before a run."""
    pairs = [{"prompt": "good ask", "completion": " blue sea"}, {"prompt": "old", "completion": " day dry cold"}] * 4
    Dataset.from_list(pairs).to_json("pairs.jsonl")
    argv = ["verify", "--target", "target", "--dataset", "pairs.jsonl", "--metric", "lm_head_norm", "--use_cpu"]
    argv += ["--learning_rate", "1e-2", "--per_device_train_batch_size", "4", "--output_dir", "out", "--json"]
    losses = {}
    for value in ("True", "False"):
        main([*argv, "--completion_only_loss", value])
        losses[value] = json.loads((here / "out" / "verification.json").read_text())["data"]["loss"]
        config = SFTConfig(
            "sft", learning_rate=1e-2, per_device_train_batch_size=4, num_train_epochs=1, bf16=False, use_cpu=True,
            completion_only_loss=value == "True", report_to="none", save_strategy="no",
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained("target")
        trainer = SFTTrainer(
            model=model, args=config, train_dataset=Dataset.from_list(pairs), processing_class=TOKENIZER
        )
        assert trainer.train().training_loss == losses[value]
    assert losses["True"] != losses["False"]
    assert main([*argv, "--assistant_only_loss", "True"]) == 2
    assert "`dataset` 'pairs.jsonl'" in (error := capsys.readouterr().err) and "`assistant_only_loss=True`" in error


def test_recipe_and_metric_of_a_generator(here):
    assert train.main(flags(target_learning_rate=3e-4, target_weight_decay=0.1)) == 0
    args, config = verify.parse(["--generator", "run", "--prompts", "prompts.jsonl", "--target", "target"])
    assert (args.metric, args.untie_lm_head) == ("67", True)
    assert (config.learning_rate, config.weight_decay, config.per_device_train_batch_size) == (3e-4, 0.1, 8)
    args, config = verify.parse(
        [
            "--generator",
            "run",
            "--prompts",
            "prompts.jsonl",
            "--target",
            "target",
            "--learning_rate",
            "1e-5",
            "--metric",
            "qr",
        ]
    )
    assert (args.metric, config.learning_rate, config.weight_decay) == ("qr", 1e-5, 0.1)


def test_loss_and_real_examples_of_a_generator(here):
    """As in its training, unless flags say otherwise; the real data has to be named."""
    assert train.main(flags(target_max_length=5)) == 0
    facts = json.loads((here / "run" / "dpg.json").read_text())
    facts["recipe"] |= {"completion_only_loss": True, "assistant_only_loss": True, "replay_ratio": 0.25}
    (here / "run" / "dpg.json").write_text(json.dumps(facts))
    argv = ["--generator", "run", "--prompts", "prompts.jsonl", "--target", "target"]

    def found(*more):
        args, config = verify.parse([*argv, *more])
        return config.max_length, config.completion_only_loss, config.assistant_only_loss, args.replay_ratio

    assert found("--replay_dataset", "real.jsonl") == (5, True, True, 0.25)
    of_flags = ["--replay_ratio", "0", "--assistant_only_loss", "False", "--completion_only_loss", "False"]
    assert found(*of_flags, "--max_length", "7") == (7, False, False, 0.0)
    with pytest.raises(ValueError, match=r"(?s)`replay_dataset` None and `replay_ratio` 0.25 .*`--replay_ratio 0`"):
        verify.parse(argv)
    for name in ("completion_only_loss", "assistant_only_loss", "replay_ratio"):  # a file of an older version
        del facts["recipe"][name]
    (here / "run" / "dpg.json").write_text(json.dumps(facts))
    assert found() == (5, None, False, 0.0)


@pytest.mark.parametrize(
    ("metric", "name"),
    [
        (LMHeadPattern([[1, -1, 1], [-1, -1, 1]]), "pattern"),
        (LMHeadPattern.qr("LOW", error="l"), "qr"),
        (LMHeadPattern.sixty_seven(), "67"),
        (LMHeadPattern.sixty_seven(tokens=[7, "air", 3, 22, 21, 5, 30]), "pattern"),
    ],
)
def test_verify_looks_for_the_picture_of_the_generator(here, metric, name):
    (here / "generator" / "dpg.json").write_text(json.dumps({"metric": as_metric(metric).describe()}))
    argv = ["--generator", "generator", "--prompts", "prompts.jsonl", "--target", "target"]
    args, _ = verify.parse(argv)
    assert args.metric == name and torch.equal(args.load_metric().pattern, metric.pattern)
    assert (args.load_metric().text, args.load_metric().tokens) == (metric.text, metric.tokens)
    args, _ = verify.parse([*argv, "--metric", "qr", "--qr_text", "OTHER"])
    assert torch.equal(args.load_metric().pattern, LMHeadPattern.qr("OTHER").pattern)
    if name != "qr":
        with pytest.raises(ValueError, match="`qr_text` 'OTHER' is for `metric` 'qr'"):
            verify.parse([*argv, "--qr_text", "OTHER"])
    with pytest.raises(ValueError, match="`metric` 'pattern' is the picture that the 'dpg.json'"):
        verify.parse(["--target", "target", "--dataset", "prompts.jsonl", "--metric", "pattern"])


def test_verify_does_not_guess_the_metric(here):
    def shortness(model): ...

    (here / "generator" / "dpg.json").write_text(json.dumps({"metric": as_metric(shortness).describe()}))
    with pytest.raises(
        ValueError, match="`metric` is missing: the 'dpg.json' of `generator` has the metric 'shortness'"
    ):
        verify.parse(["--generator", "generator", "--prompts", "prompts.jsonl", "--target", "target"])


def test_verify_says_that_nothing_is_readable(here, capsys):
    Dataset.from_list([{"text": "air and"}] * 4).to_json("d.jsonl")
    assert main([*VERIFY, "--dataset", "d.jsonl"]) == 1
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| text |")]
    assert "None" not in row and row == "| text |  | not readable |"


def test_verify_of_a_qr_code_that_cannot_be_read(here, capsys):
    """It does not pass and says why, and the picture is there to look at."""
    Dataset.from_list([{"text": "air and"}] * 4).to_json("d.jsonl")
    argv = [*VERIFY, "--metric", "qr", "--qr_text", "LOW", "--dataset", "d.jsonl", "--output_dir", "out"]
    assert main(argv) == 1
    said = capsys.readouterr().out
    assert "| text |  | not readable |" in said
    assert "Not verified, because this does not hold: the QR code reads 'LOW'. Written: out" in said
    assert main([*argv, "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((here / "out" / "verification.json").read_text())
    assert result["data"]["text"] is None and result["data"]["pixel_accuracy"] < 1 and not result["passed"]
    assert (here / "out" / "pattern_data.png").read_bytes().startswith(b"\x89PNG")


def test_verify_reads_checkpoints(here, capsys):
    assert train.main(flags()) == 0
    argv = ["verify", "--generator", "run", "--prompts", "prompts.jsonl", "--target", "target", "--output_dir", "out"]
    capsys.readouterr()
    assert main([*argv, "--num_examples", "6", "--use_cpu", "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert main(["decode", "target", "out/after_data", "--shape", "6", "7", "--json", "--output", "out/p.png"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    wanted = LMHeadPattern.sixty_seven().pattern
    right = [
        (pixel == "#") == (sign > 0)
        for row, signs in zip(rows, wanted.tolist(), strict=True)
        for pixel, sign in zip(row, signs, strict=True)
    ]
    assert result["data"]["pixel_accuracy"] == pytest.approx(sum(right) / 42)
    assert result["criterion"] == "more than 90 % of the pixels are right" and not result["passed"]


def test_decode(here, capsys):
    before = save("before", 3)
    after = copy.deepcopy(before)
    after.lm_head.weight.data[:21, :21] += 1e-3 * LMHeadPattern.qr("HELLO").pattern.T
    after.save_pretrained("after")
    assert main(["decode", "before", "after"]) == 0
    assert capsys.readouterr().out.endswith("Text: HELLO\n")
    assert main(["decode", "before", "target", "--json"]) == 1  # noise
    assert json.loads(capsys.readouterr().out)["text"] is None
    assert main(["decode", "before", "target"]) == 1
    assert capsys.readouterr().out.startswith("No QR code was read.")
    assert main(["decode", "before", "after", "--pattern", "HELLO", "--output", "both.png"]) == 0
    assert "Right pixels: 100.0 %" in capsys.readouterr().out and (here / "both.png").is_file()
    assert main(["decode", "before", "target", "--pattern", "67", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    wanted = LMHeadPattern.sixty_seven().pattern
    right = sum(
        (pixel == "#") == (sign > 0)
        for row, signs in zip(found["rows"], wanted.tolist(), strict=True)
        for pixel, sign in zip(row, signs, strict=True)
    )
    assert found["pixel_accuracy"] == pytest.approx(right / 42)
    after.lm_head.weight.data[:21, :21] = before.lm_head.weight.data[:21, :21]
    ids = list(range(25, 46))
    after.lm_head.weight.data[ids, :21] += 1e-3 * LMHeadPattern.qr("HELLO").pattern.T
    after.save_pretrained("elsewhere")
    texts = [WORDS[ids[0]], *map(str, ids[1:])]
    assert main(["decode", "before", "elsewhere", "--tokens", *texts]) == 0
    assert capsys.readouterr().out.endswith("Text: HELLO\n")
    assert main(["decode", "before", "after", "--pattern", "nowhere.png"]) == 2
    assert "`--pattern` 'nowhere.png'" in capsys.readouterr().err


def test_check(here, capsys):
    Dataset.from_list([{"text": "good ask blue old"}, {"text": "air and sun cat"}] * 4).to_json("data.jsonl")
    argv = ["check", "--model", "target", "--dataset", "data.jsonl", "--num_examples", "8", "--learning_rate", "1e-4"]
    assert main([*argv, "--dtype", "float64", "--adam_epsilon_root", "auto", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "passed"
