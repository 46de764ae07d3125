"""Options of the test run."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backbone",
        action="append",
        default=[],
        metavar="MODULE:CLASS",
        help="run the backbone contract over this class alone (my_module:MyBackbone or path/to/file.py:MyBackbone); "
        "may be given several times",
    )
