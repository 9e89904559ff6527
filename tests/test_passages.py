"""Windows cover the text, fit their room, and end where sentences end; their scores fold to one."""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_rerank.errors import DocumentTooLongError
from qwen_rerank.passages import fold, quick, split, token_bound
from qwen_rerank.prompt import DEFAULT_INSTRUCTION, PromptEncoder, PromptSpec
from qwen_rerank.testing import OverlapScorer
from qwen_rerank.types import Fit

TEXTS = st.text(st.sampled_from('ab 量子。！？；, .\n!?;”"😀'), max_size=300)
OVERLAPS = st.floats(0, 0.4)


def measure_words(room):
    return partial(OverlapScorer(max_words=room).fit, "q")


class ByteMeasure:
    """A token is a byte: text of uneven density, and characters that may not fit at all."""

    def __init__(self, room):
        self.room = room
        self.calls = []

    def __call__(self, texts):
        self.calls.append(list(texts))
        return [self.fit(text) for text in texts]

    def fit(self, text):
        data = text.encode()
        kept = len(data[: self.room].decode(errors="ignore"))
        return Fit(tokens=len(data), room=self.room, kept_chars=kept)


@given(text=TEXTS, room=st.integers(4, 40), overlap=OVERLAPS)
def test_windows_cover_the_text_in_order_and_every_one_fits(text, room, overlap):
    measure = ByteMeasure(room)
    [windows] = split([text], measure, overlap=overlap)

    starts, ends = zip(*windows, strict=True)
    assert starts[0] == 0
    assert max(ends) == len(text)
    assert list(starts) == sorted(starts)
    reached = 0
    for start, end in windows:
        assert start <= reached  # nothing is left out
        assert end > start or not text
        assert measure.fit(text[start:end]).fits
        reached = max(reached, end)


@given(text=TEXTS, room=st.integers(4, 40), overlap=OVERLAPS)
def test_neighbours_share_at_most_the_overlap(text, room, overlap):
    """A window has at most `room` characters here, so the shared part is at most `overlap * room`."""
    [windows] = split([text], ByteMeasure(room), overlap=overlap)
    longest = max(end - start for start, end in windows)

    assert longest <= room
    assert all(left[1] - right[0] <= overlap * room for left, right in itertools.pairwise(windows))


@given(text=TEXTS, room=st.integers(1, 20))
def test_a_text_that_fits_is_one_window_equal_to_itself(text, room):
    measure = measure_words(room)
    [windows] = split([text], measure)

    assert (windows == [(0, len(text))]) == measure([text])[0].fits


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        pytest.param("天气很好。我们去公园！你呢？", ["天气很好。", "我们去公园！", "你呢？"], id="Chinese"),
        pytest.param(
            "It is so. We go on! You too? Yes.", ["It is so. ", "We go on! ", "You too? ", "Yes."], id="English"
        ),
        pytest.param(
            "他说：“好。”我走了。", ["他说：“好。”", "我走了。"], id="a closing quote stays with its sentence"
        ),
        pytest.param(
            "pi is 3.14 and e is 2.71 now", ["pi is 3.14 ", "and e is ", "2.71 now"], id="no cut inside a number"
        ),
        pytest.param("first line\nsecond line\nthird", ["first line\n", "second line\n", "third"], id="lines"),
    ],
)
def test_windows_end_where_sentences_end(text, pieces):
    room = max(len(piece.encode()) for piece in pieces)
    [windows] = split([text], ByteMeasure(int(room / 0.9) + 1), overlap=0)

    assert [text[start:end] for start, end in windows] == pieces


def test_the_next_window_begins_with_a_whole_sentence():
    text = "".join(f"Sentence number {n} is here. " for n in range(40))
    [windows] = split([text], measure_words(40), overlap=0.3)

    assert len(windows) > 5
    assert all(text[start:].startswith("Sentence") for start, _ in windows)
    assert all(right[0] < left[1] for left, right in itertools.pairwise(windows))


