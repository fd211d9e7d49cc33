"""Photos into tar files, each with its label and split beside it, that train as the photos do where they lie now."""

import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from fieldmark.data.decode import explain_reading, read_bytes
from fieldmark.data.folders import Photo, is_photo_path, is_skipped
from fieldmark.data.index import PhotoIndex, load_index
from fieldmark.data.inspection import map_in_threads
from fieldmark.data.shards import FETCHES_AT_ONCE, PhotoFile, StoredPhoto, TarShard
from fieldmark.errors import DataError, PhotoError, ResourceError
from fieldmark.files import digest_file, remove_dead_parts, whole_or_absent, write_whole
from fieldmark.progress import Progress

SUMS = "SHA256SUMS"  # of the tar files that are done, as `sha256sum -c` reads it; its first line names the plan
_HEAD = "# fieldmark pack 1, plan "
_GUESSED_BYTES = 100_000  # of a photo whose storage does not say
_EXTRA_BYTES = 2048  # two headers, what fills the last blocks, and what is said of the photo

Row = tuple[Photo, PhotoFile]


def pack_photos(
    index: PhotoIndex, out: Path, *, max_bytes: float, max_photos: int | None, progress: Progress
) -> tuple[int, int]:
    """Write the photos of a data set, in its order, into tar files of about so many bytes, or of so many photos.

    The same photos give the same bytes. A tar file is whole or absent, and is read again before it counts; a call that
    was stopped goes on where it was. Raises DataError for a folder that holds something else, PhotoError for a photo
    that cannot be read. Gives the number of tar files, and of those among them that were there and whole.
    """
    shards, plan = _cut(list(zip(index.photos, index.files(), strict=True)), max_bytes, max_photos)
    names = [f"photos-{number:06d}.tar" for number in range(len(shards))]
    sums = _read_sums(out, plan, names)
    kept = len(sums)

    def save_sums() -> None:
        lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
        write_whole(out / SUMS, f"{_HEAD}{plan}\n{lines}")

    save_sums()  # first, so that whatever is there is known as ours, whenever this is stopped
    progress.start(len(index), 0)
    for name, shard in zip(names, shards, strict=True):
        if name not in sums:
            sums[name] = _write_tar(out / name, shard)
            save_sums()
        progress.advance(len(shard))
    columns = {"path_column": "path", "label_column": "label", "split_column": "split", "group_column": "group"}
    read = load_index(out, **columns)  # remembers, too, where each photo is
    before, after = (Counter((one.label, one.split, one.group) for one in found.photos) for found in (index, read))
    if before != after:
        raise DataError(f"{out}: labels are read there that were not packed. Remove it, and pack again")
    return len(names), kept


def _cut(rows: Sequence[Row], max_bytes: float, max_photos: int | None) -> tuple[list[list[Row]], str]:
    """The photos of each tar file, and a digest of all that decides what the files will hold."""
    shards: list[list[Row]] = []
    plan, room = hashlib.sha256(), 0.0
    for photo, file in rows:
        try:
            size = file.num_bytes if isinstance(file, StoredPhoto) else file.stat().st_size
        except OSError as error:
            raise PhotoError(str(file), explain_reading(error)) from None
        if is_skipped(_name_member(photo)):
            raise PhotoError(photo.path, "has a hidden name, which nobody would look for in a tar file. Rename it")
        num_bytes = (size if size >= 0 else _GUESSED_BYTES) + _EXTRA_BYTES
        room -= num_bytes
        if not shards or (room < 0 if max_photos is None else len(shards[-1]) == max_photos):
            shards.append([])
            room = max_bytes - num_bytes
        shards[-1].append((photo, file))
        plan.update(f"{len(shards)} {size} {photo}\n".encode())
    return shards, plan.hexdigest()


def _read_sums(out: Path, plan: str, names: Sequence[str]) -> dict[str, str]:
    """Digests, by name, of the tar files that an earlier call has finished and that are still whole."""
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file. Give a new folder for the tar files")
    remove_dead_parts(out)
    there = {file.name for file in out.iterdir()} if out.exists() else set[str]()
    if not there:
        return {}
    if strange := sorted(there - {SUMS, *names} if SUMS in there else there):
        raise DataError(f"{out} is in use: {strange[0]!r} in it is not of this packing. Give a new folder")
    first, *lines = (out / SUMS).read_text("ascii", errors="replace").splitlines() or [""]
    if first != _HEAD + plan:
        raise DataError(
            f"{out} was packed from other photos, labels or sizes. Give a new folder, or the photos as they were"
        )
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    return {name: digest for name, digest in sums.items() if name in there and digest_file(out / name) == digest}


def _write_tar(path: Path, rows: Sequence[Row]) -> str:
    """Write a tar file, read it again as training would, and give its digest."""
    digest = ""

    def write(part: Path) -> None:
        nonlocal digest
        written, read = hashlib.sha256(), hashlib.sha256()
        notes: dict[str, bytes] = {}
        with part.open("wb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
            contents = map_in_threads(read_bytes, [file for _, file in rows], FETCHES_AT_ONCE)
            for (photo, _), content in zip(rows, contents, strict=True):
                told = {"cls": photo.label, "split": photo.split, "group": photo.group}
                note = json.dumps({key: value for key, value in told.items() if value}).encode("ascii")
                name = _name_member(photo)
                stem = os.path.splitext(name)[0]  # noqa: PTH122
                beside = stem if notes.setdefault(stem, note) == note else name  # a.jpg and a.png may differ
                for member, data in ((name, content), (f"{beside}.json", note)):
                    info = tarfile.TarInfo(member)
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
                written.update(content)
        for _, content in TarShard(str(part), path.name, "").read():
            read.update(content if isinstance(content, bytes) else b"damaged")
        if read.digest() != written.digest():
            raise ResourceError(f"{path}: what is read there is not what was written. Check the disk")
        digest = digest_file(part)

    whole_or_absent(path, write)
    return digest


def _name_member(photo: Photo) -> str:
    """A photo's path, made relative and with an extension of photos: rows of tables have none, and URLs may have."""
    name = photo.path.replace("://", "/")
    return name if is_photo_path(name) or is_skipped(name) else f"{name}.jpg"
