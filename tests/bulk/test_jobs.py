"""Jobs in one process: the rows are those of the slow way, whatever the files, the blocks and the moment of a kill."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pyarrow.fs import FSSpecHandler, LocalFileSystem, PyFileSystem

from qwen_rerank import FaissStore, load_scorer
from qwen_rerank.bulk import Workers, embed_corpus, job_status, read_rows, rerank_pairs, rerank_runs, resume_job
from qwen_rerank.bulk.blocks import cut_input
from qwen_rerank.bulk.job_folder import JobFolder, _check_address, located
from qwen_rerank.cli import main
from qwen_rerank.errors import (
    BackendRejectedError,
    BackendUnavailableError,
    DeviceOutOfMemoryError,
    FileError,
    InvalidInputError,
    InvalidTextError,
    JobError,
    NonFiniteScoreError,
    ScorerError,
)
from qwen_rerank.reranker import Reranker
from qwen_rerank.scorers.base import unscored
from qwen_rerank.testing import HashEmbedder, OverlapScorer, TableScorer
from qwen_rerank.types import Document
from tests.bulk import data


@pytest.fixture
def corpus(tmp_path):
    return data.write(tmp_path / "corpus.jsonl", data.documents(10))


class Killed(BaseException):
    """The end of the process."""


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_every_document_gets_the_vector_that_it_gets_alone(tmp_path, suffix, format):
    rows = data.documents(10)
    source = data.write(tmp_path / f"corpus{suffix}", rows, row_group=4)

    status = embed_corpus(source, tmp_path / "out", embedder=data.embedder, format=format, block_rows=3)

    assert status.complete
    assert (status.rows_in, status.rows, status.rejects, status.orphans) == (10, 10, 0, 0)
    assert data.made(tmp_path / "out") == data.embedded_slowly(rows)


def test_every_pair_and_every_query_gets_the_scores_that_it_gets_alone(tmp_path):
    pairs, runs = data.pairs(11), data.runs(7)
    source = data.write(tmp_path / "pairs.jsonl", pairs)

    rerank_pairs(source, tmp_path / "pairs", scorer=data.scorer, block_rows=4)
    rerank_runs(
        data.write(tmp_path / "runs.parquet", runs), tmp_path / "runs", scorer=data.scorer, top_n=3, block_rows=2
    )

    assert data.made(tmp_path / "pairs") == data.scored_slowly(pairs, source)
    assert data.made(tmp_path / "runs") == data.ranked_slowly(runs, top_n=3)


def test_a_reranker_of_ones_own_decides_with_its_settings(tmp_path):
    runs = data.runs(3)

    def reranker() -> Reranker:
        return Reranker(OverlapScorer(), threshold=0.5, top_n=1)

    rerank_runs(data.write(tmp_path / "runs.jsonl", runs), tmp_path / "out", scorer=reranker)

    kept = [row for row in data.ranked_slowly(runs, top_n=1) if row["score"] >= 0.5]
    assert data.made(tmp_path / "out") == kept


def test_the_jobs_top_n_goes_before_the_rerankers_and_failed_documents_beyond_it_are_told(tmp_path):
    run = {"query_id": "q", "query": "q", "candidates": [{"id": text, "text": text} for text in ("x", "a", "b", "c")]}
    source = data.write(tmp_path / "runs.jsonl", [run])

    def reranker() -> Reranker:
        return Reranker(TableScorer({"a": 1.0, "b": 2.0, "c": 3.0}), top_n=1)

    rerank_runs(source, tmp_path / "out", scorer=reranker, top_n=2)

    assert [row["doc_id"] for row in data.made(tmp_path / "out")] == ["c", "b"]
    assert [row["doc_id"] for row in data.rejected(tmp_path / "out")] == ["x"]


@pytest.mark.parametrize("seed", range(8))
def test_random_files_and_blocks_give_each_row_once(tmp_path, seed):
    """Several files of either kind, blank lines, a last line without its end, row groups that do not fit the blocks."""
    chance = random.Random(seed)
    rows = data.documents(chance.randint(1, 60))
    cuts = sorted(chance.sample(range(len(rows)), k=min(2, len(rows) - 1)))
    (tmp_path / "in").mkdir()
    for number, (start, stop) in enumerate(itertools.pairwise([0, *cuts, len(rows)])):
        path = tmp_path / "in" / f"{number}{chance.choice(['.jsonl', '.parquet'])}"
        data.write(path, rows[start:stop], row_group=chance.randint(1, 20))
        if path.suffix == ".jsonl":
            lines = path.read_text("utf-8").splitlines()
            ends = [chance.choice(["\n", "\r\n", "\n\n"]) for _ in lines[1:]] + [chance.choice(["", "\n", "\n \n"])]
            path.write_text("".join(map("".join, zip(lines, ends))), encoding="utf-8", newline="")

    status = embed_corpus(tmp_path / "in", tmp_path / "out", embedder=data.embedder, block_rows=chance.randint(1, 25))

    assert data.made(tmp_path / "out") == data.embedded_slowly(rows)
    assert status.rows_in == len(rows)


def test_blocks_depend_on_nothing_but_the_files(tmp_path, corpus):
    cut = cut_input(corpus, 4)

    assert cut == cut_input([str(corpus)], 4)
    assert [(block.start, block.stop) for block in cut.blocks] == [(0, 4), (4, 8), (8, 10)]


def test_a_file_is_read_once_however_often_it_is_found(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    file = data.write(folder / "corpus.jsonl", data.documents(3))
    (folder / "again").symlink_to(folder)
    (folder / "link.jsonl").symlink_to(file)
    (tmp_path / "beside.jsonl").symlink_to(file)

    cut = cut_input([folder, str(file), file, tmp_path / "beside.jsonl"], 10)

    assert [one.path for one in cut.files] == [str(file)]


@pytest.mark.parametrize("output", ["in", "in/out", "link/out"])
def test_an_output_in_an_input_is_refused(tmp_path, output):
    (tmp_path / "in").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "in")
    data.write(tmp_path / "in" / "corpus.jsonl", data.documents(3))

    with pytest.raises(InvalidInputError, match="its parts would be read as input"):
        embed_corpus(tmp_path / "in", tmp_path / output, embedder=data.embedder)
    embed_corpus(tmp_path / "in", tmp_path / "in-beside", embedder=data.embedder)


def test_an_empty_file_is_a_job_without_blocks(tmp_path):
    status = embed_corpus(data.write(tmp_path / "a.jsonl", []), tmp_path / "out", embedder=data.embedder)

    assert status.complete
    assert data.made(tmp_path / "out") == []


def test_a_block_of_blank_lines_has_no_part(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n\n\n")

    status = embed_corpus(tmp_path / "a.jsonl", tmp_path / "out", embedder=data.embedder, block_rows=2)

    assert (status.blocks_done, status.rows_in, status.rows) == (2, 0, 0)
    assert not (tmp_path / "out" / "parts").exists()


# What is refused


def test_poisoned_rows_are_told_with_their_reason_and_the_others_go_on(tmp_path):
    rows = data.documents(6, poisoned={1, 4})
    source = data.write(tmp_path / "corpus.jsonl", rows)
    lines = source.read_bytes().splitlines(keepends=True)
    bad = [
        b"{no json\n",
        b'["a list"]\n',
        b'{"id": "empty"}\n',
        b'{"id": "b", "text": "\\ud800"}\n',
        b'{"text": "\xff"}\n',
    ]
    bad += [b'{"id": "\\ud800", "text": "a"}\n', b'{"id": "c", "text": "a", "k": "\\ud800"}\n']
    source.write_bytes(b"".join([*lines[:3], *bad, *lines[3:]]))

    status = embed_corpus(source, tmp_path / "out", embedder=data.embedder, block_rows=5)

    assert data.made(tmp_path / "out") == data.embedded_slowly([rows[i] for i in (0, 2, 3, 5)])
    refused = {row["row"]: (row["error"], row["reason"].split(" (")[0]) for row in data.rejected(tmp_path / "out")}
    assert refused[2] == refused[12] == ("ValueError", "it is poisoned")
    assert refused[4] == ("InvalidInputError", "no JSON")
    assert refused[8][1] == "not UTF-8"
    assert sorted(refused) == [2, 4, 5, 6, 7, 8, 9, 10, 12]
    assert (status.rows, status.rejects, status.rows_in) == (4, 9, 13)
    assert {row["file"] for row in data.rejected(tmp_path / "out")} == {str(source)}


def test_a_pair_or_candidate_without_a_score_touches_no_other(tmp_path):
    table = partial(TableScorer, {"a": 1.0, "b": 2.0})
    pairs = [{"query": "q", "document": text, "doc_id": text} for text in ("a", "x", "b")]
    pairs += [{"query": " ", "document": "a"}, {"query": "q"}, {"query": "q", "document": 5}]
    runs = [
        {"query_id": "1", "query": "q", "candidates": [{"id": "x", "text": "x"}, {"id": "a", "text": "a"}, "b"]},
        {"query_id": "2", "query": "", "candidates": []},
        {"query_id": "3", "query": "q", "candidates": [{"id": "b", "text": "b", "score": "high"}]},
    ]
    rerank_pairs(data.write(tmp_path / "pairs.jsonl", pairs), tmp_path / "pairs", scorer=table)
    rerank_runs(data.write(tmp_path / "runs.jsonl", runs), tmp_path / "runs", scorer=table)

    assert [(row["row"], row["log_odds"]) for row in data.made(tmp_path / "pairs")] == [(1, 1.0), (3, 2.0)]
    assert [row["row"] for row in data.rejected(tmp_path / "pairs")] == [2, 4, 5, 6]
    assert [(row["query_id"], row["doc_id"], row["rank"]) for row in data.made(tmp_path / "runs")] == [("1", "a", 1)]
    told = [(row["query_id"], row["doc_id"]) for row in data.rejected(tmp_path / "runs")]
    assert sorted(told, key=str) == [("1", "x"), ("1", None), ("2", None), ("3", "b")]


def test_scores_and_metadata_without_a_finite_value_are_refused_alone(tmp_path):
    scores = [1, None, 10**400, float("nan"), float("inf"), True]
    run = {"query_id": "q", "query": "apple"}
    run["candidates"] = [{"id": str(i), "text": "apple", "score": score} for i, score in enumerate(scores)]
    documents = [{"id": "a", "text": "a"}, {"id": "b", "text": "b", "k": float("nan")}]

    rerank_runs(data.write(tmp_path / "runs.jsonl", [run]), tmp_path / "runs", scorer=data.scorer)
    embed_corpus(data.write(tmp_path / "corpus.jsonl", documents), tmp_path / "vectors", embedder=data.embedder)

    assert [row["doc_id"] for row in data.made(tmp_path / "runs")] == ["0", "1"]
    assert [row["doc_id"] for row in data.rejected(tmp_path / "runs")] == ["2", "3", "4", "5"]
    assert [row["id"] for row in data.made(tmp_path / "vectors")] == ["a"]
    assert [row["doc_id"] for row in data.rejected(tmp_path / "vectors")] == ["b"]


@pytest.mark.parametrize(
    "odd",
    [
        pytest.param(lambda: pa.array([b"a", b"\xff", b"c"]).view(pa.string()), id="no UTF-8"),
        pytest.param(lambda: pa.array([0, 2**62, 1]).view(pa.timestamp("us")), id="a date far away"),
    ],
)
def test_a_parquet_value_that_cannot_be_read_refuses_its_row_alone(tmp_path, odd):
    columns = {"id": ["a", "b", "c"], "text": ["apple", "pear", "tree"], "when": odd()}
    pq.write_table(pa.table(columns), tmp_path / "corpus.parquet")

    embed_corpus(tmp_path / "corpus.parquet", tmp_path / "out", embedder=data.embedder)

    assert [row["id"] for row in data.made(tmp_path / "out")] == ["a", "c"]
    [told] = data.rejected(tmp_path / "out")
    assert (told["row"], told["error"]) == (2, "InvalidInputError")


def test_a_fault_of_the_moment_refuses_no_row_and_the_job_goes_on_later(tmp_path):
    class Away(OverlapScorer):
        down = True

        def _compute(self, requests):
            if Away.down and requests[0].query != "query":
                raise BackendUnavailableError("connection refused", url="http://a")
            return super()._compute(requests)

    source = data.write(tmp_path / "pairs.jsonl", data.pairs(5))
    with pytest.raises(BackendUnavailableError):
        rerank_pairs(source, tmp_path / "out", scorer=Away)
    Away.down = False

    status = rerank_pairs(source, tmp_path / "out", scorer=Away)

    assert (status.rows, status.rejects) == (5, 0)


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(lambda: torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), id="lost"),
        pytest.param(lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), id="no memory"),
        pytest.param(lambda: RuntimeError("CUDA error: device-side assert triggered"), id="asserted"),
        pytest.param(lambda: RuntimeError("cuBLAS could not be initialized"), id="any other"),
    ],
)
@pytest.mark.parametrize("told", ["each document", "all"])
@pytest.mark.parametrize("kind", ["pairs", "runs"])
def test_a_lost_device_refuses_no_row_and_the_job_goes_on_later(tmp_path, fault, told, kind):
    """The device fails at one document and at all that come after it, whether the scorer says so of each or of all."""

    class OnGpu(OverlapScorer):
        lost = False
        mended = False

        def _compute(self, requests):
            self.lost |= not OnGpu.mended and any(data.text(7) in request.texts for request in requests)
            if self.lost and told == "all":
                raise fault()
            return [self._failed(one) if self.lost else self._overlap(one) for one in requests]

        def _failed(self, request):
            error = ScorerError("the model failed on this document.")
            error.__cause__ = fault()
            return unscored(len(request.texts), dict.fromkeys(range(len(request.texts)), error))

    rerank, rows = {"pairs": (rerank_pairs, data.pairs), "runs": (rerank_runs, data.runs)}[kind]
    source = data.write(tmp_path / "in.jsonl", rows(10))
    with pytest.raises((ScorerError, RuntimeError)):
        rerank(source, tmp_path / "out", scorer=OnGpu, block_rows=3)
    assert job_status(str(tmp_path / "out")).rejects == 0
    OnGpu.mended = True

    status = rerank(source, tmp_path / "out", scorer=OnGpu, block_rows=3)

    assert (status.rows_in, status.rejects) == (10, 0)


def test_a_refused_row_that_speaks_of_a_lost_device_stops_nothing(tmp_path):
    class Quoting(OverlapScorer):
        def _overlap(self, request):
            if data.text(3) not in request.texts:
                return super()._overlap(request)
            error = InvalidTextError("'CUDA error: device-side assert triggered' has no words.")
            return unscored(len(request.texts), {request.texts.index(data.text(3)): error})

    status = rerank_pairs(data.write(tmp_path / "pairs.jsonl", data.pairs(5)), tmp_path / "out", scorer=Quoting)

    assert (status.rows_in, status.rejects) == (5, 1)


@pytest.mark.parametrize("status", [401, 404])
def test_a_server_that_refuses_all_stops_the_job_in_the_middle_of_a_block(tmp_path, status):
    class Revoked(OverlapScorer):
        def _overlap(self, request):
            if data.text(3) not in request.texts:
                return super()._overlap(request)
            error = BackendRejectedError("no", url="http://a", status=status)
            return unscored(len(request.texts), {request.texts.index(data.text(3)): error})

    with pytest.raises(BackendRejectedError):
        rerank_pairs(data.write(tmp_path / "pairs.jsonl", data.pairs(5)), tmp_path / "out", scorer=Revoked)


def test_a_model_that_gives_nan_for_anything_refuses_no_row(tmp_path, corpus):
    class NoScorer(OverlapScorer):
        def _overlap(self, request):
            return unscored(len(request.texts), dict.fromkeys(range(len(request.texts)), NonFiniteScoreError("NaN")))

    class NoEmbedder(HashEmbedder):
        def embed_documents(self, texts):
            return np.full((len(texts), self.dim), np.nan, dtype=np.float32)

    with pytest.raises(NonFiniteScoreError):
        rerank_pairs(data.write(tmp_path / "pairs.jsonl", data.pairs(2)), tmp_path / "pairs", scorer=NoScorer)
    with pytest.raises(NonFiniteScoreError):
        embed_corpus(corpus, tmp_path / "out", embedder=NoEmbedder)


def test_a_querys_number_is_its_id(tmp_path):
    rows = [{**row, "query_id": number} for number, row in enumerate(data.runs(2))]
    rerank_runs(data.write(tmp_path / "runs.jsonl", rows), tmp_path / "out", scorer=data.scorer, top_n=1)

    assert [row["query_id"] for row in data.made(tmp_path / "out")] == ["0", "1"]


def test_an_output_that_is_a_file_is_one_sentence(tmp_path, corpus):
    for output in (corpus, f"{corpus}/x"):
        with pytest.raises((JobError, InvalidInputError)):
            embed_corpus(data.write(tmp_path / "in.jsonl", data.documents(1)), output, embedder=data.embedder)


@pytest.mark.parametrize("kind", [RuntimeError, DeviceOutOfMemoryError])
def test_a_document_that_alone_is_too_much_for_the_device_is_refused_alone(tmp_path, kind):
    class Small(OverlapScorer):
        def _overlap(self, request):
            found = super()._overlap(request)
            failed = {i: kind("too long") for i, text in enumerate(request.texts) if text == data.text(3)}
            return replace(found, errors=failed)

    source = data.write(tmp_path / "pairs.jsonl", data.pairs(5))
    status = rerank_pairs(source, tmp_path / "out", scorer=Small)

    assert (status.rows, [row["row"] for row in data.rejected(tmp_path / "out")]) == (4, [4])


def test_a_broken_model_stops_the_job_before_any_row_is_refused(tmp_path, corpus):
    class Broken(HashEmbedder):
        def embed_documents(self, texts):
            raise ValueError("no weights")

    with pytest.raises(ValueError, match="no weights"):
        embed_corpus(corpus, tmp_path / "out", embedder=Broken)
    assert not (tmp_path / "out").exists()


def test_an_embedder_that_breaks_on_the_way_refuses_no_row_and_the_job_goes_on_later(tmp_path, corpus):
    class Breaking(HashEmbedder):
        broken = False

        def embed_documents(self, texts):
            if self.broken or data.text(7) in texts:
                self.broken = True
                raise RuntimeError("CUDA error: device-side assert triggered")
            return super().embed_documents(texts)

    with pytest.raises(RuntimeError, match="device-side assert"):
        embed_corpus(corpus, tmp_path / "out", embedder=partial(Breaking, 8), block_rows=3)
    assert job_status(str(tmp_path / "out")).rejects == 0

    status = embed_corpus(corpus, tmp_path / "out", embedder=data.embedder, block_rows=3)
    assert (status.rows, status.rejects) == (10, 0)


# What goes on


@dataclass
class Kill:
    """Ends the process at one of the changes that it makes in a job's folder."""

    moment: int = -1
    kind: str = "after"
    changes: int = 0

    def arm(self, moment: int, kind: str = "after") -> None:
        self.moment, self.kind, self.changes = moment, kind, 0

    def change(self, real: Callable[..., None], folder: JobFolder, name: str, *content: bytes) -> None:
        now = self.changes == self.moment
        self.changes += 1
        if now and self.kind == "half" and content:
            real(folder, name, content[0][: len(content[0]) // 2])
        elif not now or self.kind == "after":
            real(folder, name, *content)
        if now:
            raise Killed


@pytest.fixture
def kill(monkeypatch) -> Kill:
    found = Kill()
    monkeypatch.setattr(os, "fsync", lambda _: None)  # of no use against a kill, and the slow part
    for method in ("write", "delete"):
        real = getattr(JobFolder, method)
        monkeypatch.setattr(JobFolder, method, lambda *args, real=real: found.change(real, *args))
    return found


@pytest.fixture
def job(tmp_path):
    """A job of three blocks with a poisoned row, as a function of its folder."""
    source = data.write(tmp_path / "corpus.jsonl", data.documents(8, poisoned={5}))
    return partial(embed_corpus, source, embedder=data.embedder, block_rows=3, format="jsonl")


@pytest.mark.parametrize("kind", ["before", "half", "after"])
def test_a_kill_at_any_write_loses_no_row_and_doubles_none(tmp_path, kill, job, kind):
    job(tmp_path / "whole")
    assert kill.changes == 9  # job, owner, three parts, one file of rejects, three entries
    for moment in range(9):
        output = tmp_path / f"killed-{moment}"
        kill.arm(moment, kind)
        with pytest.raises(Killed):
            job(output)
        kill.arm(-1)

        status = job(output)

        assert (status.complete, status.orphans, status.rejects) == (True, 0, 1), moment
        assert data.made(output) == data.made(tmp_path / "whole"), moment
        assert len(list((output / "parts").iterdir())) == 3, moment


@pytest.mark.parametrize("seed", range(10))
def test_a_job_that_is_killed_again_and_again_ends_with_the_same_rows(tmp_path, kill, job, seed):
    chance = random.Random(seed)
    job(tmp_path / "whole")
    kills = 0
    while True:
        kill.arm(chance.randrange(8), chance.choice(["before", "half", "after"]))
        try:
            status = job(tmp_path / "out")
            break
        except Killed:
            kills += 1

    assert kills
    assert (status.complete, status.orphans, status.rejects) == (True, 0, 1)
    assert data.made(tmp_path / "out") == data.made(tmp_path / "whole")


def test_a_finished_job_does_nothing_when_it_is_started_again(tmp_path, corpus):
    first = embed_corpus(corpus, tmp_path / "out", embedder=data.embedder, block_rows=4)
    parts = sorted((tmp_path / "out" / "parts").iterdir())

    assert embed_corpus(corpus, tmp_path / "out", embedder=data.embedder, block_rows=4) == first
    assert sorted((tmp_path / "out" / "parts").iterdir()) == parts


@pytest.mark.parametrize("harm", ["gone", "cut"])
def test_a_part_that_is_lost_or_cut_is_made_again(tmp_path, corpus, harm):
    embed_corpus(corpus, tmp_path / "out", embedder=data.embedder, block_rows=4)
    part = sorted((tmp_path / "out" / "parts").iterdir())[1]
    part.unlink() if harm == "gone" else part.write_bytes(part.read_bytes()[:-1])

    assert job_status(str(tmp_path / "out")).blocks_done == 2
    with pytest.raises(InvalidInputError, match="2 of 3 blocks are done"):
        data.made(tmp_path / "out")
    embed_corpus(corpus, tmp_path / "out", embedder=data.embedder, block_rows=4)

    assert data.made(tmp_path / "out") == data.embedded_slowly(data.documents(10))


def test_a_part_that_was_changed_is_not_read(tmp_path, corpus):
    embed_corpus(corpus, tmp_path / "out", embedder=data.embedder)
    [part] = (tmp_path / "out" / "parts").iterdir()
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)

    with pytest.raises(JobError, match="is not what was written"):
        data.made(tmp_path / "out")


def test_rows_come_in_input_order_beyond_a_hundred_thousand_files(tmp_path, corpus):
    embed_corpus(corpus, tmp_path / "out", embedder=data.embedder, block_rows=5)
    folder = JobFolder(*located(tmp_path / "out"))
    for name, block in zip(sorted(folder.sizes("manifest")), ("99999-000000000000", "100000-000000000000")):
        record = folder.read_record(name)
        folder.delete(name)
        folder.write_record(f"manifest/{block}.json", {**record, "block": block})

    assert data.made(tmp_path / "out") == data.embedded_slowly(data.documents(10))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        pytest.param(
            {"embedder": partial(HashEmbedder, 16)}, "a job with model 'hash-8', and now it is 'hash-16'", id="model"
        ),
        pytest.param({"block_rows": 5}, "block_rows 4, and now it is 5", id="blocks"),
        pytest.param({"format": "jsonl"}, "output_format 'parquet', and now it is 'jsonl'", id="format"),
    ],
)
def test_a_job_goes_on_only_with_what_it_began_with(tmp_path, corpus, change, said):
    options = {"embedder": data.embedder, "block_rows": 4, **change}
    embed_corpus(corpus, tmp_path / "out", embedder=data.embedder, block_rows=4)

    with pytest.raises(InvalidInputError, match=said):
        embed_corpus(corpus, tmp_path / "out", **options)


