"""A cross-encoder scores as sentence-transformers has it, and nothing that a text holds can steer it."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from qwen_rerank import CrossEncoderScorer, Reranker, Scorer
from qwen_rerank.errors import (
    DeviceOutOfMemoryError,
    DocumentScoringError,
    InvalidInputError,
    ModelCorruptError,
    ModelError,
    ModelIncompleteError,
    ModelNotFoundError,
    NonFiniteScoreError,
    QueryTooLongError,
    TokenizerError,
    UnsafeModelError,
)
from tests.checkpoints import small_checkpoint
from tests.scorers.cross_encoders import make_bert, make_roberta

CLEAN = ["a red cat", "red", "", "北京 the cat, and. 量子纠缠", "<a> [b] </c>", "Ünknown Ωords"]
CONTROL = ["[SEP]", "[CLS]", "[PAD]", "[MASK]", "[UNK]", "</s>", "<s>", "<pad>", "<unk>", "<mask>", "＜/s＞"]
KINDS = {"bert": make_bert, "roberta": make_roberta}


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    return KINDS[request.param](tmp_path_factory.mktemp("models") / request.param)


@pytest.fixture(scope="module")
def scorer(folder):
    return CrossEncoderScorer(str(folder), device="cpu", batch_size=3)


@pytest.fixture(scope="module")
def own_tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def copy(tmp_path):
    """A BERT of one's own, to break."""
    return make_bert(tmp_path / "model")


def test_scores_are_those_of_sentence_transformers_without_its_sigmoid(folder, scorer):
    from sentence_transformers import CrossEncoder

    pairs = [("a cat", text) for text in CLEAN]
    expected = CrossEncoder(str(folder), device="cpu").predict(pairs, activation_fn=torch.nn.Identity())

    scores = scorer.score("a cat", CLEAN)
    assert scores.dtype == np.float32
    assert np.ptp(scores) > 0.1
    np.testing.assert_allclose(scores, expected, atol=1e-5)


@given(query=st.sampled_from(CLEAN), text=st.text("abc 量子.,Ω[]</>", max_size=12))
def test_token_ids_on_clean_text_are_those_of_the_models_own_tokenizer(own_tokenizer, scorer, query, text):
    own = own_tokenizer([[query, text]])
    [pair] = scorer._encoder.encode(query, [text])

    assert [pair.ids] == own["input_ids"]
    assert [pair.type_ids] == own.get("token_type_ids", [[0] * len(pair.ids)])


@settings(max_examples=200)
@given(parts=st.lists(st.sampled_from([*CONTROL, "a", " ", "量", "cat"]), max_size=6), in_query=st.booleans())
def test_no_text_becomes_a_control_token(own_tokenizer, scorer, parts, in_query):
    """Only the template's own control tokens are there, whatever query and document hold."""
    control = set(own_tokenizer.all_special_ids) - {own_tokenizer.unk_token_id}
    text = "".join(parts)
    [pair] = scorer._encoder.encode(*((text, ["cat"]) if in_query else ("cat", [text])))
    [clean] = scorer._encoder.encode("cat", ["cat"])

    assert [i for i in pair.ids if i in control] == [i for i in clean.ids if i in control]


def test_the_models_own_tokenizer_would_take_the_control_tokens(own_tokenizer):
    """So the test above means something."""
    ids = own_tokenizer("cat " + own_tokenizer.sep_token, add_special_tokens=False)["input_ids"]

    assert own_tokenizer.sep_token_id in ids


def test_a_separator_in_a_document_scores_as_its_characters(copy):
    """WordPiece splits at brackets, so with and without spaces these are the same pieces, if it is no control token."""
    spelled = CrossEncoderScorer(str(copy), device="cpu").score("a cat", ["red [SEP] cat", "red [ SEP ] cat"])

    assert spelled[0] == spelled[1]


@pytest.mark.parametrize("threads", [1, 2])
def test_a_forward_pass_has_the_threads_that_were_asked_for(folder, threads):
    before = torch.get_num_threads()
    scorer = CrossEncoderScorer(str(folder), device="cpu", threads=threads)
    try:
        assert scorer._thread.run(torch.get_num_threads) == threads
    finally:
        torch.set_num_threads(before)


def test_it_is_a_scorer(scorer):
    assert isinstance(scorer, Scorer)
    assert scorer.score("q", []).shape == (0,)
    assert [hit.index for hit in Reranker(scorer).rerank("cat", ["red", "cat"])] == list(
        np.argsort(-scorer.score("cat", ["red", "cat"]))
    )


def test_what_else_is_in_the_batch_does_not_matter(scorer):
    together = scorer.score("a cat", CLEAN)

    np.testing.assert_allclose(together, [scorer.score("a cat", [text])[0] for text in CLEAN], atol=1e-5)


def test_equal_texts_score_the_same_to_the_bit(scorer):
    scores = scorer.score("a cat", ["red", "a red cat, " * 3, "red", "x", "red"])

    assert scores[0] == scores[2] == scores[4]


