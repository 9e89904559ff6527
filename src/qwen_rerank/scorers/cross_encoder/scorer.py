"""`CrossEncoderScorer`: (query, document) pairs tokenized, batched by length, one number each."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Literal

import numpy as np

from qwen_rerank.checks import check_choice, check_count, check_query
from qwen_rerank.errors import DeviceOutOfMemoryError, InvalidInputError, ModelError, NonFiniteScoreError, ScorerError
from qwen_rerank.models.names import ships
from qwen_rerank.scorers.base import BaseScorer, ScoreRequest
from qwen_rerank.scorers.cross_encoder.classifier import Backend, LoadedModel, open_classifier
from qwen_rerank.scorers.cross_encoder.pairs import Pair, PairEncoder
from qwen_rerank.sharing import ComputeThread, made_from
from qwen_rerank.types import Fit, Scores

logger = logging.getLogger(__name__)

Dtype = Literal["float32", "float16", "bfloat16"]
_DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossEncoderConfig:
    """The arguments of a `CrossEncoderScorer`, checked."""

    model: str
    device: str = "auto"
    dtype: Dtype = "float32"
    max_length: int | None = None  # tokens of one pair; None for what the model was made for
    batch_size: int = 32  # pairs of one forward pass
    revision: str | None = None
    backend: Backend = "auto"
    graph: str | None = None  # file in the model's folder
    threads: int | None = None  # None for one a core

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model:
            raise InvalidInputError(f"model must be a hub name or a folder, not {self.model!r}.")
        check_choice("backend", self.backend, ("auto", "torch", "onnx"))
        check_choice("dtype", self.dtype, _DTYPES)
        check_count("batch_size", self.batch_size)
        for name in ("max_length", "threads"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        if self.graph is not None:
            check_query(self.graph, name="graph", give="the name of an ONNX file in the model's folder")


class CrossEncoderScorer(BaseScorer):
    """Scores with a sequence classifier that has one label, as sentence-transformers' `CrossEncoder` does.

    The label's raw value is the log-odds; no activation is applied, so nothing is lost to a sigmoid. Only safetensors
    weights or a checked ONNX graph are read and no code from the model runs. Whatever a query or document holds, none of
    it becomes a control token. Calls from several threads take turns on the device.

    Args:
        model: Hub name or folder, for example "BAAI/bge-reranker-v2-m3".
        device: "auto" (CUDA where there is one, else the CPU), or a torch device; a graph runs on the CPU.
        dtype: Of weights and arithmetic in torch; the score is float32 in any case.
        max_length: Tokens of one pair, control tokens included; None for what the model was made for.
        batch_size: Pairs of one forward pass at most; halved when the device runs out of memory.
        revision: Commit, tag or branch on the hub.
        backend: "torch" for safetensors, "onnx" for a graph (ONNX Runtime, which the base install has); "auto" takes torch
            where it is installed and the folder holds safetensors, else the graph.
        graph: Which ONNX file of the folder; None for `onnx/model.onnx`, else whichever exporters write.
        threads: Of one forward pass on a CPU; None for one a core. In torch the whole process has them.

    Attributes:
        device: Where it runs.

    Raises:
        ModelError: If the model cannot be used; one subclass for each reason.
        MissingExtraError: If it needs torch or transformers, which are not installed.
        InvalidInputError: If an argument is wrong.
    """

    takes_instruction = False

    def __init__(
        self,
        model: str,
        *,
        device: str = "auto",
        dtype: Dtype = "float32",
        max_length: int | None = None,
        batch_size: int = 32,
        revision: str | None = None,
        backend: Backend = "auto",
        graph: str | None = None,
        threads: int | None = None,
    ) -> None:
        self.config = CrossEncoderConfig(
            model=model,
            device=device,
            dtype=dtype,
            max_length=max_length,
            batch_size=batch_size,
            revision=revision,
            backend=backend,
            graph=graph,
            threads=threads,
        )
        self._thread = ComputeThread("qwen-rerank-cross-encoder")
        loaded = self._thread.run(_load, self.config)
        self._encoder = PairEncoder(loaded.tokenizer, max_length=_max_length(max_length, loaded.max_length))
        self._network = loaded.network
        self.device = loaded.network.device
        self._thread.on_cpu = self.device == "cpu"
        self._pad_id = loaded.pad_id
        self._batch_size = batch_size
        self.name = model
        parts = (loaded.fingerprint, dtype, str(self._encoder.max_length))
        self.fingerprint = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
        self._check_network()

    @property
    def max_length(self) -> int:
        """Tokens of the longest pair."""
        return self._encoder.max_length

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the settings; the model is loaded again where they arrive."""
        return made_from, (type(self), asdict(self.config))

    def _compute(self, requests: Sequence[ScoreRequest]) -> list[Scores]:
        encoded = [self._encoder.encode(request.query, request.texts) for request in requests]
        results = iter(self._run([pair for pairs in encoded for pair in pairs]))
        return [_scores(pairs, list(islice(results, len(pairs)))) for pairs in encoded]

    def _measure(self, query: str, texts: Sequence[str], instruction: str | None) -> list[Fit]:
        return self._encoder.fit(query, texts)

    def _run(self, pairs: Sequence[Pair]) -> list[float | Exception]:
        """Return the score of every pair, or why it has none."""
        # Longest first: pairs of a batch are about equally long, and a batch that is too large fails at once.
        order = sorted(range(len(pairs)), key=lambda i: len(pairs[i].ids), reverse=True)
        results: dict[int, float | Exception] = {}
        while len(results) < len(order):
            size = self._size(len(pairs[order[len(results)]].ids))
            batch = order[len(results) : len(results) + size]
            try:
                scores = self._thread.run(self._forward, [pairs[i] for i in batch])
            except DeviceOutOfMemoryError as exc:
                if len(batch) > 1:
                    self._shrink(len(batch) // 2)
                    continue
                scores = [_out_of_memory(self.device, len(pairs[batch[0]].ids), exc)]
            results |= dict(zip(batch, scores, strict=True))
        return [results[i] for i in range(len(pairs))]

    def _size(self, n_tokens: int) -> int:
        """Return how many pairs of at most `n_tokens` tokens go into one batch."""
        tokens = self._network.tokens_at_once
        return self._batch_size if tokens is None else max(1, min(self._batch_size, tokens // n_tokens))

    def _forward(self, pairs: Sequence[Pair]) -> Sequence[float | Exception]:
        """Run one batch through the network, padded on the right."""
        width = max(len(pair.ids) for pair in pairs)
        inputs = {  # lists of shape (n_pairs, width)
            "input_ids": [pair.ids + [self._pad_id] * (width - len(pair.ids)) for pair in pairs],
            "attention_mask": [[1] * len(pair.ids) + [0] * (width - len(pair.ids)) for pair in pairs],
        }
        if "token_type_ids" in self._network.inputs:
            inputs["token_type_ids"] = [pair.type_ids + [0] * (width - len(pair.ids)) for pair in pairs]
        scores = self._network.scores({name: np.array(rows, dtype=np.int64) for name, rows in inputs.items()})
        return [_finite(score) for score in scores.tolist()]

    def _check_network(self) -> None:
        """Score a pair, so that a network that cannot do it says so at once.

        Raises:
            ModelError: If it cannot.
        """
        pairs = self._encoder.encode("a", ["a", "a"])
        try:
            failed = [score for score in self._thread.run(self._forward, pairs) if isinstance(score, Exception)]
        except ScorerError as exc:
            failed = [exc]
        if failed:
            raise ModelError(f"{self.name} cannot score a plain pair of texts: {failed[0]}") from failed[0]

    def _shrink(self, batch_size: int) -> None:
        """Go on with smaller batches."""
        self._batch_size = batch_size
        logger.warning("%s ran out of memory; going on with batch_size=%d.", self.device, batch_size)


def _scores(pairs: Sequence[Pair], results: Sequence[float | Exception]) -> Scores:
    """Return what came of one query's pairs."""
    failed = {i: result for i, result in enumerate(results) if isinstance(result, Exception)}
    return Scores(
        log_odds=np.array([np.nan if i in failed else result for i, result in enumerate(results)], dtype=np.float32),
        tokens=np.array([len(pair.ids) for pair in pairs], dtype=np.int32),
        kept_chars=np.array([pair.kept_chars for pair in pairs], dtype=np.int32),
        errors=failed,
    )


def _finite(score: float) -> float | Exception:
    return score if np.isfinite(score) else NonFiniteScoreError(f"the model gave {score}; try dtype='float32'.")


def _out_of_memory(device: str, n_tokens: int, cause: Exception) -> DeviceOutOfMemoryError:
    error = DeviceOutOfMemoryError(
        f"one pair of {n_tokens} tokens does not fit the memory of {device}; lower max_length."
    )
    error.__cause__ = cause
    return error


def _load(config: CrossEncoderConfig) -> LoadedModel:
    path, backend = open_classifier(config.model, revision=config.revision, backend=config.backend, graph=config.graph)
    # Each backend is imported where it is used: a graph runs without torch.
    if backend == "onnx":
        from qwen_rerank.scorers.cross_encoder.onnx_backend import load_onnx

        return load_onnx(
            path,
            graph=config.graph,
            device=config.device,
            dtype=config.dtype,
            threads=config.threads,
            is_ours=ships(path),
        )
    from qwen_rerank.scorers.cross_encoder.torch_backend import load_torch

    return load_torch(path, device=config.device, dtype=config.dtype, threads=config.threads)


def _max_length(wanted: int | None, longest: int | None) -> int:
    if wanted is None and longest is None:
        raise InvalidInputError("the model does not say how long a prompt may be; pass max_length, in tokens.")
    if wanted is not None and longest is not None and wanted > longest:
        raise InvalidInputError(f"max_length ({wanted}) is above the {longest} tokens that the model was made for.")
    return wanted or longest or 0
