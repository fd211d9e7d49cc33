"""Every mode in every format that the installed Pillow writes: `check`, `predict`, and pixels against formulas.

The reference is written out here for each mode, from the numbers that the file holds; nothing of it is the decoder's.
"""

from __future__ import annotations

import colorsys
import csv
import io
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fieldmark.data.decode import DecodeSpec
from fieldmark.data.folders import photo_extensions
from fieldmark.errors import PhotoError
from fieldmark.inference.predictor import Predictor

BACKGROUND = (255, 255, 255)
MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "I", "F",
         "I;16", "I;16B", "I;16L")  # fmt: skip
NOT_READ = {
    "EPS": "a drawing",
    "PDF": "is a PDF",
    "PALM": "is not an image",
    ("ICNS", "P"): "is corrupt",  # Pillow opens it without the palette
}
"""Formats that Pillow writes and nothing here reads as a photo, with words of the reason."""


def picture() -> Image.Image:
    """48 x 40, without symmetry, each channel its own, smooth enough for lossy formats."""
    y, x = np.mgrid[0:40, 0:48]
    waves = [np.sin(x / a + channel) * np.cos(y / b) for channel, (a, b) in enumerate(((5, 9), (9, 4), (7, 6)))]
    return Image.fromarray(((np.stack(waves, axis=-1) + 1) * 127.5).astype(np.uint8))


def in_mode(mode: str) -> Image.Image:
    base = picture()
    ramp = np.asarray(base.convert("L")).astype(np.float64)
    alpha = Image.fromarray(np.tile(np.linspace(0, 255, 48).astype(np.uint8), (40, 1)))
    if mode == "LAB":
        return Image.merge("LAB", [Image.fromarray(band) for band in _bands_of_lab(ramp)])
    if mode.startswith("I;16"):
        return Image.fromarray((ramp * 257).astype(">u2" if mode.endswith("B") else "<u2"))
    if mode == "I":
        return Image.fromarray((ramp * 200).astype(np.int32))
    if mode == "F":
        return Image.fromarray((ramp / 255).astype(np.float32))
    if mode in ("RGBA", "RGBa", "LA", "La"):
        whole = base.convert("RGBA" if mode.startswith("RGB") else "LA")
        whole.putalpha(alpha)
        return whole.convert(mode) if mode.endswith("a") else whole
    if mode == "PA":
        return Image.merge("LA", [base.convert("P").point(lambda value: value, "L"), alpha]).convert("PA")
    return base.convert(mode)


def _bands_of_lab(ramp: np.ndarray) -> list[np.ndarray]:
    return [band.astype(np.uint8) for band in (ramp, 128 + (ramp - 128) / 8, 128 - (ramp - 128) / 8)]


def files() -> dict[tuple[str, str], bytes]:
    """Content by format and mode, of all that can be written."""
    Image.init()
    made: dict[tuple[str, str], bytes] = {}
    for kind in sorted(Image.SAVE):
        for mode in MODES:
            file = io.BytesIO()
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    in_mode(mode).save(file, kind)
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SystemError):
                continue  # the format does not have the mode, or needs another program to write it
            made[kind, mode] = file.getvalue()
    return made


FILES = files()


