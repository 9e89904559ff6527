"""`to_dict` and `from_dict`, JSON and pickle: what comes back is the same, no key is written, nothing loads early."""

from __future__ import annotations

import inspect
import json
import pickle
from dataclasses import asdict, fields

import pytest
from langchain_core.load import dumps
from llama_index.core.schema import NodeWithScore, TextNode

from qwen_rerank.calibration import Calibration
from qwen_rerank.descriptions import build_scorer, check_description, describe
from qwen_rerank.errors import InvalidInputError, RerankError
from qwen_rerank.langchain import QwenRerankCompressor
from qwen_rerank.llama_index import QwenRerankPostprocessor
from qwen_rerank.pipeline import Cascade
from qwen_rerank.reranker import Reranker
from qwen_rerank.scorers.cross_encoder import CrossEncoderScorer
from qwen_rerank.scorers.cross_encoder.scorer import CrossEncoderConfig
from qwen_rerank.scorers.http import HttpConfig, HttpScorer
from qwen_rerank.scorers.qwen import QwenConfig, QwenScorer
from qwen_rerank.testing import OverlapScorer
from tests.checkpoints import small_checkpoint

KEY = "sk-very-secret"


@pytest.fixture
def server():
    with HttpScorer("http://127.0.0.1:9", dialect="tei", api_key=KEY, timeout_s=2.0) as scorer:
        yield scorer


def absent(tmp_path) -> dict:
    """The description of a QwenScorer whose checkpoint is not there."""
    return {"class": "QwenScorer", "config": {"model": str(tmp_path / "absent"), "device": "cpu"}}


def every_way_back(postprocessor) -> list[QwenRerankPostprocessor]:
    kind = type(postprocessor)
    return [
        kind.from_dict(postprocessor.to_dict()),
        kind.from_json(postprocessor.to_json()),
        kind.model_validate(postprocessor.model_dump()),
        kind.model_validate_json(postprocessor.model_dump_json()),
        pickle.loads(pickle.dumps(postprocessor)),
    ]


def test_settings_come_back_every_way():
    postprocessor = QwenRerankPostprocessor(
        model="pocket", top_n=None, threshold=0.25, instruction="Find fruit", keep_retrieval_score=True, max_length=512
    )

    for back in every_way_back(postprocessor):
        assert back.to_dict() == postprocessor.to_dict()
    assert postprocessor.to_dict()["class_name"] == QwenRerankPostprocessor.class_name() == "QwenRerankPostprocessor"


def test_a_server_scorer_comes_back_every_way_without_its_key(server):
    postprocessor = QwenRerankPostprocessor(scorer=server, top_n=5)

    assert KEY not in postprocessor.to_json() + repr(postprocessor) + str(pickle.dumps(postprocessor))
    for back in every_way_back(postprocessor):
        assert back.to_dict() == postprocessor.to_dict()
    with build_scorer(back.scorer) as rebuilt:
        assert (type(rebuilt), rebuilt.config) == (HttpScorer, server.config)


def test_a_dump_of_langchain_holds_no_key_either(server):
    compressor = QwenRerankCompressor(scorer=server)

    assert KEY not in dumps(compressor) + compressor.model_dump_json() + str(pickle.dumps(compressor))
    assert pickle.loads(pickle.dumps(compressor)).model_dump() == compressor.model_dump()


def test_a_local_model_comes_back_and_scores_the_same(tmp_path):
    folder = small_checkpoint(tmp_path / "model")
    nodes = [NodeWithScore(node=TextNode(text=text)) for text in ("blue sky", "red apple", "green apple tree")]
    with QwenScorer(str(folder), device="cpu", dtype="float32", max_length=1024) as scorer:
        postprocessor = QwenRerankPostprocessor(scorer=scorer)
        expected = [(node.text, node.score) for node in postprocessor.postprocess_nodes(nodes, query_str="red apple")]
        data = postprocessor.to_json()

    rebuilt = QwenRerankPostprocessor.from_json(data)
    named = QwenRerankPostprocessor(model=str(folder), device="cpu", dtype="float32", max_length=1024)

    for same in (rebuilt, named):
        found = same.postprocess_nodes(nodes, query_str="red apple")
        same._build().close()
        assert [(node.text, pytest.approx(node.score)) for node in found] == expected


def test_a_rebuilt_scorer_is_used(monkeypatch):
    class Rebuilt(OverlapScorer):
        def __init__(self, max_words):
            super().__init__(max_words=max_words)

    monkeypatch.setattr("qwen_rerank.scorers.qwen.QwenScorer", Rebuilt)
    data = QwenRerankPostprocessor(top_n=1).to_dict() | {"scorer": {"class": "QwenScorer", "config": {"max_words": 8}}}
    nodes = [NodeWithScore(node=TextNode(text=text)) for text in ("blue sky", "red apple")]

    found = QwenRerankPostprocessor.from_dict(data).postprocess_nodes(nodes, query_str="red apple")

    assert [node.text for node in found] == ["red apple"]


