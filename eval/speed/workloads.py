"""What is scored: queries and documents of exact token counts, made of English words, the same for every contestant."""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Workload:
    """Queries with their documents.

    Attributes:
        name: Key in the results.
        queries: Texts.
        documents: One list for each query.
        engines: Contestants that run it; a slow one is left out where its figure is not asked for.
        rounds: How often in a turn; the best of all turns counts.
    """

    name: str
    queries: list[str]
    documents: list[list[str]]
    engines: tuple[str, ...]
    rounds: int

    @property
    def n_documents(self) -> int:
        """Documents of all queries."""
        return sum(map(len, self.documents))


class Words:
    """Draws texts from the words that are one token of the tokenizer, with the space before them."""

    def __init__(self, tokenizer: Path, *, seed: int = 0) -> None:
        self._path = tokenizer / "tokenizer.json"
        self._draw = random.Random(seed)

    @cached_property
    def _words(self) -> list[str]:
        vocabulary = json.loads(self._path.read_text())["model"]["vocab"]
        return sorted(word[1:] for word in vocabulary if word[0] == "Ġ" and word[1:].isascii() and word[1:].islower())

    def text(self, n_tokens: int) -> str:
        """Return a text of `n_tokens` words of one token each."""
        return " ".join(self._draw.choices(self._words, k=n_tokens))

    def texts(self, *lengths: int) -> list[str]:
        """Return one text for each length."""
        return [self.text(length) for length in lengths]

    def spread(self, n: int, shortest: int, longest: int) -> list[str]:
        """Return `n` texts with lengths spread evenly, in random order."""
        lengths = [shortest + i * (longest - shortest) // (n - 1) for i in range(n)]
        self._draw.shuffle(lengths)
        return self.texts(*lengths)


ALL = ("recipe", "recipe-last", "sentence-transformers", "engine", "vllm")
FAST = ("sentence-transformers", "engine", "vllm")


def cpu_workloads(words: Words) -> list[Workload]:
    """The workloads scaled to what two cores score in minutes; lengths as on the GPU, fewer documents."""
    return [
        Workload("1x16x128", words.texts(12), [words.texts(*[128] * 16)], (*ALL, "engine-deterministic"), 2),
        Workload("2x6 mixed 20-400", words.texts(12, 12), [words.spread(6, 20, 400) for _ in range(2)], ALL, 2),
        Workload("throughput 2x16x128", words.texts(12, 12), [words.texts(*[128] * 16) for _ in range(2)], FAST, 2),
        Workload("1x10 of 300 tokens, 120 the query's", words.texts(57), [words.texts(*[167] * 10)], FAST, 2),
        Workload("1x2x2000", words.texts(12), [words.texts(2000, 2000)], ("recipe-last", *FAST), 2),
        Workload("1x1x8000", words.texts(12), [words.texts(8000)], ("recipe-last", "engine"), 1),
    ]


def gpu_workloads(words: Words, *, large: bool) -> list[Workload]:
    """The workloads at full size; for the larger models the slow contestants get fewer documents."""
    scale = 4 if large else 1
    return [
        Workload("1x50x128", words.texts(12), [words.texts(*[128] * 50)], (*ALL, "engine-deterministic"), 10),
        Workload("1x100x512", words.texts(12), [words.texts(*[512] * 100)], ALL, 3),
        Workload("20x20 mixed 20-400", words.texts(*[12] * 20), [words.spread(20, 20, 400) for _ in range(20)], ALL, 3),
        Workload(
            f"throughput {1000 // scale // 4}x100x128",
            words.texts(*[12] * (1000 // scale // 4)),
            [words.texts(*[128] * 100) for _ in range(1000 // scale // 4)],
            FAST,
            1,
        ),
        Workload(
            "200x10 of 300 tokens, 120 the query's",
            words.texts(*[57] * 200),
            [words.texts(*[167] * 10) for _ in range(200)],
            FAST,
            2,
        ),
        Workload("1x16x2000", words.texts(12), [words.texts(*[2000] * 16)], ("recipe-last", *FAST), 3),
        Workload("1x1x8000", words.texts(12), [words.texts(8000)], ("recipe-last", *FAST), 3),
    ]


def smoke_workloads(words: Words) -> list[Workload]:
    """Seconds of work, to see that everything runs and agrees."""
    return [
        Workload("1x4x32", words.texts(12), [words.texts(*[32] * 4)], (*ALL, "engine-deterministic"), 2),
        Workload("2x4 mixed 20-80", words.texts(12, 12), [words.spread(4, 20, 80) for _ in range(2)], ALL, 1),
    ]


def chosen(options: argparse.Namespace, words: Words) -> list[Workload]:
    """Return the workloads of a run: those for its device, of them the ones whose names begin as asked."""
    if options.quick:
        found = smoke_workloads(words)
    elif options.device == "cpu":
        found = cpu_workloads(words)
    else:
        found = gpu_workloads(words, large=options.size in ("4B", "8B"))
    return [w for w in found if options.workloads is None or any(w.name.startswith(name) for name in options.workloads)]
