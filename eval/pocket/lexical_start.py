"""A Qwen3 model that starts out knowing how to compare words, so that little training is needed.

The weights are random but for this circuit, which training then changes as it likes:

- layer 0: each token copies the token before it, and learns whether it stands in the query or in the document;
- layer 1: each document token looks for the same token, and for the same pair of tokens, in the query;
- layer 2: later tokens collect from the positions that found one;
- the answer: "yes" and "no" read off what was collected.

Token vectors hold the embedder's direction (what a word means), a random one (which word it is) and its rarity.
"""

from __future__ import annotations

import numpy as np
import torch
from embedder import principal, unit
from tokenizers import Tokenizer
from transformers import Qwen3Config, Qwen3ForCausalLM

from qwen_rerank.protocols import Embedder

HIDDEN, HEAD, N_MEANING = 256, 64, 128
MEANING = slice(0, 128)  # the token itself
BEFORE = slice(128, 192)  # the token before
BEFORE_2 = slice(192, 224)  # the one before that
ONE, RARITY, INSTRUCT, QUERY, DOCUMENT = 224, 225, 226, 227, 228
IN_QUERY, IN_DOCUMENT = 229, 230
FOUND_WORD, FOUND_PAIR = 231, 232
EVIDENCE = slice(240, 248)

# Rotary positions turn dimension i and i + 32 together, the faster the smaller i: the first few tell places apart,
# the last ones hardly turn and compare contents.
PLACES = (0, 1, 2, 3)
CONTENTS = [*range(15, 30), *range(47, 62)]
MARKS = (30, 31, 62, 63)
ROPE_THETA = 1_000_000.0


def lexical_model(tokenizer: Tokenizer, embedder: Embedder, rarity: np.ndarray, *, seed: int) -> Qwen3ForCausalLM:
    """Return the model to start from.

    Args:
        tokenizer: The reranker's.
        embedder: Gives the meaning of each token's text.
        rarity: float32 `(n_tokens,)`, higher is rarer.
        seed: Of everything random.
    """
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=HIDDEN,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HEAD,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id("<|im_end|>"),
        pad_token_id=tokenizer.token_to_id("<|endoftext|>"),
    )
    model = Qwen3ForCausalLM(config)
    generator = np.random.default_rng(seed)
    with torch.no_grad():
        vectors = token_vectors(tokenizer, embedder, rarity, generator)
        model.model.embed_tokens.weight.copy_(torch.from_numpy(vectors))
        copies = torch.from_numpy(unit(generator.standard_normal((HEAD, N_MEANING)))).float()
        _look_back(model.model.layers[0].self_attn, copies)
        _find(model.model.layers[1].self_attn, generator)
        for layer in model.model.layers[2:]:
            _collect(layer.self_attn)
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(0.5)
    return model


def centre(model: Qwen3ForCausalLM, prompts: list[list[int]], *, yes: int, no: int, level: float) -> None:
    """Move the mean log-odds over some prompts to `level`.

    The last token is the same in every prompt, so its own meaning is a constant to lean on.
    """
    with torch.no_grad():
        last = torch.stack([model.model(torch.tensor([ids])).last_hidden_state[0, -1] for ids in prompts])
        weight = model.model.embed_tokens.weight
        constant = last[:, MEANING].mean(dim=0)
        excess = (last @ (weight[yes] - weight[no])).mean() - level
        weight[yes, MEANING] -= excess / 2 * constant / constant.square().sum()
        weight[no, MEANING] += excess / 2 * constant / constant.square().sum()


