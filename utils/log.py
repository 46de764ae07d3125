"""Logging set-up for the scripts; everything else only calls `logging.getLogger(__name__)`."""

from __future__ import annotations

import logging
import os
import sys
import time
from typing import NoReturn

from utils.errors import printable

LINGER = 10.0
"""Seconds that a process lives on while another one of the training says why all of them end."""


def world_size() -> int:
    """Return the number of processes that torchrun started for this command; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def process_rank() -> int:
    """Return the rank of this process among those of `torchrun`; 0 for a single process.

    torch is not imported for it: that would cost a second at every `--help`.
    """
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        return int(dist.get_rank())
    return int(os.environ.get("RANK") or 0) if world_size() > 1 else 0


def is_main_process() -> bool:
    """Return whether this process writes files and logs."""
    return process_rank() == 0


def configure_logging(verbose: bool = True) -> None:
    """Send log records to standard error as plain lines; ranks above zero log errors only (all log the same)."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_LevelFormatter())
    root.addHandler(handler)
    root.setLevel(logging.ERROR if not is_main_process() else logging.INFO if verbose else logging.WARNING)
    for name in ("matplotlib", "PIL", "torch", "onnxscript", "onnx_ir"):  # chatty libraries
        logging.getLogger(name).setLevel(logging.WARNING)


def end_silently(status: int) -> NoReturn:
    """End a process of a training whose failure another one tells; torchrun ends all as soon as the first is gone."""
    time.sleep(LINGER)
    raise SystemExit(status)


class _LevelFormatter(logging.Formatter):
    """The message alone for INFO, `WARNING: message` above; control characters escaped, passwords hidden."""

    def format(self, record: logging.LogRecord) -> str:
        text = printable(super().format(record))
        return text if record.levelno <= logging.INFO else f"{record.levelname}: {text}"
