"""Laws of the server: every answer is the model's or a reason, and nothing inside gets out."""

from __future__ import annotations

import asyncio
import io
import json
import re
import time
from unittest.mock import AsyncMock

import httpx
import pytest
from PIL import Image
from tests.serve.conftest import ask, client_of, make_app, make_photo, upload

from fieldmark.errors import ConfigError
from fieldmark.inference.taxonomy import Fallback


def predict(*contents, query=""):
    return lambda client: client.post(f"/predict{query}", files=upload(*contents))


def test_photos_are_answered_in_order_with_names_and_probabilities(model):
    [answer] = ask(make_app(model), predict(make_photo((255, 0, 0)), make_photo((0, 0, 255), kind="PNG")))
    body = answer.json()
    assert answer.status_code == 200
    assert [photo["label"] for photo in body["photos"]] == ["red", "blue <b>"]
    assert body["photos"][0]["top"][0]["probability"] == pytest.approx(0.998, abs=2e-3)
    assert [len(photo["top"]) for photo in body["photos"]] == [3, 3]
    assert body["photos"][0]["seen"] == [0.25, 0.0, 0.5, 1.0]
    assert body["photos"][0]["attention"] is None


def test_photos_of_fields_of_several_names_keep_their_order_and_none_is_dropped(model):
    red, blue = (("a.jpg", make_photo(color)) for color in ((255, 0, 0), (0, 0, 255)))
    requests = [
        lambda client: client.post("/predict", files=[("image", red), ("file", blue)]),
        lambda client: client.post("/predict", files=[("photos", red), ("picture", blue)]),
        lambda client: client.post("/predict", files=[("photos", red)], data={"photos": "text"}),
        lambda client: client.post("/predict", files=[("photos", red)], data={"token": "text"}),
    ]
    mixed, elsewhere, text, more = ask(make_app(model), *requests)
    assert [photo["label"] for photo in mixed.json()["photos"]] == ["red", "blue <b>"]
    assert (elsewhere.status_code, text.status_code, more.status_code) == (422, 422, 200)
    assert "the field 'picture' is no file, or a file in another field" in elsewhere.json()["detail"]


def test_top_and_attention_are_parameters(model):
    [answer] = ask(make_app(model), predict(make_photo((0, 255, 0)), query="?top=1&attention=true"))
    [photo] = answer.json()["photos"]
    assert [row["label"] for row in photo["top"]] == ["green"]
    assert photo["attention"] == [[0.5, 0.5], [0.5, 0.5]]


def test_below_the_threshold_the_answer_is_unknown_and_the_names_are_still_listed(model):
    [answer] = ask(make_app(model), predict(make_photo((120, 120, 120))))
    [photo] = answer.json()["photos"]
    assert photo["is_unknown"]
    assert photo["label"] is None
    assert len(photo["top"]) == 3


def test_where_the_class_is_not_sure_the_group_that_is_sure_is_given(model):
    rows = [["red", "warm"], ["green", "cold"], ["blue <b>", "cold"]]
    model.fallback = Fallback(("class", "warmth"), rows, (0.5, 0.6), ())
    colors = [(40, 100, 100), (100, 50, 54), (0, 255, 0)]
    [answer] = ask(make_app(model), predict(*(make_photo(color) for color in colors)))
    cold, unsure, sure = answer.json()["photos"]
    assert (cold["label"], cold["group"]["level"], cold["group"]["name"]) == (None, "warmth", "cold")
    assert cold["group"]["probability"] == pytest.approx(0.83, abs=0.02)
    assert (unsure["label"], unsure["group"]) == (None, None)
    assert (sure["label"], sure["group"]) == ("green", None)


def test_a_broken_photo_keeps_its_place_and_does_not_harm_the_others(model):
    [answer] = ask(make_app(model), predict(b"no photo", make_photo((0, 255, 0))))
    broken, good = answer.json()["photos"]
    assert broken["problem"].startswith("is not an image that this server reads: JPEG, PNG")
    assert (broken["label"], broken["top"]) == (None, [])
    assert good["label"] == "green"


