"""Who may ask, on which routes, and paths that try to get around it."""

from __future__ import annotations

import logging
import os

import pytest

from qwen_rerank.errors import InvalidInputError
from qwen_rerank.serve import process
from qwen_rerank.serve.auth import KeyRing, load_keys
from qwen_rerank.serve.settings import ServeSettings
from tests.serve.conftest import KEY, OTHER_KEY, app_client, live_server
from tests.serve.raw import talk

PUBLIC = {"/", "/playground/samples", "/health", "/health/live", "/health/ready"}
RIGHT = {"authorization": f"Bearer {KEY}"}


def check_401(response) -> None:
    assert response.status_code == 401, response.request.url
    assert response.headers["www-authenticate"].startswith("Bearer")
    assert "API key" in response.json()["detail"]


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param([], id="absent"),
        pytest.param([("authorization", "Bearer wrong-wrong-wrong")], id="wrong"),
        pytest.param([("authorization", "Bearer ")], id="empty"),
        pytest.param([("authorization", "")], id="nothing"),
        pytest.param([("authorization", f"Bearer {KEY[:-1]}")], id="prefix of the key"),
        pytest.param([("authorization", f"Bearer {KEY}x")], id="key and more"),
        pytest.param([("authorization", f"Bearer {'k' * 9_000}")], id="9 KB"),
        pytest.param([("authorization", "Bearer schlüssel".encode())], id="not ASCII"),
        pytest.param([("authorization", f"Bearer {KEY}"), ("authorization", f"Bearer {KEY}")], id="twice"),
        pytest.param([("authorization", f"Bearer {KEY}"), ("api-key", "wrong")], id="two different"),
        pytest.param([("authorization", f"Basic {KEY}")], id="other scheme"),
        pytest.param([("authorization", KEY)], id="no scheme"),
    ],
)
async def test_a_key_that_is_not_right_is_401(headers, caplog):
    caplog.set_level(logging.DEBUG)
    async with app_client(keys=(KEY,)) as client:
        check_401(await client.post("/v1/rerank", json={}, headers=headers))

    assert KEY not in caplog.text
    assert all(KEY not in str(getattr(record, "event", "")) for record in caplog.records)


@pytest.mark.parametrize(
    "headers", [RIGHT, {"api-key": KEY}, {"x-api-key": KEY}, {"Authorization": f"Bearer {OTHER_KEY}"}]
)
async def test_a_right_key_opens_in_any_header(headers):
    async with app_client(keys=(KEY, OTHER_KEY)) as client:
        response = await client.post("/v1/rerank", json={"query": "q", "documents": ["a"]}, headers=headers)

    assert response.status_code == 200


async def test_every_route_and_method_needs_a_key_unless_it_is_public():
    async with app_client(keys=(KEY,)) as client:
        paths = [route.path for route in client._transport.app.routes] + ["/nowhere"]
        assert set(paths) >= PUBLIC
        assert {"/metrics", "/docs", "/openapi.json", "/score", "/v2/rerank", "/playground/search"} <= set(paths)
        for path in paths:
            for method in ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE"):
                response = await client.request(method, path)
                if path in PUBLIC and method in ("GET", "HEAD"):
                    assert response.status_code in (200, 405)
                else:
                    check_401(response) if method != "HEAD" else None
                    assert response.status_code == 401


@pytest.fixture(scope="module")
def locked():
    """A server with a key, on a socket: only there does a path arrive as it was written."""
    with live_server(keys=(KEY,)) as server:
        yield server


@pytest.mark.parametrize("path", [
    "/v1//rerank", "//v1/rerank", "/v1/rerank/", "/v1/%72erank", "/%2fv1/rerank", "/v1/../v1/rerank", "/./v1/rerank",
    "/health/live/../../metrics", "/health%2flive", "/HEALTH/live", "/v1/rerank%00", "/health/live/", "/%2e%2e/metrics",
    "http://elsewhere.example/metrics", "*",
])  # fmt: skip
def test_a_path_written_otherwise_is_404_without_redirect_and_never_opens_a_door(locked, path):
    for key, status in ((KEY, 404), ("none", 401)):
        answer = talk(
            locked.port,
            f"GET {path} HTTP/1.1\r\nHost: evil\r\nAuthorization: Bearer {key}\r\nConnection: close\r\n\r\n",
        )
        assert answer.status == status
        assert b"location" not in answer.head.lower()


async def test_without_keys_any_authorization_is_ignored(client):
    response = await client.post("/v1/rerank", json={"query": "q", "documents": ["a"]}, headers=RIGHT)

    assert response.status_code == 200


