"""Each family of clients gets the answer it reads."""

from __future__ import annotations

import re

import pytest

from qwen_rerank import Calibration, Reranker
from qwen_rerank.serve.scoring import cut_to_tokens
from qwen_rerank.types import Fit
from tests.serve.conftest import app_client
from tests.serve.stubs import MAX_LENGTH, Oracle

DOCUMENTS = ["a 1", "b 3", "c 2"]
P3 = pytest.approx(1 / (1 + 2.718281828**-3))
RERANK = ["/v1/rerank", "/v2/rerank", "/rerank", "/v1/reranking", "/reranking"]


async def ask(client, path: str, **body):
    response = await client.post(path, json={"query": "q", **body})
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize("path", RERANK)
async def test_the_core_answer_satisfies_every_core_client(client, path):
    body = await ask(client, path, documents=DOCUMENTS, top_n=2)

    assert set(body) == {"id", "object", "model", "results", "usage", "meta"}
    assert isinstance(body["id"], str)
    assert body["model"] == "oracle"
    assert body["results"] == [
        {"index": 1, "relevance_score": P3},
        {"index": 2, "relevance_score": pytest.approx(0.8808, abs=1e-4)},
    ]
    assert body["usage"] == {
        "prompt_tokens": 39,
        "total_tokens": 39,
    }  # three times ten of frame, one of query, two of text
    assert body["meta"]["tokens"] == {"input_tokens": 39, "output_tokens": 0}
    assert set(body["meta"]) >= {"api_version", "billed_units"}


async def test_documents_are_repeated_as_objects_when_asked_for(client):
    body = await ask(client, "/v1/rerank", documents=["a 1", {"text": "b 2", "title": "t"}], return_documents=True)

    assert [result["document"] for result in body["results"]] == [{"text": "b 2"}, {"text": "a 1"}]


async def test_top_k_answers_voyage_clients_too(client):
    body = await ask(client, "/v1/rerank", documents=DOCUMENTS, top_k=1, return_documents=True)

    assert body["data"] == [{"index": 1, "relevance_score": P3, "document": "b 3"}]
    assert body["results"] == [{"index": 1, "relevance_score": P3, "document": {"text": "b 3"}}]


async def test_voyages_prefix_has_data_alone(client):
    body = await ask(client, "/voyage/v1/rerank", documents=DOCUMENTS, top_k=1, truncation=True)

    assert body["data"] == [{"index": 1, "relevance_score": P3}]
    assert "results" not in body


async def test_infinitys_prefix_has_documents_as_strings(client):
    body = await ask(client, "/infinity/rerank", documents=DOCUMENTS, top_n=1, return_documents=True)

    assert body["results"] == [{"index": 1, "relevance_score": P3, "document": "b 3"}]
    assert body["object"] == "rerank"
    assert body["usage"]["total_tokens"] == 39


@pytest.mark.parametrize("path", RERANK)
async def test_a_server_can_be_told_to_repeat_documents_as_strings_at_its_root(path):
    async with app_client(plain_documents=True) as client:
        body = await ask(client, path, documents=DOCUMENTS, top_n=1, return_documents=True)
        texts = await ask(client, path, texts=DOCUMENTS, top_n=1)

    assert body["results"] == [{"index": 1, "relevance_score": P3, "document": "b 3"}]
    assert texts == [{"index": 1, "score": P3}]


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/tei/rerank"])
async def test_texts_are_answered_as_tei_does(client, path):
    assert await ask(client, path, texts=DOCUMENTS, top_n=1, return_text=True) == [
        {"index": 1, "score": P3, "text": "b 3"}
    ]
    assert [hit["index"] for hit in await ask(client, path, texts=DOCUMENTS, raw_scores=True)] == [1, 2, 0]


@pytest.mark.parametrize("path", ["/rerank", "/tei/rerank"])
async def test_teis_errors_are_strings(client, path):
    response = await client.post(path, json={"query": "q", "texts": []})

    body = response.json()
    assert response.status_code == 422
    assert body["error"] == body["detail"] == body["message"]
    assert body["error_type"] == "validation"


