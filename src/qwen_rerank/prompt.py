"""The Qwen3-Reranker prompt: text to token ids, nothing else.

The strings follow the model card of Qwen3-Reranker and are constants here; a checkpoint's chat template is never read.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qwen_rerank.checks import check_choice, check_count, check_query, check_text, check_texts
from qwen_rerank.errors import InvalidInputError, QueryTooLongError
from qwen_rerank.tokenizer import CONTROL
from qwen_rerank.tokenizer import PromptTokenizer as PromptTokenizer
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

# Places where the Qwen2 split pattern ends a word whatever follows: before a space that follows no white space, and
# between a letter or digit and a punctuation mark. Both neighbours are also left alone by NFC.
_WORD_END = re.compile(r"(?<=\S)(?= )|(?<=[0-9A-Za-z\u4e00-\u9fff])(?=[\n!-/:-@\[-`{-~，。：；])")


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
        for name in ("separator", "instruction_label", "query_label", "document_label"):
            if CONTROL.search(getattr(self, name)):
                raise InvalidInputError(f"{name} ({getattr(self, name)!r}) must hold no control string.")
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
        _check_fields(query, instruction)
        return self.encode_checked(query, check_texts("documents", documents), instruction)

    def encode_checked(self, query: str, documents: Sequence[str], instruction: str | None) -> list[EncodedPrompt]:
        """As `encode`, for a caller that has checked its texts."""
        head, lead, room = self._head(query, instruction)
        pieces = self._tokenizer.pieces(lead, documents, room)
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
        _check_fields(query, instruction)
        return self.fit_checked(query, check_texts("texts", texts), instruction)

    def fit_checked(self, query: str, texts: Sequence[str], instruction: str | None) -> list[Fit]:
        """As `fit`, for a caller that has checked its texts."""
        _, lead, room = self._head(query, instruction)
        pieces = self._tokenizer.pieces(lead, texts, room)
        return [Fit(tokens=piece.tokens, room=room, kept_chars=piece.kept_chars) for piece in pieces]

    def query_prefix(self, query: str, *, instruction: str | None = None) -> np.ndarray:
        """Return the ids that every prompt of this query starts with, int32 `(n,)`; they depend on no document."""
        _check_fields(query, instruction)
        return self._head(query, instruction)[0]

    def _head(self, query: str, instruction: str | None) -> tuple[np.ndarray, str, int]:
        """Return the ids up to the document, the text that is tokenized with it, and the tokens left for both."""
        instruction = self.instruction if instruction is None else instruction
        text, lead = self.spec.split(instruction, query)
        [piece] = self._tokenizer.pieces("", [text], self._body_room)
        if piece.tokens >= self._body_room:
            raise QueryTooLongError(
                f"instruction ({len(instruction)} characters) and query ({len(query)} characters) take at least "
                f"{piece.tokens} of the {self._body_room} tokens that max_length ({self.max_length}) leaves beside the "
                "fixed prefix and suffix, so no document fits; shorten the query or raise max_length."
            )
        return np.concatenate((self.prefix_ids, piece.ids)), lead, self._body_room - len(piece.ids)


def _check_fields(query: object, instruction: object) -> None:
    check_query(query)
    if instruction is not None:
        check_text("instruction", instruction)
