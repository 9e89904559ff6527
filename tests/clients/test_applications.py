"""Applications that cannot be installed as a package: their request and their reading of the answer, as in their source."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from tests.serve.conftest import KEY, live_server

QUERY = "which is the red one"
DOCUMENTS = ["blue 1", "green 2", "red 4", "yellow 3"]  # the stub's log-odds are the numbers at the end
BEARER = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with live_server(keys=(KEY,)) as server:
        yield server.url


@pytest.fixture(scope="module")
def open_url() -> Iterator[str]:
    with live_server() as server:
        yield server.url


def post(url: str, body: dict[str, Any], headers: dict[str, str] | None = None) -> Any:
    response = httpx2.post(url, json=body, headers=headers)
    response.raise_for_status()
    return response.json()


def test_open_webui_gets_a_score_for_every_document(url):
    """backend/open_webui/retrieval/models/external.py: all scores, by position."""
    body = {"model": "oracle", "query": QUERY, "documents": DOCUMENTS, "top_n": len(DOCUMENTS)}
    user = {"X-OpenWebUI-User-Name": "a", "X-OpenWebUI-User-Id": "1"}
    data = post(f"{url}/v1/rerank", body, BEARER | user)
    scores = [result["relevance_score"] for result in sorted(data["results"], key=lambda result: result["index"])]

    assert len(scores) == len(DOCUMENTS)
    assert all(0 <= score <= 1 for score in scores)
    assert sorted(range(4), key=scores.__getitem__) == [0, 1, 3, 2]


@pytest.mark.parametrize("top_n", [None, 2])
def test_dify_reads_scores_and_texts(url, top_n):
    """dify_plugin/interfaces/model/openai_compatible/rerank.py: `top_n` is null when credentials are tried."""
    body = {"model": "oracle", "query": QUERY, "documents": DOCUMENTS, "top_n": top_n, "return_documents": True}
    results = post(f"{url}/v1/rerank", body, BEARER)["results"]
    scores = [result["relevance_score"] for result in results]

    assert len(results) == (top_n or 4)
    assert max(scores) > min(scores)  # it divides by the difference
    assert [result["document"]["text"] for result in results] == [DOCUMENTS[result["index"]] for result in results]


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank"])
def test_ragflow_fills_a_rank_by_index(url, path):
    """rag/llm/rerank_model.py, OpenAI_APIRerank: older versions drop the path of the address."""
    body = {"model": "oracle", "query": QUERY, "documents": DOCUMENTS, "top_n": len(DOCUMENTS)}
    rank = [0.0] * len(DOCUMENTS)
    for result in post(url + path, body, BEARER)["results"]:
        rank[result["index"]] = result["relevance_score"]

    assert max(range(4), key=rank.__getitem__) == 2
    assert min(rank) > 0


def test_ragflows_xinference_provider_sends_its_flags_as_strings_and_no_key(open_url):
    """rag/llm/rerank_model.py, XInferenceRerank."""
    flags = {"return_documents": "true", "return_len": "true"}
    body = {"model": "oracle", "query": QUERY, "documents": DOCUMENTS, **flags}
    results = post(f"{open_url}/v1/rerank", body)["results"]

    assert [result["document"]["text"] for result in results] == ["red 4", "yellow 3", "green 2", "blue 1"]


def test_ragflows_nvidia_provider_reads_log_odds(url):
    """rag/llm/rerank_model.py, NvidiaRerank."""
    passages = [{"text": text} for text in DOCUMENTS]
    body = {"model": "oracle", "query": {"text": QUERY}, "passages": passages, "truncate": "END", "top_n": 4}
    rankings = post(f"{url}/v1/ranking", body, BEARER)["rankings"]

    assert {ranking["index"]: ranking["logit"] for ranking in rankings} == {0: 1, 1: 2, 2: 4, 3: 3}


def test_milvus_names_no_model(url):
    """internal/util/function/rerank, the vLLM provider: every score, the tokens as a number, the id as a string."""
    data = post(f"{url}/rerank", {"query": QUERY, "documents": DOCUMENTS}, BEARER)

    assert sorted(result["index"] for result in data["results"]) == [0, 1, 2, 3]
    assert (type(data["usage"]["total_tokens"]), type(data["id"])) == (int, str)


def test_milvus_tei_provider_reads_a_bare_list(url):
    """The same, the TEI provider."""
    body = {"query": QUERY, "texts": DOCUMENTS, "truncate": True, "truncation_direction": "Right"}
    data = post(f"{url}/rerank", body, BEARER)

    assert [hit["index"] for hit in data] == [2, 3, 1, 0]


def test_fastgpt_trusts_the_order_and_reads_the_tokens(url):
    """packages/service/core/ai/rerank: its default settings are part of the body."""
    body = {"model": "oracle", "query": QUERY, "documents": DOCUMENTS, "defaultConfig": {}, "extra": None}
    data = post(f"{url}/v1/rerank", body, BEARER)
    scores = [result["relevance_score"] for result in data["results"]]

    assert scores == sorted(scores, reverse=True)
    assert data["meta"]["tokens"]["input_tokens"] == data["usage"]["total_tokens"] > 0


def test_lightrag_wants_no_documents_back(url):
    """lightrag/rerank.py, jina_rerank."""
    body = {"model": "oracle", "query": QUERY, "documents": DOCUMENTS, "top_n": 2, "return_documents": False}
    results = post(f"{url}/v1/rerank", body, BEARER)["results"]

    assert [sorted(result) for result in results] == [["index", "relevance_score"]] * 2


def test_one_model_is_described_by_name(url):
    known = httpx2.get(f"{url}/v1/models/oracle", headers=BEARER)
    unknown = httpx2.get(f"{url}/v1/models/another/one", headers=BEARER)
    keyless = httpx2.get(f"{url}/v1/models/oracle")

    assert (known.json()["id"], known.json()["model_type"]) == ("oracle", "rerank")
    assert (unknown.status_code, keyless.status_code) == (404, 401)
