"""Lists of files: one path per line."""

from __future__ import annotations

import os
from pathlib import Path

from utils.errors import DataError
from utils.files import expand_user, read_text


def read_list(path: Path) -> list[tuple[int, Path]]:
    """Read the entries of a list, each with the number of its line.

    Entries are relative to the list's folder, or else to the current folder. Each is tried as written, without spaces
    around it, with slashes instead of backslashes, and without the leading `data/` of CVAT's exports; the first file or
    folder counts, and the plain entry in the list's folder where there is none. Lines that begin with `#` are comments
    unless there is such a file.

    Raises:
        DataError: the list cannot be read, or names the home of an unknown user.
    """
    entries = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        text = line.strip()
        if not text:
            continue
        readings = [text, line, text.replace("\\", "/"), text.removeprefix("data/")]
        paths = [base / expand_user(reading, DataError) for reading in readings for base in (path.parent, Path())]
        found = next((p for p in paths if os.path.exists(p)), None)
        if found is not None or not text.startswith("#"):
            entries.append((number, found or paths[0]))
    return entries
