"""What each file really is: decoded to the last pixel, hashed, timed by its EXIF, and remembered until it changes."""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import re
import stat
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image, ImageCms

from fieldmark.data.decode import DecodeSpec, Pixels, explain_reading, read_bytes, silence_pillow
from fieldmark.data.shards import PhotoFile, StoredPhoto, expect
from fieldmark.data.storage import absolute
from fieldmark.errors import PhotoError
from fieldmark.progress import Progress

FORMAT = 3  # raised when the meaning of a fact changes; older ones are then not found
SAMPLED_HEADERS = 256  # of new photos, from which the sizes of all are estimated before they are decoded
HASH_SIDE_PIXELS = 128  # four times the 32 that the hash itself resizes to, so that what it sees is the same
EXIF_IFD, TIME_ORIGINAL, TIME_DIGITIZED = 0x8769, 0x9003, 0x9004
SUBSECONDS = {TIME_ORIGINAL: 0x9291, TIME_DIGITIZED: 0x9292}

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class PhotoFacts:
    """Holds what inspection found out about one photo; "" stands for what cannot be known or was not asked for."""

    width: int  # upright, in pixels; 0 where the photo cannot be used
    height: int
    num_bytes: int  # size of the file; 0 where there is none
    mode: str  # Pillow's name of the pixel format: RGB, L, P, CMYK, ...
    format: str  # Pillow's name of the file format, whatever the extension says: JPEG, PNG, ...
    problem: str  # why the photo cannot be used; "" if it can
    sha256: str  # of the file's bytes, 64 hex digits
    perceptual_hash: str  # 64-bit DCT hash of the upright photo, 16 hex digits
    captured_at: float | None  # EXIF capture time in seconds by the camera's own clock; only differences mean something
    color_profile: str = ""  # name of an ICC profile other than sRGB, which decoding ignores


_UNKNOWN = PhotoFacts(0, 0, 0, "", "", "", "", "", None)


