"""Words of a text, and an inverted index over them that ranks by BM25 and takes new texts at any time.

Chinese, Japanese, Korean, Thai, Lao, Khmer and Burmese are written without spaces, or with particles that stick to words,
so they are read as pairs of characters; Han and kana also as single ones. Traditional characters count as their simplified
forms. Vowel signs and accents that are characters of their own belong to the word they stand in.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np

from qwen_rerank.bounded_json import loads
from qwen_rerank.regular_files import open_regular

# Changes with anything that makes other terms of a text; an index that was saved with another version is built again.
VERSION = 2
_MOST_HEAD_BYTES = 1 << 20  # of the line that says how long the arrays of a file are

# Han and kana: 々〆〇, kana, extension A, the main block, compatibility, the supplementary planes. Then Hangul, and Thai,
# Lao, Burmese and Khmer.
_HAN = "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_PAIRED = "\uac00-\ud7a3\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
_LETTER = rf"[^\W_{_HAN}{_PAIRED}]"
_ASCII_TERM = re.compile(f"{_LETTER}+")
_IS_HAN = re.compile(f"[{_HAN}]")
_MARKS = (0x300, 0x12000)  # where the characters lie that stand on others within words
_IS_PAIRED = re.compile(f"[{_PAIRED}]")


@lru_cache(maxsize=1)
def _term() -> re.Pattern[str]:
    """Return what finds the terms of a text."""
    marks = "".join(c for c in map(chr, range(*_MARKS)) if unicodedata.category(c)[0] == "M")
    # Looking ahead for a character that may be a mark is quicker than looking for it among all marks.
    marked = rf"(?=[^\0-\u02ff])[{marks}]+{_LETTER}*"
    return re.compile(rf"[{_HAN}]+|[{_PAIRED}]+|{_LETTER}+(?:{marked})*")


# The English words that Lucene's StandardAnalyzer leaves out.
STOP_WORDS = frozenset(
    [
        "a",
        "an",
        "and",
        "are",
        "as",
        "at",
        "be",
        "but",
        "by",
        "for",
        "if",
        "in",
        "into",
        "is",
        "it",
        "no",
        "not",
        "of",
        "on",
        "or",
        "such",
        "that",
        "the",
        "their",
        "then",
        "there",
        "these",
        "they",
        "this",
        "to",
        "was",
        "will",
        "with",
    ]
)


def terms(text: str) -> list[str]:
    """Return the terms of a text in reading order: lower-cased words; characters and pairs of them where no space parts words.

    >>> terms("The 量子位 of BM25")
    ['量', '子', '位', '量子', '子位', 'bm25']
    """
    if text.isascii():
        return [term for term in _ASCII_TERM.findall(text.lower()) if term not in STOP_WORDS]
    found: list[str] = []
    # The capital i with a dot becomes an i and a dot of its own, which nobody types.
    for term in _term().findall(unicodedata.normalize("NFKC", text).lower().replace("i\u0307", "i")):
        if _IS_HAN.match(term):
            term = term.translate(_simplified())
            found += term
            found += [term[i : i + 2] for i in range(len(term) - 1)]
        elif _IS_PAIRED.match(term):
            found += [term[i : i + 2] for i in range(len(term) - 1)] or [term]
        elif term not in STOP_WORDS:
            found.append(term)
    return found


@lru_cache(maxsize=1)
def _simplified() -> dict[int, int]:
    """Return the simplified form of every traditional character that has one."""
    path = Path(__file__).with_name("traditional.txt")
    traditional, simplified = path.read_text(encoding="utf-8").split()
    return {ord(a): ord(b) for a, b in zip(traditional, simplified, strict=True)}


# The index

_MERGE_UP_TO = 4_000_000  # postings; two larger parts are searched one after the other, which costs next to nothing


@dataclass(slots=True)
class Part:
    """An inverted index that never grows: for each term the documents that hold it, by their place in `rows`.

    A term is kept as 64 bits of its hash; among two million terms the odds of one collision are one in ten million.
    """

    rows: np.ndarray  # int64 (n_documents,), ascending
    lengths: np.ndarray  # int32 (n_documents,), terms of each
    terms: np.ndarray  # uint64 (n_terms,), ascending
    starts: np.ndarray  # int64 (n_terms + 1,), where the postings of each term begin
    places: np.ndarray  # int32 (n_postings,), ascending within a term
    counts: np.ndarray  # uint16 (n_postings,), how often the document holds the term
    alive: np.ndarray = field(init=False)  # bool (n_documents,), False where a text was removed
    some_removed: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self.alive = np.ones(len(self.rows), dtype=bool)

    def postings(self, term: int) -> tuple[np.ndarray, np.ndarray]:
        """Return places and counts of a term."""
        at = int(np.searchsorted(self.terms, np.uint64(term)))
        if at == len(self.terms) or self.terms[at] != term:
            return self.places[:0], self.counts[:0]
        span = slice(int(self.starts[at]), int(self.starts[at + 1]))
        return self.places[span], self.counts[span]

    def n_alive(self, places: np.ndarray) -> int:
        """Return how many of these places have not been removed."""
        return int(self.alive[places].sum()) if self.some_removed else len(places)

    def remove(self, rows: np.ndarray) -> None:
        """Mark these rows as removed; unknown ones are ignored."""
        places = np.searchsorted(self.rows, rows)
        places = places[places < len(self.rows)]
        self.alive[places[np.isin(self.rows[places], rows)]] = False
        self.some_removed = not self.alive.all()

    def best(
        self,
        postings: Sequence[tuple[np.ndarray, np.ndarray, np.float32]],
        norm: np.ndarray,
        top_k: int,
        allowed: np.ndarray | None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return rows and scores of the best texts, in the order of their rows; at least `top_k` where there are.

        Args:
            postings: Places, counts and importance of each term.
            norm: What is added to a term's count, for each text.
            top_k: How many are needed.
            allowed: For each row number from 0 whether it may be found, bool; None is all.
        """
        sums = np.zeros(len(self.rows), dtype=np.float32)
        for places, counts, importance in postings:
            often = counts.astype(np.float32)
            sums[places] += importance * (often / (often + norm[places]))
        found = np.flatnonzero((sums > 0) & self.alive)
        if allowed is not None:
            found = found[allowed[self.rows[found]]]
        scores = sums[found]
        if len(found) > top_k:
            kept = scores >= np.partition(scores, -top_k)[-top_k]
            found, scores = found[kept], scores[kept]
        return self.rows[found], scores


