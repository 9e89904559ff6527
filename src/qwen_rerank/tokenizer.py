"""A Qwen tokenizer that gives control tokens to our own strings and never to a user's text."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from qwen_rerank.errors import TokenizerError

CONTROL = re.compile(r"<\|\w+\|>|</?think>")

_OFFICIAL_VOCABULARY = 151_643  # tokens before the added ones
_OFFICIAL_IDS = {
    "yes": 9693,
    "no": 2152,
    "<|im_start|>": 151_644,
    "<|im_end|>": 151_645,
    "<think>": 151_667,
    "</think>": 151_668,
}
_WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_NFC = {"type": "NFC"}
_NFC_LOWERCASE = {"type": "Sequence", "normalizers": [_NFC, {"type": "Lowercase"}]}

_BYTES_PER_TOKEN = 6  # of UTF-8; above what English (4.5), Chinese (4) and code (3.5) need, so one pass mostly does
_BATCH = 256  # texts at a time; bounds the memory that the tokenizer's own records take
_MARGIN_CHARS = 512  # the longest word whose ids are exact at a cut


@dataclass(frozen=True, slots=True)
class Piece:
    """The first tokens of a text: `ids` int32 `(<= keep,)`, how many there are at least, and the characters kept."""

    ids: np.ndarray
    tokens: int
    kept_chars: int


class PromptTokenizer:
    """A Qwen tokenizer that gives control tokens to our own strings and never to a user's text.

    Args:
        tokenizer_json: Content of a `tokenizer.json`.
        source: Name of the file, for messages.

    Attributes:
        added_ids: Id of each added token by its content.
        n_ids: One above the highest id.
        digest: SHA-256 of the file.

    Raises:
        TokenizerError: If it is no tokenizer of the Qwen family.
    """

    def __init__(self, tokenizer_json: str | bytes, *, source: str = "tokenizer.json") -> None:
        self._source = source
        raw = tokenizer_json.encode(errors="surrogatepass") if isinstance(tokenizer_json, str) else tokenizer_json
        self.digest = hashlib.sha256(raw).hexdigest()
        data = _parse(tokenizer_json, source)
        _check_family(data, source)
        # Truncation and padding saved in the file would silently change every prompt.
        trusted = _build({**data, "truncation": None, "padding": None}, source)
        # The same vocabulary without the added tokens: in it "<think>" is plain characters. The flag
        # `encode_special_tokens` would not do, because Qwen marks some control tokens `special: false`.
        plain = Tokenizer(trusted.model)
        plain.normalizer = trusted.normalizer
        plain.pre_tokenizer = trusted.pre_tokenizer
        self._trusted = trusted
        self._plain = plain
        self.added_ids = {token.content: int(number) for number, token in trusted.get_added_tokens_decoder().items()}
        _check_vocabulary(data, self.added_ids, source)
        vocabulary = data["model"]["vocab"]
        self.n_ids = 1 + max(max(vocabulary.values()), max(self.added_ids.values(), default=0))
        self._official = len(vocabulary) == _OFFICIAL_VOCABULARY

    def control_ids(self, text: str) -> np.ndarray:
        """Return the ids of a prompt constant, int32 `(n,)`; its control strings are one token each.

        Raises:
            TokenizerError: If a control string is not exactly one token, or not the official one.
        """
        for name in sorted(set(CONTROL.findall(text))):
            self.single_id(name)
            if name not in self.added_ids:
                raise TokenizerError(f"{self._source}: the control string {name!r} is not among its added tokens.")
        return np.array(self._trusted.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def single_id(self, text: str) -> int:
        """Return the id of a label or control string.

        Raises:
            TokenizerError: If it is not exactly one token, or the official vocabulary has another id for it.
        """
        ids = self._trusted.encode(text, add_special_tokens=False).ids
        if len(ids) != 1:
            raise TokenizerError(f"{self._source}: {text!r} must be exactly one token, but is {len(ids)} ({ids}).")
        if self._official and ids[0] != _OFFICIAL_IDS.get(text, ids[0]):
            raise TokenizerError(f"{self._source}: {text!r} has id {ids[0]}, not the official {_OFFICIAL_IDS[text]}.")
        return int(ids[0])

    def pieces(self, lead: str, texts: Sequence[str], keep: int) -> list[Piece]:
        """Return for each text the first `keep` tokens of `lead + text`, without ever reading far past them.

        A long text is cut before it is tokenized. A cut can only change the word it falls into (or the run of white
        space or combining marks), so the result is taken when its last token lies well before the cut, and the cut is
        moved otherwise; the ids are those of the whole text unless one word is longer than 512 characters.
        """
        pieces: list[Piece] = []
        for start in range(0, len(texts), _BATCH):
            pieces += self._batch(lead, texts[start : start + _BATCH], keep)
        return pieces

    def _batch(self, lead: str, texts: Sequence[str], keep: int) -> list[Piece]:
        sizes = [_first_cut(text, keep) for text in texts]
        done: dict[int, Piece] = {}
        while pending := [i for i in range(len(texts)) if i not in done]:
            encodings = self._plain.encode_batch(
                [lead + texts[i][: sizes[i]] for i in pending], add_special_tokens=False
            )
            for i, encoding in zip(pending, encodings, strict=True):
                whole = sizes[i] >= len(texts[i])
                if whole or _is_settled(encoding, keep, len(lead) + sizes[i]):
                    done[i] = _piece(encoding, keep, whole=whole, n_chars=len(texts[i]), lead_chars=len(lead))
                else:
                    sizes[i] = max(2 * sizes[i], _MARGIN_CHARS + sizes[i] * keep * 5 // (4 * max(1, len(encoding))))
        return [done[i] for i in range(len(texts))]


def _first_cut(text: str, keep: int) -> int:
    """Return how many characters of `text` very likely hold `keep` tokens and the margin after them."""
    n_bytes = _BYTES_PER_TOKEN * keep
    if len(text) <= _MARGIN_CHARS:
        return len(text)
    return len(text[:n_bytes].encode()[:n_bytes].decode(errors="ignore")) + _MARGIN_CHARS


def _is_settled(encoding: Encoding, keep: int, n_chars: int) -> bool:
    """Whether the first `keep` tokens of a text cut at `n_chars` end too far before the cut to be changed by it."""
    return len(encoding) > keep and _start_char(encoding, keep) <= n_chars - _MARGIN_CHARS


def _start_char(encoding: Encoding, token: int) -> int:
    """Return the first character that a token has a part of."""
    span = encoding.token_to_chars(token)
    return int(span[0]) if span is not None else 0


def _piece(encoding: Encoding, keep: int, *, whole: bool, n_chars: int, lead_chars: int) -> Piece:
    ids = np.array(encoding.ids[:keep], dtype=np.int32)
    if len(encoding) <= keep:
        return Piece(ids, len(encoding), n_chars)
    # A character may be spread over several tokens: it is kept only when all of them are.
    kept_chars = max(0, _start_char(encoding, keep) - lead_chars)
    return Piece(ids, len(encoding) if whole else keep + 1, kept_chars)


def _parse(tokenizer_json: str | bytes, source: str) -> dict[str, Any]:
    try:
        data = json.loads(tokenizer_json)
    except (ValueError, RecursionError) as exc:
        raise TokenizerError(f"{source} is not valid JSON ({exc}); download the checkpoint again.") from exc
    if not isinstance(data, dict) or not isinstance(data.get("model"), dict):
        raise TokenizerError(f"{source} is not a tokenizer file: it has no `model` section.")
    return data


def _build(data: dict[str, Any], source: str) -> Tokenizer:
    try:
        return Tokenizer.from_str(json.dumps(data))
    except Exception as exc:  # the library raises bare Exception
        raise TokenizerError(f"{source} cannot be loaded ({exc}); download the checkpoint again.") from exc


def _check_family(data: dict[str, Any], source: str) -> None:
    """The exactness of cuts and of the split between query and document rests on these three sections."""
    if data.get("normalizer") not in (_NFC, _NFC_LOWERCASE):
        raise TokenizerError(
            f"{source}: the normalizer must be NFC, as Qwen's is (or NFC and Lowercase), not {data.get('normalizer')!r}."
        )
    # transformers 5 saves the same steps with trim_offsets true; it plays no part before the post-processor.
    if data.get("pre_tokenizer") not in (_pre_tokenizer(trim_offsets=False), _pre_tokenizer(trim_offsets=True)):
        raise TokenizerError(f"{source}: the pre_tokenizer must be Qwen's (the Qwen2 split pattern, then ByteLevel).")
    model = data["model"]
    extras = ("dropout", "ignore_merges", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")
    found = [name for name in extras if model.get(name)]
    if model.get("type") != "BPE" or found:
        raise TokenizerError(f"{source}: the model must be plain BPE, as Qwen's is, not {model.get('type')!r} {found}.")


def _pre_tokenizer(*, trim_offsets: bool) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": _WORD_PATTERN}, "behavior": "Isolated", "invert": False}
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": trim_offsets, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [split, bytes_]}


def _check_vocabulary(data: dict[str, Any], added_ids: dict[str, int], source: str) -> None:
    """Refuse a vocabulary that drops characters, or in which merges lead to an added token: any text could forge it."""
    vocabulary = data["model"]["vocab"]
    absent = set(ByteLevel.alphabet()) - set(vocabulary)
    if absent:
        raise TokenizerError(f"{source}: {len(absent)} of the 256 byte tokens are missing, so some text would vanish.")
    if len(set(vocabulary.values())) != len(vocabulary):
        raise TokenizerError(f"{source}: two tokens share one id; download the checkpoint again.")
    reserved = set(added_ids.values())
    inside = {content for content, number in vocabulary.items() if number in reserved}
    if not inside:
        return
    merges = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in data["model"]["merges"])
    made = {"".join(merge) for merge in merges}
    forged = sorted(content for content in inside if len(content) == 1 or content in made)
    if forged:
        raise TokenizerError(f"{source}: plain text can become the added token {forged[0]!r}; such a file is refused.")
