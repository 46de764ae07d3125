"""Recognition of files that are not checkpoints, with an error that says what they are."""

from __future__ import annotations

import difflib
import glob
import os
import re
import zipfile
from pathlib import Path

from utils.errors import CheckpointError
from utils.files import exists_as_file, find_file, is_listable

RELEASE = re.compile(r"(yolov5[nsmlx]6?)(?:-(seg|cls))?\.pt")
TASKS = {"seg": "segmentation", "cls": "classification"}


def release_hint(name: str) -> str:
    """Return the end of a message about a missing file that has the name of a YOLOv5 release file, '' for others."""
    match = RELEASE.fullmatch(name)
    if not match:
        return ""
    detector, task = match.groups()
    if task:
        return f"; {TASKS[task]} is not supported; the detector of that size is {detector}.pt (docs/weights.md)"
    return "; it is a release file of YOLOv5, which is not downloaded: docs/weights.md says where it is"


def find_checkpoint(name: str | Path) -> Path:
    """Find a checkpoint as `find_file` does.

    Raises:
        CheckpointError: no such file.
    """
    try:
        return find_file(name, error=CheckpointError)
    except CheckpointError as error:
        raise CheckpointError(f"{error}{release_hint(Path(name).name)}") from error


def existing_file(path: Path) -> Path:
    """Return `path` if it may be a file of `torch.save`.

    Raises:
        CheckpointError: the file does not exist or cannot be opened, or is of another kind (says which).
    """
    if os.path.isdir(path):
        places = ("*.pt", "weights/*.pt", "*/weights/*.pt")
        inside = sorted(name for place in places for name in glob.glob(place, root_dir=path))[:3]
        hint = f"; it contains {', '.join(inside)}" if inside else ""
        raise CheckpointError(f"{path}: a folder; a checkpoint file is needed{hint}")
    if not exists_as_file(path, CheckpointError):
        names = [name for name in _names_beside(path) if Path(name).suffix == path.suffix]
        near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.4)
        hint = f"; similar names in that folder: {', '.join(near)}" if near else ""
        raise CheckpointError(f"{path}: no such file{hint}{release_hint(path.name)}")
    try:
        with open(path, "rb") as stream:
            head = stream.read(512)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened ({error.strerror})") from error
    kind = _other_kind(path, head)
    if kind:
        raise CheckpointError(f"{path}: {kind}")
    return path


def _names_beside(path: Path) -> list[str]:
    return [p.name for p in path.parent.iterdir() if p.is_file()] if is_listable(path.parent) else []


def _other_kind(path: Path, head: bytes) -> str:
    """Return what the file is if it is certainly not a checkpoint, else an empty string."""
    if not head:
        return "an empty file (0 bytes), left by an interrupted download or save"
    if path.suffix.lower() == ".onnx" or b"\x0apytorch" in head[:16] or b"\x12\x07pytorch" in head[:32]:
        return "an ONNX file: val.py and detect.py can run it, but nothing can train or export it; a .pt file is needed"
    if head.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, not the file itself; fetch it with 'git lfs pull'"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "a web page, not a checkpoint; the download failed"
    if head.startswith(b"PK"):
        return _other_archive(path)
    if head[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        return ""
    text = all(byte >= 32 or byte in b"\t\n\r\f" for byte in head)
    return f"not a checkpoint: {'a text file' if text else 'neither a zip archive nor a pickle of torch.save'}"


def _other_archive(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return "damaged: a zip archive without its end, left by an interrupted download or save"
    names = [record.filename.rpartition("/")[2] for record in records]
    if "constants.pkl" in names:
        return "a TorchScript file: val.py and detect.py can run it, but nothing can train or export it"
    if names.count("data.pkl") != 1:
        return f"a zip archive with {names.count('data.pkl') or 'no'} data.pkl in it, not a checkpoint"
    # A file of a few bytes must not unpack to gigabytes, and records are mapped into memory as they are.
    compressed = [record.filename for record in records if record.compress_type != zipfile.ZIP_STORED]
    return f"damaged: record {compressed[0]} is compressed, which torch.save never does" if compressed else ""
