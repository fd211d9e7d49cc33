from __future__ import annotations

import io
import subprocess
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps

from fieldmark.data.decode import DecodeSpec
from fieldmark.errors import PhotoError

WHITE = (255, 255, 255)
LIMIT = 178_956_970
RNG = np.random.default_rng(7)
# Smooth, so that JPEG keeps it; without symmetry, so that every orientation is another picture.
PICTURE = cv2.resize(RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8), (70, 50), interpolation=cv2.INTER_CUBIC)


def make(image: Image.Image | np.ndarray, kind: str, **options: object) -> bytes:
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def rgb(source: Path | bytes, background: tuple[int, int, int] = WHITE) -> np.ndarray:
    pixels = DecodeSpec(background, LIMIT).read(source)
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3
    assert pixels.flags["C_CONTIGUOUS"]
    assert pixels.flags["WRITEABLE"]
    return pixels


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "MPO"])
def test_photos_come_upright_from_every_orientation(kind: str, orientation: int) -> None:
    options = {"quality": 95} if kind in {"JPEG", "MPO"} else {"lossless": True} if kind == "WEBP" else {}
    data = make(PICTURE, kind, exif=exif(orientation), **options)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    pixels = rgb(data)
    assert np.array_equal(pixels, expected)
    assert (pixels.shape[0] > pixels.shape[1]) == (orientation > 4)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_impossible_orientation_leaves_the_photo_as_it_is(orientation: int) -> None:
    for kind in ("JPEG", "PNG"):
        assert rgb(make(PICTURE, kind, exif=exif(orientation))).shape == PICTURE.shape


def test_a_damaged_exif_block_leaves_the_photo_as_it_is() -> None:
    data = make(PICTURE, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    assert rgb(data).shape == PICTURE.shape


def test_orientation_in_xmp_counts_where_exif_has_none() -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    data = make(PICTURE, "JPEG", xmp=xmp)
    assert np.array_equal(rgb(data), np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))))
    assert rgb(data).shape == (70, 50, 3)


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 1}, {"quality": 30}]
)
def test_jpeg_equals_pillow_to_the_bit(options: dict[str, object]) -> None:
    data = make(PICTURE, "JPEG", **options)
    assert np.array_equal(rgb(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_jpeg_in_rgb_colors_equals_pillow() -> None:
    data = make(PICTURE, "JPEG", keep_rgb=True, quality=95)
    assert np.array_equal(rgb(data), np.asarray(Image.open(io.BytesIO(data))))


def test_grey_jpeg_becomes_three_equal_channels() -> None:
    pixels = rgb(make(Image.fromarray(PICTURE).convert("L"), "JPEG", quality=95))
    assert (pixels[..., 0] == pixels[..., 1]).all()
    assert (pixels[..., 0] == pixels[..., 2]).all()


def test_cmyk_jpeg_keeps_its_colors() -> None:
    # Pillow writes CMYK inverted with Adobe's marker, as Photoshop does: misread, the picture would be a negative.
    data = make(Image.fromarray(PICTURE).convert("CMYK"), "JPEG", quality=100)
    assert np.abs(rgb(data).astype(int) - PICTURE).mean() < 3
    assert np.array_equal(rgb(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_ycck_jpeg_keeps_its_colors() -> None:
    # The Adobe marker's last byte names the color transform: 2 is YCCK. Y, Cb, Cr of the inverted colors are coded
    # as they are in a YCCK file, so only the marker changes.
    cmy = 255 - PICTURE
    ycc = np.asarray(Image.fromarray(cmy).convert("YCbCr"))
    planes = np.dstack([255 - ycc, np.zeros(ycc.shape[:2], np.uint8)])
    data = bytearray(make(Image.frombytes("CMYK", (70, 50), planes.tobytes()), "JPEG", quality=100))
    adobe = data.index(b"Adobe")
    assert data[adobe + 11] == 0
    data[adobe + 11] = 2
    assert np.abs(rgb(bytes(data)).astype(int) - PICTURE).mean() < 4


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_and_not_clipped(kind: str) -> None:
    ramp = np.linspace(0, 65535, 70 * 50).astype(np.uint16).reshape(50, 70)
    pixels = rgb(make(ramp, kind))
    assert np.abs(pixels[..., 1] - ramp / 257.0).max() <= 0.5


def test_big_endian_16_bit_grey_reads_alike() -> None:
    ramp = np.linspace(0, 65535, 12).astype(">u2").reshape(3, 4)
    entries = [
        (256, 4, 4),
        (257, 4, 3),
        (258, 3, 16),
        (259, 3, 1),
        (262, 3, 1),
        (273, 4, 0),
        (277, 3, 1),
        (278, 4, 3),
        (279, 4, 24),
    ]
    head = b"MM\0*" + (8).to_bytes(4, "big") + len(entries).to_bytes(2, "big")
    start = len(head) + 12 * len(entries) + 4
    for tag, kind, value in entries:
        value = start if tag == 273 else value
        cell = value.to_bytes(4, "big") if kind == 4 else value.to_bytes(2, "big") + b"\0\0"
        head += tag.to_bytes(2, "big") + kind.to_bytes(2, "big") + (1).to_bytes(4, "big") + cell
    pixels = rgb(head + b"\0\0\0\0" + ramp.tobytes())
    assert np.abs(pixels[..., 0] - ramp / 257.0).max() <= 0.5


def test_16_bit_color_png_is_scaled() -> None:
    deep = PICTURE.astype(np.uint16) * 257
    data = cv2.imencode(".png", deep[..., ::-1])[1].tobytes()
    assert np.array_equal(rgb(data), PICTURE)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.25, 1.0], [0, 64, 255]),
        ([0.0, 64.0, 200.0], [0, 64, 200]),
        ([0.0, 257.0, 65535.0], [0, 1, 255]),
        ([-10.0, 0.0, 10.0], [0, 128, 255]),
        ([0.0, float("nan"), 1.0], [0, 0, 255]),
        ([5e9, 5e9, 5e9], [0, 0, 0]),
    ],
)
def test_float_grey_is_scaled_by_its_range(values: list[float], expected: list[int]) -> None:
    data = make(np.array([values], dtype=np.float32), "TIFF")
    assert rgb(data)[0, :, 2].tolist() == expected


