"""Addresses as people copy them, proxies, certificates and headers."""

from __future__ import annotations

import os
import pickle
import shutil
import ssl
import subprocess
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from qwen_rerank.check import CheckOptions, check
from qwen_rerank.errors import BackendRejectedError, BackendUnavailableError, InvalidInputError
from qwen_rerank.scorers.http import HttpScorer, transport
from qwen_rerank.scorers.http.endpoints import check_url
from qwen_rerank.scorers.http.network import proxy_for
from qwen_rerank.scorers.loading import load_scorer
from tests.scorers.http import wire
from tests.scorers.http.calls import GOOD, KEY, llamacpp, replying
from tests.scorers.http.stub import Reply, serving

VARIABLES = ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR"]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    monkeypatch.setattr(transport, "RETRIES", 0)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


# --- addresses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["", "/", "//", "/v1", "/v1/", "/v1/rerank", "/v1/rerank/", "/v1/models"])
@pytest.mark.parametrize("name", wire.SERVERS)
def test_an_address_may_end_in_the_version_or_the_route(name, end):
    stub = wire.SERVERS[name]()
    if stub.path == "/rerank" and "v1" in end:
        stub.path = "/v1/rerank"  # set up with a prefix, or behind a gateway
    with serving(stub.handle) as server, HttpScorer(server.url + end, dialect=name, model=wire.MODEL) as scorer:
        assert len(scorer.score("q", ["d 1"])) == 1

    assert stub.problem is None


@pytest.mark.parametrize("end", ["/v1", "/v1/", "/v1/rerank"])
def test_every_door_takes_such_an_address(end):
    with serving(wire.Vllm().handle) as server:
        report = check(server.url + end, CheckOptions(long_tokens=600))
        with load_scorer(server.url + end) as scorer:
            assert len(scorer.score("q", ["d 1"])) == 1

    assert {post.path for post in server.posts} == {"/v1/rerank"}
    assert report.facts["dialect"] == "vllm"


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("http://rerank", "http://rerank"),
        ("http://rerank/rerank", "http://rerank"),
        ("http://docs:80/", "http://docs:80"),
        ("http://host/rerank/v1", "http://host/rerank/v1"),
        ("http://host/my-rerank", "http://host/my-rerank"),
        ("http://[::1]:8000/v1/rerank", "http://[::1]:8000/v1"),
    ],
)
def test_only_the_route_is_left_out_of_an_address(given, kept):
    assert check_url(given) == kept


# --- proxies ---------------------------------------------------------------------------------------------------------

BAD_PROXIES = [
    "socks5://me:pass-word@127.0.0.1:9",
    "socks://127.0.0.1:9",
    "ftp://127.0.0.1:9",
    "http://[::1",
    "http://a:b:c",
]


@pytest.mark.parametrize("variable", ["ALL_PROXY", "HTTP_PROXY", "all_proxy"])
@pytest.mark.parametrize("proxy", BAD_PROXIES)
def test_a_proxy_that_cannot_be_used_is_named_by_its_variable(variable, proxy, monkeypatch):
    if "socks5" in proxy:
        monkeypatch.setitem(__import__("sys").modules, "socksio", None)
    monkeypatch.setenv(variable, proxy)
    with llamacpp("http://rerank.invalid") as scorer, pytest.raises(InvalidInputError, match=variable) as caught:
        scorer.score("q", ["d"])

    assert "add rerank.invalid to NO_PROXY" in str(caught.value)
    assert "pass-word" not in str(caught.value)


@pytest.mark.parametrize("proxy", BAD_PROXIES)
def test_no_proxy_is_used_to_this_machine(proxy, monkeypatch):
    monkeypatch.setenv("ALL_PROXY", proxy)
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere/ca.pem")
    with serving(replying(GOOD)) as server, llamacpp(server.url) as scorer:
        assert len(scorer.score("q", ["d"])) == 1
    with serving(replying(GOOD)) as server, llamacpp(server.url.replace("127.0.0.1", "localhost")) as scorer:
        assert len(scorer.score("q", ["d"])) == 1


@pytest.mark.parametrize(
    ("url", "without", "used"),
    [
        ("http://rerank.invalid", "", True),
        ("http://rerank.invalid", "other.invalid", True),
        ("http://rerank.invalid", "rerank.invalid", False),
        ("http://gpu.rerank.invalid:8000", ".rerank.invalid", False),
        ("http://rerank.invalid:8000", "rerank.invalid:8000", False),
        ("http://10.1.2.3:8000", "10.0.0.0/8", False),
        ("http://11.1.2.3:8000", "10.0.0.0/8, nonsense/", True),
        ("http://rerank.invalid", "*", False),
        ("http://127.0.0.2", "", False),
        ("http://[::1]:8000", "", False),
        ("http://a.localhost", "", False),
        ("https://rerank.invalid", "", False),
    ],
)
def test_a_proxy_is_used_where_the_environment_says_so(url, without, used, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "proxy.invalid:3128")
    monkeypatch.setenv("NO_PROXY", without)
    proxy = proxy_for(url)

    assert (proxy is not None) == used
    assert proxy is None or (proxy.variable, proxy.shown) == ("HTTP_PROXY", "http://proxy.invalid:3128")


