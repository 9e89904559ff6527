"""What the prompt encoder promises beyond the ids of the recipe."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from qwen_rerank.errors import InvalidInputError, InvalidTextError, QueryTooLongError, TokenizerError
from qwen_rerank.prompt import DEFAULT_INSTRUCTION, PromptEncoder, PromptSpec
from qwen_rerank.tokenizer import PromptTokenizer
from tests.checkpoints import official_tokenizers, small_tokenizer
from tests.texts import clean_text


@pytest.fixture(scope="module")
def official(tokenizer_dir):
    return official_tokenizers(tokenizer_dir)[0]


@pytest.fixture
def small(tmp_path):
    """A tokenizer whose tokens are bytes."""
    small_tokenizer(tmp_path)
    return PromptTokenizer((tmp_path / "tokenizer.json").read_text())


def document_ids(prompt, encoder):
    return prompt.ids[prompt.document_start : -len(encoder.suffix_ids)].tolist()


def test_the_official_ids(official):
    encoder = PromptEncoder(official)
    assert (encoder.yes_id, encoder.no_id, len(encoder.prefix_ids)) == (9693, 2152, 39)
    assert encoder.suffix_ids.tolist() == [151645, 198, 151644, 77091, 198, 151667, 271, 151668, 271]


def test_every_prompt_of_a_query_starts_with_its_query_prefix(official):
    encoder = PromptEncoder(official)
    documents = ["", " ", "\n\n", "a", "深", "\u0301", ">", "::", "\x00", "1", "  x", "\r\n<Document>:"]
    prefix = encoder.query_prefix("what?\n ")
    for prompt in encoder.encode("what?\n ", documents):
        assert prompt.document_start == len(prefix)
        assert prompt.ids[: len(prefix)].tolist() == prefix.tolist()


@pytest.mark.parametrize("label", ["<Document>: ", "Document:\n", "文档：", "D's  ", "passage, "])
def test_any_accepted_document_label_is_split_exactly(official, tokenizer_dir, label):
    """Tokenizing head and document apart gives the ids of the whole string, whatever the document starts with."""
    spec, whole = PromptSpec(document_label=label), official_tokenizers(tokenizer_dir)[1]
    encoder = PromptEncoder(official, spec=spec)
    rng = random.Random(label)
    documents = ["", " ", "\n\n", ":", "：", "'s", "\u0301x", "\r\n", *(clean_text(rng, longest=5) for _ in range(200))]
    for document, prompt in zip(documents, encoder.encode("what?", documents), strict=True):
        body = whole.encode(spec.body(DEFAULT_INSTRUCTION, "what?", document), add_special_tokens=False).ids
        assert prompt.ids.tolist() == encoder.prefix_ids.tolist() + body + encoder.suffix_ids.tolist()


def test_only_the_documents_end_is_cut(small):
    encoder = PromptEncoder(small, max_length=len(PromptEncoder(small).query_prefix("q")) + 4 + 9 + 30)
    [whole, cut] = encoder.encode("q", ["abc", "abcdefghij" * 20])
    room = encoder.max_length - whole.document_start - len(encoder.suffix_ids)
    assert not whole.truncated
    assert whole.kept_chars == 3
    assert cut.truncated
    assert len(cut.ids) == encoder.max_length
    assert cut.kept_chars == room - 1  # a space stands before the document
    assert cut.ids[-len(encoder.suffix_ids) :].tolist() == encoder.suffix_ids.tolist()


def test_a_character_cut_in_two_is_not_kept(small):
    """With a token for each byte, six bytes of three-byte characters after the space are two characters, not 2.33."""
    encoder = PromptEncoder(small, max_length=8192)
    base = len(encoder.query_prefix("q")) + len(encoder.suffix_ids)
    for extra, kept in ((6, 1), (7, 2), (8, 2), (9, 2), (10, 3)):
        [prompt] = PromptEncoder(small, max_length=base + extra).encode("q", ["深度学习"])
        assert prompt.kept_chars == kept


@pytest.mark.parametrize("seed", range(4))
def test_what_is_kept_fits_again(official, seed):
    """The kept characters, tokenized anew, need no more than the room."""
    rng = random.Random(seed)
    encoder = PromptEncoder(official)
    base = len(encoder.query_prefix("q")) + len(encoder.suffix_ids)
    for _ in range(50):
        text = clean_text(rng)
        tokens = encoder.fit("q", [text])[0].tokens
        short = PromptEncoder(official, max_length=base + rng.randint(1, max(1, tokens)))
        [fit] = short.fit("q", [text])
        assert short.fit("q", [text[: fit.kept_chars]])[0].fits
        assert (fit.kept_chars == len(text)) or not fit.fits


@pytest.mark.parametrize(
    "unit", ["word ", "深度学习，", "x", "é ", "e\u0301", "😀", "1", "\n  a", " \n", "สวัสดี", "👩‍👩‍👧‍👦"]
)
def test_a_long_document_has_the_ids_of_the_whole(official, tokenizer_dir, unit):
    """Cutting before tokenizing leaves no trace, for words of up to 512 characters."""
    whole = official_tokenizers(tokenizer_dir)[1]
    encoder = PromptEncoder(official, max_length=200)
    document = (unit * (400 // len(unit)) + " , ") * 60
    [prompt] = encoder.encode("q", [document])
    body = whole.encode(encoder.spec.body(DEFAULT_INSTRUCTION, "q", document), add_special_tokens=False).ids
    assert prompt.truncated
    assert prompt.ids.tolist() == [*encoder.prefix_ids, *body[: 200 - 48], *encoder.suffix_ids]


@pytest.mark.parametrize(
    ("unit", "most"),
    [("word ", 7), ("深度学习", 4), ("x", 20), ("\u0301", 4), ("😀", 4), ("\n", 300), (" ", 300), ("<think>", 7)],
)
def test_ten_million_characters_cost_no_more_than_what_is_kept(official, monkeypatch, unit, most):
    """The tokenizer is never given more than a few characters for each token that is kept."""
    seen = []

    def counting(texts):
        seen.extend(map(len, texts))
        return encode(texts)

    encode = official._encode
    encoder = PromptEncoder(official, max_length=512)
    document = unit * (10_000_000 // len(unit))
    monkeypatch.setattr(official, "_encode", counting)
    [prompt] = encoder.encode("q", [document])
    assert prompt.truncated
    assert sum(seen) < most * 512 + 2 * 512
    with pytest.raises(QueryTooLongError, match=r"query \(10[\d,]* char|query \(\d+ characters\)"):
        encoder.encode(unit * (10_000_000 // len(unit)) + "?", ["a"])


def test_a_query_that_fills_the_prompt_is_refused_with_its_lengths(small):
    encoder = PromptEncoder(small, max_length=400)
    with pytest.raises(QueryTooLongError, match=r"query \(500 characters\) take at least \d+ of the \d+ tokens"):
        encoder.encode("q" * 500, ["a"])
    assert PromptEncoder(small, max_length=1200).encode("q" * 500, ["a"])[0].kept_chars == 1


def test_empty_documents_are_scored_and_empty_queries_refused(official):
    encoder = PromptEncoder(official)
    [prompt] = encoder.encode("q", [""])
    assert (prompt.truncated, prompt.kept_chars) == (False, 0)
    assert encoder.encode("q", []) == []
    with pytest.raises(InvalidInputError, match="query is empty"):
        encoder.encode(" \n", ["a"])


@pytest.mark.parametrize("place", ["query", "documents", "instruction"])
def test_lone_surrogates_are_refused_by_name(official, place):
    arguments = {"query": "q", "documents": ["a", "b"], "instruction": "i"}
    arguments[place] = ["a", "b\ud800"] if place == "documents" else "x\udfff"
    with pytest.raises(InvalidTextError, match=place):
        PromptEncoder(official).encode(**arguments)


def test_sixteen_threads_share_one_encoder(official):
    """No call leaves state behind in the shared tokenizer: every thread gets what a single one gets."""
    encoder = PromptEncoder(official, max_length=300)
    jobs = [
        (f"query {i} " * (i % 7 + 1), [clean_text(random.Random(i + j)) * (j + 1) for j in range(4)])
        for i in range(320)
    ]
    alone = [[prompt.ids.tolist() for prompt in encoder.encode(*job)] for job in jobs]
    with ThreadPoolExecutor(16) as threads:
        together = list(threads.map(lambda job: [prompt.ids.tolist() for prompt in encoder.encode(*job)], jobs))
    assert together == alone


def test_more_texts_than_one_batch_keep_their_order(small):
    encoder = PromptEncoder(small, max_length=400)
    texts = ["x" * (i % 150) for i in range(700)]
    assert [fit.tokens for fit in encoder.fit("q", texts)] == [1 + len(text) for text in texts]


def test_ids_are_int32(official):
    encoder = PromptEncoder(official)
    arrays = [encoder.encode("q", ["a"])[0].ids, encoder.query_prefix("q"), encoder.prefix_ids, encoder.suffix_ids]
    assert {array.dtype for array in arrays} == {np.dtype(np.int32)}


def test_the_fingerprint_changes_with_whatever_changes_an_id(official, small):
    base = {"tokenizer": official, "spec": PromptSpec(), "instruction": "i", "max_length": 512}
    changes = [
        {},
        {"tokenizer": small},
        {"spec": PromptSpec.for_template("vllm")},
        {"spec": PromptSpec(yes="Yes")},
        {"instruction": "j"},
        {"max_length": 513},
    ]
    prints = {PromptEncoder(**{**base, **change}).fingerprint for change in changes}
    assert len(prints) == len(changes)
    assert PromptEncoder(**base).fingerprint == PromptEncoder(**base).fingerprint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"yes": "no"}, "two different labels"),
        ({"yes": ""}, "two different labels"),
        ({"document_label": ""}, "must hold a place where a word ends"),
        ({"document_label": "Document"}, "must hold a place where a word ends"),
        ({"query_label": "<|im_end|>"}, "no control string"),
        ({"prefix": "\ud800"}, "lone surrogate"),
        ({"suffix": 1}, "must be a string"),
    ],
)
def test_a_spec_that_cannot_be_exact_is_refused(change, message):
    with pytest.raises(InvalidInputError, match=message):
        replace(PromptSpec(), **change)


def test_an_unknown_template_is_refused():
    with pytest.raises(InvalidInputError, match="'transformers', 'vllm', not 'chat'"):
        PromptSpec.for_template("chat")


def test_max_length_must_hold_prefix_and_suffix(official):
    with pytest.raises(InvalidInputError, match="above the 48 tokens"):
        PromptEncoder(official, max_length=48)


def test_labels_must_be_single_tokens(small):
    with pytest.raises(TokenizerError, match=r"tokenizer.json: 'relevant' must be exactly one token, but is 8"):
        PromptEncoder(small, spec=PromptSpec(yes="relevant"))
