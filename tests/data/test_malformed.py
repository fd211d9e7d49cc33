"""Whatever a folder holds, a file either is a photo or one PhotoError: no crash, no warning, no half picture."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fieldmark.data import decode as decode_module
from fieldmark.data.decode import DecodeSpec
from fieldmark.errors import PhotoError

LIMIT = 10_000_000
RNG = np.random.default_rng(11)
NOISE = RNG.integers(0, 256, (48, 64, 3), dtype=np.uint8)
KINDS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")


def make(kind: str, image: Image.Image | None = None, **options: object) -> bytes:
    file = io.BytesIO()
    (image or Image.fromarray(NOISE)).save(file, kind, **options)
    return file.getvalue()


def truncations() -> Iterator[tuple[str, bytes]]:
    variants = {kind: make(kind) for kind in KINDS}
    variants["progressive"] = make("JPEG", progressive=True)
    variants["lzw"] = make("TIFF", compression="tiff_lzw")
    variants["jpeg-in-tiff"] = make("TIFF", compression="jpeg")
    variants["avif"] = make("AVIF")
    variants["jp2"] = make("JPEG2000")
    variants["ico"] = make("ICO", Image.fromarray(NOISE).resize((48, 48)))
    for name, data in variants.items():
        for share in (0.002, 0.01, 0.05, 0.2, 0.5, 0.9, 0.99):
            yield f"{name} cut at {share:.1%}", data[: max(1, int(len(data) * share))]
        yield f"{name} without its last byte", data[:-1]


def bit_flips() -> Iterator[tuple[str, bytes]]:
    for kind in KINDS:
        data = make(kind)
        for place in RNG.choice(min(len(data), 800), 12, replace=False):
            flipped = bytearray(data)
            flipped[place] ^= 1 << int(RNG.integers(8))
            yield f"{kind} with a bit flipped at {place}", bytes(flipped)
        for place in RNG.integers(len(data), size=4):
            yield f"{kind} zeroed from {place}", data[:place] + bytes(len(data) - place)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def png(width: int, height: int, depth: int, color: int, data: bytes) -> bytes:
    size = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    header = png_chunk(b"IHDR", size + bytes([depth, color, 0, 0, 0]))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(data)) + png_chunk(b"IEND", b"")


def bombs() -> Iterator[tuple[str, bytes]]:
    for side in (4000, 20000, 60000, 2**31 - 1):
        yield f"PNG that claims {side} x {side}", png(side, side, 8, 0, b"\0" * 100)
    jpeg = bytearray(make("JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = b"\xff\xff\xff\xff"
    yield "JPEG that claims 65535 x 65535", bytes(jpeg)
    bmp = bytearray(make("BMP"))
    bmp[18:26] = (30000).to_bytes(4, "little") * 2
    yield "BMP that claims 30000 x 30000", bytes(bmp)
    gif = bytearray(make("GIF"))
    gif[6:10] = b"\xff\xff\xff\xff"
    yield "GIF that claims 65535 x 65535", bytes(gif)
    yield (
        "PNG with a text bomb",
        png(8, 8, 8, 0, b"\0" * 72)[:33] + png_chunk(b"zTXt", b"k\0\0" + zlib.compress(b"a" * 2**22)),
    )
    yield "PNG of no size", png(0, 0, 8, 0, b"")


def odd_modes() -> Iterator[tuple[str, bytes]]:
    picture = Image.fromarray(NOISE)
    for mode in ("1", "L", "LA", "P", "PA", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "I;16"):
        for kind in (*KINDS, "PPM", "TGA", "JPEG2000", "PCX"):
            try:
                converted = Image.merge("LAB", picture.split()) if mode == "LAB" else picture.convert(mode)
                yield f"{kind} of mode {mode}", make(kind, converted)
            except (OSError, ValueError, KeyError):
                continue  # the format does not have the mode
    for depth in (1, 2, 4, 8, 16):
        yield f"PNG of {depth} bits", png(8, 8, depth, 0, bytes((1 + depth) * 8))
    yield "PNG of an impossible depth", png(8, 8, 3, 0, bytes(72))
    yield "PNG with a palette that is missing", png(8, 8, 8, 3, bytes(72))


def not_photos() -> Iterator[tuple[str, bytes]]:
    yield "nothing", b""
    yield "one byte", b"\xff"
    yield "zeros", bytes(5000)
    yield "noise", RNG.bytes(5000)
    yield "text", b"label,photo\n" * 200
    yield "a web page", b"<!DOCTYPE html><html><body>404 Not Found</body></html>"
    yield "svg", b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"></svg>'
    yield "pdf", b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n<<>>\nendobj\n"
    yield "postscript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    yield "zip", b"PK\x03\x04" + bytes(200)
    yield "numpy", b"\x93NUMPY\x01\x00" + bytes(200)
    yield "movie", b"\0\0\0\x18ftypmp42" + bytes(500)
    for kind in KINDS:
        yield f"the first bytes of {kind}", make(kind)[:12]
    for start in (b"\xff\xd8\xff\xd9", b"\xff\xd8\xff\xe0", b"GIF89a", b"RIFF\0\0\0\0WEBP", b"BM", b"II*\0", b"MM\0*"):
        yield f"{start!r} and zeros", start + bytes(300)


CASES = [*truncations(), *bit_flips(), *bombs(), *odd_modes(), *not_photos()]


def result_of(read: Callable[[], object]) -> tuple[object, str]:
    """What `read` gives and "photo", or None and the reason."""
    try:
        return read(), "photo"
    except PhotoError as error:
        return None, error.reason


def outcome(source: Path | bytes) -> str:
    """`photo`, or the reason why not; decoding and reduced decoding must agree."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels, result = result_of(lambda: DecodeSpec((255, 255, 255), LIMIT).read(source))
        reduced, same = result_of(lambda: DecodeSpec((255, 255, 255), LIMIT).read(source, min_short_side=16))
    assert same == result
    assert result == result.strip()
    assert "\n" not in result
    assert 0 < len(result) < 100
    if isinstance(pixels, np.ndarray) and isinstance(reduced, np.ndarray):
        assert pixels.dtype == np.uint8
        assert pixels.ndim == 3
        assert pixels.shape[2] == 3
        assert pixels.size > 0
        assert max(reduced.shape) <= max(pixels.shape)
    else:
        assert result != "photo"
    return result


