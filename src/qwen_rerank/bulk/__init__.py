"""Jobs over data sets: embed a corpus, rerank the candidates of many queries, score pairs; on one machine or on Ray.

Rows come from Parquet and JSONL and go to part files that a manifest names. A job that was killed goes on where it was:
no row is lost and none is there twice.
"""

from qwen_rerank.errors import MissingExtraError

try:
    import pyarrow  # noqa: F401
except ImportError as exc:
    raise MissingExtraError("qwen_rerank.bulk", package="pyarrow", extra="bulk", cause=exc) from exc

from qwen_rerank.bulk.driver import JobStatus, Workers, job_status, read_rows
from qwen_rerank.bulk.jobs import embed_corpus, rerank_pairs, rerank_runs, resume_job

__all__ = [
    "JobStatus",
    "Workers",
    "embed_corpus",
    "job_status",
    "read_rows",
    "rerank_pairs",
    "rerank_runs",
    "resume_job",
]
