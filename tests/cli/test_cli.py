"""The command line: its arguments, files, results and exit codes, in this process on tiny models."""

import copy
import json
import shutil
import subprocess
import sys

import pytest
import torch
import trl.rewards
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

from examples.resources import ONE_SPECIAL_TOKEN, tiny_causal_lm, tiny_tokenizer
from trl_dpg.cli import main
from trl_dpg.metrics import LMHeadPattern
from trl_dpg.scripts import dpg, verify


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
        (["train", *flags(model_name_or_path="no/model")], "`model_name_or_path` 'no/model' is no model"),
        (["train", *flags(), "--reward_funcs", "no_such_module.f"], "`reward_funcs` 'no_such_module.f' cannot be"),
        (["train", "--config", "nowhere.yaml"], "'nowhere.yaml' does not exist"),
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
        (["verify", "--dataset", "prompts.jsonl"], "`target` is missing"),
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
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert f"trl-dpg {argv[0]}: error: " in error and message in error and "Traceback" not in error


# ---- train ----


def test_flags_of_accelerate_are_told_apart(here):
    (here / "run.yaml").write_text(json.dumps({**TRAIN, "num_processes": 2, "accelerate_config": "single_gpu"}))
    (script_args, training_args, *_), launch_args, in_argv = dpg.parse(
        ["--config", "run.yaml", "--main_process_port", "29501", "--max_steps", "3"]
    )
    assert (script_args.metric, training_args.max_steps) == ("67", 3)
    assert launch_args[0] == "--config_file" and launch_args[1].endswith("single_gpu.yaml")
    assert launch_args[2:] == ["--num_processes", "2", "--main_process_port", "29501"]
    assert in_argv == ["--main_process_port", "29501"]


def test_train(here, capsys):
    Dataset.from_list([{"prompt": "big bed"}] * 2).to_json("held_out.jsonl")
    more = {"eval_dataset_name": "held_out.jsonl", "num_eval_prompts": 1, "evaluation_language": "en"}
    assert dpg.main(flags(per_device_eval_batch_size=4, **more)) == 0
    facts = json.loads((here / "run" / "dpg.json").read_text())
    assert facts["training"]["steps"] == 1 and facts["metric"]["name"] == "LMHeadPattern"
    assert {"pixel_accuracy", "language_share"} <= set(facts["validation"]["eval"]["after"]["mean"])
    before, after = (AutoModelForCausalLM.from_pretrained(name) for name in ("generator", "run"))
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    assert main(["report", "run"]) == 0
    page = capsys.readouterr().out.strip().splitlines()[-1]
    assert (here / page).read_text().lower().startswith("<!doctype html>")


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
        dpg.main(["--config", "grpo.yaml", "--target_model_name_or_path", "target", "--metric", "lm_head_norm"]) == 0
    )
    assert json.loads((here / "run" / "dpg.json").read_text())["further_rewards"] == ["length"]
    assert dpg.load_reward("think_format_reward") is trl.rewards.think_format_reward
    assert dpg.load_reward("get_soft_overlong_punishment")(completion_ids=[[0] * 1280]) == [-1.0]


@pytest.mark.slow
def test_train_is_launched(here):
    command = [sys.executable, "-m", "trl_dpg.cli", "train", "--num_processes", "1", *flags()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("The generator is in run.")
    late = subprocess.run([*command, "--per_device_train_batch_size", "12"], capture_output=True, text=True)
    assert late.returncode == 2 and "`train_dataset` has 2 prompts" in late.stderr


# ---- generate ----

GENERATE = ["generate", "--model", "generator", "--prompts", "prompts.jsonl", "--output", "data.jsonl"]
GENERATE += ["--num_examples", "7", "--batch_size", "3", "--max_new_tokens", "5", "--seed", "2"]


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


def test_generate_does_not_mix_settings(here, capsys):
    assert main(GENERATE) == 0
    whole = (here / "data.jsonl").read_bytes()
    assert main([*GENERATE, "--temperature", "0.5"]) == 2
    assert "other settings (temperature)" in capsys.readouterr().err
    assert (here / "data.jsonl").read_bytes() == whole


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
    assert "Not verified: Φ is above that after the control" in capsys.readouterr().out


def test_recipe_and_metric_of_a_generator(here):
    assert dpg.main(flags(target_learning_rate=3e-4, target_weight_decay=0.1)) == 0
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


def test_verify_reads_checkpoints(here, capsys):
    assert dpg.main(flags()) == 0
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


def test_check(here, capsys):
    Dataset.from_list([{"text": "good ask blue old"}, {"text": "air and sun cat"}] * 4).to_json("data.jsonl")
    argv = ["check", "--model", "target", "--dataset", "data.jsonl", "--num_examples", "8", "--learning_rate", "1e-4"]
    assert main([*argv, "--dtype", "float64", "--adam_epsilon_root", "auto", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "passed"
