"""QwenScorer against the recipe, under concurrency, and at its end."""

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qwen_rerank import QwenScorer, Reranker, Scorer, checks
from qwen_rerank.errors import (
    DeviceOutOfMemoryError,
    DocumentScoringError,
    InvalidInputError,
    NonFiniteScoreError,
    QueryTooLongError,
    ScorerClosedError,
)
from qwen_rerank.scorers.base import ScoreRequest
from qwen_rerank.scorers.qwen.checkpoint import load_checkpoint
from qwen_rerank.scorers.qwen.device import as_our_error, choose_dtype
from qwen_rerank.scorers.qwen.model import Forward
from qwen_rerank.scorers.qwen.scheduler import DeviceLostError
from qwen_rerank.scorers.qwen.scorer import shared_prefix_of
from qwen_rerank.tokenizer import PromptTokenizer
from tests.checkpoints import small_checkpoint
from tests.reference import reference_log_odds

TEXTS = [
    "Beijing is the capital of China.",
    "北京是中华人民共和国的首都。" * 6,
    "",
    "def capital(country):\n    return TABLE[country]",
    " \n\t ",
    "🐼" * 20,
    "The answer to the query is in the body of this document, which is long. " * 20,
]


@pytest.mark.parametrize("template", ["transformers", "vllm"])
@pytest.mark.parametrize("kind", ["tied", "untied", "seq-cls"])
def test_scores_equal_the_recipes(checkpoint_of, kind, template):
    """Log-odds within 1e-5, or twice the recipe's own float32 error where that is larger; long documents are cut."""
    folder = checkpoint_of(kind)
    pairs = [(query, text) for query in ("What is the capital of China?", "首都") for text in TEXTS]
    options = {"template": template, "instruction": "Find the capital", "max_length": 256}
    with QwenScorer(str(folder), device="cpu", dtype="float32", **options) as scorer:
        ours = np.concatenate(scorer.score_many([pairs[0][0], pairs[-1][0]], [TEXTS, TEXTS]))
    theirs = reference_log_odds(folder, pairs, **options)
    exact = reference_log_odds(folder, pairs, **options, dtype=torch.float64)

    assert np.abs(ours - theirs).max() <= max(1e-5, 2 * np.abs(theirs - exact).max())


def test_it_is_a_scorer(scorer):
    assert isinstance(scorer, Scorer)
    assert scorer.score("q", TEXTS).dtype == np.float32


def test_no_documents_touch_no_model(scorer, monkeypatch):
    monkeypatch.setattr(Forward, "__call__", lambda *args, **kwargs: pytest.fail("the model was run"))

    assert scorer.score("q", []).shape == (0,)
    assert [scores.shape for scores in scorer.score_many(["q", "r"], [[], []])] == [(0,), (0,)]


def test_equal_texts_in_one_call_score_the_same(scorer):
    scores = scorer.score_many(["q", "r", "q"], [["a", "b" * 300, "a"], ["a"], ["a", "b" * 300]])

    assert scores[0][0] == scores[0][2] == scores[2][0]
    assert scores[0][1] == scores[2][1]


@settings(max_examples=15)
@given(st.lists(st.sampled_from(TEXTS), min_size=1, max_size=12))
def test_company_changes_a_score_by_rounding_only(scorer, texts):
    alone = {text: scorer.score("q", [text])[0] for text in set(texts)}

    assert np.abs(scorer.score("q", texts) - [alone[text] for text in texts]).max() <= 1e-5


async def test_async_scores_are_the_same(scorer):
    many = await scorer.ascore_many(["q", "r"], [TEXTS, TEXTS[:2]])

    np.testing.assert_allclose(many[0], scorer.score("q", TEXTS), atol=1e-5)
    np.testing.assert_allclose(await scorer.ascore("r", TEXTS[:2]), many[1], atol=1e-5)


@pytest.fixture(scope="module")
def deterministic(checkpoint_of):
    with QwenScorer(str(checkpoint_of()), device="cpu", deterministic=True, max_length=512) as made:
        yield made