def test_requests_go_through_the_proxy(monkeypatch):
    with serving(replying(GOOD)) as proxy, llamacpp("http://10.1.2.3:8000") as direct:
        monkeypatch.setenv("http_proxy", proxy.url.replace("//", "//me:pass-word@"))
        with llamacpp("http://rerank.invalid:8000/v1") as scorer:
            assert len(scorer.score("q", ["d"])) == 1

    assert proxy.posts[0].path == "http://rerank.invalid:8000/v1/rerank"
    assert direct._transport._proxies == {"http://10.1.2.3:8000": None}


def test_a_dead_proxy_is_named_and_not_the_server(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://me:pass-word@127.0.0.1:9")
    message = r"through the proxy http://127.0.0.1:9, which HTTP_PROXY names .* add rerank.invalid to NO_PROXY"
    with llamacpp("http://rerank.invalid") as scorer, pytest.raises(BackendUnavailableError, match=message) as caught:
        scorer.score("q", ["d"])

    assert "pass-word" not in repr(caught.value)


# --- certificates ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost", "-addext",
         "subjectAltName=DNS:localhost", "-keyout", folder / "key.pem", "-out", folder / "ca.pem"],
        check=True, capture_output=True,
    )  # fmt: skip
    return folder


@pytest.fixture
def secure(certificate):
    """The address of a server with that certificate."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(Reply(value=GOOD).content())

        def do_GET(self):
            self.send_error(404)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate / "ca.pem", certificate / "key.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"https://localhost:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_an_untrusted_certificate_is_named_with_the_way_to_trust_it(secure):
    message = "a certificate that is not trusted .*self-signed certificate.*verify='ca.pem' or in SSL_CERT_FILE"
    with llamacpp(secure) as scorer, pytest.raises(BackendUnavailableError, match=message):
        scorer.score("q", ["d"])


def test_a_certificate_is_trusted_by_argument_or_by_variable(secure, certificate, monkeypatch):
    with llamacpp(secure, verify=certificate / "ca.pem") as scorer:
        assert len(scorer.score("q", ["d"])) == 1
    assert HttpScorer(**vars_of(scorer.config)).config == scorer.config
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate / "ca.pem"))
    with llamacpp(secure) as scorer:
        assert len(scorer.score("q", ["d"])) == 1


def vars_of(config):
    return {name: getattr(config, name) for name in config.__slots__}


def test_the_name_in_a_certificate_counts(secure, certificate):
    with (
        llamacpp(secure.replace("localhost", "127.0.0.1"), verify=certificate / "ca.pem") as scorer,
        pytest.raises(BackendUnavailableError, match=r"not trusted .*IP address mismatch"),
    ):
        scorer.score("q", ["d"])


@pytest.mark.parametrize("content", [None, b"", b"no certificate"])
def test_a_missing_or_empty_ssl_cert_file_is_named(content, tmp_path, monkeypatch):
    if content is not None:
        (tmp_path / "ca.pem").write_bytes(content)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    with (
        llamacpp("https://127.0.0.1:9") as scorer,
        pytest.raises(InvalidInputError, match=r"SSL_CERT_FILE names .*ca.pem"),
    ):
        scorer.score("q", ["d"])


@pytest.mark.parametrize("verify", [False, None, 5, "", "/nowhere/ca.pem", "fifo", __file__])
def test_verify_takes_a_certificate_and_never_no(verify, tmp_path):
    if verify == "fifo":
        if not hasattr(os, "mkfifo"):
            pytest.skip("no FIFOs on this system")
        verify = tmp_path / "fifo"
        os.mkfifo(verify)
    with pytest.raises(InvalidInputError, match="verify"):
        HttpScorer("https://host", verify=verify)


def test_https_to_a_server_without_tls_is_said():
    with (
        serving(replying(GOOD)) as server,
        llamacpp(server.url.replace("http:", "https:")) as scorer,
        pytest.raises(BackendUnavailableError, match=r"speaks no TLS .* is it an http:// address"),
    ):
        scorer.score("q", ["d"])


# --- headers ---------------------------------------------------------------------------------------------------------


def test_headers_are_sent_and_hidden_like_the_key(caplog):
    refusal = Reply(401, {"message": f"wrong: {KEY}"})
    with (
        serving(replying(refusal)) as server,
        llamacpp(server.url, headers={"X-Api-Key": KEY, "x-team": "search"}) as scorer,
        pytest.raises(BackendRejectedError) as caught,
    ):
        scorer.score("q", ["d"])

    assert (server.posts[0].headers["x-api-key"], server.posts[0].headers["x-team"]) == (KEY, "search")
    assert KEY not in f"{caught.value} {scorer!r} {scorer.config} {caplog.text}"
    with pytest.raises(InvalidInputError, match="never pickled"):
        pickle.dumps(scorer)


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "other"}, {"content-length": "5"}, {"a b": "c"}, {"": "c"}, {"x": "line\r\nbreak-key"}, {"x": "schlüssel"},
        {"x": " padded-key"}, {"x": 5}, {5: "x"}, [("x", "listed-key")], "x: text-key", {"authorization": "Bearer other-key"},
    ],
)  # fmt: skip
def test_headers_that_cannot_be_sent_are_refused_unseen(headers):
    with pytest.raises(InvalidInputError, match="headers") as caught:
        HttpScorer("http://host", headers=headers, api_key=KEY)

    assert "-key" not in str(caught.value).replace("api_key", "")
