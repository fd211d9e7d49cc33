"""Laws of the exported page: whole, its own server's alone, and in a real browser the answers of `predict`."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import http.server
import json
import lzma
import re
import shutil
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.export.test_export import SPEC, make_metadata, make_model, make_photos

from fieldmark.augment.reference import EvalSpec, eval_reference
from fieldmark.data.decode import DecodeSpec
from fieldmark.errors import ExportError
from fieldmark.export import export as exporting
from fieldmark.export import formats
from fieldmark.export.export import Photos, export_model
from fieldmark.inference.exported import ExportedModel
from fieldmark.inference.predictor import Prediction, Predictor
from fieldmark.inference.taxonomy import Fallback, LevelScore
from fieldmark.training.evaluate import softmax

CHROMIUM, NODE = shutil.which("chromium"), shutil.which("node")
SOURCE = Path(exporting.__file__).parent / "page"
DECODING = DecodeSpec((255, 255, 255), max_pixels=100_000_000)


@pytest.fixture(scope="module")
def _exported_once(tmp_path_factory):
    """One call of torch's exporter, which takes seconds, for all exports of the model."""
    plain = tmp_path_factory.mktemp("plain") / "model.onnx"
    formats.write_onnx(make_model(), plain, size=SPEC.size, metadata="{}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "write_onnx", lambda _, path, **__: shutil.copyfile(plain, path))
        yield


@pytest.fixture(scope="module")
def page(_exported_once, tmp_path_factory) -> Path:
    model = make_model()
    folder = tmp_path_factory.mktemp("web") / "out"
    export_model(
        model, make_metadata("web"), folder, photos=make_photos(model)[0], is_int8=False, max_accuracy_loss=0.05
    )
    return folder


def test_the_folder_holds_the_page_the_model_and_the_runtime_with_its_license(page):
    content = json.loads((page / "fieldmark.json").read_text())
    assert (content["kind"], content["precision"], content["file"]) == ("web", "float16", "model.onnx")
    assert len(content["evidence"]["browser"]["logits"]) == 3
    assert content["digests"] == {"model.onnx": hashlib.sha256((page / "model.onnx").read_bytes()).hexdigest()}
    html = (page / "index.html").read_text()
    named = re.findall(r'(?:src|href)="(static/[^"]+)"', html)
    scripts = [text.read_text() for text in (page / "static").glob("*.js")]
    named += [f"static/{name}" for script in scripts for name in re.findall(r'from "\./([^"]+)"', script)]
    named += [f"static/runtime/{name}{end}" for name in ("wasm", "webgpu") for end in (".js", "-loader.js", ".bin")]
    named += [f"static/runtime/{name}" for name in ("LICENSE", "NOTICE", "THIRD-PARTY-NOTICES.txt")]
    assert [name for name in {*named, "static/worker.js"} if not (page / name).is_file()] == []
    assert named.index("static/local.js") < named.index("static/app.js")
    assert {file.stat().st_mode & 0o444 for file in page.rglob("*")} == {0o444}


def test_the_page_names_no_other_host_and_its_policy_allows_none(page):
    own = [page / "index.html", *(page / "static").glob("*.*")]
    found = {file.name: re.findall(r"https?://[\w.-]+", file.read_text()) for file in own}
    assert {name: hosts for name, hosts in found.items() if hosts} == {
        "icon.svg": ["http://www.w3.org"],
        "local.js": ["http://localhost"],
    }
    assert "default-src 'self'" in (page / "index.html").read_text()


def test_the_runtime_is_what_its_notice_says():
    rows = re.findall(r"^([0-9a-f]{64})  (\S+)  ", (SOURCE / "runtime/NOTICE").read_text(), re.MULTILINE)
    assert len(rows) == 6
    for digest, name in rows:
        file = SOURCE / "runtime" / name
        content = file.read_bytes() if file.is_file() else lzma.decompress(Path(f"{file}.xz").read_bytes())
        assert hashlib.sha256(content).hexdigest() == digest, name


def test_weights_of_16_bits_are_half_the_file_and_answer_alike_here(page, tmp_path):
    model = make_model()
    photos, images = make_photos(model)
    export_model(model, make_metadata("onnx"), tmp_path / "whole", photos=photos, is_int8=False, max_accuracy_loss=0.05)
    sizes = [(folder / "model.onnx").stat().st_size for folder in (page, tmp_path / "whole")]
    assert sizes[0] < 0.7 * sizes[1]
    expected = Predictor.load(tmp_path / "whole").probabilities(images)
    np.testing.assert_allclose(Predictor.load(page).probabilities(images), expected, atol=0.02)
    assert ExportedModel.load(page, threads=1).metadata.kind == "web"


@pytest.mark.usefixtures("_exported_once")
def test_where_16_bits_disagree_32_are_written(tmp_path, monkeypatch):
    monkeypatch.setitem(exporting.LIMITS, "float16", 0.0)
    model = make_model()
    photos = make_photos(model)[0]
    written = export_model(
        model, make_metadata("web"), tmp_path / "out", photos=photos, is_int8=False, max_accuracy_loss=0.05
    )
    assert written.precision == "float32"
    monkeypatch.setitem(exporting.LIMITS, "float32", -1.0)
    with pytest.raises(ExportError, match="disagrees"):
        export_model(model, make_metadata("web"), tmp_path / "no", photos=photos, is_int8=False, max_accuracy_loss=0.05)
    assert not (tmp_path / "no").exists()


def run_node(folder: Path, script: str) -> None:
    (folder / "package.json").write_text('{"type": "module"}')
    (folder / "test.js").write_text(script)
    done = subprocess.run([NODE, "test.js"], cwd=folder, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def scripts(tmp_path) -> Path:
    if NODE is None:
        pytest.skip("no node")
    for file in SOURCE.glob("*.js"):
        shutil.copy(file, tmp_path)
    return tmp_path


def test_the_page_makes_the_same_picture_to_the_last_bit(scripts):
    rng = np.random.default_rng(0)
    shapes = [(1, 1), (7, 300), (64, 64), (97, 33), (200, 301), (301, 200), (480, 640), (1, 50), (1500, 900)]
    shapes += [tuple(rng.integers(1, 400, 2).tolist()) for _ in range(40)]
    specs = [
        SPEC,
        replace(SPEC, interpolation="bilinear", crop_fraction=0.9),
        replace(SPEC, transform="squash", size=48),
        EvalSpec("weights", 35, 1.0, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
    cases = []
    for number, (height, width) in enumerate(shapes):
        photo = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        rgba = np.dstack([photo, np.full((height, width), 255, np.uint8)])
        (scripts / f"{number}.rgba").write_bytes(rgba.tobytes())
        for place, spec in enumerate(specs):
            (scripts / f"{number}-{place}.want").write_bytes(eval_reference(photo, spec).numpy().tobytes())
            about = {key: getattr(spec, key) for key in EvalSpec.__slots__}
            cases.append({"name": f"{number}", "place": place, "width": width, "height": height, "spec": about})
    run_node(
        scripts,
        f"""import {{ readFileSync }} from "node:fs";
        import {{ makePicture }} from "./picture.js";
        for (const {{ name, place, width, height, spec }} of {json.dumps(cases)}) {{
          const rgba = readFileSync(`${{name}}.rgba`);
          const read = (top, rows) => rgba.subarray(top * width * 4, (top + rows) * width * 4);
          const found = Buffer.from(makePicture(read, width, height, spec).buffer);
          const isSame = found.equals(readFileSync(`${{name}}-${{place}}.want`));
          if (!isSame) throw new Error(`${{height}} x ${{width}} ${{JSON.stringify(spec)}}`);
        }}""",
    )


def test_the_page_says_what_a_prediction_says(scripts):
    classes = ("auk", "bee", "_none", "crow")
    rows = (("auk", "bird"), ("bee", "insect"), ("_none", "_none"), ("crow", "bird"))
    scores = tuple(LevelScore(level, 0.5, 0.9) for level in ("class", "kind"))
    fallback = Fallback(("class", "kind"), rows, (0.6, 0.8), scores)
    logits = np.random.default_rng(1).normal(0, 2, (200, 4)).astype(np.float32)
    for back_off in (None, fallback):
        metadata = replace(make_metadata("web"), classes=classes, threshold=0.6, back_off=back_off)
        wanted = []
        for row in logits:
            probabilities = softmax(row[None], temperature=metadata.temperature)[0]
            said = Prediction("", classes, probabilities, "", metadata.threshold, back_off)
            group = said.answer if said.is_unknown and said.answer.level else None
            top = [name for name, _ in said.top(3)]
            wanted.append([said.is_unknown, None if said.is_unknown else said.label, top, group and group.name])
        run_node(
            scripts,
            f"""import assert from "node:assert";
            import {{ describe, findProbabilities }} from "./answers.js";
            const about = {metadata.to_json()};
            const rows = {json.dumps(logits.tolist())};
            const said = rows.map((row) => {{
              const {{ is_unknown, label, top, group }} = describe(findProbabilities(row, about.temperature), about, 3);
              return [is_unknown, label, top.map((one) => one.label), group && group.name];
            }});
            assert.deepStrictEqual(said, {json.dumps(wanted)});""",
        )


@contextlib.contextmanager
def serve_folder(folder, headers=()):
    """The URL of a plain server of files while the block runs."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def end_headers(self):
            for name, value in headers:
                self.send_header(name, value)
            super().end_headers()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


def wait_until(page, said):
    for _ in range(1200):
        if page.evaluate(said):
            return
        time.sleep(0.1)
    raise AssertionError(page.inner_text("body"))


def ask_page(browser, url, files, *, is_patient=True):
    """What the page says of each file, by the name of the file; it may ask no other host and log no error.

    Who is not patient gives the photos before the model is there.
    """
    page = browser.new_page()
    problems, requests = [], []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(url)
    if is_patient:
        page.get_by_text("s here.").wait_for(timeout=120_000)
    page.set_input_files("#files", [str(file) for file in files])
    wait_until(
        page, f"results.children.length === {len(files)} && [...results.children].every((c) => c.answer || c.reason)"
    )
    rows = page.evaluate("[...results.children].map((c) => [c.file.name, c.answer, c.reason])")
    assert problems == []
    assert all(request.startswith((url.split("?")[0], "blob:")) for request in requests)
    about = page.inner_text("#about"), page.inner_text("#privacy")
    page.close()
    return {name: answer or reason for name, answer, reason in rows}, *about


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no browser")
    from playwright import sync_api

    with sync_api.sync_playwright() as playwright:
        # Without a graphics card, Chromium computes what is asked of WebGPU by itself.
        arguments = ["--no-sandbox", "--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader"]
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=[*arguments, "--enable-features=Vulkan"], timeout=120_000
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def odd_photos(tmp_path_factory) -> list[Path]:
    """Turned by EXIF, transparent, gray, of a palette, large."""
    folder = tmp_path_factory.mktemp("photos")
    noise = np.random.default_rng(0).integers(0, 256, (30, 45, 3), dtype=np.uint8)
    photo = Image.fromarray(noise).resize((450, 300), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(folder / "turned.jpg", exif=exif, quality=95)
    photo.save(folder / "plain.webp", lossless=True)
    photo.convert("L").save(folder / "gray.png")
    photo.convert("P").save(folder / "palette.gif")
    photo.resize((4500, 3000)).save(folder / "large.jpg", quality=90)
    alpha = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (300, 2))[:, :450])
    photo.putalpha(alpha)
    photo.save(folder / "transparent.png")
    return sorted(folder.iterdir())


@pytest.mark.slow
def test_in_a_browser_the_page_answers_as_predict(browser, page, odd_photos, tmp_path):
    (tmp_path / "text.jpg").write_text("no photo")
    (tmp_path / "empty.jpg").write_bytes(b"")
    files = [*odd_photos, tmp_path / "text.jpg", tmp_path / "empty.jpg"]
    predictor = Predictor.load(page)
    isolated = (("Cross-Origin-Opener-Policy", "same-origin"), ("Cross-Origin-Embedder-Policy", "require-corp"))
    for query, headers in (("", ()), ("?runtime=wasm", isolated), ("?runtime=webgpu", ())):
        with serve_folder(page, headers) as url:
            said, about, privacy = ask_page(browser, url + query, files, is_patient=not headers)
        assert about.startswith("Model run-1: 3 classes.")
        assert "stay on this device" in privacy
        assert said.pop("text.jpg")["problem"] == "is not an image that this browser reads"
        assert said.pop("empty.jpg")["problem"] == "is empty (0 bytes)"
        for file in odd_photos:
            _compare(predictor(file), said[file.name], most=2e-3)


def _compare(ours, theirs, most):
    wanted = dict(zip(ours.classes, ours.probabilities.tolist(), strict=True))
    found = {row["label"]: row["probability"] for row in theirs["top"]}
    assert found == pytest.approx({name: wanted[name] for name in found}, abs=most), ours.path
    assert theirs["is_unknown"] == ours.is_unknown
    assert theirs["label"] == (None if ours.is_unknown else ours.label)


@pytest.mark.slow
@pytest.mark.usefixtures("_exported_once")
@pytest.mark.parametrize(("is_int8", "most"), [(False, 1e-3), (True, 0.05)])
def test_of_a_hundred_birds_the_page_says_what_predict_says(browser, shared, tmp_path, is_int8, most):
    files = sorted((shared / "data/birds100/test").glob("*.jpg"))[:100]
    model = make_model()
    load = lambda places: np.stack([eval_reference(DECODING.read(files[n]), SPEC).numpy() for n in places])  # noqa: E731
    with torch.inference_mode():
        labels = model(torch.from_numpy(load(range(100)))).argmax(dim=1).numpy()
    photos = Photos(labels=labels, load=load)
    export_model(model, make_metadata("web"), tmp_path / "page", photos=photos, is_int8=is_int8, max_accuracy_loss=0.5)
    with serve_folder(tmp_path / "page") as url:
        said, *_ = ask_page(browser, url, files)
    assert len(said) == 100
    for ours in Predictor.load(tmp_path / "page").predict(files):
        _compare(ours, said[Path(ours.path).name], most)
