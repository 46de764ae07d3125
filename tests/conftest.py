"""Options of the test run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch

from tests.helpers.pretend_cuda import pretend_cuda, unavailable


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backbone",
        action="append",
        default=[],
        metavar="MODULE:CLASS",
        help="run the backbone contract over this class alone (my_module:MyBackbone or path/to/file.py:MyBackbone); "
        "may be given several times",
    )


@pytest.fixture(autouse=True)
def _device_of_gpu_tests(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run tests marked `gpu` on a real CUDA device if there is one, else on the simulated one."""
    if request.node.get_closest_marker("gpu") is None or torch.cuda.is_available():
        yield
        return
    reason = unavailable()
    if reason or request.node.get_closest_marker("real_gpu"):
        pytest.skip(reason or "needs a real CUDA device")
    if "gpu_block" in request.fixturenames:
        yield
        return
    with pretend_cuda(dirty="dirty_memory" in request.fixturenames):
        yield


@pytest.fixture
def gpu_block() -> Callable[[], AbstractContextManager[Any]]:
    """Return a context manager for the part of a test that runs on a CUDA device, real or simulated."""
    return nullcontext if torch.cuda.is_available() else pretend_cuda


@pytest.fixture
def dirty_memory() -> None:
    """Request a simulated device with NaN in uninitialized memory; a real device's may hold anything."""
