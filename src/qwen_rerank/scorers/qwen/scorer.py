"""`QwenScorer`: exact Qwen3-Reranker scores from a model in this process."""

from __future__ import annotations

import asyncio
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import numpy as np

from qwen_rerank.checks import check_query, check_text, check_texts
from qwen_rerank.errors import DocumentScoringError, QueryTooLongError
from qwen_rerank.packing import Opening, common_prefix, grow
from qwen_rerank.prompt import PromptEncoder
from qwen_rerank.scorers.qwen.checkpoint import load_checkpoint
from qwen_rerank.scorers.qwen.engine import build_engine
from qwen_rerank.scorers.qwen.scheduler import Caller, Scheduler, TreeScores
from qwen_rerank.scorers.qwen.settings import Dtype, QwenConfig, Template
from qwen_rerank.threaded import check_pairs
from qwen_rerank.types import Fit

_TreeFutures = dict[str, "Future[TreeScores]"]

_INSTRUCTIONS = 64  # whose opening needs no tokenizing; a few hundred bytes each


class QwenScorer:
    """Scores with a Qwen3-Reranker checkpoint, or any causal yes/no reranker of the same architecture.

    The model is loaded here and now. One worker thread owns the device; calls from threads and coroutines are packed
    together. What a query's prompts share is computed once per query, not once per document, and without padding; on a
    CPU what the prompts of an instruction begin with is kept from query to query.

    Args:
        model: Hub name or local folder of the checkpoint; "pocket" is the small one that ships with the package.
        device: "auto", "cpu", "cuda" or "cuda:N". One device per scorer; see `ScorerPool` for several.
        dtype: "auto" is bfloat16 on CUDA, and on a CPU float32 (bfloat16 where the checkpoint is stored so and the
            CPU has AMX).
        instruction: What counts as relevant, for calls that give no instruction of their own; None is what the
            checkpoint was trained with, else the model card's.
        template: "transformers" (model card) or "vllm". A fine-tuned checkpoint brings a prompt and labels of its
            own in `qwen_rerank.json`.
        max_length: Tokens of one prompt, template included; longer documents are cut at their end.
        revision: Commit of the hub repository; the three official names are pinned where it is None.
        deterministic: Scores are bit-identical whatever else is computed, for the same build, device and thread
            count. Slower.
        token_budget: Tokens of one forward pass; None takes it from the free memory.
        gpu_memory_gb: GiB of GPU memory that this process may take; None leaves it uncapped.

    Attributes:
        name: The model's name.
        fingerprint: Changes with checkpoint, template, default instruction, max_length and dtype.
        config: The arguments above.

    Raises:
        InvalidInputError: If an argument is wrong.
        ModelError: If the checkpoint cannot be used.
    """

    def __init__(
        self,
        model: str = "Qwen/Qwen3-Reranker-0.6B",
        *,
        device: str = "auto",
        dtype: Dtype = "auto",
        instruction: str | None = None,
        template: Template = "transformers",
        max_length: int = 8192,
        revision: str | None = None,
        deterministic: bool = False,
        token_budget: int | None = None,
        gpu_memory_gb: float | None = None,
    ) -> None:
        self.config = QwenConfig(
            model=model,
            device=device,
            dtype=dtype,
            instruction=instruction,
            template=template,
            max_length=max_length,
            revision=revision,
            deterministic=deterministic,
            token_budget=token_budget,
            gpu_memory_gb=gpu_memory_gb,
        )
        checkpoint = load_checkpoint(model, revision=revision)
        self._encoder = PromptEncoder(
            checkpoint.tokenizer,
            spec=checkpoint.prompt_spec(template),
            instruction=checkpoint.instruction if instruction is None else instruction,
            max_length=max_length,
        )
        engine = build_engine(checkpoint, self.config)
        self.name = checkpoint.name
        self.device = str(engine.device)
        self.dtype = str(engine.dtype).removeprefix("torch.")
        self.fingerprint = _fingerprint(checkpoint.fingerprint, self._encoder.fingerprint, self.dtype)
        self._scheduler = Scheduler(engine.run, token_budget=engine.token_budget)
        self._encoders = ThreadPoolExecutor(4, thread_name_prefix="qwen-rerank-encode")
        self._opening = _openings(self._encoder)

    @property
    def encoder(self) -> PromptEncoder:
        """Builds the prompts; for those who want to see them or count their tokens."""
        return self._encoder

    @property
    def token_budget(self) -> int:
        """Tokens of one forward pass; smaller than at the start after the device ran out of memory."""
        return self._scheduler.token_budget

    @property
    def waiting_tokens(self) -> int:
        """Tokens that callers wait for and no forward pass has taken yet."""
        return self._scheduler.waiting_tokens

    def score(self, query: str, documents: Sequence[str], *, instruction: str | None = None) -> np.ndarray:
        """Return log-odds of relevance, float32 `(n_documents,)`, input order, higher is better.

        Raises:
            InvalidInputError: If an argument is wrong; `QueryTooLongError` when the query leaves no room.
            DocumentScoringError: If some documents could not be scored; carries the others' scores.
            ScorerError: If the scorer is closed or its worker failed.
        """
        return self._score([check_query(query)], [check_texts("documents", documents)], instruction)[0]

    def score_many(
        self, queries: Sequence[str], documents: Sequence[Sequence[str]], *, instruction: str | None = None
    ) -> list[np.ndarray]:
        """Return one array as `score` gives for each query, batched across queries.

        Raises:
            InvalidInputError: As `score`.
            DocumentScoringError: Of the first query with a failed document; the error's note says which query.
            ScorerError: As `score`.
        """
        return self._score(*_check_many(queries, documents), instruction)

    async def ascore(self, query: str, documents: Sequence[str], *, instruction: str | None = None) -> np.ndarray:
        """As `score`, without blocking the event loop; a cancelled call's documents are not computed."""
        [scores] = await self._ascore([check_query(query)], [check_texts("documents", documents)], instruction)
        return scores

    async def ascore_many(
        self, queries: Sequence[str], documents: Sequence[Sequence[str]], *, instruction: str | None = None
    ) -> list[np.ndarray]:
        """As `score_many`, without blocking the event loop."""
        return await self._ascore(*_check_many(queries, documents), instruction)

    def fit(self, query: str, texts: Sequence[str], *, instruction: str | None = None) -> list[Fit]:
        """Return for each text its tokens, the room beside this query, and how many characters are kept."""
        self._scheduler.check_open()
        return self._encoder.fit(check_query(query), check_texts("texts", texts), instruction=instruction)

    def close(self) -> None:
        """Finish what waits, then end the worker; calls that come later get `ScorerClosedError`."""
        self._scheduler.close()
        self._encoders.shutdown(wait=True)

    def __enter__(self) -> QwenScorer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _score(self, queries: list[str], documents: list[list[str]], instruction: str | None) -> list[np.ndarray]:
        self._check(instruction)
        caller, places = Caller(), _places(queries, documents)
        try:
            futures = self._submit(caller, places, instruction)
            results = {query: future.result() for query, future in futures.items()}
        except BaseException:  # also an interrupted wait: nobody will read the scores
            self._scheduler.cancel(caller)
            raise
        return list(_unfold(queries, documents, places, results))

    async def _ascore(
        self, queries: list[str], documents: list[list[str]], instruction: str | None
    ) -> list[np.ndarray]:
        self._check(instruction)
        caller, places = Caller(), _places(queries, documents)
        loop = asyncio.get_running_loop()
        try:
            futures = await loop.run_in_executor(self._encoders, self._submit, caller, places, instruction)
            scores = await asyncio.gather(*map(asyncio.wrap_future, futures.values()))
        except BaseException:
            self._scheduler.cancel(caller)
            raise
        return list(_unfold(queries, documents, places, dict(zip(futures, scores, strict=True))))

    def _check(self, instruction: str | None) -> None:
        self._scheduler.check_open()
        if instruction is not None:
            check_text("instruction", instruction)

    def _submit(self, caller: Caller, places: dict[str, dict[str, int]], instruction: str | None) -> _TreeFutures:
        """Tokenize and queue query after query, so that the device works while the rest is tokenized."""
        futures: _TreeFutures = {}
        for query, texts in places.items():
            if texts and not caller.cancelled:
                prompts = self._encoder.encode(query, list(texts), instruction=instruction)
                # The longest common prefix depends on the documents; a cut that the query alone fixes does not.
                cut = prompts[0].document_start if self.config.deterministic else None
                tree = grow([prompt.ids for prompt in prompts], cut=cut, opening=self._opening(instruction))
                futures[query] = self._scheduler.submit(caller, tree)
        return futures