def test_float_grey_of_a_portable_map_is_scaled_too() -> None:
    """PFM holds 0 to 1; it was read as 16 bits of 65535, so black."""
    assert rgb(make(np.array([[0.0, 0.25, 1.0]], np.float32), "PPM"))[0, :, 0].tolist() == [0, 64, 255]


def test_32_bit_grey_is_scaled_by_its_range() -> None:
    assert rgb(make(np.array([[0, 100, 255]], np.int32), "TIFF"))[0, :, 0].tolist() == [0, 100, 255]
    assert rgb(make(np.array([[0, 25700, 65535]], np.int32), "TIFF"))[0, :, 0].tolist() == [0, 100, 255]
    assert rgb(make(np.array([[-1000, 0, 1000]], np.int32), "TIFF"))[0, :, 0].tolist() == [0, 128, 255]


def test_1_bit_becomes_black_and_white() -> None:
    image = Image.fromarray(np.array([[0, 255], [255, 0]], np.uint8)).convert("1")
    for kind in ("PNG", "TIFF", "BMP"):
        assert rgb(make(image, kind))[..., 0].tolist() == [[0, 255], [255, 0]]


@pytest.mark.parametrize("background", [(255, 255, 255), (10, 200, 30)])
def test_transparency_lies_over_the_background(background: tuple[int, int, int]) -> None:
    alpha = np.zeros((50, 70, 1), np.uint8)
    alpha[:, 20:40] = 255
    alpha[:, 40:] = 128
    data = make(np.dstack([PICTURE, alpha]), "PNG")
    weight = alpha / 255
    expected = PICTURE * weight + np.array(background) * (1 - weight)
    assert np.abs(rgb(data, background) - expected).max() <= 1.01


def test_grey_with_alpha_lies_over_the_background() -> None:
    image = Image.merge("LA", [Image.new("L", (2, 1), 80), Image.frombytes("L", (2, 1), b"\x00\xff")])
    assert rgb(make(image, "PNG"), (1, 2, 3))[0].tolist() == [[1, 2, 3], [80, 80, 80]]


def test_palette_with_a_transparent_color_lies_over_the_background() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([200, 0, 0, 0, 0, 200])
    image.putpixel((1, 0), 1)
    for kind in ("PNG", "GIF"):
        pixels = rgb(make(image, kind, transparency=1), (9, 8, 7))
        assert pixels[0].tolist() == [[200, 0, 0], [9, 8, 7]]
        assert rgb(make(image, kind))[0].tolist() == [[200, 0, 0], [0, 0, 200]]


