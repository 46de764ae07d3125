"""Shared state of the stages of a comparison: options, data, folders, keys, sample images."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from numpy.typing import NDArray

from data.config import DataConfig
from data.images import read
from data.labels.labels import Annotations, load_annotations
from engine.cli.config import Hyperparameters
from engine.compare.config import RECIPE, CompareConfig
from engine.compare.measure.detector import SampleFiles
from engine.compare.measure.machine import describe_machine
from engine.compare.results import CandidateResult
from engine.compare.store import MEASURING_CODE, REPORTING, TRAINING_CODE, Store, code_key, data_key, digest
from engine.compare.worker.process import Worker
from engine.compare.worker.setting import Setting
from utils.device import amp_dtype, select_device
from utils.errors import DataError
from utils.files import find_file, make_folder

LOGGER = logging.getLogger(__name__)
SAMPLE_IMAGES = 8
CPU_STEP_BATCH = 2


@dataclass(frozen=True)
class Context:
    """Immutable state of a comparison.

    Attributes:
        config: options.
        data: the dataset.
        device: of all measurements.
        cache: folder of stored results.
        store: finished results.
        sample: images that are timed.
        machine: description.
        memory: bytes that a candidate may allocate on a CPU.
        measuring_key: hash of everything that measurements depend on besides the candidate.
        training_key: the same for trainings.
        validation_key: the same for validations.
    """

    config: CompareConfig
    data: DataConfig
    device: torch.device
    cache: Path
    store: Store
    sample: SampleFiles
    machine: dict[str, Any]
    memory: float
    measuring_key: str
    training_key: str
    validation_key: str

    @classmethod
    def prepare(cls, config: CompareConfig, data: DataConfig) -> Context:
        """Check the options against the machine and the dataset.

        Raises:
            UserError: a device, dataset, hyperparameter file or folder that cannot be used.
        """
        device = select_device(config.device)
        amp_dtype(config.amp, device)
        hyp = Hyperparameters.from_yaml(find_file(config.hyp, "data/hyps"))
        splits = [config.task, *(["train", "val"] if config.epochs else [])]
        for name in splits:
            data.split(name)
        cache = make_folder(cache_folder(config))
        annotations = load_annotations(data.split(config.task), len(data.names))
        LOGGER.info("%s", annotations.report.summary())
        seen = data_key(data, [config.task])
        machine = describe_machine(device, config.threads)
        versions = {"torch": machine["torch"], "device": device.type}
        recipe = {name: getattr(config, name) for name in RECIPE} | {"hyp": hyp.to_dict(), "cache": None}
        training = (
            [recipe, data_key(data, dict.fromkeys(splits)), code_key(TRAINING_CODE), versions] if config.epochs else []
        )
        return cls(
            config=config, data=data, device=device, cache=cache, store=Store(cache / "results", config.fresh),
            sample=choose_sample(annotations), machine=machine,
            memory=config.memory_gb * 1e9 or float(psutil.virtual_memory().available),
            measuring_key=digest([machine, config.imgsz, recipe["hyp"], config.optimizer, config.amp, config.batch_size,
                                  seen, code_key(MEASURING_CODE, REPORTING)]),
            training_key=digest(training),
            validation_key=digest([config.imgsz, config.task, seen, code_key(TRAINING_CODE), versions]),
        )  # fmt: skip

    @property
    def step_batch(self) -> int:
        """Images of the training step that is measured."""
        if self.config.step_batch:
            return self.config.step_batch
        return self.config.batch_size if self.device.type == "cuda" else min(self.config.batch_size, CPU_STEP_BATCH)

    @property
    def exports(self) -> Path:
        """Folder of exported files; removed at the end."""
        return self.cache / "exports"

    @property
    def initial(self) -> Path:
        """Folder of checkpoints with random weights and other temporary files; removed at the end."""
        return self.cache / "initial"

    def recipe(self, row: CandidateResult, seed: int = 0) -> dict[str, Any]:
        """Return the options of train.py for a candidate, which differ in `cfg` and `seed` only."""
        config = self.config
        device = "cpu" if self.device.type == "cpu" else str(self.device.index or 0)
        chosen = {name: getattr(config, name) for name in RECIPE} | {"epochs": max(config.epochs, 1)}
        return {
            **chosen, "cfg": str(row.candidate.cfg or ""), "data": config.data, "seed": seed, "device": device,
            "workers": config.workers, "patience": 0, "noplots": True, "plugin": list(config.plugin),
        }  # fmt: skip

    def worker(self, row: CandidateResult) -> Worker:
        """Start a new process for a candidate."""
        setting = Setting(
            row.candidate.file.resolve(), dict(self.data.names), str(self.device), self.config.threads, self.memory,
            tuple(self.config.plugin),
        )  # fmt: skip
        return Worker(setting, self.log(row))

    def log(self, row: CandidateResult) -> Path:
        """Return the file that the output of a candidate's processes goes to."""
        return self.cache / "logs" / f"{safe(row.label)}.log"


def cache_folder(config: CompareConfig) -> Path:
    """Return the folder of stored results."""
    return Path(config.project) / "cache"


def safe(label: str) -> str:
    """Return a label as part of a file name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", label).strip("-.") or "candidate"


def choose_sample(annotations: Annotations) -> SampleFiles:
    """Return a few readable images, evenly spread over the split, on which all candidates are measured."""
    records = annotations.records
    sample: list[tuple[Path, NDArray[np.float32]]] = []
    for record in records[:: max(len(records) // SAMPLE_IMAGES, 1)]:
        try:
            read(record.path)
        except DataError as error:
            LOGGER.warning("%s; left out", error)
            continue
        sample.append((record.path.resolve(), record.labels))
        if len(sample) == SAMPLE_IMAGES:
            break
    if not sample:
        raise DataError("none of the images can be read")
    return tuple(sample)