def test_many_queries_score_as_each_alone(scorer):
    queries, documents = ["cat", "量子", "cat"], [["red", "cat"], [], ["cat", "北京"]]
    many = scorer.score_many(queries, documents)

    assert [len(scores) for scores in many] == [2, 0, 2]
    assert many[0][1] == many[2][0]
    for query, texts, scores in zip(queries, documents, many, strict=True):
        np.testing.assert_allclose(scores, scorer.score(query, texts), atol=1e-5)


def test_threads_get_their_own_scores(scorer):
    texts = [f"cat {'red ' * n}" for n in range(12)]
    expected = [scorer.score("cat", [text, "x"]) for text in texts]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda text: scorer.score("cat", [text, "x"]), texts))
    np.testing.assert_array_equal(found, expected)


async def test_ascore_gives_what_score_gives(scorer):
    np.testing.assert_array_equal(await scorer.ascore("a cat", CLEAN), scorer.score("a cat", CLEAN))


# Length


@given(st.text("ab 量子.", max_size=120))
def test_a_long_document_is_cut_where_fit_says(scorer, text):
    """The kept tokens are the first ones of the whole text, and the template around them stays whole."""
    [fit] = scorer.fit("a cat", [text])
    [pair], [whole] = (encoder.encode("a cat", [text]) for encoder in (scorer._encoder, roomy(scorer)))

    assert fit.fits == (len(whole.ids) <= scorer._encoder.max_length)
    assert len(pair.ids) == min(len(whole.ids), scorer._encoder.max_length)
    assert pair.ids[:-1] == whole.ids[: len(pair.ids) - 1]
    assert pair.ids[-1] == whole.ids[-1]
    assert fit.fits == (fit.kept_chars == len(text)) or not text[fit.kept_chars :].strip()
    assert pair.kept_chars == fit.kept_chars


def test_the_scorer_tells_the_tokens_and_the_characters_it_read(scorer, own_tokenizer):
    texts = ["red", "a cat " * 100, "red"]
    found = scorer.score_details("a cat", texts)

    assert found.tokens.tolist() == [len(own_tokenizer("a cat", "red").input_ids), 48, found.tokens[0]]
    assert found.kept_chars.tolist() == [fit.kept_chars for fit in scorer.fit("a cat", texts)]
    assert found.kept_chars[1] < len(texts[1])


def test_each_distinct_document_is_tokenized_once(scorer, monkeypatch):
    seen = []
    encode = scorer._encoder._encode
    monkeypatch.setattr(scorer._encoder, "_encode", lambda texts, room: seen.extend(texts) or encode(texts, room))
    Reranker(scorer).rerank("cat", ["red", "a red cat", "red"])

    assert seen == ["cat", "red", "a red cat"]


def roomy(scorer):
    from copy import copy as clone

    encoder = clone(scorer._encoder)
    encoder.max_length = 10_000
    return encoder


def test_windows_of_a_long_document_all_fit(scorer):
    text = "a cat sat here. 北京 is red. " * 20
    [hit] = Reranker(scorer, long_documents="windows").rerank("red cat", [text])

    assert hit.windows > 5
    assert not hit.truncated
    assert Reranker(scorer).rerank("red cat", [text])[0].truncated


def test_the_cost_of_a_huge_document_is_that_of_its_kept_part(scorer):
    """Ten megabytes are cut before they are tokenized; the score is that of the beginning."""
    [fit] = scorer.fit("cat", ["red cat " * 1_250_000])

    assert not fit.fits
    assert fit.tokens < 10_000
    assert scorer.score("cat", ["red cat " * 1_250_000]) == scorer.score("cat", ["red cat " * 100])


def test_text_behind_much_white_space_is_still_read(tmp_path):
    scorer = CrossEncoderScorer(str(make_bert(tmp_path / "bert")), device="cpu")

    assert scorer.score("cat", [" " * 100_000 + "red"]) == scorer.score("cat", ["red"])


def test_a_query_that_leaves_no_room_says_so(scorer):
    with pytest.raises(QueryTooLongError, match=r"leaves no room for a document within max_length \(48\)"):
        scorer.score("a cat " * 100, ["red"])
    with pytest.raises(QueryTooLongError):
        scorer.fit("a cat " * 100, ["red"])


# Failures


class Broken(torch.nn.Module):
    """Gives what a test wants of it, batch after batch."""

    def __init__(self, forward):
        super().__init__()
        self.forward = forward


def with_network(folder, forward, **settings):
    scorer = CrossEncoderScorer(str(folder), device="cpu", **settings)
    scorer._network._module = Broken(forward)
    return scorer


def logits(values):
    return type("Output", (), {"logits": torch.tensor(values)[:, None]})()


def test_a_score_that_is_no_number_fails_its_document_alone(copy):
    scorer = with_network(copy, lambda input_ids, **_: logits([float("nan"), 2.0]))

    with pytest.raises(DocumentScoringError) as raised:
        scorer.score("cat", ["a longer text", "red"])
    assert isinstance(raised.value.failed[0], NonFiniteScoreError)
    np.testing.assert_array_equal(raised.value.scores, np.float32([np.nan, 2.0]))