def test_of_an_animation_the_first_frame_counts() -> None:
    first, second = Image.new("RGB", (8, 8), (250, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 250))
    for kind in ("GIF", "PNG", "WEBP"):
        data = make(first, kind, save_all=True, append_images=[second], duration=50)
        assert rgb(data)[0, 0, 0] > 240, kind
        assert rgb(data)[0, 0, 2] < 10, kind


def test_lab_becomes_rgb() -> None:
    image = Image.merge("LAB", [Image.new("L", (1, 1), value) for value in (255, 128, 128)])
    assert rgb(make(image, "TIFF")).min() > 250


def reduced(data: bytes, short_side: int) -> np.ndarray:
    return DecodeSpec(WHITE, LIMIT).read(data, min_short_side=short_side)


@given(width=st.integers(1, 300), height=st.integers(1, 300), short_side=st.integers(1, 320), turned=st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_reduced_photo_is_no_smaller_than_asked(width: int, height: int, short_side: int, turned: bool) -> None:
    data = make(np.full((height, width, 3), 99, np.uint8), "JPEG", exif=exif(6 if turned else 1))
    pixels = reduced(data, short_side)
    whole = (width, height) if turned else (height, width)
    factor = next(f for f in (8, 4, 2, 1) if f == 1 or min(width, height) // f >= short_side)
    assert min(pixels.shape[:2]) >= min(short_side, width, height)
    assert pixels.shape[:2] == tuple(-(-side // factor) for side in whole)


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_the_reduction_stops_exactly_where_it_must(factor: int) -> None:
    data = make(np.full((160, 200, 3), 99, np.uint8), "JPEG")
    assert reduced(data, 160 // factor).shape == (160 // factor, 200 // factor, 3)
    assert reduced(data, 160 // factor + 1).shape == (320 // factor, 400 // factor, 3)


def test_a_reduced_photo_looks_like_the_whole_one() -> None:
    picture = cv2.resize(PICTURE, (640, 480), interpolation=cv2.INTER_CUBIC)
    reference = cv2.resize(picture, (160, 120), interpolation=cv2.INTER_AREA)
    assert np.abs(reduced(make(picture, "JPEG"), 120).astype(int) - reference).mean() < 3


def test_other_formats_come_whole() -> None:
    assert np.array_equal(reduced(make(PICTURE, "PNG"), 5), PICTURE)


def problem_of(source: Path | bytes, limit: int = LIMIT) -> str:
    with pytest.raises(PhotoError) as caught:
        DecodeSpec(WHITE, limit).read(source)
    assert caught.value.path == (str(source) if isinstance(source, Path) else "<bytes>")
    return caught.value.reason


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 1}])
def test_a_jpeg_cut_anywhere_is_refused(options: dict[str, object]) -> None:
    data = make(cv2.resize(PICTURE, (140, 100)), "JPEG", quality=90, **options)
    for length in range(2, len(data) - 2, 29):
        assert problem_of(data[:length]) in {"is truncated", "is corrupt", "is not an image"}, length


def test_a_jpeg_cut_in_its_scan_and_closed_again_is_refused() -> None:
    data = make(cv2.resize(PICTURE, (140, 100)), "JPEG", quality=90)
    scan = data.index(b"\xff\xda") + 14
    for length in range(scan, int(len(data) * 0.95), 53):
        assert problem_of(data[:length] + b"\xff\xd9") == "is truncated", length


def test_a_jpeg_with_harmless_bytes_before_its_end_is_accepted() -> None:
    data = make(PICTURE, "JPEG")
    padded = data[:-2] + b"\0\0\0" + data[-2:]
    assert np.array_equal(rgb(padded), rgb(data))
    assert np.array_equal(rgb(data + b"\0" * 500), rgb(data))


@pytest.mark.parametrize("kind", ["PNG", "GIF", "TIFF", "BMP", "WEBP"])
def test_other_formats_cut_short_are_refused(kind: str) -> None:
    data = make(RNG.integers(0, 256, (40, 40, 3), dtype=np.uint8), kind)
    for share in (0.1, 0.3, 0.5, 0.8):
        assert problem_of(data[: int(len(data) * share)]) in {"is truncated", "is corrupt", "is not an image"}, share


def test_reasons_are_stable(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("not a photo, but a text of some length\n" * 9)
    (tmp_path / "folder.jpg").mkdir()
    assert problem_of(tmp_path / "empty.jpg") == "is empty (0 bytes)"
    assert problem_of(b"") == "is empty (0 bytes)"
    assert problem_of(tmp_path / "text.jpg") == "is not an image"
    assert problem_of(tmp_path / "gone.jpg") == "has vanished"
    assert problem_of(tmp_path / "folder.jpg") == "is a folder"
    assert problem_of(tmp_path / ("long" * 100)) == "cannot be read: file name too long"


def test_a_file_without_permission_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> bytes:
        raise PermissionError(13, "Permission denied")

    # chmod does not stop an administrator, who runs tests in containers.
    monkeypatch.setattr(Path, "read_bytes", refuse)
    monkeypatch.setattr(Path, "open", refuse)
    assert problem_of(tmp_path / "mine.jpg") == "cannot be read: permission denied"


def test_bytes_carry_the_name_that_is_given() -> None:
    with pytest.raises(PhotoError) as caught:
        DecodeSpec(WHITE, LIMIT).decode(b"nothing", min_short_side=None, name="a/b.jpg")
    assert (caught.value.path, str(caught.value)) == ("a/b.jpg", "a/b.jpg: is not an image")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF"])
def test_photos_above_the_limit_are_refused_by_their_header(kind: str) -> None:
    data = make(PICTURE, kind)
    assert problem_of(data, limit=3499) == "has 3500 pixels, more than the limit 3499"
    DecodeSpec(WHITE, 3500).read(data)


@pytest.mark.parametrize("size", [(1, 60000), (60000, 1), (3, 3001)])
def test_a_strip_that_would_be_enlarged_to_a_bomb_is_refused(size: tuple[int, int]) -> None:
    assert (
        problem_of(make(Image.new("L", size), "PNG"))
        == f"is {size[0]} by {size[1]} pixels, a strip that no network can see"
    )
    DecodeSpec(WHITE, LIMIT).read(make(Image.new("L", (3, 3000)), "PNG"))


def png_header(side: int) -> bytes:
    """A PNG that claims to be `side` x `side` and holds one pixel."""
    data = make(Image.new("L", (1, 1)), "PNG")
    head = data[12:16] + side.to_bytes(4, "big") * 2 + data[24:29]
    return data[:12] + head + zlib.crc32(head).to_bytes(4, "big") + data[33:]


def test_a_bomb_beyond_the_limit_of_pillow_is_refused_without_a_warning() -> None:
    assert problem_of(png_header(60000)) == "has 3600000000 pixels, more than the limit 178956970"
    assert problem_of(png_header(60000), limit=10**12) == "has 3600000000 pixels in 67 bytes, which no photo has"


def test_pillow_is_left_as_it_was() -> None:
    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)
    problem_of(make(PICTURE, "PNG")[:200], limit=10**12)
    assert (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES) == before == (89478485, False)


def test_warnings_of_pillow_stay_in_but_those_of_others_do_not() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tiff = make(PICTURE, "TIFF")
        with pytest.raises(PhotoError):
            DecodeSpec(WHITE, LIMIT).read(tiff[: len(tiff) - 20])
        with pytest.raises(PhotoError):
            DecodeSpec(WHITE, LIMIT).read(png_header(10000))  # Pillow warns of this one
        warnings.warn("somebody else's", stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["somebody else's"]


def test_many_threads_decode_the_same_pictures() -> None:
    sources = [make(PICTURE, kind) for kind in ("JPEG", "PNG", "WEBP", "TIFF", "GIF")] + [
        b"broken",
        make(PICTURE, "JPEG")[:300],
    ]
    sources.append(make(Image.fromarray(PICTURE).convert("CMYK"), "JPEG"))

    def outcome(number: int) -> bytes | str:
        try:
            return DecodeSpec(WHITE, LIMIT).read(sources[number % len(sources)]).tobytes()
        except PhotoError as error:
            return error.reason

    alone = [outcome(number) for number in range(len(sources))]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(outcome, range(len(sources) * 30)))
    assert together == alone * 30


def test_importing_decode_loads_neither_torch_nor_opencv() -> None:
    code = "import sys, fieldmark.data.decode; print([m for m in ('torch', 'cv2', 'PIL.Image') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_real_photos_equal_pillow_to_the_bit(shared: Path) -> None:
    for path in sorted((shared / "data/birds100/val").glob("*/*.jpg"))[::20]:
        assert np.array_equal(rgb(path), np.asarray(Image.open(path).convert("RGB"))), path
