"""Checks whether the scores of a model or a server are right, and names the fault where they are not.

>>> report = check("http://localhost:8000", CheckOptions(reference="Qwen/Qwen3-Reranker-0.6B"))  # doctest: +SKIP
>>> report.verdict, report.cause  # doctest: +SKIP
('wrong', 'newline-short')
"""

from __future__ import annotations

from qwen_rerank.check.diagnosis import CheckOptions, check
from qwen_rerank.check.findings import Finding, Report
from qwen_rerank.check.templates import template_text

__all__ = ["CheckOptions", "Finding", "Report", "check", "template_text"]
