"""Accelerate's configurations, and the commands in docs/scaling.md, as their own parsers read them."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from torch.distributed.fsdp import StateDictType
from trl.scripts.vllm_serve import ScriptArguments, build_command

from trl_dpg.scripts import train


ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "examples" / "accelerate_configs"
DOCUMENT = (ROOT / "docs" / "scaling.md").read_text()
COMMANDS = [
    line.strip()
    for block in re.findall(r"```bash\n(.*?)```", DOCUMENT, flags=re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip() and not line.startswith("#")
]


def environment_of(command):
    """A command without its leading `NAME=value` words, and these."""
    words = shlex.split(command, comments=True)
    split = next(i for i, word in enumerate(words) if not re.match(r"[A-Z_]+=", word))
    return words[split:], dict(word.split("=", 1) for word in words[:split])


def launch_arguments(*arguments):
    return _validate_launch_command(launch_command_parser().parse_args(list(arguments)))[0]


@pytest.fixture
def launch_environment(monkeypatch):
    """The environment that `accelerate launch` gives to the processes."""
    monkeypatch.setattr("accelerate.utils.launch.is_port_in_use", lambda port: False)

    def prepare(name):
        args = launch_arguments("--config_file", str(CONFIGS / name), "-m", "trl_dpg.scripts.train")
        if args.use_deepspeed:
            args.deepspeed_fields_from_accelerate_config = ""
            environment = prepare_deepspeed_cmd_env(args)[1]
        else:
            environment = prepare_multi_gpu_env(args)
        for key, value in environment.items():
            monkeypatch.setenv(key, value)
        return environment

    return prepare


@pytest.mark.parametrize(
    ("name", "distributed_type", "num_processes", "num_machines"),
    [
        ("multi_gpu.yaml", DistributedType.MULTI_GPU, 8, 1),
        ("fsdp2.yaml", DistributedType.FSDP, 8, 1),
        ("multi_node_fsdp2.yaml", DistributedType.FSDP, 16, 2),
        ("deepspeed_zero2.yaml", DistributedType.DEEPSPEED, 8, 1),
        ("deepspeed_zero3.yaml", DistributedType.DEEPSPEED, 8, 1),
    ],
)
def test_launcher(name, distributed_type, num_processes, num_machines):
    path = str(CONFIGS / name)
    assert load_config_from_file(path).distributed_type == distributed_type
    args = launch_arguments("--config_file", path, "-m", "trl_dpg.scripts.train", "--seed", "1")
    assert (args.num_processes, args.num_machines, args.mixed_precision) == (num_processes, num_machines, "bf16")
    assert args.multi_gpu == (distributed_type == DistributedType.MULTI_GPU)
    assert args.use_fsdp == (distributed_type == DistributedType.FSDP)
    assert args.use_deepspeed == (distributed_type == DistributedType.DEEPSPEED)
    assert args.training_script_args == ["--seed", "1"]
    # sections are copied to the arguments unchecked, so a misspelled key would go unnoticed
    known = vars(launch_command_parser().parse_args(["x.py"]))
    raw = yaml.safe_load((CONFIGS / name).read_text())
    for section in ("fsdp_config", "deepspeed_config"):
        assert raw.get(section, {}).keys() <= known.keys()


def test_no_configuration_is_untested():
    assert {path.name for path in CONFIGS.iterdir()} == {
        "multi_gpu.yaml",
        "fsdp2.yaml",
        "multi_node_fsdp2.yaml",
        "deepspeed_zero2.yaml",
        "deepspeed_zero3.yaml",
    }


@pytest.mark.parametrize("name", ["fsdp2.yaml", "multi_node_fsdp2.yaml"])
def test_fsdp_plugin(launch_environment, name):
    environment = launch_environment(name)
    assert environment["ACCELERATE_USE_FSDP"] == "true"
    plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward, plugin.cpu_ram_efficient_loading) == (2, True, True)
    assert plugin.state_dict_type == StateDictType.FULL_STATE_DICT
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert not plugin.activation_checkpointing


@pytest.mark.parametrize(("name", "stage"), [("deepspeed_zero2.yaml", 2), ("deepspeed_zero3.yaml", 3)])
def test_deepspeed_plugin(launch_environment, name, stage):
    environment = launch_environment(name)
    assert environment["ACCELERATE_USE_DEEPSPEED"] == "true"
    plugin = DeepSpeedPlugin()
    assert (plugin.zero_stage, plugin.zero3_init_flag, plugin.zero3_save_16bit_model) == (
        stage,
        stage == 3,
        stage == 3,
    )
    # the trainer's own values, which a number here would have to repeat
    assert (plugin.gradient_accumulation_steps, plugin.gradient_clipping) == ("auto", "auto")


def test_every_configuration_is_documented():
    for folder in ("accelerate_configs", "configs"):
        named = set(re.findall(rf"examples/{folder}/(\w+\.yaml)", DOCUMENT))
        assert named and all((ROOT / "examples" / folder / name).exists() for name in named)
    assert {path.name for path in CONFIGS.iterdir()} <= set(re.findall(r"\w+\.yaml", DOCUMENT))


@pytest.mark.parametrize("command", [c for c in COMMANDS if "accelerate launch" in c])
def test_launch_command(command, monkeypatch, tmp_path):
    """Our script would get what the command says, on the processes that it says."""
    words, environment = environment_of(command)
    assert words[:2] == ["accelerate", "launch"]
    monkeypatch.chdir(ROOT)
    args = launch_arguments(*words[2:])
    assert args.module and args.training_script == "trl_dpg.scripts.train"
    if "CUDA_VISIBLE_DEVICES" in environment:
        assert args.num_processes == len(environment["CUDA_VISIBLE_DEVICES"].split(","))

    monkeypatch.setattr(train, "check_arguments", lambda *args: None)
    arguments = [*args.training_script_args, "--use_cpu", "true", "--bf16", "false", "--output_dir", str(tmp_path)]
    (_, training_args, *_), _ = train.parse(arguments)
    for flag, value in re.findall(r"--(use_vllm|vllm_mode|vllm_server_host|target_batch_size) (\S+)", command):
        assert str(getattr(training_args, flag)).lower() == value


@pytest.mark.parametrize(
    ("name", "metric", "prompts", "batches", "flags"),
    [
        ("paper_qr", "qr", 24576, 240, []),
        ("paper_67", "67", 256, 3840, []),
        ("paper_67", "67", 2048, 480, ["--generation_batch_size", "8192"]),
        ("paper_67", "67", 24576, 40, ["--generation_batch_size", "98304"]),
        ("paper_l2", "lm_head_norm", 256, 960, []),
        ("paper_l2", "lm_head_norm", 2048, 120, ["--generation_batch_size", "8192"]),
        ("paper_uuid", "likelihood", 256, 360, []),
        ("paper_language", "experiments.metrics:Lambada", 256, 120, []),
    ],
)
def test_paper_sizes(monkeypatch, tmp_path, name, metric, prompts, batches, flags):
    """The numbers in the comments of the YAML files."""
    monkeypatch.setattr(train, "check_arguments", lambda *args: None)
    config = str(ROOT / "examples" / "configs" / f"{name}.yaml")
    arguments = ["--config", config, "--use_cpu", "true", "--bf16", "false", "--output_dir", str(tmp_path), *flags]
    (script_args, args, *_), _ = train.parse(arguments)
    assert script_args.metric == metric
    assert args.generation_batch_size // args.num_generations == prompts
    assert args.target_training_arguments().num_steps(args.generation_batch_size) == prompts * 4 // 1024
    steps_per_generation = args.generation_batch_size // (args.per_device_train_batch_size * 8)
    assert (steps_per_generation, args.max_steps // steps_per_generation) == (prompts * 4 // 128, batches)
    assert args.eval_steps % steps_per_generation == 0  # else a validation lies between two generations


def test_server_command():
    """The documented vLLM command has what TRL's own (deprecated) launcher would give the server."""
    (command,) = [c for c in COMMANDS if "vllm serve" in c]
    words, environment = environment_of(command)
    assert environment["VLLM_SERVER_DEV_MODE"] == "1"
    imposed = build_command(ScriptArguments(model=words[2]))
    imposed = imposed[imposed.index("--weight-transfer-config") :]
    assert " ".join(imposed) in " ".join(words)


def test_every_configuration_has_a_command():
    launched = " ".join(command for command in COMMANDS if "accelerate launch" in command)
    for path in CONFIGS.iterdir():
        assert f"--config_file examples/accelerate_configs/{path.name}" in launched
