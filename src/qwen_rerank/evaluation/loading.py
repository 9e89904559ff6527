"""A collection by where it lies: a BEIR folder, documents with labels of your own, TREC files, or a hub data set."""

from __future__ import annotations

import logging
from pathlib import Path

from qwen_rerank.errors import InvalidInputError
from qwen_rerank.evaluation.collection import Collection, load_beir, load_pairs, load_trec
from qwen_rerank.files import read_documents
from qwen_rerank.types import Document

log = logging.getLogger(__name__)

HUB = "hub:"


def load_collection(
    source: str,
    *,
    split: str = "test",
    labels: Path | None = None,
    topics: Path | None = None,
    qrels: Path | None = None,
) -> Collection:
    """Return the collection that the arguments name.

    Args:
        source: A folder in BEIR layout; `hub:owner/name@revision`; or, with `labels` or `topics` and `qrels`, a file or folder of
            documents (.txt, .md, .jsonl, .csv).
        split: Of the judgements, in a BEIR folder or hub data set.
        labels: JSONL of `{"query": …, "relevant": [document ids]}`.
        topics: TREC topics, or `id<tab>text` lines, or JSONL.
        qrels: TREC or BEIR judgements.

    Raises:
        InvalidInputError: If the arguments do not belong together, or a file is wrong.
    """
    if labels is not None and (topics is not None or qrels is not None):
        raise InvalidInputError("give labels, or topics and qrels, not both.")
    if (topics is None) != (qrels is None):
        raise InvalidInputError("topics and qrels belong together: give both.")
    if labels is not None:
        return load_pairs(labels, _documents(source), name=_name(source))
    if topics is not None and qrels is not None:
        return load_trec(_documents(source), topics, qrels, name=_name(source))
    if source.startswith(HUB):
        from qwen_rerank.evaluation.hub import load_hub

        name, _, revision = source.removeprefix(HUB).partition("@")
        return load_hub(name, revision=revision or None, split=split)
    if not Path(source).is_dir():
        raise InvalidInputError(
            f"{source!r} is no folder; give a folder in BEIR layout (corpus.jsonl, queries.jsonl, qrels/), "
            f"documents with --labels, or {HUB}owner/name."
        )
    return load_beir(source, split=split)


def _name(source: str) -> str:
    return Path(source).resolve().stem


def _documents(source: str) -> list[Document]:
    reading = read_documents([Path(source)])
    for skipped in reading.skipped:
        log.warning("%s: skipped, %s", skipped.where, skipped.reason)
    log.info("%s: %d documents used, %d skipped", source, len(reading.documents), len(reading.skipped))
    if not reading.documents:
        raise InvalidInputError(f"{source!r} holds no document.")
    return reading.documents
