"""What dependencies warn of without need, by the exact message. Imported before any of them."""

import logging
import os
import re
import sys
import warnings


def ignore_line(logger: str, start: str) -> None:
    """Drops what a logger says with these first words."""
    logging.getLogger(logger).addFilter(lambda record: not record.getMessage().startswith(start))


def for_a_command() -> None:
    """For a process that is a command: bars of loading and saving are for terminals alone. Called before the other imports, too."""
    # GPT-2 gets no mask from Transformers' `generate`, which was given one; nothing here leaves it out
    ignore_line("transformers.modeling_utils", "We strongly recommend passing in an `attention_mask`")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # of Transformers, too
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


# TRL still uses the old names: its configurations set the first, its trainers read the second and call the others.
for name, successor in {
    "gradient_checkpointing": "activation_checkpointing",
    "is_gradient_checkpointing": "is_activation_checkpointing",
    "gradient_checkpointing_enable": "activation_checkpointing_enable",
    "gradient_checkpointing_disable": "activation_checkpointing_disable",
}.items():
    message = f"`{name}` is deprecated and will be removed in v6. Use `{successor}` instead."
    warnings.filterwarnings("ignore", re.escape(message), FutureWarning)
# PEFT imports bitsandbytes wherever it is installed; the kernel is for 4-bit models on a CPU.
ignore_line("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward from kernels-community")
