"""Passages cover a file, end where a sentence does, and say where they are."""

from __future__ import annotations

from itertools import pairwise

import pytest

from qwen_rerank.errors import InvalidInputError
from qwen_rerank.folders.cutting import CutSettings, _starts, cut
from qwen_rerank.folders.sections import Section, markdown, plain

SMALL = CutSettings(tokens=32, overlap=0)
ENGLISH = "The lease ends in June. Tell the landlord a month before. The deposit comes back in two weeks. "
CHINESE = "租约于六月结束。请提前一个月通知房东。押金在交房后十四天内退还。"


@pytest.mark.parametrize(("text", "ends"), [(ENGLISH * 5, "."), (CHINESE * 5, "。")])
def test_a_long_text_is_cut_at_ends_of_sentences(text, ends):
    found = cut(plain(text), SMALL)

    assert len(found) > 3
    assert all(one.section.text.endswith(ends) and len(_starts(one.section.text)) <= 32 for one in found)
    assert "".join("".join(one.section.text.split()) for one in found) == "".join(text.split())


def test_a_paragraph_end_comes_before_a_sentence_end():
    first, second = cut(plain("One two three. " * 7 + "\n\nFour. " + "Five six. " * 7), SMALL)

    assert second.section.text.startswith("Four")
    assert (first.section.line, first.last_line, second.section.line) == (1, 1, 3)


def test_neighbours_share_whole_sentences_up_to_the_overlap():
    text = " ".join(f"Tenant {n} leaves in June." for n in range(30))
    found = [one.section.text for one in cut(plain(text), CutSettings(tokens=40, overlap=16))]

    for before, after in pairwise(found):
        shared = next(size for size in range(len(after), -1, -1) if before.endswith(after[:size]))
        assert 0 < len(_starts(after[:shared])) <= 16


def test_a_text_without_a_place_to_cut_is_cut_anyway():
    found = cut(plain("x" * 2_000), SMALL)

    assert "".join(one.section.text for one in found) == "x" * 2_000


def test_short_sections_under_one_heading_are_joined_and_others_are_not():
    text = "# A\na\n## B\nb\n## C\nc\n# D\nd\n"

    found = cut(markdown(text), CutSettings(tokens=64, overlap=0))
    assert [(one.section.text, one.section.heading, one.section.line, one.last_line) for one in found] == [
        ("# A\na\n## B\nb\n## C\nc", ("A",), 1, 6),
        ("# D\nd", ("D",), 7, 8),
    ]


def test_pages_and_rows_are_never_joined():
    pages = [Section("a", place={"page": 1}), Section("b", place={"page": 2})]
    rows = [Section("a", line=2, alone=True), Section("b", line=3, alone=True)]

    assert len(cut(pages, SMALL)) == len(cut(rows, SMALL)) == 2
    assert cut([Section(" \n ", line=1)], SMALL) == []


@pytest.mark.parametrize(
    ("tokens", "overlap", "said"), [(8, 0, "tokens must be"), (32, 17, "at most half"), (32, -1, "overlap must be")]
)
def test_settings_that_make_no_sense_are_refused(tokens, overlap, said):
    with pytest.raises(InvalidInputError, match=said):
        CutSettings(tokens, overlap)