@pytest.mark.parametrize(
    ("contents", "query", "status", "reason"),
    [
        ([b"no photo"], "", 422, "photo 1 is not an image"),
        ([b""], "", 422, "photo 1 is empty"),
        ([make_photo()[:400]], "", 422, "photo 1 is truncated"),
        ([make_photo(size=(2000, 2000))], "", 422, "4000000 pixels"),
        ([make_photo()] * 9, "", 413, "9 photos in one request; at most 8 are taken"),
        ([b"x" * 300_000], "", 413, "larger than 200000 bytes"),
        ([make_photo()], "?top=0", 422, "query.top"),
        ([make_photo()], "?attention=perhaps", 422, "query.attention"),
    ],
)
def test_bad_requests_get_a_4xx_with_the_reason(model, contents, query, status, reason):
    [answer] = ask(make_app(model), predict(*contents, query=query))
    assert answer.status_code == status
    assert reason in answer.json()["detail"].replace(",", "")
    assert "Traceback" not in answer.text
    assert "/site-packages" not in answer.text


@pytest.mark.parametrize(
    "request_",
    [
        {"content": b"{}", "headers": {"content-type": "application/json"}},
        {"content": b"x", "headers": {}},
        {"content": b"", "headers": {"content-type": "multipart/form-data"}},
        {"content": b"--x\r\nbroken", "headers": {"content-type": "multipart/form-data; boundary=x"}},
        {"data": {"photos": "text"}},
        {"files": {"other": ("a.jpg", b"x")}},
        {"content": b"\xff" * 100, "headers": {"content-type": b"multipart/form-data; boundary=\xff"}},
    ],
)
def test_a_body_that_is_no_form_of_photos_is_a_4xx(model, request_):
    [answer] = ask(make_app(model), lambda client: client.post("/predict", **request_))
    assert answer.status_code in (400, 422)
    assert isinstance(answer.json()["detail"], str)


def test_a_lying_content_length_does_not_let_a_large_body_in(model):
    async def chunks():
        for _ in range(10):
            yield b"x" * 50_000

    [answer] = ask(make_app(model), lambda client: client.post("/predict", content=chunks()))
    assert answer.status_code == 413


def test_bodies_of_all_requests_together_are_bounded_and_given_back(model):
    async def run():
        async with client_of(make_app(model, max_held_bytes=2000)) as client:
            model.gate.clear()
            photo = make_photo()
            first = asyncio.create_task(client.post("/predict", files=upload(photo, photo)))
            while not (await client.get("/health")).json()["waiting"]:
                await asyncio.sleep(0.01)
            refused = await client.post("/predict", files=upload(photo, photo))
            model.gate.set()
            return refused, await first, await client.post("/predict", files=upload(photo, photo))

    refused, first, again = asyncio.run(run())
    assert (refused.status_code, first.status_code, again.status_code) == (503, 200, 200)
    assert refused.headers["retry-after"] == "2"


def test_what_a_client_that_reads_no_answer_holds_is_given_back(model):
    app = make_app(model, max_held_bytes=1000, answer_seconds=0.05)
    scope = {"type": "http", "method": "GET", "path": "/classes", "query_string": b"", "headers": [(b"host", b"test")]}
    body = {"type": "http.request", "body": b"x" * 600, "more_body": False}

    async def run():
        await app(scope, AsyncMock(return_value=body), lambda message: asyncio.Event().wait())
        reader = AsyncMock()
        await app(scope, AsyncMock(return_value=body), reader)
        return [call.args[0] for call in reader.await_args_list]

    start, answer, *_ = asyncio.run(asyncio.wait_for(run(), 10))
    assert (start["status"], json.loads(answer["body"])["threshold"]) == (200, 0.5)


def test_a_body_that_never_ends_is_given_up(model):
    async def slow():
        yield b"--x"
        await asyncio.sleep(30)

    headers = {"content-type": "multipart/form-data; boundary=x"}
    app = make_app(model, body_seconds=0.1)
    [answer] = ask(app, lambda client: client.post("/predict", content=slow(), headers=headers))
    assert answer.status_code == 408
    assert "within 0.1 seconds" in answer.json()["detail"]


