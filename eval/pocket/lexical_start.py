"""A Qwen3 model that starts out knowing how to compare words, so that little training is needed.

The weights are small and random but for this circuit, which training then changes as it likes:

- layer 0: each token copies the two tokens before it, and learns whether it stands in the query or in the document;
- layer 1: each document token looks in the query for the same token, for the same pair of tokens and for a token of
  like meaning, and in the document for an earlier place of the same; where nothing is close enough, it looks at the
  first token, which says nothing;
- layer 2: the last token collects from the positions that found something for the first time, the rarer the more;
- the answer: "yes" and "no" read off what was collected.

Token vectors hold the embedder's direction (what a word means), a random one (which word it is) and its rarity.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import torch
from embedder import principal, unit
from tokenizers import Tokenizer
from transformers import Qwen3Config, Qwen3ForCausalLM

from qwen_rerank.prompt import PREFIX, SUFFIX
from qwen_rerank.protocols import Embedder
from qwen_rerank.tokenizer import CONTROL

HIDDEN, HEAD, N_HEADS, N_KV_HEADS, N_MEANING = 256, 64, 6, 3, 128
MEANING = slice(0, 128)  # the token itself
LIKE = slice(0, 30)  # the leading components of what it means
BEFORE = slice(128, 192)  # the token before
BEFORE_2 = slice(192, 224)  # the one before that
ONE, RARITY, INSTRUCT, QUERY, DOCUMENT, START = range(224, 230)
IN_QUERY, IN_DOCUMENT = 230, 231
FOUND, SEEN = (232, 233, 234), (235, 236, 237)  # words, pairs, like meanings
EVIDENCE = slice(240, 248)

# Rotary positions turn dimension i and i + 32 together, the faster the smaller i: the first few tell places apart,
# the last ones hardly turn and compare contents.
PLACES = (0, 1, 2, 3)
NEAR = range(6)
CONTENTS = [*range(15, 30), *range(47, 62)]
MARKS = (30, 31, 62, 63)
ROPE_THETA = 1_000_000.0


@dataclass(frozen=True)
class Circuit:
    """How sharply the circuit decides; chosen by what the untrained model then ranks well.

    Attributes:
        same: Closeness from which a word, a pair or a meaning counts as the same, 0 to 1.
        again: Closeness from which an earlier place in the document counts.
        sharp: Scale of the decision.
        evidence: Weight of what words, pairs and meanings found.
    """

    same: tuple[float, float, float] = (0.62, 0.6, 0.6)
    again: float = 0.72
    sharp: float = 2.0
    evidence: tuple[float, float, float] = (1.2, 0.6, 0.5)


def lexical_model(
    tokenizer: Tokenizer, embedder: Embedder, rarity: np.ndarray, *, seed: int, circuit: Circuit | None = None
) -> Qwen3ForCausalLM:
    """Return the model to start from.

    Args:
        tokenizer: The reranker's.
        embedder: Gives the meaning of each token's text.
        rarity: float32 `(n_tokens,)`, higher is rarer.
        seed: Of everything random.
        circuit: How sharply it decides; None means the defaults.
    """
    circuit = circuit or Circuit()
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=HIDDEN,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=N_HEADS,
        num_key_value_heads=N_KV_HEADS,
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
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(0.1)
            layer.self_attn.o_proj.weight.mul_(0.1)
            layer.self_attn.v_proj.weight.mul_(0.5)
        copies = torch.from_numpy(unit(generator.standard_normal((HEAD, N_MEANING)))).float()
        first, second, last = (layer.self_attn for layer in model.model.layers)
        _look_back(first, copies)
        _find(second, generator, circuit)
        _collect(last, circuit)
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
    texts = [bare(tokenizer.decode([i])) for i in range(tokenizer.get_vocab_size())]
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
    for name in CONTROL.findall(PREFIX + SUFFIX):
        out[single(tokenizer, name), RARITY] = 0.0
    for text in (">:", "<Instruct", "<Query", "<Document", "\n", "\n\n"):
        out[single(tokenizer, text), RARITY] = -3.3  # a match of the prompt's own words is none
    out[single(tokenizer, "<|im_start|>"), START] = 8.0
    for text, flag in (("<Instruct", INSTRUCT), ("<Query", QUERY), ("<Document", DOCUMENT)):
        out[single(tokenizer, text), flag] = 8.0
    for text, sign in (("yes", 1.0), ("no", -1.0)):
        out[single(tokenizer, text), EVIDENCE] = sign
    return out


def bare(text: str) -> str:
    """Return a token's text in lower case and without what stands around its letters and digits."""
    return re.sub(r"^[\W_]+(?=\w)|(?<=[^\W_])[\W_]+$", "", text.lower()).strip()


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


