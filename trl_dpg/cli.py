"""The command `trl-dpg`."""

import importlib
import subprocess
import sys

from . import __version__
from .quiet import for_a_command, ignore_line


COMMANDS = {
    "train": "train a generator; flags of `accelerate launch` are accepted, too",
    "generate": "write a data set with a generator",
    "verify": "fine-tune a target on a data set with TRL's SFTTrainer and measure the metric",
    "decode": "read the picture in an LM head from two checkpoints",
    "check": "check metagradients of a model, data, metric and recipe",
    "value": "rank the rows of a data set by their effect on a metric of the model that is fine-tuned on them",
    "report": "write one HTML page about a run",
}

USAGE = f"""usage: trl-dpg COMMAND ...

Dataset Policy Gradients for TRL, version {__version__}.

commands:
{chr(10).join(f"  {name:9} {text}" for name, text in COMMANDS.items())}

`trl-dpg COMMAND --help` explains a command. `train`, `generate`, `verify`, `check` and `value` take a YAML file of their flags with `--config`.
The exit code is 0 for success, 1 if a check or verification did not pass or a run failed, 2 on bad input."""


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code. `argv=None` means the arguments of the process."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    if argv[0] == "--version":
        print(__version__)
        return 0
    command, *rest = argv
    if command not in COMMANDS:
        print(f"trl-dpg: error: there is no command {command!r}.\n\n{USAGE}", file=sys.stderr)
        return 2
    for_a_command()
    from .scripts.parsing import run_script  # imported here: imports take seconds, and `--help` needs none of them

    if command == "train":
        run = _train
    else:
        run = importlib.import_module(f".scripts.{command}", __package__).main
    return run_script(run, rest, f"trl-dpg {command}")


def _train(argv: list[str] | None) -> int:
    """Checks the arguments, and starts `trl_dpg.scripts.train` by Accelerate."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    from .scripts import train

    _, launch_args = train.parse(argv)
    ignore_line("accelerate.commands.launch", "The following values were not passed to `accelerate launch`")
    try:  # the script ignores the flags that are for Accelerate
        launch_command(launch_command_parser().parse_args([*launch_args, "--module", train.__name__, *(argv or [])]))
    except subprocess.CalledProcessError as error:  # the script has printed its error
        return 2 if error.returncode == 2 else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
