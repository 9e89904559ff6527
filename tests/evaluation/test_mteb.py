"""Our scorers as mteb's and sentence-transformers' evaluators call them."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from qwen_rerank.errors import InvalidInputError
from qwen_rerank.evaluation.export import reranking_samples
from qwen_rerank.evaluation.measures import measure
from qwen_rerank.evaluation.mteb import MtebCrossEncoder, MtebEncoder, PairPredictor
from qwen_rerank.testing import HashEmbedder, OverlapScorer, TableScorer

TASK = {"task_metadata": SimpleNamespace(name="Task"), "hf_split": "test", "hf_subset": "default"}


def test_pairs_come_back_in_order_over_batches_of_any_size():
    queries = [{"text": ["a", "a", "b"]}, {"text": ["b", "a"]}]
    documents = [{"text": ["a x", "y", "b"]}, {"text": ["z", "a"]}]

    scores = MtebCrossEncoder(OverlapScorer(), name="local/overlap").predict(queries, documents, **TASK)

    assert scores.tolist() == [4.0, -4.0, 4.0, -4.0, 4.0]


def test_pairs_of_one_query_are_scored_in_one_call():
    scorer = TableScorer({"x": 1.0, "y": 2.0})
    MtebCrossEncoder(scorer, name="local/t", instructions={"Task": "Find it"}).predict(
        [{"text": ["q", "q"]}], [{"text": ["x", "y"]}], **TASK
    )

    assert scorer.calls == [("q", ["x", "y"], "Find it")]


def test_inputs_that_cannot_be_paired_or_read_are_refused():
    model = MtebCrossEncoder(OverlapScorer(), name="local/overlap")

    with pytest.raises(InvalidInputError, match="2 queries for 1 documents"):
        model.predict([{"text": ["a", "b"]}], [{"text": ["x"]}], **TASK)
    with pytest.raises(InvalidInputError, match="no 'text'"):
        model.predict([{"image": [b""]}], [{"text": ["x"]}], **TASK)


def test_queries_and_documents_get_their_own_prompts():
    class Marked(HashEmbedder):
        def embed_queries(self, texts):
            return super().embed_documents(["query"] * len(texts))

    encoder = MtebEncoder(Marked(), name="local/hash")
    as_query = encoder.encode([{"text": ["a"]}], prompt_type=SimpleNamespace(value="query"), **TASK)
    as_document = encoder.encode([{"text": ["a"]}], prompt_type=None, **TASK)

    assert not np.array_equal(as_query, as_document)
    assert encoder.similarity(as_query, as_query)[0, 0] == pytest.approx(1.0)


def test_sentence_transformers_own_evaluator_takes_our_samples_and_scores(collection, first_stage):
    from sentence_transformers.cross_encoder.evaluation import CrossEncoderRerankingEvaluator

    run = {q: [(c.document.id, c.score) for c in first_stage.search(text, 8)] for q, text in collection.queries.items()}
    evaluator = CrossEncoderRerankingEvaluator(
        reranking_samples(collection, run, depth=8), at_k=10, name="paint", write_csv=False
    )

    values = evaluator(PairPredictor(OverlapScorer()))

    assert values["paint_ndcg@10"] == 1.0
    assert values["paint_base_ndcg@10"] < 1.0


def test_mteb_runs_both_stages_over_a_local_task_and_agrees_with_us(collection, tmp_path, monkeypatch):
    """A first stage that errs and a scorer that knows: both figures are mteb's own, of the runs that it made."""
    mteb = pytest.importorskip("mteb")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    script = runpy.run_path(str(Path(__file__).parents[2] / "eval" / "mteb_local.py"))
    options = {"cache": None, "overwrite_strategy": "always"}
    encoder = MtebEncoder(HashEmbedder(), name="local/hash")

    first = mteb.evaluate(encoder, script["local_task"](collection), prediction_folder=tmp_path, **options)
    task = script["local_task"](collection).convert_to_reranking(tmp_path, top_k=8)
    second = mteb.evaluate(MtebCrossEncoder(OverlapScorer(), name="local/overlap"), task, **options)

    vectors = HashEmbedder().embed_documents([document.text for document in collection.documents])
    run = {}
    for query, text in collection.queries.items():
        similarities = vectors @ HashEmbedder().embed_queries([text])[0]
        run[query] = [(f"d{place}", similarities[place]) for place in np.argsort(-similarities, kind="stable")]
    ours = measure(run, collection.qrels, ["nDCG@10"]).means["nDCG@10"]
    assert first.task_results[0].get_score() == pytest.approx(ours, abs=1e-4)
    assert ours < second.task_results[0].get_score() == 1.0
