"""The shipped pair "mini": it finds what is meant in both languages, offline and without torch."""

import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

import qwen_rerank
from qwen_rerank import CrossEncoderScorer, load_embedder, load_scorer
from qwen_rerank.embedders.onnx import OnnxEmbedder

FOLDER = Path(qwen_rerank.__file__).parent / "mini"
CASES = {
    "symptoms of iron deficiency": [
        "Iron ore is shipped from the northern port.",
        "Anaemia caused by too little iron makes people tired, pale and short of breath.",
        "Symptoms of the flu begin suddenly.",
    ],
    "晚上睡不着怎么办": [
        "这家酒店晚上十点以后不办理入住。",
        "睡前少看手机、少喝咖啡，固定起床时间，有助于改善失眠。",
        "他晚上在图书馆看书看到很晚。",
    ],
}


@pytest.fixture(scope="module")
def scorer():
    return load_scorer("mini")


@pytest.mark.parametrize("query", CASES)
def test_it_puts_the_answer_before_texts_that_share_its_words(scorer, query):
    assert int(np.argmax(scorer.score(query, CASES[query]))) == 1


@pytest.mark.parametrize("query", CASES)
def test_the_embedder_finds_the_answer(query):
    embedder = load_embedder("mini")

    alike = embedder.embed_documents(CASES[query]) @ embedder.embed_queries([query])[0]

    assert int(np.argmax(alike)) == 1


@pytest.mark.parametrize("threads", [1, 3])
def test_neither_threads_nor_company_change_a_bit(scorer, threads):
    texts = [("a short cat " * n).strip() for n in (1, 40, 7, 3, 90, 1)]
    embedder = load_embedder("mini")
    other = CrossEncoderScorer("mini", backend="onnx", threads=threads)

    np.testing.assert_array_equal(other.score("a cat", texts), [scorer.score("a cat", [t])[0] for t in texts])
    np.testing.assert_array_equal(
        OnnxEmbedder(FOLDER, name="mini", threads=threads).embed_documents(texts),
        np.concatenate([embedder.embed_documents([text]) for text in texts]),
    )


def test_no_text_becomes_a_control_token():
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))

    encoded = tokenizer.encode("<s> a </s>", "</s> b <pad>\n<s>")

    assert [encoded.ids.count(control) for control in (0, 1, 2)] == [2, 0, 2]  # those of the template alone


@pytest.mark.heavy
def test_torch_gives_the_same_log_odds_within_the_rounding_of_eight_bits(scorer):
    pytest.importorskip("onnx")
    torch = pytest.importorskip("torch")
    sys.path.insert(0, str(Path(__file__).parents[1] / "eval" / "pocket" / "mini"))
    try:
        from model import from_graph
    finally:
        sys.path.pop(0)
    model, tokenizer = from_graph(FOLDER), Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    for query, texts in CASES.items():
        rows = [torch.tensor([tokenizer.encode(query, text).ids]) for text in texts]
        with torch.inference_mode():
            expected = [float(model(ids, torch.ones_like(ids))) for ids in rows]
        assert scorer.score(query, texts) == pytest.approx(expected, abs=0.5)
