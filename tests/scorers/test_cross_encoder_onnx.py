"""A cross-encoder on ONNX Runtime: the scores of torch, from the same folder, without torch."""

from __future__ import annotations

import gc
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import onnx
import pytest

from qwen_rerank import CrossEncoderScorer, Reranker, load_scorer
from qwen_rerank.errors import (
    InvalidInputError,
    MissingExtraError,
    ModelCorruptError,
    ModelError,
    ModelIncompleteError,
    NonFiniteScoreError,
    QueryTooLongError,
)
from qwen_rerank.scorers.cross_encoder import classifier
from qwen_rerank.scorers.loading import check_model, scorer_kind
from tests.models.graphs import FLOAT, graph, growing, value
from tests.scorers.cross_encoders import export, make_bert, make_roberta

TEXTS = ["a red cat", "red", "", "北京 the cat, and. 量子纠缠", "a [SEP] </s> cat", "Ünknown Ωords", "red cat. " * 60]
KINDS = {"bert": make_bert, "roberta": make_roberta}


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    """Weights and a graph of one model."""
    path = KINDS[request.param](tmp_path_factory.mktemp("models") / request.param)
    export(path)
    return path


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    path = make_bert(tmp_path_factory.mktemp("models") / "bert")
    export(path)
    return path


@pytest.fixture(scope="module")
def scorer(folder):
    return CrossEncoderScorer(str(folder), backend="onnx", batch_size=3, threads=1)


@pytest.fixture(scope="module")
def in_torch(folder):
    return CrossEncoderScorer(str(folder), backend="torch", device="cpu", batch_size=3)


@pytest.fixture
def alone(tmp_path, bert):
    """The graph and its small files, without weights."""
    folder = tmp_path / "alone"
    (folder / "onnx").mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "onnx/model.onnx"):
        (folder / name).write_bytes((bert / name).read_bytes())
    return folder


def test_scores_tokens_and_kept_characters_are_those_of_torch(scorer, in_torch):
    found, expected = scorer.score_details("a cat", TEXTS), in_torch.score_details("a cat", TEXTS)

    assert np.ptp(found.log_odds) > 0.1
    np.testing.assert_allclose(found.log_odds, expected.log_odds, atol=1e-5)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.kept_chars, expected.kept_chars)
    assert found.tokens[-1] == scorer.max_length == in_torch.max_length


