"""Candidate lists for every training query, with what each teacher says of them.

For a query: the passages known to answer it, the best of BM25 and of e5's cosine over the language's whole pool, and a few
drawn at random. Teachers: BM25 (over the package's own terms), e5's MaxSim and cosine, and in English the cosine of
all-MiniLM-L6-v2. Passages of the document that a query was made from are left out, but for the one that answers it.
"""

from __future__ import annotations

import json
import lzma
import math
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from batches import LONGEST_QUERY, Texts, batch, by_length, tokenized
from model import END, PASSAGE_PREFIX, QUERY_PREFIX, Mini

from qwen_rerank.lexical import terms

TEACHERS = ("bm25", "maxsim", "cosine", "minilm")
K1, B = 0.9, 0.4


@dataclass
class Lists:
    """`candidates` (queries, width) places of passages, -1 where there is none; `teachers` (queries, width, 4)."""

    queries: Texts
    passages: Texts
    candidates: np.ndarray
    teachers: np.ndarray
    positives: np.ndarray  # column of the passage that answers, -1 where unknown
    kinds: list[str]


def read(folder: Path, name: str, language: str) -> list[dict]:
    """Return the rows of one file of `texts.py`."""
    with lzma.open(folder / f"{name}.{language}.jsonl.xz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _terms(texts: Sequence[str]) -> list[list[str]]:
    return [terms(text) for text in texts]


def all_terms(texts: Sequence[str], workers: int) -> list[list[str]]:
    """Return the terms of texts, by several processes."""
    if workers < 2:
        return _terms(texts)
    size = -(-len(texts) // (4 * workers))
    with ProcessPoolExecutor(workers) as pool:
        return [t for part in pool.map(_terms, [texts[i : i + size] for i in range(0, len(texts), size)]) for t in part]


class Lexical:
    """BM25 as one sparse product."""

    def __init__(self, passages: Sequence[str], *, device: str, workers: int) -> None:
        found = [Counter(t) for t in all_terms(passages, workers)]
        frequency = Counter(term for counts in found for term in counts)
        self.place = {term: i for i, term in enumerate(t for t, n in frequency.items() if n > 1)}
        n, lengths = len(found), np.array([sum(c.values()) for c in found], float)
        norm = K1 * (1 - B + B * lengths / max(1.0, lengths.mean()))
        idf = {t: math.log(1 + (n - frequency[t] + 0.5) / (frequency[t] + 0.5)) for t in self.place}
        rows = [
            [(self.place[t], idf[t] * f / (f + norm[i])) for t, f in c.items() if t in self.place]
            for i, c in enumerate(found)
        ]
        counts = np.array([len(row) for row in rows])
        columns = np.array([c for row in rows for c, _ in row], np.int64)
        values = np.array([v for row in rows for _, v in row], np.float32)
        crow = torch.tensor(np.concatenate([[0], np.cumsum(counts)]))
        self.matrix = torch.sparse_csr_tensor(
            crow, torch.tensor(columns), torch.tensor(values), (n, len(self.place))
        ).to(device)
        self.device = device

    def scores(self, queries: Sequence[Sequence[str]]) -> torch.Tensor:
        """Return BM25 of every passage for some queries, `(passages, queries)`."""
        wanted = torch.zeros(len(self.place), len(queries))
        for j, query in enumerate(queries):
            for term in query:
                if term in self.place:
                    wanted[self.place[term], j] += 1
        return self.matrix @ wanted.to(self.device)


@torch.inference_mode()
def encoded(
    model: Mini, texts: Texts, prefix: int, *, longest: int, tokens: int
) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Return vectors of texts (mean of states), the unit states of their words one behind the other, and where each begins."""
    device = str(texts.ids.device)
    vectors = torch.zeros(len(texts), model.words.weight.shape[1], device=device)
    sizes = np.minimum(texts.lengths, longest) - prefix - 1
    begins = np.concatenate([[0], np.cumsum(sizes)])
    states = torch.zeros(int(begins[-1]), vectors.shape[1], dtype=torch.float16, device=device)
    for part in by_length(np.minimum(texts.lengths, longest), tokens):
        ids, mask = batch(texts, None, part, part, longest)
        with torch.autocast(device.split(":")[0], torch.bfloat16):
            found, _ = model.states(ids, mask)
        found = found.float()
        vectors[part] = F.normalize((found * mask[..., None]).sum(1), dim=-1)
        word = (mask * (ids != END)).bool()
        word[:, :prefix] = False
        at = (
            torch.as_tensor(begins[part], device=device)[:, None]
            + torch.arange(ids.shape[1], device=device)[None]
            - prefix
        )
        states[at[word]] = F.normalize(found, dim=-1)[word].half()
    return vectors, states, begins


@torch.inference_mode()
def maxsim(q_states, q_begins, d_states, d_begins, a: np.ndarray, b: np.ndarray, *, pairs: int = 4096) -> np.ndarray:
    """Return the mean over a query's words of the nearest word of the passage, for pairs."""
    device = d_states.device
    q_sizes, d_sizes = np.diff(q_begins), np.diff(d_begins)
    out = np.zeros(len(a), np.float32)
    order = np.argsort(d_sizes[b], kind="stable")
    for at in range(0, len(order), pairs):
        part = order[at : at + pairs]
        qa, db = a[part], b[part]
        wide_q, wide_d = max(1, int(q_sizes[qa].max())), max(1, int(d_sizes[db].max()))

        def gather(states, begins, rows, sizes, wide):
            place = torch.arange(wide, device=device)[None]
            real = place < torch.as_tensor(sizes[rows], device=device)[:, None]
            index = (torch.as_tensor(begins[rows], device=device)[:, None] + place).clamp(max=max(0, len(states) - 1))
            return states[index], real

        q, q_real = gather(q_states, q_begins, qa, q_sizes, wide_q)
        d, d_real = gather(d_states, d_begins, db, d_sizes, wide_d)
        if device.type == "cpu":
            q, d = q.float(), d.float()
        near = (q @ d.transpose(1, 2)).float().masked_fill(~d_real[:, None], -1.0).amax(2).clamp(min=0)
        out[part] = ((near * q_real).sum(1) / q_real.sum(1).clamp(min=1)).cpu().numpy()
    return out


class MiniLM:
    """all-MiniLM-L6-v2 (Apache-2.0), the teacher for English, from weights in eight bits a row."""

    def __init__(self, folder: Path, device: str) -> None:
        from tokenizers import Tokenizer
        from transformers import BertConfig, BertModel

        stored = np.load(folder / "minilm.npz")
        config = BertConfig(
            vocab_size=30522, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
        )
        self.model = BertModel(config, add_pooling_layer=False)
        state = {
            name: torch.from_numpy(
                stored[name].astype(np.float32) * (stored[f"{name}.scale"][:, None] if f"{name}.scale" in stored else 1)
            )
            for name in stored
            if not name.endswith(".scale")
        }
        self.model.load_state_dict(state)
        self.model.to(device).eval()
        self.tokenizer = Tokenizer.from_file(str(folder / "minilm-tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(256)
        self.device = device

    @torch.inference_mode()
    def vectors(self, texts: Sequence[str], tokens: int) -> torch.Tensor:
        """Return unit vectors of texts."""
        rows = Texts([e.ids for e in self.tokenizer.encode_batch_fast(list(texts))], self.device)
        out = torch.zeros(len(texts), 384, device=self.device)
        for part in by_length(rows.lengths, tokens):
            ids, mask = batch(rows, None, part, part, 256)
            ids = torch.where(mask > 0, torch.where(ids == END, 102, ids), 0)  # `batch` writes e5's end
            with torch.autocast(self.device.split(":")[0], torch.bfloat16):
                states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
            out[part] = F.normalize((states * mask[..., None]).sum(1), dim=-1)
        return out


def mined(model: Mini, minilm: MiniLM | None, folder: Path, texts: Path, language: str, options) -> Lists:
    """Return the lists of one language."""
    device, tokens, generator = options.device, options.tokens, np.random.default_rng(options.seed)
    rows, asked = read(texts, "passages", language), read(texts, "queries", language)
    bodies, questions = [r["text"] for r in rows], [r["query"] for r in asked]
    documents: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        documents.setdefault(row["document"], []).append(i)
    queries = tokenized(folder, questions, query=True, longest=LONGEST_QUERY, device=device)
    passages = tokenized(folder, bodies, query=False, longest=options.longest, device=device)
    q_vectors, q_states, q_begins = encoded(model, queries, QUERY_PREFIX, longest=LONGEST_QUERY, tokens=4 * tokens)
    d_vectors, d_states, d_begins = encoded(model, passages, PASSAGE_PREFIX, longest=options.longest, tokens=4 * tokens)
    lexical = Lexical(bodies, device=device, workers=options.workers)
    words = all_terms(questions, options.workers)
    english = minilm.vectors(bodies, 4 * tokens) if minilm and language == "en" else None
    english_q = minilm.vectors(questions, 4 * tokens) if english is not None else None
    hard, chance, step = options.hard, options.chance, 256
    width = 1 + 2 * hard + chance
    candidates = np.full((len(asked), width), -1, np.int64)
    teachers = np.zeros((len(asked), width, len(TEACHERS)), np.float32)
    positives = np.full(len(asked), -1, np.int64)
    for at in range(0, len(asked), step):
        block = slice(at, min(at + step, len(asked)))
        bm25 = lexical.scores(words[block]).T  # (queries, passages)
        cosine = q_vectors[block] @ d_vectors.T
        found = [x.topk(hard + 12, dim=1).indices.cpu().numpy() for x in (bm25, cosine)]
        for j, row in enumerate(asked[block]):
            own = list(row["positives"])
            barred = set(documents.get(row["document"], ())) if row["kind"] not in ("heading", "teacher") else set()
            barred -= set(own)
            chosen = list(own[:1])
            seen = set(chosen) | barred
            for stage in found:
                fresh = [int(d) for d in stage[j] if int(d) not in seen][:hard]
                chosen += fresh
                seen.update(fresh)
            drawn = [int(d) for d in generator.integers(0, len(rows), chance) if int(d) not in seen]
            chosen += list(dict.fromkeys(drawn))
            candidates[at + j, : len(chosen)] = chosen
            positives[at + j] = 0 if own else -1
        places = torch.as_tensor(candidates[block].clip(0), device=device)
        teachers[block, :, 0] = bm25.gather(1, places).cpu().numpy()
        teachers[block, :, 2] = cosine.gather(1, places).cpu().numpy()
        if english is not None:
            teachers[block, :, 3] = (english_q[block] @ english.T).gather(1, places).cpu().numpy()
    real = candidates >= 0
    a, column = np.nonzero(real)
    teachers[a, column, 1] = maxsim(q_states, q_begins, d_states, d_begins, a, candidates[a, column])
    return Lists(queries, passages, candidates, teachers, positives, [r["kind"] for r in asked])


def blended(teachers: np.ndarray, real: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """Return the weighted sum of teachers, each standardised within its list; far below where there is no candidate."""
    counts = real.sum(1, keepdims=True)
    total = np.zeros(real.shape, np.float32)
    for k, weight in enumerate(weights):
        value = teachers[..., k]
        mean = (value * real).sum(1, keepdims=True) / counts
        spread = np.sqrt((((value - mean) * real) ** 2).sum(1, keepdims=True) / counts)
        total += weight * (value - mean) / (spread + 1e-6)
    return np.where(real, total, -1e4).astype(np.float32)
