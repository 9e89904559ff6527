"""Count how many times a document is checked and tokenised on each way in; `measure.py` runs it.

A check is a call of `qwen_rerank.checks.check_text` with the document; a tokenising is a text with the document in it that
is handed to the tokenizers library or to tiktoken. What the server does to a whole body while it parses it is not counted.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial, wraps
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

import qwen_rerank.checks

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from eval.size.made import documents, make_model

N_DOCUMENTS = 8
KINDS: dict[str, dict[str, int]] = {"128 tokens": {"tokens": 128}, "20,000 characters": {"chars": 20_000}}
QUERY = "what is asked"


class Counts:
    """How often each of the watched texts was checked and tokenised; the texts are told by the word they begin with."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._marks: dict[str, str] = {}
        self.checked: Counter[str] = Counter()
        self.tokenised: Counter[str] = Counter()

    def watch(self, texts: dict[str, str]) -> None:
        """Begin to count for these texts, from zero."""
        with self._lock:
            self._marks = {text: mark for mark, text in texts.items()}
            self.checked, self.tokenised = Counter(), Counter()

    def around_check(self, check: Callable[[str, object], str]) -> Callable[[str, object], str]:
        """Return the check of one text, counted."""

        @wraps(check)
        def counted(name: str, value: object) -> str:
            with self._lock:
                self.checked.update([self._marks[value]] if isinstance(value, str) and value in self._marks else [])
            return check(name, value)

        return counted

    def around_encode(self, encode: Callable[..., Any]) -> Callable[..., Any]:
        """Return a method of the tokenizer that takes one text or many, counted."""

        @wraps(encode)
        def counted(tokenizer: Tokenizer, given: Any, *args: Any, **options: Any) -> Any:
            texts = [given] if isinstance(given, str) else list(given)
            with self._lock:
                for text in texts:
                    self.tokenised.update(mark for mark in self._marks.values() if mark in str(text)[:1_000])
            return encode(tokenizer, given, *args, **options)

        return counted


def install(counts: Counts) -> None:
    """Count all checks and tokenisings; before any module takes a check's name for itself."""
    check = qwen_rerank.checks.check_text
    for module in [module for name, module in sys.modules.items() if name.startswith("qwen_rerank.")]:
        if module is not qwen_rerank.checks and getattr(module, "check_text", None) is check:
            raise SystemExit(f"{module.__name__} was loaded before its checks could be counted.")
    qwen_rerank.checks.check_text = counts.around_check(check)
    for name in ("encode", "encode_batch", "encode_batch_fast"):
        setattr(Tokenizer, name, counts.around_encode(getattr(Tokenizer, name)))
    with suppress(ImportError):
        from tiktoken import Encoding

        Encoding.encode_ordinary = counts.around_encode(Encoding.encode_ordinary)


def main() -> None:
    """Print the counts as JSON."""
    counts = Counts()
    install(counts)
    from qwen_rerank import QwenScorer, Reranker

    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        scorer = QwenScorer(str(make_model(Path(folder) / "model", layers=1)), device="cpu")
        ways: dict[str, Callable[[list[str]], Any]] = {
            "QwenScorer.score": partial(scorer.score, QUERY),
            "Reranker.rerank": partial(Reranker(scorer).rerank, QUERY),
            "POST /v1/rerank": partial(_post, scorer),
        }
        report = {way: {kind: _counted(counts, ask, KINDS[kind]) for kind in KINDS} for way, ask in ways.items()}
        scorer.close()
    print(json.dumps(report))


def _counted(counts: Counts, ask: Callable[[list[str]], Any], size: dict[str, int]) -> dict[str, float]:
    """Return checks and tokenisings of one document, of several that are asked about together."""
    texts = documents(N_DOCUMENTS, seed=1, **size)
    counts.watch(texts)
    ask(list(texts.values()))
    return {
        "checked": counts.checked.total() / N_DOCUMENTS,
        "tokenised": counts.tokenised.total() / N_DOCUMENTS,
    }


def _post(scorer: Any, texts: list[str]) -> None:
    asyncio.run(_ask_app(scorer, texts))


async def _ask_app(scorer: Any, texts: list[str]) -> None:
    import httpx2

    from qwen_rerank.serve.app import create_app

    app = create_app(scorer)
    async with (
        app.router.lifespan_context(app),
        httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://server") as client,
    ):
        await app.state.backend.wait_loaded()
        answer = await client.post("/v1/rerank", json={"query": QUERY, "documents": texts})
        answer.raise_for_status()


if __name__ == "__main__":
    main()