def test_input_that_changed_is_refused(tmp_path, corpus):
    embed_corpus(corpus, tmp_path / "out", embedder=data.embedder)
    corpus.write_text(corpus.read_text("utf-8").replace("d1", "e1"), encoding="utf-8")

    with pytest.raises(InvalidInputError, match="over other input, or its files have changed"):
        embed_corpus(corpus, tmp_path / "out", embedder=data.embedder)


@pytest.mark.parametrize("change", [lambda text: text[:-30], lambda text: text + '{"text": "more"}\n'])
def test_input_that_changes_during_the_job_stops_it(tmp_path, corpus, change):
    class Meanwhile(HashEmbedder):
        def embed_documents(self, texts):
            if data.text(0) in texts:
                corpus.write_text(change(corpus.read_text("utf-8")), encoding="utf-8")
            return super().embed_documents(texts)

    with pytest.raises(FileError, match="has changed since the job began"):
        embed_corpus(corpus, tmp_path / "out", embedder=partial(Meanwhile, 8), block_rows=4)


def test_an_error_about_a_file_survives_the_way_from_a_worker():
    error = FileError("a.jsonl", 3, "has changed.")

    assert str(pickle.loads(pickle.dumps(error))) == str(error) == "a.jsonl:3: has changed."


def test_a_run_that_was_taken_over_stops_at_its_next_entry(tmp_path, corpus):
    class Slow(data.PickyEmbedder):
        def embed_documents(self, texts):
            if len(texts) == 2:  # the last block: somebody else starts the job meanwhile
                embed_corpus(corpus, tmp_path / "out", embedder=data.embedder, block_rows=4)
            return super().embed_documents(texts)

    with pytest.raises(JobError, match="another run took over"):
        embed_corpus(corpus, tmp_path / "out", embedder=partial(Slow, 8), block_rows=4)
    assert job_status(str(tmp_path / "out")).orphans == 0
    assert data.made(tmp_path / "out") == data.embedded_slowly(data.documents(10))


