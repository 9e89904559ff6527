"""A Qwen tokenizer that gives control tokens to our own strings and never to a user's text."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from tokenizers import Encoding, Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from qwen_rerank.errors import TokenizerError

if TYPE_CHECKING:
    import tiktoken

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

# Vocabularies in which a token's id is its rank among the merges, and each merge the one that ranks alone would make, so
# that byte pair encoding by ranks (tiktoken) gives the ids of encoding by merges (tokenizers). A test proves it of these.
_RANKED_VOCABULARIES = {"ad061afcfc26a5ff7b7611ace84657fe939d902af56b06ba07d823fec5668050"}
# Texts that both libraries see alike, whichever Unicode version they were built with: characters that are old, that NFC
# leaves alone whatever stands beside them, and that are no exotic white space. Everything else is for `tokenizers`.
_CLEAN = re.compile(
    r"[\t\n\r -~¡-ɏΑ-ΡΣ-Ϋά-ώЀ-ЯА-яѐ-ҁҊ-ӿ‐-‧‰-⁞₠-₿←-⇿∀-⋿①-⓿─-➿、-〩〰-〿ぁ-ゖァ-ヺー-ヾㄅ-ㄩ㐀-䶿一-鿿가-힣！-～"
    "\U0001f300-\U0001f64f\U0001f680-\U0001f6ff\U0001f900-\U0001f9ff\U00020000-\U0002a6d6]*"
)
_RANKED_CHARS = (
    1 << 16
)  # of one text; tiktoken's regular expressions run out of stack on runs of white space of a million

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
        self._may_rank = (
            self._official
            and data["normalizer"] == _NFC
            and vocabulary_digest(vocabulary, data["model"]["merges"]) in _RANKED_VOCABULARIES
        )

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
            encoded = self._encode([lead + texts[i][: sizes[i]] for i in pending])
            for i, tokens in zip(pending, encoded, strict=True):
                whole = sizes[i] >= len(texts[i])
                if whole or _is_settled(tokens, keep, len(lead) + sizes[i]):
                    done[i] = _piece(tokens, keep, whole=whole, n_chars=len(texts[i]), lead_chars=len(lead))
                else:
                    sizes[i] = max(2 * sizes[i], _MARGIN_CHARS + sizes[i] * keep * 5 // (4 * max(1, len(tokens.ids))))
        return [done[i] for i in range(len(texts))]

    def _encode(self, texts: list[str]) -> list[_Tokens]:
        """Return the tokens of each text, by the faster of two ways that give the same ids."""
        ranked = self._ranked
        if ranked is None:
            return [_Aligned(encoding) for encoding in self._plain.encode_batch(texts, add_special_tokens=False)]
        found: list[_Tokens | None] = [ranked.encode(text) if _is_clean(text) else None for text in texts]
        rest = [text for text, tokens in zip(texts, found, strict=True) if tokens is None]
        others = iter(self._plain.encode_batch(rest, add_special_tokens=False) if rest else ())
        return [_Aligned(next(others)) if tokens is None else tokens for tokens in found]

    @functools.cached_property
    def _ranked(self) -> _RankedBpe | None:
        """The faster way, where it is installed and known to be equal for this vocabulary."""
        if not self._may_rank:
            return None
        try:
            import tiktoken
        except ImportError:
            return None
        return _RankedBpe(tiktoken, self._plain)


class _Tokens(Protocol):
    """The tokens of one text."""

    @property
    def ids(self) -> list[int]:
        """Token ids."""
        ...

    def start_char(self, token: int) -> int:
        """Return the first character that a token has a part of."""
        ...


class _Aligned:
    """Tokens with the characters that `tokenizers` aligned them with."""

    def __init__(self, encoding: Encoding) -> None:
        self.ids: list[int] = encoding.ids
        self._encoding = encoding

    def start_char(self, token: int) -> int:
        span = self._encoding.token_to_chars(token)
        return int(span[0]) if span is not None else 0


@dataclass(frozen=True, slots=True)
class _Ranked:
    """Tokens of a text that stands in them byte for byte."""

    ids: list[int]
    text: str
    n_bytes: np.ndarray  # int32 (n_ids,), bytes of every token

    def start_char(self, token: int) -> int:
        n_bytes = int(self.n_bytes[self.ids[:token]].sum())
        return len(self.text.encode()[:n_bytes].decode(errors="ignore"))  # a character that is cut begins there


class _RankedBpe:
    """Byte pair encoding by ranks, three to five times faster than by merges."""

    def __init__(self, library: Any, plain: Tokenizer) -> None:
        byte_of = _byte_of_letter()
        ranks = {bytes(map(byte_of.__getitem__, token)): rank for token, rank in plain.get_vocab().items()}
        self._encoding: tiktoken.Encoding = library.Encoding(
            "qwen", pat_str=_WORD_PATTERN, mergeable_ranks=ranks, special_tokens={}
        )
        self._n_bytes = np.zeros(len(ranks), dtype=np.int32)
        for token, rank in ranks.items():
            self._n_bytes[rank] = len(token)

    def encode(self, text: str) -> _Ranked:
        return _Ranked(self._encoding.encode_ordinary(text), text, self._n_bytes)


def _is_clean(text: str) -> bool:
    return len(text) <= _RANKED_CHARS and _CLEAN.fullmatch(text) is not None


def _byte_of_letter() -> dict[str, int]:
    """Return the byte that each letter of a byte-level vocabulary stands for, as GPT-2's `bytes_to_unicode` maps them."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def vocabulary_digest(vocabulary: dict[str, int], merges: Sequence[Any]) -> str:
    """Return a hash of tokens in the order of their ids and of merges in theirs, however the file writes them."""
    pairs = (merge if isinstance(merge, str) else " ".join(merge) for merge in merges)
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    return hashlib.sha256("\n".join((*tokens, "", *pairs)).encode()).hexdigest()


def _first_cut(text: str, keep: int) -> int:
    """Return how many characters of `text` very likely hold `keep` tokens and the margin after them."""
    n_bytes = _BYTES_PER_TOKEN * keep
    if len(text) <= _MARGIN_CHARS:
        return len(text)
    return len(text[:n_bytes].encode()[:n_bytes].decode(errors="ignore")) + _MARGIN_CHARS


def _is_settled(tokens: _Tokens, keep: int, n_chars: int) -> bool:
    """Whether the first `keep` tokens of a text cut at `n_chars` end too far before the cut to be changed by it."""
    return len(tokens.ids) > keep and tokens.start_char(keep) <= n_chars - _MARGIN_CHARS


def _piece(tokens: _Tokens, keep: int, *, whole: bool, n_chars: int, lead_chars: int) -> Piece:
    ids = np.array(tokens.ids[:keep], dtype=np.int32)
    if len(tokens.ids) <= keep:
        return Piece(ids, len(tokens.ids), n_chars)
    # A character may be spread over several tokens: it is kept only when all of them are.
    kept_chars = max(0, tokens.start_char(keep) - lead_chars)
    return Piece(ids, len(tokens.ids) if whole else keep + 1, kept_chars)


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
