"""One process per candidate: a candidate that fails, runs out of memory or crashes does not affect the others."""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from data.loading.processes import end_with_parent
from engine.compare.worker.setting import Setting
from utils.errors import TrainingError, UserError
from utils.files import make_folder
from utils.log import configure_logging

LOGGER = logging.getLogger(__name__)
MEMORY, CRASH, MISTAKE, UNSUPPORTED, OTHER = "memory", "crash", "mistake", "unsupported", "other"
# Messages of PyTorch, ONNX Runtime and OpenVINO when memory runs out.
MEMORY_WORDS = ("not enough memory", "can't allocate memory", "out of memory", "bad_alloc", "bad allocation",
                "failed to allocate", "cannot allocate")  # fmt: skip
MAX_REASON = 300
OOM_SCORE = "500"  # the kernel ends these processes before any other of the user's
TICK_S = 0.5
EXIT_WAIT_S = 5.0  # for the exit status of a process that has closed its connection
CLOSE_WAIT_S = 2.0  # for a process to exit by itself


class JobFailedError(Exception):
    """A failed job of a candidate.

    Attributes:
        kind: MEMORY, CRASH, MISTAKE, UNSUPPORTED or OTHER.
        reason: one line.
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind, self.reason = kind, reason


class Worker:
    """The process of one candidate; a context manager that ends it.

    Args:
        setting: passed to the process.
        log: file that its output is appended to.
    """

    def __init__(self, setting: Setting, log: Path) -> None:
        self.setting, self.log = setting, log
        make_folder(log.parent)
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA and threads do not survive a fork
        self._connection, theirs = context.Pipe()
        arguments = theirs, self.setting, self.log
        self._process = context.Process(target=serve, args=arguments, daemon=False)  # it starts loader workers
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        """Process ID, which is also that of its process group."""
        return self._process.pid or 0

    @property
    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self._process.is_alive()

    def run(self, job: str, tick: Callable[[], None] = lambda: None, **arguments: Any) -> Any:  # noqa: ANN401 -- as the job
        """Run a job in the process and return its result. After a crash a new process is started.

        Args:
            job: method of `engine.compare.worker.jobs.CandidateJobs`.
            tick: called twice a second while waiting.
            arguments: arguments of the job.

        Raises:
            JobFailedError: the job failed, or the process ended.
        """
        if self._connection.closed:
            self._start()
        try:
            self._connection.send((job, arguments))
            while not self._connection.poll(TICK_S):
                tick()
                if not self.is_alive and not self._connection.poll():
                    raise EOFError
            kind, result = self._connection.recv()
        except (EOFError, OSError):
            reason = self._exit_reason()
            self.close()
            raise JobFailedError(*reason) from None
        if kind:
            raise JobFailedError(kind, result)
        return result

    def _exit_reason(self) -> tuple[str, str]:
        self._process.join(EXIT_WAIT_S)
        status = self._process.exitcode
        kind, reason = (CRASH, "its process does not respond") if status is None else exit_reason(status)
        last = last_line(self.log)
        return kind, f"{reason}; last stderr line: {last}" if last and kind == CRASH else reason

    def stop(self, patience: float) -> None:
        """Ask the process to save its training and exit; wait `patience` seconds for that."""
        self._process.terminate()
        self._process.join(patience)
        if self.is_alive:
            LOGGER.warning("a process did not end within %g s; its work since the last epoch is lost", patience)

    def close(self) -> None:
        """End the process; if it does not exit, it is killed with its process group, including its loaders."""
        self._connection.close()
        self._process.join(CLOSE_WAIT_S)
        if self.is_alive:
            try:
                os.killpg(self.pid, signal.SIGKILL)
            except (AttributeError, ProcessLookupError, PermissionError):  # no groups on Windows; none yet
                self._process.kill()
            self._process.join()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def serve(connection: Connection, setting: Setting, log: Path) -> None:
    """Run jobs until the connection is closed; exit with the parent, even in the middle of a job."""
    if hasattr(os, "setsid"):
        os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the parent
    end_with_parent()
    with open(log, "ab") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    _raise_oom_score()
    configure_logging()
    from engine.compare.worker.jobs import CandidateJobs

    jobs = CandidateJobs(setting)
    failure = answer(jobs.setup, {})
    while True:
        try:
            job, arguments = connection.recv()
        except EOFError:
            return
        connection.send(failure if failure[0] else answer(getattr(jobs, job), arguments))


def _raise_oom_score() -> None:
    try:
        Path("/proc/self/oom_score_adj").write_text(OOM_SCORE, encoding="utf-8")
    except OSError:
        return


def answer(work: Callable[..., Any], arguments: dict[str, Any]) -> tuple[str, Any]:
    """Run a job; return ("", result), or (kind, reason in one line) when it failed."""
    try:
        return "", work(**arguments)
    except Exception as error:  # noqa: BLE001 -- whatever a candidate raises is reported in its row
        if not isinstance(error, UserError):
            sys.excepthook(*sys.exc_info())  # into the log of the process
        return classify(error)


def classify(error: BaseException) -> tuple[str, str]:
    """Return the kind of failure of an exception, and a one-line message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = "; ".join(lines) if isinstance(error, UserError) else (lines[0] if lines else "")
    text = text if len(text) <= MAX_REASON or isinstance(error, UserError) else text[: MAX_REASON - 3] + "..."
    if isinstance(error, MemoryError) or any(word in str(error).lower() for word in MEMORY_WORDS):
        return MEMORY, f"out of memory{_requested_memory(text)}"
    if isinstance(error, UserError):
        return MISTAKE, text
    if isinstance(error, NotImplementedError):
        return UNSUPPORTED, f"unsupported operator ({text})"
    if isinstance(error, TrainingError):
        return OTHER, text
    return OTHER, f"{type(error).__name__}: {text}" if text else type(error).__name__


def _requested_memory(text: str) -> str:
    """Return where memory ran out and how much more was requested, without the allocator's own text."""
    requested = re.search(r"tried to allocate (\d+) bytes", text)
    head = re.split(r":? ?\[enforce|:? ?DefaultCPUAllocator", text)[0].strip(" :") if requested else text
    parts = [head, f"asked for {int(requested[1]) / 1e6:.0f} MB more" if requested else ""]
    details = "; ".join(filter(None, parts))
    return f" ({details})" if details else ""


def exit_reason(status: int) -> tuple[str, str]:
    """Describe the exit status of a process that ended during a job."""
    if status >= 0:
        return CRASH, f"its process ended with status {status}"
    name = signal.Signals(-status).name if -status in {s.value for s in signal.Signals} else f"signal {-status}"
    if -status == signal.SIGKILL:
        return MEMORY, f"its process was killed ({name}): out of memory, most likely"
    return CRASH, f"its process crashed ({name})"


def last_line(path: Path) -> str:
    """Return the last line of a log that is not blank, at most 200 characters."""
    try:
        lines = path.read_bytes()[-4096:].decode("utf-8", "replace").split("\n")
    except OSError:
        return ""
    return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "")
