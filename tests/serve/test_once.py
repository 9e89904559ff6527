"""A document of a request is checked by the schema, tokenized once, and shares its query's prefix with all others."""

from __future__ import annotations

from collections import Counter

import pytest

import qwen_rerank.checks
from qwen_rerank import QwenScorer
from qwen_rerank.scorers.qwen.model import Forward
from qwen_rerank.tokenizer import PromptTokenizer
from tests.serve.conftest import app_client

SHORT = [f"short {i}" for i in range(8)]
LONG = [f"long {i} " + "word " * 8_000 for i in range(3)]


@pytest.fixture(scope="module")
def scorer():
    with QwenScorer("pocket", device="cpu", max_length=512) as made:
        yield made


def counted(monkeypatch, owner, name: str) -> list:
    """Return the list of what a function of one argument beside `self` or a name is called with from now on."""
    real, given = getattr(owner, name), []

    def count(first, value, *args, **options):
        given.append(value)
        return real(first, value, *args, **options)

    monkeypatch.setattr(owner, name, count)
    return given


@pytest.mark.parametrize("documents", [SHORT, LONG, SHORT + LONG + SHORT], ids=["short", "long", "repeated"])
async def test_each_distinct_document_is_tokenized_once_and_checked_by_the_schema_alone(scorer, monkeypatch, documents):
    async with app_client(scorer) as client:
        checked = counted(monkeypatch, qwen_rerank.checks, "check_text")
        batches = counted(monkeypatch, PromptTokenizer, "_encode")
        response = await client.rerank(query="q", documents=documents)

    assert response.status_code == 200
    counts = Counter(text.strip()[:7] for batch in batches for text in batch)
    assert {text: counts[text[:7]] for text in documents} == dict.fromkeys(documents, 1)
    assert not set(checked) & set(documents)


async def test_usage_and_truncated_are_exact(scorer):
    async with app_client(scorer) as client:
        response = await client.rerank(query="q", documents=[*SHORT, LONG[0]], return_details=True)

    prompts = scorer.encoder.encode("q", [*SHORT, LONG[0]])
    assert response.json()["usage"]["prompt_tokens"] == sum(len(prompt.ids) for prompt in prompts)
    results = response.json()["results"]
    assert [result["index"] for result in results if result["truncated"]] == [len(SHORT)]
    assert [result["best_window"] for result in results if result["truncated"]] == [[0, prompts[-1].kept_chars]]


async def test_slices_of_a_request_compute_the_querys_prefix_once(scorer, monkeypatch):
    """A slot holds one document here, so every document has a pass of its own."""
    async with app_client(scorer, max_running_tokens=4) as client:
        layouts = counted(monkeypatch, Forward, "__call__")
        await client.rerank(query="q", documents=[f"{i} words of a text" for i in range(6)])

    assert [len(layout.documents) for layout in layouts] == [1] * 6
    assert [len(layout.prefixes) for layout in layouts] == [1, 0, 0, 0, 0, 0]
