"""The key is in nothing that we show or log, wherever and however a server sends it back."""

from __future__ import annotations

import base64
import gzip
import json
import logging
import re
import traceback
from urllib.parse import quote

import numpy as np
import pytest

from qwen_rerank.check import CheckOptions, check
from qwen_rerank.errors import InvalidInputError, RerankError, RerankServerError
from qwen_rerank.scorers.http import HttpScorer
from qwen_rerank.scorers.http.network import EnvironmentProxy
from qwen_rerank.scorers.http.redaction import _WRITTEN, Secrets
from qwen_rerank.scorers.loading import load_scorer
from qwen_rerank.serve.auth import KeyRing
from tests.scorers.http.calls import GOOD, KEY, llamacpp, replying, results
from tests.scorers.http.stub import Reply, raw_server, serving

BASE64 = base64.b64encode(f"Bearer {KEY}".encode()).decode()
WAYS = {
    "as it is": KEY,
    "in capitals": KEY.upper(),
    "percent-encoded": "".join(f"%{ord(c):02x}" for c in KEY),
    "percent-encoded twice": quote("".join(f"%{ord(c):02X}" for c in KEY)),
    "escaped as in JSON": "".join(f"\\u{ord(c):04x}" for c in KEY),
    "escaped in an escape": "".join(f"\\\\u{ord(c):04x}" for c in KEY),
    "escaped as in a repr": "".join(f"\\x{ord(c):02x}" for c in KEY),
    "as entities": "".join(f"&#{ord(c)};" for c in KEY),
    "in base64": base64.b64encode(KEY.encode()).decode(),
    "in base64 with its scheme": BASE64,
    "in base64 behind a user's name": base64.b64encode(f"me:{KEY}".encode()).decode(),
    "in hex": KEY.encode().hex(),
    "behind many backslashes": "".join("\\" * 20 + f"u{ord(c):04x}" for c in KEY),
    "over several lines": "\n".join(KEY),
    "cut short": KEY[:-4],
}


def leaks(text):
    """Whether eight characters of the key, in one of its forms, stand in a text."""
    text = text.casefold()
    for form in (KEY, *WAYS.values()):
        if form.startswith(("QmVhcmVy", "bWU6")):
            form = form[12:-2]  # what comes before the key is no secret
        size = 8 * max(1, round(len(form) / len(KEY) - 0.5))
        if any(form[i : i + size].casefold() in text for i in range(len(form) - size + 1)):
            return True
    return False


def all_of(error):
    """Everything an error carries: messages, attributes, notes, traceback and its whole chain, hidden parts too."""
    texts, left = [], [error]
    while left:
        exc = left.pop()
        texts += [str(exc), repr(exc), repr(vars(exc)), repr(exc.args), *traceback.format_exception(exc)]
        left += [e for e in (exc.__cause__, exc.__context__) if e is not None]
        left += list(getattr(exc, "failed", {}).values())
    return "\n".join(texts)


def shown(url, caplog, **options):
    """What is to be seen of a call that may fail."""
    with caplog.at_level(logging.DEBUG), llamacpp(url, api_key=KEY, timeout_s=5, **options) as scorer:
        texts = [repr(scorer), str(scorer.config), scorer.name]
        try:
            details = scorer.score_details("q", ["d"])
            texts += [repr(details), *map(all_of, details.errors.values())]
        except RerankError as exc:
            texts.append(all_of(exc))
    return "\n".join([*texts, caplog.text])


@pytest.fixture(params=["as it is", "percent-encoded", "escaped in an escape", "in base64 with its scheme"])
def echo(request):
    return WAYS[request.param]


@pytest.mark.parametrize("way", WAYS)
def test_the_key_is_hidden_however_it_is_written(way):
    text = f"the key {WAYS[way]} is not known"
    hidden = Secrets([KEY]).hide(text)

    assert leaks(text)
    assert not leaks(hidden)
    assert "***" in hidden
    assert hidden.startswith("the key ")
    assert hidden.endswith(" is not known")


def test_no_run_of_escapes_is_read_from_each_of_its_places_again():
    """A few thousand backslashes took seconds; a pattern whose repeats are all bounded cannot."""
    assert re.findall(r"(?<!\\)[*+]", _WRITTEN.pattern) == []
    assert Secrets([KEY]).hide("\\" * 4096) == "\\" * 4096
    assert Secrets(["\\" * 9]).hide("a text") == "a text"


def test_other_texts_are_left_as_they_are():
    text = "the score 0.5 of “München” %2F \\u00e9 &amp; sk-very is no number"

    assert Secrets([KEY]).hide(text) == text
    assert Secrets([]).hide(text) == text