@pytest.fixture(scope="module")
def alone(deterministic):
    """The bits of every score when nothing else is computed."""
    return {(query, text): deterministic.score(query, [text])[0] for query in "qrs" for text in TEXTS}


@settings(max_examples=30)
@given(
    st.lists(st.tuples(st.sampled_from("qrs"), st.lists(st.sampled_from(TEXTS), max_size=8)), min_size=1, max_size=4)
)
def test_deterministic_scores_do_not_depend_on_their_company(deterministic, alone, calls):
    """Bit-identical over random batches, orders and queries."""
    scores = deterministic.score_many([query for query, _ in calls], [texts for _, texts in calls])

    assert [row.tolist() for row in scores] == [[alone[query, text] for text in texts] for query, texts in calls]


def test_deterministic_scores_of_64_concurrent_callers(deterministic, alone):
    def call(seed: int) -> bool:
        draw = np.random.default_rng(seed)
        query, texts = "qrs"[draw.integers(3)], [TEXTS[i] for i in draw.integers(len(TEXTS), size=5)]
        return deterministic.score(query, texts).tolist() == [alone[query, text] for text in texts]

    with ThreadPoolExecutor(64) as pool:
        assert all(pool.map(call, range(128)))


def test_64_callers_from_threads_and_coroutines_get_their_own_scores(scorer):
    expected = {text: scorer.score("q", [text])[0] for text in TEXTS}
    calls = [[TEXTS[i % 7], TEXTS[(i + 3) % 7]] for i in range(32)]

    async def coroutines() -> list[np.ndarray]:
        return await asyncio.gather(*(scorer.ascore("q", texts) for texts in calls))

    with ThreadPoolExecutor(33) as pool:
        from_coroutines = pool.submit(lambda: asyncio.run(coroutines()))
        from_threads = list(pool.map(lambda texts: scorer.score("q", texts), calls))

    wanted = [[expected[text] for text in texts] for texts in calls]
    np.testing.assert_allclose(from_threads, wanted, atol=1e-5)
    np.testing.assert_allclose(from_coroutines.result(), wanted, atol=1e-5)


async def test_the_event_loop_turns_while_scores_are_computed(scorer, monkeypatch):
    """The device is held until the loop has run something else."""
    turned, run = threading.Event(), Forward.__call__

    def held(self, *args, **kwargs):
        assert turned.wait(30)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(Forward, "__call__", held)
    task = asyncio.create_task(scorer.ascore("q", ["a"]))
    await asyncio.sleep(0.01)
    turned.set()

    assert (await task).shape == (1,)


async def test_a_cancelled_call_is_not_computed(scorer, monkeypatch):
    """What a cancelled coroutine still waits for is dropped; the call behind it is answered."""
    entered, gate, run, rows = asyncio.Event(), threading.Event(), Forward.__call__, []
    loop = asyncio.get_running_loop()

    def held(self, layout, *args, **kwargs):
        loop.call_soon_threadsafe(entered.set)
        assert gate.wait(30)
        rows.append(len(layout.documents))
        return run(self, layout, *args, **kwargs)

    monkeypatch.setattr(Forward, "__call__", held)
    first = asyncio.create_task(scorer.ascore("q", ["a"]))
    await entered.wait()
    second = asyncio.create_task(scorer.ascore("q", ["b", *TEXTS]))
    while not scorer.waiting_tokens:
        await asyncio.sleep(0.001)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    assert scorer.waiting_tokens == 0
    gate.set()

    assert (await first).shape == (1,)
    assert rows == [1]


