"""Laws of the page that trains: nothing outside its root, one training at a time, and all that is known in folders."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import sys
import time
import zipfile

import pytest
from PIL import Image
from tests.serve.conftest import make_photo
from tests.serve.test_page import CHROMIUM, run_server
from tests.serve.test_review import ask, get, post

from fieldmark.errors import DataError
from fieldmark.serve.studio import PHOTOS, RUNS, create_studio_app

TINY = ["model.name=test_resnet", "model.weights=random", "eval.size=32", "augment.size=32", "cache.mode=off",
        "loader.workers=0", "train.threads=1", "train.batch_size=8", "train.device=cpu"]  # fmt: skip

TRAINING = """#!{python}
import json, pathlib, shutil, signal, sys, time
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
shutil.copytree({run!r}, out)
def stop(*_):
    (out / "summary.json").write_text(json.dumps({{"status": "interrupted", "kept": "a head"}}))
    sys.exit(130)
signal.signal(signal.SIGTERM, stop)
(out / "plan.jsonl").write_text(json.dumps({{"at": 1, "what": "try one", "value": True}}) + "\\n")
(out / "summary.json").write_text(json.dumps({{"status": "running", "kept": "a head"}}))
time.sleep(60)
"""


@pytest.fixture
def root(tmp_path, write_photos):
    write_photos(tmp_path / "root" / "my birds", ("jay", "wren"))
    write_photos(tmp_path / "outside", ("jay", "secret"))
    (tmp_path / "root" / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "root" / "my birds" / "notes.txt").write_text("x")
    (tmp_path / "root" / ".hidden").mkdir()
    return tmp_path / "root"


@pytest.fixture
def trains(tmp_path, make_run, monkeypatch):
    """Instead of the command, a program that behaves as a training does, to the letter of its folder."""
    names = ("jay", "wren")
    photos = [f"{name}/{number}.png" for name in names for number in range(10)]
    run = make_run("model", status="running", photos=photos, classes=names, per_class=10)
    program = tmp_path / "training"
    program.write_text(TRAINING.format(python=sys.executable, run=str(run)))
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))


def make_app(root):
    return create_studio_app(root, TINY)


def wait_for(app, name, *states):
    for _ in range(400):
        [found] = ask(app, get(f"/api/describe?name={name}"))
        if found.json().get("state") in states and (found.json()["has_model"] or "queued" in states):
            return found.json()
        time.sleep(0.05)
    raise AssertionError(found.text)


def test_folders_below_the_root_are_listed_with_their_photos(root):
    home, inside = ask(make_app(root), get("/api/list_folder"), get("/api/list_folder?path=my birds"))
    assert home.json()["folders"] == [{"path": "my birds", "photos": 0}]
    assert inside.json()["folders"] == [{"path": f"my birds/{name}", "photos": 10} for name in ("jay", "wren")]
    [photo] = ask(make_app(root), get(f"/photo?path={inside.json()['samples'][0]}"))
    assert photo.headers["content-type"] == "image/jpeg"


@pytest.mark.parametrize("path", ["..", "/etc", "link", "link/jay", "my birds/../../outside", ".hidden", "a\0b"])
def test_nothing_outside_the_root_is_read_or_trained_on(root, path):
    app = make_app(root)
    path = path.replace("\0", "%00")
    answers = ask(
        app,
        get(f"/api/list_folder?path={path}"),
        get(f"/photo?path={path}/0.png"),
        post(f"/api/check?path={path}", {}),
        post(f"/api/ask?path={path}&minutes=1", {}),
    )
    assert [answer.status_code for answer in answers] == [422] * 4
    assert all("leads out of" in answer.json()["detail"] for answer in answers)
    assert not (root / RUNS).exists()


def test_a_folder_with_a_link_out_of_the_root_is_neither_checked_nor_trained_on(root, tmp_path):
    (root / "my birds" / "jay" / "more").symlink_to(tmp_path / "outside" / "secret")
    for answer in ask(
        make_app(root), post("/api/ask?path=my birds&minutes=1", {}), post("/api/check?path=my birds", {})
    ):
        assert answer.status_code == 422
        assert "leads out of" in answer.json()["detail"]


def check(app, path="my birds"):
    [answer] = ask(app, post(f"/api/check?path={path}&is_new=true", {}))
    while not answer.json()["is_done"]:
        time.sleep(0.1)
        [answer] = ask(app, post(f"/api/check?path={path}", {}))
    return answer.json()


def test_the_check_tells_classes_with_photos_and_what_is_broken(root):
    (root / "my birds" / "jay" / "torn.jpg").write_bytes(b"\xff\xd8\xff")
    shutil.copy(root / "my birds/jay/0.png", root / "my birds/wren/same.png")
    found = check(make_app(root))["found"]
    assert "'jay/0.png', 'wren/same.png'" in found["must_fix"][0]
    assert [(name, sum(counts.values())) for name, counts in found["counts"].items()] == [("jay", 11), ("wren", 11)]
    assert found["samples"]["wren"] == ["wren/0.png", "wren/1.png", "wren/2.png"]
    assert found["broken"][0]["path"] == "jay/torn.jpg"
    assert found["conflicting_labels"] == [["jay/0.png", "wren/same.png"]]


def test_one_trains_others_wait_and_another_server_finds_them(root, trains):
    app = make_app(root)
    names = [ask(app, post("/api/ask?path=my birds&minutes=2", {}))[0].json()["name"] for _ in range(3)]
    assert names == ["my-birds-1", "my-birds-2", "my-birds-3"]
    live = wait_for(app, names[0], "running")
    assert 0 < live["left"] <= 120
    assert json.loads(live["doing"][0])["what"] == "try one"
    assert live["accuracy"][1] <= live["accuracy"][0] <= live["accuracy"][2]
    assert live["examples"][0]["path"] == "my birds/jay/0.png"
    ask(app, post(f"/api/stop?name={names[1]}", {}))  # one that waits is forgotten

    another = make_app(root)
    [rows] = ask(another, get("/api/list_runs"))
    assert [(row["name"], row["state"]) for row in rows.json()] == [(names[2], "queued"), (names[0], "running")]
    ask(another, post(f"/api/stop?name={names[0]}", {}))
    assert wait_for(another, names[0], "stopped")["summary"]["kept"] == "a head"
    another.state.studio.advance()
    wait_for(app, names[2], "running")
    ask(app, post(f"/api/stop?name={names[2]}", {}))
    wait_for(app, names[2], "stopped")


def test_a_training_that_does_not_begin_says_why(root, tmp_path, monkeypatch):
    program = tmp_path / "training"
    program.write_text("#!/bin/sh\necho 'error: no weights'\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    app = make_app(root)
    [asked] = ask(app, post("/api/ask?path=my birds&minutes=2", {}))
    app.state.studio._children[0].wait()
    [row] = ask(app, get(f"/api/describe?name={asked.json()['name']}"))
    assert (row.json()["state"], row.json()["printed"]) == ("failed", ["error: no weights"])


def test_other_sites_and_names_that_lead_elsewhere_are_refused(root, tmp_path, make_run):
    app = make_app(root)
    (root / RUNS).mkdir()
    (root / RUNS / "x.json").symlink_to(tmp_path / "outside.json")
    url = "/api/ask?path=my birds&minutes=1"
    answers = ask(
        app,
        lambda client: client.post(url, json={}, headers={"origin": "http://evil.example"}),
        lambda client: client.post(url, json={}, headers={"host": "evil.example"}),
        lambda client: client.post(url, data={"a": "b"}),
        get("/api/describe?name=../my birds"),
        get("/api/describe?name=x"),
        post("/api/ask?path=my birds&minutes=0", {}),
    )
    assert [answer.status_code for answer in answers] == [403, 400, 415, 422, 422, 422]
    assert [entry.name for entry in (root / RUNS).iterdir()] == ["x.json"]


def test_a_root_that_is_no_folder_is_told(tmp_path):
    with pytest.raises(DataError, match="is not a folder: give --root"):
        make_app(tmp_path / "none")


def test_a_small_picture_is_made_of_photos_alone(root):
    Image.new("RGB", (600, 300)).save(root / "wide.png")
    app = make_app(root)
    assert ask(app, get("/photo?path=my birds/notes.txt"))[0].status_code == 422
    assert len(ask(app, get("/photo?path=wide.png&side=64"))[0].content) < 2000


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no browser")
def test_a_stranger_trains_stops_and_tries_the_model(root, tmp_path):
    from playwright import sync_api

    problems = []
    with (
        run_server(create_studio_app(root, TINY)) as url,
        sync_api.sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]) as browser,
    ):
        page = browser.new_page(viewport={"width": 390, "height": 800})
        page.set_default_timeout(60_000)
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(url)
        page.get_by_label("What the photos show").fill("robin <b>")
        page.set_input_files("#files", {"name": "a.jpg", "mimeType": "image/jpeg", "buffer": make_photo()})
        page.get_by_text("cannot be a name here").wait_for()
        page.get_by_label("What the photos show").fill("robin")
        page.set_input_files("#files", {"name": "a.jpg", "mimeType": "image/jpeg", "buffer": make_photo()})
        page.get_by_role("link", name="Go to fieldmark-photos/my photos").click()
        page.get_by_role("link", name="robin 1 photo", exact=True).wait_for()
        page.get_by_role("link", name="root").click()

        page.get_by_role("link", name="my birds").press("Enter")
        page.get_by_role("link", name="jay 10 photos").wait_for()
        page.get_by_role("link", name="Look at these photos").press("Enter")

        page.get_by_text("20 photos, 2 classes.").wait_for()
        assert page.get_by_role("img", name="A photo of jay").count() == 3
        slider = page.get_by_role("slider", name="Time")
        slider.press("Home")
        assert slider.get_attribute("aria-valuetext") == "1 minute"
        assert "a first model answers" in page.locator("#plan").inner_text()
        page.get_by_role("button", name="Train").press("Enter")

        page.get_by_role("heading", name="If it ended now").wait_for()
        assert "s left" in page.locator("#left").inner_text()
        assert "with 95\u00a0% confidence between" in page.locator("#kept").inner_text()
        page.get_by_role("figure").filter(has_text="✓").or_(
            page.get_by_role("figure").filter(has_text="✗")
        ).first.wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        page.get_by_role("button", name="Stop, and keep the best so far").click()

        page.get_by_role("heading", name="The model", exact=True).wait_for()
        page.get_by_text("1 min on my birds: stopped.").wait_for()
        with page.expect_download() as download:
            page.get_by_role("link", name="Download the folder").click()
        assert zipfile.is_zipfile(download.value.path())
        page.get_by_role("link", name="Mend labels").click()
        page.get_by_role("button", name="Drop").first.click()
        page.get_by_text("1 decided").wait_for()
        page.go_back()
        page.get_by_role("link", name="Train again").click()
        assert page.get_by_label("With the labels that were mended after my-birds-1").is_checked()
        assert (root / RUNS / "my-birds-1.corrections.csv").read_text().startswith("path,action,label")
        page.go_back()
        page.get_by_role("link", name="Try photos").click()
        page.set_input_files("#files", root / "my birds" / "jay" / "0.png")
        page.locator(".card .bars li").first.wait_for()
    # What was refused shows in the console as a failed load; nothing else may.
    assert [problem for problem in problems if "422" not in problem] == []


def add(app, path, content, *, to="garden", piece=10**6):
    offsets = range(0, max(len(content), 1), piece)
    url = f"/api/add?to={to}&path={path}&offset={{}}&is_last={{}}"
    headers = {"content-type": "application/octet-stream"}

    def call(offset):
        body, is_last = content[offset : offset + piece], offset == offsets[-1]
        return lambda client: client.post(url.format(offset, is_last), content=body, headers=headers)

    return ask(app, *map(call, offsets))[-1]


def make_zip(entries):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def found_in(root):
    return sorted(path.relative_to(root).as_posix() for path in (root / PHOTOS).rglob("*") if path.is_file())


def test_dropped_photos_and_zips_become_class_folders(root):
    app, photo, other = make_app(root), make_photo((1, 2, 3)), make_photo((3, 2, 1))
    assert add(app, "robin/a.jpg", photo).json() == {"path": f"{PHOTOS}/garden"}
    add(app, "robin/a.jpg", other)  # another photo of that name
    add(app, "robin/a.jpg", photo)  # the same again
    packed = make_zip(
        {"wren/1.jpg": photo, "wren/notes.txt": b"x", "__MACOSX/wren/1.jpg": b"x", "wren/.hidden.jpg": b"x"}
    )
    assert add(app, "birds.zip", packed, piece=100).status_code == 200
    assert [re.sub("-[0-9a-f]{8}", "", path) for path in found_in(root)] == [
        *(f"{PHOTOS}/garden/robin/a.jpg",) * 2,
        f"{PHOTOS}/garden/wren/1.jpg",
    ]
    assert ask(app, get(f"/api/list_folder?path={PHOTOS}/garden"))[0].json()["folders"][0]["photos"] == 2


@pytest.mark.parametrize(
    ("path", "content", "says"),
    [
        ("../x.jpg", b"x", "cannot be a name"),
        ("robin/..%2F..%2Fx.jpg", b"x", "cannot be a name"),
        ("robin/a.txt", b"x", "is no photo"),
        ("robin/con:a.jpg", b"x", "cannot be a name"),
        ("a.zip", make_zip({"robin/1.jpg": b"x", "wren\\..\\1.jpg": b"x"}), "cannot be a name"),
        ("a.zip", make_zip({"robin/1.jpg": b"x", "/etc/1.jpg": b"x"}), "cannot be a name"),
        ("a.zip", b"PK no zip", "cannot be read: File is not a zip file"),
        ("link/a.jpg", b"x", "leads out of"),
    ],
)
def test_what_is_dropped_is_written_below_its_collection_or_not_at_all(root, tmp_path, path, content, says):
    (root / PHOTOS / "garden").mkdir(parents=True)
    (root / PHOTOS / "garden" / "link").symlink_to(tmp_path / "outside")
    before = sorted(tmp_path.rglob("*"))
    answer = add(make_app(root), path, content)
    assert answer.status_code == 422
    assert says in answer.json()["detail"]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_zip_that_would_fill_the_disk_is_refused(root, monkeypatch):
    monkeypatch.setattr("fieldmark.serve.studio._MOST_UNPACKED", 1000)
    packed = make_zip({f"robin/{number}.jpg": bytes(200) for number in range(6)})
    assert "drop smaller zips" in add(make_app(root), "bomb.zip", packed).json()["detail"]
    assert found_in(root) == []


def test_a_finished_training_is_downloaded_exported_and_mended(root, trains, monkeypatch):
    app = make_app(root)
    ask(app, post("/api/ask?path=my birds&minutes=2", {}))
    wait_for(app, "my-birds-1", "running")
    ask(app, post("/api/stop?name=my-birds-1", {}))
    wait_for(app, "my-birds-1", "stopped")
    foreign = {"sec-fetch-site": "cross-site"}
    packed, refused = ask(
        app, get("/download/my-birds-1"), lambda client: client.get("/download/my-birds-1", headers=foreign)
    )
    assert refused.status_code == 403
    with zipfile.ZipFile(io.BytesIO(packed.content)) as archive:
        assert "my-birds-1/recipe.toml" in archive.namelist()
    started = []
    monkeypatch.setattr(app.state.studio, "_spawn", lambda name, *words: started.append((name, *words)))
    refused, exported = ask(
        app,
        post("/api/export?name=my-birds-1&to=../x", {}),
        post("/api/export?name=my-birds-1&to=onnx", {}),
    )
    assert "there is no form '../x'" in refused.json()["detail"]
    assert exported.status_code == 200
    assert started[0][:2] == ("my-birds-1.onnx", "export")
    (root / RUNS / "my-birds-1.corrections.csv").write_text("path,action,label\n")
    [row] = ask(app, get("/api/describe?name=my-birds-1"))
    assert row.json()["is_mended"]
    with contextlib.suppress(AttributeError):  # the training that is not begun has no process
        ask(app, post("/api/ask?path=my birds&minutes=2&mended=my-birds-1&is_single=true", {}))
    assert f"data.corrections={root / RUNS / 'my-birds-1.corrections.csv'}" in started[1]
    assert started[1][-1].startswith("model.max_parameters_millions=0.")
