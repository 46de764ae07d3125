"""Loggers of a training run: results.csv and TensorBoard always, hosted trackers on request."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from engine.loggers.trackers import HOSTED, HostedLogger, Outcome, RunInfo, check_loggers
from utils.errors import ConfigError, DataError
from utils.files import atomic_path
from utils.metrics import fitness
from utils.plots import read_history

LOGGER = logging.getLogger(__name__)

METRICS = ("metrics/precision", "metrics/recall", "metrics/mAP_0.5", "metrics/mAP_0.5:0.95")
RATES = ("x/lr0", "x/lr1", "x/lr2")
LOSSES = ("box", "obj", "cls")  # of the anchor head


def columns_for(losses: Sequence[str]) -> tuple[str, ...]:
    """Return the columns of results.csv for the losses of a head."""
    train, val = ([f"{split}/{name}_loss" for name in losses] for split in ("train", "val"))
    return ("epoch", *train, *METRICS, *val, *RATES)


COLUMNS = columns_for(LOSSES)
IDS = "loggers.json"
FILES = ("results.csv", "opt.yaml", "hyp.yaml", "report.html")


class CsvLog:
    """results.csv as YOLOv5 writes it: cells right-aligned to 20 characters, one row per epoch."""

    def __init__(self, folder: Path, columns: Sequence[str] = COLUMNS) -> None:
        self.path, self.columns = folder / "results.csv", columns

    def drop_from(self, epoch: int) -> None:
        """Keep only the last row of each epoch before `epoch`; a resumed run writes the others again."""
        if not self.path.is_file():
            return
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        rows = {_epoch_of(line): line for line in lines[1:]}
        kept = [line for number, line in sorted(rows.items()) if 0 <= number < epoch]
        with atomic_path(self.path) as part:
            part.write_text("\n".join([self._header(), *kept]) + "\n")

    def add(self, values: Sequence[float]) -> None:
        """Append one row (`COLUMNS`).

        Raises:
            DataError: the disk is full, or the folder cannot be written to.
        """
        row = ",".join(f"{v:20.5g}" for v in values) + "\n"
        try:
            new = not self.path.is_file()
            with open(self.path, "a") as stream:  # in one write, so that a kill leaves no partial row
                stream.write(self._header() + "\n" + row if new else row)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be written: {error.strerror or error}") from error

    def _header(self) -> str:
        return ",".join(f"{c:>20}" for c in self.columns)


def _epoch_of(line: str) -> int:
    """Return the epoch of a row of results.csv, or -1 for an incomplete row."""
    cells = line.split(",")
    if len(cells) != len(COLUMNS) or any(len(cell) < 20 for cell in cells):
        return -1
    try:
        return int(float(cells[0]))
    except (ValueError, OverflowError):  # OverflowError: int(inf)
        return -1


class TensorBoardLog:
    """The values of results.csv as TensorBoard events; does nothing if the package is not installed.

    Args:
        folder: run folder.
        start_epoch: TensorBoard drops earlier events of this epoch and later ones.
        columns: names of the values.
    """

    def __init__(self, folder: Path, start_epoch: int = 0, columns: Sequence[str] = COLUMNS) -> None:
        self.writer: Any = None
        self.columns = columns
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            LOGGER.info("TensorBoard: not installed (pip install tensorboard); results.csv has the same values")
            return
        self.writer = SummaryWriter(str(folder), purge_step=start_epoch or None)

    def add(self, values: Sequence[float]) -> None:
        """Write one epoch (`COLUMNS`)."""
        if self.writer is None:
            return
        for name, value in zip(self.columns[1:], values[1:], strict=True):
            self.writer.add_scalar(name, value, int(values[0]))

    def close(self) -> None:
        """Flush and close the event file."""
        if self.writer is not None:
            self.writer.close()


class Logs:
    """All loggers of a run; a context manager that closes them.

    A hosted tracker that fails during training (for example, without network) is disabled with a warning: results are
    in the run folder in any case.

    Args:
        folder: run folder.
        local: results.csv and TensorBoard; empty on ranks other than zero.
        hosted: started trackers.
    """

    def __init__(
        self,
        folder: Path,
        local: Sequence[CsvLog | TensorBoardLog] = (),
        hosted: Sequence[HostedLogger] = (),
        columns: Sequence[str] = COLUMNS,
    ) -> None:
        self.folder, self.columns = folder, columns
        self.local = tuple(local)
        self.hosted = list(hosted)

    def add(self, values: Sequence[float]) -> None:
        """Report one epoch.

        Args:
            values: one per entry of `COLUMNS`.

        Raises:
            DataError: results.csv cannot be written.
        """
        for log in self.local:
            log.add(values)
        metrics = {name: float(value) for name, value in zip(self.columns[1:], values[1:], strict=True)}
        self._each(lambda log: log.add(int(values[0]), metrics))

    def finish(self) -> None:
        """Send weights, images and files of the run folder to the hosted trackers."""
        if self.hosted:
            outcome = outcome_of(self.folder)
            self._each(lambda log: log.finish(outcome))

    def close(self, failed: bool = False) -> None:
        """Close all loggers; a second call does nothing.

        Args:
            failed: training was interrupted or raised an error.
        """
        for log in self.local:
            if isinstance(log, TensorBoardLog):
                log.close()
        self._each(lambda log: log.close(failed))
        self.local, self.hosted = (), []

    def _each(self, work: Callable[[HostedLogger], None]) -> None:
        for log in list(self.hosted):
            try:
                work(log)
            except Exception as error:  # noqa: BLE001 -- a tracker's client may raise anything; training must continue
                LOGGER.warning("--logger %s: disabled: %s: %s", log.name, type(error).__name__, _one_line(error))
                self.hosted.remove(log)

    def __enter__(self) -> Logs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)


def make_logs(
    names: Sequence[str],
    folder: Path,
    options: Mapping[str, Any],
    hyp: Mapping[str, Any],
    start_epoch: int = 0,
    losses: Sequence[str] = LOSSES,
    resumed: bool = False,
) -> Logs:
    """Open results.csv, TensorBoard, and the hosted trackers; call it on rank zero only.

    Args:
        names: names of hosted trackers (`--logger`).
        folder: run folder.
        options: options of the command; `project` and `entity` are used.
        hyp: hyperparameters.
        start_epoch: first epoch that will be reported.
        losses: names of the three parts of the loss.
        resumed: continue the run in the trackers, too; also after an interruption in the first epoch.

    Raises:
        ConfigError: a tracker that is not known, not installed, or cannot be started (no account, no server).
    """
    names = list(dict.fromkeys(names))
    check_loggers(names, options.get("entity"))
    columns = columns_for(losses)
    csv = CsvLog(folder, columns)
    csv.drop_from(start_epoch)
    ids = _read_ids(folder) if resumed else {}
    hosted: list[HostedLogger] = []
    for name in names:
        log = HOSTED[name]()
        run = RunInfo(folder, project_name(options), options.get("entity"), options, hyp, ids.get(name))
        try:
            ids[name] = log.start(run)
        except Exception as error:
            for other in hosted:
                other.close(failed=True)
            raise ConfigError(f"--logger {name}: cannot be started: {_one_line(error)}") from error
        hosted.append(log)
    if hosted:
        with atomic_path(folder / IDS) as part:
            part.write_text(json.dumps(ids))
    return Logs(folder, (csv, TensorBoardLog(folder, start_epoch, columns)), hosted, columns)


def project_name(options: Mapping[str, Any]) -> str:
    """Return the tracker's project name: the last folder of `--project`, or `detector` for `runs/train`."""
    name = Path(str(options.get("project", ""))).name
    return name if name and name != "train" else "detector"


