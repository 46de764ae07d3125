"""Candidates of a comparison: each `--cfg` and `--weights` entry with a label and a model YAML or checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from data.config import DataConfig
from engine.compare.config import CompareConfig
from engine.compare.store import digest, stat_key
from engine.evaluate.evaluator import check_classes
from models.backbones import BACKBONES, ROW_CLASSES, TIMM_PREFIX, is_backbone_name, list_backbones, row_names
from models.backbones.timm_measure import is_timm_name, timm_package
from models.build.spec import FOLDERS
from models.checkpoint.file_kinds import find_checkpoint
from models.checkpoint.io import read_checkpoint
from utils.errors import ConfigError, DataError, UserError, did_you_mean, listed
from utils.files import ROOT, find_file
from utils.yaml_lines import dump_yaml, load_yaml, plain

LOGGER = logging.getLogger(__name__)
TEMPLATE = ROOT / "models" / "yolov5-timm.yaml"  # the neck of yolov5n behind a backbone row
YAML_SUFFIXES = (".yaml", ".yml")
# Feature maps of plain vision transformers: the widths of yolov5n's backbone, as in the YAMLs in models/.
PYRAMID = {"strides": [8, 16, 32], "widths": [64, 128, 256]}
REVVIT = "revvit"


@dataclass(frozen=True)
class Candidate:
    """One row of the comparison.

    Attributes:
        label: unique name in tables and plots.
        given: as given on the command line.
        cfg: model YAML; None with `weights`.
        weights: trained checkpoint; None with `cfg`.
        key: hash of everything that the file defines.
        backbone: the label without the head.
        head: the head of `--head` that replaces the one of the YAML; None = its own.
    """

    label: str
    given: str
    cfg: Path | None
    weights: Path | None
    key: str
    backbone: str = ""
    head: str | None = None

    @property
    def file(self) -> Path:
        """The YAML or the checkpoint."""
        path = self.cfg or self.weights
        assert path is not None
        return path


def resolve(config: CompareConfig, data: DataConfig, specs: Path) -> list[Candidate]:
    """Return the candidates that the options name, in order: each `--cfg` with each `--head`, then the checkpoints.

    YAMLs are located but not read: an invalid one becomes a failed row.

    Args:
        config: options; plugins are loaded.
        data: the dataset; checkpoints must have its classes.
        specs: folder for the YAMLs of backbones that are given by name.

    Raises:
        UserError: unknown names, missing files, checkpoints with other classes; all in one line.
    """
    found: list[tuple[str, Path, bool]] = []
    problems: list[str] = []
    given_names = [(given, False) for given in dict.fromkeys(config.cfg)]
    for given, is_trained in [*given_names, *((given, True) for given in dict.fromkeys(config.weights))]:
        try:
            path = _checkpoint(given, data) if is_trained else _yaml_of(given, config.pretrained, specs)
            found.append((given, path, is_trained))
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("; ".join(problems))
    _warn_without_effect(config, [given for given, path, trained in found if not trained and path.parent != specs])
    labels = unique_labels([_names_of(*names) for names in found])
    candidates = []
    for label, (given, path, is_trained) in zip(labels, found):
        key = _key(path, is_trained, config)
        if is_trained:
            candidates.append(Candidate(label, given, None, path, key, label))
            continue
        if not config.head:
            candidates.append(Candidate(label, given, path, None, key, label))
        candidates += [
            Candidate(f"{label} ({head})", given, path, None, digest([key, head]), label, head) for head in config.head
        ]
    return candidates


def _warn_without_effect(config: CompareConfig, yamls: Sequence[str]) -> None:
    """Log a warning for options without effect; `yamls` are the candidates that are model YAMLs."""
    if config.pretrained and yamls:
        LOGGER.warning("--pretrained has no effect on %s: the backbone row of a YAML names its weights", listed(yamls))
    if len(config.seeds) > 1 and not config.epochs:
        LOGGER.warning("--seeds has no effect: nothing is trained; add --epochs")


def unique_labels(names: Sequence[Sequence[str]]) -> list[str]:
    """Return the shortest unique name of each.

    Args:
        names: per candidate, from short to long.
    """
    depth = [0] * len(names)
    while True:
        labels = [options[min(d, len(options) - 1)] for options, d in zip(names, depth)]
        longer = [labels.count(label) > 1 and d < len(options) - 1 for label, options, d in zip(labels, names, depth)]
        if not any(longer):
            break
        depth = [d + more for d, more in zip(depth, longer)]
    return [
        f"{label} ({labels[:k].count(label) + 1})" if label in labels[:k] else label for k, label in enumerate(labels)
    ]


def _names_of(given: str, path: Path, trained: bool) -> list[str]:
    """Return names from short to long; a checkpoint is named by its run first, since all files are called best.pt."""
    if not trained and not given.lower().endswith(YAML_SUFFIXES):
        return [given.removeprefix(TIMM_PREFIX), given]
    parts = PurePath(path).with_suffix("").parts
    if trained:
        parts = tuple(part for part in parts if part != "weights") or parts
    names = ["/".join(parts[-n:]) for n in range(1, len(parts) + 1)]
    usual = trained and parts[-1] in ("best", "last") and len(names) > 1
    return (names[1:] if usual else names) + [str(path)]


def _yaml_of(given: str, pretrained: bool, specs: Path) -> Path:
    if given.lower().endswith(YAML_SUFFIXES):
        return find_file(given, *FOLDERS)
    if _is_backbone(given):
        return write_spec(given, pretrained, specs)
    try:
        return find_file(given, *FOLDERS)
    except ConfigError:
        yamls = [p.stem for folder in FOLDERS for p in (ROOT / folder).glob("*.yaml")]
        name = given.removeprefix(TIMM_PREFIX)
        prefix = TIMM_PREFIX if name != given else ""
        near = did_you_mean(given, [prefix + known for known in [*yamls, *row_names(name)]])
        allowed = "a model YAML, timm/<name>, or a registered backbone (python -m models.backbones lists them)"
        raise ConfigError(f"--cfg {given}: unknown; allowed: {allowed}{near}") from None


def _is_backbone(name: str) -> bool:
    if not name.startswith(TIMM_PREFIX):
        return is_backbone_name(name)
    timm_package()  # ConfigError with the pip command if missing
    return is_timm_name(name.removeprefix(TIMM_PREFIX))


def write_spec(name: str, pretrained: bool, folder: Path) -> Path:
    """Write the model YAML of a backbone given by name: its row, and the neck of yolov5n.

    Args:
        name: registered name, class name, `timm/<name>` or a timm name.
        pretrained: ask for the published weights.
        folder: where it is written.
    """
    arguments: dict[str, Any] = {}
    own = BACKBONES.get(name) or ROW_CLASSES.get(name)
    if own is None and is_backbone_name(name) and not _is_plugin(name):
        arguments = {"extra_levels": True, **PYRAMID}
    elif own is not None and isinstance(own.target, str) and REVVIT in own.target:
        arguments = dict(PYRAMID)
    if pretrained:
        arguments["weights"] = True
    content = plain(load_yaml(TEMPLATE))
    content["backbone"][0] = [-1, 1, name, arguments or []]
    path = folder / f"{name.replace('/', '-')}-{digest(content)}.yaml"
    if not path.is_file():
        dump_yaml(path, content)
    return path


def _is_plugin(name: str) -> bool:
    return name in list_backbones() and name not in BACKBONES


def _checkpoint(given: str, data: DataConfig) -> Path:
    path = find_checkpoint(given)
    try:
        check_classes(read_checkpoint(path).names, data, str(given))
    except DataError as error:
        found = str(error).rpartition("; ")[0]  # without the hint at an option of val.py
        raise DataError(f"{found}; give the dataset that it was trained on") from error
    return path


def _key(path: Path, trained: bool, config: CompareConfig) -> str:
    plugins = [digest(Path(text).read_bytes()) for text in config.plugin]
    if trained:
        return digest([digest(path.read_bytes()), plugins])
    try:
        content = plain(load_yaml(path))
    except UserError as error:  # reported when the candidate is built
        return digest([str(error), plugins])
    return digest([content, [stat_key(file) for file in _named_files(content)], plugins])


def _named_files(value: object) -> list[Path]:
    """Return the files that a YAML names (weights of a backbone row)."""
    if isinstance(value, Mapping):
        return [path for item in value.values() for path in _named_files(item)]
    if isinstance(value, (list, tuple)):
        return [path for item in value for path in _named_files(item)]
    return [Path(value)] if isinstance(value, str) and "." in value and Path(value).is_file() else []
