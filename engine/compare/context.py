"""Shared state of the stages of a comparison: options, data, folders, keys, sample images."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from numpy.typing import NDArray

from data.config import DataConfig
from data.images import read
from data.labels.labels import Annotations, load_annotations
from engine.cli.config import Hyperparameters, TrainConfig
from engine.compare.config import RECIPE, CompareConfig
from engine.compare.measure.detector import SampleFiles
from engine.compare.measure.machine import describe_machine
from engine.compare.results import CandidateResult
from engine.compare.store import MEASURING_CODE, REPORTING, TRAINING_CODE, Store, code_key, data_key, digest
from engine.compare.worker.process import Worker
from engine.compare.worker.setting import Setting
from engine.train.options import choose_hyperparameters, resolve_auto, with_recipe
from utils.device import amp_dtype, select_device
from utils.errors import DataError
from utils.files import make_folder

LOGGER = logging.getLogger(__name__)
SAMPLE_IMAGES = 8
CPU_STEP_BATCH = 2


@dataclass(frozen=True)
class Context:
    """Immutable state of a comparison.

    Attributes:
        config: options.
        data: the dataset.
        device: device of all measurements.
        cache: folder of stored results.
        store: finished results.
        sample: images that are timed and shown with their detections in the report.
        machine: description.
        memory: bytes that a candidate may allocate on a CPU.
        optimizer: optimizer of all trainings; `--optimizer auto` is resolved.
        recipe_text: description of the recipe of all trainings.
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
    optimizer: str
    recipe_text: str
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
        splits = [config.task, *(["train", "val"] if config.epochs else [])]
        for name in splits:
            data.split(name)
        optimizer, hyp = resolve_recipe(config, data)
        cache = make_folder(cache_folder(config))
        annotations = load_annotations(data.split(config.task), len(data.names))
        LOGGER.info("%s", annotations.report.summary())
        seen = data_key(data, [config.task])
        machine = describe_machine(device, config.threads)
        versions = {"torch": machine["torch"], "device": device.type}
        recipe = {name: getattr(config, name) for name in RECIPE} | {"hyp": hyp.to_dict(), "cache": None}
        training = [recipe, optimizer, code_key(TRAINING_CODE), versions]
        return cls(
            config=config, data=data, device=device, cache=cache, store=Store(cache / "results", config.fresh),
            sample=choose_sample(annotations), machine=machine,
            memory=config.memory_gb * 1e9 or float(psutil.virtual_memory().available), optimizer=optimizer,
            recipe_text=f"{Path(config.hyp).name}, {optimizer}{' (auto)' if hyp.optimizer == 'auto' else ''}, "
            f"lr0 {hyp.lr0:g}, {config.epochs} epochs at {config.imgsz} pixels, batch {config.batch_size}",
            measuring_key=digest([machine, config.imgsz, recipe["hyp"], optimizer, config.amp, config.batch_size,
                                  seen, code_key(MEASURING_CODE, REPORTING)]),
            training_key=digest([*training, data_key(data, dict.fromkeys(splits))] if config.epochs else []),
            validation_key=digest([config.imgsz, config.task, config.batch_size, seen, code_key(TRAINING_CODE),
                                   versions]),
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
        """Return the options of train.py for a candidate; candidates differ in `cfg`, `head` and `seed` only."""
        config = self.config
        device = "cpu" if self.device.type == "cpu" else str(self.device.index or 0)
        chosen = {name: getattr(config, name) for name in RECIPE} | {"epochs": max(config.epochs, 1)}
        return {
            **chosen, "cfg": str(row.candidate.cfg or ""), "head": row.candidate.head, "data": config.data,
            "seed": seed, "device": device, "workers": config.workers, "patience": 0, "noplots": True,
            "plugin": list(config.plugin),
        }  # fmt: skip

    def step_recipe(self, row: CandidateResult) -> dict[str, Any]:
        """Return the options of the training step that is measured."""
        return {**self.recipe(row), "optimizer": self.optimizer}

    def worker(self, row: CandidateResult) -> Worker:
        """Start a new process for a candidate."""
        config, candidate = self.config, row.candidate
        names, device = dict(self.data.names), str(self.device)
        setting = Setting(
            candidate.file.resolve(), names, device, config.threads, self.memory, tuple(config.plugin), candidate.head
        )
        return Worker(setting, self.log(row))

    def log(self, row: CandidateResult) -> Path:
        """Return the log file of a candidate's processes."""
        return self.cache / "logs" / f"{safe(row.label)}.log"


def resolve_recipe(config: CompareConfig, data: DataConfig) -> tuple[str, Hyperparameters]:
    """Return optimizer and hyperparameters of all trainings, chosen as train.py does.

    The optimizer of the hyperparameters is `auto` where it was chosen by `--optimizer auto`.

    Raises:
        UserError: a file that cannot be used, or was made for another optimizer.
    """
    options = {name: getattr(config, name) for name in ("hyp", "optimizer", "batch_size")}
    training = with_recipe(TrainConfig(**options, epochs=max(config.epochs, 1)))
    hyp = choose_hyperparameters(training, None)
    is_auto, images = training.optimizer == "auto", 1
    if is_auto and config.epochs:
        images = len(load_annotations(data.split("train"), len(data.names)).records)
    training, hyp = resolve_auto(training, hyp, len(data.names), images)
    return str(training.optimizer), replace(hyp, optimizer="auto" if is_auto else training.optimizer)


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
