"""The collections that ship with the package."""

import pytest

from qwen_rerank.errors import InvalidInputError
from qwen_rerank.samples import LANGUAGES, load_encyclopedia, load_sample


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_question_of_the_encyclopedia_has_one_answer_in_it(language):
    sample = load_encyclopedia(language)
    ids = [document.id for document in sample.documents]

    assert len(sample.documents) > 450
    assert len(sample.queries) == len(set(sample.queries)) == len(sample.relevant) == 60
    assert len(set(ids)) == len(ids)
    assert set(sample.relevant.values()) <= set(ids)
    assert len({document.metadata["title"] for document in sample.documents}) == 20


def test_the_questions_are_the_same_in_both_languages():
    english, chinese = (load_encyclopedia(language) for language in ("en", "zh"))
    answers = [[found.split("/")[1] for found in sample.relevant.values()] for sample in (english, chinese)]

    assert [answer.split("p")[0] for answer in answers[0]] == [answer.split("p")[0] for answer in answers[1]]


@pytest.mark.parametrize("load", [load_sample, load_encyclopedia])
def test_a_language_that_is_not_there_is_refused(load):
    with pytest.raises(InvalidInputError, match="'zh', 'en', not 'fr'"):
        load("fr")
