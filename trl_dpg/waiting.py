"""Handling of processes that hang."""

import faulthandler
import signal
import sys
from datetime import timedelta

import torch
from torch.distributed.distributed_c10d import _set_pg_timeout
from transformers import TrainingArguments


def bound_waiting(args: TrainingArguments) -> None:
    """
    Makes a process that hangs end all processes, and show where it hung.

    A collective waits for `args.ddp_timeout` and then raises. The launcher then ends all processes by SIGTERM, and each process prints
    the stacks of its threads. On the CPU, Transformers would leave the timeout at PyTorch's default of 30 minutes.
    """
    if args.world_size == 1 or not torch.distributed.is_initialized():
        return
    if sys.platform != "win32":  # Windows has no such signal
        faulthandler.register(signal.SIGTERM, file=2, chain=True)
    if args.device.type == "cpu":
        _set_pg_timeout(timedelta(seconds=args.ddp_timeout))
