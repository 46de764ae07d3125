"""Hosted trackers: W&B, MLflow, ClearML, Comet. Each is imported only when `--logger` names it.

A tracker receives options and hyperparameters at the start, the values of results.csv after every epoch, and at the
end the best weights, the images and the small files of the run. Images of the dataset and its labels are sent only as
plotted (`train_batch*.jpg`, `val_batch*.jpg`, report.html).
"""

from __future__ import annotations

import importlib.util
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.errors import ConfigError, did_you_mean

MLFLOW_CALL = 100  # parameters that its server accepts per request


@dataclass(frozen=True)
class RunInfo:
    """Facts of a run that trackers receive when it starts.

    Attributes:
        folder: run folder.
        project: name under which runs are grouped.
        entity: account of W&B, workspace of Comet; None = the user's own.
        options, hyp: plain values by name.
        resume_id: the tracker's id of this run if it is resumed, else None.
    """

    folder: Path
    project: str
    entity: str | None
    options: Mapping[str, Any]
    hyp: Mapping[str, Any]
    resume_id: str | None = None


@dataclass(frozen=True)
class Outcome:
    """Files and metrics of a run.

    Attributes:
        best: best weights, or None.
        images, files: files of the run folder; `files` are results.csv, the two YAMLs and the report.
        summary: the metrics of the best epoch as `best/...`.
        epoch: the last finished epoch.
    """

    best: Path | None
    images: tuple[Path, ...]
    files: tuple[Path, ...]
    summary: Mapping[str, float]
    epoch: int


