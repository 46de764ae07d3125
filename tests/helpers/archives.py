"""Text files and archives."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def archive(kind: str, files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(stream, "w") as out:
            for name, data in files.items():
                out.writestr(name, data)
    else:
        with tarfile.open(fileobj=stream, mode="w") as out_tar:
            for name, data in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                out_tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()
