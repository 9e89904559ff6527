"""`HttpScorer`: every rerank server as a scorer."""

from __future__ import annotations

from qwen_rerank.scorers.http.config import HttpConfig
from qwen_rerank.scorers.http.details import ScoreDetails
from qwen_rerank.scorers.http.scorer import HttpScorer

__all__ = ["HttpConfig", "HttpScorer", "ScoreDetails"]