def outcome_of(folder: Path) -> Outcome:
    """Collect the files of a run folder and the metrics of its best epoch."""
    best = folder / "weights" / "best.pt"
    images = sorted(p for p in folder.iterdir() if p.suffix in (".png", ".jpg") and not p.name.startswith("."))
    files = tuple(folder / name for name in FILES if (folder / name).is_file())
    summary, last = best_epoch(folder)
    return Outcome(best if best.is_file() else None, tuple(images), files, summary, last)


def best_epoch(folder: Path) -> tuple[dict[str, float], int]:
    """Return the metrics of the best epoch as `best/...`, and the last epoch; empty without epochs."""
    try:
        history = read_history(folder / "results.csv")
    except DataError:
        return {}, 0
    if not len(history.get("epoch", ())) or any(name not in history for name in METRICS):
        return {}, 0
    values = np.stack([history[name] for name in METRICS], 1)
    row = len(values) - 1 - int(fitness(values)[::-1].argmax())  # the last of equal values, as for best.pt
    summary = {f"best/{name.partition('/')[2]}": float(history[name][row]) for name in METRICS}
    return {"best/epoch": float(history["epoch"][row]), **summary}, int(history["epoch"][-1])


def _read_ids(folder: Path) -> dict[str, str]:
    try:
        found = json.loads((folder / IDS).read_text())
    except (OSError, ValueError):
        return {}
    return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
