"""The engine: a checkpoint on a device, ready to score batches, with the keys and values that later batches need."""

from __future__ import annotations

import logging
import math
import traceback
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch

from qwen_rerank.checks import check_choice, check_count, check_query, check_text
from qwen_rerank.errors import InvalidInputError
from qwen_rerank.prompt import TEMPLATES
from qwen_rerank.scorers.qwen.attention_cpu import CpuAttention
from qwen_rerank.scorers.qwen.attention_cuda import CudaAttention, choose_kernel
from qwen_rerank.scorers.qwen.config import QwenModelConfig
from qwen_rerank.scorers.qwen.device import (
    Crew,
    as_our_error,
    bfloat16_instructions,
    cap_process,
    choose_device,
    choose_dtype,
    cpu_budget,
    cuda_budget,
    name_of,
    on_device,
)
from qwen_rerank.scorers.qwen.kernels import KV, EagerOps, Ops, cpu_ops
from qwen_rerank.scorers.qwen.model import Forward, Weights, exact_matrix, fuse
from qwen_rerank.scorers.qwen.packing import (
    GroupSlice,
    Layout,
    PackedBatch,
    QueryGroup,
    RowSpan,
    Segment,
    SharedPrefix,
    lay_out,
)
from qwen_rerank.scorers.qwen.quantization import MAX_ERROR, Quantization, Quantize, Trial, check_int8, settle
from qwen_rerank.scorers.qwen.shares import share_out

if TYPE_CHECKING:
    from qwen_rerank.scorers.qwen.checkpoint import Checkpoint

DEFAULT_MAX_LENGTH = 8192  # tokens of one prompt, as in the model card
logger = logging.getLogger(__name__)

Template = Literal["transformers", "vllm"]
Dtype = Literal["auto", "bfloat16", "float16", "float32"]


@dataclass(frozen=True, slots=True, kw_only=True)
class QwenConfig:
    """The settings of the local engine: the arguments of `QwenScorer`, which says what each means."""

    model: str = "Qwen/Qwen3-Reranker-0.6B"
    device: str = "auto"
    dtype: Dtype = "auto"
    instruction: str | None = None  # the checkpoint's own, else the model card's
    template: Template = "transformers"
    max_length: int = DEFAULT_MAX_LENGTH  # tokens of one prompt, template included
    revision: str | None = None
    deterministic: bool = False
    token_budget: int | None = None  # tokens of one forward pass; None: measured
    gpu_memory_gb: float | None = None  # GiB that the process may take on the GPU; None: what is free
    quantize: Quantize | None = None
    threads: int | None = None  # of a forward pass on the CPU; None: PyTorch's own number

    def __post_init__(self) -> None:
        check_query(self.model, name="model", give="a hub name, a folder, 'mini' or 'pocket'")
        check_query(self.device, name="device", give="'auto', 'cpu', 'cuda' or 'cuda:N'")
        if self.instruction is not None:
            check_text("instruction", self.instruction)
        check_choice("template", self.template, list(TEMPLATES))
        check_choice("dtype", self.dtype, ("auto", "bfloat16", "float16", "float32"))
        if self.quantize is not None:
            check_choice("quantize", self.quantize, ("int8",))
        check_count("max_length", self.max_length)
        if self.threads is not None:
            check_count("threads", self.threads)
        if self.token_budget is not None and check_count("token_budget", self.token_budget) < self.max_length:
            raise InvalidInputError(
                f"token_budget ({self.token_budget}) must hold at least one prompt of max_length "
                f"({self.max_length}) tokens; raise token_budget or lower max_length."
            )
        if self.gpu_memory_gb is not None and not (math.isfinite(self.gpu_memory_gb) and self.gpu_memory_gb > 0):
            raise InvalidInputError(f"gpu_memory_gb must be a positive number of GiB, not {self.gpu_memory_gb!r}.")


_CPU_ROW_CHUNK = 512  # keeps the MLP and the projections of a chunk in the caches
_CUDA_ROW_CHUNK = 16_384  # bounds the memory of the MLP and the projections
_SHARED_PREFIX_TOKENS = 512  # of instructions' shared prefixes that are kept: several of the usual length