def opening_of(encoder: PromptEncoder, instruction: str | None) -> Opening | None:
    """Return what the prompts of nearly all queries of an instruction begin with.

    Found from two queries that begin unalike; one that merges with what stands before it may still differ.
    """
    try:
        one, other = (encoder.query_prefix(query, instruction=instruction) for query in ("a", "1"))
    except QueryTooLongError:  # a query may fit that is one token shorter than these
        return None
    return Opening(one[: common_prefix((one, other))])


def _openings(encoder: PromptEncoder) -> Callable[[str | None], Opening | None]:
    """Return what remembers each instruction's opening, without holding the scorer."""
    return functools.lru_cache(maxsize=_INSTRUCTIONS)(functools.partial(opening_of, encoder))


def _check_many(queries: object, documents: object) -> tuple[list[str], list[list[str]]]:
    query_list, document_lists = check_pairs(queries, documents)
    return [check_query(query, name=f"queries[{i}]") for i, query in enumerate(query_list)], document_lists


def _places(queries: list[str], documents: list[list[str]]) -> dict[str, dict[str, int]]:
    """Return for each query its texts, each once, with their places: equal texts are computed once and score the same."""
    places: dict[str, dict[str, int]] = {}
    for query, texts in zip(queries, documents, strict=True):
        known = places.setdefault(query, {})
        for text in texts:
            known.setdefault(text, len(known))
    return places


def _unfold(
    queries: list[str],
    documents: list[list[str]],
    places: dict[str, dict[str, int]],
    results: dict[str, TreeScores],
) -> Iterator[np.ndarray]:
    """Yield each query's scores in input order.

    Raises:
        DocumentScoringError: Of the first query with a failed document.
    """
    for i, (query, texts) in enumerate(zip(queries, documents, strict=True)):
        if not texts:
            yield np.zeros(0, dtype=np.float32)
            continue
        result, order = results[query], [places[query][text] for text in texts]
        scores = result.scores[order]
        failed = {index: result.failed[place] for index, place in enumerate(order) if place in result.failed}
        if failed:
            error = DocumentScoringError(failed, scores)
            error.add_note(f"queries[{i}]")
            raise error
        yield scores


def _fingerprint(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