def test_a_folder_with_other_files_is_left_alone(tmp_path, corpus):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").touch()

    with pytest.raises(InvalidInputError, match=r"holds other files \(thesis.txt\)"):
        embed_corpus(corpus, tmp_path / "out", embedder=data.embedder)


def test_a_job_by_names_goes_on_by_its_folder_alone(tmp_path, monkeypatch):
    source = data.write(tmp_path / "pairs.jsonl", data.pairs(6))
    monkeypatch.chdir(tmp_path)
    rerank_pairs(
        "pairs.jsonl", "out", scorer=partial(load_scorer, "pocket", dtype="float32", deterministic=True), block_rows=2
    )
    whole = data.made("out")
    for path in sorted((tmp_path / "out" / "manifest").iterdir())[1:]:
        path.unlink()
    monkeypatch.chdir("/")

    status = resume_job(tmp_path / "out")

    assert status.complete
    assert data.made(tmp_path / "out") == whole
    assert whole[0]["file"] == str(source)


def test_a_job_by_a_function_says_how_it_goes_on(tmp_path, corpus):
    embed_corpus(corpus, tmp_path / "out", embedder=data.embedder)

    with pytest.raises(InvalidInputError, match="call what started it again, and it goes on"):
        resume_job(tmp_path / "out")


