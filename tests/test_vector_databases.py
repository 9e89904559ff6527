"""Real vector databases as first stages, through the frameworks that bring them."""

from __future__ import annotations

import pytest

from eval.store import external
from qwen_rerank import Document, Reranker, TwoStageRetriever, load_embedder
from qwen_rerank.testing import OverlapScorer

DOCUMENTS = [
    Document(str(i), text, {"language": language})
    for i, (text, language) in enumerate(
        [("the lease ends in june", "en"), ("rent is due each month", "en"), ("租约到六月为止", "other")]
    )
]


@pytest.mark.parametrize(
    ("build", "needs"),
    [
        pytest.param(external.qdrant, "langchain_qdrant", id="qdrant"),
        pytest.param(external.lancedb, "llama_index.vector_stores.lancedb", id="lancedb", marks=pytest.mark.databases),
    ],
)
def test_a_vector_database_recalls_and_filters_for_the_second_stage(tmp_path, build, needs):
    pytest.importorskip(needs)
    stages = build(DOCUMENTS, load_embedder("pocket"), tmp_path, "other")
    reranker = Reranker(OverlapScorer(), top_n=2)

    best = TwoStageRetriever(stages["all"], reranker).retrieve("when does the lease end in june")[0]
    assert "the lease ends in june" in best.document.text
    assert [hit.document.metadata["place"] for hit in stages["filtered"].search("租约", 3)] == ["2"]
