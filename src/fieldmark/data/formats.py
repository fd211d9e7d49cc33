"""Every format that Pillow reads, turned upright and into RGB of 8 bits.

Shape letters: H, W height and width of the upright photo, in pixels.
"""

from __future__ import annotations

import logging
import re
import warnings
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from numpy.typing import NDArray

from fieldmark.errors import PhotoError

if TYPE_CHECKING:
    from PIL import Image

Pixels = NDArray[np.uint8]
RGB = tuple[int, int, int]

ORIENTATION = 0x0112
JPEG_START = b"\xff\xd8\xff"
_TRUNCATED = re.compile(r"truncat|premature end|not enough|unexpected end|end of file|too short", re.IGNORECASE)
# Reading these would start another program (Ghostscript) or the system's own renderer: not with strangers' files.
_NOT_PHOTOS = frozenset({"EPS", "WMF", "EMF"})
_MAGIC = (JPEG_START, b"\x89PNG\r\n\x1a\n", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")
_PILLOW_MODULES = r"PIL\."
# Pillow logs what is wrong with a file and then raises it: without a handler Python would print it, nameless.
logging.getLogger("PIL").addHandler(logging.NullHandler())


def check_pixels(path: str, num_pixels: int, limit: int) -> None:
    """Refuse a decompression bomb by what its header says."""
    if num_pixels > limit:
        raise PhotoError(path, f"has {num_pixels} pixels, more than the limit {limit}")


def turn_upright(pixels: Pixels, orientation: int) -> Pixels:
    """Undo EXIF orientation 1 to 8."""
    if orientation == 1:
        return pixels
    import cv2

    if orientation in (5, 6, 7, 8):
        pixels = cv2.transpose(pixels)  # pyright: ignore[reportAssignmentType]
    flip = {2: 1, 3: -1, 4: 0, 6: 1, 7: -1, 8: 0}.get(orientation)
    return pixels if flip is None else cv2.flip(pixels, flip)  # pyright: ignore[reportReturnType]


def _silence_pillow() -> None:
    """Keep Pillow's warnings in: what they say is either harmless or becomes a PhotoError here.

    `warnings.catch_warnings` is not safe between threads (it restores another thread's filters), so the filter stays;
    it touches only warnings that Pillow's own modules raise. It is put back in front when somebody's filter got ahead.
    """
    first = warnings.filters[0] if warnings.filters else None
    pattern = first[3] if first else None
    if getattr(pattern, "pattern", None) != _PILLOW_MODULES:
        warnings.filterwarnings("ignore", module=_PILLOW_MODULES)


def _open(path: str, file: BinaryIO, max_pixels: int) -> Image.Image:
    from PIL import Image

    _silence_pillow()
    try:
        image = Image.open(file)
    except Image.DecompressionBombError as error:
        raise PhotoError(path, _bomb_problem(error, max_pixels)) from None
    except Exception as error:
        raise PhotoError(path, _opening_problem(file, error)) from None
    check_pixels(path, image.width * image.height, max_pixels)
    if image.format in _NOT_PHOTOS:
        raise PhotoError(path, f"is {image.format}, a drawing that needs another program to read")
    return image


def _opening_problem(file: BinaryIO, error: Exception) -> str:
    try:
        file.seek(0)
        start = file.read(16)
    except (OSError, ValueError):
        start = b""
    if not start.startswith(_MAGIC):
        return "is not an image"
    return "is truncated" if _TRUNCATED.search(str(error)) else "is corrupt"


def _bomb_problem(error: Exception, max_pixels: int) -> str:
    from PIL import Image

    numbers = [int(number) for number in re.findall(r"\d+", str(error))]
    limit = min(max_pixels, 2 * (Image.MAX_IMAGE_PIXELS or max_pixels))
    return f"has {numbers[0] if numbers else 'far too many'} pixels, more than the limit {limit}"


def read_size(path: str, file: BinaryIO, max_pixels: int) -> tuple[int, int]:
    """Width and height of the upright photo, from its header."""
    image = _open(path, file, max_pixels)
    # Pillow gives the size of a TIFF upright already.
    if image.format != "TIFF" and _orientation(image) > 4:
        return image.height, image.width
    return image.width, image.height


def _orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except Exception:  # a damaged EXIF block does not make the photo unusable
        return 1
    return orientation if orientation in range(1, 9) else 1


def decode(path: str, file: BinaryIO, background: RGB, max_pixels: int) -> Pixels:
    """Decode with Pillow to (H, W, 3) upright. `path` is for errors; arguments and errors are those of data.decode."""
    return from_image(path, _open(path, file, max_pixels), background, max_pixels)


def from_image(path: str, image: Image.Image, background: RGB, max_pixels: int) -> Pixels:
    """(H, W, 3) upright of an open Pillow image of any mode; arguments and errors are those of data.decode."""
    from PIL import Image

    check_pixels(path, image.width * image.height, max_pixels)
    try:
        image.load()
        # After load(), as Pillow turns TIFF itself and then takes the tag away.
        return turn_upright(_to_rgb(image, background), _orientation(image))
    except Image.DecompressionBombError as error:
        raise PhotoError(path, _bomb_problem(error, max_pixels)) from None
    except MemoryError:
        raise PhotoError(path, "needs more memory than there is") from None
    except Exception as error:  # Pillow's decoders raise nearly everything on damaged files
        truncated = isinstance(error, EOFError) or _TRUNCATED.search(str(error))
        raise PhotoError(path, "is truncated" if truncated else "is corrupt") from None


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
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        image = image if converted is None else converted
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _to_8_bit(image: Image.Image) -> Pixels:
    """Grey of 16 or 32 bits or float, to 0..255 by its value range.

    16-bit formats have the range of 65535 (12-bit TIFF of 4095). 32-bit and float say nothing of theirs: the smallest
    of 1 (float), 255 and 65535 that holds all values is taken; what is outside (or negative) is stretched from its
    least to its greatest value. Not-a-number counts as the least.
    """
    values = np.asarray(image).astype(np.float64)
    low, high = 0.0, 65535.0
    if image.mode in {"I", "F"} and image.format != "PPM":
        finite = values[np.isfinite(values)]
        least, most = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
        values = np.nan_to_num(values, nan=least, posinf=most, neginf=least)
        ranges = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
        fitting = next((top for top in ranges if least >= 0 and most <= top), None)
        low, high = (least, most) if fitting is None else (0.0, fitting)
    elif image.format == "TIFF" and getattr(image, "tag_v2", {}).get(258) in (12, (12,)):
        high = 4095.0
    return np.rint((values - low) * (255 / max(high - low, 1e-30))).clip(0, 255).astype(np.uint8)
