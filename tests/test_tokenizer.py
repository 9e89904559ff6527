"""Tokenizer files that would break the prompt are refused, with a sentence that names the file."""

from __future__ import annotations

import copy
import json

import pytest
from checkpoints import small_tokenizer

from qwen_rerank.errors import TokenizerError
from qwen_rerank.tokenizer import PromptTokenizer


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
