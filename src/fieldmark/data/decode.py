"""Files to upright RGB photos: libjpeg-turbo for JPEG, Pillow for everything else and as the fallback.

A photo either comes out whole or raises `PhotoError`: never half gray, never a warning on the side. Nothing here keeps
state between calls, so any number of threads may decode at once; the decoders release the interpreter lock.

Shape letters: H, W height and width of the upright photo, in pixels.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import logging
import os
import re
import struct
import threading
import warnings
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Union

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from fieldmark.data.folders import RAW_EXTENSIONS
from fieldmark.data.shards import PhotoFile, StoredPhoto
from fieldmark.errors import DataError, PhotoError

if TYPE_CHECKING:
    from PIL import Image

Pixels = NDArray[np.uint8]
Decoded = tuple[Pixels, int, int]  # with width and height of the whole upright photo, however far it was scaled
RGB = tuple[int, int, int]
Source = Union[str, Path, StoredPhoto, bytes, Pixels, "Image.Image"]

_ORIENTATION, _BITS_PER_SAMPLE, _SUBFILE_TYPE, _SUB_IFDS, _DNG_VERSION = 0x0112, 258, 254, 330, 50706
_JPEG_START = b"\xff\xd8\xff"
_MAGIC = (_JPEG_START, b"\x89PNG\r\n\x1a\n", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")
_ICONS = (b"\0\0\1\0", b"icns")
_HEIF_BRANDS = frozenset({b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"})
_NESTED = re.compile(rb"(?:\x89PNG\r\n\x1a\n.{4}IHDR|\xff\x4f\xff\x51.{4})(.{4})(.{4})", re.DOTALL)  # PNG, JPEG 2000
_TRUNCATED = re.compile(r"truncat|premature end|not enough|unexpected end|end of file|too short", re.IGNORECASE)
_EMPTY = "is empty (0 bytes)"
_NO_MEMORY = "needs more memory than there is"
_RAW_PROBLEM = "is a camera's raw file, which cannot be read: convert it to JPEG or TIFF"
_NO_IMAGES = {
    (b"FUJIFILMCCD-RAW", b"FOVb", b"IIU\0", b"IIRO", b"IIRS"): _RAW_PROBLEM,
    (b"\xff\x0a", b"\0\0\0\x0cJXL "): "is JPEG XL, which cannot be read: convert it to JPEG or PNG",
    (b"PK\3\4",): "is a ZIP archive, not an image",
    (b"%PDF",): "is a PDF, not an image",
}
# Reading these would start another program (Ghostscript) or the system's own renderer: not with strangers' files.
_DRAWINGS = frozenset({"EPS", "WMF", "EMF"})
# A photo takes at least a bit or so for a pixel; only larger ones than this are held to it.
_EMPTY_PIXELS, _PIXELS_PER_BYTE = 50_000_000, 100
# Times as long as wide: with a short side of 300 pixels it takes 270 MB, of which a network's crop leaves a thousandth.
_LONGEST_STRIP = 1000
_PILLOW_MODULES = r"PIL\."
_PILLOW_LOCK = threading.RLock()
# Pillow logs what is wrong with a file and then raises it: without a handler Python would print it, nameless.
logging.getLogger("PIL").addHandler(logging.NullHandler())


@dataclass(frozen=True)
class DecodeSpec:
    """Says how files become pixels; one for all photos of a model."""

    background: RGB  # under transparent pixels, 0 to 255
    max_pixels: int  # photos with more, by their header, are refused before they are decoded

    def read(self, source: Source | PhotoError, *, min_short_side: float | None = None) -> Pixels:
        """Decode a photo in any form to (H, W, 3) uint8, upright; arrays are taken as they are, files as in `decode`.

        Raises PhotoError, also where the source is one; DataError for what is no photo at all.
        """
        from PIL import Image

        if isinstance(source, PhotoError):
            raise source
        if isinstance(source, np.ndarray):
            return source
        if isinstance(source, str | Path | StoredPhoto | bytes | bytearray | memoryview):
            file = Path(source) if isinstance(source, str) else source
            file = file if isinstance(file, Path | StoredPhoto) else bytes(file)
            return self.decode(file, min_short_side=min_short_side)[0]
        image: Any = source
        if not isinstance(image, Image.Image):
            kind = type(source).__name__
            raise DataError(f"a photo is a path, bytes, a Pillow image or an (H, W, 3) uint8 array; got {kind}")
        # A copy: loading and turning must not change the caller's image, and Pillow's images are not thread-safe.
        return _from_image("the photo", image.copy(), self.background, self.max_pixels)

    def decode(self, source: PhotoFile | bytes, *, min_short_side: float | None, name: str = "<bytes>") -> Decoded:
        """Decode a file or its content, of any format that Pillow reads, to (H, W, 3) uint8, writable, upright by EXIF.

        Gray of more than 8 bits is scaled by its value range, CMYK and YCCK (also Adobe's inverted ones) become RGB, of
        an animation the first frame counts. `name` is what errors call bytes. Raises PhotoError. Also gives width and
        height of the whole upright photo.

        With `min_short_side`, in pixels, JPEG is scaled by 1/2, 1/4 or 1/8, rounded up, as far as the short side stays
        that long, in the DCT domain: libjpeg-turbo has SIMD code for these factors (5/8 to 7/8 take longer than the
        whole photo). Other formats come whole. To crop a box afterwards, ask for `size * short side of the photo /
        short side of the box`. Damage is found at any scale: it shows in the entropy coding, all of which is read.
        """
        path, data = (name, source) if isinstance(source, bytes) else (str(source), read_bytes(source))
        if not data:
            raise PhotoError(path, _EMPTY)
        if data.startswith(_JPEG_START) and (found := _decode_jpeg(path, data, self.max_pixels, min_short_side)):
            return found
        image = _open(path, io.BytesIO(data), self.max_pixels)
        _check_size(path, image.width, image.height, self.max_pixels, num_bytes=len(data))
        pixels = _from_image(path, image, self.background, self.max_pixels)
        return pixels, pixels.shape[1], pixels.shape[0]


def turn_upright(pixels: Pixels, orientation: int) -> Pixels:
    """Undo EXIF orientation 1 to 8."""
    if orientation == 1:
        return pixels
    import cv2

    if orientation > 4:
        pixels = cv2.transpose(pixels)  # pyright: ignore[reportAssignmentType]
    flip = {2: 1, 3: -1, 4: 0, 6: 1, 7: -1, 8: 0}.get(orientation)
    return pixels if flip is None else cv2.flip(pixels, flip)  # pyright: ignore[reportReturnType]


def silence_pillow() -> None:
    """Keep Pillow's warnings in: what they say is either harmless or becomes a PhotoError here.

    `warnings.catch_warnings` is not safe between threads (it restores another thread's filters), so the filter stays;
    it touches only warnings that Pillow's own modules raise. It is put back in front when somebody's filter got ahead.
    """
    first = warnings.filters[0] if warnings.filters else None
    if getattr(first and first[3], "pattern", None) != _PILLOW_MODULES:
        warnings.filterwarnings("ignore", module=_PILLOW_MODULES)


def read_bytes(path: PhotoFile) -> bytes:
    """Read a photo's content; raises PhotoError."""
    try:
        return path.read_bytes()
    except (OSError, ValueError, MemoryError) as error:
        raise PhotoError(str(path), explain_reading(error)) from None


def explain_reading(error: OSError | ValueError | MemoryError) -> str:
    """Say why a file cannot be read, without its name."""
    if isinstance(error, MemoryError):
        return _NO_MEMORY
    if isinstance(error, FileNotFoundError):
        return "has vanished"
    if isinstance(error, IsADirectoryError):
        return "is a folder"
    return f"cannot be read: {getattr(error, 'strerror', None) or error}".lower()


def _check_size(path: str, width: int, height: int, limit: int, *, num_bytes: int) -> None:
    """Refuse a decompression bomb, and a strip: its short side, enlarged to a network's, makes a bomb of it."""
    if max(width, height) > _LONGEST_STRIP * min(width, height):
        raise PhotoError(path, f"is {width} by {height} pixels, a strip that no network can see")
    _check_pixels(path, width * height, limit, num_bytes=num_bytes)


def _check_pixels(path: str, num_pixels: int, limit: int, *, num_bytes: int = 0) -> None:
    """Refuse a decompression bomb by what its header says, and by the size of its file where that is given."""
    if num_pixels > limit:
        raise PhotoError(path, f"has {num_pixels} pixels, more than the limit {limit}")
    if num_bytes and num_pixels > max(_EMPTY_PIXELS, num_bytes * _PIXELS_PER_BYTE):
        raise PhotoError(path, f"has {num_pixels} pixels in {num_bytes} bytes, which no photo has")


def _read_jpeg_orientation(data: bytes) -> int:
    """EXIF orientation, 1 to 8. Walks the segments, as Pillow's own header takes four times as long."""
    from PIL import Image

    place = 2
    while place + 4 <= len(data) and data[place] == 0xFF and data[place + 1] != 0xDA:
        if data[place + 1] == 0xFF:  # fill byte
            place += 1
            continue
        segment = data[place + 4 : place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")]
        if data[place + 1] == 0xE1 and segment.startswith(b"Exif\0\0"):
            exif = Image.Exif()
            # A damaged EXIF block does not make the photo unusable.
            with contextlib.suppress(Exception):
                exif.load(segment)
                if (orientation := exif.get(_ORIENTATION)) is not None:
                    return orientation if orientation in range(1, 9) else 1
        elif data[place + 1] == 0xE1 and b"tiff:Orientation" in segment:
            match = re.search(rb'tiff:Orientation(?:="|>)([1-8])', segment)
            return int(match[1]) if match else 1
        place += 4 + len(segment)
    return 1


def _decode_jpeg(path: str, data: bytes, max_pixels: int, min_short_side: float | None) -> Decoded | None:
    """Decode with libjpeg-turbo; None for what Pillow should decide: warnings, and colors that it alone knows."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    height, width = int(height), int(width)
    # CMYK and YCCK are Pillow's: it knows that Adobe stores them inverted.
    if colorspace not in {"YCbCr", "Gray", "RGB"}:
        return None
    _check_size(path, width, height, max_pixels, num_bytes=len(data))
    factor = 1
    if min_short_side is not None:
        factor = next((f for f in (8, 4, 2) if min(width, height) // f >= min_short_side), 1)
    # simplejpeg takes the smallest scaled size that is no less than these.
    least = {"min_height": -(-height // factor), "min_width": -(-width // factor)}
    try:
        pixels = simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True, **least)
    except ValueError as error:
        # A scan that ends early inside a closed file: Pillow would pass it with the rest in gray.
        if "premature end of data segment" in str(error):
            raise PhotoError(path, "is truncated") from None
        return None
    except MemoryError:
        raise PhotoError(path, _NO_MEMORY) from None
    orientation = _read_jpeg_orientation(data)
    return turn_upright(pixels, orientation), *((height, width) if orientation > 4 else (width, height))


def _open(path: str, file: BinaryIO, max_pixels: int) -> Image.Image:
    from PIL import Image

    silence_pillow()
    _silence_libtiff()
    has_heif = _register_heif()
    if os.path.splitext(path)[1].lower() in RAW_EXTENSIONS:  # noqa: PTH122
        raise PhotoError(path, _RAW_PROBLEM)
    start = file.read(4)
    file.seek(0)
    if start in _ICONS:  # Pillow decodes what is in them when it opens them
        content = file.read()
        _check_pixels(path, _count_nested_pixels(content), max_pixels, num_bytes=len(content))
        file.seek(0)
    explain = functools.partial(_explain_opening, file, has_heif)
    with _photo_errors(path, max_pixels, explain), _pillow_limit(max_pixels):
        image = Image.open(file)
    _check_pixels(path, image.width * image.height, max_pixels)
    if image.format in _DRAWINGS:
        raise PhotoError(path, f"is {image.format}, a drawing that needs another program to read")
    # What Pillow sees of such a file is its thumbnail.
    tags = getattr(image, "tag_v2", {})
    if _DNG_VERSION in tags or (_SUB_IFDS in tags and tags.get(_SUBFILE_TYPE) == 1):
        raise PhotoError(path, _RAW_PROBLEM)
    return image


@functools.cache
def _register_heif() -> bool:
    """Let Pillow read HEIC where the package for it is installed."""
    try:
        import pillow_heif  # pyright: ignore[reportMissingImports]
    except (ImportError, OSError):
        return False
    pillow_heif.register_heif_opener()
    return True


@functools.cache
def _silence_libtiff() -> None:
    """Keep libtiff from writing a line per odd tag to stderr, without the photo's name; Pillow raises what matters."""
    import PIL._imaging

    # The library that Pillow is linked to; where it is part of Pillow itself (Windows), its handlers are not to be had.
    with contextlib.suppress(OSError, AttributeError):
        libtiff = ctypes.CDLL(PIL._imaging.__file__)
        for handler in (libtiff.TIFFSetErrorHandler, libtiff.TIFFSetWarningHandler):
            handler.argtypes, handler.restype = [ctypes.c_void_p], ctypes.c_void_p
            handler(None)


@contextlib.contextmanager
def _pillow_limit(max_pixels: int) -> Generator[None]:
    """Let Pillow open what the user's limit allows, meanwhile: its own is one for all of the process."""
    from PIL import Image

    if Image.MAX_IMAGE_PIXELS is None or max_pixels <= 2 * Image.MAX_IMAGE_PIXELS:
        yield
        return
    with _PILLOW_LOCK:
        before = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = max_pixels // 2 + 1
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


@contextlib.contextmanager
def _photo_errors(path: str, max_pixels: int, explain: Callable[[Exception], str]) -> Generator[None]:
    """Turn what Pillow raises, on damaged files nearly everything, into a PhotoError."""
    from PIL import Image

    try:
        yield
    except Image.DecompressionBombError as error:
        number = re.search(r"\d+", str(error))
        limit = min(max_pixels, 2 * (Image.MAX_IMAGE_PIXELS or max_pixels))
        found = number[0] if number else "far too many"
        raise PhotoError(path, f"has {found} pixels, more than the limit {limit}") from None
    except MemoryError:
        raise PhotoError(path, _NO_MEMORY) from None
    except Exception as error:
        raise PhotoError(path, explain(error)) from None


def _explain_damage(error: Exception) -> str:
    return "is truncated" if isinstance(error, EOFError) or _TRUNCATED.search(str(error)) else "is corrupt"


def _explain_opening(file: BinaryIO, has_heif: bool, error: Exception) -> str:
    try:
        file.seek(0)
        start = file.read(16)
    except (OSError, ValueError):
        start = b""
    kind = start[8:12] if start[4:8] == b"ftyp" else b""
    if kind in _HEIF_BRANDS and not has_heif:
        return "is HEIC, which needs a package: pip install 'fieldmark[heic]'"
    if kind == b"crx ":
        return _RAW_PROBLEM
    for starts, problem in _NO_IMAGES.items():
        if start.startswith(starts):
            return problem
    return _explain_damage(error) if start.startswith(_MAGIC) or kind in _HEIF_BRANDS else "is not an image"


def _read_orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a damaged EXIF block does not make the photo unusable
        return 1
    return orientation if orientation in range(1, 9) else 1


def _count_nested_pixels(data: bytes) -> int:
    """Pixels of the largest picture within an icon, whose own header may say anything."""
    sizes = [(int.from_bytes(m[1], "big"), int.from_bytes(m[2], "big")) for m in _NESTED.finditer(data)]
    if data.startswith(_ICONS[0]):  # ICO: bitmaps without a signature, their offsets in a directory
        for entry in range(6, min(6 + 16 * int.from_bytes(data[4:6], "little"), len(data)), 16):
            start = int.from_bytes(data[entry + 12 : entry + 16], "little")
            if data[start : start + 4] == b"\x28\0\0\0":
                width, height = struct.unpack("<ii", data[start + 4 : start + 12].ljust(8, b"\0"))
                sizes.append((abs(width), abs(height)))
    return max((width * height for width, height in sizes), default=0)


def _from_image(path: str, image: Image.Image, background: RGB, max_pixels: int) -> Pixels:
    """(H, W, 3) upright of an open Pillow image of any mode; arguments and errors are those of `decode`."""
    _check_pixels(path, image.width * image.height, max_pixels)
    with _photo_errors(path, max_pixels, _explain_damage):
        with _pillow_limit(max_pixels):
            image.load()
        # After load(), as Pillow turns TIFF itself and then takes the tag away.
        return turn_upright(_to_rgb(image, background), _read_orientation(image))


def _to_rgb(image: Image.Image, background: RGB) -> Pixels:
    """Any mode of Pillow to (H, W, 3) uint8."""
    from PIL import Image, ImageCms

    if image.mode.startswith("I;16") or image.mode in {"I", "F"}:
        return np.repeat(_to_8_bit(image)[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, (*background, 255))
        canvas.alpha_composite(image.convert("RGBA"))
        image = canvas
    elif image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB") or image
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _to_8_bit(image: Image.Image) -> Pixels:
    """Gray of 16 or 32 bits or float, to 0..255 by its value range.

    16-bit formats have the range of 65535 (12-bit TIFF of 4095). 32-bit and float say nothing of theirs: the smallest
    of 1 (float), 255 and 65535 that holds all values is taken; what is outside (or negative) is stretched from its
    least to its greatest value. Not-a-number counts as the least.
    """
    values = np.asarray(image).astype(np.float64)
    low, high = 0.0, 65535.0
    if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):
        finite = values[np.isfinite(values)]
        least, most = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
        values = np.nan_to_num(values, nan=least, posinf=most, neginf=least)
        ranges = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
        fitting = next((top for top in ranges if least >= 0 and most <= top), None)
        low, high = (least, most) if fitting is None else (0.0, fitting)
    elif image.format == "TIFF" and getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE) in (12, (12,)):
        high = 4095.0
    return np.rint((values - low) * (255 / max(high - low, 1e-30))).clip(0, 255).astype(np.uint8)
