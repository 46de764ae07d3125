"""Logging setup, text layout and exit statuses of the commands; other modules only call `logging.getLogger`."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import textwrap
import time
import traceback
import unicodedata
from collections.abc import Callable, Container, Iterable, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import NoReturn, TextIO

from utils.errors import TrainingError, UserError, printable

LINE_WIDTH = 79
"""Maximum width of output lines: that of a standard terminal minus one for the cursor."""

LINGER = 10.0
"""Seconds that a process waits before it exits, while another process of the training reports the error."""

MISTAKE, FAILURE, INTERNAL_ERROR, INTERRUPTED = 2, 1, 70, 130
"""Exit statuses: user error, failed training, unexpected exception (EX_SOFTWARE of sysexits.h), Ctrl-C."""

_error_folder = ContextVar("error_folder", default=Path("runs"))


def world_size() -> int:
    """Return the number of processes that torchrun started for this command; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def process_rank() -> int:
    """Return the rank of this process among those of `torchrun`; 0 for a single process.

    Does not import torch, which would cost a second at every `--help`.
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


def aligned(rows: Iterable[Sequence[object]], left: Container[int] = (0,)) -> list[str]:
    """Format rows as lines with aligned columns: left-aligned for the indices in `left`, else right-aligned."""
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(display_width, column)) for column in zip(*texts)]
    lines = []
    for row in texts:
        pads = (" " * (width - display_width(cell)) for cell, width in zip(row, widths))
        cells = (cell + pad if i in left else pad + cell for i, (cell, pad) in enumerate(zip(row, pads)))
        lines.append("  ".join(cells).rstrip())
    return lines


def display_width(text: str) -> int:
    """Return the width of a text in terminal columns: wide characters count twice, combining ones not at all."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(bool(unicodedata.combining(c)) for c in text)


def fitted(text: str, stream: TextIO) -> str:
    """Wrap lines that are longer than the terminal is wide, between words.

    Commands (`python ...` on a separate line) are not wrapped, so that they can be copied. Text for files and pipes is
    unchanged.
    """
    if not stream.isatty():
        return text
    width = shutil.get_terminal_size().columns - 1  # the cursor of some terminals needs a column
    return "\n".join(line if line.startswith("python ") else _wrapped(line, width) for line in text.split("\n"))


def _wrapped(line: str, width: int) -> str:
    if len(line) <= width:
        return line
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    return textwrap.fill(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def end_silently(status: int) -> NoReturn:
    """Exit after a delay, while another process reports the error; torchrun ends all processes on the first exit."""
    time.sleep(LINGER)
    raise SystemExit(status)


def set_error_folder(folder: Path) -> None:
    """Choose where `run_command` writes error.log; a command calls it when its run folder is known."""
    _error_folder.set(folder)


def status_of(error: BaseException) -> int:
    """Return the exit status of a command that ends with this exception."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return MISTAKE if isinstance(error, UserError) else FAILURE if isinstance(error, TrainingError) else INTERNAL_ERROR


def print_error(prog: str, message: object) -> None:
    """Print a one-line error on standard error; in a terminal it wraps between words."""
    print(fitted(printable(f"{prog}: error: {message}"), sys.stderr), file=sys.stderr)


def run_command(prog: str, work: Callable[[], int | None], debug: bool = False) -> int:
    """Do the work of a command; an exception becomes one line on standard error.

    The traceback of an unexpected exception goes to error.log in the run folder, or in `runs` while there is no run
    folder.

    Args:
        prog: name of the command.
        work: returns an exit status, None = 0.
        debug: print the traceback on standard error instead.

    Returns:
        Exit status of the work, or `status_of` its exception.
    """
    try:
        return work() or 0
    except KeyboardInterrupt as error:
        if is_main_process():
            print(f"{prog}: interrupted", file=sys.stderr)
        return status_of(error)
    except (UserError, TrainingError) as error:
        print_error(prog, error)
        return status_of(error)
    except Exception as error:  # noqa: BLE001 (the user gets one line for any exception, and the traceback in a file)
        print(fitted(_internal_error(prog, error, debug), sys.stderr), file=sys.stderr)
        return status_of(error)


def _internal_error(prog: str, error: Exception, debug: bool) -> str:
    """Write the traceback of an unexpected exception and return the line for the terminal."""
    trace = printable("".join(traceback.format_exception(error)))
    summary = " ".join(printable(f"{type(error).__name__}: {error}").split())[:300]
    place = "traceback above"
    path = _error_folder.get() / "error.log"
    if not debug:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {printable(' '.join(sys.argv))}\n{trace}")
            place = f"traceback in {path}; --debug prints it here"
        except OSError as cause:
            debug, place = True, f"traceback above, since {path} cannot be written: {cause.strerror or cause}"
    return f"{trace if debug else ''}{prog}: internal error: {summary} ({place})"


class _LevelFormatter(logging.Formatter):
    """Formats INFO as the message, higher levels as `WARNING: message`, wrapped to the terminal; see `printable`."""

    def format(self, record: logging.LogRecord) -> str:
        text = printable(super().format(record))
        return fitted(text if record.levelno <= logging.INFO else f"{record.levelname}: {text}", sys.stderr)
