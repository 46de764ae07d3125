"""Published weights: the table `published.yaml`, finding and fetching a file, loading it with a report.

A backbone class declares how its published files differ from its own key names by class attributes, all optional:
`IGNORED_KEYS` (glob patterns of the file's keys that are known and not needed: the classifier), `NEW_KEYS` (patterns of
its own keys that no published file holds), `DEPLOYED_KEYS` (patterns of keys that only a re-parameterized network has),
`official_key(key) -> key` (another spelling to its own),
`convert_official(state) -> state` (layouts that differ by more than spelling) and
`resize_official(key, tensor, target_shape) -> tensor` (position embeddings).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from models.backbones.base import Backbone
from models.checkpoint.state_dict import LoadReport, load_state, read_state_dict, shorten
from utils.errors import CheckpointError, UserError, did_you_mean
from utils.files import download, url_file_name
from utils.log import is_main_process
from utils.yaml_lines import load_yaml

LOGGER = logging.getLogger(__name__)
TABLE = Path(__file__).with_name("published.yaml")
NO_PLACE = "no such entry"  # reason in a LoadReport for an entry of the file that the module does not have
WRAPPERS = re.compile(r"^(module\.|backbone\.|model\.)+")
MAX_SPARE = 0.1  # fraction of a file's entries that may be unused; more means another architecture


@dataclass(frozen=True)
class PublishedWeights:
    """One published file.

    Attributes:
        name: its name in `weights:` of a model YAML.
        backbone: registered name of the backbone that it fits.
        layout: key names and wrapper of the file: mmpretrain, SlowFast, RepMLP, Next-ViT or timm.
        resolution: side of the images it was trained on last, in pixels.
        top1, top5: ImageNet-1k validation accuracy in percent, as published.
        params, flops: millions of parameters and 10^9 multiply-adds with the classifier at `resolution`, as published.
        file: name in the cache folder.
        url: where it is downloaded from.
        sha256: leading hex digits of its hash, None where none is published.
        source: the project that published it.
    """

    name: str
    backbone: str
    layout: str
    resolution: int
    top1: float
    top5: float | None
    params: float
    flops: float
    file: str
    url: str
    sha256: str | None
    source: str


@lru_cache(maxsize=1)
def published_table() -> Mapping[str, PublishedWeights]:
    """Return name -> published file, in the order of `published.yaml`."""
    data = load_yaml(TABLE)
    rows = (PublishedWeights(**row, source=data["sources"][row["layout"]]) for row in data["weights"])
    return {row.name: row for row in rows}


def published_for(backbone: str) -> tuple[PublishedWeights, ...]:
    """Return the published files for a registered backbone, the default first (may be empty)."""
    return tuple(row for row in published_table().values() if row.backbone == backbone)


def weights_cache() -> Path:
    """Return the folder of downloaded files: torch hub's, so that TORCH_HOME moves it."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def find_weights(weights: str | Path | bool, backbone: str | None) -> Path:
    """Return the local file of `weights`, downloaded into the cache if it is a URL or a published name.

    Args:
        weights: True (the first published file for `backbone`), a published name, a URL, or a path.
        backbone: registered name of the backbone, None where it has none (a user's architecture).

    Raises:
        CheckpointError: no such file or name, or it cannot be fetched: says where to put the file by hand.
    """
    fitting = {row.name: row for row in published_for(backbone)} if backbone else {}
    if weights is True:
        if not fitting:
            what = f"'{backbone}'" if backbone else "this architecture"
            raise CheckpointError(f"weights: no published weights for {what}; give a path or a URL")
        return _fetch(next(iter(fitting.values())))
    text = str(weights)
    row = published_table().get(text)
    if row is not None:
        if row.name not in fitting:
            allowed = ", ".join(fitting) or "none published"
            raise CheckpointError(f"weights: '{text}' are for {row.backbone}, not {backbone}; allowed: {allowed}")
        return _fetch(row)
    if "://" in text:
        return _download(text, url_file_name(text) or "weights.pth", None)
    path = Path(text).expanduser()
    if path.is_file():
        return path
    names = f"; published for {backbone}: {', '.join(fitting)}" if fitting else ""
    raise CheckpointError(f"weights: '{text}' is not a file, URL or published name{names}{did_you_mean(text, fitting)}")


