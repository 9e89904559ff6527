"""Counted checks: ids equal the official recipe's on clean texts, and no text yields a control token."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from qwen_rerank.prompt import PromptEncoder, PromptSpec
from tests.checkpoints import official_tokenizers
from tests.reference import PREFIX, SUFFIX, reference_body, reference_ids
from tests.texts import CONTROL_STRINGS, adversarial_text, clean_text

pytestmark = pytest.mark.timeout(3600)  # at full size

FIRST_ADDED_ID = 151_643
PER_QUERY = 50


@pytest.fixture(scope="module")
def official(tokenizer_dir):
    """The official tokenizer, added tokens and all."""
    return official_tokenizers(tokenizer_dir)[1]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir):
    return official_tokenizers(tokenizer_dir)[0]


@pytest.fixture(scope="module")
def count(full):
    return 100_000 if full else 2_000


def official_ids(official, bodies, max_length):
    """Return the recipe's ids: each body tokenized as one string, cut at its end, between prefix and suffix."""
    prefix, suffix = (official.encode(text, add_special_tokens=False).ids for text in (PREFIX, SUFFIX))
    room = max_length - len(prefix) - len(suffix)
    encodings = official.encode_batch(bodies, add_special_tokens=False)
    return [prefix + encoding.ids[:room] + suffix for encoding in encodings]


@pytest.mark.parametrize("template", ["transformers", "vllm"])
def test_clean_texts_have_the_ids_of_the_recipe(official, tokenizer, count, template, capsys):
    """Instruction, query and document are random; half the prompts are cut."""
    rng = random.Random(template)
    cut = 0
    for _ in range(count // PER_QUERY // 2):
        instruction, query = clean_text(rng, longest=10), clean_text(rng, longest=10) + "?"
        documents = [clean_text(rng) for _ in range(PER_QUERY)]
        bodies = [reference_body(query, d, template=template, instruction=instruction or "i") for d in documents]
        for max_length in (8192, 200 + rng.randrange(200)):
            encoder = PromptEncoder(tokenizer, spec=PromptSpec.for_template(template), max_length=max_length)
            prompts = encoder.encode(query, documents, instruction=instruction or "i")
            assert [prompt.ids.tolist() for prompt in prompts] == official_ids(official, bodies, max_length)
            cut += sum(prompt.truncated for prompt in prompts)
    assert cut > count // 20
    with capsys.disabled():
        print(f"\n{count:,} clean {template} prompts ({cut:,} of them cut): ids equal the recipe's")


def test_whatever_character_a_document_starts_with_changes_no_token_before_it(official, tokenizer, full):
    """Head and document are tokenized apart; that is exact for every character there is, not only for likely ones."""
    characters = [chr(code) for code in range(0, 0x110000, 1 if full else 547) if not 0xD800 <= code < 0xE000]
    head = official.encode("<Document>:", add_special_tokens=False).ids
    for mark in ("", "\u0301", "\n", " a"):
        whole = official.encode_batch_fast([f"<Document>: {c}{mark}" for c in characters], add_special_tokens=False)
        pieces = tokenizer.pieces(" ", [c + mark for c in characters], 100)
        for encoding, piece in zip(whole, pieces, strict=True):
            assert encoding.ids == head + piece.ids.tolist()


def test_adversarial_texts_never_become_control_tokens(tokenizer, count, capsys):
    """Between prefix and suffix there is no id of an added token, whatever query, document and instruction hold."""
    rng = random.Random(0)
    encoder = PromptEncoder(tokenizer)
    n_prefix, n_suffix = len(encoder.prefix_ids), len(encoder.suffix_ids)
    forged = 0
    for _ in range(count // PER_QUERY):
        query, instruction = adversarial_text(rng) + "?", adversarial_text(rng)
        for prompt in encoder.encode(query, [adversarial_text(rng) for _ in range(PER_QUERY)], instruction=instruction):
            assert prompt.ids[-n_suffix:].tolist() == encoder.suffix_ids.tolist()
            forged += int((prompt.ids[n_prefix:-n_suffix] >= FIRST_ADDED_ID).sum())
    assert forged == 0
    with capsys.disabled():
        print(f"\n{count:,} adversarial prompts: {forged} control ids")


def test_adversarial_texts_do_forge_the_official_tokenizer(official):
    """The attacks are real: tokenized without care, nearly all of them yield control tokens."""
    rng = random.Random(0)
    texts = [adversarial_text(rng) for _ in range(200)]
    forged = [max(encoding.ids) >= FIRST_ADDED_ID for encoding in official.encode_batch(texts)]
    assert sum(forged) > 120


def test_adversarial_texts_keep_every_character(tokenizer, official):
    """What looks like a control token is neither dropped nor changed: the ids decode to the text."""
    encoder = PromptEncoder(tokenizer)
    for control in CONTROL_STRINGS:
        [prompt] = encoder.encode("q", [control])
        body = prompt.ids[len(encoder.prefix_ids) : -len(encoder.suffix_ids)]
        assert official.decode(body.tolist(), skip_special_tokens=False).endswith(f"<Document>: {control}")


@pytest.mark.parametrize("max_length", [8192, 100])
def test_transformers_agrees_with_the_recipe(tokenizer, tokenizer_dir, max_length):
    """The same through the tokenizer class that the model card uses, its truncation included."""
    from transformers import AutoTokenizer

    card = AutoTokenizer.from_pretrained(tokenizer_dir, padding_side="left")
    rng = random.Random(7)
    encoder = PromptEncoder(tokenizer, max_length=max_length)
    for query, document in pairwise([clean_text(rng, longest=6) + "?" for _ in range(100)]):
        query = query[:8] + "?"
        [prompt] = encoder.encode(query, [document])
        assert prompt.ids.tolist() == reference_ids(card, query, document, max_length=max_length)


def test_llama_cpp_vectors(tokenizer_dir, tokenizer):
    """47 strings with the ids that llama.cpp expects of this vocabulary."""
    texts = (tokenizer_dir / "check-qwen2.inp").read_text().split("\n__ggml_vocab_test__\n")
    expected = [[int(number) for number in line.split()] for line in (tokenizer_dir / "check-qwen2.out").open()]
    pairs = [(text, ids) for text, ids in zip(texts, expected, strict=False) if ids]
    assert len(pairs) >= 45
    for text, ids in pairs:
        [piece] = tokenizer.pieces("", [text], 10_000)
        assert piece.ids.tolist() == ids
