"""Our scorers and embedders as mteb models, so that published tables can be made again; and pairs for other evaluators."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen_rerank.errors import InvalidInputError, MissingExtraError
from qwen_rerank.protocols import Embedder, Scorer, SimpleScorer
from qwen_rerank.scorers.adapted import as_scorer

if TYPE_CHECKING:
    from mteb.models.model_meta import ModelMeta

_QUERIES_A_CALL = 64


class MtebCrossEncoder:
    """A scorer behind mteb's cross-encoder protocol.

    Args:
        scorer: Gives the log-odds: a scorer, any object with `name` and `score(query, documents)`, or a model's name.
        name: Name in mteb's results, "organisation/model".
        revision: Revision in mteb's results.
        instructions: mteb task name to the instruction for it; other tasks get `instruction`.
        instruction: For tasks without one of their own; None for the scorer's default.
    """

    def __init__(
        self,
        scorer: Scorer | SimpleScorer | str,
        *,
        name: str,
        revision: str = "local",
        instructions: Mapping[str, str] | None = None,
        instruction: str | None = None,
    ) -> None:
        self._scorer = as_scorer(scorer)
        self._name = name
        self._revision = revision
        self._instructions = dict(instructions or {})
        self._instruction = instruction

    @property
    def mteb_model_meta(self) -> ModelMeta:
        """The description that mteb writes beside the results."""
        return _meta(self._name, self._revision)

    def predict(
        self,
        inputs1: Iterable[Mapping[str, Any]],
        inputs2: Iterable[Mapping[str, Any]],
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Return log-odds, float32 `(n_pairs,)`, of queries paired with documents one by one; pairs of a query are scored together."""
        queries, documents = list(_texts(inputs1)), list(_texts(inputs2))
        if len(queries) != len(documents):
            raise InvalidInputError(
                f"mteb gave {len(queries)} queries for {len(documents)} documents; it pairs them one by one."
            )
        instruction = self._instructions.get(task_metadata.name, self._instruction)
        groups = [
            (query, [doc for _, doc in pairs])
            for query, pairs in groupby(zip(queries, documents, strict=True), lambda p: p[0])
        ]
        scores: list[np.ndarray] = []
        for start in range(0, len(groups), _QUERIES_A_CALL):
            part = groups[start : start + _QUERIES_A_CALL]
            scores += self._scorer.score_many([q for q, _ in part], [docs for _, docs in part], instruction=instruction)
        return np.concatenate(scores) if scores else np.empty(0, dtype=np.float32)


class MtebEncoder:
    """An embedder behind mteb's encoder protocol, for the first stage.

    Args:
        embedder: Gives the vectors.
        name: Name in mteb's results, "organisation/model".
        revision: Revision in mteb's results.
    """

    def __init__(self, embedder: Embedder, *, name: str, revision: str = "local") -> None:
        self._embedder = embedder
        self._name = name
        self._revision = revision

    @property
    def mteb_model_meta(self) -> ModelMeta:
        """The description that mteb writes beside the results."""
        return _meta(self._name, self._revision)

    def encode(
        self,
        inputs: Iterable[Mapping[str, Any]],
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Return float32 `(n_texts, dim)`, with the query prompt where mteb says that the texts are queries."""
        texts = list(_texts(inputs))
        is_query = getattr(prompt_type, "value", prompt_type) == "query"
        return self._embedder.embed_queries(texts) if is_query else self._embedder.embed_documents(texts)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Return dot products `(n1, n2)`; the vectors have length one."""
        return np.asarray(embeddings1) @ np.asarray(embeddings2).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Return dot products `(n,)` of rows."""
        return np.sum(np.asarray(embeddings1) * np.asarray(embeddings2), axis=1)


class PairPredictor:
    """A scorer with the `predict(pairs)` of a sentence-transformers cross-encoder, as its evaluators and EvalScope call it."""

    def __init__(self, scorer: Scorer | SimpleScorer | str) -> None:
        self._scorer = as_scorer(scorer)
        self.model_card_data = _NoModelCard()

    def predict(self, sentences: Sequence[Sequence[str]], **kwargs: Any) -> np.ndarray:
        """Return log-odds, float32 `(n_pairs,)`, of (query, document) pairs."""
        groups = [(query, [pair[1] for pair in pairs]) for query, pairs in groupby(sentences, lambda pair: pair[0])]
        scores = self._scorer.score_many([query for query, _ in groups], [documents for _, documents in groups])
        return np.concatenate(scores) if scores else np.empty(0, dtype=np.float32)


class _NoModelCard:
    """Takes what sentence-transformers' evaluators would write into a model's card."""

    def set_evaluation_metrics(self, *args: Any, **kwargs: Any) -> None:
        """Keep nothing: the metrics are the evaluator's return value."""


def _texts(batches: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    for batch in batches:
        if "text" not in batch:
            raise InvalidInputError(
                f"mteb gave inputs with {sorted(batch)} and no 'text'; this model reads text alone."
            )
        yield from batch["text"]


def _meta(name: str, revision: str) -> ModelMeta:
    try:
        from mteb.models.model_meta import ModelMeta
    except ImportError as exc:
        raise MissingExtraError("qwen_rerank.evaluation.mteb", package="mteb", extra="mteb", cause=exc) from exc
    about = {"name": name, "revision": revision, "modalities": ["text"], "languages": ["eng-Latn", "zho-Hans"]}
    return ModelMeta.create_empty(overwrites=about)
