"""Lists of files."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.lists import read_list


@pytest.mark.parametrize(
    ("line", "file"),
    [
        ("a.jpg", "a.jpg"),
        ("./b/a.jpg", "b/a.jpg"),
        ("b\\a.jpg", "b/a.jpg"),
        (" lead.jpg", " lead.jpg"),
        ("  a.jpg ", "a.jpg"),
        ("#12 cam.jpg", "#12 cam.jpg"),
        ("data/b/a.jpg", "b/a.jpg"),
        ("b", "b"),
        ("nowhere.jpg", "nowhere.jpg"),
    ],
)
def test_read_list_finds_entries_beside_the_list(tmp_path: Path, line: str, file: str) -> None:
    (tmp_path / "b").mkdir()
    for name in ("a.jpg", "b/a.jpg", " lead.jpg", "#12 cam.jpg"):
        (tmp_path / name).write_text("")
    (tmp_path / "list.txt").write_text(f"# a comment\n\n{line}\n", encoding="utf-8")
    ((number, path),) = read_list(tmp_path / "list.txt")
    assert number == 3 and path.resolve() == tmp_path / file


def test_read_list_prefers_the_folder_of_the_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jpg").write_text("")
    (tmp_path / "two/b.jpg").write_text("")
    (tmp_path / "one/list.txt").write_text("a.jpg\nb.jpg\n")
    monkeypatch.chdir(tmp_path / "two")
    first, second = (path.resolve() for _, path in read_list(tmp_path / "one/list.txt"))
    assert (first, second) == (tmp_path / "one/a.jpg", tmp_path / "two/b.jpg")
