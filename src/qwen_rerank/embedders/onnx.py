"""Sentence embeddings on ONNX Runtime: an encoder's graph, mean or first token, L2-normalised. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import Encoding, Tokenizer

from qwen_rerank.checks import check_count, check_texts
from qwen_rerank.errors import ModelCorruptError, ModelError, ModelNotFoundError, ScorerError
from qwen_rerank.models.folder import longest_input, read_json, read_settings, read_tokenizer
from qwen_rerank.models.names import ships
from qwen_rerank.models.onnx_graph import find_graph, read_graph
from qwen_rerank.models.onnx_session import OnnxSession
from qwen_rerank.models.safe_tokenizer import safe_tokenizer
from qwen_rerank.sharing import ForkLock, SharedCopies, made_from

_TOKENS = 512  # of a text, where a model's files set no limit
_CHARS_PER_TOKEN = 8  # more than a text has on the whole; the rest of a long one is tokenized only where needed


class OnnxEmbedder(SharedCopies):
    """Embeds queries and documents with an encoder in ONNX, each with the prompt that the model was trained with.

    The graph gives a vector for each text, or a state for each token, of which the mean is taken (or the first, where
    `1_Pooling/config.json` says so). Prompts are those of `config_sentence_transformers.json`; where there is none and the
    tokenizer's template writes prompts itself, a query is a single text of it and a document the second of a pair.
    Whatever a text holds, none of it becomes a control token. May be shared by threads, which then wait for one another.

    Args:
        folder: Holds the graph, `config.json` and `tokenizer.json`.
        name: What `load_embedder` takes to get it again, or "".
        graph: Which ONNX file of the folder; None for `onnx/model.onnx`, else whichever exporters write.
        batch_size: Texts of one forward pass at most.
        threads: Of one forward pass; None for one a core.

    Attributes:
        name: As given.
        dim: Length of a vector.
        max_length: Tokens of the longest text, prompt included; what is longer is cut.
        fingerprint: Changes with all that changes a vector.

    Raises:
        ModelError: If the model is missing, damaged, unsafe or no encoder; one subclass for each reason.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        name: str = "",
        graph: str | None = None,
        batch_size: int = 32,
        threads: int | None = None,
    ) -> None:
        self.name = name
        self._settings = {
            "folder": str(folder),
            "name": name,
            "graph": graph,
            "batch_size": batch_size,
            "threads": threads,
        }
        self._batch_size = check_count("batch_size", batch_size)
        self._lock = ForkLock()
        path = Path(folder)
        if not path.is_dir():
            raise ModelNotFoundError(
                f"{str(path)!r} is no folder; give one with a graph, config.json and tokenizer.json."
            )
        settings = read_settings(path)
        is_ours = ships(path)
        checked = read_graph(find_graph(path, graph, "embedder"))
        with ThreadPoolExecutor(1) as beside:  # the runtime opens a graph for longer than the tokenizer takes
            opening = beside.submit(OnnxSession, checked, output=None, rank=(2, 3), threads=threads, fold=is_ours)
            tokenizer_json = read_tokenizer(path / "tokenizer.json", is_ours=is_ours)
            self._tokenizer = safe_tokenizer(tokenizer_json, is_ours=is_ours)
        self._session = opening.result()
        self._prompts = _prompts(path)
        self._in_pair = not any(self._prompts.values()) and _starts_anew(self._tokenizer)
        self._takes_first = _takes_first(path)
        pad = settings.get("pad_token_id")
        self._pad_id = pad if isinstance(pad, int) and pad >= 0 else 0
        self.max_length = longest_input(path, settings) or _TOKENS
        self._tokenizer.enable_truncation(self.max_length)
        parts = [self._session.digest, tokenizer_json, self._prompts, self._takes_first, self.max_length]
        self.fingerprint = f"onnx-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]}"
        self.dim = self._find_dim()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the settings; the model is loaded again where they arrive."""
        return made_from, (type(self), self._settings)

    def embed_queries(self, texts: Sequence[str]) -> np.ndarray:
        """Return float32 `(n_texts, dim)`, L2-normalised, with the query prompt."""
        return self._embed(check_texts("texts", texts), "query")

    def embed_documents(self, texts: Sequence[str]) -> np.ndarray:
        """Return float32 `(n_texts, dim)`, L2-normalised, with the document prompt; a text without tokens gives a zero row.

        Raises:
            InvalidInputError: If `texts` is no list of strings.
        """
        return self._embed(check_texts("texts", texts), "document")

    def _embed(self, texts: list[str], kind: Literal["query", "document"]) -> np.ndarray:
        prompt = self._prompts[kind]
        room = _CHARS_PER_TOKEN * self.max_length
        out = np.zeros((len(texts), self.dim), dtype=np.float32)
        places = [i for i, text in enumerate(texts) if text.strip()]
        [empty, *rows] = self._encode([prompt, *(prompt + texts[i][:room] for i in places)], kind)
        ids = dict(zip(places, rows, strict=True))
        # A beginning of white space, or of long words, holds fewer tokens than there is room for.
        unread = [i for i in places if len(texts[i]) > room and len(ids[i]) < self.max_length]
        ids.update(zip(unread, self._encode([prompt + texts[i] for i in unread], kind), strict=True))
        places = [i for i in places if ids[i] != empty]
        # Longest first: texts of a batch are about equally long.
        order = sorted(places, key=lambda i: len(ids[i]), reverse=True)
        with self._lock:
            start = 0
            while start < len(order):
                size = max(1, min(self._batch_size, self._session.tokens_at_once // len(ids[order[start]])))
                batch = order[start : start + size]
                out[batch] = self._forward([ids[i] for i in batch])
                start += size
        return out

    def _encode(self, given: list[str], kind: Literal["query", "document"]) -> list[list[int]]:
        """Return the ids of each text, with what the template puts around it."""
        if kind == "document" and self._in_pair:
            return [_second(encoding) for encoding in self._tokenizer.encode_batch_fast([("", text) for text in given])]
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(given)]

    def _forward(self, rows: list[list[int]]) -> np.ndarray:
        """Return the vectors of one batch."""
        width = max(map(len, rows))
        ids = np.full((len(rows), width), self._pad_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
            mask[i, : len(row)] = 1
        found = self._session.run({"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)})
        if found.ndim == 3:  # (n_texts, n_tokens, dim) → (n_texts, dim)
            found = found[:, 0] if self._takes_first else (found * mask[:, :, None]).sum(axis=1)
        norms = np.linalg.norm(found, axis=1, keepdims=True)
        if found.shape[0] != len(rows) or not np.isfinite(norms).all():
            raise ModelError(f"{self.name or 'the model'} gave no finite vector for each of {len(rows)} texts.")
        return np.asarray(found / np.maximum(norms, 1e-12), dtype=np.float32)

    def _find_dim(self) -> int:
        """Return the length of a vector, of a first text."""
        try:
            return int(self._forward([self._tokenizer.encode("a").ids] * 2).shape[1])
        except ScorerError as exc:
            raise ModelError(f"{self.name or 'the model'} cannot embed a plain text: {exc}") from exc


def _prompts(path: Path) -> dict[str, str]:
    """Return what stands before queries and documents, as sentence-transformers would choose it."""
    file = path / "config_sentence_transformers.json"
    prompts = read_json(file).get("prompts") if file.exists() else None
    if prompts is None:
        prompts = {}
    if not isinstance(prompts, dict) or not all(isinstance(prompt, str) for prompt in prompts.values()):
        raise ModelCorruptError(f"{file} must give each prompt as a text.")
    documents = next((prompts[name] for name in ("document", "passage", "corpus") if name in prompts), "")
    return {"query": prompts.get("query", ""), "document": documents}


def _starts_anew(tokenizer: Tokenizer) -> bool:
    """Return whether the second text of a pair has a beginning of its own, longer than one control token."""
    return len(_second(tokenizer.encode("", ""))) > 2


def _second(pair: Encoding) -> list[int]:
    """Return the ids of a pair's second text, with what the template puts around it."""
    return [i for i, side in zip(pair.ids, pair.type_ids, strict=True) if side == 1]


def _takes_first(path: Path) -> bool:
    """Return whether the first token's state is the text's, and not the mean of all."""
    file = path / "1_Pooling" / "config.json"
    if not file.exists():
        return False
    settings = read_json(file)
    chosen = [
        name.removeprefix("pooling_mode_")
        for name, value in settings.items()
        if name.startswith("pooling_mode_") and value is True
    ]
    chosen = chosen or [str(settings.get("pooling_mode", "mean_tokens"))]
    if chosen not in (["mean_tokens"], ["mean"], ["cls_token"], ["cls"]):
        raise ModelError(f"{file} asks for {', '.join(chosen)}; only the mean of all tokens or the first can be taken.")
    return bool(chosen[0].startswith("cls"))
