r"""Whole commands in this checkout and in others, side by side: time, processor time and memory.

    python -m benchmarks.side_by_side --weights yolov5n.pt --data data.yaml --images folder --video clip.mp4 \
        --peer before=../checkout-of-a-commit --peer yolov5=../yolov5

Each command runs in a fresh process per checkout and round, the checkouts in turn, after a round that is not counted
(it fills file, label and bytecode caches). The tables give medians, and the peak memory (resident set) of the process
and of its largest child, such as a loader worker. A peer is any checkout whose scripts take the same flags, such as
YOLOv5; the rows of `benchmarks/kernels` import modules of a checkout and are for other commits of this project.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import psutil
import torch

from benchmarks.report import machine, markdown_table, write_results
from utils.files import ROOT

KERNELS = ROOT / "benchmarks/kernels"
OURS = "this"
SAMPLE_S = 0.05  # between two samples of the memory of a command
MAX_OTHERS = 0.1  # share of the processors that other programs may use


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: shown in the table, and chosen by `--rows`.
        command: script and options, run in the folder of a checkout; `{weights}` and others are filled in (`values`).
        program: file of `benchmarks/kernels` that gets the command as arguments and imports modules of the checkout.
        unit: of the result. Without a program it is the wall time of the process, otherwise what the program prints.
    """

    name: str
    command: str
    program: str = ""
    unit: str = "s"


TRAIN = (
    "train.py --cfg models/yolov5n.yaml --weights '' --data {data} --imgsz 320 --batch-size 16 --epochs 2 "
    "--workers 2 --noautoanchor --project {out}"
)
VAL = "val.py --weights {weights} --data {data} --imgsz %d --project {out}"
DETECT = "detect.py --weights {weights} --source {%s} --imgsz 640 --project {out}"
ROWS = (
    Row("val 320", VAL % 320),
    Row("val 640", VAL % 640),
    Row("detect folder", DETECT % "images"),
    Row("detect video", DETECT % "video"),
    Row("detect one image", DETECT % "image"),
    Row("train 320, 2 epochs", TRAIN),
    Row("training step, float32", "channels_last", "step.py", "ms"),
    Row("training step, bfloat16", "'bf16, channels_last'", "step.py", "ms"),
    Row("forward yolov5s 640, 1 image", "1", "forward.py", "ms"),
    Row("forward yolov5s 640, 8 images", "8", "forward.py", "ms"),
    Row("loader, files, per image", "{images} none", "loader.py", "ms"),
    Row("loader, memory, per image", "{images} ram", "loader.py", "ms"),
    Row("first scan of 20,000 labels", "{images}", "scan.py"),
)


class Run(NamedTuple):
    """What one process took: the row's result, processor seconds with its children, peak MiB of it and of a child."""

    result: float
    cpu_s: float
    peak_mib: float
    child_mib: float


