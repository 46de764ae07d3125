"""Logging setup and process ranks."""

from __future__ import annotations

import io
import logging

import pytest

from utils.log import aligned, configure_logging, fitted, is_main_process


@pytest.mark.parametrize(("rank", "expected"), [(None, True), ("", True), ("0", True), ("1", False)])
def test_is_main_process_reads_the_rank_of_torchrun(
    rank: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    assert is_main_process() is expected


class Terminal(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a short line", "a short line"),
        ("  - one two three four", "  - one two\n    three four"),
        ("one two-three four five", "one two-three\n  four five"),
        ("/a/path/longer/than/a/line x", "/a/path/longer/than/a/line\n  x"),
        ("python train.py --resume last.pt", "python train.py --resume last.pt"),
        ("first line of two\n\nlast", "first line of\n  two\n\nlast"),
    ],
)
def test_fitted_wraps_long_lines_between_words(line: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "16")
    assert fitted(line, Terminal()) == expected
    assert fitted(line, io.StringIO()) == line, "files and pipes get the line as it is"


def test_log_lines_fit_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setenv("COLUMNS", "24")
    monkeypatch.setattr("sys.stderr", terminal)
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    configure_logging()
    logging.getLogger("some.module").warning("ten words that do not fit a line")
    assert terminal.getvalue() == "WARNING: ten words that\n  do not fit a line\n"


def test_aligned_columns() -> None:
    rows = [("name", "boxes", "n"), ("犬", 12, "x"), ("cafe\u0301", 3, "long")]
    assert aligned(rows, left=(0, 2)) == ["name  boxes  n", "犬       12  x", "cafe\u0301      3  long"]
