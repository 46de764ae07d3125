"""Plug-ins: the user's Python files that define or register backbones (`--plugin my_backbone.py`)."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path

from models.backbones import register_plain
from utils.errors import ConfigError, UserError


def load_plugins(files: Iterable[str]) -> None:
    """Import each file once; model rows can name its registered backbones and plain modules afterwards.

    Raises:
        ConfigError: a file is missing, or raises an error when it is imported.
    """
    for text in files:
        path = Path(text)
        if not path.is_file():
            raise ConfigError(f"--plugin {text}: no such file; give a Python file that registers a backbone")
        name = f"plugin_{path.stem}_{abs(hash(path.resolve()))}"
        if name in sys.modules:
            continue
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise ConfigError(f"--plugin {text}: is not a Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except UserError:
            del sys.modules[name]
            raise
        except Exception as error:  # a plug-in may raise anything
            del sys.modules[name]
            raise ConfigError(f"--plugin {text}: {type(error).__name__}: {error}") from error
        register_plain(module)