def token_vectors(
    tokenizer: Tokenizer, embedder: Embedder, rarity: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """Return float32 `(n_tokens, HIDDEN)`; tokens that differ in case or a space before them start alike."""
    texts = [tokenizer.decode([i]).strip().lower() for i in range(tokenizer.get_vocab_size())]
    meanings = unit(principal(embedder.embed_documents(texts), N_MEANING))
    distinct = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    names = unit(generator.standard_normal((len(distinct), N_MEANING)).astype(np.float32))
    own = np.array([names[distinct[text]] for text in texts])
    # A piece of a character has no meaning and no text of its own.
    pieces = np.array(["\ufffd" in text or not text for text in texts])
    own[pieces] = unit(generator.standard_normal((int(pieces.sum()), N_MEANING)).astype(np.float32))
    out = np.zeros((len(texts), HIDDEN), dtype=np.float32)
    out[:, MEANING] = unit(np.where(pieces[:, None], 0.0, 0.7 * meanings) + 0.7 * own) * 8.0
    out[:, ONE] = 1.0
    out[:, RARITY] = (rarity - rarity.mean()) / rarity.std()
    for text, flag in (("<Instruct", INSTRUCT), ("<Query", QUERY), ("<Document", DOCUMENT)):
        out[single(tokenizer, text), flag] = 8.0
    for text, sign in (("yes", 1.0), ("no", -1.0)):
        out[single(tokenizer, text), EVIDENCE] = sign
    return out


def single(tokenizer: Tokenizer, text: str) -> int:
    """Return the id of a text that must be one token."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    if len(ids) != 1:
        raise SystemExit(f"{text!r} is {len(ids)} tokens in the new vocabulary; it must be one.")
    return ids[0]


def _rows(head: int) -> int:
    return head * HEAD


def _look_back(attention: torch.nn.Module, copies: torch.Tensor) -> None:
    """Heads 0 and 1 read the token one and two places back; head 2 reads the last label before the token."""
    query, key, value, output = (getattr(attention, f"{name}_proj").weight for name in "qkvo")
    for weight in (query, key):
        weight[: _rows(1)] = 0.0
    query[: _rows(3)] = 0.0
    key[: _rows(2)] = 0.0
    for back, head in ((1, 0), (2, 1)):
        for i in PLACES:
            angle = back * ROPE_THETA ** (-i / (HEAD // 2))
            # A query turned back by `angle` meets the key that stands `back` places before it.
            query[_rows(head) + i, ONE] = float(np.cos(angle))
            query[_rows(head) + i + HEAD // 2, ONE] = -float(np.sin(angle))
    for i in PLACES:
        key[i, ONE] = 1.0
    value[:HEAD] = 0.0
    value[:HEAD, MEANING] = copies
    output[BEFORE, : _rows(1)] = torch.eye(HEAD)
    output[BEFORE_2, _rows(1) : _rows(2)] = torch.eye(HEAD)[:32]
    plain, *labels = (_rows(1) + mark for mark in MARKS)
    key[plain, ONE] = 1.0
    for mark, flag, weight in zip(labels, (DOCUMENT, QUERY, INSTRUCT), (0.8, 0.5, 0.33), strict=True):
        key[mark, flag] = 4.0
        query[_rows(2) + mark - _rows(1), ONE] = weight
    value[HEAD : HEAD + 2] = 0.0
    value[HEAD, QUERY] = value[HEAD + 1, DOCUMENT] = 0.5
    output[:, _rows(2) : _rows(2) + 2] = 0.0
    output[IN_QUERY, _rows(2)] = output[IN_DOCUMENT, _rows(2) + 1] = 1.0
    _sharpen(attention, places=1.9, contents=1.0, marks=1.8)


def _find(attention: torch.nn.Module, generator: np.random.Generator) -> None:
    """Heads 0 and 1 look for the same token in the query, 2 and 3 for the same pair of tokens."""
    query, key, value, output = (getattr(attention, f"{name}_proj").weight for name in "qkvo")
    query.mul_(0.1)
    key.mul_(0.1)
    for group, sources in ((0, (MEANING,)), (1, (MEANING, BEFORE))):
        key_rows = [group * HEAD + i for i in CONTENTS]
        for source in sources:
            shape = (len(CONTENTS), source.stop - source.start)
            project = torch.from_numpy(generator.standard_normal(shape) / shape[1] ** 0.5).float() / len(sources) ** 0.5
            key[key_rows, source] = project
            for head in (2 * group, 2 * group + 1):
                query[[_rows(head) + i for i in CONTENTS], source] = project
        key[group * HEAD + MARKS[0], IN_QUERY] = 1.0
        key[group * HEAD + MARKS[1], IN_DOCUMENT] = 1.0
        for head in (2 * group, 2 * group + 1):
            query[_rows(head) + MARKS[0], ONE] = 3.0
        value[group * HEAD] = 0.0
        value[group * HEAD, IN_QUERY] = 1.0
        output[:, _rows(2 * group)] = 0.0
        output[(FOUND_WORD, FOUND_PAIR)[group], _rows(2 * group)] = 1.0
    _sharpen(attention, places=1.0, contents=1.5, marks=1.5)


def _collect(attention: torch.nn.Module) -> None:
    """Every head prefers positions that found something, and adds what they found to the evidence."""
    query, key, value, output = (getattr(attention, f"{name}_proj").weight for name in "qkvo")
    for group, flag in ((0, FOUND_WORD), (1, FOUND_PAIR)):
        key[group * HEAD + MARKS[0], ONE] = 1.0
        key[group * HEAD + MARKS[1], flag] = 1.5
        value[group * HEAD, flag] = 0.5
        for head in (2 * group, 2 * group + 1):
            query[_rows(head) + MARKS[1], ONE] = 1.0
            output[EVIDENCE, _rows(head)] = 0.3


def _sharpen(attention: torch.nn.Module, *, places: float, contents: float, marks: float) -> None:
    """Set the scale of each dimension after the norm of queries and keys: how sharply it decides."""
    for norm in (attention.q_norm.weight, attention.k_norm.weight):
        norm[list(PLACES)] = norm[[i + HEAD // 2 for i in PLACES]] = places
        norm[CONTENTS] = contents
        norm[list(MARKS)] = marks
