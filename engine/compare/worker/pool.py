"""The parent's end of the candidates' processes: start, ask, wait, end."""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from engine.compare.worker.process import CRASH, exit_reason
from utils.files import ROOT, make_folder

LOGGER = logging.getLogger(__name__)
TICK_S = 0.5
PATIENCE_S = 5.0


class JobFailedError(Exception):
    """A job that a candidate could not do.

    Attributes:
        kind: one of those in `engine.compare.worker.process`.
        reason: one line.
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind, self.reason = kind, reason


@dataclass(frozen=True)
class Setting:
    """Settings sent to every process first; see `engine.compare.worker.jobs.setup`."""

    file: str
    names: tuple[str, ...]
    device: str
    threads: int
    memory: float
    plugin: tuple[str, ...]


class Worker:
    """A process for one candidate; a context manager that ends it.

    Args:
        setting: sent to the process first.
        log: file that takes what it prints; appended to.
    """

    def __init__(self, setting: Setting, log: Path) -> None:
        self.setting, self.log = setting, log
        self._answers: queue.Queue[str | None] = queue.Queue()
        make_folder(log.parent)
        path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        with open(log, "ab") as stream:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "engine.compare.worker.process"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stream, text=True, encoding="utf-8",
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
                start_new_session=True,  # Ctrl-C reaches it through this object only; its loaders end with it
            )  # fmt: skip
        assert self._process.stdout is not None
        threading.Thread(target=self._listen, args=(self._process.stdout,), daemon=True).start()
        self._is_set_up = False

    def _listen(self, stream: IO[str]) -> None:
        for line in stream:
            self._answers.put(line)
        self._answers.put(None)

    @property
    def is_alive(self) -> bool:
        """Whether it can be asked."""
        return self._process.poll() is None

    def ask(self, job: str, tick: Callable[[], None] = lambda: None, **arguments: Any) -> Any:
        """Have a job done.

        Args:
            job: key of `engine.compare.worker.jobs.JOBS`.
            tick: called twice a second while waiting.
            arguments: of the job; plain values.

        Raises:
            JobFailedError: the job failed, or the process ended.
        """
        if not self._is_set_up:
            self._is_set_up = True
            self._send({"job": "setup", **vars(self.setting), "names": list(self.setting.names)})
            self._receive(tick)
        self._send({"job": job, **arguments})
        return self._receive(tick)

    def _send(self, content: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(content) + "\n")
            self._process.stdin.flush()
        except OSError:  # it is gone; `_receive` finds out why
            return

    def _receive(self, tick: Callable[[], None]) -> Any:
        while True:
            try:
                line = self._answers.get(timeout=TICK_S)
            except queue.Empty:
                tick()
                continue
            if line is None:
                raise JobFailedError(*self._why_it_ended())
            answer = json.loads(line)
            if "reason" in answer:
                raise JobFailedError(answer["kind"], answer["reason"])
            return answer["result"]

    def _why_it_ended(self) -> tuple[str, str]:
        try:
            kind, reason = exit_reason(self._process.wait(PATIENCE_S))
        except subprocess.TimeoutExpired:
            kind, reason = CRASH, "its process does not answer any more"
        last = _last_line(self.log)
        return kind, f"{reason}; last stderr line: {last}" if last and kind == CRASH else reason

    def stop(self, patience: float) -> None:
        """Ask the process to save what it trains and to end; wait so many seconds for that."""
        self._process.terminate()
        try:
            self._process.wait(patience)
        except subprocess.TimeoutExpired:
            LOGGER.warning("its process did not end within %g s; what it did since its last epoch is lost", patience)

    def close(self) -> None:
        """End the process, and all that it started (loaders of a process that is gone end by themselves)."""
        if self._process.poll() is None:
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                self._process.kill()
            self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                try:
                    stream.close()
                except OSError:
                    continue

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _last_line(path: Path) -> str:
    try:
        with open(path, "rb") as stream:
            stream.seek(max(path.stat().st_size - 4096, 0))
            lines = stream.read().decode("utf-8", "replace").split("\n")
    except OSError:
        return ""
    return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "")
