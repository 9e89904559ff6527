"""`Session`: a server's dialect, longest prompt, route and scale, found out before the first score."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from qwen_rerank.errors import BackendRejectedError, InvalidInputError, ProtocolError
from qwen_rerank.models.folder import read_tokenizer
from qwen_rerank.models.names import find_tokenizer
from qwen_rerank.prompt import PromptEncoder, PromptSpec, PromptTokenizer
from qwen_rerank.scorers.http import dialects
from qwen_rerank.scorers.http.answers import ScoreKind, parse, refusal
from qwen_rerank.scorers.http.dialects.dialect import Dialect, TextRequest
from qwen_rerank.scorers.http.dialects.token_routes import LabelIds, TokenRoute
from qwen_rerank.scorers.http.settings import HttpConfig
from qwen_rerank.scorers.http.transport import Transport

logger = logging.getLogger(__name__)

TOKEN_BATCH = 64  # prompts of one request: large enough to fill a GPU, small enough to spread over servers
TEMPLATE_RESERVE = 32  # tokens that a server's own template may add to the recipe's
_PROBE = ("What is the capital of China?", "The capital of China is Beijing.")


@dataclass(slots=True)
class Session:
    """A server as it is known after it was asked what it is.

    Attributes:
        dialect: What it speaks.
        route: Where whole prompts go as token ids; None where the server's template is trusted.
        encoder: Builds or at least measures prompts; None without a tokenizer.
        kind: What its numbers are.
        logits: Whether it is asked for logits.
        max_batch: Documents of one request; lowered when it says that its limit is lower.
        length: Tokens of its longest prompt, or None where it does not say.
        models: The names it serves.
    """

    dialect: Dialect
    route: TokenRoute | None
    encoder: PromptEncoder | None
    kind: ScoreKind
    logits: bool
    max_batch: int
    length: int | None
    models: tuple[str, ...]

    @property
    def path(self) -> str:
        """The path that is asked."""
        return self.route.path if self.route is not None else self.dialect.path


def load_encoder(config: HttpConfig, length: int | None = None) -> PromptEncoder | None:
    """Return the encoder of the configured tokenizer, or None; `length` is an upper limit on `max_length`."""
    if config.tokenizer is None:
        return None
    return PromptEncoder(
        _tokenizer(config.tokenizer),
        spec=PromptSpec.for_template(config.template),
        instruction=config.instruction,
        max_length=config.max_length if length is None else min(config.max_length, length),
    )


@lru_cache(maxsize=4)
def _tokenizer(source: str) -> PromptTokenizer:
    path = find_tokenizer(source)
    return PromptTokenizer(read_tokenizer(path), source=str(path))


async def open_session(config: HttpConfig, transport: Transport, deadline: float) -> Session:
    """TextRequest the server what it is.

    Raises:
        InvalidInputError: If the dialect cannot be found out, or cannot do what the configuration asks.
        RerankServerError: If the server cannot be reached or refuses.
    """
    name = config.dialect if config.dialect != "auto" else dialects.of_host(config.url[0])
    listing = (
        None if name in dialects.HOSTED else await _ask(transport, "/v1/models", deadline, open_question=name is None)
    )
    dialect = dialects.DIALECTS[name or await _detect(config.url[0], transport, listing, deadline)]
    length, models = _length(listing), _models(listing)
    if _wants_tokens(config, dialect):
        return await _token_session(config, transport, dialect, length, models, deadline)
    dialect.check(model=config.model, instruction=config.instruction)
    encoder = await asyncio.to_thread(load_encoder, config, None if length is None else length - TEMPLATE_RESERVE)
    max_batch = config.max_batch or dialect.max_batch
    if config.scores != "auto":
        return Session(dialect, None, encoder, config.scores, False, max_batch, length, models)
    kind: ScoreKind = "logit" if dialect.can_give_logits else dialect.kind
    session = Session(dialect, None, encoder, kind, dialect.can_give_logits, max_batch, length, models)
    if dialect.may_ignore_logits:
        session.kind = await _confirm_logits(lambda logits: _probe_text(session, config, transport, logits, deadline))
    return session


def _wants_tokens(config: HttpConfig, dialect: Dialect) -> bool:
    possible = bool(dialect.token_routes) and config.tokenizer is not None and config.scores == "auto"
    if config.mode == "token-ids" and not possible:
        raise InvalidInputError(f"a {dialect.name} server takes no token ids; use mode='server-template'.")
    if config.mode == "auto" and dialect.token_routes and config.tokenizer is None:
        logger.warning(
            "%s: without tokenizer= the server's own template makes the prompts, and the scores are as right or wrong as it "
            "is; give the checkpoint's folder or hub name as tokenizer=, or run `qwen-rerank check` on the server.",
            config.url[0],
        )
    return possible and config.mode != "server-template"


async def _token_session(
    config: HttpConfig,
    transport: Transport,
    dialect: Dialect,
    length: int | None,
    models: tuple[str, ...],
    deadline: float,
) -> Session:
    refused: list[str] = []
    for route in dialect.token_routes:
        encoder = await asyncio.to_thread(load_encoder, config, None if length is None else length - route.reserve)
        if encoder is None:
            break
        session = Session(dialect, route, encoder, route.kind, True, config.max_batch or TOKEN_BATCH, length, models)

        async def probe(logits: bool, session: Session = session) -> float:
            return await _probe_tokens(session, config, transport, logits, deadline)

        try:
            if route.honours_activation:
                session.kind = await _confirm_logits(probe)
            else:
                await probe(True)
        except BackendRejectedError as exc:
            if not _is_missing(exc):
                raise
            refused.append(f"{route.path} ({exc.status})")
            continue
        return session
    raise InvalidInputError(
        f"{config.url[0]} has none of the routes that take token ids: {', '.join(refused)}; start it as the README shows, or "
        "use mode='server-template'."
    )


def _is_missing(exc: BackendRejectedError) -> bool:
    """Whether a refusal means that the server lacks the route or cannot do it with this model."""
    unsupported = exc.status in (400, 501) and "support" in str(exc).lower()
    return unsupported or (exc.status in (404, 405) and exc.code != "NotFoundError")


async def _confirm_logits(probe: Callable[[bool], Awaitable[float]]) -> ScoreKind:
    """Return "logit" if the server leaves the sigmoid out when told to, "probability" if it ignores that.

    Old vLLM releases know the setting by another name and ignore ours without a word.
    """
    raw, activated = await probe(True), await probe(False)
    to_sigmoid = abs(1.0 / (1.0 + np.exp(-np.clip(raw, -60, 60))) - activated)
    return "probability" if abs(raw - activated) < to_sigmoid and 0.0 <= raw <= 1.0 else "logit"


async def _probe_tokens(
    session: Session, config: HttpConfig, transport: Transport, logits: bool, deadline: float
) -> float:
    encoder, route = session.encoder, session.route
    if encoder is None or route is None:
        raise InvalidInputError("mode 'token-ids' needs a tokenizer.")
    [prompt] = encoder.encode(_PROBE[0], [_PROBE[1]])
    labels = LabelIds(encoder.yes_id, encoder.no_id)
    body = route.body([prompt.ids.tolist()], labels, model=config.model, logits=logits)
    answer = await transport.post(route.path, encode_json(body), deadline=deadline)
    return float(route.read(answer, parse(answer), 1, labels).scores[0])


async def _probe_text(
    session: Session, config: HttpConfig, transport: Transport, logits: bool, deadline: float
) -> float:
    ask = TextRequest(
        query=_PROBE[0], documents=[_PROBE[1]], model=config.model, instruction=config.instruction, logits=logits
    )
    body = session.dialect.body(ask)
    answer = await transport.post(session.dialect.path, encode_json(body), deadline=deadline)
    return float(session.dialect.read(answer, parse(answer), 1).scores[0])


async def _detect(url: str, transport: Transport, listing: Any, deadline: float) -> str:
    name = dialects.of_models(listing) or dialects.of_models(await _ask(transport, "/models", deadline))
    name = name or dialects.of_info(await _ask(transport, "/info", deadline))
    if name is None:
        raise InvalidInputError(
            f"{url} does not say what it is; name it with dialect=, one of {', '.join(map(repr, dialects.DIALECTS))}."
        )
    return name


async def _ask(transport: Transport, path: str, deadline: float, *, open_question: bool = True) -> Any:
    """Return the JSON at `path`, or None where there is none.

    A wrong key is said at once where the answer decides what the server is; else the real request will say it.
    """
    try:
        answer = await transport.get(path, deadline=deadline)
        if answer.status in (401, 403) and open_question:
            raise refusal(answer)
        return parse(answer) if answer.status == 200 else None
    except ProtocolError:
        return None


def _cards(listing: Any) -> list[Mapping[str, Any]]:
    cards = listing.get("data") if isinstance(listing, Mapping) else None
    return [card for card in cards if isinstance(card, Mapping)] if isinstance(cards, list) else []


def _length(listing: Any) -> int | None:
    lengths = [card.get("max_model_len") for card in _cards(listing)]
    known = [n for n in lengths if isinstance(n, int) and not isinstance(n, bool) and n > 0]
    return min(known) if known else None


def _models(listing: Any) -> tuple[str, ...]:
    return tuple(card["id"] for card in _cards(listing) if isinstance(card.get("id"), str))


def encode_json(value: Any) -> bytes:
    """Return compact UTF-8 JSON."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
