"""Two small collections, Chinese and English, written for this package: what the demo and the playground search in."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from qwen_rerank.checks import check_choice
from qwen_rerank.types import Document

LANGUAGES = ("zh", "en")


@dataclass(frozen=True, slots=True)
class Sample:
    """A collection to look at.

    Attributes:
        language: "zh" or "en".
        documents: Short texts; the title is the first line of the text and is kept in the metadata too.
        queries: Questions that the collection answers.
    """

    language: str
    documents: list[Document]
    queries: list[str]


def load_sample(language: str) -> Sample:
    """Return the collection in `language`, "zh" or "en"."""
    check_choice("language", language, LANGUAGES)
    documents = [
        Document(f"{language}/{row['id']}", f"{row['title']}\n{row['text']}", {"title": row["title"]})
        for row in _rows(f"{language}.jsonl")
    ]
    return Sample(language, documents, [row["text"] for row in _rows("queries.jsonl") if row["collection"] == language])


def _rows(name: str) -> list[dict[str, Any]]:
    text = files(__package__).joinpath(name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]