@dataclass(frozen=True, slots=True)
class Engine:
    """A model on its device, ready to score batches."""

    run: Runner
    device: torch.device
    dtype: torch.dtype
    token_budget: int
    quantization: Quantization | None


def build_engine(checkpoint: Checkpoint, config: QwenConfig, *, trial: QueryGroup | None = None) -> Engine:
    """Return the engine for a checkpoint; takes the weights out of it.

    Args:
        checkpoint: The model.
        config: How to run it.
        trial: Prompts on which 8-bit products are compared with exact ones; for `quantize="int8"`.

    Raises:
        InvalidInputError: If the device is not there or cannot do what is asked for, or max_length is above what the
            model knows.
    """
    shape = checkpoint.config
    if config.max_length > shape.max_positions:
        raise InvalidInputError(
            f"max_length ({config.max_length}) must be at most the {shape.max_positions} positions of {checkpoint.name}."
        )
    device = choose_device(config.device)
    stored = checkpoint.weights["model.norm.weight"].dtype
    dtype = choose_dtype(config.dtype, device, stored)
    if device.type == "cpu" and config.dtype == "auto":
        logger.info(
            "dtype='auto' is %s: the checkpoint is stored in %s, and this CPU has %s.",
            name_of(dtype),
            name_of(stored),
            bfloat16_instructions() or "no instructions for bfloat16",
        )
    if config.quantize:
        check_int8(device, dtype)
    if device.type == "cuda" and config.gpu_memory_gb is not None:
        cap_process(device, config.gpu_memory_gb)
    quantization = None
    try:
        with on_device(device, threads=config.threads):
            weights = fuse(
                checkpoint.weights,
                checkpoint.head,
                shape,
                dtype=dtype,
                device=device,
                max_length=config.max_length,
                make_matrix=exact_matrix if trial is None else partial(Trial, ops=cpu_ops(dtype)),
            )
            if trial is not None:
                weights, quantization = _tried(weights, shape, trial)
            forward = _on_cuda(weights, shape) if device.type == "cuda" else _on_cpu(weights, shape)
            budget = config.token_budget or _budget(forward, shape, dtype, device, config)
    except Exception as exc:
        ours = as_our_error(exc)
        if ours is exc:
            raise
        raise ours from exc
    # Not measured on CUDA, where kept rows cost one more copy of a batch's keys.
    shared_prefix_tokens = _SHARED_PREFIX_TOKENS if device.type == "cpu" else 0
    run = Runner(
        forward,
        deterministic=config.deterministic,
        shared_prefix_tokens=shared_prefix_tokens,
        threads=config.threads,
    )
    return Engine(run, device, dtype, budget, quantization)


def _tried(weights: Weights, shape: QwenModelConfig, trial: QueryGroup) -> tuple[Weights, Quantization]:
    """Run the trial's prompts through weights made of trials, and return the weights that they chose."""
    layout = lay_out(PackedBatch((GroupSlice(trial, tuple(range(len(trial.documents)))),)))
    # All rows at once: a trial is run once.
    ops = EagerOps()  # so that machines with Numba and without it choose the same
    Forward(weights, shape, CpuAttention(weights.norm.dtype, ops), ops, row_chunk=len(layout.ids))(layout, None)
    chosen, report = settle(weights)
    n, n_exact, n_grouped = (len(names) for names in (report.errors, report.exact, report.grouped))
    logger.info(
        "%d of %d matrices are in int8, %d of them with a scale for every 512 columns; %s (%.1f %% of the weights) stay in "
        "%s: their error is above %g.",
        *(n - n_exact, n, n_grouped, ", ".join(report.exact) or "none", 100 * report.exact_share),
        *(name_of(weights.norm.dtype), MAX_ERROR),
    )
    return chosen, report


def _on_cpu(weights: Weights, shape: QwenModelConfig) -> Forward:
    ops = cpu_ops(weights.norm.dtype)
    return Forward(weights, shape, CpuAttention(weights.norm.dtype, ops), ops, row_chunk=_CPU_ROW_CHUNK)


def _on_cuda(weights: Weights, shape: QwenModelConfig) -> Forward:
    dtype, device = weights.norm.dtype, weights.norm.device
    kernel = choose_kernel(
        n_heads=shape.n_heads, n_kv_heads=shape.n_kv_heads, head_dim=shape.head_dim, dtype=dtype, device=device
    )
    ops = _cuda_ops(shape.head_dim, dtype, device)
    return Forward(weights, shape, CudaAttention(kernel, device), ops, row_chunk=_CUDA_ROW_CHUNK)


