"""Files and folders: run folders that count up, atomic writes, verified downloads."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from utils.errors import ConfigError, DataError, UserError, did_you_mean

LOGGER = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parents[1]


def increment_path(path: str | Path, exist_ok: bool = False) -> Path:
    """Return the next free path of `exp`, `exp2`, `exp3`, ... (one past the highest number in use).

    Args:
        path: wanted path; it need not exist, and is not created.
        exist_ok: return `path` itself even when it exists.
    """
    path = Path(path)
    if exist_ok or not path.exists():
        return path
    pattern = re.compile(re.escape(path.name) + r"(\d+)$")
    numbers = [int(m[1]) for p in path.parent.iterdir() if (m := pattern.match(p.name))]
    return path.with_name(f"{path.name}{max([1, *numbers]) + 1}")


def make_folder(path: str | Path) -> Path:
    """Create a folder and its parents; ConfigError in one line when that is not possible."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{path}: cannot create this folder: {error.strerror or error}") from error
    if not os.access(path, os.W_OK):
        raise ConfigError(f"{path}: this folder is not writable")
    return path


@contextmanager
def atomic_path(final: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `final`; rename it to `final` when the block ends well, remove it when it does not.

    A reader sees the old file or the new one, never a part, and a crash or a full disk leaves the old one intact.
    The temporary name ends in the same suffix, so writers that choose a format by suffix work.
    """
    final = Path(final)
    make_folder(final.parent)
    handle, name = tempfile.mkstemp(prefix=f".{final.stem}.", suffix=final.suffix, dir=final.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes files private; a result should be as readable as any other file
        with open(temporary, "rb") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, final)
    finally:
        temporary.unlink(missing_ok=True)


def find_file(name: str | Path, *folders: str | Path, error: type[UserError] = ConfigError) -> Path:
    """Find a file as given, else in `folders` (relative ones below the project's root), with `.yaml` added if need be.

    Raises:
        error: names what was looked for and the nearest file name in those folders.
    """
    given = Path(name)
    places = [Path(f) if Path(f).is_absolute() else ROOT / f for f in folders]
    candidates = [given, ROOT / given, *(p / given for p in places), *(p / given.name for p in places)]
    for candidate in candidates:
        for path in (candidate, candidate.with_name(candidate.name + ".yaml") if candidate.name else candidate):
            if path.is_file():
                return path
    at_hand = [p.name for place in places if place.is_dir() for p in place.rglob("*.yaml")]
    if given.parent.is_dir():
        at_hand += [p.name for p in given.parent.iterdir() if p.is_file()]
    names = [f"{p.relative_to(ROOT) if p.is_relative_to(ROOT) else p}/" for p in places]
    looked = ", ".join(["the current folder", *names])
    raise error(f"{name}: no such file (looked in {looked}){did_you_mean(given.name, at_hand)}")


def newest_file(folder: str | Path, pattern: str) -> Path | None:
    """Return the newest file below `folder` that matches `pattern`, or None."""
    found = [p for p in Path(folder).glob(pattern) if p.is_file()]
    return max(found, key=lambda p: p.stat().st_mtime) if found else None


def newest_weights(runs: str | Path = "runs/train") -> Path | None:
    """`weights/best.pt` (else `last.pt`) of the run below `runs` that was written last; None when there is none."""
    return newest_file(runs, "*/weights/best.pt") or newest_file(runs, "*/weights/last.pt")


def download(url: str, dest: str | Path, sha256_prefix: str | None = None) -> Path:
    """Fetch `url` into the file `dest` with a progress bar; nothing is left under that name unless it is whole.

    Args:
        url: http(s) or file URL.
        dest: final path; returned at once when it exists.
        sha256_prefix: leading hex digits that the file's SHA-256 must have.

    Raises:
        DataError: no network, an HTTP error, or another hash; says where to put the file by hand.
    """
    dest = Path(dest)
    if dest.is_file():
        return dest
    hint = f"fetch it by hand and put it at {dest}"
    try:
        with atomic_path(dest) as part, urllib.request.urlopen(url, timeout=30) as reply, open(part, "wb") as out:
            total = int(reply.headers.get("Content-Length") or 0) or None
            with tqdm.wrapattr(reply, "read", total=total, desc=dest.name) as body:
                shutil.copyfileobj(body, out, 1 << 20)
            out.flush()
            if sha256_prefix:
                digest = hashlib.sha256(part.read_bytes()).hexdigest()
                if not digest.startswith(sha256_prefix.lower()):
                    raise DataError(f"{url}: SHA-256 is {digest[:16]}, expected {sha256_prefix}; not kept; {hint}")
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise DataError(f"{url}: cannot be fetched ({getattr(error, 'reason', error)}); {hint}") from error
    return dest
