"""What each server sends and expects, for stub servers: shapes, field names, limits and errors as their sources have them.

Every responder refuses fields that its server does not know the meaning of, so that a client that sends another
server's names is found out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

from tests.scorers.http.stub import Reply, Request

Oracle = Callable[[str, str, str | None], float]  # query, document, instruction → log-odds
TokenOracle = Callable[[Sequence[int]], float]  # ids of a prompt → log-odds

MODEL = "Qwen/Qwen3-Reranker-0.6B"


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def table(query: str, document: str, instruction: str | None) -> float:
    """Log-odds that tell query, document and instruction apart: documents end in their number, or count as 0."""
    last = document.split()[-1] if document.split() else ""
    number = float(last) if last.lstrip("-").replace(".", "", 1).isdecimal() else 0.0
    return number + 0.001 * len(query) + (0.25 if instruction else 0.0)


def of_ids(ids: Sequence[int]) -> float:
    """Log-odds that depend on every token and its place."""
    value = 0
    for token in ids:
        value = (value * 31 + int(token)) % 1_000_003
    return value / 1_000_003 * 12 - 6


def ranked(query: str, documents: Sequence[str], instruction: str | None, oracle: Oracle) -> list[tuple[int, float]]:
    scores = [(i, oracle(query, document, instruction)) for i, document in enumerate(documents)]
    return sorted(scores, key=lambda item: -item[1])


def known(body: dict[str, Any], *fields: str) -> None:
    unknown = set(body) - set(fields)
    assert not unknown, f"fields that this server does not have: {unknown}"


class Dialect:
    """One server; `handle` answers a request."""

    owner: str | None = None
    path = "/v1/rerank"
    models = "/v1/models"
    max_model_len: int | None = None

    def __init__(self, oracle: Oracle = table) -> None:
        self.oracle = oracle
        self.problem: str | None = None

    def handle(self, request: Request) -> Any:
        if request.method == "GET":
            if request.path == self.models and self.owner is not None:
                card = {"id": MODEL, "object": "model", "owned_by": self.owner}
                return {
                    "object": "list",
                    "data": [card | ({"max_model_len": self.max_model_len} if self.max_model_len else {})],
                }
            return self.info(request)
        try:
            return self.post(request)
        except AssertionError as exc:
            self.problem = str(exc)
            return Reply(418, {"message": str(exc)})

    def info(self, request: Request) -> Any:
        return Reply(404, {"detail": "Not Found"})

    def post(self, request: Request) -> Any:
        if request.path != self.path:
            return Reply(404, {"detail": "Not Found"})
        assert request.headers["content-type"] == "application/json"
        return self.rerank(request.json)

    def rerank(self, body: dict[str, Any]) -> Any:
        raise NotImplementedError


class Vllm(Dialect):
    """A classifier server; `old` releases do not know `use_activation`."""

    owner = "vllm"
    max_model_len = 512

    def __init__(
        self, oracle: Oracle = table, tokens: TokenOracle = of_ids, *, old: bool = False, kind: str = "classify"
    ) -> None:
        super().__init__(oracle)
        self.tokens, self.old, self.kind = tokens, old, kind

    def post(self, request: Request) -> Any:
        routes = {
            "classify": {"/classify": self.classify, "/v1/rerank": self.rerank, "/rerank": self.rerank},
            "generate": {"/generative_scoring": self.generative, "/v1/completions": self.completions},
            "old generate": {"/v1/completions": self.completions},
        }[self.kind]
        if request.path not in routes:
            return Reply(404, {"detail": "Not Found"})
        body = request.json
        if body.get("model") not in (None, MODEL):
            message = f"The model `{body['model']}` does not exist."
            return Reply(404, {"error": {"message": message, "type": "NotFoundError", "param": "model", "code": 404}})
        return routes[request.path](body)

    def activate(self, body: dict[str, Any], log_odds: float) -> float:
        wants_logit = body.get("use_activation") is False and not self.old
        return log_odds if wants_logit else sigmoid(log_odds)

    def rerank(self, body: dict[str, Any]) -> Any:
        known(body, "model", "query", "documents", "top_n", "use_activation", "instruction", "max_tokens_per_doc")
        order = ranked(body["query"], body["documents"], body.get("instruction"), self.oracle)
        return {
            "id": "rerank-1",
            "model": MODEL,
            "usage": {"prompt_tokens": 10, "total_tokens": 10},
            "results": [
                {
                    "index": i,
                    "document": {"text": body["documents"][i], "multi_modal": None},
                    "relevance_score": self.activate(body, score),
                }
                for i, score in order
            ],
        }

    def classify(self, body: dict[str, Any]) -> Any:
        known(body, "model", "input", "add_special_tokens", "use_activation")
        if any(len(ids) > self.max_model_len for ids in body["input"]):
            return Reply(
                400,
                {
                    "error": {
                        "message": "This model's maximum context length is 512 tokens.",
                        "type": "BadRequestError",
                        "code": 400,
                    }
                },
            )
        data = [
            {"index": i, "label": "LABEL_0", "probs": [self.activate(body, self.tokens(ids))], "num_classes": 1}
            for i, ids in enumerate(body["input"])
        ]
        count = sum(map(len, body["input"]))
        usage = {"prompt_tokens": count, "total_tokens": count, "completion_tokens": 0, "prompt_tokens_details": None}
        return {"id": "classify-1", "object": "list", "created": 1, "model": MODEL, "data": data, "usage": usage}

    def generative(self, body: dict[str, Any]) -> Any:
        known(body, "model", "query", "items", "label_token_ids", "apply_softmax", "item_first", "add_special_tokens")
        assert body["label_token_ids"] == [9693, 2152]
        assert body["apply_softmax"] is True
        prompts = [(body["query"] + item)[: self.max_model_len - 1] for item in body["items"]]
        data = [{"index": i, "object": "score", "score": sigmoid(self.tokens(ids))} for i, ids in enumerate(prompts)]
        count = sum(map(len, prompts))
        return {
            "id": "g",
            "object": "list",
            "created": 1,
            "model": MODEL,
            "data": data,
            "usage": {"prompt_tokens": count, "total_tokens": count},
        }

    def completions(self, body: dict[str, Any]) -> Any:
        known(
            body, "model", "prompt", "max_tokens", "temperature", "logprobs", "logprob_token_ids",
            "return_tokens_as_token_ids", "add_special_tokens",
        )  # fmt: skip
        choices = []
        for i, ids in enumerate(body["prompt"]):
            log_odds = self.tokens(ids)
            top = {"token_id:9693": math.log(sigmoid(log_odds)), "token_id:2152": math.log(sigmoid(-log_odds))}
            logprobs = {
                "text_offset": [0],
                "token_logprobs": [-0.1],
                "tokens": ["token_id:9693"],
                "top_logprobs": [top],
            }
            choices.append({"index": i, "text": "yes", "logprobs": logprobs, "finish_reason": "length"})
        count = sum(map(len, body["prompt"]))
        usage = {"prompt_tokens": count, "total_tokens": count + len(choices), "completion_tokens": len(choices)}
        return {
            "id": "cmpl-1",
            "object": "text_completion",
            "created": 1,
            "model": MODEL,
            "choices": choices,
            "usage": usage,
        }


class Sglang(Dialect):
    owner = "sglang"
    max_model_len = 512

    def __init__(self, oracle: Oracle = table, tokens: TokenOracle = of_ids) -> None:
        super().__init__(oracle)
        self.tokens = tokens

    def post(self, request: Request) -> Any:
        routes = {"/v1/rerank": self.rerank, "/generate": self.generate}
        return routes[request.path](request.json) if request.path in routes else Reply(404, {"detail": "Not Found"})

    def rerank(self, body: dict[str, Any]) -> Any:
        known(body, "model", "query", "documents", "instruct", "top_n", "return_documents")
        if any(not document.strip() for document in body["documents"]):
            message = "Each document cannot be empty or whitespace only"
            return Reply(
                400, {"object": "error", "message": message, "type": "BadRequestError", "param": None, "code": 400}
            )
        order = ranked(body["query"], body["documents"], body.get("instruct"), self.oracle)
        items = [
            {"score": sigmoid(score), "document": body["documents"][i], "index": i, "meta_info": None}
            for i, score in order
        ]
        return (
            items
            if body.get("return_documents", True)
            else [{k: v for k, v in item.items() if k != "document"} for item in items]
        )

    def generate(self, body: dict[str, Any]) -> Any:
        known(
            body, "input_ids", "sampling_params", "return_logprob", "logprob_start_len", "token_ids_logprob", "stream"
        )
        assert body["return_logprob"] is True
        assert len(body["token_ids_logprob"]) == len(body["input_ids"])
        out = []
        for ids, labels in zip(body["input_ids"], body["token_ids_logprob"], strict=True):
            log_odds = self.tokens(ids)
            logprob = {9693: math.log(sigmoid(log_odds)), 2152: math.log(sigmoid(-log_odds))}
            step = [[logprob[label], label, None] for label in labels]
            meta = {"id": "x", "prompt_tokens": len(ids), "completion_tokens": 1, "output_token_ids_logprobs": [step]}
            out.append({"text": "yes", "output_ids": [9693], "meta_info": meta})
        return out


class Tei(Dialect):
    path = "/rerank"
    limit = 32

    def info(self, request: Request) -> Any:
        if request.path == "/info":
            return {
                "model_id": "BAAI/bge-reranker-v2-m3",
                "max_client_batch_size": 32,
                "max_input_length": 512,
                "version": "1.9.3",
            }
        return Reply(404, body=b"")

    def rerank(self, body: dict[str, Any]) -> Any:
        known(body, "query", "texts", "truncate", "truncation_direction", "raw_scores", "return_text")
        if (n := len(body["texts"])) > self.limit:
            return Reply(
                422, {"error": f"batch size {n} > maximum allowed batch size {self.limit}", "error_type": "validation"}
            )
        order = ranked(body["query"], body["texts"], None, self.oracle)
        return [{"index": i, "score": score if body["raw_scores"] else sigmoid(score)} for i, score in order]


class LlamaCpp(Dialect):
    """Old builds answer in input order."""

    owner = "llamacpp"

    def rerank(self, body: dict[str, Any]) -> Any:
        known(body, "model", "query", "documents", "top_n")
        order = sorted(ranked(body["query"], body["documents"], None, self.oracle))
        results = [{"index": i, "relevance_score": sigmoid(score)} for i, score in order]
        return {"model": "m", "object": "list", "usage": {"prompt_tokens": 9, "total_tokens": 9}, "results": results}


class Infinity(Dialect):
    owner = "infinity"
    path = "/rerank"
    models = "/models"

    def rerank(self, body: dict[str, Any]) -> Any:
        known(body, "query", "documents", "return_documents", "raw_scores", "model", "top_n")
        order = ranked(body["query"], body["documents"], None, self.oracle)
        results = [
            {"relevance_score": score if body["raw_scores"] else sigmoid(score), "index": i, "document": None}
            for i, score in order
        ]
        usage = {"prompt_tokens": 9, "total_tokens": 9}
        return {"object": "rerank", "id": "infinity-1", "model": "m", "created": 1, "usage": usage, "results": results}


class Xinference(Dialect):
    owner = "xinference"

    def rerank(self, body: dict[str, Any]) -> Any:
        known(body, "model", "query", "documents", "top_n", "return_documents", "return_len", "kwargs")
        assert "model" in body
        assert isinstance(body.get("kwargs", "{}"), str)
        instruction = json.loads(body.get("kwargs", "{}")).get("instruction")
        order = ranked(body["query"], body["documents"], instruction, self.oracle)
        results = [{"index": i, "relevance_score": sigmoid(score), "document": None} for i, score in order]
        tokens = {"input_tokens": 9, "output_tokens": 0} if body.get("return_len") else None
        meta = {"api_version": None, "billed_units": None, "tokens": tokens, "warnings": None}
        return {"id": "1", "results": results, "meta": meta}


class Cohere(Dialect):
    path = "/v2/rerank"

    def rerank(self, body: dict[str, Any]) -> Any:
        known(body, "model", "query", "documents", "top_n", "max_tokens_per_doc", "priority")
        assert "model" in body
        assert all(isinstance(document, str) for document in body["documents"])
        order = ranked(body["query"], body["documents"], None, self.oracle)[: body["top_n"]]
        results = [{"index": i, "relevance_score": sigmoid(score)} for i, score in order]
        return {
            "id": "1",
            "results": results,
            "meta": {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}},
        }


class Jina(Dialect):
    def rerank(self, body: dict[str, Any]) -> Any:
        known(body, "model", "query", "documents", "top_n", "return_documents")
        order = ranked(body["query"], body["documents"], None, self.oracle)[: body["top_n"]]
        results = [{"index": i, "relevance_score": sigmoid(score)} for i, score in order]
        return {"model": body["model"], "usage": {"total_tokens": 9}, "results": results}


class Voyage(Dialect):
    def rerank(self, body: dict[str, Any]) -> Any:
        known(body, "model", "query", "documents", "top_k", "return_documents", "truncation")
        order = ranked(body["query"], body["documents"], None, self.oracle)[: body["top_k"]]
        data = [{"index": i, "relevance_score": sigmoid(score)} for i, score in order]
        return {"object": "list", "data": data, "model": body["model"], "usage": {"total_tokens": 9}}


class QwenRerank(Dialect):
    owner = "qwen-rerank"

    def rerank(self, body: dict[str, Any]) -> Any:
        known(body, "model", "query", "documents", "return_documents", "raw_scores", "instruction")
        order = ranked(body["query"], body["documents"], body.get("instruction"), self.oracle)
        results = [
            {"index": i, "relevance_score": score if body["raw_scores"] else sigmoid(score)} for i, score in order
        ]
        return {
            "id": "1",
            "model": MODEL,
            "results": results,
            "usage": {"prompt_tokens": 9, "total_tokens": 9},
            "meta": {},
        }


SERVERS: dict[str, type[Dialect]] = {
    "vllm": Vllm, "sglang": Sglang, "tei": Tei, "llamacpp": LlamaCpp, "infinity": Infinity, "xinference": Xinference,
    "cohere": Cohere, "jina": Jina, "voyage": Voyage, "qwen-rerank": QwenRerank,
}  # fmt: skip
