"""Small inputs, models that always answer alike, and the rows that a job must make of them, the slow way."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from qwen_rerank import Reranker
from qwen_rerank.bulk import read_rows
from qwen_rerank.testing import HashEmbedder, OverlapScorer

WORDS = ["apple", "pear", "tree", "green", "red", "ground", "carrot", "苹果", "树"]


class PickyEmbedder(HashEmbedder):
    """Fails at every text with "poison"."""

    def embed_documents(self, texts):
        if any("poison" in text for text in texts):
            raise ValueError("it is poisoned")
        return super().embed_documents(texts)


class Mortal(PickyEmbedder):
    """Kills its own process, as a machine that goes away would, at random and at most as often as it is told."""

    def __init__(self, graves: Path, kills: int, chance: float = 0.7, pause: float = 0.02) -> None:
        super().__init__(8)
        self._graves = graves
        self._kills = kills
        self._chance = chance
        self._pause = pause

    def embed_documents(self, texts):
        time.sleep(self._pause)
        if len(texts) > 1 and random.random() < self._chance:
            for number in range(self._kills):
                try:
                    os.close(os.open(self._graves / str(number), os.O_CREAT | os.O_EXCL))
                except FileExistsError:
                    continue
                os.kill(os.getpid(), signal.SIGKILL)
        return super().embed_documents(texts)


def embedder() -> PickyEmbedder:
    return PickyEmbedder(8)


def scorer() -> OverlapScorer:
    return OverlapScorer()


def text(i: int) -> str:
    return " ".join(WORDS[(i * 7 + k * (i % 5 + 1)) % len(WORDS)] for k in range(4 + i % 3))


def documents(n: int, *, poisoned: set[int] = frozenset()) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"id": f"d{i}", "text": text(i), "metadata": {"n": i}} for i in range(n)]
    for i in poisoned:
        rows[i]["text"] += " poison"
    return rows


def pairs(n: int) -> list[dict[str, Any]]:
    return [{"query_id": f"q{i % 3}", "query": text(i % 3), "doc_id": f"d{i}", "document": text(i)} for i in range(n)]


def runs(n: int, depth: int = 4) -> list[dict[str, Any]]:
    def candidates(i: int) -> list[dict[str, Any]]:
        return [{"id": f"d{i}-{k}", "text": text(i + k), "score": 1.0 - k / 10} for k in range(depth)]

    return [{"query_id": f"q{i}", "query": text(i), "candidates": candidates(i)} for i in range(n)]


def write(path: Path, rows: list[dict[str, Any]], *, row_group: int = 1000) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group)
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def made(output: object, **options: Any) -> list[dict[str, Any]]:
    """Return all rows of a job, in input order."""
    return [row for table in read_rows(str(output), **options) for row in table.to_pylist()]


def rejected(output: Path) -> list[dict[str, Any]]:
    lines = [line for path in sorted((output / "rejects").glob("*")) for line in path.read_text().splitlines()]
    return [json.loads(line) for line in lines]


def embedded_slowly(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what one document after the other gives."""
    found = []
    for row in rows:
        vector = HashEmbedder(8).embed_documents([row["text"]])[0]
        found.append(
            {"id": row["id"], "text": row["text"], "metadata": json.dumps(row["metadata"]), "vector": vector.tolist()}
        )
    return found


def scored_slowly(rows: list[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    """Return what one pair after the other gives."""
    found = []
    for number, row in enumerate(rows, 1):
        scores = scorer().score_details(row["query"], [row["document"]])
        log_odds = float(scores.log_odds[0])
        counts = {"tokens": int(scores.tokens[0]), "kept_chars": int(scores.kept_chars[0])}
        ids = {"query_id": row["query_id"], "doc_id": row["doc_id"]}
        score = 1 / (1 + math.exp(-log_odds))
        found.append({"file": str(path), "row": number, **ids, "log_odds": log_odds, "score": score, **counts})
    return found


def ranked_slowly(rows: list[dict[str, Any]], *, top_n: int | None = None) -> list[dict[str, Any]]:
    """Return what one query after the other gives."""
    found = []
    for row in rows:
        texts = [candidate["text"] for candidate in row["candidates"]]
        for hit in Reranker(scorer(), top_n=top_n).rerank(row["query"], texts):
            candidate = row["candidates"][hit.index]
            ids = {"query_id": row["query_id"], "doc_id": candidate["id"], "rank": hit.rank}
            scores = {"score": hit.score, "log_odds": hit.log_odds, "first_stage_score": candidate["score"]}
            found.append({**ids, **scores, "truncated": hit.truncated})
    return found
