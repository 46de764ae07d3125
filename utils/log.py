"""Logging set-up for the scripts; everything else only calls `logging.getLogger(__name__)`."""

from __future__ import annotations

import logging
import sys
import time
from typing import NoReturn

LINGER = 10.0
"""Seconds that a process lives on while another one of the training says why all of them end."""


def configure_logging(verbose: bool = True, rank: int = -1) -> None:
    """Send log records to standard error as plain lines; ranks above zero show errors only (all say the same)."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_LevelFormatter())
    root.addHandler(handler)
    root.setLevel(logging.ERROR if rank > 0 else logging.INFO if verbose else logging.WARNING)
    for name in ("matplotlib", "PIL", "torch", "onnxscript", "onnx_ir"):  # chatty libraries
        logging.getLogger(name).setLevel(logging.WARNING)


def end_silently(status: int) -> NoReturn:
    """End a process of a training whose failure another one tells; torchrun ends all as soon as the first is gone."""
    time.sleep(LINGER)
    raise SystemExit(status)


class _LevelFormatter(logging.Formatter):
    """The message alone for INFO, `WARNING: message` above."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno <= logging.INFO else f"{record.levelname}: {text}"
