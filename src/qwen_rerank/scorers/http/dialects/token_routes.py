"""Routes that take whole prompts as token ids and tell how likely the two labels are.

Sent as ids, a prompt is exactly the recipe's whatever template the server was started with, and no text of a document
can become a control token. Read from the servers' sources in November 2026: vLLM `entrypoints/pooling/classify`,
`entrypoints/generate/generative_scoring`, `entrypoints/openai/completion`; SGLang `managers/io_struct.py`
(`GenerateReqInput`) and `managers/tokenizer_manager_score_mixin.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qwen_rerank.scorers.http.answers import (
    HttpAnswer,
    ParsedAnswer,
    finite_score,
    raise_protocol_error,
    read_results,
    result_items,
    scores_by_index,
)
from qwen_rerank.scorers.http.dialects.dialect import ServerRequest, TokenRoute

# vLLM's default cap; a server too old to be asked for the two labels gives this many of the likeliest.
TOP_LOGPROBS = 20


class VllmClassify(TokenRoute):
    """A vLLM server with a classification head (`Qwen3ForSequenceClassification`)."""

    path = "/classify"
    reserve = 0
    may_ignore_logits = True

    def _fields(self, request: ServerRequest) -> dict[str, Any]:
        return {"input": list(request.prompts), "add_special_tokens": False, "use_activation": not request.logits}

    def _scores(self, answer: HttpAnswer, payload: Any, request: ServerRequest) -> np.ndarray:
        def score(item: Mapping[str, Any], index: int) -> float:
            values = item.get("probs")
            if not isinstance(values, list) or len(values) != 1:
                found = len(values) if isinstance(values, list) else "no"
                raise_protocol_error(
                    answer, f"{found} classes where a reranker has one (started with classifier_from_token?)"
                )
            return finite_score(answer, values[0], f"result {index}")

        return scores_by_index(answer, result_items(answer, payload, len(request)), score)


class VllmGenerativeScoring(TokenRoute):
    """A vLLM server that generates. It cuts the end off a prompt that is too long, so none may be."""

    path = "/generative_scoring"
    kind = "probability"  # softmax over the two labels, in float64

    def _fields(self, request: ServerRequest) -> dict[str, Any]:
        shared = _shared_prefix(request.prompts)
        return {
            "query": request.prompts[0][:shared],
            "items": [ids[shared:] for ids in request.prompts],
            "label_token_ids": [request.yes_id, request.no_id],  # the score is the first one's
            "apply_softmax": True,
            "item_first": False,
            "add_special_tokens": False,
        }

    def _scores(self, answer: HttpAnswer, payload: Any, request: ServerRequest) -> np.ndarray:
        return read_results(answer, payload, len(request), score_keys=("score",)).scores


class VllmCompletions(TokenRoute):
    """A vLLM server that generates but is too old for generative scoring."""

    path = "/v1/completions"

    def _fields(self, request: ServerRequest) -> dict[str, Any]:
        return {
            "prompt": list(request.prompts),
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": TOP_LOGPROBS,
            "logprob_token_ids": [request.yes_id, request.no_id],
            "return_tokens_as_token_ids": True,
            "add_special_tokens": False,
        }

    def _scores(self, answer: HttpAnswer, payload: Any, request: ServerRequest) -> np.ndarray:
        def score(item: Mapping[str, Any], index: int) -> float:
            logprobs = item.get("logprobs")
            steps = logprobs.get("top_logprobs") if isinstance(logprobs, Mapping) else None
            found = steps[0] if isinstance(steps, list) and steps and isinstance(steps[0], Mapping) else {}
            yes, no = found.get(f"token_id:{request.yes_id}"), found.get(f"token_id:{request.no_id}")
            return _difference(answer, yes, no, index)

        choices = payload.get("choices") if isinstance(payload, Mapping) else None
        return scores_by_index(answer, result_items(answer, choices, len(request)), score)


class SglangGenerate(TokenRoute):
    """An SGLang server started without `--is-embedding`."""

    path = "/generate"
    reserve = 8  # it keeps a few tokens of its context for itself

    def body(self, request: ServerRequest) -> dict[str, Any]:
        """Return the JSON to send; the route takes no model's name."""
        return {
            "input_ids": list(request.prompts),
            # Greedy: SGLang divides logits by the temperature before it takes log-probabilities.
            "sampling_params": {"max_new_tokens": 1, "temperature": 0},
            "return_logprob": True,
            "logprob_start_len": -1,
            "token_ids_logprob": [[request.yes_id, request.no_id]] * len(request),
            "stream": False,
        }

    def read(self, answer: HttpAnswer, payload: Any, request: ServerRequest) -> ParsedAnswer:
        """Return the scores; prompts and their token counts stand in the order they were sent."""
        n = len(request)
        items = result_items(answer, [payload] if n == 1 and isinstance(payload, Mapping) else payload, n)
        metas = [meta if isinstance(meta := item.get("meta_info"), Mapping) else {} for item in items]
        counts = [count for meta in metas if isinstance(count := meta.get("prompt_tokens"), int)]
        scores = np.empty(n)
        for index, meta in enumerate(metas):
            steps = meta.get("output_token_ids_logprobs")
            rows = steps[0] if isinstance(steps, list) and steps and isinstance(steps[0], list) else []
            found = {
                row[1]: row[0] for row in rows if isinstance(row, list) and len(row) >= 2 and isinstance(row[1], int)
            }
            scores[index] = _difference(answer, found.get(request.yes_id), found.get(request.no_id), index)
        return ParsedAnswer(scores, sum(counts) if len(counts) == n else None)


def _difference(answer: HttpAnswer, yes: Any, no: Any, index: int) -> float:
    """Return how much likelier the one label is than the other, in log-odds."""
    if yes is None or no is None:
        raise_protocol_error(answer, f"no log-probability of both labels for prompt {index}; the server may be too old")
    return finite_score(answer, yes, f"prompt {index}") - finite_score(answer, no, f"prompt {index}")


def _shared_prefix(prompts: Sequence[list[int]]) -> int:
    """Return how many leading ids all prompts share, at least one id short of the shortest."""
    shortest = min(len(ids) for ids in prompts)
    first = prompts[0]
    for place in range(shortest - 1):
        if any(ids[place] != first[place] for ids in prompts):
            return place
    return shortest - 1
