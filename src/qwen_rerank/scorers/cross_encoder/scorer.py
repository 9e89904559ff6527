"""`CrossEncoderScorer`: (query, document) pairs tokenized, batched by length, one number each."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import numpy as np
import torch

from qwen_rerank.checks import check_choice, check_count
from qwen_rerank.errors import DeviceOutOfMemoryError, InvalidInputError, NonFiniteScoreError
from qwen_rerank.scorers.base import BaseScorer, ScoreRequest
from qwen_rerank.scorers.cross_encoder.model import load_model
from qwen_rerank.scorers.cross_encoder.pairs import Pair, PairEncoder
from qwen_rerank.types import Fit, Scores

logger = logging.getLogger(__name__)

Dtype = Literal["float32", "float16", "bfloat16"]
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossEncoderConfig:
    """The arguments of a `CrossEncoderScorer`, checked."""

    model: str
    device: str = "auto"
    dtype: Dtype = "float32"
    max_length: int | None = None  # tokens of one pair; None for what the model was made for
    batch_size: int = 32  # pairs of one forward pass
    revision: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model:
            raise InvalidInputError(f"model must be a hub name or a folder, not {self.model!r}.")
        check_choice("dtype", self.dtype, list(_DTYPES))
        check_count("batch_size", self.batch_size)
        if self.max_length is not None:
            check_count("max_length", self.max_length)


class CrossEncoderScorer(BaseScorer):
    """Scores with a sequence classifier that has one label, as sentence-transformers' `CrossEncoder` does.

    The label's raw value is the log-odds; no activation is applied, so nothing is lost to a sigmoid. Only safetensors
    weights are read and no code from the model runs. Whatever a query or document holds, none of it becomes a control
    token. Calls from several threads take turns on the device.

    Args:
        model: Hub name or folder, for example "BAAI/bge-reranker-v2-m3".
        device: "auto" (CUDA where there is one, else the CPU), or a torch device.
        dtype: Of weights and arithmetic; the score is float32 in any case.
        max_length: Tokens of one pair, control tokens included; None for what the model was made for.
        batch_size: Pairs of one forward pass; halved when the device runs out of memory.
        revision: Commit, tag or branch on the hub.

    Raises:
        ModelError: If the model cannot be used; one subclass for each reason.
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
    ) -> None:
        self.config = CrossEncoderConfig(
            model=model, device=device, dtype=dtype, max_length=max_length, batch_size=batch_size, revision=revision
        )
        self.device = _device(device)
        loaded = load_model(model, revision=revision, dtype=_DTYPES[dtype])
        self._encoder = PairEncoder(loaded.tokenizer_json, max_length=_max_length(max_length, loaded.max_length))
        self._network = loaded.network.to(self.device)
        self._pad_id = loaded.pad_id
        self._with_types = "token_type_ids" in loaded.inputs
        self._batch_size = batch_size
        self._device_lock = threading.Lock()
        self.name = model
        parts = (loaded.fingerprint, dtype, str(self._encoder.max_length))
        self.fingerprint = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    @property
    def max_length(self) -> int:
        """Tokens of the longest pair."""
        return self._encoder.max_length

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
        with self._device_lock, torch.inference_mode():
            while len(results) < len(order):
                batch = order[len(results) : len(results) + self._batch_size]
                try:
                    scores = self._forward([pairs[i] for i in batch])
                except torch.cuda.OutOfMemoryError as exc:
                    if len(batch) > 1:
                        self._shrink(len(batch) // 2)
                        continue
                    scores = [_out_of_memory(self.device, len(pairs[batch[0]].ids), exc)]
                results |= dict(zip(batch, scores, strict=True))
        return [results[i] for i in range(len(pairs))]

    def _forward(self, pairs: Sequence[Pair]) -> Sequence[float | Exception]:
        """Run one batch through the network, padded on the right."""
        width = max(len(pair.ids) for pair in pairs)
        inputs = {  # lists of shape (n_pairs, width)
            "input_ids": [pair.ids + [self._pad_id] * (width - len(pair.ids)) for pair in pairs],
            "attention_mask": [[1] * len(pair.ids) + [0] * (width - len(pair.ids)) for pair in pairs],
        }
        if self._with_types:
            inputs["token_type_ids"] = [pair.type_ids + [0] * (width - len(pair.ids)) for pair in pairs]
        tensors = {name: torch.tensor(rows, device=self.device) for name, rows in inputs.items()}
        logits = self._network(**tensors).logits[:, 0]  # (n_pairs, 1) → (n_pairs,)
        return [_finite(score) for score in logits.float().tolist()]

    def _shrink(self, batch_size: int) -> None:
        """Go on with smaller batches."""
        torch.cuda.empty_cache()
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


def _out_of_memory(device: torch.device, n_tokens: int, cause: Exception) -> DeviceOutOfMemoryError:
    error = DeviceOutOfMemoryError(
        f"one pair of {n_tokens} tokens does not fit the memory of {device}; lower max_length."
    )
    error.__cause__ = cause
    return error


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError as exc:
        raise InvalidInputError(
            f"device must be 'auto' or a torch device such as 'cpu' or 'cuda:0', not {name!r}."
        ) from exc


def _max_length(wanted: int | None, longest: int | None) -> int:
    if wanted is None and longest is None:
        raise InvalidInputError("the model does not say how long a prompt may be; pass max_length, in tokens.")
    if wanted is not None and longest is not None and wanted > longest:
        raise InvalidInputError(f"max_length ({wanted}) is above the {longest} tokens that the model was made for.")
    return wanted or longest or 0
