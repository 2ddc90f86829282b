"""Drops needless warnings of dependencies, by their exact messages. This module is imported before any dependency."""

import logging
import os
import re
import sys
import warnings


def ignore_line(logger: str, start: str) -> None:
    """Drops a logger's messages that start with `start`."""
    logging.getLogger(logger).addFilter(lambda record: not record.getMessage().startswith(start))


def for_a_command() -> None:
    """Quiets a process that runs a command: progress bars are for terminals alone. This call comes before other imports."""
    # Transformers' `generate` does not pass its mask on to GPT-2, so this warning appears although a mask was given.
    ignore_line("transformers.modeling_utils", "We strongly recommend passing in an `attention_mask`")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # Transformers reads this, too
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


# TRL still uses these old names: its configurations set the first, its trainers read the second and call the other two.
for name, successor in {
    "gradient_checkpointing": "activation_checkpointing",
    "is_gradient_checkpointing": "is_activation_checkpointing",
    "gradient_checkpointing_enable": "activation_checkpointing_enable",
    "gradient_checkpointing_disable": "activation_checkpointing_disable",
}.items():
    message = f"`{name}` is deprecated and will be removed in v6. Use `{successor}` instead."
    warnings.filterwarnings("ignore", re.escape(message), FutureWarning)
# PEFT imports bitsandbytes if it is installed. The missing kernel is only for 4-bit models on a CPU.
ignore_line("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward from kernels-community")
