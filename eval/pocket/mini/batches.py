"""Token ids of many texts in one array, and padded batches of pairs out of them, made where the model runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from model import END, PAD, PASSAGE_PREFIX, QUERY_PREFIX
from tokenizers import Tokenizer

LONGEST_QUERY = 64  # tokens, with prefix and end


class Texts:
    """Texts as tokens, each with its start, prefix and end, one behind the other."""

    def __init__(self, rows: Sequence[Sequence[int]], device: str) -> None:
        self.lengths = np.array([len(row) for row in rows], np.int64)
        starts = np.concatenate([[0], np.cumsum(self.lengths)[:-1]])
        self.ids = torch.tensor(np.concatenate([np.asarray(row, np.int32) for row in rows]), device=device)
        self.starts = torch.tensor(starts, device=device)
        self.sizes = torch.tensor(self.lengths, device=device)

    def __len__(self) -> int:
        return len(self.lengths)


def tokenized(folder: Path, texts: Sequence[str], *, query: bool, longest: int, device: str) -> Texts:
    """Return texts as the tokenizer's template writes a query, or a passage, cut to `longest` tokens."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    pair = tokenizer.encode("", "")
    first = pair.type_ids.count(0)
    prefix = pair.ids[:QUERY_PREFIX] if query else pair.ids[first : first + PASSAGE_PREFIX]
    room = longest - len(prefix) - 1
    rows: list[list[int]] = []
    for at in range(0, len(texts), 20_000):
        part = tokenizer.encode_batch_fast(list(texts[at : at + 20_000]), add_special_tokens=False)
        rows += [[*prefix, *encoded.ids[:room], END] for encoded in part]
    return Texts(rows, device)


def batch(
    first: Texts, second: Texts | None, a: np.ndarray, b: np.ndarray, longest: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask of pairs (or of single texts), padded to the longest of them and cut to `longest` tokens."""
    device = first.ids.device
    a_ = torch.as_tensor(a, device=device)
    sizes = first.sizes[a_]
    total = first.lengths[a]
    if second is not None:
        b_ = torch.as_tensor(b, device=device)
        total = total + second.lengths[b]
    width = int(-(-min(int(total.max()), longest) // 8) * 8)
    place = torch.arange(width, device=device)[None]
    at = (first.starts[a_][:, None] + place).clamp(max=len(first.ids) - 1)
    ids = first.ids[at]
    end = sizes
    if second is not None:
        at = (second.starts[b_][:, None] + place - sizes[:, None]).clamp(0, len(second.ids) - 1)
        ids = torch.where(place < sizes[:, None], ids, second.ids[at])
        end = sizes + second.sizes[b_]
    end = end.clamp(max=longest)[:, None]
    ids = torch.where(place < end, ids, torch.full_like(ids, PAD))
    ids = torch.where(place == end - 1, torch.full_like(ids, END), ids)
    return ids.long(), (place < end).long()


def by_length(lengths: np.ndarray, tokens: int) -> Iterator[np.ndarray]:
    """Yield groups of places of like length, each at most about `tokens` tokens when padded."""
    order = np.argsort(-lengths, kind="stable")
    at = 0
    while at < len(order):
        n = max(1, tokens // int(-(-lengths[order[at]] // 8) * 8))
        yield order[at : at + n]
        at += n