PLACES = {
    "an index": lambda echo: results((echo, 0.5)),
    "a score": lambda echo: results((0, echo)),
    "a list for a score": lambda echo: results((0, [echo])),
    "the model's name": lambda echo: {**GOOD, "model": echo},
    "a document's text": lambda echo: {"results": [{"index": 0, "relevance_score": 0.5, "document": echo}]},
    "a key of the answer": lambda echo: {echo: 1},
    "a refusal": lambda echo: Reply(401, {"error": {"message": f"Incorrect API key: {echo}", "type": "auth"}}),
    "the name of an error": lambda echo: Reply(400, {"error": {"message": "no", "type": echo}}),
    "the code of an error": lambda echo: Reply(400, {"code": echo, "detail": [{"msg": echo}, echo]}),
    "a failure": lambda echo: Reply(501, {"message": {"deep": [echo]}}),
    "a page that is no JSON": lambda echo: Reply(body=f"<p>{echo}".encode()),
    "the end of what is read": lambda echo: Reply(body=b" " * 4080 + echo.encode() + b"{"),
    "many times what is shown": lambda echo: Reply(400, body=(echo * 300).encode()),
    "a redirect": lambda echo: Reply(307, {}, headers={"location": quote(f"/?key={echo}")}),
    "a header": lambda echo: Reply(value={}, headers={"x-request-headers": quote(echo)}),
    "the encoding": lambda echo: Reply(body=b"x", headers={"content-encoding": quote(echo)}),
    "a wait": lambda echo: Reply(429, {}, headers={"retry-after": quote(echo)}),
    "a compressed answer": lambda echo: Reply(body=gzip.compress(echo.encode()), headers={"content-encoding": "gzip"}),
    "an escaped answer": lambda echo: Reply(body=json.dumps({"results": echo}).replace("-", "\\u002d").encode()),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_server_that_sends_the_key_back_shows_it_to_nobody(place, echo, caplog, monkeypatch):
    monkeypatch.setattr("qwen_rerank.scorers.http.transport.RETRIES", 0)
    with serving(replying(PLACES[place](echo))) as server:
        seen = shown(server.url, caplog, model="mine")

    assert server.posts
    assert not leaks(seen)


RAW = {
    "the status line": b"HTTP/1.1 200 %s\r\ncontent-length: 2\r\n\r\n{}",
    "a status that is none": b"HTTP/1.1 %s OK\r\n\r\n",
    "in place of HTTP": b"%s\r\n\r\n",
    "a broken header": b"HTTP/1.1 200 OK\r\n%s\r\n\r\n",
    "a header's name": b"HTTP/1.1 200 OK\r\n%s: 1\r\ncontent-length: 2\r\n\r\n{}",
    "a length": b"HTTP/1.1 200 OK\r\ncontent-length: %s\r\n\r\n{}",
    "a chunk's head": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n%s\r\n",
    "a chunk's extension": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2;%s\r\n{}\r\n0\r\n\r\n",
    "a trailer": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nx: %s\r\n\r\n",
    "the transfer encoding": b"HTTP/1.1 200 OK\r\ntransfer-encoding: %s\r\n\r\n{}",
}


@pytest.mark.parametrize("place", RAW)
def test_broken_http_with_the_key_in_it_shows_it_to_nobody(place, echo, caplog):
    sent = RAW[place] % echo.replace("\n", " ").encode()

    def act(connection):
        for start in range(0, len(sent), 7):  # in several reads
            connection.sendall(sent[start : start + 7])

    with raw_server(act) as url:
        assert not leaks(shown(url, caplog))


def test_what_a_server_says_it_is_holds_no_key(caplog):
    card = {"id": KEY, "owned_by": "vllm", "max_model_len": 512}
    handle = lambda request: {"data": [card]} if request.method == "GET" else GOOD  # noqa: E731
    with caplog.at_level(logging.DEBUG), serving(handle) as server, HttpScorer(server.url, api_key=KEY) as scorer:
        scorer.score("q", ["d"])
        models = scorer.open().models

    assert not leaks(repr(models) + caplog.text)


def test_the_librarys_debug_log_still_tells_of_the_exchange(caplog):
    echo = Reply(value=GOOD, headers={"x-key": KEY, "x-other": "seen"})
    with serving(replying(echo)) as server:
        log = shown(server.url, caplog)

    assert "receive_response_headers" in log
    assert "seen" in log
    assert not leaks(log)


def test_errors_of_single_documents_hold_no_key():
    error = RerankServerError("m", url="http://a")
    assert "m" in all_of(error)  # what the tests above look through

    def handle(request):
        if request.method == "GET":
            return Reply(404, {})
        return Reply(400, {"message": KEY}) if "bad" in request.json["documents"] else GOOD

    with serving(handle) as server, llamacpp(server.url, api_key=KEY, max_batch=1) as scorer:
        details = scorer.score_details("q", ["good", "bad"])

    assert np.isnan(details.log_odds).tolist() == [False, True]
    assert not leaks(all_of(details.errors[1]))


@pytest.mark.parametrize(
    "url",
    [
        f"http://host/?api_key={KEY}",
        f"http://host/#{KEY}",
        f"http://me:{KEY}@host",
        f"me:{KEY}@host",
        f"ftp://me:{KEY}@host/",
        f"http://host:{KEY}/",
        f"http://[{KEY}/",
        f"http://host /?key={KEY}",
        [f"host?key={KEY}"],
        {"key": KEY},
    ],
)
def test_an_address_with_a_key_in_it_is_refused_without_being_shown(url):
    with pytest.raises(InvalidInputError) as caught:
        HttpScorer(url)

    assert not leaks(all_of(caught.value))


def test_an_address_that_holds_the_key_itself_is_refused():
    with pytest.raises(InvalidInputError, match="url holds the key") as caught:
        HttpScorer(f"http://host/{KEY}/v1", api_key=KEY)

    assert not leaks(all_of(caught.value))


def test_no_options_or_settings_show_a_key_or_a_password():
    shown = [CheckOptions(api_key=KEY), EnvironmentProxy("HTTP_PROXY", f"http://me:{KEY}@proxy:3128"), KeyRing([KEY])]

    assert not leaks("".join(f"{each!r}{each}" for each in shown))


@pytest.mark.parametrize(
    ("name", "options"), [(f"http://host/?key={KEY}", {"dtype": "float32"}), (f"ftp://me:{KEY}@host", {})]
)
def test_loading_and_checking_by_an_address_with_a_key_do_not_show_it(name, options):
    with pytest.raises(RerankError) as caught:
        load_scorer(name, **options) if options else check(name)

    assert not leaks(all_of(caught.value))
