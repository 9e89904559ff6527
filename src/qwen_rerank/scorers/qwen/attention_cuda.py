"""Block-wise causal attention on CUDA: one variable-length call a layer, over keys gathered from prefix and segment."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from qwen_rerank.scorers.qwen.layout import Layout, Part, Span

logger = logging.getLogger(__name__)

Keys = tuple[torch.Tensor, torch.Tensor]  # keys and values, each (n_rows, n_kv_heads, head_dim)

_GATHERED_KEYS = 1 << 17  # of one call: 512 MiB for the 8B model in bfloat16
_MASK_ELEMENTS = 1 << 24  # of the padded fallback, for one call


@dataclass(frozen=True, slots=True)
class Ragged:
    """Segments of different lengths, one after the other; queries and keys of a segment end at the same token.

    Attributes:
        key_rows: int64 `(n_keys,)`, the keys of every segment in turn, as rows of earlier passes followed by the pack.
        query_ends: int32 `(n_segments + 1,)`, where the queries of each segment begin; the last is their number.
        key_ends: int32 `(n_segments + 1,)`, the same for the keys.
        query_lengths: Of each segment.
        key_lengths: Of each segment.
    """

    key_rows: torch.Tensor
    query_ends: torch.Tensor
    key_ends: torch.Tensor
    query_lengths: list[int]
    key_lengths: list[int]

    @property
    def longest(self) -> tuple[int, int]:
        """The most queries and the most keys of a segment."""
        return max(self.query_lengths, default=0), max(self.key_lengths, default=0)


CudaPlan = tuple[list[Ragged], list[Ragged]]  # segments of all rows; of the documents' last rows

Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Ragged], torch.Tensor]


class CudaAttention:
    """Attention over packed rows.

    The keys are gathered because PyTorch's paged arguments, which could share a prefix in place, are not in every
    version; the copy is small beside the matrix products.

    Args:
        kernel: Causal attention over ragged segments, `(n_queries, n_heads, head_dim)`.
        device: Where the rows are.
    """

    def __init__(self, kernel: Kernel, device: torch.device) -> None:
        self._kernel = kernel
        self._device = device

    def prepare(self, layout: Layout) -> CudaPlan:
        """Return the segments of all rows, and of the documents' last rows, some at a time."""
        parts = sorted(layout.parts, key=lambda part: part.own.start)  # queries must lie in the order of the rows
        n_kept = layout.n_kept
        everything = [self.segments(some, [len(part.own) for part in some], n_kept=n_kept) for some in _portions(parts)]
        last = [self.segments(some, [1] * len(some), n_kept=n_kept) for some in _portions(layout.documents)]
        return everything, last

    def all_rows(self, query: torch.Tensor, keys: Keys, kept: Keys | None, plan: CudaPlan) -> torch.Tensor:
        """Attend from every row: `(n_rows, n_heads, head_dim)`."""
        return self._attend(query, keys, kept, plan[0])

    def last_rows(self, query: torch.Tensor, keys: Keys, kept: Keys | None, plan: CudaPlan) -> torch.Tensor:
        """Attend from each document's last row: `(n_documents, n_heads, head_dim)`."""
        return self._attend(query, keys, kept, plan[1])

    def _attend(self, query: torch.Tensor, keys: Keys, kept: Keys | None, portions: list[Ragged]) -> torch.Tensor:
        key, value = keys if kept is None else (torch.cat((kept[0], keys[0])), torch.cat((kept[1], keys[1])))
        mixed: list[torch.Tensor] = []
        start = 0
        for segments in portions:
            rows = query[start : (start := start + sum(segments.query_lengths))]
            mixed.append(self._kernel(rows, key[segments.key_rows], value[segments.key_rows], segments))
        return mixed[0] if len(mixed) == 1 else torch.cat([query[:0], *mixed])

    def segments(self, parts: Sequence[Part], query_lengths: list[int], *, n_kept: int = 0) -> Ragged:
        """Return segments whose last `query_lengths` rows are queries, behind `n_kept` rows of earlier passes."""

        def rows(span: Span) -> np.ndarray:
            offset = 0 if span.kept else n_kept
            return np.arange(offset + span.start, offset + span.stop)

        gathered = [rows(span) for part in parts for span in (*part.seen, part.own) if len(span)]
        key_lengths = [part.n_keys for part in parts]
        key_rows = np.concatenate(gathered) if gathered else np.zeros(0, dtype=np.int64)
        return Ragged(
            key_rows=torch.from_numpy(key_rows).to(self._device, non_blocking=True),
            query_ends=self._ends(query_lengths),
            key_ends=self._ends(key_lengths),
            query_lengths=query_lengths,
            key_lengths=key_lengths,
        )

    def _ends(self, lengths: list[int]) -> torch.Tensor:
        ends = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
        return torch.from_numpy(ends).to(self._device, non_blocking=True)


def _portions(parts: Sequence[Part]) -> Iterator[Sequence[Part]]:
    """Yield the parts in turn, as many at a time as the gathered keys may be: many short documents behind one long
    query would otherwise copy its prefix without bound.
    """
    start = keys = 0
    for stop, part in enumerate(parts):
        if keys and keys + part.n_keys > _GATHERED_KEYS:
            yield parts[start:stop]
            start, keys = stop, 0
        keys += part.n_keys
    if start < len(parts):
        yield parts[start:]


