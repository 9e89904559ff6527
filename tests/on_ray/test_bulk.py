"""Jobs by workers on Ray: the rows of the one process, also where workers and drivers are killed."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from qwen_rerank import load_scorer
from qwen_rerank.bulk import Workers, embed_corpus, job_status, rerank_pairs, rerank_runs
from qwen_rerank.errors import InvalidInputError, JobError
from qwen_rerank.testing import HashEmbedder
from tests.bulk import data

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]

ROOT = Path(__file__).resolve().parents[2]
TWO = Workers(count=2)


@pytest.fixture
def corpus(tmp_path):
    return data.write(tmp_path / "corpus.jsonl", data.documents(90, poisoned={7, 50}))


def test_workers_write_the_rows_of_the_one_process_bit_for_bit(tmp_path):
    """With the model in float32 and deterministic; pairs and runs, with rows that are refused."""
    pairs = data.write(tmp_path / "pairs.jsonl", [*data.pairs(20), {"query": "q"}])
    runs = data.write(tmp_path / "runs.parquet", data.runs(6))
    exact = partial(load_scorer, "pocket", dtype="float32", deterministic=True)
    for job, source, scorer in ((rerank_pairs, pairs, exact), (rerank_runs, runs, data.scorer)):
        alone = job(source, tmp_path / f"{job.__name__}-1", scorer=scorer, block_rows=3)
        spread = job(source, tmp_path / f"{job.__name__}-2", scorer=scorer, block_rows=3, workers=TWO)

        assert (alone.rows, alone.rejects, alone.blocks) == (spread.rows, spread.rejects, spread.blocks)
        assert data.made(spread.output) == data.made(alone.output)
        assert len(data.made(alone.output)) == alone.rows > 0


def test_workers_that_are_killed_lose_no_row_and_double_none(tmp_path, corpus):
    graves = tmp_path / "graves"
    graves.mkdir()
    embed_corpus(corpus, tmp_path / "alone", embedder=data.embedder, block_rows=3)

    status = embed_corpus(
        corpus,
        tmp_path / "out",
        embedder=partial(data.Mortal, graves, 4),
        block_rows=3,
        workers=Workers(count=2, retries=5),
    )

    assert len(list(graves.iterdir())) == 4
    assert (status.complete, status.rows, status.rejects, status.orphans) == (True, 88, 2, 0)
    assert data.made(tmp_path / "out") == data.made(tmp_path / "alone")


def test_a_block_that_kills_every_worker_stops_the_job_with_a_sentence(tmp_path):
    graves = tmp_path / "graves"
    graves.mkdir()
    source = data.write(tmp_path / "corpus.jsonl", data.documents(40))

    with pytest.raises(JobError, match="a worker could not do its block"):
        embed_corpus(
            source,
            tmp_path / "out",
            embedder=partial(data.Mortal, graves, 100, 1.0),
            block_rows=40,
            workers=Workers(retries=1),
        )


def test_an_error_of_a_worker_is_the_error_of_the_job(tmp_path, corpus):
    class Changed(HashEmbedder):
        def embed_documents(self, texts):
            if len(texts) > 1:
                raise MemoryError("none left")
            return super().embed_documents(texts)

    with pytest.raises(JobError, match="none left"):
        embed_corpus(corpus, tmp_path / "out", embedder=partial(Changed, 8), workers=1)
    with pytest.raises(InvalidInputError, match="a function that returns an Embedder"):
        embed_corpus(corpus, tmp_path / "out2", embedder=dict, workers=1)


def test_without_an_address_a_job_joins_no_cluster_that_happens_to_run(monkeypatch):
    import ray

    from qwen_rerank.bulk import on_ray

    asked = []
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", lambda address, **_: asked.append(address))

    on_ray._start(TWO)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    on_ray._start(TWO)
    on_ray._start(Workers(address="10.0.0.2:6379"))

    assert asked == ["local", "10.0.0.1:6379", "10.0.0.2:6379"]


DRIVER = """
import sys
from functools import partial
from pathlib import Path
from qwen_rerank.bulk import Workers, embed_corpus
from tests.bulk.data import Mortal
source, output, graves, address = sys.argv[1:]
workers = Workers(count=2, address=address)
embed_corpus(source, output, embedder=partial(Mortal, Path(graves), 0, pause=0.2), block_rows=3, workers=workers)
"""


def test_a_driver_that_is_killed_goes_on_where_it_was(tmp_path, corpus, cluster):
    embed_corpus(corpus, tmp_path / "alone", embedder=data.embedder, block_rows=3)
    command = [sys.executable, "-c", DRIVER, corpus, tmp_path / "out", tmp_path, cluster]
    done = [0]
    for chance in (random.Random(1), random.Random(2), None):
        driver = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)
        while chance and driver.poll() is None and done[-1] == entries(tmp_path / "out"):
            time.sleep(0.01)
        if chance:
            time.sleep(chance.random() / 10)
            driver.kill()
        said = driver.communicate(timeout=120)[1]
        done.append(entries(tmp_path / "out"))
        assert chance or driver.returncode == 0, said

    assert 0 < done[1] < done[2] < done[3] == 30
    assert job_status(str(tmp_path / "out")).orphans == 0
    assert data.made(tmp_path / "out") == data.made(tmp_path / "alone")


def entries(output: Path) -> int:
    return len(list((output / "manifest").glob("*")))