def test_a_run_without_any_boundary_is_split_all_the_same():
    [windows] = split(["a" * 10_000], ByteMeasure(100), overlap=0)

    assert "".join("a" * (end - start) for start, end in windows) == "a" * 10_000
    assert len(windows) <= 10_000 / 100 / 0.9 + 1


def test_all_windows_of_all_documents_are_measured_together():
    """Two rounds, the whole texts and then their windows, however many windows there are."""
    measure = ByteMeasure(50)
    split(["word " * 400, "short", "other " * 300], measure)

    assert len(measure.calls) == 2


def test_denser_parts_of_a_text_are_split_again():
    text = "plain words here. " * 40 + "量子纠缠很有意思。" * 40
    measure = ByteMeasure(200)
    [windows] = split([text], measure)

    assert all(measure.fit(text[start:end]).fits for start, end in windows)
    assert len(measure.calls) <= 4


def test_a_million_dots_cost_a_few_measurements():
    """No boundary pattern looks at a run of punctuation more than once."""
    measure = ByteMeasure(8000)
    [windows] = split(["." * 1_000_000], measure)

    assert len(measure.calls) == 2
    assert windows[-1][1] == 1_000_000


def test_a_character_that_does_not_fit_fails_its_own_text_alone():
    failed, windows = split(["ok 😀 ok", "abcdef"], ByteMeasure(3))

    assert isinstance(failed, DocumentTooLongError)
    assert "'😀' (4 tokens)" in str(failed)
    assert windows[-1][1] == 6


def test_window_tokens_limits_a_window_below_the_room():
    [windows] = split(["one two three four five six"], measure_words(100), window_tokens=2, overlap=0)

    assert [end - start for start, end in windows] == [8, 6, 5, 8]


@pytest.mark.parametrize(
    ("aggregate", "folded", "best"),
    [("max", 4.0, 2), ("first", 1.0, 0), ("mean", 1.5, 2), ("topk-mean", 3.0 - 2 / 3, 2)],
)
def test_window_scores_fold_to_one(aggregate, folded, best):
    assert fold(np.array([1, -1, 4, 2], dtype=np.float32), aggregate) == (pytest.approx(folded), best)


@given(TEXTS)
def test_one_window_folds_to_itself(text):
    score = np.array([len(text) - 7.25], dtype=np.float32)

    assert {fold(score, how) for how in ("max", "first", "mean", "topk-mean")} == {(float(score[0]), 0)}


def test_plainly_short_texts_are_not_tokenized():
    measure = ByteMeasure(100)
    fits = quick(measure)(["short", "x" * 200, "量子" * 5])

    assert [fit.fits for fit in fits] == [True, False, True]
    assert measure.calls == [[""], ["x" * 200]]


@given(text=TEXTS, room=st.integers(1, 400))
def test_the_quick_measure_agrees_with_the_slow_one(text, room):
    slow = ByteMeasure(room)

    assert quick(slow)([text])[0].fits == slow.fit(text).fits


@given(st.text(max_size=50))
def test_no_official_token_sequence_is_longer_than_the_bound(tokenizer, text):
    assert len(tokenizer.encode(text, add_special_tokens=False).ids) <= token_bound(text)


@pytest.mark.parametrize("query", ["capital of France", "量子纠缠是什么？"])
def test_windows_fit_beside_the_query_in_the_official_prompt(tokenizer_dir, query):
    """Mixed text: the tokens of a window are counted where they stand, not taken from a cut of the whole."""
    encoder = PromptEncoder(
        (tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8"),
        spec=PromptSpec.for_template("transformers"),
        instruction=DEFAULT_INSTRUCTION,
        max_length=200,
    )
    text = "巴黎是法国的首都。Paris is the capital of France. def f(x): return x+1\n🗼🗼 https://a.b/c?d=e\n" * 60
    [windows] = split([text], partial(encoder.fit, query))

    assert len(windows) > 10
    assert all(fit.fits for fit in encoder.fit(query, [text[start:end] for start, end in windows]))


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir):
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
