"""Commands in a pseudo terminal, and its content."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path


def run_in_terminal(command: Sequence[str], folder: Path, columns: int = 80) -> tuple[int, str]:
    """Run a command in a terminal of `columns` x 24 characters; return its exit status and output."""
    import fcntl
    import pty
    import struct
    import termios

    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {**os.environ, "TERM": "xterm", "OMP_NUM_THREADS": "1"}
    environment.pop("COLUMNS", None)
    process = subprocess.Popen(command, cwd=folder, stdin=side, stdout=side, stderr=side, env=environment)
    os.close(side)
    output = bytearray()
    while True:
        try:
            output += os.read(main, 65536)
        except OSError:  # Linux reports the end of the last process this way
            break
    os.close(main)
    return process.wait(), output.decode()


def printed_lines(text: str) -> list[str]:
    """Return everything that was ever on a line of its own: each state of a progress bar counts as a line."""
    return re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text).replace("\r", "\n").split("\n")


def visible_lines(text: str) -> list[str]:
    """Return the final lines, without wrapping: a carriage return overwrites from the left."""
    lines = []
    for line in re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text).replace("\r\n", "\n").split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip())
    return lines