def test_what_all_queries_begin_with_is_computed_once(small, monkeypatch):
    """Its rows are in the first query's pass alone, and again after the memory was given back."""
    run, rows = Forward.__call__, []

    def counted(self, layout, *args, **kwargs):
        rows.append(len(layout.ids))
        return run(self, layout, *args, **kwargs)

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(Forward, "__call__", counted)
    with QwenScorer(str(small), device="cpu") as scorer:
        first, second = scorer.score("q", TEXTS[:1]), scorer.score("q", TEXTS[:1])
        monkeypatch.setattr(Forward, "__call__", full)
        with pytest.raises(DocumentScoringError):
            scorer.score("q", TEXTS[:1])
        monkeypatch.setattr(Forward, "__call__", counted)
        third, n_tokens = scorer.score("q", TEXTS[:1]), len(scorer.encoder.encode("q", TEXTS[:1])[0].ids)
        shared_prefix = shared_prefix_of(scorer.encoder, None)

    assert rows == [n_tokens, n_tokens - len(shared_prefix), n_tokens]
    np.testing.assert_allclose([second, third], [first, first], atol=1e-5)


async def test_slices_of_a_request_are_tokenized_once_and_share_the_querys_prefix(scorer, monkeypatch):
    """However many slices, the prefix's rows are in one pass, and no text goes through the tokenizer again."""
    run, rows, texts = Forward.__call__, [], [text for text in TEXTS if text.strip()]

    def counted(self, layout, *args, **kwargs):
        rows.append(len(layout.ids))
        return run(self, layout, *args, **kwargs)

    whole, prompts = scorer.score("capital", texts), scorer.encoder.encode("capital", texts)
    prepared = scorer.prepare(ScoreRequest("capital", texts))
    monkeypatch.setattr(Forward, "__call__", counted)
    monkeypatch.setattr(PromptTokenizer, "pieces", lambda *_: pytest.fail("a text was tokenized again"))
    parts = [await prepared.ascore(i, i + 1) for i in range(len(texts))]

    np.testing.assert_allclose(np.concatenate([part.log_odds for part in parts]), whole, atol=1e-5)
    group = prepared._query_group
    n_prefix = len(group.prefix) - len(group.shared_prefix)
    assert sum(rows) == n_prefix + sum(map(len, group.documents))
    assert prepared.tokens.tolist() == [len(prompt.ids) for prompt in prompts]


def test_a_document_is_checked_once_and_tokenized_once(scorer, monkeypatch):
    """By the scorer, and through a reranker that cuts, whatever the document's length."""
    checked, tokenized = Counter(), Counter()
    check = checks.check_text

    def encode(texts):
        tokenized.update(texts)
        return given(texts)

    def counted(name, value):
        checked[value] += 1
        return check(name, value)

    monkeypatch.setattr(checks, "check_text", counted)
    given = scorer.encoder._tokenizer._encode
    monkeypatch.setattr(scorer.encoder._tokenizer, "_encode", encode)
    documents = ["a short one", "a longer one. " * 2000, "北京是首都。" * 3000, "a short one"]
    for score in (scorer.score, Reranker(scorer).rerank):
        checked.clear(), tokenized.clear()
        score("which capital?", documents)
        assert [checked[text] for text in documents] == [2, 1, 1, 2]  # the first stands there twice
        assert sum("short" in text for text in tokenized.elements()) == 1
        assert sum("longer" in text for text in tokenized.elements()) == 1
        assert sum("北京" in text for text in tokenized.elements()) == 1


@pytest.mark.parametrize("instruction", [None, "", "Find it\n", "判断相关性"])
def test_prompts_of_one_instruction_begin_alike(scorer, instruction):
    """Up to the query, whatever that begins with."""
    shared_prefix = shared_prefix_of(scorer.encoder, instruction)
    for query in ("a", "1", "深", "\n a", "  x", ":", "\u0301", "<Query>: q", "\r\nb"):
        prefix = scorer.encoder.query_prefix(query, instruction=instruction)
        assert prefix[: len(shared_prefix)].tolist() == shared_prefix.ids.tolist()
    assert len(shared_prefix) > len(scorer.encoder.prefix_ids)


def test_a_document_that_gives_nan_fails_alone(tmp_path):
    """One token's embedding is not a number; only the document with that token fails."""
    folder = small_checkpoint(tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][load_checkpoint(str(folder)).tokenizer.single_id("z")] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with QwenScorer(str(folder), device="cpu") as scorer, pytest.raises(DocumentScoringError) as caught:
        scorer.score("q", ["a donkey", "a zebra", "a dog"])

    assert isinstance(caught.value.failed[1], NonFiniteScoreError)
    assert list(caught.value.failed) == [1]
    assert np.isfinite(caught.value.scores).tolist() == [True, False, True]


