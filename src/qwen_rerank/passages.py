"""Long document → windows; window scores → one score. Pure: no model, only a measure of how texts fit.

A window is a slice `(start, end)` of the text. Windows are planned in characters, cut at sentence ends where there are
any, and every one is then measured as it stands; one that turns out too long is split again. All windows of all
documents are measured together, so a call costs a few tokenizer runs however many windows there are.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np

from qwen_rerank.errors import DocumentTooLongError
from qwen_rerank.types import Fit

Span = tuple[int, int]
Measure = Callable[[Sequence[str]], list[Fit]]
Aggregate = Literal["max", "mean", "first", "topk-mean"]

TOP_K_WINDOWS = 3  # how many windows "topk-mean" averages

# Every alternative is of bounded length, so that a hostile text (a million dots) costs linear time.
SENTENCE_END = re.compile(r"[。！？；…][”’」』）》】\"]{0,3}|[.!?;][\"')\]”’]{0,3}\s|\n")
CLAUSE_END = re.compile(r"[，、：,:]|\s")

_MARGIN = 0.9  # share of the measured characters that is planned, because some windows are denser in tokens
_BACKOFF = 2 / 3  # a window gives up at most a third of its length to end with a sentence


def split(
    texts: Sequence[str], measure: Measure, *, overlap: float = 0.1, window_tokens: int | None = None
) -> list[list[Span] | DocumentTooLongError]:
    """Return for each text the windows that cover it, in reading order.

    A text that fits is one window equal to itself. Neighbours share at most the share `overlap` of a window's
    characters; nothing of the text is left out.

    Args:
        texts: The documents.
        measure: Says how texts fit beside the query; called with all windows that are still unproven.
        overlap: Share of a window that its successor repeats, 0 to 0.4.
        window_tokens: Longest window; None for the whole room beside the query.

    Returns:
        Per text its windows, or the error of a text that cannot be split, because not even one character fits.
    """
    proven: list[list[Span]] = [[] for _ in texts]
    errors: dict[int, DocumentTooLongError] = {}
    pending = [(i, 0, len(text)) for i, text in enumerate(texts)]
    while pending:
        fits = measure([texts[i][start:end] for i, start, end in pending])
        unproven = []
        for (i, start, end), fit in zip(pending, fits, strict=True):
            limit = min(fit.room, window_tokens or fit.room)
            if fit.tokens <= limit:
                proven[i].append((start, end))
            elif end - start <= 1:
                errors[i] = DocumentTooLongError(
                    f"a window of {limit} tokens does not hold even the character {texts[i][start:end]!r} "
                    f"({fit.tokens} tokens); shorten the query or raise max_length."
                )
            else:
                chars = _planned_chars(fit, limit, end - start)
                unproven += [(i, *span) for span in _cut(texts[i], start, end, chars, int(chars * overlap))]
        pending = [window for window in unproven if window[0] not in errors]
    return [errors.get(i) or sorted(proven[i]) for i in range(len(texts))]


def _planned_chars(fit: Fit, limit: int, length: int) -> int:
    """Return how many characters a window may have: always fewer than `length`, so that splitting ends."""
    measured = fit.kept_chars * limit // max(1, min(fit.tokens, fit.room))
    return max(1, min(int(measured * _MARGIN), length - 1))


def _cut(text: str, start: int, end: int, chars: int, overlap: int) -> Iterator[Span]:
    """Yield spans of at most `chars` characters that cover `[start, end)` and are about equally long."""
    while end - start > chars:
        remaining = end - start - overlap
        n_windows = -(-remaining // (chars - overlap))
        size = overlap + -(-remaining // n_windows)
        cut = _best_end(text, start + int(size * _BACKOFF), start + size, start + chars)
        yield start, cut
        start = max(start + 1, _first_start(text, cut - overlap, cut))
    yield start, end


def _best_end(text: str, low: int, target: int, high: int) -> int:
    """Return the place in `(low, high]` to end a window.

    The sentence end nearest to `target`; without one the nearest end of a clause or word; without one `target`.
    """
    for pattern in (SENTENCE_END, CLAUSE_END):
        ends = [match.end() for match in pattern.finditer(text, low, high)]
        if ends:
            return min(ends, key=lambda end: abs(end - target))
    return target


def _first_start(text: str, low: int, high: int) -> int:
    """Return the first place in `[low, high)` where a sentence starts, else a clause or word, else `low`."""
    for pattern in (SENTENCE_END, CLAUSE_END):
        for match in pattern.finditer(text, max(0, low - 1), high):
            if low <= match.end() < high:
                return match.end()
    return low


def fold(scores: np.ndarray, aggregate: Aggregate) -> tuple[float, int]:
    """Return one log-odds for a document's windows, and the window that speaks for it.

    Args:
        scores: Log-odds, float32 `(n_windows,)`, in reading order, at least one.
        aggregate: "max", "mean", "first", or "topk-mean" (the mean of the three highest).

    Returns:
        The folded log-odds, and the index of the highest window ("first": 0).
    """
    best = int(np.argmax(scores))
    values = scores.astype(np.float64)
    match aggregate:
        case "max":
            return float(values[best]), best
        case "first":
            return float(values[0]), 0
        case "mean":
            return float(values.mean()), best
        case "topk-mean":
            return float(np.sort(values)[-TOP_K_WINDOWS:].mean()), best


def quick(measure: Measure, *, window_tokens: int | None = None) -> Measure:
    """Return `measure` without the cost of tokenizing texts that are plainly short enough.

    Their `Fit.tokens` is an upper bound instead of a count.
    """

    def quick_measure(texts: Sequence[str]) -> list[Fit]:
        room = measure([""])[0].room
        limit = min(room, window_tokens or room)
        bounds = [token_bound(text) if len(text) < limit else limit + 1 for text in texts]
        unclear = [text for text, bound in zip(texts, bounds, strict=True) if bound > limit]
        measured = iter(measure(unclear) if unclear else [])
        return [
            Fit(tokens=bound, room=room, kept_chars=len(text)) if bound <= limit else next(measured)
            for text, bound in zip(texts, bounds, strict=True)
        ]

    return quick_measure


def token_bound(text: str) -> int:
    """Return a number of tokens that no tokenizer exceeds for `text`, without tokenizing it.

    A token covers at least one byte of UTF-8, after the tokenizer has normalised the text and put a space before it.
    """
    n_bytes = len(text.encode("utf-8"))
    if not text.isascii():
        n_bytes = max(n_bytes, *(len(unicodedata.normalize(form, text).encode("utf-8")) for form in ("NFC", "NFKC")))
    return n_bytes + 1
