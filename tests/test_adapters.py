"""What both frameworks' adapters promise about their settings, told through LangChain's compressor."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from langchain_core.documents import Document
from llama_index.core.schema import NodeWithScore, TextNode

from qwen_rerank.adapters import DEFAULT_MODEL
from qwen_rerank.errors import InvalidInputError, RerankError
from qwen_rerank.langchain import QwenRerankCompressor
from qwen_rerank.llama_index import QwenRerankPostprocessor
from qwen_rerank.reranker import Reranker
from qwen_rerank.scorers.cross_encoder import CrossEncoderScorer
from qwen_rerank.scorers.http import HttpScorer
from qwen_rerank.testing import OverlapScorer
from tests.scorers.cross_encoders import make_bert


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        pytest.param({"scorer": OverlapScorer(), "model": "m"}, "one of model, scorer and reranker", id="two parts"),
        pytest.param({"scorer": "BAAI/bge-reranker-base"}, "a model name goes into model", id="a name as scorer"),
        pytest.param(
            {"scorer": OverlapScorer}, r"must have name and score\(query, documents\)", id="a class as scorer"
        ),
        pytest.param({"scorer": len}, r"must have name and score\(query, documents\)", id="a function as scorer"),
        pytest.param({"reranker": OverlapScorer()}, "must be a Reranker or Cascade", id="a scorer as reranker"),
        pytest.param(
            {"scorer": OverlapScorer(), "device": "cpu"}, "scorer brings its own device", id="device of a scorer"
        ),
        pytest.param(
            {"reranker": Reranker(OverlapScorer()), "threshold": 0.5},
            "reranker brings its own threshold",
            id="threshold",
        ),
        pytest.param({"dtype": "int8"}, "dtype: .*'bfloat16'.* not 'int8'", id="a dtype"),
        pytest.param({"threshold": 2}, "threshold must be a probability between 0 and 1, not 2", id="no probability"),
        pytest.param({"top_n": True}, "top_n must be an integer of at least 1, not True", id="a boolean"),
        pytest.param({"max_length": 0}, "max_length must be an integer of at least 1", id="no room"),
        pytest.param({"long_documents": "cut"}, "long_documents: .*'windows'.* not 'cut'", id="long documents"),
        pytest.param({"trust_remote_code": True}, "no parameter 'trust_remote_code'; it takes", id="an unknown name"),
    ],
)
def test_wrong_settings_are_our_error_in_one_sentence(settings, message):
    with pytest.raises(InvalidInputError, match=message):
        QwenRerankCompressor(**settings)


def test_the_default_model_is_named_and_nothing_loads_before_first_use():
    code = "import sys, qwen_rerank.langchain as l; print(l.QwenRerankCompressor().scorer_name, 'torch' in sys.modules)"

    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert shown.split() == [DEFAULT_MODEL, "False"]


def test_a_model_name_brings_its_settings_and_loads_once_for_many_threads(monkeypatch):
    made = []

    class Recorder(OverlapScorer):
        def __init__(self, *args, **settings):
            super().__init__()
            made.append((args, settings))

    monkeypatch.setattr("qwen_rerank.scorers.qwen.QwenScorer", Recorder)
    reranks = QwenRerankCompressor(model="pocket", device="cpu", dtype="float32", max_length=512)
    start = threading.Barrier(4)

    def ask(_):
        start.wait(60)
        return reranks.compress_documents([Document("a")], "a")

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, range(4)))

    assert all(answer == answers[0] for answer in answers)
    assert [args for args, _ in made] == [("pocket",)]
    assert made[0][1].items() >= {"device": "cpu", "dtype": "float32", "max_length": 512}.items()


@pytest.mark.parametrize("kind", [QwenRerankCompressor, QwenRerankPostprocessor])
def test_a_model_name_may_be_any_that_load_scorer_knows(tmp_path, kind):
    folder = str(make_bert(tmp_path / "m"))

    assert isinstance(kind(model=folder, device="cpu", max_length=20)._build(), CrossEncoderScorer)
    assert isinstance(kind(model="http://127.0.0.1:9")._build(), HttpScorer)
    with pytest.raises(InvalidInputError, match="template is not for a cross-encoder"):
        kind(model=folder, template="vllm")._build()


def test_a_model_that_does_not_load_is_our_error_each_time(tmp_path):
    reranks = QwenRerankCompressor(model=str(tmp_path / "absent"))

    for _ in range(2):
        with pytest.raises(RerankError, match="absent"):
            reranks.compress_documents([Document("a")], "a")


def test_a_model_name_survives_pickle_and_the_copy_behaves_the_same():
    reranks = QwenRerankCompressor(model="pocket", top_n=7, threshold=0.25, instruction="Find fruit")

    assert pickle.loads(pickle.dumps(reranks)) == reranks


class Shortest:
    """The least that scores: a name and one method."""

    name = "shortest"

    def score(self, query, documents):
        return np.array([-len(text) for text in documents])


async def test_any_object_with_a_name_and_score_ranks_in_both_frameworks():
    compressor, postprocessor = QwenRerankCompressor(scorer=Shortest()), QwenRerankPostprocessor(scorer=Shortest())
    documents = [Document("a longer one"), Document("short")]
    nodes = [NodeWithScore(node=TextNode(text=document.page_content)) for document in documents]

    for found in (compressor.compress_documents(documents, "q"), await compressor.acompress_documents(documents, "q")):
        assert [document.page_content for document in found] == ["short", "a longer one"]
    for found in (
        postprocessor.postprocess_nodes(nodes, query_str="q"),
        await postprocessor.apostprocess_nodes(nodes, query_str="q"),
    ):
        assert [node.text for node in found] == ["short", "a longer one"]
    assert compressor.scorer_name == postprocessor.scorer_name == "shortest"


def test_a_top_n_of_none_is_all_also_where_the_reranker_would_give_fewer():
    documents = [Document(text) for text in ("a", "b", "c")]
    reranker = Reranker(OverlapScorer(), top_n=2)

    assert len(QwenRerankCompressor(reranker=reranker).compress_documents(documents, "a")) == 2
    assert len(QwenRerankCompressor(reranker=reranker, top_n=None).compress_documents(documents, "a")) == 3


def test_windows_of_long_documents_are_scored():
    text = "blue sky. " * 40 + "red apple."
    plain = QwenRerankCompressor(scorer=OverlapScorer(max_words=16))
    windows = QwenRerankCompressor(scorer=OverlapScorer(max_words=16), long_documents="windows")

    scores = [
        c.compress_documents([Document(text)], "red apple")[0].metadata["relevance_score"] for c in (plain, windows)
    ]

    assert np.allclose(scores, [1 / (1 + np.exp(4)), 1 / (1 + np.exp(-4))])
