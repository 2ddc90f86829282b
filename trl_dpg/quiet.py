"""What dependencies warn of without need, by the exact message. Imported before any of them."""

import logging
import re
import warnings


def ignore_line(logger: str, start: str) -> None:
    """Drops what a logger says with these first words."""
    logging.getLogger(logger).addFilter(lambda record: not record.getMessage().startswith(start))


# TRL still uses the old names: its configurations set the first, and its trainers read the second.
for name, successor in {
    "gradient_checkpointing": "activation_checkpointing",
    "is_gradient_checkpointing": "is_activation_checkpointing",
}.items():
    message = f"`{name}` is deprecated and will be removed in v6. Use `{successor}` instead."
    warnings.filterwarnings("ignore", re.escape(message), FutureWarning)
# PEFT imports bitsandbytes wherever it is installed; the kernel is for 4-bit models on a CPU.
ignore_line("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward from kernels-community")
