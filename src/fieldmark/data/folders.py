"""Which files below a folder are photos, and how many others were left aside, by reason.

Names are taken as the file system gives them: bytes that are not UTF-8 arrive as lone surrogates (PEP 383) and leave
again as the same bytes.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import stat
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fieldmark.errors import DataError

SYSTEM_NAMES = frozenset(
    {"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "@eadir", "lost+found"}
)
# Pillow has no decoder for the first four; the others are drawings, for which it starts another program.
NOT_PHOTOS = frozenset({"BUFR", "GRIB", "HDF5", "MPEG", "EPS", "WMF", "EMF"})
HEIF_EXTENSIONS = frozenset({".heic", ".heics", ".heif", ".heifs", ".hif"})


@functools.cache
def photo_extensions() -> frozenset[str]:
    """Extensions of the formats that can be read here, in lower case with their dot: `.jpg`, `.png`, ...

    HEIC belongs to them if the package pillow-heif is installed.
    """
    from PIL import Image

    extensions = Image.registered_extensions()
    names = {name for name, kind in extensions.items() if kind in Image.OPEN and kind not in NOT_PHOTOS}
    return frozenset(names | (HEIF_EXTENSIONS if importlib.util.find_spec("pillow_heif") else set()))


def natural_key() -> Callable[[str], Any]:
    """A sort key for paths with "/" and for names: "2" before "10", folder by folder; the text itself breaks ties."""
    from natsort import natsort_keygen

    of_part = natsort_keygen()
    of_folder = functools.cache(lambda folder: tuple(of_part(part) for part in folder.split("/")))

    def key(path: str) -> Any:
        folder, _, name = path.rpartition("/")
        return of_folder(folder) if folder else (), of_part(name), path

    return key


def find_photos(root: Path) -> tuple[list[str], Counter[str]]:
    """Walk `root` and list its photos.

    Links to files and folders are followed, except a link to a folder that it lies in. A link to nothing whose name is
    a photo's counts as a photo: whoever opens it will say that it is missing, rather than nobody.

    Args:
        root: An existing folder.

    Returns:
        Paths of photos relative to `root`, with "/", in natural order; and a count of files and folders left aside for
        each reason.

    Raises:
        DataError: A folder cannot be listed.
    """
    photos: list[str] = []
    ignored: Counter[str] = Counter()
    _walk(root, "", (), photos, ignored)
    return sorted(photos, key=natural_key()), ignored


def is_photo_path(path: str) -> bool:
    """Whether `find_photos` would take a file by this path, relative and with "/", for a photo."""
    return not is_left_aside(path) and _is_photo_name(path)


def is_left_aside(path: str) -> bool:
    """Whether `find_photos` would not look at this relative path, with "/", for its name: hidden, or the system's."""
    return any(part.startswith(".") or part.lower() in SYSTEM_NAMES for part in path.split("/"))


def _walk(
    folder: Path, prefix: str, above: tuple[tuple[int, int], ...], photos: list[str], ignored: Counter[str]
) -> None:
    try:
        info = folder.stat()
        with os.scandir(folder) as listing:
            entries = sorted(listing, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(
            f"{folder} cannot be listed: {error.strerror}. Make it readable, or move it out of the data"
        ) from None
    inside = (*above, (info.st_dev, info.st_ino))
    if above and not entries:
        ignored["empty folder"] += 1
    for entry in entries:
        reason = _reason_to_ignore(entry, inside)
        if reason:
            ignored[reason] += 1
        elif entry.is_dir():
            _walk(folder / entry.name, f"{prefix}{entry.name}/", inside, photos, ignored)
        else:
            photos.append(prefix + entry.name)


def _reason_to_ignore(entry: os.DirEntry[str], inside: tuple[tuple[int, int], ...]) -> str:
    """Why an entry is neither a photo nor a folder to look into; "" if it is one of them."""
    if entry.name.startswith("."):
        return "hidden"
    if entry.name.lower() in SYSTEM_NAMES:
        return "made by the operating system"
    try:
        info = entry.stat()
    except OSError:  # a link to nothing, or to itself
        return "" if _is_photo_name(entry.name) else "broken link"
    if stat.S_ISDIR(info.st_mode):
        return "link to a folder that it lies in" if (info.st_dev, info.st_ino) in inside else ""
    if not stat.S_ISREG(info.st_mode):
        return "not a regular file"
    return "" if _is_photo_name(entry.name) else "not a photo"


def _is_photo_name(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in photo_extensions()  # noqa: PTH122, 4 times faster than Path
