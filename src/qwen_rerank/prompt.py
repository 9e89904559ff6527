"""The Qwen3-Reranker prompt: text to token ids, nothing else.

The strings follow the model card of Qwen3-Reranker and are constants here; a checkpoint's chat template is never read.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer

from qwen_rerank.checks import check_choice, check_count, check_query, check_text, check_texts
from qwen_rerank.errors import InvalidInputError, QueryTooLongError, TokenizerError
from qwen_rerank.types import Fit

DEFAULT_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"

PREFIX = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"

# The model card joins the fields with one newline; the authors' vLLM code, also used for their published
# results, with two. Scores differ, so the caller chooses by name.
TEMPLATES = {"transformers": "\n", "vllm": "\n\n"}

_OFFICIAL_VOCABULARY = 151_643  # tokens before the added ones
_OFFICIAL_IDS = {
    "yes": 9693,
    "no": 2152,
    "<|im_start|>": 151_644,
    "<|im_end|>": 151_645,
    "<think>": 151_667,
    "</think>": 151_668,
}
_CONTROL = re.compile(r"<\|\w+\|>|</?think>")

_NORMALIZER = {"type": "NFC"}
_WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Places where the pattern above ends a word whatever follows: before a space that follows no white space, and
# between a letter or digit and a punctuation mark. Both neighbours are also left alone by NFC.
_WORD_END = re.compile(r"(?<=\S)(?= )|(?<=[0-9A-Za-z\u4e00-\u9fff])(?=[\n!-/:-@\[-`{-~，。：；])")

_BYTES_PER_TOKEN = 6  # of UTF-8; above what English (4.5), Chinese (4) and code (3.5) need, so one pass mostly does
_MARGIN_CHARS = 512  # the longest word whose ids are exact at a cut


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSpec:
    """The strings around instruction, query and document; the defaults are the model card's.

    Attributes:
        prefix: Everything before the instruction's label; may hold control strings.
        suffix: Everything after the document, never cut; may hold control strings.
        separator: Between the three fields.
        instruction_label: Before the instruction.
        query_label: Before the query.
        document_label: Before the document.
        yes: The answer that counts for relevance, one token.
        no: The answer that counts against it, one token.
    """

    prefix: str = PREFIX
    suffix: str = SUFFIX
    separator: str = "\n"
    instruction_label: str = "<Instruct>: "
    query_label: str = "<Query>: "
    document_label: str = "<Document>: "
    yes: str = "yes"
    no: str = "no"

    def __post_init__(self) -> None:
        for name in self.__slots__:
            check_text(name, getattr(self, name))
        if not self.yes or not self.no or self.yes == self.no:
            raise InvalidInputError(f"yes and no must be two different labels, not {self.yes!r} and {self.no!r}.")
        if not _WORD_END.search(self.document_label):
            raise InvalidInputError(
                f"document_label ({self.document_label!r}) must hold a place where a word ends, such as the space of "
                "'<Document>: ', so that no document can change the tokens before it."
            )

    @classmethod
    def for_template(cls, template: str) -> PromptSpec:
        """Return the official strings in the variant `"transformers"` (model card) or `"vllm"`."""
        return cls(separator=TEMPLATES[check_choice("template", template, list(TEMPLATES))])

    def body(self, instruction: str, query: str, document: str) -> str:
        """Return the whole text between prefix and suffix."""
        head, lead = self.split(instruction, query)
        return head + lead + document

    def split(self, instruction: str, query: str) -> tuple[str, str]:
        """Return the text before the document in two parts: one that no document changes, and the rest.

        The tokens of the first part, followed by those of the second with the document, are the tokens of the whole:
        the cut lies where a word ends whatever follows.
        """
        cut = [match.start() for match in _WORD_END.finditer(self.document_label)][-1]
        fields = (self.instruction_label + instruction, self.query_label + query, self.document_label[:cut])
        return self.separator.join(fields), self.document_label[cut:]


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """One prompt as token ids.

    Attributes:
        ids: int32 `(n_tokens,)`: prefix, instruction, query, document, suffix.
        truncated: Whether the document was cut to fit.
        kept_chars: Characters of the document that are kept whole; `len(document)` when it was not cut.
        document_start: Index in `ids` of the first token that the document has a say in.
    """

    ids: np.ndarray
    truncated: bool
    kept_chars: int
    document_start: int


@dataclass(frozen=True, slots=True)
class _Piece:
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
        self.added_ids = {token["content"]: int(token["id"]) for token in data.get("added_tokens") or []}
        self.n_ids = 1 + max(trusted.get_vocab(with_added_tokens=True).values(), default=-1)
        _check_added_out_of_reach(data, self.added_ids, source)
        self._official = plain.get_vocab_size() == _OFFICIAL_VOCABULARY

    def control_ids(self, text: str) -> np.ndarray:
        """Return the ids of a prompt constant, int32 `(n,)`; its control strings are one token each.

        Raises:
            TokenizerError: If a control string is not exactly one token, or not the official one.
        """
        for name in sorted(set(_CONTROL.findall(text))):
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

    def pieces(self, lead: str, texts: Sequence[str], keep: int) -> list[_Piece]:
        """Return for each text the first `keep` tokens of `lead + text`, without ever reading far past them.

        A long text is cut before it is tokenized. A cut can only change the word it falls into (or the run of white
        space or combining marks), so the result is taken when its last token lies well before the cut, and the cut is
        moved otherwise; the ids are those of the whole text unless one word is longer than 512 characters.
        """
        sizes = [_first_cut(text, keep) for text in texts]
        done: dict[int, _Piece] = {}
        pending = list(range(len(texts)))
        while pending:
            encodings = self._plain.encode_batch(
                [lead + texts[i][: sizes[i]] for i in pending], add_special_tokens=False
            )
            for i, encoding in zip(pending, encodings, strict=True):
                whole = sizes[i] >= len(texts[i])
                if whole or _is_settled(encoding, keep, len(lead) + sizes[i]):
                    done[i] = _piece(encoding, keep, whole=whole, n_chars=len(texts[i]), lead_chars=len(lead))
                else:
                    sizes[i] = max(2 * sizes[i], _MARGIN_CHARS + sizes[i] * keep * 5 // (4 * max(1, len(encoding))))
            pending = [i for i in pending if i not in done]
        return [done[i] for i in range(len(texts))]


class PromptEncoder:
    """Builds the prompts of one checkpoint. Thread-safe; the tokenizing itself runs outside Python, batched.

    Whatever query, document and instruction hold, none of their characters becomes a control or added token.

    Args:
        tokenizer: Content of the checkpoint's `tokenizer.json`, or the tokenizer made from it.
        spec: The strings around the fields; None means the model card's.
        instruction: Default instruction; None means the model card's.
        max_length: Tokens of one prompt, prefix and suffix included.

    Attributes:
        yes_id: Token id of the answer "yes".
        no_id: Token id of the answer "no".
        prefix_ids: int32, before the instruction's label.
        suffix_ids: int32, after the document.
        fingerprint: Changes with anything that changes the ids of a prompt.

    Raises:
        InvalidInputError: If an argument is wrong.
        TokenizerError: If a control string or label is not exactly one token.
    """

    def __init__(
        self,
        tokenizer: str | bytes | PromptTokenizer,
        *,
        spec: PromptSpec | None = None,
        instruction: str | None = None,
        max_length: int = 8192,
    ) -> None:
        self.spec = spec or PromptSpec()
        self.instruction = DEFAULT_INSTRUCTION if instruction is None else check_text("instruction", instruction)
        self.max_length = check_count("max_length", max_length)
        self._tokenizer = tokenizer if isinstance(tokenizer, PromptTokenizer) else PromptTokenizer(tokenizer)
        self.yes_id = self._tokenizer.single_id(self.spec.yes)
        self.no_id = self._tokenizer.single_id(self.spec.no)
        self.prefix_ids = self._tokenizer.control_ids(self.spec.prefix)
        self.suffix_ids = self._tokenizer.control_ids(self.spec.suffix)
        self._body_room = self.max_length - len(self.prefix_ids) - len(self.suffix_ids)
        if self._body_room < 1:
            raise InvalidInputError(
                f"max_length ({self.max_length}) must be above the {self.max_length - self._body_room} tokens of the "
                "prompt's fixed prefix and suffix."
            )
        parts = [self._tokenizer.digest, repr(self.spec), self.instruction, self.max_length]
        self.fingerprint = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def encode(self, query: str, documents: Sequence[str], *, instruction: str | None = None) -> list[EncodedPrompt]:
        """Return one prompt for each document, in input order; only a document's own end is cut to fit.

        Raises:
            InvalidInputError: If a text is no string, holds a lone surrogate, or the query is empty.
            QueryTooLongError: If instruction and query leave no room for a document.
        """
        head, lead, room = self._head(query, instruction)
        pieces = self._tokenizer.pieces(lead, check_texts("documents", documents), room)
        return [
            EncodedPrompt(
                ids=np.concatenate((head, piece.ids, self.suffix_ids)),
                truncated=piece.tokens > room,
                kept_chars=piece.kept_chars,
                document_start=len(head),
            )
            for piece in pieces
        ]

    def fit(self, query: str, texts: Sequence[str], *, instruction: str | None = None) -> list[Fit]:
        """Return for each text its tokens, the room beside this query, and how many characters are kept.

        Raises:
            InvalidInputError: As `encode`.
            QueryTooLongError: As `encode`.
        """
        _, lead, room = self._head(query, instruction)
        pieces = self._tokenizer.pieces(lead, check_texts("texts", texts), room)
        return [Fit(tokens=piece.tokens, room=room, kept_chars=piece.kept_chars) for piece in pieces]

    def query_prefix(self, query: str, *, instruction: str | None = None) -> np.ndarray:
        """Return the ids that every prompt of this query starts with, int32 `(n,)`; they depend on no document."""
        return self._head(query, instruction)[0]

    def _head(self, query: str, instruction: str | None) -> tuple[np.ndarray, str, int]:
        """Return the ids up to the document, the text that is tokenized with it, and the tokens left for both."""
        instruction = self.instruction if instruction is None else check_text("instruction", instruction)
        text, lead = self.spec.split(instruction, check_query(query))
        [piece] = self._tokenizer.pieces("", [text], self._body_room)
        if piece.tokens >= self._body_room:
            raise QueryTooLongError(
                f"instruction ({len(instruction)} characters) and query ({len(query)} characters) take at least "
                f"{piece.tokens} of the {self._body_room} tokens that max_length ({self.max_length}) leaves beside the "
                "fixed prefix and suffix, so no document fits; shorten the query or raise max_length."
            )
        return np.concatenate((self.prefix_ids, piece.ids)), lead, self._body_room - len(piece.ids)


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


def _piece(encoding: Encoding, keep: int, *, whole: bool, n_chars: int, lead_chars: int) -> _Piece:
    ids = np.array(encoding.ids[:keep], dtype=np.int32)
    if len(encoding) <= keep:
        return _Piece(ids, len(encoding), n_chars)
    # A character may be spread over several tokens: it is kept only when all of them are.
    kept_chars = max(0, _start_char(encoding, keep) - lead_chars)
    return _Piece(ids, len(encoding) if whole else keep + 1, kept_chars)


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
    """The exactness of cuts and of the split between query and document rests on this normalizer and this pattern."""
    model = data["model"]
    if model.get("type") != "BPE" or model.get("dropout") or model.get("ignore_merges"):
        raise TokenizerError(f"{source}: the model must be plain BPE without dropout or ignore_merges, as Qwen's is.")
    steps = (data.get("pre_tokenizer") or {}).get("pretokenizers") or [{}]
    pattern = (steps[0].get("pattern") or {}).get("Regex")
    byte_level = {**steps[-1], "trim_offsets": None}
    expected = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": None, "use_regex": False}
    shape = (len(steps), steps[0].get("behavior"), steps[0].get("invert"))
    if data.get("normalizer") != _NORMALIZER or pattern != _WORD_PATTERN or shape != (2, "Isolated", False):
        raise TokenizerError(f"{source}: normalizer and pre_tokenizer must be Qwen's (NFC, the Qwen2 split pattern).")
    if byte_level != expected:
        raise TokenizerError(f"{source}: the last pre_tokenizer must be ByteLevel as Qwen's, not {steps[-1]}.")


def _check_added_out_of_reach(data: dict[str, Any], added_ids: dict[str, int], source: str) -> None:
    """Refuse a vocabulary in which ordinary merges lead to an added token: any text could then forge it."""
    vocabulary = data["model"].get("vocab") or {}
    inside = {content for content in vocabulary if vocabulary[content] in set(added_ids.values())}
    if not inside:
        return
    merges = (m if isinstance(m, str) else " ".join(m) for m in data["model"].get("merges") or [])
    made = {merge.replace(" ", "", 1) for merge in merges}
    forged = sorted(content for content in inside if len(content) == 1 or content in made)
    if forged:
        raise TokenizerError(f"{source}: plain text can become the added token {forged[0]!r}; such a file is refused.")