def test_a_full_queue_answers_503_with_retry_after_and_serves_again_afterwards(model):
    async def run():
        async with client_of(make_app(model, max_queued=4)) as client:
            model.gate.clear()
            waiting = [asyncio.create_task(client.post("/predict", files=upload(make_photo()))) for _ in range(4)]
            while (await client.get("/health")).json()["waiting"] < 4:
                await asyncio.sleep(0.01)
            refused = await client.post("/predict", files=upload(make_photo()))
            model.gate.set()
            answers = await asyncio.gather(*waiting)
            again = await client.post("/predict", files=upload(make_photo()))
            return refused, answers, again

    refused, answers, again = asyncio.run(run())
    assert refused.status_code == 503
    assert refused.headers["retry-after"] == "2"
    assert [answer.status_code for answer in answers] == [200] * 4
    assert again.status_code == 200


def test_an_answer_that_takes_too_long_is_a_503_and_the_server_lives_on(model):
    async def run():
        async with client_of(make_app(model, answer_seconds=0.2)) as client:
            model.gate.clear()
            late = await client.post("/predict", files=upload(make_photo()))
            model.gate.set()
            return late, await client.post("/predict", files=upload(make_photo()))

    late, again = asyncio.run(run())
    assert (late.status_code, again.status_code) == (503, 200)
    assert "retry-after" in late.headers


def test_requests_share_batches(model):
    async def run():
        async with client_of(make_app(model, max_batch=4)) as client:
            model.gate.clear()
            tasks = [asyncio.create_task(client.post("/predict", files=upload(make_photo()))) for _ in range(9)]
            while (await client.get("/health")).json()["waiting"] < 9:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.2)  # until the decoders are done too
            model.gate.set()
            await asyncio.gather(*tasks)

    asyncio.run(run())
    assert sum(model.batches) == 9
    assert max(model.batches) == 4
    assert len(model.batches) <= 5


def test_a_model_that_fails_is_a_500_without_its_words_and_the_server_lives_on(model, caplog):
    calls = []

    def first_fails(images):
        calls.append(len(images))
        if len(calls) == 1:
            raise RuntimeError("/secret/path")
        return type(model).probabilities(model, images)

    model.probabilities = first_fails
    broken, good = ask(make_app(model), predict(make_photo()), predict(make_photo()))
    assert broken.status_code == 500
    assert "secret" not in broken.text
    assert "secret" in caplog.text
    assert good.status_code == 200


def test_the_key_guards_all_but_the_page_and_health(model):
    app = make_app(model, api_key="right")
    statuses = ask(
        app,
        lambda client: client.get("/"),
        lambda client: client.get("/health"),
        lambda client: client.get("/static/app.js"),
        lambda client: client.get("/classes"),
        lambda client: client.get("/metrics"),
        lambda client: client.get("/openapi.json"),
        lambda client: client.post("/predict", files=upload(make_photo()), headers={"x-api-key": "wrong"}),
        lambda client: client.get("/classes", headers={"x-api-key": "right"}),
        lambda client: client.get("/classes", headers={"authorization": "Bearer right"}),
    )
    assert [answer.status_code for answer in statuses] == [200, 200, 200, 401, 401, 401, 401, 200, 200]


def test_health_classes_and_metrics_say_what_is_served(model):
    health, _, classes, metrics = ask(
        make_app(model),
        lambda client: client.get("/health"),
        predict(make_photo(), b"broken"),
        lambda client: client.get("/classes"),
        lambda client: client.get("/metrics"),
    )
    assert health.json()["model"] == "colors"
    assert classes.json() == {"classes": ["red", "green", "blue <b>"], "threshold": 0.5}
    assert 'fieldmark_requests_total{path="/predict",status="200"} 1.0' in metrics.text
    assert 'fieldmark_photos_total{outcome="unreadable"} 1.0' in metrics.text
    assert "fieldmark_batch_photos_sum 1.0" in metrics.text


def test_the_page_needs_nothing_from_elsewhere(model):
    page, script, style, other = ask(
        make_app(model),
        lambda client: client.get("/"),
        lambda client: client.get("/static/app.js"),
        lambda client: client.get("/static/app.css"),
        lambda client: client.get("/static/..%2fapp.py"),
    )
    for answer in (page, script, style):
        assert answer.status_code == 200
        assert "http://" not in answer.text
        assert "https://" not in answer.text
    assert "script-src 'self'" in page.headers["content-security-policy"]
    assert "innerHTML" not in script.text
    assert other.status_code == 404