@pytest.mark.parametrize("path", ["/v1/ranking", "/v1/reranking"])
async def test_passages_are_answered_as_nim_does(client, path):
    response = await client.post(
        path, json={"query": {"text": "q"}, "passages": [{"text": text} for text in DOCUMENTS], "truncate": "END"}
    )

    assert response.json()["rankings"] == [
        {"index": 1, "logit": 3.0},
        {"index": 2, "logit": 2.0},
        {"index": 0, "logit": 1.0},
    ]


@pytest.mark.parametrize(
    "pairs",
    [
        {"queries": "q", "documents": DOCUMENTS},
        {"text_1": ["q"], "text_2": DOCUMENTS},
        {"data_1": ["q", "r", "s"], "data_2": DOCUMENTS},
        {"queries": ["q"], "items": [{"text": text} for text in DOCUMENTS]},
    ],
)
@pytest.mark.parametrize("path", ["/score", "/v1/score"])
async def test_pairs_are_scored_in_input_order_as_vllm_does(client, path, pairs):
    body = await ask(client, path, **pairs, use_activation=False)

    assert [item["score"] for item in body["data"]] == [1.0, 3.0, 2.0]
    assert [item["index"] for item in body["data"]] == [0, 1, 2]
    assert body["usage"]["total_tokens"] == 39


async def test_pairs_that_do_not_match_are_422(client):
    response = await client.post("/score", json={"text_1": ["a", "b"], "text_2": DOCUMENTS})

    assert response.status_code == 422
    assert "1:1, 1:N or N:N" in response.json()["detail"]


@pytest.mark.parametrize("raw", [{"raw_scores": True}, {"use_activation": False}])
async def test_log_odds_are_given_when_asked_for(client, raw):
    body = await ask(client, "/v1/rerank", documents=["a 1", "b -3"], **raw)

    assert [result["relevance_score"] for result in body["results"]] == [1.0, -3.0]


async def test_details_say_what_was_read(client):
    long = "w " * 200 + "5"

    short, cut = (await ask(client, "/v1/rerank", documents=["a 9", long], return_details=True))["results"]

    assert (short["truncated"], short["windows"], short["log_odds"]) == (False, 1, 9.0)
    assert (cut["truncated"], cut["windows"]) == (True, 1)
    assert cut["best_window"][1] < len(long)


async def test_windows_read_all_of_a_long_document(client):
    long = "w " * 200 + "5"

    body = await ask(client, "/v1/rerank", documents=[long], long_documents="windows", return_details=True)

    [result] = body["results"]
    assert result["log_odds"] == 5.0
    assert result["windows"] > 1
    assert result["truncated"] is False


@pytest.mark.parametrize("wish", [{"truncate": False}, {"truncation": False}, {"long_documents": "error"}])
async def test_a_long_document_is_an_error_where_the_client_forbids_cutting(client, wish):
    response = await client.post("/v1/rerank", json={"query": "q", "documents": ["a", "w " * 200], **wish})

    assert response.status_code == 413
    assert response.json()["error"]["param"] == "documents[1]"


async def test_a_documents_tokens_can_be_limited():
    scorer = Oracle()
    async with app_client(scorer) as client:
        body = await ask(client, "/v1/rerank", documents=["a b c d", "x"], max_tokens_per_doc=2, return_details=True)

    assert scorer.scored[-2:] == ["a b", "x"]
    assert {result["index"]: result["truncated"] for result in body["results"]} == {0: True, 1: False}


@pytest.mark.parametrize("n_words", [1, 50, 89, 90, 500, 5_000])
async def test_a_limited_document_keeps_nearly_all_that_it_may(client, n_words):
    text = " ".join(f"w{i}" for i in range(n_words))

    body = await ask(client, "/v1/rerank", documents=[text], max_tokens_per_doc=50, return_details=True)

    kept = min(50, n_words)
    assert kept - 1 <= body["usage"]["prompt_tokens"] - 11 <= kept


@pytest.mark.parametrize("limit", [9, 10, 13, 14, 25, 95])
def test_a_limit_above_the_room_is_kept_where_long_texts_are_only_counted_at_their_beginning(limit):
    """Windows may read more than one room; a count above it is no more than "at least"."""
    text = " ".join("w" * (1 + i % 7) for i in range(100))

    def fit(texts):
        ends = [[match.end() for match in re.finditer(r"\S+", one)] for one in texts]
        return [Fit(min(len(each), 13), 10, [*each, len(one)][min(9, len(each))]) for one, each in zip(texts, ends)]

    [kept] = cut_to_tokens([text], fit, limit)

    assert text.startswith(kept)
    assert len(kept.split()) == limit