def choose_kernel(*, n_heads: int, n_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> Kernel:
    """Return the first kernel that is installed, runs on this device, and agrees with the padded one."""
    rows = _trial(n_heads, n_kv_heads, head_dim, dtype, device)
    expected = padded(*rows)
    allowed = 1e-4 if dtype == torch.float32 else 0.03
    for name, kernel in candidates():
        try:
            if torch.allclose(kernel(*rows), expected, rtol=allowed, atol=allowed):
                logger.info("Attention on %s runs on %s.", device, name)
                return kernel
            logger.warning("%s gives other results than padded attention on %s and is not used.", name, device)
        except Exception as exc:  # what a missing kernel raises differs from version to version
            logger.debug("%s cannot be used on %s: %s", name, device, exc)
    logger.warning("No flash attention for %s on %s; padded attention is slower.", dtype, device)
    return padded


def candidates() -> Iterator[tuple[str, Kernel]]:
    """Yield name and kernel of what is installed, best first."""
    try:
        from flash_attn import flash_attn_varlen_func

        yield "flash-attn", _flash(flash_attn_varlen_func)
    except ImportError:
        logger.debug("flash-attn is not installed.")
    try:
        from torch.nn.attention.varlen import varlen_attn

        yield "varlen_attn", _varlen(varlen_attn, repeat=False)
        yield "varlen_attn with repeated heads", _varlen(varlen_attn, repeat=True)
    except ImportError:
        logger.debug("This PyTorch has no varlen_attn.")


def _flash(function: Callable[..., Any]) -> Kernel:
    def kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Ragged) -> torch.Tensor:
        ends = (segments.query_ends, segments.key_ends)
        mixed: torch.Tensor = function(query, key, value, *ends, *segments.longest, dropout_p=0.0, causal=True)
        return mixed

    return kernel


def _varlen(function: Callable[..., Any], *, repeat: bool) -> Kernel:
    """Wrap PyTorch's kernel, whose keywords differ between 2.10, 2.11 and 2.12."""
    known = inspect.signature(function).parameters
    causal = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    grouped = {"enable_gqa": True} if "enable_gqa" in known else {}

    def kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Ragged) -> torch.Tensor:
        if repeat:
            times = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(times, dim=1), value.repeat_interleave(times, dim=1)
        ends = (segments.query_ends, segments.key_ends)
        mixed: torch.Tensor = function(
            query, key, value, *ends, *segments.longest, **causal, **({} if repeat else grouped)
        )
        return mixed

    return kernel


def padded(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Ragged) -> torch.Tensor:
    """Attend with dense attention over padded batches of segments of similar length; works on every device."""
    out = torch.empty_like(query)
    lengths = list(zip(segments.query_lengths, segments.key_lengths, strict=True))
    query_starts, key_starts = segments.query_ends.tolist(), segments.key_ends.tolist()
    for batch in _batches(lengths):
        n_query, n_key = max(lengths[i][0] for i in batch), max(lengths[i][1] for i in batch)
        # Padded at the left, so that queries and keys end together as in a dense causal mask.
        query_at = _left_padded([(query_starts[i], lengths[i][0]) for i in batch], n_query, query.device)
        key_at = _left_padded([(key_starts[i], lengths[i][1]) for i in batch], n_key, query.device)
        causal = torch.ones(n_query, n_key, dtype=torch.bool, device=query.device).tril_(n_key - n_query)
        seen = causal & (key_at >= 0)[:, None, :]  # (batch, n_query, n_key)
        seen |= (query_at < 0)[:, :, None]  # a padding row sees anything, or it would be NaN
        mixed = scaled_dot_product_attention(
            query[query_at.clamp(min=0)].transpose(1, 2),
            key[key_at.clamp(min=0)].transpose(1, 2),
            value[key_at.clamp(min=0)].transpose(1, 2),
            attn_mask=seen[:, None],
            enable_gqa=True,
        ).transpose(1, 2)
        real = query_at >= 0
        out[query_at[real]] = mixed[real]
    return out


def _batches(lengths: list[tuple[int, int]]) -> Iterator[list[int]]:
    """Yield indices of segments, longest first, whose masks together stay within bounds."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) + 1) * lengths[batch[0]][0] * max(lengths[j][1] for j in (*batch, i)) > _MASK_ELEMENTS:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _left_padded(spans: list[tuple[int, int]], width: int, device: torch.device) -> torch.Tensor:
    """Return row numbers `(len(spans), width)`, -1 where a row is padding."""
    starts, lengths = (torch.tensor(column, device=device)[:, None] for column in zip(*spans, strict=True))
    place = torch.arange(width, device=device)[None] - (width - lengths)
    return torch.where(place >= 0, starts + place, -1)


def _trial(
    n_heads: int, n_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Ragged]:
    """Return a small input with everything that can go wrong: fewer queries than keys, one query, no prefix."""
    generator = torch.Generator(device=device).manual_seed(0)

    def draw(rows: int, heads: int) -> torch.Tensor:
        return torch.randn(rows, heads, head_dim, generator=generator, device=device, dtype=dtype)

    prefix = Span(0, 37)
    parts = [
        Part(prefix),
        Part(Span(37, 150), (prefix,)),
        Part(Span(150, 151), (prefix,)),
        Part(Span(151, 160)),
    ]
    segments = CudaAttention(padded, device).segments(parts, [len(part.own) for part in parts])
    key_rows = segments.key_rows
    return draw(160, n_heads), draw(160, n_kv_heads)[key_rows], draw(160, n_kv_heads)[key_rows], segments
