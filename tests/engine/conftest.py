"""Fixtures of the engine's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.training import write_project


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with a small dataset and a small model, see `write_project`."""
    return write_project(tmp_path)
