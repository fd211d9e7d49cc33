"""Small pictures of photos, for pages."""

from __future__ import annotations

import io
from pathlib import Path


def thumbnail(file: Path, side: int) -> bytes:
    """JPEG of a photo, its long side at most `side` pixels; raises PhotoError."""
    from PIL import Image

    from fieldmark.data.decode import decode_reduced

    photo = decode_reduced(file, min_short_side=side, background=(255, 255, 255), max_pixels=178_956_970).pixels
    image = Image.fromarray(photo)
    image.thumbnail((side, side), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82)
    return buffer.getvalue()
