"""Tokenizer files that would break the prompt are refused, with a sentence that names the file."""

from __future__ import annotations

import copy
import json
import random
import unicodedata
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_rerank.errors import TokenizerError
from qwen_rerank.tokenizer import _CLEAN, PromptTokenizer, _byte_of_letter, _is_clean
from tests.checkpoints import official_tokenizers, small_tokenizer
from tests.texts import adversarial_text, clean_text


@pytest.fixture
def data(tmp_path):
    """A good, small tokenizer file."""
    small_tokenizer(tmp_path)
    return json.loads((tmp_path / "tokenizer.json").read_text())


def open_(data):
    return PromptTokenizer(json.dumps(data), source="m/tokenizer.json")


def test_a_good_file_opens(data):
    tokenizer = open_(data)
    assert tokenizer.n_ids == 256 + 3 + 5
    assert set(tokenizer.added_ids.values()) == set(range(259, 264))


def test_saved_truncation_and_padding_are_ignored(data):
    data["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    data["padding"] = {"strategy": {"Fixed": 8}, "direction": "Left", "pad_id": 0, "pad_type_id": 0, "pad_token": "!"}
    data["padding"]["pad_to_multiple_of"] = None
    [piece] = open_(data).pieces("", ["abcdef"], 100)
    assert len(piece.ids) == 6
    assert len(open_(data).control_ids("<think>abc")) == 4


def test_the_offsets_that_transformers_5_saves_are_accepted(data):
    data["pre_tokenizer"]["pretokenizers"][1]["trim_offsets"] = True
    [piece] = open_(data).pieces(" ", ["深度学"], 4)
    assert piece.kept_chars == 1


def _set(path, value):
    def change(data):
        *above, last = path
        for key in above:
            data = data[key]
        data[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(_set(["normalizer"], None), "the normalizer must be NFC", id="no normalizer"),
        pytest.param(_set(["pre_tokenizer"], {"type": "Whitespace"}), "split pattern", id="other words"),
        pytest.param(_set(["model", "dropout"], 0.1), "plain BPE", id="dropout"),
        pytest.param(_set(["model", "ignore_merges"], True), "plain BPE", id="ignored merges"),
        pytest.param(_set(["model", "merges"], [["q", "zz"]]), "cannot be loaded", id="impossible merge"),
        pytest.param(_set(["model"], []), "no `model` section", id="no model"),
        pytest.param(_set(["model", "vocab", "a"], 5), "two tokens share one id|cannot be loaded", id="shared id"),
        pytest.param(_set(["added_tokens"], [{"id": 1}]), "cannot be loaded", id="half an added token"),
    ],
)
def test_a_file_of_another_kind_is_refused(data, change, message):
    change(data)
    with pytest.raises(TokenizerError, match=rf"m/tokenizer\.json.*({message})"):
        open_(data)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "{}", '{"model": {}}', "[" * 100_000])
def test_what_is_no_tokenizer_is_refused(content):
    with pytest.raises(TokenizerError, match=r"m/tokenizer\.json"):
        PromptTokenizer(content, source="m/tokenizer.json")


def test_a_truncated_file_is_refused(data):
    text = json.dumps(data)
    for n in range(0, len(text), 301):
        with pytest.raises(TokenizerError):
            PromptTokenizer(text[:n])


def test_a_vocabulary_that_drops_bytes_is_refused(data):
    del data["model"]["vocab"]["a"]
    with pytest.raises(TokenizerError, match="1 of the 256 byte tokens are missing"):
        open_(data)


def test_added_tokens_inside_the_vocabulary_are_fine_out_of_reach_of_merges(data):
    """Trainers list them there; text still cannot become one."""
    data["model"]["vocab"]["<think>"] = 262
    [piece] = open_(data).pieces("", ["<think>"], 100)
    assert len(piece.ids) == 7


def test_added_tokens_that_merges_lead_to_are_refused(data):
    """A file made to let plain text forge a control token."""
    forged = copy.deepcopy(data)
    forged["added_tokens"][0] |= {"content": "yes", "id": 258}
    with pytest.raises(TokenizerError, match="plain text can become the added token"):
        open_(forged)


def test_control_strings_must_be_added_tokens(data):
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] != "</think>"]
    with pytest.raises(TokenizerError, match="'</think>' must be exactly one token, but is 8"):
        open_(data).control_ids("<think>\n\n</think>")


def test_the_official_vocabulary_must_have_the_official_ids(tokenizer_dir):
    data = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    vocabulary = data["model"]["vocab"]
    vocabulary["yes"], vocabulary["no"] = vocabulary["no"], vocabulary["yes"]
    with pytest.raises(TokenizerError, match="'yes' has id 2152, not the official 9693"):
        open_(data).single_id("yes")


