"""The page in a real browser: upload, bars, unknown, overlay, keyboard, phone width."""

from __future__ import annotations

import contextlib
import csv
import shutil
import threading
import time

import pytest
from tests.serve.conftest import ColorModel, make_app, make_photo

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no browser")


@contextlib.contextmanager
def run_server(app):
    """The URL of an app while the block runs."""
    import uvicorn

    config = uvicorn.Config(app, port=0, log_level="error", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def url():
    with run_server(make_app(ColorModel())) as url:
        yield url


@pytest.fixture(scope="module")
def browser():
    from playwright import sync_api

    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def choose(page, *colors):
    photos = [
        {"name": f"<i>{number}</i>.jpg", "mimeType": "image/jpeg", "buffer": make_photo(color, (60, 40))}
        for number, color in enumerate(colors)
    ]
    page.set_input_files("#files", photos)


def test_a_stranger_can_use_the_page(browser, url):
    context = browser.new_context(viewport={"width": 390, "height": 800})
    page = context.new_page()
    problems, requests = [], []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(url)
    page.get_by_text("Model colors: 3 classes, 90.0\u00a0% right on validation photos").wait_for()

    page.get_by_role("button", name="Example photo 2").click()
    page.get_by_role("heading", name="green").wait_for()
    page.reload()
    choose(page, (0, 0, 255))
    page.get_by_role("heading", name="blue <b>").wait_for()
    assert page.locator(".bars li").count() == 3
    assert "blue <b>" in page.get_by_role("status").inner_text()  # what a screen reader says

    button = page.get_by_role("button", name="Show where it looked")
    button.focus()
    page.keyboard.press("Enter")
    canvas = page.locator(".card canvas").first
    assert canvas.is_visible()
    seen, photo = canvas.bounding_box(), page.locator(".card img").first.bounding_box()
    assert seen["width"] == pytest.approx(photo["width"] / 2, abs=3)  # the model saw the middle half

    choose(page, (120, 120, 120))
    page.get_by_role("heading", name="Unknown").wait_for()

    page.set_input_files("#files", {"name": "a.jpg", "mimeType": "image/jpeg", "buffer": b"text"})
    page.get_by_text("a.jpg: it is not an image").wait_for()
    failed = page.locator(".card.failed")
    assert failed.get_by_role("button").count() == 0  # there is nothing to look at

    page.fill("#search", "gre")
    assert page.locator("#classes li").all_inner_texts() == ["green"]
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= 390
    assert all(request.startswith((url, "blob:", "data:")) for request in requests)
    # The refused upload shows in the console as a failed load; nothing else may.
    assert [problem for problem in problems if "422" not in problem] == []
    context.close()


def test_of_several_bad_files_each_says_its_own_name_and_reason(browser, url):
    page = browser.new_page()
    page.goto(url)
    page.get_by_text("Model colors: 3 classes").wait_for()
    bad = [("text.jpg", b"text"), ("nothing.jpg", b"")]
    page.set_input_files(
        "#files", [{"name": name, "mimeType": "image/jpeg", "buffer": content} for name, content in bad]
    )
    page.get_by_text("nothing.jpg").wait_for()
    notes = page.locator(".failed .note").all_inner_texts()
    assert notes[0].startswith("text.jpg: it is not an image that this server reads: JPEG,")
    assert notes[1] == "nothing.jpg: it is empty (0 bytes)"
    page.close()


def test_a_server_that_is_gone_is_told(browser, url):
    page = browser.new_page()
    page.goto(url)
    page.get_by_text("Model colors: 3 classes").wait_for()
    page.context.set_offline(True)
    choose(page, (255, 0, 0))
    page.get_by_text("<i>0</i>.jpg: the server does not answer.").wait_for()
    page.close()


def test_a_dropped_and_a_pasted_photo_are_answered(browser, url):
    page = browser.new_page()
    page.goto(url)
    page.get_by_text("Model colors: 3 classes").wait_for()
    script = """([name, bytes]) => {
        const transfer = new DataTransfer();
        transfer.items.add(new File([new Uint8Array(bytes)], "x.jpg", {type: "image/jpeg"}));
        const event = name === "drop" ? new DragEvent("drop", {dataTransfer: transfer, cancelable: true})
          : new ClipboardEvent("paste", {clipboardData: transfer});
        window.dispatchEvent(event);
    }"""
    page.evaluate(script, ["drop", list(make_photo((0, 255, 0)))])
    page.get_by_role("heading", name="green").wait_for()
    page.evaluate(script, ["paste", list(make_photo((255, 0, 0)))])
    page.get_by_role("heading", name="red").wait_for()
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_background(browser, url, scheme):
    page = browser.new_page(color_scheme=scheme)
    page.goto(url)
    choose(page, (120, 120, 120))
    page.get_by_role("heading", name="Unknown").wait_for()
    ratios = page.evaluate(
        """() => ["h1", "#about", ".hint", ".note", ".card h2", ".button.primary", ".bars .share"].map((selector) => {
        const light = (color) => {
          const [r, g, b] = color.match(/[\\d.]+/g).map((c) => c / 255)
            .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
          return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        let element = document.querySelector(selector);
        const ink = light(getComputedStyle(element).color);
        const isClear = () => /rgba\\(0, 0, 0, 0\\)|transparent/.test(getComputedStyle(element).backgroundColor);
        while (isClear()) element = element.parentElement;
        const paper = light(getComputedStyle(element).backgroundColor);
        return [selector, (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05)];
      })"""
    )
    # WCAG 2.2, success criterion 1.4.3
    assert {selector: ratio for selector, ratio in ratios if ratio < 4.5} == {}
    page.close()


def test_fingers_are_not_told_to_drop_or_to_press_keys(browser, url):
    for is_touched in (True, False):
        context = browser.new_context(
            viewport={"width": 390, "height": 800}, has_touch=is_touched, is_mobile=is_touched
        )
        page = context.new_page()
        page.goto(url)
        page.get_by_role("region", name="Choose photos").wait_for()
        assert page.get_by_text("Drop photos here").is_visible() == (not is_touched)
        context.close()


@pytest.mark.parametrize("size", [(390, 844), (360, 640), (1280, 800)])
def test_the_answer_is_on_the_screen_without_scrolling(browser, url, size):
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, is_mobile=size[0] < 500)
    page = context.new_page()
    page.goto(url)
    page.get_by_text("Model colors").wait_for()
    choose(page, (0, 255, 0))
    page.get_by_role("heading", name="green").wait_for()
    page.wait_for_timeout(100)
    name, share = page.locator(".card h2").bounding_box(), page.locator(".bars li").first.bounding_box()
    assert name["y"] >= 0
    assert share["y"] + share["height"] <= size[1]
    context.close()