def test_keys_come_from_a_list_and_a_file(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# ours\nfirst-key-1\n\nsecond-key-2\n")

    assert load_keys(listed="third-key-3, ,", file=file) == ["third-key-3", "first-key-1", "second-key-2"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be-bom"])
def test_a_key_file_is_read_as_any_editor_saves_it(tmp_path, encoding):
    file = tmp_path / "keys"
    text = "# 密钥\r\nfirst-key-1\r\n\r\nsecond-key-2\r\n"
    file.write_bytes(b"\xfe\xff" + text.encode("utf-16-be") if encoding == "utf-16-be-bom" else text.encode(encoding))

    assert load_keys(file=file) == ["first-key-1", "second-key-2"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs on this system")
def test_a_key_file_that_is_a_fifo_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "keys")

    with pytest.raises(InvalidInputError, match="no regular file"):
        load_keys(file=tmp_path / "keys")


@pytest.mark.parametrize("content", [b"", b"# nothing\n", b"\xff\xfe", b"\xff"])
def test_a_key_file_without_keys_is_an_error(tmp_path, content):
    file = tmp_path / "keys"
    file.write_bytes(content)

    with pytest.raises(InvalidInputError, match="API key file"):
        load_keys(file=file)
    with pytest.raises(InvalidInputError, match="cannot be read"):
        load_keys(file=tmp_path / "absent")


@pytest.mark.parametrize("key", ["short", "with space inside", "schlüsselchen", "x" * 600, "line\nbreak-key"])
def test_a_weak_or_unsendable_key_is_refused_without_being_shown(key):
    with pytest.raises(InvalidInputError, match="8 to 512 printable") as caught:
        KeyRing([key])

    assert key not in str(caught.value)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", ""])
def test_other_machines_are_let_in_only_with_a_key_or_by_saying_so(host):
    with pytest.raises(InvalidInputError, match="--no-auth"):
        process.check_exposure(host, has_keys=False, no_auth=False)
    process.check_exposure(host, has_keys=True, no_auth=False)
    process.check_exposure(host, has_keys=False, no_auth=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.8.0.3"])
def test_this_machine_alone_needs_no_key(host):
    process.check_exposure(host, has_keys=False, no_auth=False)


@pytest.mark.parametrize(
    ("method", "path", "headers"),
    [
        ("GET", f"/{KEY}", {}),
        ("GET", f"/v1/models/{KEY}", {"api-key": KEY}),
        ("POST", f"/v1/rerank/{KEY}", {"api-key": KEY}),
        ("GET", f"/v1/rerank?api_key={KEY}", {}),
        (KEY.upper().replace("-", "") + "-" + KEY, "/health", {}),
        ("GET", "/health", {"x-request-id": KEY}),
        ("GET", "/health", {"x-request-id": f"req-{KEY}.1"}),
        ("GET", "/health", {"x-request-id": "sk-of-another-server", "api-key": "sk-of-another-server"}),
        ("GET", "/nowhere", {"x-request-id": "other-secret-1", "authorization": "Bearer other-secret-1"}),
    ],
)
async def test_a_key_in_the_wrong_place_is_neither_logged_nor_sent_back(caplog, method, path, headers):
    caplog.set_level(logging.DEBUG, logger="qwen_rerank")
    async with app_client(keys=(KEY,)) as client:
        response = await client.request(method, path, headers=headers)
        series = (await client.get("/metrics", headers={"api-key": KEY})).text

    shown = "".join(f"{record.getMessage()}{getattr(record, 'event', '')}" for record in caplog.records)
    shown += f"{response.headers}{response.text}{series}"
    for secret in (KEY, KEY.upper(), "sk-of-another-server", "other-secret-1"):
        assert secret not in shown


async def test_an_ordinary_request_id_is_kept(client):
    assert (await client.get("/health", headers={"x-request-id": "mine-1"})).headers["x-request-id"] == "mine-1"


async def test_an_unknown_route_names_the_main_ones(client):
    for path in ("/nowhere", "/v1/rerank/", "/v1//rerank", "/api/rerank"):
        response = await client.post(path, json={})

        assert response.status_code == 404
        assert "POST /v1/rerank" in response.json()["detail"]


async def test_pages_elsewhere_may_ask_where_their_origin_is_allowed():
    asked = {
        "origin": "https://app.example.org",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    async with app_client(keys=(KEY,), cors_origins=("https://app.example.org",)) as client:
        before = await client.options("/v1/rerank", headers=asked)
        stranger = await client.options("/v1/rerank", headers={**asked, "origin": "https://evil.example"})
        answer = await client.post(
            "/v1/rerank", json={"query": "q", "documents": ["a"]}, headers={**RIGHT, "origin": asked["origin"]}
        )
        refused = await client.post("/v1/rerank", json={}, headers={"origin": asked["origin"]})

    assert (before.status_code, stranger.status_code, answer.status_code, refused.status_code) == (200, 400, 200, 401)
    assert all(each.headers["access-control-allow-origin"] == asked["origin"] for each in (before, answer, refused))
    assert "access-control-allow-origin" not in stranger.headers


@pytest.mark.parametrize("given", ["HTTPS://App.Example.org", "https://app.example.org:443"])
async def test_an_origin_is_the_one_that_browsers_send(given):
    async with app_client(cors_origins=(given,)) as client:
        answer = await client.get("/health/live", headers={"origin": "https://app.example.org"})

    assert answer.headers["access-control-allow-origin"] == "https://app.example.org"


async def test_the_scheme_of_a_key_may_be_in_small_letters():
    async with app_client(keys=(KEY,)) as client:
        answer = await client.get("/v1/models", headers={"authorization": f"bearer {KEY}"})

    assert answer.status_code == 200


@pytest.mark.parametrize(
    "wrong",
    [
        {"watchdog_s": 0},
        {"request_timeout_s": 0.0},
        {"grace_s": True},
        {"drain_delay_s": -1},
        {"served_names": "mine"},
        {"served_names": ("",)},
    ],
    ids=str,
)
def test_a_setting_that_cannot_work_is_refused(wrong):
    with pytest.raises(InvalidInputError, match=next(iter(wrong))):
        ServeSettings(**wrong)


async def test_no_other_page_may_ask_by_default(client):
    answer = await client.post(
        "/v1/rerank", json={"query": "q", "documents": ["a"]}, headers={"origin": "https://evil.example"}
    )

    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    "origin", ["app.example.org", "https://app.example.org/", "https://u@example.org", "https://*.a.org", "null"]
)
def test_an_origin_that_no_browser_sends_is_refused(origin):
    with pytest.raises(InvalidInputError, match="without a path"):
        ServeSettings(cors_origins=(origin,))


@pytest.mark.parametrize(
    "sent",
    [
        f"{KEY}\r\n\r\n",
        f"GET /health {KEY}\r\n\r\n",
        f"GET /health HTTP/1.1\r\nHost: a\r\n{KEY}\r\n\r\n",
        f"GET /health HTTP/1.1\r\nHost: a\r\n{KEY}: {KEY}\r\nConnection: close\r\n\r\n",
        f"GET /health HTTP/1.1\r\nHost: {KEY} {KEY}\r\nConnection: close\r\n\r\n",
        f"POST /v1/rerank HTTP/1.1\r\nHost: a\r\nContent-Length: {KEY}\r\n\r\n",
        f"POST /v1/rerank HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: {KEY}\r\n\r\n",
        f"POST /v1/rerank HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
        f"Transfer-Encoding: chunked\r\n\r\n{KEY}\r\n",
        f"POST /v1/rerank?key={KEY} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\nContent-Type: {KEY}\r\n"
        "Content-Length: 2\r\nConnection: close\r\n\r\n{}",
        f"POST /v1/rerank HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\nContent-Encoding: {KEY}\r\n"
        "Content-Length: 2\r\nConnection: close\r\n\r\n{}",
        f"POST /v1/rerank HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\nX-Request-Timeout-Ms: {KEY}\r\n"
        "Content-Type: application/json\r\nContent-Length: 33\r\nConnection: close\r\n\r\n"
        '{"query":"q","documents":["a b"]}',
    ],
    ids=[
        "no HTTP",
        "version",
        "header",
        "header's name",
        "host",
        "length",
        "encoding",
        "chunk",
        "type",
        "compression",
        "timeout",
    ],
)
def test_broken_http_with_a_key_in_it_is_neither_logged_nor_sent_back(locked, caplog, sent):
    caplog.set_level(logging.DEBUG)
    answer = talk(locked.port, sent)

    shown = "".join(
        f"{record.getMessage()}{getattr(record, 'event', '')}{record.exc_text}" for record in caplog.records
    )
    assert answer.status in (200, 400, 401, 415, 501)
    assert KEY.encode() not in answer.head + answer.body
    assert KEY not in shown


@pytest.mark.parametrize(
    "body",
    [
        {"query": "q", "documents": ["a"], "model": KEY},
        {"query": KEY, "documents": [KEY, {"text": 1, KEY: KEY}]},
        {"query": "q", "documents": ["a"], KEY: KEY, "top_n": KEY},
        {"query": "q", "documents": ["a"], "long_documents": KEY},
        {"query": "q", "documents": ["a"], "kwargs": KEY},
        {"query": "q", "documents": ["a"], "chat_template_kwargs": {KEY: [KEY]}, "truncation_side": KEY},
    ],
)
async def test_a_refusal_repeats_nothing_of_a_body(caplog, body):
    caplog.set_level(logging.DEBUG, logger="qwen_rerank")
    async with app_client(keys=(KEY,)) as client:
        response = await client.post("/v1/rerank", json=body, headers=RIGHT)

    assert response.status_code in (404, 422)
    assert KEY not in response.text
    assert all(KEY not in f"{record.getMessage()}{getattr(record, 'event', '')}" for record in caplog.records)
