"""bergson's MAGIC from outside: its environment, made on the first use, and a call of it."""

import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from trl_dpg.metagradients import TargetTrainingArguments


ROOT = Path(__file__).parents[2]
DIRECTORY = ROOT / ".venv-bergson"

# bergson's requirements include torchvision, torchaudio and bitsandbytes, which MAGIC never imports: hence `--no-deps`,
# and by name what it does import.
BERGSON = "bergson==2.5.1"
IMPORTED = [
    "torchopt==0.7.3", "jaxtyping==0.3.11", "ml_dtypes==0.6.0", "petname==2.9", "simple-parsing==0.1.9", "scipy==1.17.1",
    "psutil==7.2.2",
]  # fmt: skip
SHARED = ["transformers", "accelerate", "peft", "datasets", "numpy"]  # the versions of this environment


def bergson_python() -> Path:
    """
    Python of bergson's environment, which is installed if it is not there yet (some minutes, 2 GB).

    PyTorch is the same build as here, `2.13.0+cpu` for one, so that times compare. Where pip does not find it, name the
    index it came from: `PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu`.
    """
    python, done = DIRECTORY / "bin" / "python", DIRECTORY / ".installed"
    if not done.exists():
        shared = [f"{name}=={version(name)}" for name in SHARED]
        subprocess.run([sys.executable, "-m", "venv", DIRECTORY], check=True)
        install = [python, "-m", "pip", "install", "--quiet"]
        subprocess.run([*install, f"torch=={version('torch')}"], check=True)
        subprocess.run([*install, *shared, *IMPORTED], check=True)
        subprocess.run([*install, "--no-deps", BERGSON], check=True)
        done.touch()
    return python


def bergson_metagradients(
    model: PreTrainedModel,
    examples: list[dict[str, Any]],
    queries: list[dict[str, Any]],
    args: TargetTrainingArguments,
    save_mode: str = "sqrt",
    repeats: int = 1,
) -> dict[str, Any]:
    r"""
    Metagradients of Φ = −(language-modeling loss of the queries) by bergson, in a process of its own.

    Φ is [`~trl_dpg.metrics.LanguageModelingLikelihood`] of the queries. The examples are given to bergson in the order
    that `args` trains them in, and its scores are returned in the order of `examples`. It writes states of the run to
    temporary files: `TMPDIR=/dev/shm` keeps them off the disk.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model to fine-tune, all parameters of it. Its head must not be tied: bergson would update it twice.
        examples, queries (`list[dict]`):
            Dicts with `input_ids`, all supervised.
        args ([`TargetTrainingArguments`]):
            Recipe: AdamW at a constant learning rate for one epoch, without clipping, `"batch_tokens"`.
        save_mode (`str`, *optional*, defaults to `"sqrt"`):
            Which states bergson writes to disk. `"sqrt"`, its default, recomputes the others by training again; `"all"`
            does not have to.
        repeats (`int`, *optional*, defaults to `1`):
            Number of measured calls.

    Returns:
        `dict`: What [`benchmarks.peers.bergson_magic`] prints.

    Raises:
        [`ValueError`]: If bergson cannot express the run.
        [`RuntimeError`]: If bergson fails; its last words are in the message.
    """
    requirements = {
        "optim": "adamw",
        "lr_scheduler_type": "constant",
        "loss_normalization": "batch_tokens",
        "num_train_epochs": 1,
        "max_grad_norm": 0.0,
        "weight_decay_on_norm_and_bias": True,
    }
    for name, value in requirements.items():
        if getattr(args, name) != value:
            raise ValueError(f"`{name}` is {getattr(args, name)!r}, but this comparison needs {value!r}. Set it so.")
    if args.adam_epsilon_root in ("auto", 0.0):
        raise ValueError(
            f"`adam_epsilon_root` is {args.adam_epsilon_root!r}, but bergson needs a number above 0: at 0 it returns NaN. "
            "Set it, for example, to 1e-9."
        )
    if model.config.tie_word_embeddings:
        raise ValueError(
            "`model` has a head tied to its embedding, which bergson updates twice a step. Set `tie_word_embeddings=False`."
        )

    order = [index for batch in args.batches(len(examples)) for index in batch]
    fields = ["learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "adam_epsilon_root"]
    with tempfile.TemporaryDirectory() as directory:
        job = {
            **{name: getattr(args, name) for name in [*fields, "batch_size"]},
            "model": f"{directory}/model",
            "precision": {4: "fp32", 8: "fp64"}[model.dtype.itemsize],
            "examples": [list(examples[index]["input_ids"])[: args.max_length] for index in order],
            "queries": [list(query["input_ids"]) for query in queries],
            "save_mode": save_mode,
            "repeats": repeats,
        }
        model.save_pretrained(job["model"])
        path = Path(directory, "job.json")
        path.write_text(json.dumps(job))
        command = [bergson_python(), "-m", "benchmarks.peers.bergson_magic", path]
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if process.returncode != 0:
        raise RuntimeError(f"bergson failed with exit code {process.returncode}:\n{process.stderr[-2000:]}")
    out = json.loads(process.stdout.splitlines()[-1])
    out["scores"] = [score for _, score in sorted(zip(order, out["scores"], strict=True))]
    return out
