"""`HttpConfig`: the settings of an `HttpScorer`, without the key."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from qwen_rerank.checks import check_choice, check_count, check_text
from qwen_rerank.errors import InvalidInputError
from qwen_rerank.prompt import TEMPLATES
from qwen_rerank.scorers.http.dialects import DIALECTS
from qwen_rerank.scorers.http.endpoints import check_urls
from qwen_rerank.scorers.http.network import check_verify

MODES = ("auto", "token-ids", "server-template")
SCORES = ("auto", "logit", "probability", "relevance", "raw")


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpConfig:
    """The settings of an `HttpScorer` but for the key; `HttpScorer(**asdict(config))` asks the same way.

    Attributes:
        url: One address or several of equal servers: the root, or what ends in `/v1`; a route after it is left out.
        dialect: What the server is; "auto" finds out.
        mode: "token-ids" sends exact prompts as token ids (vLLM and SGLang, needs `tokenizer`), "server-template"
            leaves the prompt to the server, "auto" takes the first where it is possible.
        model: Name to ask for; None leaves it to the server where that is allowed.
        tokenizer: Folder or hub name of the checkpoint's tokenizer.
        template: Prompt variant for "token-ids": "transformers" or "vllm".
        instruction: Default instruction; None means the model card's, or the server's own.
        max_length: Tokens of one prompt; the server's own limit, where it tells it, also holds.
        timeout_s: Seconds for everything one `score` call does; for `score_many`, for each request.
        max_batch: Documents in one request; None means what the dialect takes.
        max_concurrency: Requests under way at once.
        scores: What the server's numbers are. "auto" asks for logits where it can and else knows by the dialect.
        strict_echo: Whether another model's name or changed document texts in an answer are errors, not warnings.
        max_answer_bytes: Cap on an answer's decompressed size.
        public_only: Refuse hosts with private addresses; for addresses that come from users.
        verify: True for the CAs of the system or the environment, or the path of a file with a CA's certificate.
    """

    url: tuple[str, ...]
    dialect: str = "auto"
    mode: Literal["auto", "token-ids", "server-template"] = "auto"
    model: str | None = None
    tokenizer: str | None = None
    template: str = "transformers"
    instruction: str | None = None
    max_length: int = 8192
    timeout_s: float = 60.0
    max_batch: int | None = None
    max_concurrency: int = 8
    scores: Literal["auto", "logit", "probability", "relevance", "raw"] = "auto"
    strict_echo: bool = False
    max_answer_bytes: int = 32 * 2**20
    public_only: bool = False
    verify: bool | str = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", check_urls(self.url))
        object.__setattr__(self, "verify", check_verify(self.verify))
        check_choice("dialect", self.dialect, ["auto", *DIALECTS])
        check_choice("mode", self.mode, MODES)
        check_choice("scores", self.scores, SCORES)
        check_choice("template", self.template, list(TEMPLATES))
        for name in ("model", "tokenizer", "instruction"):
            if getattr(self, name) is not None:
                check_text(name, getattr(self, name))
        for name in ("max_length", "max_concurrency", "max_answer_bytes"):
            check_count(name, getattr(self, name))
        if self.max_batch is not None:
            check_count("max_batch", self.max_batch)
        timeout_s: object = self.timeout_s
        if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float) or not 0 < timeout_s < math.inf:
            raise InvalidInputError(f"timeout_s must be a number of seconds above 0, not {timeout_s!r}.")
        self._check_mode()

    def _check_mode(self) -> None:
        if self.mode != "token-ids":
            return
        if self.tokenizer is None:
            raise InvalidInputError(
                "mode='token-ids' builds the exact prompts on this side and needs tokenizer=, the folder or hub name of "
                "the checkpoint; without one only mode='server-template' is possible, which trusts the server's template."
            )
        if self.dialect != "auto" and not DIALECTS[self.dialect].token_routes:
            raise InvalidInputError(f"a {self.dialect} server takes no token ids; use mode='server-template'.")
        if self.scores != "auto":
            raise InvalidInputError(
                f"scores={self.scores!r} says what a server's own scores are; leave it out with token ids."
            )
