"""`QwenScorer`: exact Qwen3-Reranker scores from a model in this process."""

from __future__ import annotations

import asyncio
import functools
import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from types import TracebackType
from typing import Any

import numpy as np

from qwen_rerank.errors import QueryTooLongError
from qwen_rerank.prompt import EncodedPrompt, PromptEncoder
from qwen_rerank.scorers.base import BaseScorer, Call, Prepared, ScoreRequest, joined, mapped
from qwen_rerank.scorers.qwen.checkpoint import load_checkpoint
from qwen_rerank.scorers.qwen.device import name_of
from qwen_rerank.scorers.qwen.engine import DEFAULT_MAX_LENGTH, Dtype, QwenConfig, Template, build_engine
from qwen_rerank.scorers.qwen.packing import QueryGroup, SharedPrefix, common_prefix, group_prompts
from qwen_rerank.scorers.qwen.quantization import Quantize, trial_prompts
from qwen_rerank.scorers.qwen.scheduler import Caller, GroupScores, Scheduler
from qwen_rerank.sharing import made_from
from qwen_rerank.types import Fit, Scores

_INSTRUCTIONS = 64  # whose shared prefix needs no tokenizing; a few hundred bytes each


class QwenScorer(BaseScorer):
    """Scores with a Qwen3-Reranker checkpoint, or any causal yes/no reranker of the same architecture.

    The model is loaded here and now. One worker thread owns the device; calls from threads and coroutines are packed
    together. What a query's prompts share is computed once per query, not once per document, and without padding; on a
    CPU what the prompts of an instruction begin with is kept from query to query.

    Args:
        model: Hub name or local folder of the checkpoint; "pocket" is the small one that ships with the package.
        device: "auto", "cpu", "cuda" or "cuda:N". One device per scorer; see `ScorerPool` for several.
        dtype: "auto" is bfloat16 on CUDA, and on a CPU where the checkpoint is stored so and the CPU has instructions
            for it (AVX512-BF16, AMX, ARM's), else float32.
        instruction: What counts as relevant, for calls that give no instruction of their own; None is what the
            checkpoint was trained with, else the model card's.
        template: "transformers" (model card) or "vllm". A fine-tuned checkpoint brings a prompt and labels of its
            own in `qwen_rerank.json`.
        max_length: Tokens of one prompt, template included; longer documents are cut at their end. None is 8192, or
            what the model was made for where that is less.
        revision: Commit of the hub repository; the three official names are pinned where it is None.
        deterministic: Scores are bit-identical whatever else is computed, for the same build and device. Slower; on a
            CPU one thread computes a document.
        token_budget: Tokens of one forward pass; None takes it from the free memory.
        gpu_memory_gb: GiB of GPU memory that PyTorch may take in this process, weights included; None leaves it uncapped.
        quantize: "int8" multiplies in 8 bits on a CPU, made here from the plain checkpoint: weights per output row,
            activations per token. A matrix whose product is off by more than 2 % on fixed prompts gets a scale for every
            512 columns, and stays in `dtype` where that is not enough.
        threads: PyTorch's threads of a forward pass on a CPU; None leaves its own number. It stays what later threads of
            the process begin with.

    Attributes:
        name: The model's name.
        fingerprint: Changes with checkpoint, template, default instruction, max_length, dtype and what is
            quantized.
        quantization: Which matrices are in 8 bits, with the error of each; None without `quantize`.
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
        max_length: int | None = None,
        revision: str | None = None,
        deterministic: bool = False,
        token_budget: int | None = None,
        gpu_memory_gb: float | None = None,
        quantize: Quantize | None = None,
        threads: int | None = None,
    ) -> None:
        self.config = QwenConfig(
            model=model,
            device=device,
            dtype=dtype,
            instruction=instruction,
            template=template,
            max_length=DEFAULT_MAX_LENGTH if max_length is None else max_length,
            revision=revision,
            deterministic=deterministic,
            token_budget=token_budget,
            gpu_memory_gb=gpu_memory_gb,
            quantize=quantize,
            threads=threads,
        )
        # Not in the caller's thread, where a forked child may not be able to compute: see `ComputeThread`.
        self._threads = self._encoders = ThreadPoolExecutor(4, thread_name_prefix="qwen-rerank-encode")
        checkpoint = self._encoders.submit(load_checkpoint, model, revision=revision).result()
        if max_length is None:
            self.config = replace(self.config, max_length=min(DEFAULT_MAX_LENGTH, checkpoint.config.max_positions))
        self._encoder = PromptEncoder(
            checkpoint.tokenizer,
            spec=checkpoint.prompt_spec(template),
            instruction=checkpoint.instruction if instruction is None else instruction,
            max_length=self.config.max_length,
        )
        trial = trial_prompts(self._encoder) if quantize else None
        engine = self._encoders.submit(build_engine, checkpoint, self.config, trial=trial).result()
        self.name = checkpoint.name
        self.device = str(engine.device)
        self.dtype = name_of(engine.dtype)
        self.quantization = engine.quantization
        formats = [self.dtype] if engine.quantization is None else [self.dtype, engine.quantization.fingerprint]
        self.fingerprint = _fingerprint(checkpoint.fingerprint, self._encoder.fingerprint, *formats)
        self._crew = engine.run.crew
        self._scheduler = Scheduler(engine.run, token_budget=engine.token_budget)
        self._shared_prefix = _shared_prefixes(self._encoder)

    @property
    def encoder(self) -> PromptEncoder:
        """Builds the prompts; for those who want to see them or count their tokens."""
        return self._encoder

    @property
    def max_length(self) -> int:
        """Tokens of the longest prompt."""
        return self.config.max_length

    @property
    def token_budget(self) -> int:
        """Tokens of one forward pass; smaller than at the start after the device ran out of memory."""
        return self._scheduler.token_budget

    @property
    def waiting_tokens(self) -> int:
        """Tokens that callers wait for and no forward pass has taken yet."""
        return self._scheduler.waiting_tokens

    def _begin(self, call: Call) -> Future[list[Scores]]:
        """Tokenize and queue query after query, so that the device works while the rest is tokenized."""
        caller = Caller()
        call.on_cancel(lambda: self._scheduler.cancel(caller))
        futures: list[Future[Scores]] = []
        for request in call.requests:
            if call.cancelled:  # nobody will read the scores
                break
            futures.append(self.prepare(request).submit(caller, 0, len(request.texts)))
        return joined(futures)

    def prepare(self, request: ScoreRequest) -> PreparedPrompts:
        """Return a request's prompts, tokenized once, whose slices share what the query's prompts begin with."""
        self._check_open()
        prompts = self._encoder.encode_checked(request.query, request.texts, request.instruction)
        # The longest common prefix depends on the documents; a cut that the query alone fixes does not.
        cut = prompts[0].document_start if self.config.deterministic else None
        group = group_prompts(
            [prompt.ids for prompt in prompts], cut=cut, shared_prefix=self._shared_prefix(request.instruction)
        )
        return PreparedPrompts(self._scheduler, prompts, group)

    def _measure(self, query: str, texts: Sequence[str], instruction: str | None) -> list[Fit]:
        return self._encoder.fit_checked(query, texts, instruction)

    def _check_open(self) -> None:
        self._scheduler.check_open()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the settings; the model is loaded again where they arrive."""
        return made_from, (type(self), asdict(self.config))

    def close(self) -> None:
        """Finish what waits, then end the worker; calls that come later get `ScorerClosedError`."""
        self._scheduler.close()
        self._crew.close()
        self._encoders.shutdown(wait=True)

    def __enter__(self) -> QwenScorer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class PreparedPrompts(Prepared):
    """The prompts of one query on their way to the device.

    Attributes:
        tokens: int32 `(n_texts,)`, tokens of each prompt.
        shared_tokens: Tokens that all prompts begin with and that are computed once for all slices.
    """

    def __init__(self, scheduler: Scheduler, prompts: Sequence[EncodedPrompt], group: QueryGroup) -> None:
        self.tokens = np.array([len(prompt.ids) for prompt in prompts], dtype=np.int32)
        self.shared_tokens = len(group.prefix)
        self._kept_chars = np.array([prompt.kept_chars for prompt in prompts], dtype=np.int32)
        self._scheduler = scheduler
        self._query_group = group

    async def ascore(self, start: int, stop: int) -> Scores:
        """Return what came of the prompts from `start` up to `stop`; a cancelled wait takes them out of the queue."""
        caller = Caller()
        try:
            return await asyncio.wrap_future(self.submit(caller, start, stop))
        except BaseException:
            self._scheduler.cancel(caller)
            raise

    def submit(self, caller: Caller, start: int, stop: int) -> Future[Scores]:
        """Queue the prompts from `start` up to `stop` in a caller's place."""
        own = slice(start, stop)

        def scores(result: GroupScores) -> Scores:
            return Scores(result.scores, self.tokens[own], self._kept_chars[own], result.failed)

        return mapped(self._scheduler.submit(caller, self._query_group.subgroup(start, stop)), scores)


def shared_prefix_of(encoder: PromptEncoder, instruction: str | None) -> SharedPrefix | None:
    """Return what the prompts of nearly all queries of an instruction begin with.

    Found from two queries that begin unalike; one that merges with what stands before it may still differ.
    """
    try:
        one, other = (encoder.query_prefix(query, instruction=instruction) for query in ("a", "1"))
    except QueryTooLongError:  # a query may fit that is one token shorter than these
        return None
    return SharedPrefix(one[: common_prefix((one, other))])


def _shared_prefixes(encoder: PromptEncoder) -> Callable[[str | None], SharedPrefix | None]:
    """Return what remembers each instruction's shared prefix, without holding the scorer."""
    return functools.lru_cache(maxsize=_INSTRUCTIONS)(functools.partial(shared_prefix_of, encoder))


def _fingerprint(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