def test_many_queries_score_as_in_torch(scorer, in_torch):
    queries, documents = ["cat", "量子", "cat"], [TEXTS, [], ["北京", "cat"]]

    for found, expected in zip(*(s.score_many(queries, documents) for s in (scorer, in_torch)), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_padding_and_company_do_not_matter(scorer):
    together = scorer.score("a cat", TEXTS)

    np.testing.assert_allclose(together, [scorer.score("a cat", [text])[0] for text in TEXTS], atol=1e-5)


def test_a_batch_is_as_large_as_its_tokens_allow(bert, monkeypatch):
    scorer = CrossEncoderScorer(str(bert), backend="onnx", batch_size=8, threads=1)
    scorer._network.tokens_at_once = 100
    shapes, scores = [], scorer._network.scores
    monkeypatch.setattr(
        scorer._network, "scores", lambda inputs: shapes.append(inputs["input_ids"].shape) or scores(inputs)
    )
    scorer.score("a", ["a " * 100, "b " * 100, *(f"c {letter}" for letter in "abcdefghi")])

    assert shapes == [(2, 48), (8, 6), (1, 6)]


def test_an_empty_list_an_instruction_and_a_long_query(scorer):
    assert scorer.score("q", []).shape == (0,)
    with pytest.raises(InvalidInputError, match="takes no instruction"):
        scorer.score("q", ["a"], instruction="find cats")
    with pytest.raises(QueryTooLongError):
        scorer.score("a cat " * 100, ["red"])


def test_windows_of_a_long_document_all_fit(scorer):
    [hit] = Reranker(scorer, long_documents="windows").rerank("red cat", ["a cat sat here. 北京 is red. " * 20])

    assert hit.windows > 5
    assert not hit.truncated


async def test_ascore_gives_what_score_gives(scorer):
    np.testing.assert_array_equal(await scorer.ascore("a cat", TEXTS), scorer.score("a cat", TEXTS))


def test_a_graph_with_fewer_inputs_gets_no_others(tmp_path):
    """MiniLM's graphs take segments, others do not."""
    folder = make_bert(tmp_path / "m")
    export(folder, inputs=("input_ids", "attention_mask"))
    scorer = CrossEncoderScorer(str(folder), backend="onnx")

    assert scorer._network.inputs == {"input_ids", "attention_mask"}
    assert np.isfinite(scorer.score("a", TEXTS)).all()


def test_a_quantized_graph_is_read_by_its_name_and_close(bert, tmp_path):
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(bert / "onnx/model.onnx", bert / "onnx/model_quantized.onnx")
    exact = CrossEncoderScorer(str(bert), backend="onnx")
    rounded = CrossEncoderScorer(str(bert), graph="onnx/model_quantized.onnx")

    assert exact.fingerprint != rounded.fingerprint
    scores = rounded.score("a cat", TEXTS)
    assert 0 < np.abs(exact.score("a cat", TEXTS) - scores).max() < 1
    # It rounds by the largest value of a batch, so each pair has one of its own.
    np.testing.assert_array_equal(scores, [rounded.score("a cat", [text])[0] for text in TEXTS])


def test_weights_beside_the_graph_are_read(alone, scorer):
    data = onnx.load(alone / "onnx/model.onnx")
    before = CrossEncoderScorer(str(alone), backend="onnx")
    (alone / "onnx/model.onnx").unlink()
    onnx.save(data, alone / "onnx/model.onnx", save_as_external_data=True, location="model.onnx_data", size_threshold=0)
    after = CrossEncoderScorer(str(alone), backend="onnx")

    np.testing.assert_array_equal(after.score("a cat", TEXTS), before.score("a cat", TEXTS))
    weights = bytearray((alone / "onnx/model.onnx_data").read_bytes())
    weights[-1] ^= 1
    (alone / "onnx/model.onnx_data").write_bytes(weights)
    assert CrossEncoderScorer(str(alone), backend="onnx").fingerprint != after.fingerprint


def test_the_fingerprint_changes_with_all_that_changes_a_score(bert, alone):
    fingerprints = {
        CrossEncoderScorer(str(bert), backend="onnx").fingerprint,
        CrossEncoderScorer(str(bert), backend="torch", device="cpu").fingerprint,
        CrossEncoderScorer(str(bert), backend="onnx", max_length=20).fingerprint,
    }

    assert len(fingerprints) == 3
    assert CrossEncoderScorer(str(alone)).fingerprint in fingerprints


# Graphs that are no reranker's


def without_number():
    """Return a graph that divides zero by zero."""
    model = graph([onnx.helper.make_node("Sub", ["two", "two"], ["zero"])])
    model.graph.node.append(onnx.helper.make_node("Mul", ["logits", "zero"], ["none"]))
    model.graph.node.append(onnx.helper.make_node("Div", ["none", "none"], ["nan"]))
    model.graph.output[0].name = "nan"
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        pytest.param(without_number(), "cannot score a plain pair of texts: the model gave nan", id="NaN"),
        pytest.param(growing(10**6), "cannot score a plain pair.*needs more than", id="a terabyte"),
        pytest.param(
            graph(outputs=[value("floats", FLOAT, ["rows", "labels"])]),
            r"gives an array of shape \(2, \d+\) for 2 pairs; a reranker gives one number each",
            id="more labels than one",
        ),
        pytest.param(graph(outputs=[value("floats", FLOAT, ["a", "b", "c"])]), "with 1 or 2 dimensions", id="states"),
    ],
)
def test_a_graph_that_gives_no_score_is_refused_when_it_is_loaded(alone, model, message):
    onnx.save(model, alone / "onnx/model.onnx")
    with pytest.raises(ModelError, match=message):
        CrossEncoderScorer(str(alone))