def test_nothing_loads_before_first_use(tmp_path):
    data = QwenRerankPostprocessor().to_dict() | {"scorer": absent(tmp_path)}
    postprocessor = QwenRerankPostprocessor.from_dict(data)

    assert postprocessor.to_dict() == data
    with pytest.raises(RerankError, match="absent"):
        postprocessor.postprocess_nodes([NodeWithScore(node=TextNode(text="a"))], query_str="a")


def test_a_reranker_comes_back_with_its_settings_and_calibration(server):
    plain = Reranker(server, top_n=4, long_documents="truncate", on_error="last")
    key = plain.calibration_key()
    calibration = Calibration(kind="isotonic", fitted_for=key, x=(-1.0, 1.0), y=(0.1, 0.9))
    reranker = Reranker(server, top_n=4, on_error="last", calibration=calibration, threshold=0.5)

    for back in every_way_back(QwenRerankPostprocessor(reranker=reranker)):
        rebuilt = back._build()
        assert (rebuilt.calibration, rebuilt.threshold, rebuilt.on_error, back.top_n) == (calibration, 0.5, "last", 4)
        rebuilt.scorer.close()


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"scorer": OverlapScorer()}, id="a scorer"),
        pytest.param({"reranker": Reranker(OverlapScorer())}, id="a reranker"),
        pytest.param({"reranker": Cascade([Reranker(OverlapScorer())])}, id="a cascade"),
    ],
)
def test_any_other_scorer_is_named_and_asked_for(settings):
    [name] = settings
    data = json.loads(QwenRerankPostprocessor(**settings).to_json())

    with pytest.raises(InvalidInputError, match=rf"cannot be rebuilt.*from_dict\(data, {name}="):
        QwenRerankPostprocessor.from_dict(data)
    assert getattr(QwenRerankPostprocessor.from_dict(data, **settings), name) is settings[name]


@pytest.mark.parametrize(
    ("scorer", "config"),
    [(QwenScorer, QwenConfig), (HttpScorer, HttpConfig), (CrossEncoderScorer, CrossEncoderConfig)],
)
def test_every_configuration_fits_its_constructor_and_holds_no_key(scorer, config):
    settings = {field.name for field in fields(config)}

    assert settings <= set(inspect.signature(scorer).parameters)
    assert not settings & {"api_key", "key", "token", "headers"}


def test_a_folder_given_as_a_path_is_described_as_text(tmp_path):
    scorer = object.__new__(CrossEncoderScorer)
    scorer.config = CrossEncoderConfig(model="m", device=tmp_path)

    assert describe(scorer)["config"] == {**asdict(scorer.config), "device": str(tmp_path)}


def test_a_subclass_of_our_scorer_is_not_mistaken_for_it():
    class Mine(HttpScorer):
        pass

    with Mine("http://127.0.0.1:9", dialect="tei") as scorer:
        assert describe(scorer) == {
            "class": f"{__name__}.test_a_subclass_of_our_scorer_is_not_mistaken_for_it.<locals>.Mine"
        }


@pytest.mark.parametrize(
    ("name", "data"),
    [
        pytest.param("scorer", {"class": "os.system", "config": {"command": "true"}}, id="a foreign class"),
        pytest.param("scorer", {"class": ["QwenScorer"], "config": {}}, id="no name"),
        pytest.param("scorer", {"class": "Reranker", "scorer": {}, "config": {}}, id="a reranker as scorer"),
        pytest.param("scorer", {"class": "QwenScorer"}, id="no configuration"),
        pytest.param("reranker", {"class": "QwenScorer", "config": {}}, id="a scorer as reranker"),
        pytest.param("reranker", {"class": "Reranker", "config": {}}, id="a reranker without scorer"),
        pytest.param("scorer", {}, id="nothing"),
    ],
)
def test_a_description_of_anything_else_is_refused(name, data):
    with pytest.raises(InvalidInputError, match=name):
        check_description(name, data)
    with pytest.raises(InvalidInputError, match=name):
        QwenRerankCompressor(**{name: data})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        pytest.param({"url": "http://x", "retries": 9}, "unexpected keyword argument 'retries'", id="unknown"),
        pytest.param({}, "missing a required argument: 'url'", id="missing"),
    ],
)
def test_a_setting_too_many_or_too_few_is_refused_by_name(config, message):
    described = check_description("scorer", {"class": "HttpScorer", "config": config})

    with pytest.raises(InvalidInputError, match=f"does not fit HttpScorer: .*{message}"):
        build_scorer(described)


def test_the_json_schema_names_every_setting():
    schema = QwenRerankPostprocessor.model_json_schema()

    assert {"top_n", "threshold", "model", "keep_retrieval_score", "class_name"} <= set(schema["properties"])
