"""Training rows: JSONL lines or a BEIR folder to examples; a line that cannot be used is named and counted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qwen_rerank.checks import check_text, is_finite
from qwen_rerank.documents.judgements import judged_once, judgements, split_file
from qwen_rerank.documents.queries import read_queries
from qwen_rerank.documents.reader import Row, Skipped, TextFile
from qwen_rerank.documents.texts import find_table, read_corpus
from qwen_rerank.errors import InvalidInputError
from qwen_rerank.types import Document

_POSITIVE_KEYS = ("positive", "positives")
_NEGATIVE_KEYS = ("negative", "negatives")
_SHOWN = 5  # bad lines named in an error message


@dataclass(frozen=True, slots=True)
class Example:
    """A query with documents and what is known of each.

    Attributes:
        query: The query.
        documents: Texts, at least one.
        scores: One a document: 1 relevant and 0 not where `teacher` is false, else a teacher's log-odds.
        teacher: Whether `scores` are a teacher's.
    """

    query: str
    documents: tuple[str, ...]
    scores: tuple[float, ...]
    teacher: bool = False

    @property
    def positives(self) -> tuple[str, ...]:
        """Documents with a score above 0."""
        return tuple(text for text, score in zip(self.documents, self.scores, strict=True) if score > 0)

    @property
    def negatives(self) -> tuple[str, ...]:
        """Documents with a score of 0 or below."""
        return tuple(text for text, score in zip(self.documents, self.scores, strict=True) if score <= 0)


@dataclass(slots=True)
class TrainingData:
    """The training rows that were read, and what was skipped.

    Attributes:
        examples: In the order of the file.
        bad_lines: Lines that gave no example.
        corpus: Documents to mine negatives from; empty for JSONL.
    """

    examples: list[Example] = field(default_factory=list)
    bad_lines: list[Skipped] = field(default_factory=list)
    corpus: list[Document] = field(default_factory=list)


def load_training_data(path: str | Path, *, split: str = "train", skip_bad_lines: bool = False) -> TrainingData:
    """Read a JSONL file or a BEIR folder.

    A JSONL line is `{"query", "positive(s)", "negative(s)"}`, each a string or a list, the negatives optional; or
    `{"query", "documents", "scores"}` with a teacher's log-odds. A BEIR folder has `corpus.jsonl`, `queries.jsonl`
    (both also as `.gz`) and `qrels/<split>.tsv`; explicit judgements of 0 become negatives.

    Args:
        path: The file or folder.
        split: Which qrels of a folder.
        skip_bad_lines: Whether to go on without the lines that cannot be used; they are in `bad_lines` either way.

    Raises:
        InvalidInputError: If the path does not exist, holds no example, or has bad lines that may not be skipped.
    """
    root = Path(path)
    if root.is_dir():
        data = _read_folder(root, split)
    elif root.is_file():
        data = _read_jsonl(root)
    else:
        raise InvalidInputError(f"{str(path)!r} does not exist; give a JSONL file or a folder in BEIR layout.")
    if data.bad_lines and not skip_bad_lines:
        raise InvalidInputError(f"{describe_bad_lines(data.bad_lines)}; mend them or pass skip_bad_lines=True.")
    if not data.examples:
        raise InvalidInputError(f"{str(path)!r} holds no training example; {describe_bad_lines(data.bad_lines)}.")
    return data


def describe_bad_lines(bad_lines: Sequence[Skipped]) -> str:
    """Return one sentence part that counts the lines and names the first of them."""
    if not bad_lines:
        return "no line was refused"
    named = "; ".join(f"{bad.where}: {bad.reason}" for bad in bad_lines[:_SHOWN])
    more = f"; and {len(bad_lines) - _SHOWN} more" if len(bad_lines) > _SHOWN else ""
    return f"{len(bad_lines)} line(s) cannot be used: {named}{more}"


def example_from_row(row: Row) -> Example:
    """Return one example of a decoded JSONL line.

    Raises:
        InvalidInputError: If a field is missing or wrong.
    """
    query = check_text("query", row.get("query"))
    if not query.strip():
        raise InvalidInputError("query is empty.")
    if "documents" in row or "scores" in row:
        return _scored_example(query, row)
    positives = _texts(row, _POSITIVE_KEYS)
    negatives = _texts(row, _NEGATIVE_KEYS)
    if not positives:
        raise InvalidInputError("there is no positive; give `positive`, or `documents` with `scores`.")
    both = set(positives) & set(negatives)
    if both:
        raise InvalidInputError(f"{min(both)[:60]!r} is both positive and negative.")
    labels = (1.0,) * len(positives) + (0.0,) * len(negatives)
    return Example(query, (*positives, *negatives), labels)


def _scored_example(query: str, row: Row) -> Example:
    documents = _texts(row, ("documents",))
    scores = row.get("scores")
    if not isinstance(scores, list) or len(scores) != len(documents) or not documents:
        n_scores = len(scores) if isinstance(scores, list) else 0
        raise InvalidInputError(f"{len(documents)} documents have {n_scores} scores; give one score for each document.")
    for score in scores:
        if not is_finite(score):
            raise InvalidInputError(f"scores must be finite numbers (a teacher's log-odds), not {score!r}.")
    return Example(query, documents, tuple(float(score) for score in scores), teacher=True)


def _texts(row: Row, keys: Iterable[str]) -> tuple[str, ...]:
    """Return the texts under any of `keys`; a single string counts as a list of one."""
    found: list[str] = []
    for key in keys:
        value = row.get(key, [])
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list):
            raise InvalidInputError(f"{key} must be a string or a list of strings, not {type(value).__name__}.")
        found += [check_text(f"{key}[{i}]", text) for i, text in enumerate(values)]
    if not all(text.strip() for text in found):
        raise InvalidInputError(f"one of {', '.join(keys)} is an empty text.")
    return tuple(dict.fromkeys(found))


def _read_jsonl(path: Path) -> TrainingData:
    data = TrainingData()
    file = TextFile(path, skipped=data.bad_lines)
    data.examples = [example for _, example in file.each(file.objects(), example_from_row)]
    return data


def _read_folder(root: Path, split: str) -> TrainingData:
    data = TrainingData()
    data.corpus = read_corpus(find_table(root, "corpus"), skipped=data.bad_lines)
    texts = {document.id: document.text for document in data.corpus}
    queries = read_queries(find_table(root, "queries"), skipped=data.bad_lines)
    judged: dict[str, dict[str, float]] = {}
    qrels = split_file(root, split, skipped=data.bad_lines)
    for number, (query, document, grade) in judged_once(qrels, judgements(qrels)):
        if query in queries and document in texts:
            judged.setdefault(query, {})[document] = 1.0 if grade > 0 else 0.0
        else:
            unknown = document if query in queries else query
            qrels.refuse(number, f"the id {unknown!r} is not in the collection.")
    for query, labels in judged.items():
        if any(labels.values()):
            documents = tuple(texts[document] for document in labels)
            data.examples.append(Example(queries[query], documents, tuple(labels.values())))
    return data
