"""Fit the line that makes scores log-odds, on the development queries of `candidates.py`; write `odds.json`.

    python eval/pocket/mini/odds.py --work build/mini --name mini

Each collection counts the same. Pairs are BM25's first 50; the log-odds are those of a pair among them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import quality


def main() -> None:
    """Write the file and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/mini"))
    parser.add_argument("--name", default="mini")
    options = parser.parse_args()
    stored = np.load(options.work / f"{options.name}-scores.npz")
    scores, labels, weights = [], [], []
    for c in quality.load(options.work / "candidates.json.xz", options.work / "e5", longest=256, device="cpu"):
        if c.role == "chosen":
            queries, documents = c.pairs("bm25")
            scores.append(stored[f"{c.name} bm25"])
            labels.append([c.grades[q].get(int(d), 0) > 0 for q, d in zip(queries, documents, strict=True)])
            weights.append(np.full(len(queries), 1 / len(queries)))
    scale, middle = fitted(
        np.concatenate(scores).astype(float), np.concatenate(labels).astype(float), np.concatenate(weights)
    )
    odds = {"scale": round(scale, 4), "middle": round(middle, 3)}
    (options.work / "odds.json").write_text(json.dumps(odds) + "\n", encoding="utf-8")
    print(json.dumps(odds))


def fitted(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray, *, steps: int = 200) -> tuple[float, float]:
    """Return scale and middle of a weighted logistic regression, by Newton's method."""
    centre = float(scores.mean())
    design = np.stack([scores - centre, np.ones_like(scores)], 1)
    rate = float((weights * labels).sum() / weights.sum())
    line = np.array([0.5, np.log(rate / (1 - rate))])
    for _ in range(steps):
        p = 1 / (1 + np.exp(-design @ line))
        slope = design.T @ (weights * (labels - p))
        line += np.linalg.solve((design * (weights * p * (1 - p))[:, None]).T @ design, slope)
    return float(line[0]), centre - float(line[1] / line[0])


if __name__ == "__main__":
    main()
