"""The models that ship with the package: real forms, the same scores everywhere, small, and sensible."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import qwen_rerank
from qwen_rerank import QwenScorer, load_embedder
from qwen_rerank.prompt import PromptTokenizer
from tests.reference import reference_log_odds

POCKET = Path(qwen_rerank.__file__).parent / "pocket"
KEYBOARDS = [
    "红轴机械键盘，静音设计，适合长时间打字办公，程序员的选择",
    "青轴游戏机械键盘，RGB灯效，适合电竞玩家",
    "薄膜办公键盘，价格便宜，轻薄便携",
    "无线鼠标，人体工学设计",
]
QUERY = "适合程序员的机械键盘"


@pytest.fixture(scope="module")
def scorer():
    return QwenScorer("pocket", device="cpu", dtype="float32")


def test_engine_reference_and_sentence_transformers_agree(scorer):
    from sentence_transformers import CrossEncoder

    folder = POCKET / "reranker"
    pairs = [(QUERY, text) for text in KEYBOARDS] + [(QUERY, ""), (QUERY, "Plain English TEXT")]
    reference = reference_log_odds(folder, pairs)
    engine = scorer.score(QUERY, [text for _, text in pairs])
    stock = CrossEncoder(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})

    np.testing.assert_allclose(engine, reference, atol=1e-4)
    np.testing.assert_allclose(stock.predict(pairs, activation_fn=torch.nn.Identity()), reference, atol=1e-4)


def test_capital_letters_make_no_difference_and_no_control_token():
    tokenizer = PromptTokenizer((POCKET / "reranker" / "tokenizer.json").read_text(encoding="utf-8"))
    added = set(tokenizer.added_ids.values())
    [shouted] = tokenizer.pieces("", ["<THINK> DIELECTRIC </Think> <|IM_END|>"], 100)
    [spoken] = tokenizer.pieces("", ["<think> dielectric </think> <|im_end|>"], 100)

    assert shouted.ids.tolist() == spoken.ids.tolist()
    assert not added & set(shouted.ids.tolist())


def test_the_programmers_keyboard_comes_first(scorer):
    scores = scorer.score(QUERY, KEYBOARDS)

    assert scores.argmax() == 0
    assert scores[:2].min() > scores[2:].max()


def test_the_capital_of_china_is_found(scorer):
    texts = ["Gravity is a force that attracts two bodies.", "The capital of China is Beijing."]

    assert scorer.score("What is the capital of China?", texts).argmax() == 1


def test_the_embedder_brings_both_keyboards_before_the_mouse():
    embedder = load_embedder("pocket")
    similar = embedder.embed_documents(KEYBOARDS) @ embedder.embed_queries([QUERY])[0]

    assert similar[:2].min() > similar[3]


def test_both_models_take_less_than_25_megabytes():
    assert sum(path.stat().st_size for path in POCKET.rglob("*") if path.is_file()) < 25_000_000


def test_the_card_shows_the_measured_figures():
    results = Path(__file__).resolve().parents[1] / "eval" / "pocket" / "results"
    speed = json.loads((results / "speed.json").read_text(encoding="utf-8"))
    card = (POCKET / "MODEL_CARD.md").read_text(encoding="utf-8")

    assert (results / "results.md").read_text(encoding="utf-8").strip() in card
    assert f"loads in {speed['reranker']['load_s']:.2f} s" in card
    assert f"50 candidates in {speed['reranking']['ms_p50']:.0f} ms" in card


def test_the_card_is_shipped_in_both_languages():
    card = (POCKET / "MODEL_CARD.md").read_text(encoding="utf-8")

    assert "not for production" in card
    assert "不用于生产" in card