async def test_a_prompts_tokens_can_be_limited_and_only_the_document_gives_way():
    scorer = Oracle()
    async with app_client(scorer) as client:
        await ask(client, "/v1/rerank", documents=["a b c d"], truncate_prompt_tokens=13)
        await ask(client, "/v1/rerank", documents=["a b c d"], truncate_prompt_tokens=-1)
        response = await client.post(
            "/v1/rerank", json={"query": "q", "documents": ["a"], "truncate_prompt_tokens": 11}
        )

    assert scorer.scored[-2:] == ["a b", "a b c d"]
    assert response.status_code == 422
    assert response.json()["error"]["param"] == "truncate_prompt_tokens"


async def test_the_model_is_listed_and_described(client):
    models = (await client.get("/v1/models")).json()
    info = (await client.get("/info")).json()

    assert [model["id"] for model in models["data"]] == ["oracle"]
    assert models["data"][0]["max_model_len"] == info["max_input_length"] == MAX_LENGTH
    assert "reranker" in info["model_type"]


async def test_a_folders_place_on_this_machine_is_not_told():
    scorer = Oracle()
    scorer.name = "/srv/models/my-reranker"
    async with app_client(scorer) as client:
        body = await ask(client, "/v1/rerank", documents=["a"], model="my-reranker")

    assert body["model"] == "my-reranker"


def fitted(**key) -> Calibration:
    """Halves the log-odds of the oracle."""
    return Calibration(kind="platt", fitted_for={**Reranker(Oracle()).calibration_key(), **key}, a=0.5, b=0.0)


async def test_a_calibrated_server_answers_with_its_probabilities_and_drops_what_is_below_its_threshold():
    async with app_client(calibration=fitted(), threshold=0.7) as client:
        body = await ask(client, "/v1/rerank", documents=DOCUMENTS)
        mixedbread = await ask(client, "/v1/reranking", input=DOCUMENTS)
        pairs = await client.post("/score", json={"text_1": "q", "text_2": DOCUMENTS})

    assert [result["index"] for result in body["results"]] == [1, 2]
    assert body["results"][0]["relevance_score"] == pytest.approx(1 / (1 + 2.718281828**-1.5))
    assert [hit["index"] for hit in mixedbread["data"]] == [1, 2]
    assert len(pairs.json()["data"]) == 3, "a route that answers for every text keeps every text"


async def test_a_request_that_the_calibration_does_not_hold_for_is_refused():
    async with app_client(calibration=fitted()) as client:
        refused = await client.rerank(instruction="something else")

    assert refused.status_code == 422
    assert "calibrated for its own instruction" in refused.json()["error"]["message"]


async def test_a_calibration_of_another_model_ends_the_start():
    async with app_client(calibration=fitted(scorer="another")) as client:
        assert (await client.get("/health/ready")).status_code == 503


@pytest.mark.parametrize("path", ["/v1/reranking", "/v1/rerank"])
async def test_input_is_answered_as_mixedbread_does(client, path):
    body = await ask(client, path, input=DOCUMENTS, top_k=1, return_input=True)

    assert body["data"] == [{"index": 1, "score": P3, "object": "rank_result", "input": "b 3"}]
    assert (body["object"], body["top_k"], body["return_input"]) == ("list", 1, True)
    assert "input" not in (await ask(client, path, input=DOCUMENTS))["data"][0]


async def test_pinecones_header_is_answered_as_pinecone_does(client):
    request = {"query": "q", "documents": [{"text": text} for text in DOCUMENTS], "top_n": 1, "return_documents": True}

    response = await client.post("/rerank", json=request, headers={"X-Pinecone-API-Version": "2024-10"})

    assert response.json() == {
        "model": "oracle",
        "data": [{"index": 1, "score": P3, "document": {"text": "b 3"}}],
        "usage": {"rerank_units": 1},
    }