_FIELDS = (
    ("rows", np.int64),
    ("lengths", np.int32),
    ("terms", np.uint64),
    ("starts", np.int64),
    ("places", np.int32),
    ("counts", np.uint16),
)


@dataclass(frozen=True, slots=True)
class WordStatistics:
    """The facts about all texts that BM25 weighs one text's words by; those of several indexes add up.

    Attributes:
        n_texts: How many texts there are.
        n_terms: How many terms they have together.
        holding: Hash of a term to the number of texts that hold it.
    """

    n_texts: int
    n_terms: int
    holding: Mapping[int, int]

    def __add__(self, other: WordStatistics) -> WordStatistics:
        holding = Counter(self.holding)
        holding.update(other.holding)
        return WordStatistics(self.n_texts + other.n_texts, self.n_terms + other.n_terms, holding)


class WordIndex:
    """Texts by row number, found by the words that they share with a query; scores as Lucene's BM25.

    What it answers depends on the texts that are there alone, not on the order of adding, removing, saving and reading.

    Args:
        k1: How soon repeated terms stop counting, above 0.
        b: How much long texts are marked down, 0 to 1.
    """

    def __init__(self, *, k1: float = 0.9, b: float = 0.4) -> None:
        self._k1 = k1
        self._b = b
        self._parts: list[Part] = []
        self._norms: tuple[float, list[np.ndarray]] | None = None  # of texts of this mean length
        self._n_terms: int | None = None

    def __len__(self) -> int:
        return sum(int(part.alive.sum()) for part in self._parts)

    def rows(self) -> np.ndarray:
        """Return the row numbers that are there, int64, ascending."""
        return _concatenated([part.rows[part.alive] for part in self._parts], np.int64)

    def last_row(self) -> int:
        """Return the highest row number that it holds, removed ones included; 0 when empty."""
        return next((int(part.rows[-1]) for part in reversed(self._parts) if len(part.rows)), 0)

    def add(self, rows: np.ndarray, texts: Sequence[str]) -> None:
        """Add texts under row numbers, int64 ascending, above every one before."""
        if len(rows):
            self.append(part_of(rows, texts))

    def append(self, part: Part) -> None:
        """Add what `part_of` made of some texts, which takes most of the time of `add`."""
        self._parts.append(part)
        # As the digits of a binary number: a part is merged again only when it has doubled.
        while len(self._parts) > 1 and _size(self._parts[-2]) <= min(2 * _size(self._parts[-1]), _MERGE_UP_TO):
            self._parts[-2:] = [_merged(self._parts[-2:])]
        self._norms = self._n_terms = None

    def remove(self, rows: np.ndarray) -> None:
        """Remove these rows; unknown ones are ignored."""
        for part in self._parts:
            part.remove(rows)
        self._norms = self._n_terms = None

    # Searching

    def search(
        self, query: str, top_k: int, allowed: np.ndarray | None = None, statistics: WordStatistics | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return row numbers, int64, and scores, float32, of the texts that share a term with the query, best first.

        Equal scores are in the order of their rows.

        Args:
            query: What to look for.
            top_k: Longest result, at least 1.
            allowed: For each row number from 0 whether it may be found, bool; None is all.
            statistics: Of the query's terms among all texts, where these are only a part of them; None for its own.
        """
        weights = _weights(query)
        found = self._best(weights, top_k, allowed, statistics or self._statistics(weights))
        rows = _concatenated([rows for rows, _ in found], np.int64)
        scores = _concatenated([scores for _, scores in found], np.float32)
        order = np.argsort(-scores, kind="stable")[:top_k]
        return rows[order], scores[order]

    def statistics(self, queries: Sequence[str]) -> WordStatistics:
        """Return what these texts tell of the terms of queries."""
        return self._statistics({term for query in queries for term in _weights(query)})

    def _statistics(self, hashes: Iterable[int]) -> WordStatistics:
        # Removed texts do not count, so that a score does not tell what was there before.
        holding = {term: sum(part.n_alive(part.postings(term)[0]) for part in self._parts) for term in hashes}
        if self._n_terms is None:
            self._n_terms = sum(int(part.lengths[part.alive].sum(dtype=np.int64)) for part in self._parts)
        return WordStatistics(len(self), self._n_terms, holding)

    def _best(
        self, weights: dict[int, int], top_k: int, allowed: np.ndarray | None, known: WordStatistics
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return for each part rows and scores of its best `top_k` texts, and of those with the score of the last."""
        norms = self._length_norms(known.n_terms / max(1, known.n_texts) or 1.0)
        postings, importances = [], []
        for term, weight in weights.items():
            postings.append([part.postings(term) for part in self._parts])
            holding = known.holding[term]
            importances.append(np.float32(weight * math.log(1 + (known.n_texts - holding + 0.5) / (holding + 0.5))))
        return [
            part.best([(*found[number], weight) for found, weight in zip(postings, importances)], norm, top_k, allowed)
            for number, (part, norm) in enumerate(zip(self._parts, norms, strict=True))
        ]

    def _length_norms(self, mean: float) -> list[np.ndarray]:
        """Return what BM25 adds to a term's count, float32 for each document: more for a long one."""
        k1, b, known = self._k1, self._b, self._norms
        if known is None or known[0] != mean:
            known = (mean, [(k1 * (1 - b + b * (part.lengths / mean))).astype(np.float32) for part in self._parts])
            self._norms = known
        return known[1]

    # Files

    def write(self, path: Path) -> None:
        """Write the index without removed texts: one line of JSON that says how long the arrays are, then the arrays."""
        parts = [_merged([part]) if part.some_removed else part for part in self._parts]
        arrays = [getattr(part, name) for part in parts for name, _ in _FIELDS]
        head = {"version": VERSION, "lengths": [len(values) for values in arrays]}
        with path.open("wb") as file:
            file.write(json.dumps(head).encode() + b"\n")
            for values in arrays:
                file.write(np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<"), copy=False).data)

    def read(self, path: Path) -> None:
        """Take the content of a file that was verified.

        Raises:
            ValueError: If the file is no word index, or of another version.
        """
        with open_regular(path) as file:
            head = loads(file.readline(_MOST_HEAD_BYTES))
            if not isinstance(head, dict) or head.get("version") != VERSION:
                raise ValueError("it was written by another version")
            arrays = []
            size = path.stat().st_size
            for number, length in enumerate(head["lengths"]):
                kind = np.dtype(_FIELDS[number % len(_FIELDS)][1]).newbyteorder("<")
                if not 0 <= length <= size // kind.itemsize:
                    raise ValueError("it is shorter than it says")
                arrays.append(np.fromfile(file, kind, length).astype(kind.newbyteorder("="), copy=False))
        if [len(values) for values in arrays] != head["lengths"]:
            raise ValueError("it is shorter than it says")
        size = len(_FIELDS)
        self._parts = [Part(*arrays[start : start + size]) for start in range(0, len(arrays), size)]
        self._norms = self._n_terms = None

    def same_as(self, other: WordIndex) -> bool:
        """Return whether both hold the same texts, word for word."""
        mine, theirs = _merged(self._parts), _merged(other._parts)
        return all(np.array_equal(getattr(mine, name), getattr(theirs, name)) for name, _ in _FIELDS)


def _weights(query: str) -> dict[int, int]:
    """Return the hash of each term of a query and how often it stands there."""
    wanted = Counter(terms(query))
    return dict(zip(_hashes(list(wanted)).tolist(), wanted.values(), strict=True))


def _size(part: Part) -> int:
    return len(part.places)


def _concatenated(arrays: list[np.ndarray], kind: type) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.empty(0, kind)


def _hashes(found: Sequence[str]) -> np.ndarray:
    """Return 64 bits for each term, uint64 `(n_terms,)`."""
    digests = b"".join(hashlib.blake2b(term.encode(), digest_size=8).digest() for term in found)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


def part_of(rows: np.ndarray, texts: Sequence[str]) -> Part:
    """Return the index of at least one text, by row numbers, int64 ascending."""
    # 1. Every term of every text as a small number, in the order in which terms are first met.
    numbers: dict[str, int] = {}
    flat, lengths = array("i"), array("i")
    for text in texts:
        found = terms(text)
        lengths.append(len(found))
        flat.extend([numbers.setdefault(term, len(numbers)) for term in found])
    # 2. The numbers in the order of the terms' hashes.
    hashes = _hashes(list(numbers))
    order = np.argsort(hashes)
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    # 3. (term, document) pairs, each once with its count, sorted by term and then by document.
    places = np.repeat(np.arange(len(texts)), lengths)
    pairs, counts = np.unique(rank[np.asarray(flat)] * len(texts) + places, return_counts=True)
    term_of, place_of = np.divmod(pairs, len(texts))
    return Part(
        rows=np.asarray(rows, dtype=np.int64),
        lengths=np.array(lengths, dtype=np.int32),
        terms=hashes[order],
        starts=np.searchsorted(term_of, np.arange(len(order) + 1)).astype(np.int64),
        places=place_of.astype(np.int32),
        counts=np.minimum(counts, np.iinfo(np.uint16).max).astype(np.uint16),
    )


def _merged(parts: Sequence[Part]) -> Part:
    """Return parts, whose rows ascend from one to the next, as one without what was removed."""
    all_terms = np.unique(_concatenated([part.terms for part in parts], np.uint64))
    term_of, place_of, counts, before = [], [], [], 0
    for part in parts:
        kept = part.alive[part.places]
        ranks = np.searchsorted(all_terms, part.terms).astype(np.int32)
        term_of.append(np.repeat(ranks, np.diff(part.starts))[kept])
        place_of.append((before + np.cumsum(part.alive, dtype=np.int32) - 1)[part.places[kept]].astype(np.int32))
        counts.append(part.counts[kept])
        before += int(part.alive.sum())
    terms_ = _concatenated(term_of, np.int32)
    order = np.argsort(terms_, kind="stable")  # places ascend already, part after part
    used, first = np.unique(terms_[order], return_index=True)
    return Part(
        rows=_concatenated([part.rows[part.alive] for part in parts], np.int64),
        lengths=_concatenated([part.lengths[part.alive] for part in parts], np.int32),
        terms=all_terms[used],
        starts=np.append(first, len(order)).astype(np.int64),
        places=_concatenated(place_of, np.int32)[order],
        counts=_concatenated(counts, np.uint16)[order],
    )