def test_out_of_memory_is_answered_with_smaller_packs(scorer, monkeypatch):
    run, limit, expected = Forward.__call__, 260, scorer.score("q", TEXTS[:6])

    def small(self, layout, *args, **kwargs):
        if len(layout.ids) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return run(self, layout, *args, **kwargs)

    monkeypatch.setattr(Forward, "__call__", small)
    np.testing.assert_allclose(scorer.score("q", TEXTS[:6]), expected, atol=1e-5)
    with pytest.raises(DocumentScoringError) as caught:
        scorer.score("q", TEXTS)

    assert {index: type(error) for index, error in caught.value.failed.items()} == {6: DeviceOutOfMemoryError}
    np.testing.assert_allclose(caught.value.scores[:6], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("error", "ours"),
    [
        pytest.param(torch.OutOfMemoryError("CUDA out of memory"), DeviceOutOfMemoryError, id="CUDA memory"),
        pytest.param(
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), DeviceOutOfMemoryError, id="memory"
        ),
        pytest.param(MemoryError(), DeviceOutOfMemoryError, id="Python's memory"),
        pytest.param(RuntimeError("CUDA error: an illegal memory access"), DeviceLostError, id="a broken context"),
        pytest.param(RuntimeError("shapes do not match"), RuntimeError, id="anything else"),
    ],
)
def test_errors_of_the_device(error, ours):
    assert type(as_our_error(error)) is ours


def test_a_checkpoint_with_a_prompt_of_its_own(tmp_path):
    """Fine-tuned checkpoints of the same architecture bring their strings and labels in a small file."""
    folder = small_checkpoint(tmp_path / "m")
    with QwenScorer(str(folder), device="cpu", max_length=512) as plain:
        (folder / "qwen_rerank.json").write_text(json.dumps({"yes": "y", "no": "n", "separator": " | "}))
        with QwenScorer(str(folder), device="cpu", max_length=512) as own:
            assert not np.allclose(own.score("q", TEXTS), plain.score("q", TEXTS))
            assert own.fingerprint != plain.fingerprint


def test_the_fingerprint_knows_what_changes_a_score(small):
    options = [{}, {"template": "vllm"}, {"instruction": "other"}, {"max_length": 512}, {"dtype": "bfloat16"}]
    fingerprints = set()
    for option in options:
        with QwenScorer(str(small), device="cpu", **option) as made:
            fingerprints.add(made.fingerprint)

    assert len(fingerprints) == len(options)


