"""Processes that hang."""

import faulthandler
import signal
import sys
from datetime import timedelta

import torch
from torch.distributed.distributed_c10d import _set_pg_timeout
from transformers import TrainingArguments


def bound_waiting(args: TrainingArguments) -> None:
    """
    Has a process that hangs end the others, too, and say where it hung.

    A collective waits for `args.ddp_timeout` and then raises, and the launcher ends all processes: it sends SIGTERM, upon which each
    prints the stacks of its threads. On the CPU, Transformers leaves PyTorch's default of 30 minutes.
    """
    if args.world_size == 1 or not torch.distributed.is_initialized():
        return
    if sys.platform != "win32":  # which has no such signal
        faulthandler.register(signal.SIGTERM, file=2, chain=True)
    if args.device.type == "cpu":
        _set_pg_timeout(timedelta(seconds=args.ddp_timeout))