class PeakMemory(threading.Thread):
    """Peak memory of a process and of the largest of its descendants, sampled until `stop`."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.process = psutil.Process(pid)
        self.own = self.child = 0
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(SAMPLE_S):
            with contextlib.suppress(psutil.Error):
                self.own = max(self.own, self.process.memory_info().rss)
            with contextlib.suppress(psutil.Error):
                for child in self.process.children(recursive=True):
                    self.child = max(self.child, child.memory_info().rss)

    def stop(self) -> tuple[float, float]:
        """Return the peaks in MiB."""
        self.ended.set()
        self.join()
        return self.own / 2**20, self.child / 2**20


def run(row: Row, folder: Path, values: Mapping[str, str], extra: Sequence[str]) -> Run:
    """Run a command once in a checkout.

    Raises:
        SystemExit: the command failed, or its output has no result.
    """
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    program = ["-c", (KERNELS / row.program).read_text(encoding="utf-8")] if row.program else []
    with tempfile.TemporaryDirectory() as out, tempfile.TemporaryFile("w+", errors="replace") as log:
        words = [*program, *(word.format(**values, out=out) for word in shlex.split(row.command))]
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *words, *extra], cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        memory = PeakMemory(process.pid)
        memory.start()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        peaks = memory.stop()
        log.seek(0)
        text = log.read()
    if process.returncode:
        raise SystemExit(f"{row.name} in {folder}: status {process.returncode}: {text.strip().splitlines()[-1:]}")
    if row.program:
        match = re.search(r"^result: (\S+)$", text, re.MULTILINE)
        if match is None:
            raise SystemExit(f"{row.name} in {folder}: {row.program} printed no result")
        seconds = float(match[1])
    return Run(seconds, usage.ru_utime + usage.ru_stime, *peaks)


@contextlib.contextmanager
def quiet(limit: float, busy: bool) -> Iterator[dict[str, float]]:
    """Raise SystemExit when other programs use the machine, before or during the block, unless `busy`.

    Yields:
        A mapping that gets the load before, and the share of the processors that others used (`others`); the block
        adds its own processor seconds (`own_s`).
    """
    seen = {"load": os.getloadavg()[0], "own_s": 0.0}
    if seen["load"] > limit and not busy:
        raise SystemExit(f"busy machine: load {seen['load']:.2f}, allowed is {limit:g}; wait, or --busy")
    start, before = time.perf_counter(), _busy_seconds()
    yield seen
    capacity = (time.perf_counter() - start) * (os.cpu_count() or 1)
    seen["others"] = max(_busy_seconds() - before - seen.pop("own_s"), 0.0) / capacity
    if seen["others"] > MAX_OTHERS and not busy:
        raise SystemExit(f"busy machine: other programs used {seen['others']:.0%} of it; nothing written (--busy)")


def _busy_seconds() -> float:
    times = psutil.cpu_times()
    return float(times.user + times.system + getattr(times, "nice", 0.0))


def measure(
    rows: Sequence[Row], checkouts: Mapping[str, Path], values: Mapping[str, str], options: argparse.Namespace
) -> tuple[dict[str, dict[str, list[Run]]], dict[str, Any]]:
    """Return the runs by row and checkout, and the load of the machine."""
    extra = {name: shlex.split(text) for name, text in options.flags}
    runs: dict[str, dict[str, list[Run]]] = {row.name: {name: [] for name in checkouts} for row in rows}
    with quiet(options.max_load, options.busy) as seen:
        for number in range(options.rounds + 1):
            for row in rows:
                for name, folder in checkouts.items():
                    found = run(row, folder, values, extra.get(name, ()))
                    seen["own_s"] += found.cpu_s
                    print(f"round {number}: {row.name}, {name}: {found.result:.3f}", file=sys.stderr)
                    if number:
                        runs[row.name][name].append(found)
    return runs, seen


def summary(rows: Sequence[Row], runs: Mapping[str, Mapping[str, Sequence[Run]]]) -> str:
    """Return the Markdown table of medians; ratios are those of this checkout to the peer."""
    lines = []
    for row in rows:
        ours = median(found.result for found in runs[row.name][OURS])
        for name, several in runs[row.name].items():
            results = [found.result for found in several]
            digits = 2 if row.unit == "s" else 1
            value, low, high = (f"{number:.{digits}f}" for number in (median(results), min(results), max(results)))
            cpu, peak, child = (
                median(column) for column in zip(*((found.cpu_s, found.peak_mib, found.child_mib) for found in several))
            )
            ratio = "" if name == OURS else f"{ours / median(results):.2f}"
            sizes = f"{cpu:.2f}", f"{peak:.0f}", f"{child:.0f}" if child else ""
            lines.append((row.name, name, f"{value} {row.unit}", f"{low} to {high}", *sizes, ratio))
    head = ("command", "checkout", "median", "range", "CPU s", "peak MiB", "largest child, MiB", "this / peer")
    return markdown_table(head, lines)


def commit_of(folder: Path) -> str:
    """Return the commit of a checkout, with `+` when files differ from it; empty without git."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def named(text: str) -> tuple[str, str]:
    """Split `NAME=VALUE`."""
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"'{text}': NAME=VALUE is needed")
    return name, value


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(prog="benchmarks.side_by_side", description="Commands in several checkouts.")
    parser.add_argument("--peer", action="append", default=[], type=named, help="NAME=FOLDER of another checkout")
    parser.add_argument("--flags", action="append", default=[], type=named, help="NAME=OPTIONS only for this checkout")
    parser.add_argument("--row", action="append", default=[], type=named, help="NAME=COMMAND, a row of your own")
    parser.add_argument("--rows", nargs="+", help=f"rows to measure (all of: {', '.join(row.name for row in ROWS)})")
    for name in ("weights", "data", "images", "video", "image"):
        parser.add_argument(
            f"--{name}", type=lambda text: str(Path(text).resolve()), help=f"{{{name}}} of the commands"
        )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cpus", type=int, nargs="+", help="processors to run on")
    parser.add_argument("--max-load", type=float, default=0.5, help="one-minute load above which nothing is measured")
    parser.add_argument("--busy", action="store_true", help="measure on a busy machine too")
    options = parser.parse_args(arguments)
    unknown = {name for name, _ in options.flags} - {OURS, *(name for name, _ in options.peer)}
    if unknown:
        parser.error(f"--flags: no checkout {min(unknown)}")
    for name, folder in options.peer:
        if name == OURS or not Path(folder).is_dir():
            parser.error(f"--peer {name}={folder}: a folder and a name other than '{OURS}' are needed")
    return options


