"""`Session`: a server's dialect, longest prompt, route and scale, found out before the first score."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from typing import Any, TypeVar

import numpy as np

from qwen_rerank.errors import BackendRejectedError, InvalidInputError, ProtocolError
from qwen_rerank.models.folder import read_tokenizer
from qwen_rerank.models.names import find_tokenizer
from qwen_rerank.prompt import PromptEncoder, PromptSpec, PromptTokenizer
from qwen_rerank.scorers.http import dialects
from qwen_rerank.scorers.http.answers import HttpAnswer, ParsedAnswer, ScoreKind, parse, read_beside, refusal
from qwen_rerank.scorers.http.dialects.dialect import Dialect, ServerRequest, TokenRoute
from qwen_rerank.scorers.http.settings import HttpConfig
from qwen_rerank.scorers.http.transport import Transport

logger = logging.getLogger(__name__)
T = TypeVar("T")

TOKEN_BATCH = 64  # prompts of one request: large enough to fill a GPU, small enough to spread over servers
TEMPLATE_RESERVE = 32  # tokens that a server's own template may add to the recipe's
_MOST_MODELS = 50  # more are no help to anyone, and each name is searched for keys
_NAME_CHARS = 256
SHORTEST_LIMIT = 128  # tokens; what a server tells below that is not believed
_PROBE = ("What is the capital of China?", "The capital of China is Beijing.")


@dataclass(slots=True)
class Session:
    """A server as it is known after it was asked what it is.

    Attributes:
        config: What the user asked for.
        dialect: What it speaks.
        route: Where whole prompts go as token ids; None where the server's template is trusted.
        encoder: Builds or at least measures prompts; None without a tokenizer.
        kind: What its numbers are.
        logits: Whether it is asked for logits.
        max_batch: Documents of one request; lowered when it says that its limit is lower.
        length: Tokens of its longest prompt, or None where it does not say.
        models: The names it serves.
        learnt_room: Tokens that prompts are cut to by an estimate, once a text was refused as too long and passed when
            it was cut so; None before.
    """

    config: HttpConfig
    dialect: Dialect
    route: TokenRoute | None
    encoder: PromptEncoder | None
    kind: ScoreKind
    logits: bool
    max_batch: int
    length: int | None
    models: tuple[str, ...]
    learnt_room: int | None = None

    def learn_length(self, length: int) -> None:
        """Keep a limit that the server told when it refused a prompt; one that leaves no room for texts is none."""
        reserve = TEMPLATE_RESERVE if self.route is None else self.route.reserve
        if length < SHORTEST_LIMIT or (self.length is not None and self.length <= length):
            return
        self.length = length
        if self.encoder is not None and length - reserve < self.encoder.max_length:
            self.encoder = load_encoder(self.config, length - reserve)

    @property
    def path(self) -> str:
        """The path that is asked."""
        return (self.route or self.dialect).path

    def request(
        self,
        query: str,
        documents: Sequence[str],
        *,
        instruction: str | None = None,
        prompts: Sequence[list[int]] = (),
        logits: bool | None = None,
    ) -> ServerRequest:
        """Return the request for texts, or for prompts; `logits` None asks for what the session found possible."""
        return ServerRequest(
            query=query,
            documents=documents,
            instruction=instruction,
            prompts=prompts,
            yes_id=self.encoder.yes_id if self.encoder is not None else 0,
            no_id=self.encoder.no_id if self.encoder is not None else 0,
            model=self.config.model,
            logits=self.logits if logits is None else logits,
        )

    async def ask(
        self, transport: Transport, request: ServerRequest, *, deadline: float
    ) -> tuple[HttpAnswer, ParsedAnswer]:
        """Send a request and return its answer, raw and parsed."""
        answer = await self._post(transport, request, deadline)
        return answer, await read_beside(answer, lambda: self._read(answer, request))

    async def _post(self, transport: Transport, request: ServerRequest, deadline: float) -> HttpAnswer:
        body = encode_json((self.route or self.dialect).body(request))
        return await transport.post(self.path, body, deadline=deadline)

    def _read(self, answer: HttpAnswer, request: ServerRequest) -> ParsedAnswer:
        return (self.route or self.dialect).read(answer, parse(answer), request)

    async def probe(self, transport: Transport, deadline: float, *, logits: bool) -> float:
        """Return the score of one small pair."""
        query, document = _PROBE
        prompts = []
        if self.route is not None and self.encoder is not None:
            prompts = [prompt.ids.tolist() for prompt in self.encoder.encode(query, [document])]
        request = self.request(query, [document], instruction=self.config.instruction, prompts=prompts, logits=logits)
        answer = await self._post(transport, request, deadline)
        return await read_beside(answer, lambda: float(self._read(answer, request).scores[0]))

    async def confirm_logits(self, transport: Transport, deadline: float) -> None:
        """Find out whether the server leaves the sigmoid out when told to, where it may ignore that.

        Old vLLM releases know the setting by another name and ignore ours without a word.
        """
        raw = await self.probe(transport, deadline, logits=True)
        if (self.route or self.dialect).may_ignore_logits:
            activated = await self.probe(transport, deadline, logits=False)
            to_sigmoid = abs(1.0 / (1.0 + np.exp(-np.clip(raw, -60, 60))) - activated)
            ignored = abs(raw - activated) < to_sigmoid and 0.0 <= raw <= 1.0
            self.kind = "probability" if ignored else "logit"


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
    """Ask the server what it is.

    Raises:
        InvalidInputError: If the dialect cannot be found out, or cannot do what the configuration asks.
        RerankServerError: If the server cannot be reached or refuses.
    """
    name = config.dialect if config.dialect != "auto" else dialects.of_host(config.url[0])
    told = None
    if name not in dialects.HOSTED:
        told = await _ask(transport, "/v1/models", _listed, deadline, open_question=name is None)
        if len(config.url) > 1 and config.model is None:
            await _check_equal(transport, deadline)
    owner, length, names = told or (None, None, ())
    models = tuple(map(transport.shown, names))
    dialect = dialects.DIALECTS[name or owner or await _detect(config.url[0], transport, deadline)]
    if _wants_tokens(config, dialect):
        return await _token_session(config, transport, dialect, length, models, deadline)
    dialect.check(model=config.model, instruction=config.instruction)
    encoder = await asyncio.to_thread(load_encoder, config, None if length is None else length - TEMPLATE_RESERVE)
    max_batch = config.max_batch or dialect.max_batch
    if config.scores != "auto":
        return Session(config, dialect, None, encoder, config.scores, False, max_batch, length, models)
    kind: ScoreKind = "logit" if dialect.can_give_logits else dialect.kind
    session = Session(config, dialect, None, encoder, kind, dialect.can_give_logits, max_batch, length, models)
    if dialect.may_ignore_logits:
        await session.confirm_logits(transport, deadline)
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
        session = Session(
            config, dialect, route, encoder, route.kind, True, config.max_batch or TOKEN_BATCH, length, models
        )

        try:
            await session.confirm_logits(transport, deadline)
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


async def _detect(url: str, transport: Transport, deadline: float) -> str:
    name = await _ask(transport, "/models", dialects.of_models, deadline)
    name = name or await _ask(transport, "/info", dialects.of_info, deadline)
    if name is None:
        raise InvalidInputError(
            f"{url} does not say what it is; name it with dialect=, one of {', '.join(map(repr, dialects.DIALECTS))}."
        )
    return name


async def _ask(
    transport: Transport, path: str, read: Callable[[Any], T], deadline: float, *, open_question: bool = True
) -> T | None:
    """Return what `read` takes from the JSON at `path`, or None where there is none.

    A wrong key is said at once where the answer decides what the server is; else the real request will say it.
    """
    try:
        answer = await transport.get(path, deadline=deadline)
        if answer.status in (401, 403) and open_question:
            raise refusal(answer)
        # Only what is taken from it leaves the thread: the whole may be large, and more is asked after it.
        return await read_beside(answer, lambda: read(parse(answer))) if answer.status == 200 else None
    except ProtocolError:
        return None


async def _check_equal(transport: Transport, deadline: float) -> None:
    """Refuse servers of which one serves another model: scores would depend on who was asked.

    Those that do not answer, or do not say what they serve, are taken at the user's word. One model in two folders or of
    two owners is the same: only the last part of a name counts.
    """
    first: tuple[str, tuple[str, ...]] | None = None
    for url, answer in (await transport.get_each("/v1/models", deadline=deadline)).items():
        try:
            names = await read_beside(answer, partial(_named, answer)) if answer.status == 200 else ()
        except ProtocolError:
            continue
        shown = tuple(map(transport.shown, names))
        if first is None and names:
            first = url, shown
        elif first is not None and names and _last_parts(shown) != _last_parts(first[1]):
            raise InvalidInputError(
                f"{first[0]} serves {', '.join(first[1])} and {url} serves {', '.join(shown)}; give servers of one model, or "
                "name the model with model= where each serves it among others."
            )


def _named(answer: HttpAnswer) -> tuple[str, ...]:
    return _models(parse(answer))


def _last_parts(names: Sequence[str]) -> set[str]:
    return {name.rstrip("/").rpartition("/")[2].lower() for name in names}


def _listed(listing: Any) -> tuple[str | None, int | None, tuple[str, ...]]:
    """Return the dialect, the length and the models that a listing tells."""
    return dialects.of_models(listing), _length(listing), _models(listing)


def _cards(listing: Any) -> list[Mapping[str, Any]]:
    cards = listing.get("data") if isinstance(listing, Mapping) else None
    return [card for card in cards if isinstance(card, Mapping)] if isinstance(cards, list) else []


def _length(listing: Any) -> int | None:
    lengths = [card.get("max_model_len") for card in _cards(listing)]
    known = [n for n in lengths if isinstance(n, int) and not isinstance(n, bool) and n > 0]
    return min(known) if known else None


def _models(listing: Any) -> tuple[str, ...]:
    names = (card["id"] for card in _cards(listing) if isinstance(card.get("id"), str))
    return tuple(name[:_NAME_CHARS] for name in islice(names, _MOST_MODELS))


def encode_json(value: Any) -> bytes:
    """Return compact UTF-8 JSON."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