def test_a_key_is_never_written_down(tmp_path):
    from qwen_rerank.bulk.jobs import _spec

    assert _spec(partial(load_scorer, "http://a", api_key="secret"), load_scorer) is None
    assert _spec("https://user:secret@a", load_scorer) is None
    assert _spec("pocket", load_scorer) == {"name": "pocket", "options": {}}


def test_a_model_is_written_down_only_where_that_finds_it_again(tmp_path, monkeypatch):
    from qwen_rerank.bulk.jobs import _spec

    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)

    assert _spec("model", load_scorer) == {"name": str(tmp_path / "model"), "options": {}}
    assert _spec(partial(load_scorer, tmp_path / "model"), load_scorer) is None
    assert _spec(partial(load_scorer, "pocket", cache=tmp_path), load_scorer) is None


# Where it goes


@pytest.fixture
def no_rename():
    """A file system in memory that knows no rename, no append and no move, as an object store."""
    fsspec = pytest.importorskip("fsspec")
    from fsspec.implementations.memory import MemoryFileSystem

    class Objects(MemoryFileSystem):
        store = {}
        pseudo_dirs = [""]

        def mv(self, *args, **kwargs):
            raise AssertionError("renamed")

        def _open(self, path, mode="rb", **kwargs):
            assert mode in ("rb", "wb"), mode
            return super()._open(path, mode, **kwargs)

    assert fsspec
    return Objects(skip_instance_cache=True)


