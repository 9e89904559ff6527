"""Reads a server's limits from the sentence of its refusal, and cuts texts to them where there is no tokenizer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from qwen_rerank.errors import BackendRejectedError

_THINGS = r"(?:documents?|docs|texts?|passages?|items?|inputs|elements?|entries|pairs)"
_COUNTS = (
    re.compile(r"maximum allowed batch size (\d{1,9})"),
    re.compile(r"size <= (\d{1,9})"),
    re.compile(rf"\b{_THINGS} (?:must be )?<= (\d{{1,9}})"),
    re.compile(r"batch size \d{1,9} exceeds (?:the )?(?:limit|maximum)\D{0,10}(\d{1,9})"),
    re.compile(r"(?:文档|文本|条目|段落)(?:数量|个数|数|的数量)\D{0,20}?(\d{1,9})"),
    re.compile(rf"(?:at most|more than|exceeds?|up to|limit of|limited to|maximum of|max) (\d{{1,9}}) {_THINGS}"),
    re.compile(rf"\b(?:maximum|max|limit)\b\D{{0,40}}\b{_THINGS}\b\D{{0,30}}?(\d{{1,9}})\b(?! tokens)"),
    re.compile(rf"\b{_THINGS}\b\D{{0,20}}\b(?:maximum|max|limit)\b\D{{0,20}}?(\d{{1,9}})\b(?! tokens)"),
    re.compile(r"(?:maximum|max|limit)\D{0,20}batch size\D{0,20}?(\d{1,9})"),
)
_LENGTHS = (
    re.compile(r"tokens > (\d{1,9})"),
    re.compile(r"(?:limit|maximum) (?:is|of) (\d{1,9}) tokens"),
    re.compile(r"(?:长度|上下文|字数|tokens?数)\D{0,20}?(\d{1,9})"),
    re.compile(r"current batch size: (\d{1,9})"),  # llama.cpp means the tokens that it takes at once
    re.compile(r"(?:max\w*|limit)[^\d.]{0,40}?(?:length|len|context|tokens)\D{0,20}?(\d{1,9})"),
    re.compile(r"context (?:length|window|size)\D{0,20}?(\d{1,9})"),
    re.compile(
        r"(?:less than|fewer than|more than|at most|exceeds?|limit of|limit is|maximum of|max) (\d{1,9}) tokens"
    ),
)
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}\b)")
_IS_LENGTH = re.compile(
    r"过长|超长|长度超|context (?:length|size|window)|too long|too large to process|tokens|longer than"
)
_IS_COUNT = re.compile(rf"batch|too many {_THINGS}|number of {_THINGS}")
_ALONE = frozenset({400, 413, 422, 424, 500})

_FRACTIONS = (0.9, 0.5, 0.25)  # of the limit: how many tokens a text has is estimated
_TOKENS = re.compile(r"\s?([A-Za-z]+)|(\s+)|.", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Limit:
    """A limit that a server named.

    Attributes:
        of: "documents" of one request, or "tokens" of one prompt.
        number: How many it takes, or None where it does not say.
    """

    of: Literal["documents", "tokens"]
    number: int | None = None


def stated_limit(text: str) -> Limit | None:
    """Return the limit that a refusal speaks of, or None if it is about something else."""
    text = _THOUSANDS.sub("", text.casefold())
    if (number := _first(_COUNTS, text)) is not None:
        return Limit("documents", number)
    if (number := _first(_LENGTHS, text)) is not None or _IS_LENGTH.search(text):
        return Limit("tokens", number)
    return Limit("documents") if _IS_COUNT.search(text) else None


def may_be_one_document(exc: BackendRejectedError) -> bool:
    """Whether a refusal may be about one document of several, and not about the key, the route or the model."""
    return exc.status in _ALONE


def shorter_text(text: str, limit: int, *, beside: str, tries: int) -> tuple[str, int] | None:
    """Return the text's beginning that fits a limit by a careful estimate, and the tokens that this was cut for.

    Args:
        text: Refused as too long.
        limit: Tokens of a whole prompt.
        beside: What else stands in the prompt.
        tries: How often the text was cut before; each time leaves less.

    Returns:
        None where nothing is left to cut, or to keep.
    """
    for fraction in _FRACTIONS[tries:]:
        tokens = int(limit * fraction)
        kept = chars_within(text, tokens - estimated_tokens(beside, tokens))
        if 0 < kept < len(text):
            return text[:kept], tokens
    return None


def estimated_tokens(text: str, most: int) -> int:
    """Return about how many tokens a text has, rather too many; counting ends at `most`."""
    count = 0
    for match in _TOKENS.finditer(text):
        count += _cost(match)
        if count >= most:
            break
    return count


def chars_within(text: str, tokens: int) -> int:
    """Return how many characters of a text fill so many tokens, rather too few."""
    left = tokens
    for match in _TOKENS.finditer(text):
        left -= _cost(match)
        if left < 0:
            return match.start()
    return len(text)


def _cost(match: re.Match[str]) -> int:
    # Digits are one token each in Qwen's vocabulary; of other scripts no more than a token a character is usual.
    word, space = match.groups()
    if word:
        return -(-len(word) // 6)
    return 1 + len(space) // 16 if space else 1


def _first(patterns: tuple[re.Pattern[str], ...], text: str) -> int | None:
    found = next((match for pattern in patterns if (match := pattern.search(text))), None)
    return int(found.group(1)) if found and int(found.group(1)) > 0 else None
