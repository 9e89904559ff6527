"""nDCG@10 of reranked candidates, for the machine that trains; the figures that are published come from `measure.py`."""

from __future__ import annotations

import json
import lzma
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from batches import LONGEST_QUERY, Texts, batch, by_length, tokenized

DISCOUNT = 1 / np.log2(np.arange(2, 12))


def ndcg(ranked: list[int], grades: Mapping[int, int]) -> float:
    """Return nDCG@10 with linear gain."""
    gains = np.array([max(0, grades.get(d, 0)) for d in ranked[:10]], float)
    ideal = np.sort([g for g in grades.values() if g > 0])[::-1][:10]
    return float((gains * DISCOUNT[: len(gains)]).sum() / (ideal * DISCOUNT[: len(ideal)]).sum())


@dataclass
class Measured:
    """One collection's candidates, tokenized, with what is needed to measure an order of them."""

    name: str
    language: str
    role: str
    names: list[str]
    queries: Texts
    documents: Texts
    grades: list[dict[int, int]]
    runs: dict[str, list[list[tuple[int, float]]]]
    texts: tuple[list[str], list[str]]
    scores: dict[str, np.ndarray] = field(default_factory=dict)  # of the last measurement, a first stage

    def pairs(self, stage: str, depth: int = 50) -> tuple[np.ndarray, np.ndarray]:
        """Return query and document places of a first stage's candidates."""
        found = [(j, d) for j, run in enumerate(self.runs[stage]) for d, _ in run[:depth]]
        return tuple(np.array(side) for side in zip(*found, strict=True))

    def per_query(self, stage: str, scores: np.ndarray | None, depth: int = 50) -> np.ndarray:
        """Return nDCG@10 a query of the candidates in the order of `scores`, or as they are."""
        values, at = [], 0
        for run, grades in zip(self.runs[stage], self.grades, strict=True):
            ranked = [d for d, _ in run[:depth]]
            if scores is not None:
                order = np.argsort(-scores[at : at + len(ranked)], kind="stable")
                at += len(ranked)
                ranked = [ranked[i] for i in order]
            values.append(ndcg(ranked, grades))
        return np.array(values)


def load(
    path: Path, folder: Path, *, longest: int, device: str, only: list[str] | None = None, queries: int = 400
) -> list[Measured]:
    """Return the collections of `candidates.py`."""
    with lzma.open(path, "rt", encoding="utf-8") as file:
        rows = json.load(file)
    found = []
    for row in rows:
        if only and row["name"] not in only:
            continue
        names = list(row["queries"])[:queries]
        asked = [row["queries"][q] for q in names]
        found.append(
            Measured(
                row["name"],
                row["language"],
                row["role"],
                names,
                tokenized(folder, asked, query=True, longest=LONGEST_QUERY, device=device),
                tokenized(folder, row["documents"], query=False, longest=longest, device=device),
                [{int(d): g for d, g in row["qrels"][q].items()} for q in names],
                {stage: [row["runs"][stage].get(q, []) for q in names] for stage in row["runs"]},
                (asked, row["documents"]),
            )
        )
    return found


@torch.inference_mode()
def scored(
    model, first: Texts, second: Texts, a: np.ndarray, b: np.ndarray, *, longest: int, tokens: int
) -> np.ndarray:
    """Return the model's log-odds of pairs."""
    device = str(first.ids.device)
    out = np.zeros(len(a), np.float32)
    for part in by_length(np.minimum(first.lengths[a] + second.lengths[b], longest), tokens):
        ids, mask = batch(first, second, a[part], b[part], longest)
        with torch.autocast(device.split(":")[0], torch.bfloat16):
            out[part] = model(ids, mask).float().cpu().numpy()
    return out


def interval(difference: np.ndarray, *, seed: int = 0) -> tuple[float, float, float]:
    """Return mean and 95 % percentile bootstrap interval of per-query differences."""
    draws = np.random.default_rng(seed).integers(0, len(difference), (2000, len(difference)))
    means = difference[draws].mean(1)
    return float(difference.mean()), float(np.percentile(means, 2.5)), float(np.percentile(means, 97.5))


def report(
    collections: list[Measured], model, *, longest: int, tokens: int, stages: tuple[str, ...] = ("bm25",)
) -> dict:
    """Return nDCG@10 before and after the model orders first stages' candidates, with the gain's interval."""
    result: dict = {}
    for stage in stages:
        table = result[stage] = {}
        for c in collections:
            if c.role == "teachers":
                continue
            a, b = c.pairs(stage)
            before = c.per_query(stage, None)
            c.scores[stage] = scored(model, c.queries, c.documents, a, b, longest=longest, tokens=tokens)
            after = c.per_query(stage, c.scores[stage])
            table[c.name] = [round(x, 4) for x in (before.mean(), after.mean(), *interval(after - before))]
        for role in ("measured", "chosen"):
            rows = [table[c.name] for c in collections if c.role == role]
            if rows:
                table[f"mean {role}"] = [
                    round(float(np.mean([r[1] for r in rows])), 4), round(float(np.mean([r[2] for r in rows])), 4),
                    sum(r[3] > 0 for r in rows), sum(r[4] < 0 for r in rows),
                ]  # fmt: skip
    return result


def fused(collections: list[Measured], parts: tuple[str, str], name: str, *, depth: int = 50, k: int = 60) -> None:
    """Add the reciprocal rank fusion of two first stages."""
    for c in collections:
        c.runs[name] = []
        for runs in zip(*(c.runs[part] for part in parts), strict=True):
            total: dict[int, float] = {}
            for run in runs:
                for rank, (d, _) in enumerate(run):
                    total[d] = total.get(d, 0.0) + 1 / (k + rank + 1)
            c.runs[name].append(sorted(total.items(), key=lambda item: -item[1])[:depth])


def with_e5(collections: list[Measured], path: Path) -> tuple[str, ...]:
    """Add e5's first stage, as the step `teachers` wrote it, and fusions; return the names of all stages."""
    fused(collections, ("bm25", "pocket"), "bm25+pocket")
    if not path.exists():
        return ("bm25", "bm25+pocket")
    stored = np.load(path)
    for c in collections:
        c.runs["e5"] = [[(int(d), 0.0) for d in row] for row in stored[f"{c.name} e5"][: len(c.grades)]]
    fused(collections, ("bm25", "e5"), "bm25+e5")
    return ("bm25", "bm25+pocket", "e5", "bm25+e5")
