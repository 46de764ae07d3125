"""Fetching a dataset: archives named in our own YAMLs are downloaded, checked, unpacked and, where needed, converted.

The table under `download:` is data, not a program:

    download:
      files:
        - {url: ..., md5: ..., sha256: ..., unpack: folder, strip: 1}   # strip = leading folders to drop
      voc:                                                              # optional: Pascal VOC XML becomes label files
        corner_base: 1
        keep_difficult: false
        sets: [{folder: VOCdevkit/VOC2007, list: train, split: train2007}]

A download script in a YAML is never run. Everything is built beside the folder and renamed at the end: a dataset is
complete or absent, and the next try reuses what was downloaded before. Every path of the table is relative and stays
inside the dataset's folder; only folders that this run created are removed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import lzma
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple, TypeVar, cast
from urllib.parse import urlparse

from tqdm import tqdm

from data.formats.voc import identifiers, parse_voc
from utils.errors import DataError, UserError, did_you_mean, shown
from utils.files import download, file_digest, folder_names, is_vacant, make_folder, new_folder
from utils.yaml_lines import LineDict, text_of

T = TypeVar("T")
LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class RemoteFile:
    """One archive (.zip, .tar, .tar.gz, .tgz).

    Attributes:
        url: its address.
        md5, sha256: hex digests that it must have; '' = not known.
        unpack: folder below the dataset's root, relative.
        strip: leading folders to drop from the names inside; -1 = one if the archive holds a single folder.
    """

    url: str
    md5: str = ""
    sha256: str = ""
    unpack: str = "."
    strip: int = 0

    @property
    def name(self) -> str:
        """File name of the archive."""
        return _archive_name(self.url)


@dataclass(frozen=True)
class VocSet:
    """One list of a VOC folder (`<folder>/ImageSets/Main/<list>.txt`) and the split that it becomes."""

    folder: str
    list: str
    split: str


@dataclass(frozen=True)
class VocConversion:
    """How VOC XML becomes label files.

    Attributes:
        sets: the lists to convert.
        corner_base: coordinate of the first pixel, subtracted from the boxes (VOC: 1).
        keep_difficult: keep objects marked as difficult.
    """

    sets: tuple[VocSet, ...]
    corner_base: float = 0
    keep_difficult: bool = True


@dataclass(frozen=True)
class DownloadRecipe:
    """Archives to download and their conversion; `names` are the classes by number."""

    files: tuple[RemoteFile, ...]
    names: tuple[str, ...] = ()
    voc: VocConversion | None = None


def recipe_from_url(text: str) -> DownloadRecipe | None:
    """Return the recipe for a `download:` that is only the URL of an archive, else None."""
    url = text.strip()
    if url.startswith(("http://", "https://")) and _archive_name(url):
        return DownloadRecipe((RemoteFile(url, strip=-1),))
    return None


def parse_recipe(value: object, names: Mapping[int, str], where: str, problems: list[str]) -> DownloadRecipe | None:
    """Read the table under `download:`.

    Args:
        value: what the YAML holds.
        names: class number -> name.
        where: 'file:line' for messages.
        problems: mistakes are added here; with any, the result is None.
    """
    before = len(problems)
    if not isinstance(value, dict) or not isinstance(value.get("files"), list) or not value["files"]:
        problems.append(f"{where}: download: a table with 'files:', a list of mappings with 'url:', is needed")
        return None
    _only(value, ("files", "voc"), f"{where}: download", problems)
    files = [
        _record(RemoteFile, item, f"{where}: download: files[{i}]", problems) for i, item in enumerate(value["files"])
    ]
    voc = None
    if value.get("voc") is not None:
        table = value["voc"] if isinstance(value["voc"], dict) else {}
        given = table.get("sets")
        items: list[Any] = given if isinstance(given, list) else []
        sets = [_record(VocSet, item, f"{where}: download: voc: sets[{i}]", problems) for i, item in enumerate(items)]
        if not sets:
            problems.append(f"{where}: download: voc: 'sets:' is missing; a list of {{folder, list, split}} is needed")
        voc = _record(VocConversion, {**table, "sets": tuple(sets)}, f"{where}: download: voc", problems)
    if len(problems) > before:
        return None
    return DownloadRecipe(tuple(file for file in files if file), tuple(names[number] for number in sorted(names)), voc)


def fetch(recipe: DownloadRecipe, root: Path) -> None:
    """Make the folder `root` from the recipe's archives; nothing else is touched but `<root>.download`.

    Args:
        recipe: archives and conversion.
        root: the dataset's folder; it must not exist, or be empty.

    Raises:
        DataError: the folder is not empty, no network, a wrong digest, an archive that cannot be unpacked.
    """
    if not root.name or not is_vacant(root):
        raise DataError(
            f"{root}: is not empty, but does not hold all that the YAML names; complete it, or move it away to"
            " download it again"
        )
    work = make_folder(root.with_name(root.name + ".download"))
    LOGGER.info("downloading %s to %s", ", ".join(f.name for f in recipe.files), root)
    archives = [_archive(remote, work) for remote in recipe.files]
    try:
        with new_folder(root) as build:
            for remote, archive in zip(recipe.files, archives):
                unpack(archive, contained(build, remote.unpack), remote.strip)
            if recipe.voc is not None:
                convert_voc(build, recipe.voc, recipe.names)
    except OSError as error:
        if is_vacant(root):  # else another process was faster
            raise DataError(f"{root}: cannot be created: {error.strerror or error}") from error
    for archive in archives:
        archive.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # holds something else, which is not ours
        work.rmdir()


def contained(folder: Path, relative: str) -> Path:
    """Return `folder / relative`; DataError where that would be outside of the folder, links followed."""
    path = folder / relative
    if _leads_out(relative) or not path.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"{shown(relative)}: leads out of the folder {folder}; a path inside it is needed")
    return path


def _leads_out(relative: str) -> bool:
    parts = PurePosixPath(relative).parts
    odd = relative.startswith(("/", "~")) or "\\" in relative or "\0" in relative
    return odd or ".." in parts or (bool(parts) and ":" in parts[0])


def _archive(remote: RemoteFile, folder: Path) -> Path:
    path = download(remote.url, folder / remote.name)
    for kind in ("md5", "sha256"):
        wanted = getattr(remote, kind)
        if not wanted:
            continue
        digest = file_digest(path, kind)
        if digest != wanted.lower():
            path.unlink()
            raise DataError(f"{remote.url}: {kind} is {digest}, expected {wanted}; the file was not kept")
    return path


def unpack(archive: Path, folder: Path, strip: int = 0) -> None:
    """Unpack the regular files of a .zip or .tar archive; links and names that lead out of `folder` are refused.

    Args:
        archive: the file.
        folder: where to; made if missing.
        strip: leading folders to drop from the names; -1 = one if the archive holds a single folder at its top.

    Raises:
        DataError: damaged archive, or an unsafe name in it.
    """
    try:
        with _opened(archive) as members:
            names = [member.name for member in members]
            if strip < 0:
                tops = {PurePosixPath(name).parts[:1] for name in names}
                strip = 1 if len(tops) == 1 and all("/" in name for name in names) else 0
            _check_sizes(archive, sum(member.size for member in members))
            for member in tqdm(members, desc=f"unpacking {archive.name}", unit="files", mininterval=1):
                if _leads_out(member.name):  # `folder` is new and links are not unpacked: nothing to follow
                    raise DataError(f"{archive}: holds the name {shown(member.name)}, which leads out of the folder")
                parts = PurePosixPath(member.name).parts[strip:]
                if not parts:
                    continue
                target = folder.joinpath(*parts)
                target.parent.mkdir(parents=True, exist_ok=True)
                with member.open() as source, open(target, "wb") as out:
                    shutil.copyfileobj(source, out, 1 << 20)
    except UserError:
        raise
    except _ARCHIVE_ERRORS as error:
        raise DataError(f"{archive}: cannot be unpacked: {error}; delete it and try again") from error


_ARCHIVE_ERRORS = (
    zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, OSError,
    RuntimeError,  # an encrypted member
    NotImplementedError,  # an unknown compression method
    ValueError,
)  # fmt: skip
_MAX_RATIO = 200  # unpacked to packed bytes; images hardly shrink, label files by about 10


def _check_sizes(archive: Path, total: int) -> None:
    """Raise DataError for an archive that would fill the disk: a ratio that no dataset has, or more than is free."""
    packed, free = archive.stat().st_size, shutil.disk_usage(archive.parent).free
    if total > max(packed * _MAX_RATIO, 2**26) or total > free:
        raise DataError(
            f"{archive}: {packed} bytes would become {total}; {free} are free, a ratio of {_MAX_RATIO} allowed"
        )


class _Member(NamedTuple):
    name: str
    size: int
    open: Callable[[], IO[bytes]]


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[list[_Member]]:
    """Yield the regular files of an archive."""
    if _kind(path.name) == "zip":
        with zipfile.ZipFile(path) as packed:
            yield [
                _Member(i.filename, i.file_size, partial(packed.open, i)) for i in packed.infolist() if not i.is_dir()
            ]
    else:
        with tarfile.open(path) as tar:
            yield [
                _Member(i.name, i.size, cast("Callable[[], IO[bytes]]", partial(tar.extractfile, i)))
                for i in tar
                if i.isfile()
            ]
            _check_end(tar)


def _check_end(tar: tarfile.TarFile) -> None:
    """Raise ReadError or EOFError for an archive cut between two members, or before the checksum of gzip."""
    stream = cast("IO[bytes]", tar.fileobj)
    stream.seek(tar.offset)
    if len(stream.read(tarfile.BLOCKSIZE)) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("truncated: no end marker")
    while stream.read(1 << 20):
        pass


def convert_voc(root: Path, conversion: VocConversion, names: Sequence[str]) -> None:
    """Turn VOC folders below `root` into `images/<split>` and `labels/<split>`; the VOC folders are removed.

    Raises:
        DataError: a list, image or annotation is missing or damaged.
    """
    numbers = {name: number for number, name in enumerate(names)}
    for part in conversion.sets:
        folder = contained(root, part.folder)
        images = {Path(name).stem: folder / "JPEGImages" / name for name in folder_names(folder / "JPEGImages")}
        listing = contained(root, f"{part.folder}/ImageSets/Main/{part.list}.txt")
        for identifier in tqdm(identifiers(listing), desc=f"converting {part.split}", mininterval=1):
            image = images.get(identifier)
            if image is None:
                raise DataError(f"{folder}: has no image JPEGImages/{identifier}.*, which the list {part.list} names")
            rows = voc_rows(folder / "Annotations" / f"{identifier}.xml", numbers, conversion)
            label = contained(root, f"labels/{part.split}/{identifier}.txt")
            label.parent.mkdir(parents=True, exist_ok=True)
            label.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
            target = contained(root, f"images/{part.split}/{image.name}")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(image, target)
    for top in {PurePosixPath(part.folder).parts[0] for part in conversion.sets} - {"images", "labels"}:
        shutil.rmtree(contained(root, top), ignore_errors=True)


def voc_rows(path: Path, numbers: Mapping[str, int], conversion: VocConversion) -> list[str]:
    """Return the label rows of one VOC annotation, in the order of the XML.

    Coordinates are shifted by `corner_base` and clipped to the image; boxes without area and classes without a number
    are left out. Rows are normalized cxcywh, written with six decimals.

    Returns:
        Rows 'class x y w h'.

    Raises:
        DataError: missing or invalid XML.
    """
    annotation = parse_voc(path)
    height, width = annotation.size
    if min(height, width) <= 0:
        raise DataError(f"{path}: size: width and height are needed")
    rows = []
    for item in annotation.objects:
        if item.name not in numbers or (item.difficult and not conversion.keep_difficult):
            continue
        x1, y1, x2, y2 = (value - conversion.corner_base for value in item.box())
        x1, x2 = (min(max(v, 0.0), width) for v in (x1, x2))
        y1, y2 = (min(max(v, 0.0), height) for v in (y1, y2))
        if x2 <= x1 or y2 <= y1:
            continue
        box = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
        rows.append(" ".join([str(numbers[item.name]), *(f"{value:.6f}" for value in box)]))
    return rows


def _kind(name: str) -> str:
    lower = name.lower()
    return "zip" if lower.endswith(".zip") else "tar" if lower.endswith((".tar", ".tar.gz", ".tgz")) else ""


def _only(table: Mapping[str, Any], allowed: tuple[str, ...], where: str, problems: list[str]) -> None:
    unknown = [key for key in table if key not in allowed]
    problems += [f"{where}: unknown key {shown(key)}{did_you_mean(key, allowed)}" for key in unknown]


def _record(kind: Callable[..., T], value: object, where: str, problems: list[str]) -> T | None:
    """Build a frozen dataclass from a mapping after checking its keys, the types of its values and its paths."""
    if not isinstance(value, dict):
        problems.append(f"{where}: {shown(value)}; a mapping is needed")
        return None
    types = {field.name: str(field.type) for field in dataclasses.fields(cast(Any, kind))}
    _only(value, tuple(types), where, problems)
    known = {key: item for key, item in value.items() if key in types}
    for key, item in known.items():
        wanted = types[key]
        if wanted == "str" and isinstance(value, LineDict):
            known[key] = item = text_of(value, key)
        given = type(item).__name__
        if wanted in ("str", "int", "bool", "float") and given != wanted and (given, wanted) != ("int", "float"):
            problems.append(f"{where}: {key} is {shown(item)}; a value of type {wanted} is needed")
        elif key in _PATHS:
            try:
                contained(Path("dataset"), item)
            except DataError as error:
                problems.append(f"{where}: {key}: {error}")
    if isinstance(known.get("folder"), str) and not PurePosixPath(known["folder"]).parts:
        problems.append(f"{where}: folder is {shown(known['folder'])}; a folder below the dataset's is needed")
    if "url" in known and isinstance(known["url"], str) and not _archive_name(known["url"]):
        problems.append(f"{where}: url is {shown(known['url'])}; the address of a {_ENDINGS} file is needed")
    if known.get("strip", 0) not in range(-1, 33):
        problems.append(f"{where}: strip is {shown(known['strip'])}; -1 to 32 are allowed")
    try:
        return kind(**known)
    except TypeError as error:  # a key without default is missing
        problems.append(f"{where}: {error}".replace(f"{kind.__name__}.__init__()", "the table"))
        return None


_PATHS = ("unpack", "folder", "list", "split")
_ENDINGS = ".zip, .tar, .tar.gz or .tgz"


def _archive_name(url: str) -> str:
    """Return the file name of the archive at a URL; '' where there is none."""
    try:
        parts = urlparse(url)
        parts.port  # noqa: B018 -- raises for a port out of range
    except ValueError:
        return ""
    name = PurePosixPath(parts.path).name
    plain = url.isprintable() and " " not in url and name not in ("", ".", "..") and "/" not in name
    return name if plain and parts.scheme in ("http", "https", "file") and _kind(name) else ""
