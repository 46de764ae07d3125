"""The run folder of an evaluation: temporary until the run ends, counted up, shared with --exist-ok."""

from __future__ import annotations

import pytest

from engine.evaluate.outputs import run_folder
from utils.errors import UserError


@pytest.mark.parametrize("error", [UserError("no"), KeyboardInterrupt(), MemoryError()])
def test_a_broken_run_leaves_nothing(tmp_path, error):
    with pytest.raises(type(error)), run_folder(tmp_path / "exp") as run:
        (run.folder / "half.txt").write_text("half")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_run_folders_count_up_or_are_shared(tmp_path, caplog):
    for text, exist_ok in (("a", False), ("b", False), ("c", True)):
        with run_folder(tmp_path / "exp", exist_ok) as run:
            (run.folder / f"{text}.txt").write_text(text)
            (run.folder / "labels").mkdir()
            (run.folder / "labels/same.txt").write_text(text)
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.txt")) == [
        "exp/a.txt", "exp/c.txt", "exp/labels/same.txt", "exp2/b.txt", "exp2/labels/same.txt",
    ]  # fmt: skip
    assert (tmp_path / "exp/labels/same.txt").read_text() == "c"
    assert [record.getMessage() for record in caplog.records] == [
        f"--exist-ok: {tmp_path / 'exp'}: 1 file(s) of earlier runs stay unless overwritten"
    ]
    assert (tmp_path / "exp").stat().st_mode & 0o077