class HostedLogger(ABC):
    """One tracker; its methods are called in the order start, add (per epoch), finish, close.

    Attributes:
        name: name in `--logger`.
        package, pip: import name and pip name of the package.
    """

    name: str
    package: str
    pip: str

    @abstractmethod
    def start(self, run: RunInfo) -> str:
        """Open the run, or continue with `run.resume_id`. Returns the tracker's id of the run."""

    @abstractmethod
    def add(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Send the metrics of one epoch."""

    @abstractmethod
    def finish(self, outcome: Outcome) -> None:
        """Send weights, images and files."""

    @abstractmethod
    def close(self, failed: bool) -> None:
        """End the run; `failed` if the training was interrupted or raised an error."""


class WandbLogger(HostedLogger):
    """Weights & Biases (https://docs.wandb.ai); WANDB_MODE=offline keeps everything in the run folder."""

    name = package = pip = "wandb"

    def start(self, run: RunInfo) -> str:
        import wandb

        self.wandb = wandb
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or run.project,
            entity=run.entity,
            name=run.folder.name,
            dir=str(run.folder),
            id=run.resume_id,
            resume="allow" if run.resume_id else None,
            config={**run.options, "hyp": dict(run.hyp)},
            reinit="create_new",
        )
        return str(self.run.id)

    def add(self, epoch: int, metrics: Mapping[str, float]) -> None:
        self.run.log(dict(metrics), step=epoch)

    def finish(self, outcome: Outcome) -> None:
        images = {f"images/{p.stem}": self.wandb.Image(str(p)) for p in outcome.images}
        if images:
            self.run.log(images)
        self.run.summary.update(dict(outcome.summary))
        model = self.wandb.Artifact(f"run_{self.run.id}_model", type="model", metadata=dict(outcome.summary))
        for path in (*([outcome.best] if outcome.best else []), *outcome.files):
            model.add_file(str(path), name=path.name)
        self.run.log_artifact(model, aliases=["best"] if outcome.best else None)

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class MlflowLogger(HostedLogger):
    """MLflow (https://mlflow.org).

    Without MLFLOW_TRACKING_URI everything is stored in `mlflow.db` and `mlartifacts` beside the run folders; view it
    with `mlflow ui --backend-store-uri sqlite:///runs/train/mlflow.db`.
    """

    name = package = pip = "mlflow"

    def start(self, run: RunInfo) -> str:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self.metric = Metric
        parent = run.folder.resolve().parent
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        self.client = MlflowClient(uri or f"sqlite:///{parent / 'mlflow.db'}")
        if run.resume_id:
            self.id = run.resume_id
            self.client.update_run(self.id, status="RUNNING")
            return self.id
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or run.project
        known = self.client.get_experiment_by_name(name)
        place = None if uri else (parent / "mlartifacts").as_uri()
        experiment = known.experiment_id if known else self.client.create_experiment(name, artifact_location=place)
        self.id = str(self.client.create_run(experiment, run_name=run.folder.name).info.run_id)
        texts = {**run.options, **{f"hyp/{key}": value for key, value in run.hyp.items()}}
        params = [Param(key, str(value)) for key, value in texts.items()]
        for begin in range(0, len(params), MLFLOW_CALL):
            self.client.log_batch(self.id, params=params[begin : begin + MLFLOW_CALL])
        return self.id

    def add(self, epoch: int, metrics: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        # Its server refuses colons in names: metrics/mAP_0.5:0.95 becomes metrics/mAP_0.5-0.95.
        self.client.log_batch(
            self.id, metrics=[self.metric(k.replace(":", "-"), v, now, epoch) for k, v in metrics.items()]
        )

    def finish(self, outcome: Outcome) -> None:
        self.add(outcome.epoch, outcome.summary)
        if outcome.best:
            self.client.log_artifact(self.id, str(outcome.best), "weights")
        for path in (*outcome.files, *outcome.images):
            self.client.log_artifact(self.id, str(path))

    def close(self, failed: bool) -> None:
        self.client.set_terminated(self.id, "FAILED" if failed else "FINISHED")


class ClearmlLogger(HostedLogger):
    """ClearML (https://clear.ml/docs); the server is set by its own environment variables or `clearml.conf`."""

    name = package = pip = "clearml"

    def start(self, run: RunInfo) -> str:
        from clearml import Task

        self.task = Task.init(
            project_name=run.project,
            task_name=run.folder.name,
            reuse_last_task_id=False,
            continue_last_task=run.resume_id or False,
            auto_connect_arg_parser=False,
            auto_connect_frameworks=False,
        )
        if run.resume_id:
            self.task.set_initial_iteration(0)  # otherwise its last epoch + 1 is added to every epoch
        self.task.connect(dict(run.options), name="Options")
        self.task.connect(dict(run.hyp), name="Hyperparameters")
        return str(self.task.id)

    def add(self, epoch: int, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            title, _, series = key.partition("/")
            self.task.get_logger().report_scalar(title, series or title, value, iteration=epoch)

    def finish(self, outcome: Outcome) -> None:
        for key, value in outcome.summary.items():
            self.task.get_logger().report_single_value(key, value)
        for path in outcome.images:
            self.task.get_logger().report_image("images", path.stem, iteration=outcome.epoch, local_path=str(path))
        for path in (*([outcome.best] if outcome.best else []), *outcome.files):
            self.task.upload_artifact(path.name, str(path), wait_on_upload=True)

    def close(self, failed: bool) -> None:
        if failed:
            self.task.mark_failed(status_reason="training was interrupted")
        self.task.close()


class CometLogger(HostedLogger):
    """Comet (https://www.comet.com/docs); COMET_MODE=OFFLINE keeps everything on this machine."""

    name = "comet"
    package = pip = "comet_ml"

    def start(self, run: RunInfo) -> str:
        import comet_ml

        offline = os.environ.get("COMET_MODE", "").lower() == "offline"
        self.experiment = comet_ml.start(
            workspace=run.entity,
            project_name=run.project,
            experiment_key=run.resume_id,
            online=not offline,
            experiment_config=comet_ml.ExperimentConfig(
                name=run.folder.name,
                log_code=False,
                log_graph=False,
                parse_args=False,
                auto_param_logging=False,
                auto_metric_logging=False,
                offline_directory=str(run.folder / "comet") if offline else None,
            ),
        )
        self.experiment.log_parameters(dict(run.options))
        self.experiment.log_parameters(dict(run.hyp), prefix="hyp")
        return str(self.experiment.get_key())

    def add(self, epoch: int, metrics: Mapping[str, float]) -> None:
        self.experiment.log_metrics(dict(metrics), step=epoch, epoch=epoch)

    def finish(self, outcome: Outcome) -> None:
        self.experiment.log_metrics(dict(outcome.summary), epoch=outcome.epoch)
        for path in outcome.images:
            self.experiment.log_image(str(path), name=path.name)
        for path in outcome.files:
            self.experiment.log_asset(str(path), file_name=path.name)
        if outcome.best:
            self.experiment.log_model("best", str(outcome.best))

    def close(self, failed: bool) -> None:
        self.experiment.log_other("failed", failed)
        self.experiment.end()


HOSTED: Mapping[str, type[HostedLogger]] = {
    cls.name: cls for cls in (WandbLogger, MlflowLogger, ClearmlLogger, CometLogger)
}
WITH_ENTITY = ("wandb", "comet")


def check_loggers(names: Sequence[str], entity: str | None = None) -> None:
    """Raise ConfigError for unknown loggers, packages that are not installed, and an unused `--entity`.

    No tracker is imported; called at the start of a run on every rank.
    """
    for name in names:
        if name not in HOSTED:
            raise ConfigError(
                f"--logger {name}: not known; allowed: {', '.join(HOSTED)}{did_you_mean(name, HOSTED)} "
                "(CSV and TensorBoard are always written)"
            )
        if not _installed(HOSTED[name].package):
            raise ConfigError(f"--logger {name}: its package is not installed; pip install {HOSTED[name].pip}")
    if entity and not set(names) & set(WITH_ENTITY):
        raise ConfigError(f"--entity {entity}: names an account of {' or '.join(WITH_ENTITY)}; add --logger wandb")


def _installed(package: str) -> bool:
    """Return whether a package is installed; a plain folder of that name, such as wandb's runs, does not count."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None
