"""Rerank servers over a small checkpoint that make the mistakes real servers make; vLLM's shapes on the wire."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.reference import INSTRUCTION, PREFIX, SUFFIX, reference_body
from tests.scorers.http.stub import Reply, Request

Render = Callable[[str, str, str | None], str]


def recipe(query: str, document: str, instruction: str | None) -> str:
    return PREFIX + reference_body(query, document, instruction=instruction) + SUFFIX


def no_template(query: str, document: str, instruction: str | None) -> str:
    return query + document


def newline_short(query: str, document: str, instruction: str | None) -> str:
    return recipe(query, document, instruction)[:-1]


def sglang_template(query: str, document: str, instruction: str | None) -> str:
    end = "<|im_end|>\n<|im_start|>assistant\n"
    return PREFIX + reference_body(query, document, instruction=instruction or INSTRUCTION + ".") + end


def hub_template(query: str, document: str, instruction: str | None) -> str:
    return recipe("", "", instruction)


def two_newlines(query: str, document: str, instruction: str | None) -> str:
    return PREFIX + reference_body(query, document, template="vllm", instruction=instruction) + SUFFIX


def repository_instruction(query: str, document: str, instruction: str | None) -> str:
    return recipe(query, document, instruction or "Given the user query, retrieval the relevant passages")


def suffix_cut(query: str, document: str, instruction: str | None) -> str:
    return PREFIX + reference_body(query, document, instruction=instruction)


def ignores_instruction(query: str, document: str, instruction: str | None) -> str:
    return recipe(query, document, None)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


class Model:
    """A checkpoint as a careless server reads it: rendered text with control strings parsed."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.yes, self.no = self.tokenizer.convert_tokens_to_ids(["yes", "no"])

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def log_odds(self, ids: Sequence[int], *, from_embedding: bool = False) -> float:
        rows = self.model.get_input_embeddings().weight if from_embedding else self.model.lm_head.weight
        with torch.inference_mode():
            state = self.model.model(input_ids=torch.tensor([list(ids)])).last_hidden_state[0, -1]
            return float(state @ (rows[self.yes] - rows[self.no]))


class FaultyServer:
    """A vLLM-like server; every argument is a fault."""

    def __init__(
        self,
        model: Model,
        *,
        render: Render = recipe,
        from_embedding: bool = False,
        activate: Callable[[float], float] = sigmoid,
        length: int = 40_960,
        cuts: str = "refuses",
        name: str = "small",
        noise: float = 0.0,
    ) -> None:
        self.model, self.render, self.from_embedding, self.activate = model, render, from_embedding, activate
        self.length, self.cuts, self.name, self.noise = length, cuts, name, noise

    def handle(self, request: Request) -> Any:
        routes = {"/v1/models": self.models, "/v1/rerank": self.rerank, "/classify": self.classify}
        if request.path not in routes:
            return Reply(404, {"detail": "Not Found"})
        return routes[request.path](request)

    def models(self, request: Request) -> Any:
        return {"object": "list", "data": [{"id": self.name, "owned_by": "vllm", "max_model_len": self.length}]}

    def rerank(self, request: Request) -> Any:
        body = request.json
        prompts = [
            self.model.ids(self.render(body["query"], text, body.get("instruction"))) for text in body["documents"]
        ]
        if any(len(ids) > self.length for ids in prompts):
            if self.cuts == "refuses":
                return Reply(
                    400, {"error": {"message": f"maximum context length is {self.length}", "type": "BadRequestError"}}
                )
            prompts = [ids[: self.length] for ids in prompts]
        scores = [self.score(ids, i) for i, ids in enumerate(prompts)]
        results = [
            {"index": i, "document": {"text": body["documents"][i]}, "relevance_score": score}
            for i, score in sorted(enumerate(scores), key=lambda item: -item[1])
        ]
        count = sum(map(len, prompts))
        return {
            "id": "1",
            "model": self.name,
            "usage": {"prompt_tokens": count, "total_tokens": count},
            "results": results,
        }

    def score(self, ids: Sequence[int], place: int) -> float:
        log_odds = self.model.log_odds(ids, from_embedding=self.from_embedding)
        return self.activate(log_odds + self.noise * (-1) ** place)

    def classify(self, request: Request) -> Any:
        body = request.json
        scores = [self.model.log_odds(ids, from_embedding=self.from_embedding) for ids in body["input"]]
        values = [score if body.get("use_activation") is False else sigmoid(score) for score in scores]
        data = [{"index": i, "label": None, "probs": [value], "num_classes": 1} for i, value in enumerate(values)]
        count = sum(map(len, body["input"]))
        return {"id": "1", "object": "list", "model": self.name, "data": data, "usage": {"prompt_tokens": count}}
