"""First stage, rerankers in a row, and first stages side by side."""

from __future__ import annotations

import asyncio

import pytest

from qwen_rerank import Candidate, Cascade, Document, Reranker, TwoStageRetriever
from qwen_rerank.errors import InvalidInputError
from qwen_rerank.pipeline import FusedFirstStage, rank_fusion
from qwen_rerank.protocols import SecondStage
from qwen_rerank.testing import TableScorer

SMALL = TableScorer({"a": 1.0, "b": 4.0, "c": 3.0, "d": 2.0})
LARGE = TableScorer({"a": 9.0, "b": -1.0, "c": 1.0, "d": 5.0})


class ListFirstStage:
    """Recalls the same documents for every query and notes what it was asked."""

    def __init__(self, texts):
        self.candidates = [Candidate(Document(text, text), 1.0 / rank, rank) for rank, text in enumerate(texts, 1)]
        self.asked = []

    def search(self, query, top_k, *, filter=None):
        self.asked.append((query, top_k, filter))
        return self.candidates[:top_k]


class AsyncFirstStage(ListFirstStage):
    """Can also be awaited."""

    async def asearch(self, query, top_k, *, filter=None):
        await asyncio.sleep(0)
        return self.candidates[:top_k][::-1]

    def search(self, query, top_k, *, filter=None):
        raise AssertionError("asearch is there")


def texts(hits):
    return [hit.document.text for hit in hits]


def cascade(**last):
    return Cascade([Reranker(SMALL, top_n=3), Reranker(LARGE, **last)])


def test_a_cascade_passes_the_best_of_each_stage_on():
    """The small model drops a, which the large one would have liked best."""
    hits = cascade(top_n=2).rerank("q", list("abcd"))

    assert texts(hits) == ["d", "c"]
    assert [hit.log_odds for hit in hits] == [5.0, 1.0]


def test_a_cascade_keeps_place_and_score_of_the_original_candidates():
    candidates = [Candidate(Document(f"id-{text}", text), 10.0 - rank, rank) for rank, text in enumerate("abcd", 1)]
    hits = cascade().rerank("q", candidates)

    assert [(hit.document.text, hit.index, hit.first_stage_score, hit.rank) for hit in hits] == [
        ("d", 3, 6.0, 1),
        ("c", 2, 7.0, 2),
        ("b", 1, 8.0, 3),
    ]


def test_only_the_last_threshold_counts():
    stages = [Reranker(SMALL, threshold=0.99), Reranker(LARGE, threshold=0.5)]

    assert texts(Cascade(stages).rerank("q", list("abcd"))) == ["a", "d", "c"]


def test_three_stages_follow_the_index_back():
    again = Reranker(SMALL, top_n=2)
    hits = Cascade([Reranker(LARGE, top_n=3), again, Reranker(LARGE)]).rerank("q", list("bacd"))

    assert [(hit.document.text, hit.index) for hit in hits] == [("d", 3), ("c", 2)]


def test_a_document_that_failed_early_gets_a_second_chance():
    unsure = TableScorer({"a": 1.0})
    hits = Cascade([Reranker(unsure, on_error="last"), Reranker(LARGE)]).rerank("q", ["a", "d"])

    assert [(hit.document.text, hit.error) for hit in hits] == [("a", None), ("d", None)]


async def test_a_cascade_gives_the_same_awaited_and_for_many():
    both = cascade()
    alone = both.rerank("q", list("abcd"))

    assert await both.arerank("q", list("abcd")) == alone
    assert both.rerank_many(["q", "p"], [list("abcd"), ["a"]]) == [alone, both.rerank("p", ["a"])]


@pytest.mark.parametrize("stages", [[], [SMALL]])
def test_a_cascade_needs_rerankers(stages):
    with pytest.raises(InvalidInputError, match="at least one Reranker"):
        Cascade(stages)


def test_two_stages_recall_top_k_and_keep_top_n():
    first = ListFirstStage("abcd")
    hits = TwoStageRetriever(first, Reranker(LARGE), top_k=3, top_n=2).retrieve("q", filter={"lang": "zh"})

    assert first.asked == [("q", 3, {"lang": "zh"})]
    assert [(hit.document.text, hit.first_stage_score) for hit in hits] == [("a", 1.0), ("c", 1 / 3)]


