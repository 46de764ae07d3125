"""Files and folders: look-up, numbered run folders, atomic writes, verified downloads."""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import re
import shutil
import stat
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from utils.errors import ConfigError, DataError, UserError, did_you_mean

LOGGER = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parents[1]
PART = ".part-"
"""Marker in the names of temporary files of `atomic_path`."""

NAME_MAX, PATH_MAX = 255, 4095
"""Maximum bytes of a file name and of a path in Linux; other systems allow no more."""

MAX_TRIES = 100
"""Attempts to create a folder that no other process has created."""

MAX_TEXT = 2**26
"""Maximum size of a text file in bytes."""


def increment_path(path: str | Path, exist_ok: bool = False) -> Path:
    """Return the next free path of `exp`, `exp2`, `exp3`, ... (one past the highest number in use).

    Args:
        path: desired path; it need not exist, and is not created.
        exist_ok: return `path` itself even if it exists.
    """
    path = Path(path)
    if exist_ok or not path.exists():
        return path
    pattern = re.compile(re.escape(path.name) + r"(\d+)$")
    numbers = [int(m[1]) for p in path.parent.iterdir() if (m := pattern.match(p.name))]
    return path.with_name(f"{path.name}{max([1, *numbers]) + 1}")


def make_folder(path: str | Path) -> Path:
    """Create a folder and its parents; raise a one-line ConfigError if that is not possible."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{path}: cannot create this folder: {error.strerror or error}") from error
    if not os.access(path, os.W_OK):
        raise ConfigError(f"{path}: this folder is not writable")
    return path


def make_run_folder(path: str | Path, exist_ok: bool = False) -> Path:
    """Create the folder that `increment_path` names; processes that start together get different ones.

    Raises:
        ConfigError: the folder cannot be created.
    """
    make_folder(Path(path).parent)
    for _ in range(MAX_TRIES):
        folder = increment_path(path, exist_ok)
        try:
            folder.mkdir(exist_ok=exist_ok)
        except FileExistsError:
            continue  # another process was faster
        except OSError:
            break  # `make_folder` gives the reason
        return make_folder(folder)
    return make_folder(folder)


def is_writable(folder: Path) -> bool:
    """Return whether files may be written to a folder; False if it is marked as read-only, even for root."""
    return os.access(folder, os.W_OK) and bool(folder.stat().st_mode & 0o222)


@contextmanager
def atomic_path(final: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `final`; rename it to `final` if the block succeeds, else remove it.

    A reader sees the old file or the new one, never a partial one, and a crash or a full disk leaves the old one
    intact. The temporary name has the same suffix, so writers that choose a format by suffix work.
    """
    final = Path(final)
    make_folder(final.parent)
    handle, name = tempfile.mkstemp(prefix=f".{final.stem}{PART}", suffix=final.suffix, dir=final.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes files private; a result should be as readable as any other file
        try:
            with open(temporary, "rb") as stream:
                os.fsync(stream.fileno())
            os.replace(temporary, final)
        except OSError as error:
            raise DataError(f"{final}: cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def folder_names(folder: str | Path) -> list[str]:
    """Return the sorted names in a folder; none if the folder does not exist.

    Raises:
        DataError: the folder cannot be read.
    """
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name, or half of a surrogate pair
        raise DataError(f"{folder}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def unique_names(paths: Iterable[Path], clean: Callable[[str], str] = str) -> dict[Path, str]:
    """Return a file name for each path: its own, with its folders as prefix where two stems are equal, else numbered.

    Stems are unique, also when case is ignored, so that other suffixes can be used.

    Args:
        paths: all absolute or all relative.
        clean: applied to each name before the comparison.
    """
    unique = list(dict.fromkeys(paths))
    names = {path: path.name for path in unique}
    if len({Path(name).stem.lower() for name in names.values()}) < len(unique):
        common = os.path.commonpath([path.parent for path in unique])
        names = {path: os.path.relpath(path, common).replace(os.sep, "_") for path in unique}
    taken: set[str] = set()
    for path, name in names.items():
        first = wanted = Path(clean(name))
        count = 1
        while wanted.stem.lower() in taken:
            count += 1
            wanted = Path(f"{first.stem}_{count}{first.suffix}")
        taken.add(wanted.stem.lower())
        names[path] = wanted.name
    return names


def warn_of_earlier_files(folder: Path, made: Container[Path] = ()) -> None:
    """Log the number of files that earlier runs left in the folder of a run (`--exist-ok`), except those in `made`."""
    count = sum(path.is_file() and path not in made for path in folder.rglob("*"))
    if count:
        LOGGER.warning("--exist-ok: %s: %d file(s) of earlier runs stay unless overwritten", folder, count)


def is_vacant(path: Path) -> bool:
    """Return whether a path does not exist or is an empty folder; DataError for a folder that cannot be read."""
    return not os.path.lexists(path) or (os.path.isdir(path) and not folder_names(path))


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """Yield a temporary folder; rename it to `final` if the block succeeds, else remove it.

    Raises:
        OSError: `final` exists and is not an empty folder.
    """
    build = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=make_folder(final.parent)))
    try:
        yield build
        build.chmod(0o755)  # mkdtemp makes folders private
        if os.path.isdir(final):
            final.rmdir()
        os.rename(build, final)
    finally:
        shutil.rmtree(build, ignore_errors=True)


def remove_partial_files(folder: Path, pattern: str = "**/.*") -> None:
    """Remove temporary files of `atomic_path` left by killed processes; no other process may write to these files.

    Args:
        folder: folder of the files.
        pattern: glob pattern of the files; the default includes subfolders.
    """
    for path in folder.glob(pattern):
        if re.fullmatch(rf"\..+{re.escape(PART)}[a-z0-9_]{{8}}(\.\w+)?", path.name) and path.is_file():
            path.unlink()


def expand_user(path: str | Path, error: type[UserError] = ConfigError) -> Path:
    """Return the path with a leading `~` replaced by the home folder; `error` for an unknown user."""
    try:
        return Path(path).expanduser()
    except RuntimeError as cause:
        raise error(f"{path}: there is no such user") from cause


def name_problem(path: str) -> str:
    """Return why a path is not valid for a file, or ''."""
    raw = path.encode("utf-8", "surrogatepass")
    if "\0" in path:
        return "holds a NUL character"
    if max(map(len, raw.split(b"/"))) > NAME_MAX or len(raw) > PATH_MAX:
        return f"is too long for a file name ({NAME_MAX} bytes between slashes, {PATH_MAX} in all)"
    return ""


def url_file_name(url: str) -> str:
    """Return the file name at the end of a URL, '' without one.

    Raises:
        DataError: not a URL.
    """
    try:
        return Path(urllib.parse.unquote(urllib.parse.urlsplit(url).path)).name
    except ValueError as cause:
        raise DataError(f"{url}: {cause}") from cause


def check_regular(path: str | Path, error: type[UserError] = DataError) -> os.stat_result:
    """Return the status of a regular file, before anything opens it.

    Raises:
        error: missing, not accessible, or a folder, FIFO, device or socket.
    """
    try:
        info = os.stat(path)
    except (OSError, ValueError) as cause:  # ValueError: a NUL in the name
        raise error(f"{path}: cannot be read: {getattr(cause, 'strerror', None) or cause}") from cause
    if not stat.S_ISREG(info.st_mode):
        kind = next((name for test, name in _KINDS if test(info.st_mode)), "special file")
        raise error(f"{path}: cannot be read: is a {kind}; a file is needed")
    return info


_KINDS = (
    (stat.S_ISDIR, "folder"),
    (stat.S_ISFIFO, "FIFO"),
    (stat.S_ISCHR, "device"),
    (stat.S_ISBLK, "device"),
    (stat.S_ISSOCK, "socket"),
)


def read_text(path: str | Path, error: type[UserError] = DataError, limit: int = MAX_TEXT) -> str:
    """Read a text file in UTF-8, without its byte-order mark if it has one.

    Raises:
        error: missing, unreadable, not a regular file, of more than `limit` bytes, or in another encoding.
    """
    size = check_regular(path, error).st_size
    if size > limit:
        raise error(f"{path}: {size} bytes; at most {limit} are read")
    try:
        with open(path, "rb", buffering=0) as stream:
            return stream.read().decode("utf-8-sig")
    except UnicodeDecodeError as cause:
        raise error(f"{path}: cannot be read as text: is not a text file in UTF-8 (byte {cause.start})") from cause
    except OSError as cause:
        raise error(f"{path}: cannot be read: {cause.strerror or cause}") from cause


def find_file(name: str | Path, *folders: str | Path, error: type[UserError] = ConfigError) -> Path:
    """Find a file; `.yaml` is appended if needed.

    A name without a folder is searched in the current folder, in the project's root and in `folders` (relative ones
    below the project's root). A path with a folder is taken relative to the current folder, else to the project's root,
    and is never searched by its last part: a mistyped folder is an error.

    Raises:
        error: not found; names the nearest file name in those folders.
    """
    given = expand_user(name, error)
    places = [Path(f) if Path(f).is_absolute() else ROOT / f for f in folders]
    bare = len(given.parts) == 1
    candidates = [given, ROOT / given, *([place / given for place in places] if bare else [])]
    for candidate in dict.fromkeys(candidates):
        for path in (candidate, candidate.with_name(candidate.name + ".yaml") if candidate.name else candidate):
            if exists_as_file(path, error):
                if path != given:
                    LOGGER.info("%s: using %s", name, path)
                return path
    below = [p for place in places if place.is_dir() for p in place.rglob("*.yaml")]
    same = next((_from_root(p) for p in below if p.name == given.name), None)
    near = [p.name for p in below]
    if is_listable(given.parent):
        near += [p.name for p in given.parent.iterdir() if p.is_file()]
    names = [f"{_from_root(p)}/" for p in places] if bare else ["the project"]
    looked = ", ".join(["the current folder", *names]) if not given.is_absolute() else str(given.parent)
    hint = f"; did you mean {same}?" if same else did_you_mean(given.name, near)
    raise error(f"{name}: no such file (looked in {looked}){hint}")


def _from_root(path: Path) -> Path:
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def exists_as_file(path: Path, error: type[UserError]) -> bool:
    """Return whether a path exists as a file; `error` if that is unknown or it is a FIFO, device or socket."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as cause:
        raise error(f"{path}: cannot be read: {getattr(cause, 'strerror', None) or cause}") from cause
    return not stat.S_ISDIR(mode) and bool(check_regular(path, error))


def is_listable(path: Path) -> bool:
    """Return whether a path is a folder that this user may list."""
    return os.path.isdir(path) and os.access(path, os.R_OK | os.X_OK)


def newest_file(folder: str | Path, pattern: str) -> Path | None:
    """Return the newest file below `folder` that matches `pattern`, or None."""
    found = [p for p in Path(folder).glob(pattern) if p.is_file()]
    return max(found, key=lambda p: p.stat().st_mtime) if found else None


def newest_weights(runs: str | Path = "runs/train") -> Path | None:
    """Return `weights/best.pt` (else `last.pt`) of the newest run below `runs`; None if there is none."""
    return newest_file(runs, "*/weights/best.pt") or newest_file(runs, "*/weights/last.pt")


def download(url: str, dest: str | Path, sha256_prefix: str | None = None, hint: str = "") -> Path:
    """Fetch `url` into the file `dest` with a progress bar; the file exists only if it is complete.

    Args:
        url: http(s) or file URL.
        dest: final path; returned at once if it exists.
        sha256_prefix: leading hex digits that the file's SHA-256 must have.
        hint: what to do if that fails; '' = put the file at `dest`.

    Raises:
        DataError: no network, an HTTP error, fewer bytes than announced, or another hash; ends with the hint.
    """
    dest = Path(dest)
    if dest.is_file():
        return dest
    hint = hint or f"fetch it by hand and put it at {dest}"
    try:
        with atomic_path(dest) as part, urllib.request.urlopen(url, timeout=30) as reply, open(part, "wb") as out:
            announced = str(reply.headers.get("Content-Length") or "")
            total = int(announced) if announced.isascii() and announced.isdigit() else None
            with tqdm.wrapattr(reply, "read", total=total, desc=dest.name) as body:
                shutil.copyfileobj(body, out, 1 << 20)
            out.flush()
            size = part.stat().st_size
            if size == 0 or (total is not None and size != total and not reply.headers.get("Content-Encoding")):
                raise DataError(f"{url}: {size} of {total or 'an unknown number of'} bytes received; not kept; {hint}")
            if sha256_prefix and not (digest := file_digest(part)).startswith(sha256_prefix.lower()):
                raise DataError(f"{url}: SHA-256 is {digest[:16]}, expected {sha256_prefix}; not kept; {hint}")
    except UserError:
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: not a URL
        reason = None if isinstance(error, urllib.error.HTTPError) else getattr(error, "reason", None)
        raise DataError(f"{url}: cannot be fetched ({reason or error}); {hint}") from error
    return dest


def file_digest(path: str | Path, kind: str = "sha256") -> str:
    """Return the hex digest of a file."""
    digest = hashlib.new(kind)
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
