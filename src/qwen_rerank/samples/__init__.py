"""Collections that ship with the package, Chinese and English: the demo, the playground and the tutorials search in them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
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
        relevant: Question to the id of the one document that answers it; empty where nobody judged.
    """

    language: str
    documents: list[Document]
    queries: list[str]
    relevant: Mapping[str, str] = field(default_factory=dict)


def load_sample(language: str) -> Sample:
    """Return a small knowledge base written for this package, with a few questions; "zh" or "en"."""
    return _load(language, f"{language}.jsonl", "queries.jsonl")


def load_encyclopedia(language: str) -> Sample:
    """Return about 500 sentences of twenty Wikipedia articles with sixty judged questions; "zh" or "en".

    From XQuAD-R of LAReQA (Roy et al. 2020, doi:10.18653/v1/2020.emnlp-main.477), CC BY-SA 4.0; `eval/samples.py` makes
    it. The questions are the same in both languages.
    """
    return _load(language, f"encyclopedia.{language}.jsonl", "encyclopedia.questions.jsonl")


def load_demo_results() -> dict[str, Any]:
    """Return what the demo's pair makes of the encyclopedia: counts, and the questions that are shown.

    Behind words and vectors; under "bm25" behind words alone.

    `eval/demo.py` writes it.
    """
    found: dict[str, Any] = json.loads(
        files(__package__).joinpath("encyclopedia.results.json").read_text(encoding="utf-8")
    )
    return found


def _load(language: str, documents: str, questions: str) -> Sample:
    check_choice("language", language, LANGUAGES)
    rows = [row for row in _rows(questions) if row["collection"] == language]
    return Sample(
        language,
        [
            Document(f"{language}/{row['id']}", f"{row['title']}\n{row['text']}", {"title": row["title"]})
            for row in _rows(documents)
        ],
        [row["text"] for row in rows],
        {row["text"]: f"{language}/{row['relevant']}" for row in rows if "relevant" in row},
    )


def _rows(name: str) -> list[dict[str, Any]]:
    text = files(__package__).joinpath(name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]