@pytest.mark.parametrize(
    ("stored", "capabilities", "chosen"),
    [
        (torch.float32, {"avx512_bf16": True}, torch.float32),
        (torch.float16, {"avx512_bf16": True}, torch.float32),
        (torch.bfloat16, {"avx512_bf16": True}, torch.bfloat16),
        (torch.bfloat16, {"amx_bf16": True}, torch.bfloat16),
        (torch.bfloat16, {"bf16": True}, torch.bfloat16),
        (torch.bfloat16, {"avx512_f": True, "avx512_bf16": False}, torch.float32),
    ],
)
def test_auto_is_bfloat16_where_the_checkpoint_is_stored_so_and_the_cpu_has_instructions(
    monkeypatch, stored, capabilities, chosen
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert choose_dtype("auto", torch.device("cpu"), stored) is chosen


def test_auto_is_float32_on_a_pytorch_that_tells_nothing_of_its_cpu(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert choose_dtype("auto", torch.device("cpu"), torch.bfloat16) is torch.float32


def test_the_log_says_which_format_auto_took(tmp_path, caplog, monkeypatch):
    folder = small_checkpoint(tmp_path / "m", dtype=torch.bfloat16)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    with caplog.at_level("INFO"), QwenScorer(str(folder), device="cpu", max_length=512) as made:
        assert made.dtype == "bfloat16"

    assert "is bfloat16: the checkpoint is stored in bfloat16, and this CPU has AVX512_BF16" in caplog.text


def test_bfloat16_is_close_to_float32(small):
    options = {"device": "cpu", "max_length": 512}
    with QwenScorer(str(small), dtype="bfloat16", **options) as rough, QwenScorer(str(small), **options) as scorer:
        assert 0 < np.abs(rough.score("q", TEXTS) - scorer.score("q", TEXTS)).max() < 0.5


def test_fit_says_what_is_kept(scorer):
    short, long = scorer.fit("q", ["a", "word " * 2000])

    assert short.fits
    assert not long.fits
    assert long.kept_chars < 5 * long.room


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"token_budget": 100}, "token_budget .100. must hold", id="a budget below one prompt"),
        pytest.param({"dtype": "int4"}, "dtype must be one of", id="dtype"),
        pytest.param({"device": "tpu"}, "device must be", id="device"),
        pytest.param({"device": "cuda:99"}, "cuda:99.* is not there", id="no such GPU"),
        pytest.param({"max_length": 10**6, "token_budget": None}, "at most the 40960", id="too long for the model"),
        pytest.param({"gpu_memory_gb": -1}, "gpu_memory_gb", id="memory"),
        pytest.param({"template": "sglang"}, "template must be one of", id="template"),
    ],
)
def test_wrong_settings_are_refused(small, options, message):
    with pytest.raises(InvalidInputError, match=message):
        QwenScorer(str(small), **{"device": "cpu", **options})


def test_the_default_length_is_the_models_where_that_is_less(tmp_path):
    """Only a length that somebody asked for can be too long."""
    folder = small_checkpoint(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    with QwenScorer(str(folder), device="cpu") as short:
        assert short.max_length == short.config.max_length == 1024
        assert short.fit("q", ["word " * 2000])[0].kept_chars < 1024
    with pytest.raises(InvalidInputError, match=r"max_length \(2048\) must be at most the 1024 positions"):
        QwenScorer(str(folder), device="cpu", max_length=2048)


def test_wrong_arguments_are_refused(scorer):
    with pytest.raises(InvalidInputError, match="query is empty"):
        scorer.score(" ", ["a"])
    with pytest.raises(InvalidInputError, match="documents must be a list"):
        scorer.score("q", "a")
    with pytest.raises(InvalidInputError, match=r"queries\[1\] is empty"):
        scorer.score_many(["q", ""], [["a"], ["b"]])
    with pytest.raises(QueryTooLongError):
        scorer.score("word " * 600, ["a"])


async def test_a_closed_scorer_says_so(small):
    with QwenScorer(str(small), device="cpu") as made:
        made.score("q", ["a"])
    with pytest.raises(ScorerClosedError, match="closed"):
        made.score("q", ["a"])
    with pytest.raises(ScorerClosedError, match="closed"):
        await made.ascore("q", ["a"])


async def test_no_thread_and_no_task_is_left(small):
    before = {thread for thread in threading.enumerate() if thread.name.startswith("qwen-rerank")}
    with QwenScorer(str(small), device="cpu") as made:
        await asyncio.gather(*(made.ascore("q", ["a", "b"]) for _ in range(20)))

    after = {thread for thread in threading.enumerate() if thread.name.startswith("qwen-rerank")}
    assert after <= before
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_is_refused(scorer):
    scorer.score("q", ["a"])
    child = os.fork()
    if child == 0:
        code = 1
        try:
            scorer.score("q", ["a"])
        except ScorerClosedError:
            code = 0
        finally:
            os._exit(code)

    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert scorer.score("q", ["a"]).shape == (1,)


_UNCLOSED = """
import sys
from qwen_rerank import QwenScorer
scorer = QwenScorer(sys.argv[1], device="cpu")
print(scorer.score("q", ["a", "b"]).shape)
"""


def test_the_interpreter_ends_without_close(small):
    command = [sys.executable, "-W", "error::ResourceWarning", "-c", _UNCLOSED, str(small)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)

    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "(2,)", "")