def test_a_score_that_is_no_number_fails_its_document_alone(alone):
    """Twice the mean of the ids, over the text's length less seven tokens."""
    model = graph()
    model.graph.node.extend(
        [
            onnx.helper.make_node("Shape", ["input_ids"], ["shape"], start=1),
            onnx.helper.make_node("Cast", ["shape"], ["length"], to=FLOAT),
            onnx.helper.make_node("Sub", ["length", "seven"], ["rest"]),
            onnx.helper.make_node("Div", ["logits", "rest"], ["score"]),
        ]
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32([7]), "seven"))
    model.graph.output[0].name = "score"
    onnx.save(model, alone / "onnx/model.onnx")
    found = CrossEncoderScorer(str(alone), batch_size=1).score_details("a", ["b", "b b b", "b b"])

    assert found.tokens.tolist() == [5, 7, 6]
    assert list(found.errors) == [1]
    assert isinstance(found.errors[1], NonFiniteScoreError)
    np.testing.assert_array_equal(np.isnan(found.log_odds), [False, True, False])


# Which backend


def test_torch_is_taken_for_weights_and_the_graph_where_there_is_nothing_else(bert, alone, monkeypatch):
    assert classifier.open_classifier(str(bert), revision=None)[1] == "torch"
    assert classifier.open_classifier(str(alone), revision=None)[1] == "onnx"
    monkeypatch.setattr(classifier, "is_importable", lambda *names: False)
    assert classifier.open_classifier(str(bert), revision=None)[1] == "onnx"


def test_a_name_leads_to_the_graph(alone):
    scorer = load_scorer(str(alone), max_length=20)

    assert (scorer_kind(str(alone)), check_model(str(alone))) == ("cross-encoder", "cross-encoder")
    assert (scorer.device, scorer.max_length) == ("cpu", 20)


LEAN = """
import json, sys

class Absent:
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in {"torch", "transformers"}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
from qwen_rerank import CrossEncoderScorer, load_scorer
scores = [load_scorer(sys.argv[1]).score("a cat", json.loads(sys.argv[2])).tolist()]
try:
    CrossEncoderScorer(sys.argv[3])
except ImportError as error:
    scores.append(str(error))
print(json.dumps(scores))
"""


def test_without_torch_a_graph_scores_and_weights_say_what_they_need(bert, tmp_path):
    weights = make_bert(tmp_path / "weights")
    done = subprocess.run(
        [sys.executable, "-c", LEAN, str(bert), json.dumps(TEXTS), str(weights)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    scores, message = json.loads(done.stdout)

    np.testing.assert_allclose(scores, CrossEncoderScorer(str(bert), device="cpu").score("a cat", TEXTS), atol=1e-5)
    assert message.startswith("CrossEncoderScorer with safetensors weights needs `transformers`: pip install")
    assert done.stderr == ""
    assert issubclass(MissingExtraError, ImportError)


def test_a_hub_model_comes_with_one_graph_and_without_weights(alone, monkeypatch):
    """A repository holds many graphs of one model; one of them is downloaded."""
    import huggingface_hub

    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **options: asked.append(options) or str(alone)
    )
    CrossEncoderScorer("someone/model", backend="onnx")
    assert "onnx/model.onnx" in asked[0]["allow_patterns"]
    assert not {"*.safetensors", "onnx/*"} & {*asked[0]["allow_patterns"], *asked[0]["ignore_patterns"]}


def test_a_hub_model_with_nothing_but_a_graph_is_found(alone, bert, monkeypatch, tmp_path):
    """With torch installed the weights are asked for first."""
    import huggingface_hub

    (tmp_path / "small").mkdir()
    (tmp_path / "small/config.json").write_bytes((alone / "config.json").read_bytes())
    asked = []

    def download(name, *, allow_patterns, **options):
        asked.append("*.safetensors" in allow_patterns)
        return str(tmp_path / "small" if asked[-1] else alone)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert classifier.open_classifier("someone/model", revision=None) == (alone, "onnx")
    assert asked == [True, False]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backend": "tensorflow"}, "backend must be one of 'auto', 'torch', 'onnx'"),
        ({"backend": "onnx", "device": "cuda"}, r"device \('cuda'\) must be 'auto' or 'cpu'"),
        ({"backend": "onnx", "dtype": "float16"}, r"dtype \('float16'\) is the graph's own"),
        ({"backend": "onnx", "threads": 0}, "threads must be an integer of at least 1"),
        ({"backend": "onnx", "max_length": 49}, r"max_length \(49\) is above the 48 tokens"),
        ({"graph": ""}, "graph is empty"),
    ],
)
def test_a_wrong_setting_is_named(bert, settings, message):
    with pytest.raises(InvalidInputError, match=message):
        CrossEncoderScorer(str(bert), **settings)