class Inspection(contextlib.AbstractContextManager["Inspection"]):
    """The facts of N photos, noted when somebody reads their pixels: so what needs these decodes each photo only once.

    Any number of threads may read. A photo that was inspected before is not opened for its facts while its path, size
    and modification time are the same: they are remembered in `cache_folder`, unless it is None. What cannot be
    remembered is no error. The hash takes about 2 ms a photo more.
    """

    def __init__(
        self, files: Sequence[PhotoFile], *, decoding: DecodeSpec, with_hash: bool, cache_folder: Path | None
    ) -> None:
        # Another limit, or another Pillow, may accept what this one refuses.
        settings = f"{FORMAT} {PIL.__version__} {decoding.background} {decoding.max_pixels}"
        self.files = files
        self._decoding, self._with_hash = decoding, with_hash
        self._memory, remembered = _open_memory(cache_folder, settings)
        self._names: list[str] = []
        self._facts: dict[int, PhotoFacts] = {}
        for number, file in enumerate(files):
            name, problem = look_up(file)
            self._names.append(name)
            known = remembered.get(name)
            if problem:
                self._facts[number] = dataclasses.replace(_UNKNOWN, problem=problem)
            elif known is not None and (known.perceptual_hash or not with_hash):
                self._facts[number] = known

    def estimate_sizes(self) -> NDArray[np.int64]:
        """(N, 2) width and height in pixels; of photos not yet read those of a sample, as they lie; 0 if broken."""
        silence_pillow()
        sizes = np.zeros((len(self.files), 2), np.int64)
        for number, facts in self._facts.items():
            sizes[number] = facts.width, facts.height
        new, sample = self._list_new(), [(0, 0)]
        for number in new[:: len(new) // SAMPLED_HEADERS + 1]:
            with contextlib.suppress(Exception):  # what is wrong shows later
                sample.append(Image.open(io.BytesIO(read_bytes(self.files[number]))).size)
        sizes[new] = np.resize(sample[1:] or sample, (len(new), 2))
        return sizes

    def _list_new(self) -> list[int]:
        return [number for number in range(len(self.files)) if number not in self._facts]

    def read(self, number: int, *, min_short_side: float | None = None) -> Pixels:
        """The pixels of a photo as `DecodeSpec.read` gives them, which notes its facts; raises PhotoError."""
        facts = self._facts.get(number)
        if facts is None:
            return self._inspect(number, min_short_side)
        if facts.problem:
            raise PhotoError(str(self.files[number]), facts.problem)
        return self._decoding.read(self.files[number], min_short_side=min_short_side)

    def _inspect(self, number: int, min_short_side: float | None) -> Pixels:
        file, facts = self.files[number], _UNKNOWN
        try:
            data = read_bytes(file)
            facts = dataclasses.replace(facts, num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
            photo, width, height = self._decoding.decode(data, min_short_side=min_short_side, name=str(file))
            hashed = perceptual_hash(photo) if self._with_hash else ""
        except PhotoError as error:
            # Not remembered: it may pass without the file changing (permissions, memory, a decoder that is installed).
            self._facts[number] = dataclasses.replace(facts, problem=error.reason)
            raise
        facts = dataclasses.replace(facts, width=width, height=height, perceptual_hash=hashed, **_read_header(data))
        self._facts[number] = facts
        if self._memory is not None:
            text = json.dumps([self._names[number], dataclasses.asdict(facts)]).encode()
            with contextlib.suppress(OSError):  # forgotten
                self._memory.write(b"\n%d %s" % (zlib.crc32(text), text))
        return photo

    def finish(self, *, threads: int, progress: Progress) -> list[PhotoFacts]:
        """Read the photos that nobody has read, and give the N facts in order; no photo raises."""
        new = self._list_new()
        progress.start(len(self.files), len(self.files) - len(new))
        for _ in map_in_threads(self._note, expect(new, self.files), threads):
            progress.advance(1)
        return [self._facts[number] for number in range(len(self.files))]

    def _note(self, number: int) -> None:
        with contextlib.suppress(PhotoError):
            self.read(number, min_short_side=None if self._with_hash else 1)

    def __exit__(self, *error: object) -> None:
        if self._memory is not None:
            self._memory.close()


def map_in_threads(work: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """Do `work` on each item by threads, in order, a few ahead of the consumer."""
    waiting: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > 4 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:  # also when the consumer has had enough
        pool.shutdown(cancel_futures=True)


def perceptual_hash(photo: Pixels) -> str:
    """The 64-bit hash of an (H, W, 3) upright photo as 16 hex digits; close photos differ in few bits.

    Source:
        pHash (Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010, section 3.2), as
        in the library ImageHash. Its own resize reads every pixel, so large photos are averaged down before.
    """
    import imagehash

    image = Image.fromarray(photo)
    factor = min(image.size) // HASH_SIDE_PIXELS
    return str(imagehash.phash(image.reduce(factor) if factor > 1 else image))


def capture_time(exif: Any) -> float | None:
    """When the shutter opened, in seconds since 1970 by the camera's clock, by Pillow's `Image.Exif`; None if unknown.

    The plain DateTime tag does not count: it is the time of the last change, and one for all after a batch export.
    """
    try:
        details = exif.get_ifd(EXIF_IFD)
        for tag, subseconds in SUBSECONDS.items():
            text = str(details.get(tag, "")).strip("\0 ")
            if not text:
                continue
            moment = datetime.strptime(text, "%Y:%m:%d %H:%M:%S").replace(tzinfo=UTC)
            digits = re.match(r"\d+", str(details.get(subseconds, "")))
            return moment.timestamp() + (float(f"0.{digits[0]}") if digits else 0.0)
    except Exception:  # whatever is wrong with its EXIF, the photo itself is good
        return None
    return None


def look_up(file: PhotoFile) -> tuple[str, str]:
    """What a photo is called in caches, another name as soon as it changes; and what is wrong before it is opened."""
    if isinstance(file, StoredPhoto):
        return file.key, "" if file.is_file() else "has vanished"
    try:
        info = os.stat(file)  # noqa: PTH116, half the time of Path.stat
    except (OSError, ValueError) as error:
        return "", explain_reading(error)
    text = f"{file.absolute()}\0{(info.st_size, info.st_mtime_ns, info.st_ctime_ns)}".encode(errors="surrogateescape")
    # To open a pipe would be to wait for ever.
    problem = "" if stat.S_ISREG(info.st_mode) else "is not a regular file"
    return hashlib.blake2b(text, digest_size=16).hexdigest(), problem


def name_folder(root: str | Path) -> str:
    """Return what a data set below this folder is called in caches: readable, and its own."""
    path = absolute(root)
    readable = re.sub(r"[^A-Za-z0-9_-]", "_", Path(path).name)[:40]
    return f"{readable}-{hashlib.blake2b(path.encode(errors='surrogateescape'), digest_size=6).hexdigest()}"


def _read_header(data: bytes) -> dict[str, Any]:
    silence_pillow()
    try:
        with Image.open(io.BytesIO(data)) as image:
            return {
                "mode": image.mode,
                "format": image.format or "",
                "captured_at": capture_time(image.getexif()),
                "color_profile": _name_profile(image.info.get("icc_profile") or b""),
            }
    except Exception:  # the decoder that read the pixels is not always Pillow
        return {}


@functools.lru_cache(maxsize=64)  # cameras write the same few profiles
def _name_profile(profile: bytes) -> str:
    """The name of an ICC profile that is not sRGB; "" where there is none, or none that can be read."""
    try:
        name = ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(profile))).strip()
    except (ImageCms.PyCMSError, OSError):
        return ""
    return "" if "srgb" in name.lower() else name[:80] or "unnamed"


def _open_memory(folder: Path | None, settings: str) -> tuple[BinaryIO | None, dict[str, PhotoFacts]]:
    """Open the file that remembers facts under these settings, and read them, by the photos' names.

    A line is a checksum, then the JSON of a name and its facts. Lines are only ever added, each in one piece, so that
    several processes may at once; one that is torn or damaged is passed over. A failure only makes it forget.
    """
    known: dict[str, PhotoFacts] = {}
    if folder is None:
        return None, known
    path = folder / f"{hashlib.sha256(settings.encode()).hexdigest()[:16]}.jsonl"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        memory = path.open("ab", buffering=0)
        with path.open("rb") as lines:
            for line in lines:
                checksum, _, text = line.strip().partition(b" ")
                with contextlib.suppress(ValueError, TypeError):
                    if zlib.crc32(text) == int(checksum):
                        name, facts = json.loads(text)
                        known[name] = PhotoFacts(**facts)
    except OSError:
        return None, known
    return memory, known
