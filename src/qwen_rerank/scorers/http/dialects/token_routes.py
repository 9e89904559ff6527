"""Routes that take whole prompts as token ids and tell how likely the two labels are.

Sent as ids, a prompt is exactly the recipe's whatever template the server was started with, and no text of a document
can become a control token. Read from the servers' sources in November 2026: vLLM `entrypoints/pooling/classify`,
`entrypoints/generate/generative_scoring`, `entrypoints/openai/completion`; SGLang `managers/io_struct.py`
(`GenerateReqInput`) and `managers/tokenizer_manager_score_mixin.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from qwen_rerank.scorers.http.answers import (
    HttpAnswer,
    ParsedAnswer,
    ScoreKind,
    finite_score,
    item_index,
    model_name,
    prompt_tokens,
    raise_protocol_error,
    read_results,
    result_items,
)

TOP_LOGPROBS = (
    20  # vLLM's default cap; a server too old to be asked for the two labels gives this many of the likeliest
)


@dataclass(frozen=True, slots=True)
class LabelIds:
    """Token ids of the two answers."""

    yes: int
    no: int


class TokenRoute:
    """One route.

    Attributes:
        path: Of the route.
        reserve: Tokens of the server's length that a prompt must leave free.
        kind: What the numbers are.
        honours_activation: Whether the request says if a sigmoid is wanted, which servers may ignore.
    """

    path: ClassVar[str]
    reserve: ClassVar[int] = 1
    kind: ClassVar[ScoreKind] = "logit"
    honours_activation: ClassVar[bool] = False

    def body(
        self, prompts: Sequence[list[int]], labels: LabelIds, *, model: str | None, logits: bool = True
    ) -> dict[str, Any]:
        """Return the JSON to send; `logits` False asks for probabilities where the route knows the difference."""
        raise NotImplementedError

    def read(self, answer: HttpAnswer, payload: Any, n: int, labels: LabelIds) -> ParsedAnswer:
        """Return the scores, in the order the prompts were sent."""
        raise NotImplementedError


class VllmClassify(TokenRoute):
    """A vLLM server with a classification head (`Qwen3ForSequenceClassification`)."""

    path = "/classify"
    reserve = 0
    honours_activation = True

    def body(
        self, prompts: Sequence[list[int]], labels: LabelIds, *, model: str | None, logits: bool = True
    ) -> dict[str, Any]:
        """Return the JSON to send."""
        return {**_named(model), "input": list(prompts), "add_special_tokens": False, "use_activation": not logits}

    def read(self, answer: HttpAnswer, payload: Any, n: int, labels: LabelIds) -> ParsedAnswer:
        """Return the scores."""
        scores = np.full(n, np.nan)
        for item in result_items(answer, payload, n):
            index = item_index(answer, item, n)
            values = item.get("probs")
            if not isinstance(values, list) or len(values) != 1:
                found = len(values) if isinstance(values, list) else "no"
                raise_protocol_error(
                    answer, f"{found} classes where a reranker has one (started with classifier_from_token?)"
                )
            if not np.isnan(scores[index]):
                raise_protocol_error(answer, f"index {index} twice")
            scores[index] = finite_score(answer, values[0], f"result {index}")
        return ParsedAnswer(scores, prompt_tokens(payload), model_name(payload))


class VllmGenerativeScoring(TokenRoute):
    """A vLLM server that generates. It cuts the end off a prompt that is too long, so none may be."""

    path = "/generative_scoring"
    kind = "probability"  # softmax over the two labels, in float64

    def body(
        self, prompts: Sequence[list[int]], labels: LabelIds, *, model: str | None, logits: bool = True
    ) -> dict[str, Any]:
        """Return the JSON to send."""
        shared = _shared_prefix(prompts)
        return {
            **_named(model),
            "query": prompts[0][:shared],
            "items": [ids[shared:] for ids in prompts],
            "label_token_ids": [labels.yes, labels.no],  # the score is the first one's
            "apply_softmax": True,
            "item_first": False,
            "add_special_tokens": False,
        }

    def read(self, answer: HttpAnswer, payload: Any, n: int, labels: LabelIds) -> ParsedAnswer:
        """Return the scores."""
        return read_results(answer, payload, n, score_keys=("score",))


class VllmCompletions(TokenRoute):
    """A vLLM server that generates but is too old for generative scoring."""

    path = "/v1/completions"

    def body(
        self, prompts: Sequence[list[int]], labels: LabelIds, *, model: str | None, logits: bool = True
    ) -> dict[str, Any]:
        """Return the JSON to send."""
        return {
            **_named(model),
            "prompt": list(prompts),
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": TOP_LOGPROBS,
            "logprob_token_ids": [labels.yes, labels.no],
            "return_tokens_as_token_ids": True,
            "add_special_tokens": False,
        }

    def read(self, answer: HttpAnswer, payload: Any, n: int, labels: LabelIds) -> ParsedAnswer:
        """Return the scores."""
        choices = payload.get("choices") if isinstance(payload, Mapping) else None
        scores = np.full(n, np.nan)
        for item in result_items(answer, choices, n):
            index = item_index(answer, item, n)
            if not np.isnan(scores[index]):
                raise_protocol_error(answer, f"index {index} twice")
            scores[index] = self._difference(answer, item, index, labels)
        return ParsedAnswer(scores, prompt_tokens(payload), model_name(payload))

    def _difference(self, answer: HttpAnswer, item: Mapping[str, Any], index: int, labels: LabelIds) -> float:
        logprobs = item.get("logprobs")
        steps = logprobs.get("top_logprobs") if isinstance(logprobs, Mapping) else None
        found = steps[0] if isinstance(steps, list) and steps and isinstance(steps[0], Mapping) else {}
        keys = (f"token_id:{labels.yes}", f"token_id:{labels.no}")
        if any(key not in found for key in keys):
            raise_protocol_error(
                answer, f"no log-probability of both labels for prompt {index}; the server may be too old"
            )
        yes, no = (finite_score(answer, found[key], f"prompt {index}") for key in keys)
        return yes - no


class SglangGenerate(TokenRoute):
    """An SGLang server started without `--is-embedding`."""

    path = "/generate"
    reserve = 8  # it keeps a few tokens of its context for itself

    def body(
        self, prompts: Sequence[list[int]], labels: LabelIds, *, model: str | None, logits: bool = True
    ) -> dict[str, Any]:
        """Return the JSON to send."""
        return {
            "input_ids": list(prompts),
            # Greedy: SGLang divides logits by the temperature before it takes log-probabilities.
            "sampling_params": {"max_new_tokens": 1, "temperature": 0},
            "return_logprob": True,
            "logprob_start_len": -1,
            "token_ids_logprob": [[labels.yes, labels.no]] * len(prompts),
            "stream": False,
        }

    def read(self, answer: HttpAnswer, payload: Any, n: int, labels: LabelIds) -> ParsedAnswer:
        """Return the scores."""
        items = result_items(answer, [payload] if n == 1 and isinstance(payload, Mapping) else payload, n)
        counts: list[int] = []
        scores = np.empty(n)
        for index, item in enumerate(items):
            meta = item.get("meta_info")
            meta = meta if isinstance(meta, Mapping) else {}
            if isinstance(count := meta.get("prompt_tokens"), int):
                counts.append(count)
            scores[index] = self._difference(answer, meta.get("output_token_ids_logprobs"), index, labels)
        return ParsedAnswer(scores, sum(counts) if len(counts) == n else None)

    def _difference(self, answer: HttpAnswer, steps: Any, index: int, labels: LabelIds) -> float:
        rows = steps[0] if isinstance(steps, list) and steps and isinstance(steps[0], list) else []
        found = {row[1]: row[0] for row in rows if isinstance(row, list) and len(row) >= 2 and isinstance(row[1], int)}
        if labels.yes not in found or labels.no not in found:
            raise_protocol_error(answer, f"no log-probability of both labels for prompt {index}")
        return finite_score(answer, found[labels.yes], f"prompt {index}") - finite_score(
            answer, found[labels.no], f"prompt {index}"
        )


def _named(model: str | None) -> dict[str, Any]:
    return {} if model is None else {"model": model}


def _shared_prefix(prompts: Sequence[list[int]]) -> int:
    """Return how many leading ids all prompts share, at least one id short of the shortest."""
    shortest = min(len(ids) for ids in prompts)
    first = prompts[0]
    for place in range(shortest - 1):
        if any(ids[place] != first[place] for ids in prompts):
            return place
    return shortest - 1