def test_a_file_system_without_renames_holds_the_same_rows(tmp_path, no_rename):
    rows = data.documents(9)
    no_rename.pipe("/in/corpus.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())

    for _ in range(2):
        status = embed_corpus("/in", "/out", embedder=data.embedder, block_rows=4, filesystem=no_rename)
        for name in no_rename.find("/out/manifest")[1:]:
            no_rename.rm(name)

    assert status.orphans == 0
    embed_corpus("/in", "/out", embedder=data.embedder, block_rows=4, filesystem=PyFileSystem(FSSpecHandler(no_rename)))
    assert data.made("/out", filesystem=no_rename) == data.embedded_slowly(rows)


def test_an_address_is_taken_as_pyarrow_or_fsspec_knows_it(tmp_path):
    assert located(f"file://{tmp_path}/")[1] == str(tmp_path)
    assert located("memory://a/b/")[1].strip("/") == "a/b"
    with pytest.raises(InvalidInputError, match="nothing here knows the address 'nonsense://a/b'"):
        located("nonsense://a/b")
    with pytest.raises(InvalidInputError, match="holds credentials") as caught:
        located("s3://name:secret@bucket/a")
    assert "secret" not in str(caught.value)
    for filesystem in (None, LocalFileSystem()):
        with pytest.raises(InvalidInputError, match="or a query") as caught:
            located("https://host/x.jsonl?token=secret", filesystem)
        assert "secret" not in str(caught.value)
    with pytest.raises(InvalidInputError, match="holds credentials"):
        located("hdfs://name:secret@host/a")
    for address in ("abfss://container@account.dfs.core.windows.net/a", "hdfs://name@host/a"):
        _check_address(address)


def test_a_store_is_built_from_the_vectors(tmp_path, corpus):
    embed_corpus(corpus, tmp_path / "out", embedder=data.embedder, block_rows=4)

    with FaissStore.create(tmp_path / "store", data.embedder()) as store:
        for table in read_rows(str(tmp_path / "out")):
            columns = (table[name].to_pylist() for name in ("id", "text", "metadata"))
            documents = [Document(id, text, json.loads(metadata)) for id, text, metadata in zip(*columns)]
            store.upsert(documents, vectors=np.array(table["vector"].to_pylist(), np.float32))
        hits = store.search(data.text(3), 1)

    assert (hits[0].document.id, hits[0].document.metadata) == ("d3", {"n": 3})


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        ({"inputs": "nowhere.jsonl"}, InvalidInputError, "does not exist"),
        ({"inputs": []}, InvalidInputError, "inputs is empty"),
        ({"inputs": "corpus.jsonl.gz"}, InvalidInputError, "a packed file cannot be cut: unpack it"),
        ({"inputs": "bad.parquet"}, FileError, "cannot be read"),
        ({"embedder": 5}, InvalidInputError, "embedder must be a name or a function that loads the model"),
        ({"embedder": HashEmbedder(8)}, InvalidInputError, "give lambda: … of it"),
        ({"embedder": OverlapScorer}, InvalidInputError, "a function that returns an Embedder, not"),
        ({"block_rows": 0}, InvalidInputError, "block_rows must be an integer of at least 1"),
        ({"workers": -1}, InvalidInputError, "workers must be an integer of at least 0"),
        ({"format": "csv"}, InvalidInputError, "format must be one of"),
    ],
)
def test_a_wrong_argument_is_one_sentence(tmp_path, monkeypatch, corpus, call, error, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus.jsonl.gz").touch()
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    options = {"inputs": corpus, "output": "out", "embedder": data.embedder, **call}

    with pytest.raises(error, match=said):
        embed_corpus(**options)
    assert not (tmp_path / "out").exists()


def test_workers_check_their_numbers():
    with pytest.raises(InvalidInputError, match="gpus must be a number of at least 0, not -1"):
        Workers(count=2, gpus=-1)


# The commands


def test_the_commands_embed_rerank_tell_and_go_on(tmp_path, run_command):
    source = data.write(tmp_path / "corpus.jsonl", data.documents(5))
    pairs = data.write(tmp_path / "pairs.jsonl", [*data.pairs(3), {"query": "q"}])
    runs = data.write(tmp_path / "runs.jsonl", data.runs(2))

    said = run_command("bulk", "embed", source, "-o", tmp_path / "vectors", "-e", "pocket", "--block-rows", 2)
    assert said.stderr.endswith(f"5 rows of 5 are in {tmp_path}/vectors/parts.\n")
    said = run_command("bulk", "rerank", pairs, "-o", tmp_path / "pairs", "-m", "pocket", "--pairs")
    assert f"3 rows of 4 are in {tmp_path}/pairs/parts; 1 refused, see {tmp_path}/pairs/rejects." in said.stderr
    said = run_command(
        "bulk", "rerank", runs, "-o", tmp_path / "runs", "-m", "pocket", "--dtype", "float32", "--top-n", 2
    )
    assert f"4 rows for 2 queries are in {tmp_path}/runs/parts." in said.stderr
    next((tmp_path / "runs" / "manifest").iterdir()).unlink()
    assert "complete     no" in run_command("bulk", "status", tmp_path / "runs").stdout
    run_command("bulk", "resume", tmp_path / "runs")

    told = json.loads(run_command("bulk", "status", tmp_path / "runs", "--json").stdout)
    assert (told["kind"], told["rows"], told["complete"], told["orphans"]) == ("runs", 4, True, 0)
    assert [row["rank"] for row in data.made(tmp_path / "runs")] == [1, 2, 1, 2]


def test_pairs_take_no_top_n(tmp_path, run_command):
    source = data.write(tmp_path / "pairs.jsonl", data.pairs(1))

    said = run_command(
        "bulk", "rerank", source, "-o", tmp_path / "o", "-m", "pocket", "--pairs", "--top-n", 2, status=1
    )
    assert "--pairs takes neither --top-n nor --long-documents" in said.stderr


@pytest.fixture
def run_command(monkeypatch, capsys):
    """Run a command in this process and return what it wrote."""

    def run(*words: object, status: int = 0):
        monkeypatch.setattr("sys.argv", ["qwen-rerank", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        assert (ended.value.code or 0) == status, said.err
        return SimpleNamespace(stdout=said.out, stderr=said.err)

    return run