def test_a_call_can_set_its_own_limits_and_instruction():
    scorer = TableScorer({"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0})
    hits = TwoStageRetriever(ListFirstStage("abcd"), Reranker(scorer)).retrieve("q", top_k=2, top_n=1, instruction="i")

    assert texts(hits) == ["b"]
    assert scorer.calls == [("q", ["a", "b"], "i")]


def test_a_first_stage_that_gives_too_much_is_cut():
    first = ListFirstStage("abcd")
    first.search = lambda query, top_k, *, filter=None: first.candidates

    assert sorted(texts(TwoStageRetriever(first, Reranker(LARGE), top_k=2).retrieve("q"))) == ["a", "b"]


async def test_a_first_stage_is_awaited_where_it_can_be():
    plain = TwoStageRetriever(ListFirstStage("abcd"), Reranker(LARGE), top_n=1)
    native = TwoStageRetriever(AsyncFirstStage("abcd"), Reranker(LARGE))

    assert await plain.aretrieve("q") == plain.retrieve("q")
    assert [hit.index for hit in await native.aretrieve("q")] == [3, 0, 1, 2]


async def test_both_rounds_are_there_for_who_shows_both():
    retriever = TwoStageRetriever(ListFirstStage("abcd"), Reranker(LARGE), top_k=3, top_n=2)
    rounds = retriever.retrieve_rounds("q")

    assert texts(rounds.candidates) == ["a", "b", "c"]
    assert rounds.ranked == retriever.retrieve("q")
    assert [rounds.candidates[hit.index].document for hit in rounds.ranked] == [hit.document for hit in rounds.ranked]
    assert await retriever.aretrieve_rounds("q") == rounds


def test_rerankers_and_cascades_say_what_a_second_stage_must():
    for stage in (Reranker(LARGE, top_n=2), cascade(top_n=2)):
        assert isinstance(stage, SecondStage)
        assert (stage.name, stage.top_n) == ("table", 2)


def test_many_queries_are_retrieved_as_each_alone():
    retriever = TwoStageRetriever(ListFirstStage("abcd"), cascade(), top_n=2)

    assert retriever.retrieve_many(["p", "q"]) == [retriever.retrieve("p"), retriever.retrieve("q")]
    assert retriever.retrieve_many([]) == []


@pytest.mark.parametrize(("name", "value"), [("top_k", 0), ("top_n", True)])
def test_limits_are_checked_before_the_first_stage_works(name, value):
    first = ListFirstStage("abcd")

    with pytest.raises(InvalidInputError, match=name):
        TwoStageRetriever(first, Reranker(LARGE)).retrieve("q", **{name: value})
    with pytest.raises(InvalidInputError, match=name):
        TwoStageRetriever(first, Reranker(LARGE), **{name: value})
    assert first.asked == []


def test_rank_fusion_adds_reciprocal_ranks():
    fused = rank_fusion([ListFirstStage("abc").candidates, ListFirstStage("ca").candidates], k=60)

    assert [hit.document.text for hit in fused] == ["a", "c", "b"]
    assert [hit.score for hit in fused] == pytest.approx([1 / 61 + 1 / 62, 1 / 63 + 1 / 61, 1 / 62])
    assert [hit.rank for hit in fused] == [1, 2, 3]


def test_rank_fusion_of_one_list_keeps_its_order_and_counts_a_repeated_document_once():
    fused = rank_fusion([ListFirstStage("abab").candidates])

    assert [(hit.document.text, hit.score) for hit in fused] == [("a", 1 / 61), ("b", 1 / 62)]


def test_fused_first_stages_are_a_first_stage():
    stages = [ListFirstStage("abcd"), ListFirstStage("dc")]
    hits = TwoStageRetriever(FusedFirstStage(stages), Reranker(LARGE), top_k=3).retrieve("q", filter={"x": 1})

    assert stages[0].asked == stages[1].asked == [("q", 3, {"x": 1})]
    assert texts(hits) == ["a", "d", "c"]


@pytest.mark.parametrize("stages", [[], [None], 5, "ab", {}, (one for one in [ListFirstStage("a")])], ids=str)
def test_what_are_no_stages_is_refused_when_it_is_given(stages):
    with pytest.raises(InvalidInputError, match="stages must be a list of at least one first stage"):
        FusedFirstStage(stages)
    with pytest.raises(InvalidInputError, match="stages must be a list of at least one Reranker"):
        Cascade(stages)


@pytest.mark.parametrize(
    ("first", "second", "name"), [("x", Reranker(LARGE), "first_stage"), (ListFirstStage("a"), "y", "reranker")]
)
def test_a_retriever_names_the_part_that_cannot_be_one(first, second, name):
    with pytest.raises(InvalidInputError, match=name):
        TwoStageRetriever(first, second)
