"""Writers of files like the official project's, without its code: pickled objects whose classes exist only by name."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn


class Named:
    """Base of stand-in classes; `_NamingPickler` writes them under the name they claim."""


def stand_in(name: str, **state: Any) -> Named:
    """Return an object that is pickled as one of class `name` (`models.yolo.Model`) with these attributes."""
    module, _, cls = name.rpartition(".")
    obj = type(cls, (Named,), {"__module__": module, "__qualname__": cls})()
    obj.__dict__.update(state)
    return obj


class _NamingPickler(pickle._Pickler):  # the Python one: its global names can be overridden
    def save_global(self, obj: Any, name: str | None = None) -> None:
        if isinstance(obj, type) and issubclass(obj, Named):
            self.write(pickle.GLOBAL + f"{obj.__module__}\n{obj.__qualname__}\n".encode())
            self.memoize(obj)
        else:
            super().save_global(obj, name)


def _dump(value: Any, stream: Any, protocol: int = 2) -> None:
    _NamingPickler(stream, protocol).dump(value)


PICKLE = SimpleNamespace(Pickler=_NamingPickler, dump=_dump, __name__="pickle")


def save(value: Any, path: Path, legacy: bool = False) -> Path:
    """Save `value` with stand-ins by torch.save; `legacy` selects the format of before torch 1.6."""
    torch.save(value, path, pickle_module=PICKLE, _use_new_zipfile_serialization=not legacy)
    return path


def official_module(module: nn.Module, name: str | None = None, **attributes: Any) -> Named:
    """Return `module` as a tree of stand-ins with the dictionaries that nn.Module pickles."""
    cls = type(module)
    home = cls.__module__ if cls.__module__.startswith("torch.nn.modules.") else "models.common"
    return stand_in(
        name or f"{home}.{cls.__name__}",
        training=False,
        _parameters=dict(module._parameters),
        _buffers=dict(module._buffers),
        _non_persistent_buffers_set=set(module._non_persistent_buffers_set),
        _modules={key: official_module(child) for key, child in module._modules.items() if child is not None},
        **attributes,
    )


def zipped(
    path: Path,
    data: bytes,
    records: dict[str, bytes] | None = None,
    byteorder: bytes = b"little",
    compression: int = zipfile.ZIP_STORED,
) -> Path:
    """Write a zip file like torch.save's with `data` as its pickle and `records` as its storages."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/byteorder", byteorder)
        archive.writestr("archive/version", b"3\n")
        for name, content in (records or {}).items():
            archive.writestr(f"archive/data/{name}", content)
    return path
