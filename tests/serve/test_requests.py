"""What a request may hold, and what is answered when it holds something else."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest

from qwen_rerank.errors import DeviceOutOfMemoryError, QueryTooLongError, ScorerClosedError, ScorerError
from tests.serve.conftest import Client, app_client
from tests.serve.stubs import SECRET, Faulty, Oracle, value_of

JSON = {"content-type": "application/json"}


def order(response) -> list[int]:
    return [result["index"] for result in response.json()["results"]]


async def post(client: Client, body: bytes, **headers: str):
    return await client.post("/v1/rerank", content=body, headers={**JSON, **headers})


def check_error(response, status: int, *, code: str | None = None, param: str | None = None) -> None:
    """Every error has the one shape, is short, and repeats nothing of the request."""
    body = response.json()
    assert response.status_code == status, body
    assert set(body) == {"detail", "message", "error", "request_id"}
    assert set(body["error"]) == {"code", "message", "param", "type"}
    assert body["detail"] == body["message"] == body["error"]["message"]
    assert len(response.content) < 2_000
    if code:
        assert body["error"]["code"] == code
    if param:
        assert body["error"]["param"] == param


async def test_results_are_sorted_and_keep_their_index(client):
    response = await client.rerank(documents=["a 1", "b 3", "c 2"])

    assert order(response) == [1, 2, 0]
    assert response.json()["results"][0]["relevance_score"] == pytest.approx(1 / (1 + 2.718281828**-3))


async def test_the_seed_request_is_answered():
    """The request of the article that this project grew from, its line breaks restored."""
    body = """{
      "model": "Qwen/Qwen3-Reranker-0.6B",
      "query": "适合程序员的机械键盘",
      "documents": [
        "87键静音红轴机械键盘，支持宏编程，适合长时间写代码的程序员",
        "RGB背光游戏机械键盘，青轴，段落感强",
        "无线办公薄膜键盘，轻薄便携"
      ]
    }"""
    async with app_client(served_names=("Qwen/Qwen3-Reranker-0.6B",)) as client:
        response = await post(client, body.encode())

    assert response.status_code == 200
    assert sorted(order(response)) == [0, 1, 2]
    assert all(0 <= result["relevance_score"] <= 1 for result in response.json()["results"])


@pytest.mark.parametrize("query", ["", " ", "\n\t", None, 3, ["q"], {"text": ""}, {"text": 1}])
async def test_an_empty_or_wrong_query_is_422(client, query):
    check_error(await client.rerank(query=query), 422, param="query")


@pytest.mark.parametrize("documents", [[], None, "text", {"text": "a"}, 3])
async def test_empty_or_wrong_documents_are_422(client, documents):
    check_error(await client.rerank(documents=documents), 422, param="documents")


@pytest.mark.parametrize("document", [None, 7, True, {}, {"title": "a"}, {"text": None}, ["a"], [["a"]]])
async def test_a_document_that_is_no_text_is_named(client, document):
    check_error(await client.rerank(documents=["a", "b", "c", document]), 422, param="documents[3]")


async def test_an_empty_document_is_scored_and_keeps_its_index(client):
    response = await client.rerank(documents=["a 1", "", {"text": "c 2"}])

    assert sorted(order(response)) == [0, 1, 2]


async def test_the_same_document_twice_scores_the_same_and_is_returned_twice(client):
    results = (await client.rerank(documents=["same 1", "same 1"])).json()["results"]

    assert [result["index"] for result in results] == [0, 1]
    assert results[0]["relevance_score"] == results[1]["relevance_score"]


@pytest.mark.parametrize("top_n", ["0", "-1", "true", "3.0", '"3"', "[]", "{}", "-1e9"])
@pytest.mark.parametrize("name", ["top_n", "top_k"])
async def test_a_wrong_top_n_is_422(client, name, top_n):
    body = f'{{"query": "q", "documents": ["a"], "{name}": {top_n}}}'

    check_error(await post(client, body.encode()), 422, param=name)


@pytest.mark.parametrize(("top_n", "length"), [("null", 2), ("1", 1), ("5", 2), (str(2**63), 2), (str(10**30), 2)])
async def test_top_n_clamps_and_null_means_all(client, top_n, length):
    response = await post(client, f'{{"query": "q", "documents": ["a", "b"], "top_n": {top_n}}}'.encode())

    assert len(order(response)) == length


@pytest.mark.parametrize(
    "body",
    [
        b'{"query": "\\ud800", "documents": ["a"]}',
        b'{"query": "q", "documents": ["a\\udfff"]}',
        b'{"query": "q", "documents": ["a"], "instruction": "\\udc00"}',
        b'{"query": "q", "documents": ["a"], "top_n": "\\ud800"}',
        b'{"query": "q", "documents": ["a"], "unknown": {"x": ["\\ud83d"]}}',
        b'{"query": "q", "documents": ["a"], "\\ud800": 1}',
    ],
)
async def test_a_lone_surrogate_anywhere_is_422(client, body):
    check_error(await post(client, body), 422, code="invalid_unicode")


async def test_a_surrogate_pair_is_an_ordinary_character(client):
    response = await post(client, b'{"query": "\\ud83d\\ude00", "documents": ["a"]}')

    assert response.status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b'{"query": "\xff", "documents": ["a"]}', id="invalid"),
        pytest.param(b'{"query": "\xc0\xaf", "documents": ["a"]}', id="overlong"),
        pytest.param('{"query": "q", "documents": ["a"]}'.encode("utf-16"), id="utf-16"),
        pytest.param('{"query": "q", "documents": ["a"]}'.encode("utf-32-le"), id="utf-32"),
        pytest.param(b'\xef\xbb\xbf{"query": "q", "documents": ["a"]}', id="byte order mark"),
    ],
)
async def test_a_body_that_is_not_plain_utf8_is_400(client, body):
    check_error(await post(client, body), 400)


async def test_control_characters_are_echoed_exactly(client):
    text = "nul \x00 bidi \u202e ansi \x1b[31m crlf \r\n"

    response = await client.rerank(documents=[text], return_documents=True)

    assert response.json()["results"][0]["document"] == {"text": text}


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
@pytest.mark.parametrize("field", ["top_n", "unknown"])
async def test_a_number_that_is_none_is_400(client, number, field):
    check_error(await post(client, f'{{"query":"q","documents":["a"],"{field}":{number}}}'.encode()), 400)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        pytest.param(b"[" * 100_000, 400, id="deep"),
        pytest.param(b'{"a":' * 100_000, 400, id="deep objects"),
        pytest.param(b'{"query":"q","documents":["a"],"x":' + b"[" * 200 + b"]" * 200 + b"}", 400, id="deep, ignored"),
        pytest.param(b'{"query":"q","documents":["a"],"top_n":' + b"9" * 5_000 + b"}", 400, id="5,000 digits"),
        pytest.param(b'{"query":"q","query":"r","documents":["a"]}', 400, id="duplicate key"),
        pytest.param(b'{"query":"q","documents":["a"],"x":{"y":1,"y":2}}', 400, id="nested duplicate key"),
        pytest.param(json.dumps({str(i): 1 for i in range(200_000)}).encode(), 413, id="200,000 keys"),
    ],
)
async def test_json_beyond_reason_is_refused(client, body, status):
    check_error(await post(client, body), status)


@pytest.mark.parametrize(
    "body", [b"", b" ", b"null", b"3", b'"text"', b"[]", b"[1]", b"{", b'{"a"}', b'{"query":"q","documents":["a"]} x']
)
async def test_a_body_that_is_no_object_is_refused(client, body):
    response = await post(client, body)

    assert response.status_code in (400, 422)
    check_error(response, response.status_code)


async def test_an_error_repeats_nothing_of_the_request(client):
    secret = "SECRET" * 100_000

    for body in ({"query": secret, "documents": [secret, None]}, {"query": [secret]}, {"documents": secret}):
        response = await client.post("/v1/rerank", json=body)

        assert response.status_code == 422
        assert "SECRET" not in response.text


async def test_unknown_fields_are_ignored_and_nulls_are_absent(client):
    response = await client.rerank(
        priority=3, user="u", rank_fields=["x"], max_chunks_per_doc=1024, overlap_tokens=80, return_len=None,
        top_n=None, return_documents=None, instruction=None, max_tokens_per_doc=None, kwargs="{}", model=None,
    )  # fmt: skip

    assert response.status_code == 200


@pytest.mark.parametrize("name", ["oracle", "Oracle", "alias", "", "default", "default/not-specified", None])
async def test_the_models_names_are_accepted(name):
    async with app_client(served_names=("alias",)) as client:
        response = await client.rerank(model=name)

    assert response.json()["model"] == "alias"


async def test_another_models_name_is_404_unless_any_is_accepted(client):
    check_error(await client.rerank(model="gpt-4"), 404, code="model_not_found", param="model")
    async with app_client(any_model=True) as generous:
        assert (await generous.rerank(model="gpt-4")).status_code == 200


@pytest.mark.parametrize("encoding", ["gzip", "br", "zstd", "deflate", "gzip, gzip"])
async def test_a_compressed_body_is_415(client, encoding):
    check_error(await post(client, b"{}", **{"content-encoding": encoding}), 415)


@pytest.mark.parametrize(
    "kind",
    [
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/json; charset=utf-16",
        "application/jsonx",
        "",
    ],
)
async def test_a_body_that_is_not_declared_as_json_is_415(client, kind):
    check_error(await post(client, b'{"query":"q","documents":["a"]}', **{"content-type": kind}), 415)


async def test_too_many_bytes_documents_or_tokens_are_413():
    async with app_client(max_body_bytes=1_000, max_documents=3, max_request_tokens=100) as client:
        check_error(await client.rerank(documents=["x" * 2_000]), 413, code="body_too_large")
        check_error(await client.rerank(documents=["a"] * 4), 413, code="too_many_documents")
        check_error(await client.rerank(documents=["字" * 60, "字" * 60]), 413, code="too_many_tokens")


async def test_too_many_documents_are_refused_before_anything_is_tokenized():
    scorer = Oracle()
    async with app_client(scorer, max_documents=3) as client:
        scorer.fit = None  # any use would fail

        check_error(await client.rerank(documents=["a"] * 4), 413)


async def test_a_bug_of_ours_is_500_without_a_word_about_it():
    async with app_client(Faulty()) as client:
        response = await client.rerank(documents=["explode"])

    check_error(response, 500, code="internal_error")
    assert SECRET not in response.text
    assert "RuntimeError" not in response.text


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (ScorerError("broken"), 502, "engine_error"),
        (DeviceOutOfMemoryError("too large"), 413, "document_too_large_for_device"),
    ],
)
async def test_a_failing_document_fails_its_own_request_alone(error, status, code):
    async with app_client(Faulty(error)) as client:
        check_error(await client.rerank(documents=["a", "poison"]), status, code=code, param="documents[1]")

        assert (await client.rerank()).status_code == 200


async def test_a_score_that_is_no_number_is_502_and_no_broken_json():
    async with app_client(Faulty()) as client:
        check_error(await client.rerank(documents=["a", "nan"]), 502, code="non_finite_score", param="documents[1]")


@pytest.mark.parametrize(
    ("error", "status"), [(QueryTooLongError("q"), 422), (ScorerClosedError("c"), 503), (ScorerError("s"), 502)]
)
async def test_a_scorers_error_has_its_status(error, status):
    scorer = Oracle()
    async with app_client(scorer) as client:

        def fail(*_: object, **__: object) -> None:
            raise error

        scorer._compute = fail

        check_error(await client.rerank(), status)


@pytest.mark.parametrize(
    "body",
    [
        {"instruction": "x y"},
        {"instruct": "x y"},
        {"kwargs": '{"instruction": "x y"}'},
        {"chat_template_kwargs": {"instruction": "x y"}},
    ],
)
async def test_the_instruction_arrives_wherever_the_client_puts_it(body):
    scorer = Oracle()
    async with app_client(scorer, instruction="default") as client:
        await client.rerank(**body)
        await client.rerank(instruction="")

    assert scorer.instructions[-2:] == ["x y", "default"]


@pytest.mark.parametrize("flag", [True, "true", "True"])
async def test_booleans_may_be_words(client, flag):
    response = await client.rerank(return_documents=flag)

    assert response.json()["results"][0]["document"] == {"text": "b 2"}
    check_error(await client.rerank(return_documents="yes"), 422, param="return_documents")
    check_error(await client.rerank(return_documents=0), 422, param="return_documents")


class WithoutInstruction(Oracle):
    """As a cross-encoder, which has no place for one."""

    takes_instruction = False


class Plain:
    """The least that scores."""

    name = "plain"

    def score(self, query: str, documents: Sequence[str]) -> np.ndarray:
        return np.array([value_of(text) for text in documents], dtype=np.float32)


async def test_any_object_with_a_name_and_score_can_be_served():
    async with app_client(Plain()) as client:
        answer = await client.rerank(return_details=True)

    assert [result["log_odds"] for result in answer.json()["results"]] == [2.0, 1.0]
    assert answer.json()["usage"]["total_tokens"] > 0  # estimated: nobody can tell


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/rerank", {"documents": ["a 1"]}),
        ("/rerank", {"texts": ["a 1"]}),
        ("/v1/score", {"queries": "q", "documents": ["a 1"]}),
        ("/v1/search", {}),
        ("/playground/search", {"texts": ["a 1"]}),
    ],
)
async def test_an_instruction_for_a_model_that_takes_none_is_refused_before_any_work(path, body):
    scorer = WithoutInstruction()
    async with app_client(scorer) as client:
        before = len(scorer.scored)
        answer = (await client.post(path, json={"query": "q", "instruction": "find it", **body})).json()

    assert answer["message"] == "instruction: oracle takes none; leave it out, or put it into the query."
    assert answer["error"] == answer["message"] or answer["error"]["param"] == "instruction"
    assert len(scorer.scored) == before  # all of them the server's own check


async def test_a_model_that_takes_no_instruction_is_not_served_with_one():
    async with app_client(WithoutInstruction(), instruction="find it") as client:
        check_error(await client.rerank(), 503)


async def test_a_models_name_can_be_served():
    async with app_client("pocket") as client:
        answer = await client.rerank(model="pocket")

    assert answer.status_code == 200