def _find(attention: torch.nn.Module, generator: np.random.Generator, circuit: Circuit) -> None:
    """Heads 0, 2, 4 look in the query for the same word, pair and meaning; 1, 3, 5 earlier in the document."""
    query, key, value, output = (getattr(attention, f"{name}_proj").weight for name in "qkvo")
    for weight in (query, key):
        weight.mul_(0.05)
    for group, sources in enumerate(((MEANING,), (MEANING, BEFORE), (LIKE,))):
        keys = _rows(group)
        rows = torch.tensor(CONTENTS)
        for source, some in zip(sources, rows.chunk(len(sources)), strict=True):
            # What was copied from the token before is the longer vector.
            project = _projection(source, len(some), generator) * (0.5 if source is BEFORE else 1.0)
            key[keys + some, source] = project
            for head in (2 * group, 2 * group + 1):
                query[_rows(head) + some, source] = project
        side, start = MARKS[0], MARKS[1]
        key[keys + side] = key[keys + start] = 0.0
        key[keys + side, IN_QUERY], key[keys + side, IN_DOCUMENT] = 0.44, -0.44
        key[keys + start, START] = 8.0
        for head, sign, share in ((2 * group, 1.0, circuit.same[group]), (2 * group + 1, -1.0, circuit.again)):
            query[_rows(head) + side] = query[_rows(head) + start] = 0.0
            query[_rows(head) + side, ONE] = 2.2 * sign
            query[_rows(head) + start, ONE] = 4.5 * share
        for i in NEAR:
            # The token itself is no earlier place.
            key[keys + i], query[_rows(2 * group) + i], query[_rows(2 * group + 1) + i] = 0.0, 0.0, 0.0
            key[keys + i, ONE], query[_rows(2 * group + 1) + i, ONE] = 0.8, -2.0
        value[keys : keys + 2] = 0.0
        value[keys, IN_QUERY], value[keys, RARITY], value[keys + 1, IN_DOCUMENT] = 0.2, 0.3, 0.2
        for head, row, flag in ((2 * group, keys, FOUND[group]), (2 * group + 1, keys + 1, SEEN[group])):
            output[:, _rows(head) : _rows(head) + 2] = 0.0
            output[flag, _rows(head) + row - keys] = 1.0
    for norm in (attention.q_norm.weight, attention.k_norm.weight):
        norm[:] = circuit.sharp


def _projection(source: slice, n: int, generator: np.random.Generator) -> torch.Tensor:
    """Return `(n, width of source)`; of no more than `n` dimensions each is taken as it is."""
    width = source.stop - source.start
    if width == n:
        return torch.eye(n)
    return torch.from_numpy(generator.standard_normal((n, width)) / width**0.5).float()


def _collect(attention: torch.nn.Module, circuit: Circuit) -> None:
    """Every head prefers positions that found something for the first time, and adds what they found to the evidence."""
    query, key, value, output = (getattr(attention, f"{name}_proj").weight for name in "qkvo")
    for weight in (query, key):
        weight.mul_(0.05)
    for group, weight in enumerate(circuit.evidence):
        keys = _rows(group)
        steady, found, start = (keys + mark for mark in MARKS[:3])
        key[[steady, found, start]] = 0.0
        key[steady, ONE] = 1.0
        key[found, FOUND[group]], key[found, SEEN[group]], key[found, IN_QUERY] = 1.5, -1.3, -0.5
        key[start, START] = 8.0
        value[keys] = 0.0
        value[keys, FOUND[group]], value[keys, SEEN[group]] = 1.0, -0.8
        for head in (2 * group, 2 * group + 1):
            query[[_rows(head) + mark for mark in MARKS[:3]]] = 0.0
            query[_rows(head) + MARKS[1], ONE] = 2.0
            query[_rows(head) + MARKS[2], ONE] = 2.2
            output[:, _rows(head)] = 0.0
            output[EVIDENCE, _rows(head)] = weight / 2
    for norm in (attention.q_norm.weight, attention.k_norm.weight):
        norm[:] = 0.8


def _sharpen(attention: torch.nn.Module, *, places: float, contents: float, marks: float) -> None:
    """Set the scale of each dimension after the norm of queries and keys: how sharply it decides."""
    for norm in (attention.q_norm.weight, attention.k_norm.weight):
        norm[list(PLACES)] = norm[[i + HEAD // 2 for i in PLACES]] = places
        norm[CONTENTS] = contents
        norm[list(MARKS)] = marks
