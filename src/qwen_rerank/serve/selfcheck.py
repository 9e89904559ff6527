"""Self check of a loaded model, before the first request is taken: published scores, and scores that make sense."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qwen_rerank.errors import ModelError
from qwen_rerank.protocols import Scorer
from qwen_rerank.scorers.cached import CachedScorer


class SelfCheckError(ModelError):
    """The loaded model does not give the scores it should."""


@dataclass(frozen=True, slots=True)
class _Golden:
    """Published log-odds of one query with its documents; `tolerance` covers the precision they were published in."""

    model: str
    query: str
    documents: Sequence[str]
    log_odds: Sequence[float]
    tolerance: float


_PLANETS = (
    "Venus is often called Earth's twin because of its similar size and proximity.",
    "Mars, known for its reddish appearance, is often referred to as the Red Planet.",
    "Jupiter, the largest planet in our solar system, has a prominent red spot.",
    "Saturn, famous for its rings, is sometimes mistaken for the Red Planet.",
)
_CAPITAL = "What is the capital of China?"
_CHINA = (
    "The capital of China is Beijing.",
    "Gravity is a force that attracts two bodies towards each other. It gives weight to physical objects and is "
    "responsible for the movement of planets around the sun.",
)

# float32 row of sentence-transformers' own tests; the others are the model cards', bfloat16. A model in bfloat16 differs
# from both by its rounding, so the tolerances are those of bfloat16 and a wrong template is still far outside.
_GOLDEN = (
    _Golden(
        "Qwen/Qwen3-Reranker-0.6B",
        "Which planet is known as the Red Planet?",
        _PLANETS,
        (-3.109297752380371, 7.120389938354492, -0.3787546157836914, 3.541637420654297),
        0.25,
    ),
    _Golden("Qwen/Qwen3-Reranker-0.6B", _CAPITAL, _CHINA, (7.625, -11.375), 0.25),
    _Golden("Qwen/Qwen3-Reranker-4B", _CAPITAL, _CHINA, (6.4375, -14.375), 0.25),
    _Golden("Qwen/Qwen3-Reranker-8B", _CAPITAL, _CHINA, (5.0625, -14.25), 0.25),
)

_PROBES = (
    ("What is the capital of China?", _CHINA),
    ("适合程序员的机械键盘", ("静音红轴机械键盘，长时间写代码手指不累。", "空气炸锅，少油更健康。", "")),
)
_BATCH_TOLERANCE = 0.05  # log-odds; what bfloat16 rounding may change when a document is scored alone


def check_scorer(scorer: Scorer) -> list[str]:
    """Return what was checked, one clause each; of a scorer with a cache, the one beneath it, which computes.

    Raises:
        SelfCheckError: If a published score is missed, or scores are not finite, all alike, or depend on the batch.
        RerankError: Whatever the scorer raises.
    """
    while isinstance(scorer, CachedScorer):
        scorer = scorer._scorer
    return [*_check_golden(scorer), _check_sanity(scorer)]


def _check_golden(scorer: Scorer) -> list[str]:
    rows = [row for row in _GOLDEN if row.model == scorer.name]
    for row in rows:
        scores = scorer.score(row.query, list(row.documents))
        error = float(np.max(np.abs(scores - np.array(row.log_odds))))
        if not error <= row.tolerance:
            raise SelfCheckError(
                f"{scorer.name} gave log-odds {np.round(scores, 3).tolist()} where {list(row.log_odds)} are published "
                f"(largest difference {error:.3f}, allowed {row.tolerance}); the weights, the template or the default "
                "instruction are not the published ones."
            )
    return [f"{len(rows)} published rows agree"] if rows else []


def _check_sanity(scorer: Scorer) -> str:
    """Compare packed scores with those of one document at a time, which is the slow and obvious way."""
    queries = [query for query, _ in _PROBES]
    together = scorer.score_many(queries, [list(documents) for _, documents in _PROBES])
    for (query, documents), packed in zip(_PROBES, together, strict=True):
        alone = np.concatenate([scorer.score(query, [document]) for document in documents])
        if not np.all(np.isfinite(packed)) or not np.all(np.isfinite(alone)):
            raise SelfCheckError(f"{scorer.name} gave scores that are not finite: {packed.tolist()}.")
        difference = float(np.max(np.abs(packed - alone)))
        if difference > _BATCH_TOLERANCE * max(1.0, float(np.max(np.abs(alone)))):
            raise SelfCheckError(
                f"{scorer.name} scores a document differently in a batch ({packed.tolist()}) than alone "
                f"({alone.tolist()}); largest difference {difference:.3f}."
            )
    flat = np.concatenate(together)
    if float(np.ptp(flat)) == 0.0:
        raise SelfCheckError(
            f"{scorer.name} gave {flat[0]} for every pair; its head or its prompt is wrong, see `qwen-rerank check`."
        )
    return f"{len(flat)} pairs are finite, differ, and score the same alone and in a batch"