def test_stopping_answers_what_was_taken_even_if_it_is_still_being_decoded(model):
    prepare = model.prepare

    def slowly(data, *, max_pixels):
        time.sleep(0.2)
        return prepare(data, max_pixels=max_pixels)

    model.prepare = slowly

    async def run():
        app = make_app(model)
        async with client_of(app) as client:
            model.gate.clear()
            task = asyncio.create_task(client.post("/predict", files=upload(make_photo(), make_photo())))
            while not (await client.get("/health")).json()["waiting"]:
                await asyncio.sleep(0.01)
            asyncio.get_running_loop().call_later(0.2, model.gate.set)
        return await task

    assert asyncio.run(run()).status_code == 200


def test_the_openapi_document_names_every_refusal(model):
    [answer] = ask(make_app(model), lambda client: client.get("/openapi.json"))
    document = answer.json()
    assert set(document["paths"]) == {"/predict", "/health", "/classes", "/metrics"}
    assert set(document["paths"]["/predict"]["post"]["responses"]) == {
        "200",
        "400",
        "401",
        "403",
        "408",
        "413",
        "422",
        "503",
    }
    assert json.dumps(document).count("http") == 0


def test_an_app_that_ended_can_start_again_and_refuses_while_it_is_ended(model):
    app = make_app(model)

    async def run():
        async with client_of(app) as client:
            first = await predict(make_photo())(client)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            ended = await predict(make_photo())(client)
        async with client_of(app) as client:
            return first, ended, await predict(make_photo())(client)

    first, ended, again = asyncio.run(run())
    assert first.json() == again.json()
    assert (ended.status_code, ended.headers["retry-after"]) == (503, "2")
    assert "ending" in ended.json()["detail"]


def test_all_that_the_page_names_is_served(model):
    app = make_app(model)
    [page] = ask(app, lambda client: client.get("/"))
    named = re.findall(r'(?:src|href)="(static/[^"]+)"', page.text)
    assert len(named) >= 3
    for name in named:
        [answer] = ask(app, lambda client, name=name: client.get(f"/{name}"))
        assert answer.status_code == 200, name


def test_an_app_answers_in_event_loops_one_after_another_whoever_left_in_the_middle(model):
    app = make_app(model)

    async def run(is_cut):
        async with client_of(app) as client:
            if is_cut:
                model.gate.clear()
                left = [asyncio.create_task(predict(make_photo())(client)) for _ in range(3)]
                while (await client.get("/health")).json()["waiting"] < 3:
                    await asyncio.sleep(0.001)
                left[0].cancel()
                model.gate.set()
            return await predict(make_photo((0, 255, 0)))(client)

    for number in range(12):
        answer = asyncio.run(run(number % 2 == 0))
        assert answer.json()["photos"][0]["label"] == "green"


@pytest.mark.parametrize("field", ["photo", "file", "files", "image", "images", "files[]"])
def test_fields_that_clients_of_other_servers_use_are_taken(model, field):
    [answer] = ask(
        make_app(model), lambda client: client.post("/predict", files=[(field, ("a.jpg", make_photo((0, 255, 0))))])
    )
    assert answer.json()["photos"][0]["label"] == "green"


@pytest.mark.parametrize("kind", ["image/jpeg", "image/heic; q=1", "application/octet-stream"])
def test_a_photo_as_the_body_itself_is_taken(model, kind):
    [answer] = ask(
        make_app(model),
        lambda client: client.post("/predict?top=1", content=make_photo((0, 0, 255)), headers={"content-type": kind}),
    )
    assert [photo["label"] for photo in answer.json()["photos"]] == ["blue <b>"]


def test_what_is_no_photo_request_is_answered_with_how_to_make_one(model):
    other, text = ask(
        make_app(model),
        lambda client: client.post("/predict", files={"other": ("a.jpg", make_photo())}),
        lambda client: client.post("/predict", content=b"{}", headers={"content-type": "application/json"}),
    )
    assert "no file in a field named photos, photo, files" in other.json()["detail"]
    assert 'named "photos", or one photo as the body with its Content-Type' in text.json()["detail"]


