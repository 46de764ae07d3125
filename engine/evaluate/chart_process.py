"""Drawing of charts in a separate process. Imports no torch.

The process imports matplotlib while the command imports torch, and draws while the command writes other files.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from utils.errors import DataError, UserError
from utils.files import ROOT

if sys.platform == "linux":
    import fcntl

Draw = Callable[..., None]
PIPE_BYTES = 2**20  # if the system allows it: fits all charts of a few classes, so that `draw` does not block

# Ctrl-C is handled by the command, which then ends this process. `-c`: multiprocessing would import the user's script.
_CODE = f"""
import gc, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
gc.disable()
sys.path.insert(0, {str(ROOT)!r})
from engine.evaluate.chart_process import serve
from utils import plots
plots.new_figure(1, 1)  # imports matplotlib
serve(vars(plots))
"""


def call(function: Callable[..., None], *arguments: object) -> None:
    """Draw a chart in this process."""
    function(*arguments)


def serve(functions: Mapping[str, Any]) -> None:
    """Draw the charts that come through standard input, and print the first error, if any.

    A chart is a line of JSON with function and arguments. An empty object marks the end. End of file does not: loader
    workers inherit the other end of the pipe. It means that the command was killed.

    Args:
        functions: functions by name.
    """
    problem = ""
    while (line := sys.stdin.readline()) and (task := json.loads(line, object_hook=_decoded)):
        try:
            functions[task["function"]](*task["arguments"])
        except (UserError, OSError) as error:
            problem = problem or str(error)
    print(json.dumps(problem))


def _encoded(value: Path | np.ndarray) -> object:
    """Return the JSON form of a path or an array."""
    if isinstance(value, Path):
        return str(value)
    content = io.BytesIO()
    np.save(content, value, allow_pickle=False)
    return {"npy": base64.b64encode(content.getvalue()).decode()}


def _decoded(found: dict[str, Any]) -> object:
    """Return the array of a JSON object, or the object with its class numbers as integers."""
    if "npy" in found:
        return np.load(io.BytesIO(base64.b64decode(found["npy"])), allow_pickle=False)
    return {int(key) if key.isdecimal() else key: value for key, value in found.items()}


class ChartProcess:
    """Draws charts in another process; a context manager that ends it in any case."""

    def __init__(self) -> None:
        self._process = subprocess.Popen([sys.executable, "-c", _CODE], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        if sys.platform == "linux":
            with contextlib.suppress(OSError):  # more than the system allows: `draw` may block
                fcntl.fcntl(self._stdin, fcntl.F_SETPIPE_SZ, PIPE_BYTES)

    @property
    def _stdin(self) -> IO[bytes]:
        assert self._process.stdin is not None, "opened as a pipe"
        return self._process.stdin

    def __enter__(self) -> ChartProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def draw(self, function: Callable[..., None], *arguments: Any) -> None:
        """Queue a chart, which the other process draws.

        Args:
            function: function of `utils.plots`.
            arguments: paths, arrays, and values that JSON can represent.
        """
        self._send({"function": function.__name__, "arguments": arguments})

    def finish(self) -> None:
        """Wait until all charts are drawn.

        Raises:
            DataError: a chart cannot be written.
            RuntimeError: the process ended early.
        """
        self._send({})
        output, _ = self._process.communicate()
        if self._process.returncode:
            raise RuntimeError(f"the process that draws charts ended with status {self._process.returncode}")
        if problem := json.loads(output):
            raise DataError(problem)

    def _send(self, task: Mapping[str, Any]) -> None:
        try:
            self._stdin.write(json.dumps(task, default=_encoded).encode() + b"\n")
            self._stdin.flush()
        except BrokenPipeError:
            raise RuntimeError(f"the process that draws charts ended with status {self._process.wait()}") from None