def test_a_graph_that_is_not_there_is_named_with_those_that_are(bert, tmp_path):
    with pytest.raises(ModelIncompleteError, match=r"other\.onnx is missing; the folder has .*onnx/model\.onnx"):
        CrossEncoderScorer(str(bert), graph="other.onnx")
    with pytest.raises(ModelIncompleteError, match=r"has no ONNX graph.*or use its safetensors"):
        CrossEncoderScorer(str(make_bert(tmp_path / "m")), backend="onnx")
    with pytest.raises(ModelError, match="must be a file in the model's folder"):
        CrossEncoderScorer(str(bert), graph="../bert/onnx/model.onnx")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_scores_with_a_session_of_its_own(alone):
    """A server loads before it forks its workers; the runtime's threads do not come along."""
    scorer = CrossEncoderScorer(str(alone), threads=2)
    expected = scorer.score("a", TEXTS)
    with ProcessPoolExecutor(1, mp_context=get_context("fork"), initializer=_keep, initargs=(scorer.score,)) as pool:
        np.testing.assert_array_equal(pool.submit(_score, TEXTS).result(timeout=60), expected)
        (alone / "onnx/model.onnx").write_bytes(b"")
    with (
        ProcessPoolExecutor(1, mp_context=get_context("fork"), initializer=_keep, initargs=(scorer.score,)) as pool,
        pytest.raises(ModelCorruptError),
    ):
        pool.submit(_score, TEXTS).result(timeout=60)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_that_drops_an_inherited_scorer_goes_on(alone):
    """The runtime would wait in it for the parent's threads, where those are asleep at the fork."""
    scorer = CrossEncoderScorer(str(alone), threads=2)
    for _ in range(4):
        scorer.score("a", TEXTS)
        time.sleep(0.1)
        if (child := os.fork()) == 0:
            del scorer
            gc.collect()
            os._exit(0)
        deadline = time.monotonic() + 30
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
            time.sleep(0.01)
        if ended == (0, 0):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        assert ended == (child, 0)


_kept = []


def _keep(score):
    _kept.append(score)


def _score(texts):
    return _kept[-1]("a", texts)


def test_a_pickle_holds_the_settings_alone(bert):
    scorer = CrossEncoderScorer(str(bert), backend="onnx", max_length=20)
    again = pickle.loads(pickle.dumps(scorer))

    assert (again.fingerprint, again.config) == (scorer.fingerprint, scorer.config)


def test_a_prompt_in_the_template_leaves_its_words_to_texts(alone):
    """A part of several ids, such as "<s> query:", is no control token: the same words in a text are read as they are."""
    plain = CrossEncoderScorer(str(alone))._encoder.encode("a", ["cat"])[0]
    file = alone / "tokenizer.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    vocab = data["model"]["vocab"]
    prompt = [vocab[letter] for letter in "cat"]
    data["post_processor"]["special_tokens"]["[CLS]"] |= {"ids": [vocab["[CLS]"], *prompt], "tokens": ["[CLS]", *"cat"]}
    file.write_text(json.dumps(data), encoding="utf-8")
    pair = CrossEncoderScorer(str(alone))._encoder.encode("a", ["cat"])[0]

    assert pair.ids == [plain.ids[0], *prompt, *plain.ids[1:]]
    assert vocab["[UNK]"] not in pair.ids