@pytest.mark.parametrize("kind", ["ICO", "PCX", "PPM", "ICNS", "JPEG2000"])
def test_formats_that_no_camera_writes_are_not_even_decoded(model, kind):
    model.prepare = None  # must not be reached
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, kind)
    [answer] = ask(make_app(model), predict(buffer.getvalue()))
    assert answer.status_code == 422
    assert "is not an image that this server reads" in answer.json()["detail"]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "AVIF"])
def test_formats_of_cameras_phones_and_browsers_are_read(model, kind):
    [answer] = ask(make_app(model), predict(make_photo((0, 255, 0), kind=kind)))
    assert answer.json()["photos"][0]["label"] == "green"


HOSTS = {
    "evil.example": 400,
    "evil.example:8000": 400,
    "localhost.evil.example": 400,
    "127.0.0.1.evil.example": 400,
    "": 400,
    "[": 400,
    "test:8000": 200,
    "localhost:8000": 200,
    "LOCALHOST": 200,
    "127.0.0.1:8000": 200,
    "[::1]:8000": 200,
    "192.168.1.20": 200,
}


@pytest.mark.parametrize(("host", "status"), HOSTS.items())
def test_a_name_that_is_not_the_servers_is_refused(model, host, status):
    [answer] = ask(make_app(model), lambda client: client.get("/classes", headers={"host": host}))
    assert answer.status_code == status
    assert status == 200 or "--hostname" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://test", 200),
        ("https://test", 200),
        ("http://evil.example", 403),
        ("null", 403),
        ("http://localhost:3000", 403),
        ("", 200),
    ],
)
def test_pages_of_other_sites_may_not_ask(model, origin, status):
    [answer] = ask(make_app(model), lambda client: client.get("/classes", headers={"origin": origin}))
    assert answer.status_code == status
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("path", ["/", "/examples/0", "/classes", "/missing", "/health"])
def test_nothing_can_be_shown_by_a_page_elsewhere(model, path):
    for host in ("test", "evil.example"):
        [answer] = ask(make_app(model), lambda client, host=host: client.get(path, headers={"host": host}))
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]


def test_a_site_that_was_allowed_may_ask_and_no_other(model):
    app = make_app(model, cors=("https://birds.example",), api_key="right")
    asking = {"origin": "https://birds.example", "access-control-request-method": "POST"}
    preflight, answer, missing, foreign = ask(
        app,
        lambda client: client.options("/predict", headers=asking),
        lambda client: client.get("/classes", headers={"origin": "https://birds.example", "x-api-key": "right"}),
        lambda client: client.get("/classes", headers={"origin": "https://birds.example"}),
        lambda client: client.options("/predict", headers={**asking, "origin": "https://evil.example"}),
    )
    assert preflight.status_code == 200
    assert "X-API-Key" in preflight.headers["access-control-allow-headers"]
    assert [it.status_code for it in (answer, missing, foreign)] == [200, 401, 400]
    for allowed in (preflight, answer, missing):
        assert allowed.headers["access-control-allow-origin"] == "https://birds.example"
    assert "access-control-allow-origin" not in foreign.headers


@pytest.mark.parametrize("key", ["", " ", "\t"])
def test_an_empty_key_is_an_error_not_a_key(model, key):
    with pytest.raises(ConfigError, match="the API key is empty"):
        make_app(model, api_key=key)


@pytest.mark.parametrize("origin", ["birds.example", "https://birds.example/", "https://"])
def test_an_origin_that_no_browser_sends_is_an_error(model, origin):
    with pytest.raises(ConfigError, match="an origin is like"):
        make_app(model, cors=(origin,))


def test_the_page_of_the_api_needs_nothing_from_elsewhere(model):
    page, script = ask(
        make_app(model, api_key="key"),
        lambda client: client.get("/docs"),
        lambda client: client.get("/static/docs.js"),
    )
    for answer in (page, script):
        assert answer.status_code == 200
        assert "//" not in re.sub(r"^// .*|: .//", "", answer.text, flags=re.MULTILINE)
        assert "innerHTML" not in answer.text