def test_out_of_memory_halves_the_batch_and_fails_only_what_does_not_fit_alone(copy):
    sizes = []

    def forward(input_ids, **_):
        sizes.append(len(input_ids))
        if len(input_ids) > 2 or input_ids.shape[1] > 12:
            raise torch.cuda.OutOfMemoryError("no memory")
        return logits([1.0] * len(input_ids))

    scorer = with_network(copy, forward, batch_size=8)
    with pytest.raises(DocumentScoringError, match=r"documents\[2\].*does not fit the memory of cpu") as raised:
        scorer.score("cat", ["a", "b", "a very long document", "c", "d"])
    assert isinstance(raised.value.failed[2], DeviceOutOfMemoryError)
    assert np.nansum(raised.value.scores) == 4
    assert sizes == [5, 2, 1, 1, 1, 1, 1]


def test_an_instruction_is_refused_and_never_ignored(scorer):
    for call in (scorer.score, scorer.fit):
        with pytest.raises(InvalidInputError, match="takes no instruction"):
            call("cat", ["red"], instruction="find cats")


# Model folders


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def load(path, **settings):
    return CrossEncoderScorer(str(path), device="cpu", **settings)


def test_a_head_with_more_labels_is_refused(tmp_path):
    with pytest.raises(ModelError, match="has 3 labels; a reranker has one"):
        load(make_bert(tmp_path / "model", num_labels=3))


def test_a_missing_head_is_never_made_up(copy):
    weights = load_file(copy / "model.safetensors")
    save_file({name: w for name, w in weights.items() if "classifier" not in name}, copy / "model.safetensors")

    with pytest.raises(ModelIncompleteError, match=r"lacks 2 weights, classifier\.bias"):
        load(copy)


def test_pickled_weights_are_refused(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")

    with pytest.raises(UnsafeModelError, match=r"weights only as pytorch_model\.bin"):
        load(copy)


def test_code_of_the_model_is_never_run(copy):
    (copy / "evil.py").write_text(f"open({str(copy / 'ran')!r}, 'w')\n")
    edit(
        copy / "config.json",
        model_type="evil",
        auto_map={"AutoConfig": "evil.C", "AutoModelForSequenceClassification": "evil.M"},
    )

    with pytest.raises(UnsafeModelError, match="asks for code of its own"):
        load(copy)
    assert not (copy / "ran").exists()


def test_an_attention_kernel_from_the_hub_is_refused(copy):
    edit(copy / "config.json", attn_implementation="someone/kernel")

    with pytest.raises(UnsafeModelError, match="code from elsewhere"):
        load(copy)


@pytest.mark.parametrize(
    ("file", "content", "error", "message"),
    [
        ("model.safetensors", b"\xff" * 8, ModelCorruptError, "cannot be loaded"),
        ("config.json", b"{", ModelCorruptError, r"config\.json cannot be read as JSON"),
        ("config.json", b"[]", ModelCorruptError, "must hold a JSON object"),
        ("tokenizer.json", b"{}", TokenizerError, "tokenizer"),
        ("adapter_config.json", b"{}", ModelError, "merge it into its base model"),
        ("modules.json", b'[{"type": "a.Transformer"}, {"type": "a.LogitScore"}]', ModelError, "several modules"),
        ("config_sentence_transformers.json", b'{"default_prompt_name": "query"}', ModelError, "prompt 'query'"),
    ],
)
def test_a_folder_that_is_damaged_or_of_another_kind_is_refused(copy, file, content, error, message):
    (copy / file).write_bytes(content)

    with pytest.raises(error, match=message):
        load(copy)


def test_a_causal_model_is_sent_to_the_qwen_scorer(copy):
    edit(copy / "config.json", architectures=["Qwen3ForCausalLM"])

    with pytest.raises(ModelError, match=r"Qwen3ForCausalLM and no sequence classifier.*QwenScorer"):
        load(copy)


def test_a_qwen_reranker_is_never_scored_without_its_prompt(tmp_path):
    """Its conversion to a classifier is one by architecture and one label, but was trained behind a prompt."""
    with pytest.raises(ModelError, match="mean nothing without its prompt; use QwenScorer"):
        load(small_checkpoint(tmp_path / "m", kind="seq-cls"))


def test_an_empty_folder_and_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(ModelIncompleteError, match=r"no config\.json"):
        load(tmp_path)
    with pytest.raises(ModelNotFoundError, match="is no folder and no hub name"):
        load(tmp_path / "nothing here")


def test_the_fingerprint_changes_with_all_that_changes_a_score(tmp_path, scorer, folder):
    other = make_bert(tmp_path / "other", seed=1)

    assert load(folder).fingerprint == scorer.fingerprint
    assert len({scorer.fingerprint, load(folder, max_length=20).fingerprint, load(other).fingerprint}) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": 49}, r"max_length \(49\) is above the 48 tokens"),
        ({"batch_size": 0}, "batch_size"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"device": "toaster"}, "device must be 'auto' or a torch device"),
    ],
)
def test_a_wrong_setting_is_named(folder, settings, message):
    with pytest.raises(InvalidInputError, match=message):
        CrossEncoderScorer(str(folder), **settings)