@pytest.mark.parametrize("name", [name for name, _ in CASES])
def test_a_file_is_a_photo_or_one_error(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    data = dict(CASES)[name]
    result = outcome(data)
    spoken = capfd.readouterr()
    if not name.startswith("jpeg-in-tiff"):  # libtiff's own JPEG reader speaks, and listens to nobody
        assert (spoken.out, spoken.err) == ("", "")
    if "cut at" in name or name in {"nothing", "noise", "zeros", "text", "postscript"} or "claims" in name:
        assert result != "photo"


def test_pillow_prints_nothing_where_nobody_set_up_logging(tmp_path: Path) -> None:
    data = bytearray(make("TIFF"))
    samples = data.index(b"\x15\x01\x03\x00")  # the tag SamplesPerPixel, a short
    data[samples + 8 : samples + 10] = (16387).to_bytes(2, "little")
    (tmp_path / "photo.tif").write_bytes(data)
    code = (
        "import pathlib, sys\n"
        "from fieldmark.data.decode import DecodeSpec\n"
        "from fieldmark.errors import PhotoError\n"
        "try: DecodeSpec((0, 0, 0), 10**6).read(pathlib.Path(sys.argv[1]))\n"
        "except PhotoError as error: print(error)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "photo.tif")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "photo.tif" in done.stdout
    assert done.stderr == ""


def test_there_are_enough_cases_of_either_kind() -> None:
    results = [outcome(data) for _, data in CASES]
    assert len(CASES) >= 250
    assert results.count("photo") >= 80
    assert len(results) - results.count("photo") >= 120


NAMES = [
    "a photo.jpg",
    "Ünïcödé 鳥 🐦.jpg",
    "e\u0301 decomposed.jpg",
    'quote".jpg',
    "quote'.jpg",
    "new\nline.jpg",
    "tab\t.jpg",
    "-leading-dash.jpg",
    "--set x=y.jpg",
    ".hidden.jpg",
    "no extension",
    "two..dots..jpg",
    "UPPER.JPG",
    "100%.jpg",
    "{braces}.jpg",
    "[brackets]*.jpg",
    "$HOME `id`.jpg",
    "back\\slash.jpg",
    "rtl \u202egpj.jpg",
    "x" * 251 + ".jpg",
    os.fsdecode(b"not utf-8 \xff\xfe.jpg"),
]


@pytest.mark.parametrize("name", NAMES)
def test_any_name_that_the_system_allows_is_read(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(make("JPEG"))
    assert outcome(path) == "photo"
    path.write_bytes(b"broken")
    with pytest.raises(PhotoError) as caught:
        DecodeSpec((0, 0, 0), LIMIT).read(path)
    assert caught.value.path == str(path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("extension", [".jpg", ".png", ".txt", ".tiff", ""])
def test_the_content_counts_and_not_the_extension(kind: str, extension: str, tmp_path: Path) -> None:
    path = tmp_path / f"photo{extension}"
    path.write_bytes(make(kind))
    assert outcome(path) == "photo"


def test_names_that_no_system_allows_are_errors_too(tmp_path: Path) -> None:
    for name in ("x" * 300, "nul\0.jpg", "folder/" * 2000 + "x.jpg"):
        with pytest.raises(PhotoError) as caught:
            DecodeSpec((0, 0, 0), LIMIT).read(tmp_path / name)
        assert caught.value.reason.startswith("cannot be read")


def test_links_and_devices(tmp_path: Path) -> None:
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(make("JPEG"))
    (tmp_path / "link.jpg").symlink_to(photo)
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "gone.jpg")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    assert outcome(tmp_path / "link.jpg") == "photo"
    assert outcome(tmp_path / "dangling.jpg") == "has vanished"
    assert outcome(tmp_path / "loop.jpg").startswith("cannot be read")
    assert outcome(Path(os.devnull)) == "is empty (0 bytes)"


def odd_tags(count: int) -> bytes:
    """A TIFF of 8 x 8 black pixels with tags that libtiff complains about, a line for each."""
    pixels = zlib.compress(bytes(64))
    start = 8 + 2 + 12 * (8 + count) + 4
    plain = [(256, 3, 8), (257, 3, 8), (258, 3, 8), (259, 3, 8), (262, 3, 1), (273, 4, start), (278, 3, 8)]
    tags = [struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in (*plain, (279, 4, len(pixels)))]
    tags += [struct.pack("<HHII", 1000 + number, 16, 1, start) for number in range(count)]
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(tags) + bytes(4) + pixels


def test_libtiff_writes_nothing_on_its_own(capfd):
    pixels = DecodeSpec((0, 0, 0), LIMIT).read(odd_tags(50))
    assert pixels.shape == (8, 8, 3)
    assert capfd.readouterr().err == ""


def icon(content: bytes) -> bytes:
    return b"\0\0\1\0\1\0" + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(content), 22) + content


@pytest.mark.parametrize(
    "content",
    [png(13000, 13000, 8, 2, bytes(100)), struct.pack("<IiiHHIIIIII", 40, 13000, 26000, 1, 8, 1, 0, 0, 0, 0, 0)],
)
def test_what_lies_in_an_icon_is_held_to_the_limit_before_it_is_decoded(content):
    with pytest.raises(PhotoError, match=r"has \d+ pixels, more than the limit 10000000"):
        DecodeSpec((0, 0, 0), LIMIT).read(icon(content))


def test_a_small_file_cannot_become_a_large_picture():
    with pytest.raises(PhotoError, match="has 169000000 pixels in 172 bytes, which no photo has"):
        DecodeSpec((0, 0, 0), 200_000_000).read(png(13000, 13000, 8, 2, bytes(100)).ljust(172, b"\0"))
    assert DecodeSpec((0, 0, 0), 49_000_000).read(png(7000, 7000, 1, 0, bytes(7000 * 876))).shape[0] == 7000


def test_the_users_limit_holds_for_every_format(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow's own limit is twice this
    for kind in KINDS:
        assert DecodeSpec((0, 0, 0), 3072).read(make(kind)).shape == (48, 64, 3)
        with pytest.raises(PhotoError, match="has 3072 pixels, more than the limit 3071"):
            DecodeSpec((0, 0, 0), 3071).read(make(kind))


def test_heic_is_read_upright_where_its_package_is_installed_and_else_names_it(monkeypatch):
    pytest.importorskip("pillow_heif").register_heif_opener()
    exif = Image.Exif()
    exif[0x0112] = 6  # does not count: HEIC says its orientation itself
    smooth = Image.fromarray(NOISE[:4, :4, 0]).convert("RGB").resize((64, 48), Image.Resampling.BICUBIC)
    data = make("HEIF", smooth, exif=exif, quality=95)
    pixels = DecodeSpec((0, 0, 0), LIMIT).read(data)
    assert pixels.shape == (48, 64, 3)
    expected = np.asarray(smooth).astype(int)
    assert np.abs(pixels - expected).mean() < 4
    with pytest.raises(PhotoError, match=r"is truncated|is corrupt"):
        DecodeSpec((0, 0, 0), LIMIT).read(data[: len(data) // 2])
    monkeypatch.setattr(decode_module, "_register_heif", lambda: False)
    monkeypatch.delitem(Image.OPEN, "HEIF")
    with pytest.raises(PhotoError, match=r"is HEIC, which needs a package: pip install 'fieldmark\[heic\]'"):
        DecodeSpec((0, 0, 0), LIMIT).read(data)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (make("TIFF", tiffinfo={254: 1, 330: 8}), "is a camera's raw file"),
        (make("TIFF", tiffinfo={50706: b"\1\4\0\0"}), "is a camera's raw file"),
        (b"\0\0\0\x18ftypcrx " + bytes(500), "is a camera's raw file"),
        (b"\xff\x0a" + bytes(500), "is JPEG XL, which cannot be read: convert it"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(500), "is JPEG XL"),
        (b"PK\3\4" + bytes(500), "is a ZIP archive, not an image"),
        (b"%PDF-1.7" + bytes(500), "is a PDF, not an image"),
    ],
)
def test_what_looks_like_a_photo_and_cannot_be_read_says_what_it_is(data, expected):
    with pytest.raises(PhotoError, match=expected):
        DecodeSpec((0, 0, 0), LIMIT).read(data)


def test_a_raw_file_is_never_taken_for_its_thumbnail(tmp_path):
    (tmp_path / "a.NEF").write_bytes(make("TIFF"))
    with pytest.raises(PhotoError, match="is a camera's raw file"):
        DecodeSpec((0, 0, 0), LIMIT).read(tmp_path / "a.NEF")
