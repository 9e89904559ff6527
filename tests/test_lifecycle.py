"""Copies, pickles and forked processes: what is shared, what is described by settings, and what is refused in one sentence."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qwen_rerank import (
    BM25Index,
    CachedScorer,
    Cascade,
    CrossEncoderScorer,
    Document,
    FaissStore,
    HttpScorer,
    QwenScorer,
    Reranker,
    ScorerPool,
    TwoStageRetriever,
    load_embedder,
)
from qwen_rerank.errors import InvalidInputError
from qwen_rerank.langchain import QwenRerankCompressor
from qwen_rerank.langchain import QwenRerankRetriever as LangChainRetriever
from qwen_rerank.llama_index import QwenRerankPostprocessor
from qwen_rerank.llama_index import QwenRerankRetriever as LlamaIndexRetriever
from qwen_rerank.pipeline import FusedFirstStage
from qwen_rerank.store import ShardedFirstStage
from tests.forks import TEXTS, make_embedder
from tests.scorers.cross_encoders import make_bert

ROOT = Path(__file__).resolve().parents[1]
FORKED = (
    "QwenScorer after torch alone",
    "a new QwenScorer",
    "an inherited CrossEncoderScorer",
    "a new CrossEncoderScorer",
    "an inherited ScorerPool",
    "an inherited StaticEmbedder",
    "an inherited SentenceTransformerEmbedder",
    "a new SentenceTransformerEmbedder",
    "a new FaissStore",
    "an inherited BM25Index",
    "an inherited QwenRerankCompressor",
)


@pytest.fixture(scope="module")
def forked(tmp_path_factory) -> dict[str, str]:
    """What each kind of use came to in a forked child of a process that had used it."""
    path = os.pathsep.join([str(Path(sys.modules["qwen_rerank"].__file__).parents[1]), str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "forks.py"), str(tmp_path_factory.mktemp("forks"))],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "2", "TOKENIZERS_PARALLELISM": "true"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.timeout(900)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("kind", FORKED)
def test_nothing_hangs_in_a_forked_child(forked, kind):
    assert forked[kind] == "True"


@pytest.mark.timeout(900)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_an_inherited_engine_says_in_the_child_what_to_do(forked):
    assert (
        "make a new one after the fork, or start processes with the 'spawn' method" in forked["an inherited QwenScorer"]
    )


@pytest.fixture(scope="module")
def objects(tmp_path_factory) -> dict[str, object]:
    """One of every public class that holds something."""
    folder = tmp_path_factory.mktemp("objects")
    qwen, embedder = QwenScorer("pocket"), load_embedder("pocket")
    documents = [Document(f"d{i}", text) for i, text in enumerate(TEXTS)]
    with FaissStore.create(folder / "store", embedder) as writer:
        writer.add(documents)
    reader = FaissStore.open(folder / "store", embedder, read_only=True)
    bert = CrossEncoderScorer(str(make_bert(folder / "bert")), device="cpu")
    dense = load_embedder(str(make_embedder(folder / "dense")), device="cpu")
    reranker, lexical = Reranker(qwen, threshold=0.1), BM25Index(documents)
    return {
        "QwenScorer": qwen,
        "CrossEncoderScorer": bert,
        "HttpScorer": HttpScorer("http://127.0.0.1:9"),
        "CachedScorer": CachedScorer(qwen, cache=folder / "scores.db"),
        "ScorerPool": ScorerPool([qwen]),
        "Reranker": reranker,
        "Cascade": Cascade([Reranker(bert, top_n=5), reranker]),
        "TwoStageRetriever": TwoStageRetriever(reader, reranker),
        "FusedFirstStage": FusedFirstStage([lexical, reader]),
        "FaissStore": reader,
        "ShardedFirstStage": ShardedFirstStage([reader]),
        "BM25Index": lexical,
        "StaticEmbedder": embedder,
        "SentenceTransformerEmbedder": dense,
        "QwenRerankCompressor": QwenRerankCompressor(scorer=qwen),
        "LangChain's QwenRerankRetriever": LangChainRetriever(scorer=qwen, first_stage=lexical),
        "LlamaIndex's QwenRerankRetriever": LlamaIndexRetriever(scorer=qwen, first_stage=lexical),
        "QwenRerankPostprocessor": QwenRerankPostprocessor(reranker=reranker),
    }


KINDS = (
    "QwenScorer", "CachedScorer", "CrossEncoderScorer", "HttpScorer", "ScorerPool", "Reranker", "Cascade", "TwoStageRetriever",
    "FusedFirstStage", "FaissStore", "ShardedFirstStage", "BM25Index", "StaticEmbedder", "SentenceTransformerEmbedder",
    "QwenRerankCompressor", "QwenRerankPostprocessor", "LangChain's QwenRerankRetriever",
    "LlamaIndex's QwenRerankRetriever",
)  # fmt: skip


def use(thing: object) -> object:
    """Return what an object gives for a question, in a form that can be compared."""
    if hasattr(thing, "invoke"):
        return [page.page_content for page in thing.invoke("cats")]
    if hasattr(thing, "aretrieve") and not isinstance(thing, TwoStageRetriever):
        return [node.text for node in thing.retrieve("cats")]
    if hasattr(thing, "_ready"):
        thing = thing._ready()
    if hasattr(thing, "score_many") and not isinstance(thing, HttpScorer):
        return np.round(thing.score("cats", TEXTS), 4).tolist()
    if hasattr(thing, "embed_queries"):
        return np.round(thing.embed_queries(TEXTS), 4).tolist()
    if hasattr(thing, "retrieve_many"):
        return [hit.document.id for hit in thing.retrieve("cats")]
    if hasattr(thing, "search"):
        return [candidate.document.id for candidate in thing.search("cats", 3)]
    if hasattr(thing, "rerank"):
        return [hit.index for hit in thing.rerank("cats", TEXTS)]
    return thing.name


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy], ids=["copy", "deepcopy"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_does_what_the_original_does_with_the_model_that_is_loaded(objects, kind, how, monkeypatch):
    monkeypatch.setattr("qwen_rerank.scorers.qwen.scorer.load_checkpoint", None)

    assert use(how(objects[kind])) == use(objects[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_what_comes_out_of_a_pickle_does_what_went_in(objects, kind):
    data = pickle.dumps(objects[kind])

    assert len(data) < 20_000, "settings travel, a model does not"
    assert use(pickle.loads(data)) == use(objects[kind])


def test_a_pickle_of_what_cannot_travel_says_why_in_one_sentence(tmp_path):
    with pytest.raises(InvalidInputError, match="api_key, which is never pickled; make the HttpScorer in the other"):
        pickle.dumps(Reranker(HttpScorer("http://127.0.0.1:9", api_key="secret")))
    with (
        FaissStore.create(tmp_path / "store", load_embedder("pocket")) as writer,
        pytest.raises(
            InvalidInputError, match="cannot be pickled, as there is one at a time; open the store with read_only"
        ),
    ):
        pickle.dumps(writer)


def test_copies_of_an_adapter_with_other_settings_use_the_model_that_is_loaded():
    adapter = QwenRerankCompressor(model="pocket", top_n=3)
    model = adapter._build()

    assert copy.deepcopy(adapter)._build() is model
    assert adapter.model_copy(update={"top_n": 1})._build() is model
    assert QwenRerankPostprocessor(model="pocket", threshold=0.5)._build() is model
    assert pickle.loads(pickle.dumps(adapter))._build() is model


def test_a_copy_of_an_adapter_with_another_model_does_not_keep_the_first():
    adapter = QwenRerankCompressor(model="pocket", max_length=512)
    model = adapter._build()

    other = adapter.model_copy(update={"max_length": 256})
    assert other._build() is not model
    assert other._build().max_length == 256


def test_a_model_is_held_as_long_as_an_adapter_that_names_it():
    """A framework makes a copy for each call and forgets it; the adapter that it copies may never be called itself."""
    adapter = QwenRerankCompressor(model="pocket", max_length=300)
    model = QwenRerankCompressor(model="pocket", max_length=300, top_n=1)._build()

    assert adapter._build() is model
