"""Laws of the review: decisions land in the table, survive, can be taken back; photos are only read."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import re
import shutil
import threading
import time

import httpx
import numpy as np
import pytest
from PIL import Image

from fieldmark.data.decode import DecodeSpec
from fieldmark.data.index import Photo, PhotoIndex, apply_corrections, load_index
from fieldmark.errors import DataError
from fieldmark.inference.triage import HeldOut
from fieldmark.runs.folder import Run
from fieldmark.serve.review import LABELS, Corrections, ReviewViews, create_review_app, open_labeling

COLORS = {"crow": (20, 20, 20), "gull": (230, 230, 230), "owl <b>": (140, 90, 40)}
DECODING = DecodeSpec((255, 255, 255), 10**8)
CHROMIUM = shutil.which("chromium")


@pytest.fixture
def photos(tmp_path):
    for name, color in COLORS.items():
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        for number in range(8):
            Image.new("RGB", (60, 40), tuple(c + number for c in color)).save(folder / f"{number}.jpg")
    return tmp_path / "data"


def load(photos):
    return load_index(photos, path_column="path", label_column="label", split_column="split", group_column=None)


def make_views(photos, table, duplicates=lambda: [(0, 1, 2)], look=None):
    index = load(photos)
    labels = index.label_numbers()
    probabilities = np.full((len(labels), 3), 0.05, np.float32)
    probabilities[np.arange(len(labels)), labels] = 0.9
    probabilities[1] = (0.04, 0.95, 0.01)  # crow/1.jpg looks like a gull
    probabilities[9] = (0.80, 0.15, 0.05)  # gull/1.jpg looks like a crow
    held_out = HeldOut(tuple(photo.path for photo in index.photos), labels, probabilities, index.classes)
    views = ReviewViews(index, held_out, Corrections(table), find_duplicates=duplicates, look=look, decoding=DECODING)
    views._search.join()
    return views


def ask(app, *calls):
    async def run():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            return [await call(client) for call in calls]

    return asyncio.run(run())


def get(path):
    return lambda client: client.get(path)


def post(path, body):
    return lambda client: client.post(path, json=body)


def test_all_that_the_page_names_is_served(photos, tmp_path):
    app = create_review_app(make_views(photos, tmp_path / "c.csv"))
    [page] = ask(app, get("/"))
    named = re.findall(r'(?:src|href)="(static/[^"]+)"', page.text)
    assert len(named) >= 4
    assert [answer.status_code for answer in ask(app, *(get(f"/{name}") for name in named))] == [200] * len(named)


def test_each_view_lists_its_photos_with_what_the_model_says(photos, tmp_path):
    app = create_review_app(make_views(photos, tmp_path / "c.csv"))
    overview, suspects, losses, pair, class_, duplicates = ask(
        app,
        get("/api/overview"),
        get("/api/photos?view=suspects"),
        get("/api/photos?view=losses&limit=2"),
        get("/api/photos?view=pair&which=0"),
        get("/api/photos?view=class&which=2&offset=6"),
        get("/api/photos?view=duplicates"),
    )
    assert overview.json()["pairs"] == [{"first": "crow", "second": "gull", "photos": 2}]
    assert overview.json()["duplicates_state"] == "done"
    assert [photo["path"] for photo in suspects.json()["photos"]] == ["crow/1.jpg", "gull/1.jpg"]
    assert losses.json()["total"] == 24
    assert [photo["path"] for photo in losses.json()["photos"]] == ["crow/1.jpg", "gull/1.jpg"]
    assert [(photo["label"], photo["guess"]) for photo in pair.json()["photos"]] == [("crow", "gull"), ("gull", "crow")]
    assert [photo["path"] for photo in class_.json()["photos"]] == ["owl <b>/6.jpg", "owl <b>/7.jpg"]
    assert [photo["number"] for photo in duplicates.json()["photos"]] == [0, 1]


def test_decisions_are_written_at_once_survive_a_restart_and_data_takes_them(photos, tmp_path):
    table = tmp_path / "out" / "corrections.csv"
    before = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in photos.rglob("*.jpg")}
    ask(
        create_review_app(make_views(photos, table)),
        post("/api/decide", {"number": 1, "action": "relabel", "label": "gull"}),
        post("/api/decide", {"number": 9, "action": "drop"}),
        post("/api/decide", {"number": 0, "action": "keep"}),
    )
    assert table.read_text().splitlines() == [
        "path,action,label",
        "crow/1.jpg,relabel,gull",
        "gull/1.jpg,drop,",
        "crow/0.jpg,keep,",
    ]
    [page] = ask(create_review_app(make_views(photos, table)), get("/api/photos?view=marked"))
    assert [(photo["path"], photo["action"]) for photo in page.json()["photos"]] == [
        ("crow/0.jpg", "keep"),
        ("gull/1.jpg", "drop"),
        ("crow/1.jpg", "relabel"),
    ]
    corrected = {photo.path: photo.label for photo in apply_corrections(load(photos), table).photos}
    assert corrected["crow/1.jpg"] == "gull"
    assert "gull/1.jpg" not in corrected
    assert {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in photos.rglob("*.jpg")} == before


def test_two_writers_of_one_table_keep_each_others_decisions(tmp_path):
    one, other = Corrections(tmp_path / "c.csv"), Corrections(tmp_path / "c.csv")
    one.decide("a.jpg", "drop", "")
    other.decide("b.jpg", "relabel", "wren")
    one.decide("c.jpg", "keep", "")
    expected = {"a.jpg": ("drop", ""), "b.jpg": ("relabel", "wren"), "c.jpg": ("keep", "")}
    assert Corrections(tmp_path / "c.csv").decisions == one.decisions == expected


def test_undo_takes_back_one_change_at_a_time_also_after_a_restart(tmp_path):
    table = tmp_path / "c.csv"
    corrections = Corrections(table)
    corrections.decide("a", "drop", "")
    corrections.decide("b", "keep", "")
    corrections.decide("a", "relabel", "x")
    assert corrections.undo() == "a"
    assert corrections.decisions.get("a").action == "drop"
    again = Corrections(table)
    assert {again.undo(), again.undo()} == {"a", "b"}
    assert again.undo() is None
    assert table.read_text().splitlines() == ["path,action,label"]


def test_a_decision_that_cannot_be_written_is_not_taken(tmp_path, monkeypatch):
    corrections = Corrections(tmp_path / "c.csv")
    corrections.decide("a", "keep", "")

    def fail(*_):
        raise OSError("no space")

    monkeypatch.setattr("fieldmark.serve.review.write_csv", fail)
    with pytest.raises(OSError, match="no space"):
        corrections.decide("a", "drop", "")
    assert corrections.decisions.get("a").action == "keep"


def test_names_of_any_kind_survive_the_table(tmp_path):
    table = tmp_path / "c.csv"
    names = ['a "b", c.jpg', "line\nbreak.jpg", "\udcff.jpg", "ü.jpg"]
    corrections = Corrections(table)
    for name in names:
        corrections.decide(name, "keep", "")
    assert list(Corrections(table).decisions) == names


@pytest.mark.parametrize(
    ("call", "status", "reason"),
    [
        (post("/api/decide", {"number": 1, "action": "relabel", "label": "dodo"}), 422, "not one of the 3 classes"),
        (post("/api/decide", {"number": 1, "action": "eat"}), 422, "body.action"),
        (post("/api/decide", {"number": 99, "action": "keep"}), 404, "no photo 99"),
        (get("/api/photos?view=nonsense"), 422, "no view 'nonsense'"),
        (get("/api/photos?view=class&which=7"), 422, "no view 'class' number 7"),
        (get("/photo/99"), 404, "no photo 99"),
        (get("/photo/-1"), 404, "no photo -1"),
        (get("/api/attention/0?label=crow"), 404, "no map"),
        (lambda client: client.post("/api/undo", content=b"{}", headers={"content-type": "text/plain"}), 415, "JSON"),
        (lambda client: client.get("/photo/0", headers={"host": "evil.example"}), 400, ""),
    ],
)
def test_bad_requests_are_refused_with_the_reason(photos, tmp_path, call, status, reason):
    [answer] = ask(create_review_app(make_views(photos, tmp_path / "c.csv")), call)
    assert answer.status_code == status
    assert reason in answer.text
    assert not (tmp_path / "c.csv").exists()


def test_a_table_that_a_spreadsheet_saved_is_read(tmp_path):
    table = tmp_path / "c.csv"
    table.write_bytes("path;action;label\r\nå.jpg;relabel;gull\r\nb.jpg;drop;\r\n".encode("utf-8-sig"))
    corrections = Corrections(table)
    assert corrections.decisions == {"å.jpg": ("relabel", "gull"), "b.jpg": ("drop", "")}
    table.write_bytes(table.read_bytes().decode("utf-8-sig").replace(";", "\t").encode("utf-16"))
    assert list(Corrections(table).decisions) == ["å.jpg", "b.jpg"]


def test_a_table_that_training_would_not_read_is_refused_at_the_start(tmp_path):
    with pytest.raises(DataError, match=r"written as CSV, and .*c.txt does not end in .csv: give another --out"):
        Corrections(tmp_path / "c.txt")


@pytest.mark.parametrize("content", ["name,age\nx,1\n", "path,action,label\na.jpg,eat,\n"])
def test_another_table_is_never_overwritten(content, tmp_path):
    (tmp_path / "c.csv").write_text(content)
    with pytest.raises(DataError, match="is not a table of corrections"):
        Corrections(tmp_path / "c.csv")


def test_a_flood_of_megabytes_is_refused_before_it_is_read(photos, tmp_path):
    taken = []

    async def flood():
        for _ in range(1000):
            taken.append(1)
            yield b"x" * 2**16

    app = create_review_app(make_views(photos, tmp_path / "c.csv"))
    announced, endless = ask(
        app,
        lambda client: client.post("/api/decide", content=b"x", headers={"content-length": str(12 * 10**8)}),
        lambda client: client.post("/api/decide", content=flood(), headers={"content-type": "text/plain"}),
    )
    assert (announced.status_code, endless.status_code) == (413, 413)
    assert len(taken) <= 3


def test_pages_elsewhere_can_neither_decide_nor_show_photos(photos, tmp_path):
    app = create_review_app(make_views(photos, tmp_path / "c.csv"))
    decided, photo = ask(
        app,
        lambda client: client.post(
            "/api/decide", json={"number": 1, "action": "drop"}, headers={"origin": "http://evil.example"}
        ),
        get("/photo/0"),
    )
    assert decided.status_code == 403
    assert photo.headers["cross-origin-resource-policy"] == "same-origin"
    assert not (tmp_path / "c.csv").exists()


def test_thumbnails_are_small_upright_and_a_vanished_photo_is_a_404(photos, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (900, 600), (1, 2, 3)).save(photos / "crow" / "0.jpg", exif=exif)
    app = create_review_app(make_views(photos, tmp_path / "c.csv"))
    (photos / "crow" / "2.jpg").unlink()
    turned, gone = ask(app, get("/photo/0?side=120"), get("/photo/2"))
    assert Image.open(io.BytesIO(turned.content)).size == (80, 120)
    assert gone.status_code == 404


def test_a_failed_search_for_duplicates_is_said_and_harms_nothing(photos, tmp_path):
    def fail():
        raise DataError("no hashes today")

    views = make_views(photos, tmp_path / "c.csv", duplicates=fail)
    assert views.overview()["duplicates_state"] == "failed: no hashes today"


def test_a_page_of_a_hundred_thousand_photos_is_quick(tmp_path):
    count, classes = 100_000, tuple(f"class {number}" for number in range(50))
    labels = np.arange(count) % 50
    photos = tuple(Photo(f"{number}.jpg", classes[label], "val", "") for number, label in enumerate(labels))
    index = PhotoIndex(tmp_path, photos, classes, {})
    probabilities = np.full((count, 50), 0.01, np.float32)
    probabilities[np.arange(count), labels] = 0.51
    held_out = HeldOut(tuple(photo.path for photo in photos), labels, probabilities, classes)
    views = ReviewViews(
        index, held_out, Corrections(tmp_path / "c.csv"), find_duplicates=list, look=None, decoding=DECODING
    )
    start = time.perf_counter()
    page = views.page("losses", which=0, offset=99_000, limit=60)
    assert (page["total"], len(page["photos"])) == (100_000, 60)
    assert time.perf_counter() - start < 0.1


@contextlib.contextmanager
def opened_page(app, *, width):
    """The app's page in a browser: (page, what went wrong in its scripts, the server)."""
    import uvicorn
    from playwright import sync_api

    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    try:
        with sync_api.sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": width, "height": 800})
            problems = []
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.goto(f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/")
            yield page, problems
            browser.close()
    finally:
        server.should_exit = True
        thread.join()


@pytest.mark.skipif(CHROMIUM is None, reason="no browser")
def test_a_keyboard_is_enough_and_a_reload_loses_nothing(photos, tmp_path):
    def look(number, class_number):
        return {"attention": [[0.0, 1.0], [0.5, 0.2]], "seen": [0.1, 0, 0.8, 1]}

    app = create_review_app(make_views(photos, tmp_path / "c.csv", look=look))
    with opened_page(app, width=390) as (page, problems):
        page.get_by_text("That was all: 2.").wait_for()
        page.keyboard.press("r")
        page.get_by_text("Relabeled as gull.").wait_for()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("d")
        page.get_by_text("Dropped.").wait_for()
        page.keyboard.press("a")
        page.locator(".item canvas:visible").wait_for()
        page.reload()
        page.get_by_text("2 decided").wait_for()
        page.get_by_text("That was all: 2, 2 of them decided and hidden.").wait_for()
        page.get_by_label("Hide decided").uncheck()
        page.locator('button[data-action="drop"][aria-pressed="true"]').wait_for()
        assert "--set data.corrections=" in page.locator("#next code").inner_text()
        page.keyboard.press("u")
        page.get_by_text("Taken back: gull/1.jpg").wait_for()
        page.select_option("#view", "pair")
        page.get_by_text("crow, taken for the other").wait_for()
        assert page.locator(".item").count() == 2
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert problems == []
    assert (tmp_path / "c.csv").read_text().splitlines()[1:] == ["crow/1.jpg,relabel,gull"]


@pytest.mark.skipif(CHROMIUM is None, reason="no browser")
def test_a_finger_is_enough_to_name_any_class_and_long_names_fit_a_phone(photos, tmp_path):
    names = ["Black_throated_blue_Warbler_of_the_north", "Black_throated_green_Warbler_of_the_south", "owl <b>"]
    for old, new in zip(COLORS, names, strict=True):
        (photos / old).rename(photos / new)
    table = tmp_path / "c.csv"
    with opened_page(create_review_app(make_views(photos, table)), width=390) as (page, problems):
        first = page.get_by_role("group", name=f"Decide about {names[0]}/1.jpg")
        first.get_by_role("button", name="Other …").click()
        page.get_by_label("Relabel as").fill("OWL <b>")
        page.get_by_role("dialog").get_by_role("button", name="Relabel").click()
        page.get_by_text("Relabeled as owl <b>.").wait_for()
        page.select_option("#view", "pair")
        page.get_by_text("taken for the other").first.wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        page.context.set_offline(True)
        for key in ("k", "u"):
            page.keyboard.press(key)
            page.get_by_role("status").get_by_text("The server does not answer.").wait_for()
            page.get_by_role("status").evaluate("element => element.textContent = ''")
        assert problems == []
    assert table.read_text().splitlines()[1:] == [f"{names[0]}/1.jpg,relabel,owl <b>"]


@pytest.mark.skipif(CHROMIUM is None, reason="no browser")
def test_the_page_opens_where_there_is_something_to_see_and_columns_are_only_where_both_err(photos, tmp_path):
    views = make_views(photos, tmp_path / "c.csv")
    views._suspects = []
    with opened_page(create_review_app(views), width=1280) as (page, problems):
        page.get_by_text("That was all: 24.").wait_for()
        assert page.locator("#view").input_value() == "losses"
        first = page.locator(".item").first
        assert first.locator(".primary").inner_text() == "Relabel as gull"
        assert page.locator(".item").last.locator(".primary").inner_text() == "Keep"
        heights = [first.locator(it).bounding_box()["height"] for it in ("[data-action=keep]", ".other")]
        assert max(heights) < 44  # one line each
        page.select_option("#view", "pair")
        page.locator("#photos.pair").wait_for()
        views.pairs[0] = (*views.pairs[0][:2], views.pairs[0][2][:1])
        page.reload()
        page.get_by_text("crow, taken for the other").wait_for()
        assert page.locator("#photos.pair").count() == 0
        assert problems == []


@pytest.fixture
def listing(photos):
    """A list as `suggest` writes it, beside the photos."""
    text = "path,label,probability,why\ncrow/3.jpg,gull,0.5100,gull 51% or crow 40%\nowl <b>/0.jpg,crow,0.4000,unsure\n"
    (photos / "list.csv").write_text(text)
    return photos / "list.csv"


@pytest.fixture
def label_app(tmp_path, synthetic_run, monkeypatch):
    """The app over a list and a table, for a run of invented numbers."""
    monkeypatch.setattr("fieldmark.serve.review._attention", lambda *_: None)
    run = Run(synthetic_run(tmp_path / "run", classes=tuple(COLORS)))
    return lambda listing, table: open_labeling(run, listing, table)


def test_labels_of_suggested_photos_make_a_table_that_training_reads(photos, listing, label_app):
    table = photos / "list-labels.csv"
    first, second, _, overview, again = ask(
        label_app(listing, table),
        post("/api/decide", {"number": 0, "action": "relabel", "label": "gull"}),
        post("/api/decide", {"number": 1, "action": "relabel", "label": "barn owl"}),
        post("/api/decide", {"number": 0, "action": "relabel", "label": "crow"}),
        get("/api/overview"),
        get("/api/photos?view=suggested"),
    )
    assert first.json()["guess"] == "gull"
    assert second.json()["new_label"] == "barn owl"
    assert [entry["name"] for entry in overview.json()["classes"]] == [*COLORS, "barn owl"]
    assert overview.json()["command"] == f"fieldmark extend {photos.parent / 'run'} {table}"
    assert [(one["path"], one["why"]) for one in again.json()["photos"]] == [
        ("crow/3.jpg", "gull 51% or crow 40%"),
        ("owl <b>/0.jpg", "unsure"),
    ]
    assert table.read_text().splitlines() == ["path,label", "owl <b>/0.jpg,barn owl", "crow/3.jpg,crow"]
    index = load_index(table, path_column="path", label_column="label", split_column="split", group_column=None)
    assert {photo.path: photo.label for photo in index.photos} == {"crow/3.jpg": "crow", "owl <b>/0.jpg": "barn owl"}
    undone, marked = ask(label_app(listing, table), post("/api/undo", {}), get("/api/photos?view=marked"))
    assert undone.json()["photo"]["path"] == "crow/3.jpg"
    assert [one["new_label"] for one in marked.json()["photos"]] == ["barn owl"]


def test_a_table_of_labels_elsewhere_has_whole_paths(photos, listing, label_app, tmp_path):
    table = tmp_path / "labels" / "mine.csv"
    call = post("/api/decide", {"number": 0, "action": "relabel", "label": "gull"})
    ask(label_app(listing, table), call)
    assert table.read_text().splitlines()[1:] == [f"{photos / 'crow/3.jpg'},gull"]


@pytest.mark.parametrize(
    "body",
    [
        {"action": "drop"},
        {"action": "keep"},
        {"action": "relabel", "label": " "},
        {"action": "relabel", "label": "a\nb"},
    ],
)
def test_a_suggested_photo_takes_a_name_and_nothing_else(photos, listing, label_app, body):
    [answer] = ask(label_app(listing, photos / "l.csv"), post("/api/decide", {"number": 0, **body}))
    assert answer.status_code == 422
    assert "takes the name of a class, and nothing else" in answer.text
    assert not (photos / "l.csv").exists()


def test_a_list_or_table_that_is_another_is_refused(label_app, tmp_path):
    corrections = tmp_path / "corrections.csv"
    corrections.write_text("path,action,label\na.jpg,drop,\n")
    with pytest.raises(DataError, match=r"is not a table of labels \(path,label\): give another --out"):
        Corrections(corrections, LABELS)
    (tmp_path / "far.csv").write_text("path\nnowhere.jpg\n")
    with pytest.raises(DataError, match="names no photo that is there: keep the list where"):
        label_app(tmp_path / "far.csv", tmp_path / "l.csv")


@pytest.mark.skipif(CHROMIUM is None, reason="no browser")
def test_photos_are_labeled_by_one_key_or_a_new_name_on_a_phone(photos, listing, label_app):
    table = photos / "list-labels.csv"
    with opened_page(label_app(listing, table), width=390) as (page, problems):
        page.get_by_role("heading", name="What do these photos show?").wait_for()
        page.get_by_text("That was all: 2.").wait_for()
        assert page.get_by_role("button", name="Drop").count() == 0
        assert page.locator("#view option").all_inner_texts() == ["To label (2)", "Decided (0)"]
        page.keyboard.press("d")
        page.keyboard.press("r")
        page.get_by_text("Labeled as gull.").wait_for()
        second = page.get_by_role("group", name="Decide about owl <b>/0.jpg")
        second.get_by_role("button", name="Other …").click()
        page.get_by_text("A name that is not in the list makes a new class.").wait_for()
        page.get_by_label("Label as").fill("barn owl")
        page.get_by_role("dialog").get_by_role("button", name="Label").click()
        page.get_by_text("Labeled as barn owl, a new class.").wait_for()
        assert page.locator("#next code").inner_text().startswith("fieldmark extend ")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert problems == []
    assert table.read_text().splitlines()[1:] == ["crow/3.jpg,gull", "owl <b>/0.jpg,barn owl"]
