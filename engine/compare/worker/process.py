"""A candidate's own process: reads jobs as lines of JSON, does them, answers with lines of JSON.

    python -m engine.compare.worker.process

A candidate that fails, runs out of memory or crashes takes nobody along. The process ends when its input does, so
nothing goes on after the comparison was killed. What libraries print goes to standard error.
"""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from utils.errors import TrainingError, UserError
from utils.log import configure_logging

MEMORY, CRASH, MISTAKE, UNSUPPORTED, OTHER = "memory", "crash", "mistake", "unsupported", "other"
# How PyTorch, ONNX Runtime and OpenVINO say that memory ran out.
MEMORY_WORDS = ("not enough memory", "can't allocate memory", "out of memory", "bad_alloc", "bad allocation",
                "failed to allocate", "cannot allocate")  # fmt: skip
LONGEST = 300
OOM_SCORE = "500"  # the kernel ends these processes before any other of the user's


def main() -> None:
    """Answer jobs until the input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    # Loaders are forked, and a forked process closes its `sys.stdin`: for ever, if a thread was reading from that.
    questions = os.fdopen(os.dup(0), encoding="utf-8")
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    _be_first_to_go()
    configure_logging()
    jobs: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(target=_listen, args=(questions, jobs), daemon=True).start()
    try:
        from engine.compare.worker.jobs import JOBS, State

        state = State()
        while True:
            job = jobs.get()
            _send(answers, answer(JOBS[job.pop("job")], state, job))
    except BrokenPipeError:  # nobody listens any more
        os._exit(1)


def answer(work: Callable[..., Any], state: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Do a job: `{"result": ...}`, or `{"kind": ..., "reason": one line}` when it failed."""
    try:
        return {"result": work(state, **arguments)}
    except Exception as error:  # noqa: BLE001 -- whatever a candidate raises is reported in its row
        if not isinstance(error, UserError):
            sys.excepthook(*sys.exc_info())  # into the log of the process
        kind, reason = classify(error)
        return {"kind": kind, "reason": reason}


def classify(error: BaseException) -> tuple[str, str]:
    """Return the kind of failure of an exception, and a one-line message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = "; ".join(lines) if isinstance(error, UserError) else (lines[0] if lines else "")
    text = text if len(text) <= LONGEST or isinstance(error, UserError) else text[: LONGEST - 3] + "..."
    low = str(error).lower()
    if isinstance(error, MemoryError) or any(word in low for word in MEMORY_WORDS):
        return MEMORY, f"out of memory{_where(text)}"
    if isinstance(error, UserError):
        return MISTAKE, text
    if isinstance(error, NotImplementedError):
        return UNSUPPORTED, f"unsupported operator ({text})"
    if isinstance(error, TrainingError):
        return OTHER, text
    return OTHER, f"{type(error).__name__}: {text}" if text else type(error).__name__


def _where(text: str) -> str:
    """Return where memory ran out and how much more was requested, without the allocator's own text."""
    asked = re.search(r"tried to allocate (\d+) bytes", text)
    head = re.split(r":? ?\[enforce|:? ?DefaultCPUAllocator", text)[0].strip(" :") if asked else text
    parts = [head, f"asked for {int(asked[1]) / 1e6:.0f} MB more" if asked else ""]
    details = "; ".join(filter(None, parts))
    return f" ({details})" if details else ""


def exit_reason(status: int) -> tuple[str, str]:
    """Describe the exit status of a process that did not answer."""
    if status >= 0:
        return CRASH, f"its process ended with status {status}"
    name = signal.Signals(-status).name if -status in {s.value for s in signal.Signals} else f"signal {-status}"
    if -status == signal.SIGKILL:
        return MEMORY, f"its process was ended from outside ({name}): out of memory, most likely"
    return CRASH, f"its process crashed ({name})"


def _listen(stream: TextIO, jobs: queue.Queue[dict[str, Any]]) -> None:
    for line in stream:
        jobs.put(json.loads(line))
    os._exit(0)


def _send(stream: TextIO, content: dict[str, Any]) -> None:
    stream.write(json.dumps(content) + "\n")
    stream.flush()


def _be_first_to_go() -> None:
    try:
        Path("/proc/self/oom_score_adj").write_text(OOM_SCORE, encoding="utf-8")
    except OSError:
        return


if __name__ == "__main__":
    main()