def over_background(color: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha.astype(np.float64)[..., None] / 255
    return color * share + np.array(BACKGROUND) * (1 - share)


def palette(image: Image.Image) -> np.ndarray:
    values = np.asarray(image)
    if image.mode == "PA":
        table = np.asarray(image.getpalette("RGB")).reshape(-1, 3)
        return over_background(table[values[..., 0]].astype(np.float64), values[..., 1])
    table = np.asarray(image.getpalette("RGBA")).reshape(-1, 4)
    entries, given = table[values], image.info.get("transparency")
    alpha = entries[..., 3]
    if isinstance(given, int):
        alpha = np.where(values == given, 0, 255)
    elif isinstance(given, bytes):
        alpha = np.frombuffer(given.ljust(256, b"\xff"), np.uint8)[values]
    return over_background(entries[..., :3].astype(np.float64), alpha)


def ycbcr(values: np.ndarray) -> np.ndarray:
    y, blue, red = values[..., 0], values[..., 1] - 128, values[..., 2] - 128
    mixed = np.stack([y + 1.402 * red, y - 0.344136 * blue - 0.714136 * red, y + 1.772 * blue], axis=-1)
    return mixed.clip(0, 255)


def hsv(values: np.ndarray) -> np.ndarray:
    rows = [colorsys.hsv_to_rgb(*(value / 255)) for value in values.reshape(-1, 3)]
    return np.array(rows).reshape(values.shape) * 255


def gray(values: np.ndarray, top: float) -> np.ndarray:
    return np.repeat((values * 255 / top)[..., None], 3, axis=2)


def by_range(values: np.ndarray, image: Image.Image) -> np.ndarray:
    if image.format == "PPM" and image.mode == "I":
        return gray(values, 65535)
    tops = (1, 255, 65535) if image.mode == "F" else (255, 65535)
    return gray(values, next(top for top in tops if values.max() <= top))


WHITE = np.array(BACKGROUND)
FORMULAS = {  # mode: pixels from the numbers of the file, and how far rounding may take a decoder from it
    "1": (lambda v: gray(v, 1), 0),
    "L": (lambda v: gray(v, 255), 0),
    "RGB": (lambda v: v, 0),
    "RGBX": (lambda v: v[..., :3], 0),
    "LA": (lambda v: over_background(v[..., :1].repeat(3, axis=2), v[..., 1]), 1.01),
    "RGBA": (lambda v: over_background(v[..., :3], v[..., 3]), 1.01),
    "La": (lambda v: v[..., :1].repeat(3, axis=2) + WHITE * (1 - v[..., 1:] / 255), 2),  # premultiplied
    "RGBa": (lambda v: v[..., :3] + WHITE * (1 - v[..., 3:] / 255), 2),
    "CMYK": (lambda v: (255 - v[..., :3]) * (255 - v[..., 3:]) / 255, 1),
    "YCbCr": (ycbcr, 1.5),
    "HSV": (hsv, 4),
    "LAB": (lambda v: lab_to_srgb(v), 5),
}


def reference(image: Image.Image) -> tuple[np.ndarray, float]:
    """(H, W, 3) of an open image by the formula for its mode, and its tolerance."""
    image.load()
    if image.mode in ("P", "PA"):
        return palette(image), 1.01
    values = np.asarray(image).astype(np.float64)
    if image.mode in FORMULAS:
        formula, tolerance = FORMULAS[image.mode]
        return formula(values), tolerance
    return (gray(values, 65535) if image.mode.startswith("I;16") else by_range(values, image)), 0.5


def lab_to_srgb(stored: np.ndarray) -> np.ndarray:
    """CIE L*a*b* at D50 to sRGB at D65 with Bradford's adaptation (ICC.1:2022, annex E; IEC 61966-2-1)."""
    lightness = stored[..., 0] / 255 * 100
    a, b = (stored[..., band].astype(np.uint8).astype(np.int8).astype(np.float64) for band in (1, 2))
    y = (lightness + 16) / 116
    parts = np.stack([y + a / 500, y, y - b / 200], axis=-1)
    xyz = np.where(parts > 6 / 29, parts**3, 3 * (6 / 29) ** 2 * (parts - 4 / 29)) * np.array([0.9642, 1, 0.8249])
    matrix = np.array(
        [[3.1338561, -1.6168667, -0.4906146], [-0.9787684, 1.9161415, 0.0334540], [0.0719453, -0.2289914, 1.4052427]]
    )
    linear = (xyz @ matrix.T).clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def reason_of(kind: str, mode: str) -> str:
    return NOT_READ.get(kind) or NOT_READ.get((kind, mode), "")


def test_enough_is_written_to_say_something():
    assert len({kind for kind, _ in FILES}) >= 22
    assert len(FILES) >= 90
    assert {mode for _, mode in FILES} >= set(MODES) - {"La", "RGBa", "RGBX", "HSV", "PA", "I;16L"}


@pytest.mark.parametrize(("kind", "mode"), [pair for pair in FILES if not reason_of(*pair)])
def test_the_pixels_are_those_of_the_formula(kind, mode):
    data = FILES[kind, mode]
    pixels = DecodeSpec(BACKGROUND, 10**7).read(data)
    expected, tolerance = reference(Image.open(io.BytesIO(data)))
    assert pixels.shape == expected.shape
    assert np.abs(pixels - expected).max() <= tolerance


@pytest.mark.parametrize(("kind", "mode"), [pair for pair in FILES if reason_of(*pair)])
def test_what_is_no_photo_says_so(kind, mode):
    with pytest.raises(PhotoError) as told:
        DecodeSpec(BACKGROUND, 10**7).read(FILES[kind, mode])
    assert reason_of(kind, mode) in told.value.reason


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """All of them as a data set of two classes, by their usual endings where those are of photos."""
    root = tmp_path_factory.mktemp("formats") / "photos"
    endings: dict[str, str] = {}
    for ending, kind in Image.EXTENSION.items():
        if ending in photo_extensions():
            endings.setdefault(kind, ending)
    for number, ((kind, mode), data) in enumerate(FILES.items()):
        path = root / "ab"[number % 2] / f"{kind} {mode.replace(';', '_')}{endings.get(kind, '.png')}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def test_check_names_just_those_that_are_no_photos(folder, session_fieldmark, session_settings):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fieldmark.runs.check.SECONDS_MEASURED", 0.05)
        found = json.loads(session_fieldmark("check", folder, "--recipe", "laptop", "--json", *session_settings()).out)
    assert found["num_photos"] == len(FILES)
    broken = {pair_of(Path(row["path"])) for row in found["broken"]}
    assert broken == {pair for pair in FILES if reason_of(*pair)}


def pair_of(path: Path) -> tuple[str, str]:
    kind, _, mode = path.stem.partition(" ")
    return kind, mode.replace("_", ";")


def test_predict_answers_each_as_it_answers_the_pixels_of_the_formula(folder, trained, session_fieldmark, tmp_path):
    out = tmp_path / "p.csv"
    done = session_fieldmark("predict", trained, folder, "--form", "long", "--out", out)
    assert "Traceback" not in done.err
    with out.open(newline="") as file:
        rows = {row["path"]: row for row in csv.DictReader(file)}
    assert len(rows) == len(FILES)
    predictor = Predictor.load(trained)
    for path in sorted(folder.rglob("*.*")):
        row = rows[path.relative_to(folder).as_posix()]
        assert bool(row["pred_label"]) == (not reason_of(*pair_of(path))), path
        if row["pred_label"]:
            expected, tolerance = reference(Image.open(io.BytesIO(path.read_bytes())))
            answer = predictor(np.rint(expected).clip(0, 255).astype(np.uint8))
            found = [float(row[f"p:{name}"]) for name in predictor.classes]
            close = 1e-5 if tolerance == 0 else 0.02
            np.testing.assert_allclose(found, answer.probabilities, atol=close, err_msg=str(path))
