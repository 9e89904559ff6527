"""`HttpScorer`: every rerank server as a scorer."""

from __future__ import annotations

from qwen_rerank.scorers.http.requests import ServerScores
from qwen_rerank.scorers.http.scorer import HttpScorer
from qwen_rerank.scorers.http.settings import HttpConfig

__all__ = ["HttpConfig", "HttpScorer", "ServerScores"]