def chosen(options: argparse.Namespace, values: Mapping[str, str]) -> list[Row]:
    """Return the rows that were asked for and whose inputs were given.

    Raises:
        SystemExit: none is left.
    """
    rows = []
    for row in (*ROWS, *(Row(*pair) for pair in options.row)):
        lacking = [name for name in re.findall(r"{(\w+)}", row.command) if name != "out" and name not in values]
        if lacking:
            print(f"{row.name}: left out, --{lacking[0]} was not given", file=sys.stderr)
        elif not options.rows or row.name in options.rows:
            rows.append(row)
    if not rows:
        raise SystemExit("no row to measure; see --help")
    return rows


def main() -> None:
    """Measure and write `results/side_by_side.json` and `.md`."""
    options = parse()
    if options.cpus:
        os.sched_setaffinity(0, options.cpus)
    values = {name: value for name in ("weights", "data", "images", "video", "image") if (value := vars(options)[name])}
    if "images" in values:
        values.setdefault("image", str(min(path for path in Path(values["images"]).iterdir() if path.is_file())))
    checkouts = {OURS: ROOT, **{name: Path(folder).resolve() for name, folder in options.peer}}
    rows = chosen(options, values)
    runs, load = measure(rows, checkouts, values, options)
    affinity = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    about = machine(torch.device("cpu")) | {"processors": len(affinity) or os.cpu_count()}
    commits = {name: commit_of(folder) for name, folder in checkouts.items()}
    text = (
        f"# Whole commands, side by side\n\nMedians of {options.rounds} rounds of fresh processes, checkouts in turn; "
    )
    text += f"one-minute load before {load['load']:.2f}, other programs {load['others']:.0%} of the processors.\n"
    text += "Checkouts: " + ", ".join(f"{name} {commit}" for name, commit in commits.items()) + ".\n\n"
    text += summary(rows, runs) + "\n"
    results = {
        "machine": about,
        "load": load,
        "rounds": options.rounds,
        "checkouts": commits,
        "rows": {
            row: {name: [found._asdict() for found in several] for name, several in by_name.items()}
            for row, by_name in runs.items()
        },
    }
    write_results("side_by_side", results, text)


if __name__ == "__main__":
    main()