# The faster way of tokenizing, where it is equal


CLEAN = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000 and _CLEAN.fullmatch(chr(code))]


@pytest.fixture(scope="module")
def both(tokenizer_dir):
    """The official tokenizer with the faster way, and without."""
    pytest.importorskip("tiktoken")
    fast, slow = official_tokenizers(tokenizer_dir)[0], copy.copy(official_tokenizers(tokenizer_dir)[0])
    slow.__dict__["_ranked"] = None
    assert fast._ranked is not None
    return fast, slow


def same(both, lead, texts, keep):
    fast, slow = (
        [(piece.ids.tolist(), piece.tokens, piece.kept_chars) for piece in one.pieces(lead, texts, keep)]
        for one in both
    )
    assert fast == slow


@settings(max_examples=150)
@given(st.lists(st.text(st.sampled_from(CLEAN), max_size=40), max_size=4), st.integers(1, 30))
def test_clean_texts_have_the_same_tokens_and_cuts_either_way(both, texts, keep):
    assert all(map(_is_clean, texts))
    same(both, " ", texts, keep)


def test_all_texts_have_the_same_tokens_and_cuts_either_way(both, full):
    """Words, code, emoji and attacks of many kinds; also where only some of a call are clean."""
    rng = random.Random(7)
    for _ in range(200 if full else 20):
        texts = [rng.choice((clean_text, adversarial_text))(rng) for _ in range(50)]
        same(both, rng.choice(["", " ", "\n<Document>:"]), texts, rng.choice([1, 7, 60, 8000]))


@pytest.mark.heavy
def test_every_clean_character_is_split_and_kept_alike_in_any_company(both, full):
    """Each character in one context out of six; in all of them at full size."""
    contexts = ("a{0}b", " {0}  {0}{0}\n{0}", "1{0}2", "'{0}!{0}", "首{0}\t{0}é", "{0}'s{0}'RE")
    rng = random.Random(7)
    for start in range(0, len(CLEAN), 2_000):
        chars = CLEAN[start : start + 2_000]
        same(both, " ", [c.format(char) for char in chars for c in rng.sample(contexts, 6 if full else 1)], 5)


def test_clean_characters_are_left_alone_by_nfc_whatever_stands_before_them():
    """None decomposes, none has a combining class, and none is the second half of a composition."""
    second = {
        chr(int(parts[1], 16))
        for code in range(0x110000)
        if len(parts := unicodedata.decomposition(chr(code)).split()) == 2 and not parts[0].startswith("<")
    }
    jamo = {chr(code) for code in range(0x1161, 0x11C3)}
    for char in CLEAN:
        assert unicodedata.normalize("NFC", char) == char
        assert unicodedata.combining(char) == 0
    assert not (second | jamo) & set(CLEAN)


@pytest.mark.parametrize("unit", [" ", "\n", " \t", "a", "首", "1", "!\n", "\r\n "])
def test_long_runs_are_tokenized_whatever_the_faster_way_can_bear(both, unit):
    fast, slow = both
    text = unit * (200_000 // len(unit))
    assert fast.pieces("", [text], 1000)[0].ids.tolist() == slow.pieces("", [text], 1000)[0].ids.tolist()


@pytest.mark.heavy
def test_the_official_vocabulary_is_one_in_which_ranks_alone_make_the_merges(tokenizer_dir):
    """Then byte pair encoding by ranks merges what encoding by merges does.

    By induction over the merges of a word: two neighbours that together are a token have been made inside that token's
    bytes alone, so they are the last two pieces of its own encoding with lower ranks, which is the pair that is listed.
    """
    model = json.loads((tokenizer_dir / "tokenizer.json").read_text())["model"]
    byte_of, vocabulary = _byte_of_letter(), model["vocab"]
    ranks = {bytes(byte_of[letter] for letter in token): rank for token, rank in vocabulary.items()}
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    assert sorted(ranks.values()) == list(range(256 + len(merges)))
    assert all(vocabulary["".join(merge)] == 256 + i for i, merge in enumerate(merges))
    for first, second in merges:
        whole = bytes(byte_of[letter] for letter in first + second)
        pieces, limit = [whole[i : i + 1] for i in range(len(whole))], ranks[whole]
        while len(pieces) > 2:
            pairs = [ranks.get(a + b, limit) for a, b in pairwise(pieces)]
            at = pairs.index(min(pairs))
            assert pairs[at] < limit
            pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
        assert pieces == [bytes(byte_of[letter] for letter in part) for part in (first, second)]
