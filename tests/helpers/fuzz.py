"""Runs generated cases in child processes with limits; used by tests/fuzz.

A case is correct when it succeeds (and its own comparison holds) or raises a UserError of one bounded line. Everything
else is a fault: another exception, more than TIMEOUT seconds, more than MEMORY bytes, a process that died.
FUZZ_SEEDS, such as `0:2000`, chooses the seeds.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.errors import UserError

TIMEOUT = 20  # seconds
MEMORY = 4 << 30  # bytes beyond those in use
LONGEST = 4100  # characters of a message
BATCH = 50  # cases of a process


class WrongResult(AssertionError):
    """Success, but not with the content of the input."""


@dataclass
class Case:
    """A call of the project, the name of what was changed in its input, and the input for the report."""

    run: Callable[[], Any]
    kind: str
    shown: str


Maker = Callable[[random.Random, Path], Case]


def seeds() -> range:
    """Seeds chosen by FUZZ_SEEDS; 100 of them by default."""
    first, last = os.environ.get("FUZZ_SEEDS", "0:100").split(":")
    return range(int(first), int(last))


def faults(make: Maker, chosen: Sequence[int], folder: Path) -> list[str]:
    """Run cases and return one line per fault.

    Args:
        make: builds the case of a seed below a folder of its own.
        chosen: seeds.
        folder: where the cases write.
    """
    found = []
    pending = list(chosen)
    while pending:
        log = folder / "log"
        log.write_text("")
        process = os.fork()
        if process == 0:
            _child(make, pending[:BATCH], folder, log)
        status = _wait(process, log)
        rows = [json.loads(line) for line in log.read_text().splitlines()]
        ended = {row["seed"] for row in rows if "error" in row}
        found += [f"seed {row['seed']} ({row['kind']}): {row['error']}" for row in rows if row.get("error")]
        lost = [row for row in rows if row["seed"] not in ended]
        found += [f"seed {row['seed']} ({row['kind']}): the process died or hung, status {status}" for row in lost]
        done = ended | {row["seed"] for row in lost}
        assert done, f"no case ran, status {status}"
        pending = [seed for seed in pending if seed not in done]
    return found


def _wait(process: int, log: Path) -> int:
    """Wait for a child; kill it when its log does not grow any more."""
    size, since = -1, time.monotonic()
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return status
        if log.stat().st_size != size:
            size, since = log.stat().st_size, time.monotonic()
        if time.monotonic() - since > TIMEOUT + 5:
            os.kill(process, signal.SIGKILL)
            return os.waitpid(process, 0)[1]
        time.sleep(0.02)


def _child(make: Maker, chosen: Sequence[int], folder: Path, log: Path) -> None:
    try:
        silent = os.open(os.devnull, os.O_WRONLY)  # decoders write about damaged images
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        pages = int(Path("/proc/self/statm").read_text().split()[0]) if sys.platform == "linux" else 0
        if pages:
            limit = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        for seed in chosen:
            here = folder / f"s{seed}"
            here.mkdir()
            os.chdir(here)
            case = make(random.Random(seed), here)
            with open(log, "a") as stream:
                stream.write(json.dumps({"seed": seed, "kind": case.kind}) + "\n")
            error = _verdict(case)
            with open(log, "a") as stream:
                stream.write(json.dumps({"seed": seed, "kind": case.kind, "error": error}) + "\n")
            shutil.rmtree(here, ignore_errors=True)
    finally:
        os._exit(0)


def _verdict(case: Case) -> str:
    """Return what is wrong with a case, '' if nothing."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {TIMEOUT} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(TIMEOUT)
    try:
        case.run()
    except UserError as error:
        text = str(error)
        return "" if 0 < len(text) <= LONGEST else f"message of {len(text)} characters"
    except BaseException as error:  # noqa: BLE001 -- a fault is a result here
        place = traceback.extract_tb(error.__traceback__)[-1]
        return (
            f"{type(error).__name__}: {error}"[:300] + f" ({place.filename}:{place.lineno}) from {case.shown[:300]!r}"
        )
    finally:
        signal.alarm(0)
    return ""
