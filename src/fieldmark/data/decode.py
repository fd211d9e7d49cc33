"""Files to upright RGB photos: libjpeg-turbo for JPEG, Pillow for everything else and as the fallback.

A photo either comes out whole or raises `PhotoError`: never half grey, never a warning on the side. Nothing here keeps
state between calls, so any number of threads may decode at once; the decoders release the interpreter lock.

Shape letters: H, W height and width of the upright photo, in pixels.
"""

from __future__ import annotations

import errno
import io
import re
from pathlib import Path
from typing import NamedTuple

from fieldmark.data import formats
from fieldmark.data.formats import JPEG_START, ORIENTATION, RGB, Pixels, check_pixels, turn_upright
from fieldmark.errors import PhotoError


class ReducedPhoto(NamedTuple):
    """A photo that was decoded at a fraction of its size."""

    pixels: Pixels
    """(h, w, 3) uint8, upright."""

    width: int
    """Of the whole upright photo, in pixels."""

    height: int
    """Of the whole upright photo, in pixels."""

    scale: float
    """Reduced coordinate = scale x full coordinate, on both axes: 1, 1/2, 1/4 or 1/8. `pixels` is rounded up, so its
    last row and column may stand for less than a full pixel."""


class _JpegHeader(NamedTuple):
    width: int  # as stored, before orientation
    height: int
    orientation: int


def decode(source: Path | bytes, *, background: RGB, max_pixels: int, name: str = "<bytes>") -> Pixels:
    """Decode one photo of any format that Pillow reads.

    Grey of more than 8 bits is scaled by its value range, CMYK and YCCK (also Adobe's inverted ones) become RGB,
    of an animation the first frame counts.

    Args:
        source: A file, or its content.
        background: RGB under transparent pixels, 0 to 255.
        max_pixels: Photos with more pixels than this, by their header, are refused before they are decoded.
        name: What to call `bytes` in an error.

    Returns:
        (H, W, 3) uint8, writable and contiguous, upright by EXIF (mirrored orientations too).

    Raises:
        PhotoError: The file cannot be read, is empty, truncated, corrupt, too large, or no image.
    """
    return decode_reduced(source, min_short_side=None, background=background, max_pixels=max_pixels, name=name).pixels


def decode_reduced(
    source: Path | bytes, *, min_short_side: float | None, background: RGB, max_pixels: int, name: str = "<bytes>"
) -> ReducedPhoto:
    """Decode one photo no larger than it needs to be.

    JPEG is scaled in the DCT domain by 1/2, 1/4 or 1/8, the factors that libjpeg-turbo has SIMD code for (5/8 to 7/8
    take longer than the whole photo). Other formats come out whole. To crop a box afterwards, ask for
    `size * short side of the photo / short side of the box`. Region-of-interest decoding is not among simplejpeg's
    functions, so the whole frame is decoded.

    Args:
        source: A file, or its content.
        min_short_side: The short side of the result is at least this, in pixels, unless the photo is smaller: then it
            comes whole. None is the whole photo.
        background: As in `decode`.
        max_pixels: As in `decode`.
        name: As in `decode`.

    Raises:
        PhotoError: As in `decode`.

    Source:
        libjpeg-turbo's scaled inverse DCT, via simplejpeg.
    """
    path, data = (name, source) if isinstance(source, bytes) else (str(source), _read(source))
    if not data:
        raise PhotoError(path, "is empty (0 bytes)")
    header = _read_jpeg_header(data)
    if header is not None:
        check_pixels(path, header.width * header.height, max_pixels)
        reduced = _decode_jpeg(path, data, header, min_short_side)
        if reduced is not None:
            return reduced
    pixels = formats.decode(path, io.BytesIO(data), background, max_pixels)
    return ReducedPhoto(pixels, pixels.shape[1], pixels.shape[0], 1.0)


def read_size(source: Path | bytes, *, max_pixels: int, name: str = "<bytes>") -> tuple[int, int]:
    """Read the size of the upright photo from its header.

    Args:
        source: A file, of which only the beginning is read, or its content.
        max_pixels: As in `decode`.
        name: As in `decode`.

    Returns:
        Width and height in pixels, as `decode` will give them.

    Raises:
        PhotoError: The header cannot be read. The pixels behind it may still be broken.
    """
    if isinstance(source, bytes):
        if not source:
            raise PhotoError(name, "is empty (0 bytes)")
        header = _read_jpeg_header(source)
        if header is not None:
            check_pixels(name, header.width * header.height, max_pixels)
            return (header.height, header.width) if header.orientation > 4 else (header.width, header.height)
        return formats.read_size(name, io.BytesIO(source), max_pixels)
    try:
        with source.open("rb") as file:
            if not file.read(1):
                raise PhotoError(str(source), "is empty (0 bytes)")
            file.seek(0)
            return formats.read_size(str(source), file, max_pixels)
    except (OSError, ValueError) as error:
        raise PhotoError(str(source), _reading_problem(error)) from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise PhotoError(str(path), _reading_problem(error)) from None


def _reading_problem(error: OSError | ValueError) -> str:
    if isinstance(error, FileNotFoundError):
        return "has vanished"
    if isinstance(error, PermissionError):
        return "cannot be read: permission denied"
    if isinstance(error, IsADirectoryError):
        return "is a folder"
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return "cannot be read: file name too long"
    return f"cannot be read: {(error.strerror if isinstance(error, OSError) else None) or error}"


def _read_jpeg_header(data: bytes) -> _JpegHeader | None:
    """Size, colours and orientation; None for what simplejpeg cannot turn into RGB just as Pillow would."""
    if not data.startswith(JPEG_START):
        return None
    import simplejpeg

    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    # CMYK and YCCK are Pillow's: it knows that Adobe stores them inverted.
    if colorspace not in {"YCbCr", "Gray", "RGB"}:
        return None
    return _JpegHeader(int(width), int(height), _jpeg_orientation(data))


def _jpeg_orientation(data: bytes) -> int:
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
            try:
                exif.load(segment)
                orientation = exif.get(ORIENTATION)
            except Exception:  # a damaged EXIF block does not make the photo unusable
                orientation = None
            if orientation is not None:
                return orientation if orientation in range(1, 9) else 1
        elif data[place + 1] == 0xE1 and b"tiff:Orientation" in segment:
            match = re.search(rb'tiff:Orientation(?:="|>)([1-8])', segment)
            return int(match[1]) if match else 1
        place += 4 + len(segment)
    return 1


def _decode_jpeg(path: str, data: bytes, header: _JpegHeader, min_short_side: float | None) -> ReducedPhoto | None:
    """Decode with libjpeg-turbo; None if it warns of something that Pillow should judge."""
    import simplejpeg

    factor = 1
    if min_short_side is not None:
        short_side = min(header.width, header.height)
        factor = next((f for f in (8, 4, 2) if short_side // f >= min_short_side), 1)
    # simplejpeg takes the smallest scaled size that is no less than these.
    height, width = -(-header.height // factor), -(-header.width // factor)
    try:
        pixels = simplejpeg.decode_jpeg(data, colorspace="RGB", min_height=height, min_width=width, strict=True)
    except ValueError as error:
        # A scan that ends early inside a closed file: Pillow would pass it with the rest in grey.
        if "premature end of data segment" in str(error):
            raise PhotoError(path, "is truncated") from None
        return None
    width, height = (header.height, header.width) if header.orientation > 4 else (header.width, header.height)
    return ReducedPhoto(turn_upright(pixels, header.orientation), width, height, 1 / factor)