def _cuda_ops(head_dim: int, dtype: torch.dtype, device: torch.device) -> Ops:
    """Return fused kernels where Triton is there and right, else PyTorch's own operations."""
    try:
        from qwen_rerank.scorers.qwen.kernels_triton import TritonOps, check_triton

        ops = TritonOps()
        check_triton(ops, head_dim=head_dim, dtype=dtype, device=device)
        return ops
    except Exception as exc:  # a missing compiler or driver library shows itself in many ways
        logger.warning("Triton kernels cannot be used on %s (%s); PyTorch's own operations are slower.", device, exc)
        return EagerOps()


def _budget(
    forward: Forward, shape: QwenModelConfig, dtype: torch.dtype, device: torch.device, config: QwenConfig
) -> int:
    """Return the tokens of a batch: by a warm-up on CUDA, by arithmetic on the CPU."""
    if device.type == "cpu":
        return cpu_budget(shape, dtype, max_length=config.max_length)

    def run(tokens: int) -> None:
        length = min(256, config.max_length)
        document = np.zeros(length, dtype=np.int32)
        group = QueryGroup(document[:0], (document,) * (tokens // length))
        forward(lay_out(PackedBatch((GroupSlice(group, tuple(range(len(group.documents)))),))), None)

    return cuda_budget(run, device, cap_gb=config.gpu_memory_gb)


Passed = tuple[torch.Tensor, list[KV]]  # log-odds of a pass, and the keys and values that it was to keep

_KV_TOKENS = 1024  # of prefixes whose keys and values outlive a batch


@dataclass(frozen=True, slots=True)
class _Pass:
    """A forward pass: its rows, what they see of earlier ones, and which of them are kept, in this order."""

    layout: Layout
    past_kv: list[KV] | None
    prefixes: list[tuple[QueryGroup, Segment]]
    shared_prefixes: dict[SharedPrefix, RowSpan]

    @property
    def spans(self) -> list[RowSpan]:
        """The rows that are kept."""
        return [segment.own for _, segment in self.prefixes] + list(self.shared_prefixes.values())


class Runner:
    """Scores batches and keeps the keys and values that later batches need.

    Args:
        forward: The forward pass.
        deterministic: Compute every shared prefix, every prefix and every document in a pass of its own, on a CPU by one
            thread. Its shapes then depend on nothing but its own tokens, and so do the bits of its score.
        shared_prefix_tokens: Tokens of the shared prefixes whose keys and values stay; a longer one is not kept.
        threads: Of PyTorch, for a forward pass; None leaves its own number.
    """

    def __init__(
        self, forward: Forward, *, deterministic: bool, shared_prefix_tokens: int = 0, threads: int | None = None
    ) -> None:
        self._forward = forward
        self._threads = threads
        self.crew = Crew()
        self._on_cpu = forward.device.type == "cpu"
        self._deterministic = deterministic
        self._shared_prefix_tokens = shared_prefix_tokens
        self._shared_kv: OrderedDict[SharedPrefix, list[KV]] = OrderedDict()  # the least recently used first
        # One query's, between its batches, where `_shared_kv` is across queries. An entry goes away with its group.
        self._prefix_kv: WeakKeyDictionary[QueryGroup, list[KV]] = WeakKeyDictionary()

    def __call__(self, batch: PackedBatch) -> np.ndarray:
        """Return log-odds, float32 `(n_documents,)` in the batch's order.

        Raises:
            DeviceOutOfMemoryError: If the batch is too large for the device.
            DeviceLostError: If the device cannot be used any more.
        """
        try:
            with on_device(self._forward.device, threads=self._threads):
                return self._one_by_one(batch) if self._deterministic else self._together(batch)
        except Exception as exc:
            # Whoever keeps the error would keep the pass's tensors with it.
            traceback.clear_frames(exc.__traceback__)
            ours = as_our_error(exc)
            if ours is exc:
                raise
            self._release()
            raise ours from exc

    def _together(self, batch: PackedBatch) -> np.ndarray:
        n_threads = torch.get_num_threads() if self._on_cpu else 1
        log_odds = np.empty(batch.n_documents, dtype=np.float32)
        for step in share_out(batch, n_threads, n_new=self._new_rows, room=self._room):
            passes = self._passes([share.batch for share in step])
            works = [partial(self._forward, each.layout, each.past_kv, keep_rows=_rows(each.spans)) for each in passes]
            results = self._run(works, threads_each=max(1, n_threads // len(works)))
            for share, (values, _) in zip(step, results, strict=True):
                log_odds[share.places] = values.cpu().numpy()
            self._keep([(each, kv) for each, (_, kv) in zip(passes, results, strict=True)])
        return log_odds

    def _passes(self, batches: Sequence[PackedBatch]) -> list[_Pass]:
        """Return the passes over batches that are computed side by side; what several compute one of them keeps."""
        passes: list[_Pass] = []
        chosen: dict[QueryGroup, Segment] = {}
        new_shared: set[SharedPrefix] = set()
        for batch in batches:
            wanted = dict.fromkeys(p.group.shared_prefix for p in batch.slices if p.group.root not in self._prefix_kv)
            at_hand = [shared for shared in wanted if shared is not None and shared in self._shared_kv]
            layout = lay_out(batch, past_groups=self._prefix_kv, shared_prefixes=at_hand)
            past_kv = [*map(self._use_shared, at_hand), *(self._prefix_kv[group] for group in layout.past_groups)]
            prefixes = self._worth_keeping(batch, layout, chosen)
            shared = {key: span for key, span in self._new_shared_prefixes(layout).items() if key not in new_shared}
            chosen.update(prefixes)
            new_shared.update(shared)
            passes.append(_Pass(layout, _joined(past_kv) or None, prefixes, shared))
        return passes

    def _keep(self, done: Sequence[tuple[_Pass, list[KV]]]) -> None:
        """Keep of passes what later batches need; each comes with the rows that it named."""
        new_shared: list[tuple[SharedPrefix, list[KV]]] = []
        for each, kv in done:
            ends = list(accumulate(map(len, each.spans), initial=0))
            pieces = [[(key[slice(*at)], value[slice(*at)]) for key, value in kv] for at in pairwise(ends)]
            for (group, _), piece in zip(each.prefixes, pieces, strict=False):
                self._prefix_kv[group] = self._with_shared(group, piece)
            new_shared += zip(each.shared_prefixes, pieces[len(each.prefixes) :], strict=True)
        # Last: a new shared prefix may drop one that another pass's prefix stands behind.
        for shared, piece in new_shared:
            self._keep_shared(shared, piece)

    def _new_rows(self, group: QueryGroup) -> int:
        """Return how many rows a whole group's prefix takes; fewer than its tokens where some are at hand."""
        if group in self._prefix_kv:
            return 0
        return len(group.prefix) - (len(group.shared_prefix or ()) if group.shared_prefix in self._shared_kv else 0)

    def _one_by_one(self, batch: PackedBatch) -> np.ndarray:
        log_odds: list[np.ndarray] = []
        for group_slice in batch.slices:
            group, root = group_slice.group, group_slice.group.root
            past_kv = {root: self._prefix_kv.get(root) or self._prefix_alone(root)}
            if group_slice.more and len(group.prefix) <= self._room:
                self._prefix_kv.update(past_kv)
            parts = [PackedBatch((GroupSlice(group, (index,)),)) for index in group_slice.indices]
            works = [partial(self._forward, lay_out(part, past_groups=past_kv), past_kv[root]) for part in parts]
            log_odds += [found.cpu().numpy() for found, _ in self._run(works, threads_each=1)]
        return np.concatenate(log_odds)

    def _run(self, works: Sequence[Callable[[], Passed]], *, threads_each: int) -> list[Passed]:
        """Return the results of passes, side by side on a CPU."""
        return self.crew.run(works, threads_each=threads_each) if self._on_cpu else [work() for work in works]

    def _prefix_alone(self, group: QueryGroup) -> list[KV]:
        """Compute a prefix in a pass of its own, and its shared prefix in one before it; keys and values of each layer."""
        shared_prefix = group.shared_prefix
        if shared_prefix is None or len(shared_prefix) > self._shared_prefix_tokens:
            return self._pass(group)
        if shared_prefix not in self._shared_kv:
            self._keep_shared(shared_prefix, self._pass(QueryGroup(shared_prefix.ids, ())))
        return self._with_shared(group, self._pass(group, shared_prefix))

    def _pass(self, group: QueryGroup, *shared_prefixes: SharedPrefix) -> list[KV]:
        """Compute the prefix of a group behind shared prefixes at hand; its keys and values of each layer."""
        layout = lay_out(PackedBatch((GroupSlice(group, ()),)), shared_prefixes=shared_prefixes)
        past_kv = _joined([self._use_shared(shared_prefix) for shared_prefix in shared_prefixes]) or None
        work = partial(self._forward, layout, past_kv, keep_rows=torch.arange(len(layout.ids)))
        return self._run([work], threads_each=1)[0][1]

    def _use_shared(self, shared_prefix: SharedPrefix) -> list[KV]:
        """Return the keys and values of a shared prefix at hand, now the most recently used one."""
        self._shared_kv.move_to_end(shared_prefix)
        return self._shared_kv[shared_prefix]

    def _keep_shared(self, shared_prefix: SharedPrefix, kv: list[KV]) -> None:
        """Keep a shared prefix for later queries, and drop the least recently used ones to make room."""
        while self._shared_kv and sum(map(len, self._shared_kv)) + len(shared_prefix) > self._shared_prefix_tokens:
            self._shared_kv.popitem(last=False)
        # Cloned: a view would hold all rows that it was cut from.
        self._shared_kv[shared_prefix] = [(key.clone(), value.clone()) for key, value in kv]

    def _with_shared(self, group: QueryGroup, kv: list[KV]) -> list[KV]:
        """Return the keys and values of a whole prefix: those computed, behind the shared prefix's where it was at hand."""
        if group.shared_prefix is None or len(kv[0][0]) == len(group.prefix):
            return kv
        return _joined([self._shared_kv[group.shared_prefix], kv])

    def _worth_keeping(
        self, batch: PackedBatch, layout: Layout, chosen: Mapping[QueryGroup, Segment]
    ) -> list[tuple[QueryGroup, Segment]]:
        """Return the prefixes of this batch that a later one needs, with their rows, as far as there is room.

        Those that batches at its side keep are `chosen` already.
        """
        unfinished = {group_slice.group.root for group_slice in batch.slices if group_slice.more}
        found: list[tuple[QueryGroup, Segment]] = []
        room = self._room - sum(len(group.prefix) for group in chosen)
        for group, segment in layout.prefixes:
            if group in unfinished and group not in chosen and len(group.prefix) <= room:
                found.append((group, segment))
                room -= len(group.prefix)
        return found

    def _new_shared_prefixes(self, layout: Layout) -> dict[SharedPrefix, RowSpan]:
        """Return the shared prefixes that this batch computes as the start of a prefix and that are to be kept, with their rows."""
        found: dict[SharedPrefix, RowSpan] = {}
        for group, segment in layout.prefixes:
            shared_prefix = group.shared_prefix
            if shared_prefix is not None and not segment.seen and len(shared_prefix) <= self._shared_prefix_tokens:
                found.setdefault(shared_prefix, RowSpan(segment.own.start, segment.own.start + len(shared_prefix)))
        return found

    @property
    def _room(self) -> int:
        """Tokens of prefixes that can still be kept."""
        return max(0, _KV_TOKENS - sum(len(group.prefix) for group in self._prefix_kv))

    def _release(self) -> None:
        """Give back what is not needed, so that a smaller batch finds room."""
        self._prefix_kv.clear()
        self._shared_kv.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _rows(spans: Sequence[RowSpan]) -> torch.Tensor | None:
    """Return the rows of all spans, int64, in order; None of no spans."""
    return torch.cat([torch.arange(span.start, span.stop) for span in spans]) if spans else None


def _joined(pieces: list[list[KV]]) -> list[KV]:
    """Return for each layer the keys and values of all pieces, in order; an empty list of no pieces."""
    if len(pieces) == 1:
        return pieces[0]
    return [
        (torch.cat([key for key, _ in layer]), torch.cat([value for _, value in layer]))
        for layer in zip(*pieces, strict=True)
    ]
