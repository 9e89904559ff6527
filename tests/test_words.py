"""Terms of a text, and an index of them that can be added to, removed from, saved and read."""

from __future__ import annotations

import random

import numpy as np
import pytest

from qwen_rerank.words import WordIndex, terms

TEXTS = ["a red apple", "the green pear", "red red pear", "", "漢字 apple", "汉字", "서울은 크다"]


def filled(texts=TEXTS) -> WordIndex:
    index = WordIndex()
    index.add(np.arange(1, len(texts) + 1), texts)
    return index


@pytest.mark.parametrize(
    ("a", "b"),
    [
        pytest.param("資訊檢索", "资讯检索", id="traditional and simplified"),
        pytest.param("頭髮", "头发", id="one of several traditional forms"),
        pytest.param("ｶﾀｶﾅ", "カタカナ", id="half width"),
        pytest.param("한국어", "한국어", id="decomposed Hangul"),
    ],
)
def test_written_otherwise_the_terms_are_the_same(a, b):
    assert terms(a) == terms(b)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("서울은 큰 도시", ["서울", "울은", "큰", "도시"]),
        ("東京タワー", ["东", "京", "タ", "ワ", "ー", "东京", "京タ", "タワ", "ワー"]),
        ("人々", ["人", "々", "人々"]),
    ],
)
def test_japanese_and_korean_are_read_in_pairs(text, expected):
    assert terms(text) == expected


def test_a_korean_word_is_found_without_its_particle():
    assert filled().search("서울", 3)[0].tolist() == [7]


def test_traditional_finds_simplified_and_the_other_way_round():
    for query in ("漢字", "汉字"):
        assert sorted(filled().search(query, 3)[0]) == [5, 6]


def test_scores_are_bm25():
    """Lucene's formula, written out for a term that one of seven texts holds."""
    rows, scores = filled().search("green", 3)

    mean = sum(len(terms(text)) for text in TEXTS) / 7
    expected = np.log(1 + (7 - 1 + 0.5) / 1.5) / (1 + 0.9 * (1 - 0.4 + 0.4 * 2 / mean))
    assert (rows.tolist(), scores.tolist()) == ([2], [pytest.approx(expected, rel=1e-6)])


def test_equal_scores_are_in_the_order_of_rows_also_at_the_cut():
    index = filled(["same words"] * 50)

    assert index.search("words", 7)[0].tolist() == [1, 2, 3, 4, 5, 6, 7]


def test_only_allowed_rows_are_found():
    assert filled().search("red pear", 9, np.isin(np.arange(10), [2, 4, 5]))[0].tolist() == [2]


def test_an_index_whose_texts_are_all_gone_is_an_empty_one(tmp_path):
    index = filled()
    index.remove(index.rows())
    index.write(tmp_path / "words")
    again = WordIndex()
    again.read(tmp_path / "words")

    assert (len(again), again.last_row(), again.search("red pear", 9)[0].tolist()) == (0, 0, [])


@pytest.mark.parametrize("seed", range(5))
def test_an_index_does_not_depend_on_how_it_came_about(tmp_path, seed):
    """In many steps, with removals, saved and read in between, it is the one that is made of what is left at once."""
    rng = random.Random(seed)
    index, kept, row = WordIndex(), {}, 0
    for step in range(30):
        texts = [" ".join(rng.choices(["red", "pear", "apple", "漢字", "of"], k=rng.randrange(6))) for _ in range(5)]
        numbers = np.arange(row + 1, row + 1 + len(texts))
        row += len(texts) + rng.randrange(3)
        index.add(numbers, texts)
        kept.update(zip(numbers.tolist(), texts, strict=True))
        gone = rng.sample(sorted(kept), min(len(kept), rng.randrange(7)))
        index.remove(np.array([*gone, 10**9], dtype=np.int64))
        kept = {number: text for number, text in kept.items() if number not in gone}
        if step % 7 == 0:
            index.write(tmp_path / "words")
            index = WordIndex()
            index.read(tmp_path / "words")
    anew = WordIndex()
    anew.add(np.array(sorted(kept), dtype=np.int64), [kept[number] for number in sorted(kept)])

    assert index.same_as(anew)
    assert index.rows().tolist() == sorted(kept)
    for query in ("red pear", "汉字 apple", "none"):
        for top_k in (1, 10, 1000):
            a, b = index.search(query, top_k), anew.search(query, top_k)
            assert (a[0].tolist(), a[1].tolist()) == (b[0].tolist(), b[1].tolist())


def test_an_empty_index_finds_nothing_and_can_be_saved(tmp_path):
    index = WordIndex()
    index.add(np.empty(0, np.int64), [])
    index.write(tmp_path / "words")
    again = WordIndex()
    again.read(tmp_path / "words")

    assert (len(again), again.last_row(), again.rows().tolist()) == (0, 0, [])
    assert again.search("word", 3)[0].tolist() == []


@pytest.mark.parametrize(
    "damage", [b"", b"{}\n", b'{"version": 999, "lengths": []}\n', b'{"version": 1, "lengths": [9]}\n', b"\xff"]
)
def test_what_is_no_index_is_refused(tmp_path, damage):
    (tmp_path / "words").write_bytes(damage)

    with pytest.raises((ValueError, KeyError)):
        WordIndex().read(tmp_path / "words")