def test_doubt_is_shown_by_a_model_without_calibration_or_threshold(browser):
    model = ColorModel()
    model.threshold = 0.0
    with run_server(make_app(model)) as url:
        page = browser.new_page()
        page.goto(url)
        page.get_by_text("not calibrated: they may claim too much").wait_for()
        choose(page, (120, 130, 120))
        page.get_by_role("heading", name="Perhaps green").wait_for()
        assert "not calibrated" in page.locator(".card .note").inner_text()
        choose(page, (0, 255, 0))
        page.get_by_role("heading", name="green", exact=True).wait_for()
        page.close()


def test_many_photos_are_a_list_and_a_table_for_a_spreadsheet(browser, url, tmp_path):
    page = browser.new_page()
    page.goto(url)
    page.get_by_text("Model colors").wait_for()
    choose(page, *[(0, 255, 0)] * 12, (120, 120, 120), (255, 0, 0))
    page.locator("#status.quiet").wait_for(state="attached")  # all are answered
    page.set_input_files("#files", {"name": 'a, "b".jpg', "mimeType": "image/jpeg", "buffer": b"text"})
    page.locator(".failed").wait_for()
    assert page.get_by_role("button", name="List").get_attribute("aria-pressed") == "true"
    answered = page.locator(".card:not(.failed) .bars").first
    assert answered.is_hidden()
    with page.expect_download() as download:
        page.get_by_role("button", name="Download CSV").click()
    download.value.save_as(tmp_path / "answers.csv")
    with (tmp_path / "answers.csv").open(newline="") as file:
        rows = {row["path"]: row for row in csv.DictReader(file)}
    assert len(rows) == 15
    assert (rows["<i>13</i>.jpg"]["label"], rows["<i>13</i>.jpg"]["unknown"]) == ("red", "false")
    assert (rows["<i>12</i>.jpg"]["label"], rows["<i>12</i>.jpg"]["unknown"]) == ("", "true")
    assert rows['a, "b".jpg']["label"] == ""
    assert "is not an image" in rows['a, "b".jpg']["problem"]
    page.get_by_role("button", name="List").click()
    answered.wait_for(state="visible")
    page.get_by_role("button", name="Clear").click()
    assert page.locator(".card").count() == 0
    assert page.get_by_text("Drop photos here").is_visible()
    page.close()


def test_the_page_of_the_api_lists_what_can_be_asked(browser, url):
    page = browser.new_page(viewport={"width": 390, "height": 800})
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(url)
    page.get_by_role("link", name="For programs").click()
    page.get_by_role("heading", name="POST /predict").wait_for()
    assert page.get_by_role("cell", name="multipart/form-data").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert problems == []
    page.close()
