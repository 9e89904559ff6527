"""`PairEncoder`: (query, document) pairs as token ids, in which untrusted text never becomes a control token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Encoding, Tokenizer

from qwen_rerank.errors import QueryTooLongError
from qwen_rerank.types import Fit

_SLACK = 64  # tokens beyond the room, so that cutting the text does not change the tokens that are kept


@dataclass(frozen=True, slots=True)
class Pair:
    """One query and document as token ids.

    Attributes:
        ids: Control tokens included.
        type_ids: Segment of each token, 0 for the query and 1 for the document where the model tells them apart.
        kept_chars: Characters of the document that are kept; all of them when it was not cut.
    """

    ids: list[int]
    type_ids: list[int]
    kept_chars: int


class PairEncoder:
    """Tokenizes pairs as the model's own tokenizer does, and cuts the document, never the query, to fit.

    Thread-safe: nothing of the tokenizer is changed after construction.

    Args:
        tokenizer: The model's, as `safe_tokenizer` gives it.
        max_length: Tokens of one pair, control tokens included.
    """

    def __init__(self, tokenizer: Tokenizer, *, max_length: int) -> None:
        self.max_length = max_length
        self._tokenizer = tokenizer
        self._n_control = self._tokenizer.num_special_tokens_to_add(True)

    def encode(self, query: str, documents: Sequence[str]) -> list[Pair]:
        """Return one pair for each document.

        Raises:
            QueryTooLongError: If no token of a document fits beside the query.
        """
        [query_tokens], room = self._query(query)
        pairs = []
        for text, tokens in zip(documents, self._encode(documents, room), strict=True):
            kept_chars = _kept_chars(tokens, room, len(text))
            tokens.truncate(room)
            pair = self._tokenizer.post_process(query_tokens, tokens)
            pairs.append(Pair(pair.ids, pair.type_ids, kept_chars))
        return pairs

    def fit(self, query: str, texts: Sequence[str]) -> list[Fit]:
        """Return for each text its tokens, the room beside this query, and how many characters are kept."""
        _, room = self._query(query)
        return [
            Fit(tokens=len(tokens), room=room, kept_chars=_kept_chars(tokens, room, len(text)))
            for tokens, text in zip(self._encode(texts, room), texts, strict=True)
        ]

    def _query(self, query: str) -> tuple[list[Encoding], int]:
        """Return the query's tokens and how many remain for a document."""
        tokens = self._encode([query], self.max_length)
        room = self.max_length - self._n_control - len(tokens[0].ids)
        if room < 1:
            raise QueryTooLongError(
                f"the query has at least {len(tokens[0].ids)} tokens and leaves no room for a document within "
                f"max_length ({self.max_length}); shorten the query or raise max_length."
            )
        return tokens, room

    def _encode(self, texts: Sequence[str], room: int) -> list[Encoding]:
        """Return each text's tokens, or of a text far too long only those of a beginning beyond `room`."""
        encodings: dict[int, Encoding] = {}
        pending, chars = list(range(len(texts))), 8 * (room + _SLACK)
        while pending:
            found = self._tokenizer.encode_batch([texts[i][:chars] for i in pending], add_special_tokens=False)
            encodings |= dict(zip(pending, found, strict=True))
            pending = [i for i in pending if len(texts[i]) > chars and len(encodings[i].ids) <= room + _SLACK]
            chars *= 4
        return [encodings[i] for i in range(len(texts))]


def _kept_chars(tokens: Encoding, room: int, n_chars: int) -> int:
    """Return how many of a text's characters are kept when its tokens are cut to `room`."""
    if len(tokens) <= room:
        return n_chars
    # Several tokens can share one character; it is kept only if all of them are.
    offsets = tokens.offsets
    return int(min(offsets[room - 1][1], offsets[room][0]))
