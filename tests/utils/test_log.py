"""Tests of logging set-up and process ranks."""

from __future__ import annotations

import pytest

from utils.log import is_main_process


@pytest.mark.parametrize(("rank", "expected"), [(None, True), ("", True), ("0", True), ("1", False)])
def test_is_main_process_reads_the_rank_of_torchrun(
    rank: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    assert is_main_process() is expected
