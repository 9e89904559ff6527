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

from qwen_rerank.scorers.qwen.kernels import KV
from qwen_rerank.scorers.qwen.packing import Layout, RowSpan, Segment

logger = logging.getLogger(__name__)


_GATHERED_KEYS = 1 << 17  # of one call: 512 MiB for the 8B model in bfloat16
_MASK_ELEMENTS = 1 << 24  # of the padded fallback, for one call


@dataclass(frozen=True, slots=True)
class Ragged:
    """Segments of different lengths, one after the other; queries and keys of a segment end at the same token.

    Attributes:
        key_rows: int64 `(n_keys,)`, the keys of every segment in turn, as rows of earlier passes followed by the batch.
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


CudaPlan = tuple[list[Ragged], list[Ragged]]  # of all rows; of the documents' last rows

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
        """Return the segments of all rows, and of the documents' last rows, as many at a time as one call may take."""
        # Queries must lie in the order of the rows.
        segments = sorted(layout.segments, key=lambda segment: segment.own.start)
        n_past = layout.n_past
        everything = [
            self.ragged(some, [len(segment.own) for segment in some], n_past=n_past) for some in _portions(segments)
        ]
        last = [self.ragged(some, [1] * len(some), n_past=n_past) for some in _portions(layout.documents)]
        return everything, last

    def all_rows(self, query: torch.Tensor, kv: KV, past_kv: KV | None, plan: CudaPlan) -> torch.Tensor:
        """Attend from every row: `(n_rows, n_heads, head_dim)`."""
        return self._attend(query, kv, past_kv, plan[0])

    def last_rows(self, query: torch.Tensor, kv: KV, past_kv: KV | None, plan: CudaPlan) -> torch.Tensor:
        """Attend from each document's last row: `(n_documents, n_heads, head_dim)`."""
        return self._attend(query, kv, past_kv, plan[1])

    def _attend(self, query: torch.Tensor, kv: KV, past_kv: KV | None, portions: list[Ragged]) -> torch.Tensor:
        key, value = kv if past_kv is None else (torch.cat((past_kv[0], kv[0])), torch.cat((past_kv[1], kv[1])))
        attn_out: list[torch.Tensor] = []
        start = 0
        for ragged in portions:
            rows = query[start : (start := start + sum(ragged.query_lengths))]
            attn_out.append(self._kernel(rows, key[ragged.key_rows], value[ragged.key_rows], ragged))
        return attn_out[0] if len(attn_out) == 1 else torch.cat([query[:0], *attn_out])

    def ragged(self, segments: Sequence[Segment], query_lengths: list[int], *, n_past: int = 0) -> Ragged:
        """Return segments whose last `query_lengths` rows are queries, behind `n_past` rows of earlier passes."""

        def rows(span: RowSpan) -> np.ndarray:
            offset = 0 if span.past else n_past
            return np.arange(offset + span.start, offset + span.stop)

        gathered = [rows(span) for segment in segments for span in (*segment.seen, segment.own) if len(span)]
        key_lengths = [segment.n_keys for segment in segments]
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


def _portions(segments: Sequence[Segment]) -> Iterator[Sequence[Segment]]:
    """Yield the segments in turn, as many at a time as the gathered keys may be: many short documents behind one long
    query would otherwise copy its prefix without bound.
    """
    start = keys = 0
    for stop, segment in enumerate(segments):
        if keys and keys + segment.n_keys > _GATHERED_KEYS:
            yield segments[start:stop]
            start, keys = stop, 0
        keys += segment.n_keys
    if start < len(segments):
        yield segments[start:]


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
    def kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ragged: Ragged) -> torch.Tensor:
        ends = (ragged.query_ends, ragged.key_ends)
        attn_out: torch.Tensor = function(query, key, value, *ends, *ragged.longest, dropout_p=0.0, causal=True)
        return attn_out

    return kernel


def _varlen(function: Callable[..., Any], *, repeat: bool) -> Kernel:
    """Wrap PyTorch's kernel, whose keywords differ between 2.10, 2.11 and 2.12."""
    known = inspect.signature(function).parameters
    causal = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    grouped = {"enable_gqa": True} if "enable_gqa" in known else {}

    def kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ragged: Ragged) -> torch.Tensor:
        if repeat:
            times = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(times, dim=1), value.repeat_interleave(times, dim=1)
        ends = (ragged.query_ends, ragged.key_ends)
        attn_out: torch.Tensor = function(
            query, key, value, *ends, *ragged.longest, **causal, **({} if repeat else grouped)
        )
        return attn_out

    return kernel


def padded(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ragged: Ragged) -> torch.Tensor:
    """Attend with dense attention over padded batches of ragged of similar length; works on every device."""
    out = torch.empty_like(query)
    lengths = list(zip(ragged.query_lengths, ragged.key_lengths, strict=True))
    query_starts, key_starts = ragged.query_ends.tolist(), ragged.key_ends.tolist()
    for batch in _batches(lengths):
        n_query, n_key = max(lengths[i][0] for i in batch), max(lengths[i][1] for i in batch)
        # Padded at the left, so that queries and keys end together as in a dense causal mask.
        query_at = _left_padded([(query_starts[i], lengths[i][0]) for i in batch], n_query, query.device)
        key_at = _left_padded([(key_starts[i], lengths[i][1]) for i in batch], n_key, query.device)
        causal = torch.ones(n_query, n_key, dtype=torch.bool, device=query.device).tril_(n_key - n_query)
        seen = causal & (key_at >= 0)[:, None, :]  # (batch, n_query, n_key)
        seen |= (query_at < 0)[:, :, None]  # a padding row sees anything, or it would be NaN
        attn_out = scaled_dot_product_attention(
            query[query_at.clamp(min=0)].transpose(1, 2),
            key[key_at.clamp(min=0)].transpose(1, 2),
            value[key_at.clamp(min=0)].transpose(1, 2),
            attn_mask=seen[:, None],
            enable_gqa=True,
        ).transpose(1, 2)
        real = query_at >= 0
        out[query_at[real]] = attn_out[real]
    return out


def _batches(lengths: list[tuple[int, int]]) -> Iterator[list[int]]:
    """Yield indices of ragged, longest first, whose masks together stay within bounds."""
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

    prefix = RowSpan(0, 37)
    segments = [
        Segment(prefix),
        Segment(RowSpan(37, 150), (prefix,)),
        Segment(RowSpan(150, 151), (prefix,)),
        Segment(RowSpan(151, 160)),
    ]
    ragged = CudaAttention(padded, device).ragged(segments, [len(segment.own) for segment in segments])
    key_rows = ragged.key_rows
    return draw(160, n_heads), draw(160, n_kv_heads)[key_rows], draw(160, n_kv_heads)[key_rows], ragged