def _fetch(row: PublishedWeights) -> Path:
    return _download(row.url, row.file, row.sha256)


def _download(url: str, file: str, sha256: str | None) -> Path:
    path = weights_cache() / file
    try:
        return download(url, path, sha256)
    except UserError as error:
        raise CheckpointError(str(error)) from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the state dict of a published file (`torch.save` or safetensors).

    Raises:
        CheckpointError: the file is damaged or contains no state dict.
    """
    if path.suffix != ".safetensors":
        return read_state_dict(path)
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise CheckpointError(f"{path}: reading this format needs a package: pip install safetensors") from error
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: damaged or not a safetensors file") from error


def load_published(
    backbone: Backbone, weights: str | Path | bool, name: str | None, *, partial: bool = False
) -> LoadReport | None:
    """Load a weights file in any published layout into `backbone`, in place, and log the outcome of every entry.

    Processes of a rank above zero load nothing: data-parallel training sends them the values of rank zero.

    Args:
        backbone: a freshly built backbone.
        weights: see `find_weights`.
        name: registered name of the backbone, None where it has none.
        partial: accept wrong shapes, missing and spare entries; the report names them.

    Returns:
        The report; None where nothing was loaded.

    Raises:
        CheckpointError: if the file is not available or readable, or belongs to another architecture.
    """
    if not is_main_process():
        return None
    path = find_weights(weights, name)
    state = read_weights(path)
    convert = getattr(backbone, "convert_official", None)
    if convert is not None:
        state = convert(state)
    where = str(path)
    _check_form(backbone, state, where)
    report = load_state(
        backbone,
        state,
        partial=partial,
        key_map=_key_map(backbone),
        ignore=getattr(backbone, "IGNORED_KEYS", ()),
        allow_new=getattr(backbone, "NEW_KEYS", ()),
        resize=_resize(backbone),
        where=where,
    )
    spare = [key for key, reason in report.unexpected if reason == NO_PLACE]
    if not partial and len(spare) > MAX_SPARE * len(state):
        raise CheckpointError(
            f"{where}: {len(spare)} of its {len(state)} entries are not in {name or type(backbone).__name__} "
            f"({shorten(spare)}): weights of another architecture?"
        )
    LOGGER.info("%s: %s: %s", name or type(backbone).__name__, path.name, report.summary())
    return report


def _check_form(backbone: Backbone, state: Mapping[str, Tensor], where: str) -> None:
    """Raise CheckpointError if only one of file and backbone is re-parameterized (`deploy: true`)."""
    patterns = getattr(backbone, "DEPLOYED_KEYS", ())

    def deployed(keys: Iterable[str]) -> list[str]:
        return [key for key in keys for pattern in patterns if fnmatchcase(key, pattern)]

    in_file, built = deployed(state), deployed(backbone.state_dict())
    if in_file and not built:
        raise CheckpointError(
            f"{where}: contains a re-parameterized model ({shorten(in_file, 2)}); required: the "
            "training-time model, or build the backbone with deploy: true"
        )
    if built and not in_file:
        raise CheckpointError(f"{where}: contains a training-time model; the backbone is built with deploy: true")


def _key_map(backbone: Backbone) -> Callable[[str], str | None] | None:
    """Return a function from a file's key to the class's key, or None for keys that are not needed."""
    official_key = getattr(backbone, "official_key", None)
    if official_key is None:
        return None
    ignored = getattr(backbone, "IGNORED_KEYS", ())

    def key_map(key: str) -> str | None:
        own = official_key(WRAPPERS.sub("", key))
        return None if any(fnmatchcase(own, pattern) for pattern in ignored) else own

    return key_map


def _resize(backbone: Backbone) -> Callable[[str, Tensor, Tensor], Tensor | None] | None:
    resize_official = getattr(backbone, "resize_official", None)
    if resize_official is None:
        return None

    def resize(key: str, value: Tensor, target: Tensor) -> Tensor | None:
        try:
            return resize_official(key, value, tuple(target.shape))
        except UserError:
            return None  # the report then says that the shapes differ, for all keys alike

    return resize
