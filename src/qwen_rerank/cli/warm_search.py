"""A search that a running `qwen-rerank serve --store` does: its models are loaded already, and its answer is shown as one of ours."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, TypeVar

from qwen_rerank.cli.show_passages import Answer
from qwen_rerank.errors import BackendRejectedError
from qwen_rerank.pipeline import TwoRounds
from qwen_rerank.scorers.http.answers import HttpAnswer, finite_score, parse, raise_protocol_error, read_beside
from qwen_rerank.scorers.http.scorer import check_key
from qwen_rerank.scorers.http.session import encode_json
from qwen_rerank.scorers.http.settings import HttpConfig
from qwen_rerank.scorers.http.transport import Transport
from qwen_rerank.types import Candidate, Document, RankedDocument

T = TypeVar("T")

PATH = "/v1/search"
_TIMEOUT_S = 120.0
_MOST_BYTES = 64 * 2**20  # the server's own limit of 8 million characters, of four bytes each, with the rest


def ask(url: str, wanted: Mapping[str, Any], *, api_key: str | None = None) -> tuple[TwoRounds, list[Answer]]:
    """Return both rounds of a search, and what is shown of it.

    Of candidates that are neither results nor moved out of them only the place is known.

    Args:
        url: The server's address.
        wanted: What is sent; None is left out.
        api_key: Sent as a bearer token.

    Raises:
        InvalidInputError: If the address or key is none.
        RerankServerError: If the server cannot be reached, refuses, or answers with something else.
    """
    config = HttpConfig(url=url, timeout_s=_TIMEOUT_S, max_answer_bytes=_MOST_BYTES)  # type: ignore[arg-type]
    transport = Transport(config, check_key(api_key, config.url))
    body = encode_json({name: value for name, value in wanted.items() if value is not None})

    async def asked() -> tuple[TwoRounds, list[Answer]]:
        deadline = asyncio.get_running_loop().time() + _TIMEOUT_S
        answer = await transport.post(PATH, body, deadline=deadline)
        return await read_beside(answer, lambda: read_answer(answer, int(wanted["top_k"])))

    try:
        return transport.submit(asked).result()
    except BackendRejectedError as exc:
        if exc.status == 404:
            exc.add_note("A store is searched by `qwen-rerank serve --store STORE` of this version or a later one.")
        raise
    finally:
        transport.close()


def read_answer(answer: HttpAnswer, top_k: int) -> tuple[TwoRounds, list[Answer]]:
    """Return what an answer of a server says.

    Raises:
        ProtocolError: If it is none.
    """
    payload = parse(answer)
    if not isinstance(payload, Mapping):
        raise_protocol_error(answer, "no object")
    count = _value(answer, payload, "candidates", int)
    if not 0 <= count <= top_k:
        raise_protocol_error(answer, f"{count} candidates where at most {top_k} were asked for")
    candidates = [Candidate(Document("", ""), None, rank) for rank in range(1, count + 1)]
    shown = [_answer(answer, item, candidates) for item in _items(answer, payload, "results")]
    moved = [_hit(answer, item, candidates, "beginning") for item in _items(answer, payload, "moved_out")]
    return TwoRounds(candidates, [*(one.hit for one in shown), *moved]), shown


def _answer(answer: HttpAnswer, item: Mapping[str, Any], candidates: list[Candidate]) -> Answer:
    hit = _hit(answer, item, candidates, "text")
    above, below = ([_neighbour(answer, one) for one in _items(answer, item, name)] for name in ("above", "below"))
    return Answer(hit, candidates[hit.index].rank, above, below)


def _hit(answer: HttpAnswer, item: Mapping[str, Any], candidates: list[Candidate], text: str) -> RankedDocument:
    """Return a result, and put its document where it was among the candidates."""
    index = _value(answer, item, "index", int)
    if not 0 <= index < len(candidates):
        raise_protocol_error(answer, f"index {index} where a place among {len(candidates)} candidates is expected")
    metadata = item.get("metadata")
    document = Document(
        _value(answer, item, "id", str),
        _value(answer, item, text, str),
        metadata if isinstance(metadata, dict) else {},
    )
    first, window = item.get("first_stage_score"), item.get("best_window")
    first = None if first is None else finite_score(answer, first, f"candidate {index}")
    candidates[index] = Candidate(document, first, _value(answer, item, "first_stage_rank", int))
    return RankedDocument(
        document,
        finite_score(answer, item.get("score"), f"result {index}"),
        finite_score(answer, item.get("log_odds", 0.0), f"result {index}"),
        _value(answer, item, "rank", int),
        index,
        first_stage_score=first,
        truncated=item.get("truncated") is True,
        windows=_value(answer, item, "windows", int) if "windows" in item else 1,
        best_window=_window(answer, window, len(document.text)),
    )


def _neighbour(answer: HttpAnswer, item: Mapping[str, Any]) -> Document:
    heading = _value(answer, item, "heading", str)
    return Document(_value(answer, item, "id", str), _value(answer, item, "text", str), {"heading": heading})


def _window(answer: HttpAnswer, value: object, length: int) -> tuple[int, int] | None:
    if value is None:
        return None
    if not (
        isinstance(value, list) and [type(one) for one in value] == [int, int] and 0 <= value[0] <= value[1] <= length
    ):
        raise_protocol_error(answer, f"best_window {answer.shown(value, 40)} in a text of {length} characters")
    return value[0], value[1]


def _items(answer: HttpAnswer, item: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    found = item.get(name, [])
    if not isinstance(found, list) or not all(isinstance(one, Mapping) for one in found):
        raise_protocol_error(answer, f"{name} that is no list of objects")
    return found


def _value(answer: HttpAnswer, item: Mapping[str, Any], name: str, kind: type[T]) -> T:
    value = item.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise_protocol_error(answer, f"{name} {answer.shown(value, 40)} where {kind.__name__} is expected")
    return value
