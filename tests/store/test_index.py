from __future__ import annotations

import logging
from types import SimpleNamespace

import faiss
import numpy as np
import pytest

from qwen_rerank.errors import InvalidInputError
from qwen_rerank.store import FaissStore
from qwen_rerank.store.faiss_build import gpu_resources
from qwen_rerank.store.index import VectorIndex, parse_factory
from qwen_rerank.testing import HashEmbedder


def unit(n: int, dim: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def filled(factory: str, n: int = 500, dim: int = 16, **options) -> tuple[VectorIndex, np.ndarray]:
    index, vectors = VectorIndex(faiss, factory, dim, **options), unit(n, dim)
    index.add(np.arange(1, n + 1) * 2, vectors)  # even row numbers
    return index, vectors


@pytest.mark.parametrize(
    ("given", "factory"), [("auto", "Flat"), ("Flat", "Flat"), ("HNSW32", "HNSW32"), ("HNSW016,Flat", "HNSW16")]
)
def test_parse_factory(given, factory):
    assert parse_factory(given) == factory


@pytest.mark.parametrize("given", ["HNSW", "HNSW3", "HNSW129", "IVF8,Flat", "flat", "", None, "Flat\n"])
def test_other_factories_are_refused_with_what_there_is(given):
    with pytest.raises(InvalidInputError, match="'HNSW32'"):
        parse_factory(given)


@pytest.mark.parametrize("n_queries", [1, 50])
def test_flat_is_brute_force(n_queries):
    index, vectors = filled("Flat")
    queries = unit(n_queries, 16, seed=1)

    for query, (rows, scores) in zip(queries, index.search(queries, 10), strict=True):
        order = np.argsort(-(vectors @ query), kind="stable")[:10]
        assert rows.tolist() == ((order + 1) * 2).tolist()
        np.testing.assert_allclose(scores, (vectors @ query)[order], atol=1e-6)


@pytest.mark.parametrize("factory", ["Flat", "HNSW8"])
@pytest.mark.parametrize("keep", [1, 7, 40, 450])
def test_a_search_among_few_gives_as_many_as_there_are(factory, keep):
    index, _ = filled(factory)
    allowed = np.random.default_rng(2).permutation(500)[:keep] + 1

    rows, _ = index.search(unit(1, 16, seed=3), 40, allowed * 2)[0]

    assert len(rows) == min(40, keep)
    assert set(rows) <= set(allowed * 2)


@pytest.mark.parametrize("factory", ["Flat", "HNSW8"])
def test_removed_rows_are_never_found(factory):
    index, _ = filled(factory)
    index.remove(np.arange(2, 902, 2))

    rows, _ = index.search(unit(1, 16, seed=3), 500)[0]

    assert sorted(rows) == list(range(902, 1002, 2))
    assert (len(index), index.dead) == (50, 450)


def test_many_dead_vectors_of_flat_are_dropped():
    index, vectors = filled("Flat", n=2000)
    before = index.search(vectors[1990:1991], 5)[0]
    index.remove(np.arange(2, 2402, 2))

    assert (len(index), index.dead) == (800, 0)
    after = index.search(vectors[1990:1991], 5, np.array(before[0]))[0]
    assert set(after[0]) <= set(before[0])
    np.testing.assert_array_equal(index.vectors(), vectors[1200:])


def test_hnsw_finds_nearly_what_flat_finds():
    flat, _ = filled("Flat", n=3000)
    graph, _ = filled("HNSW16", n=3000)
    queries = unit(50, 16, seed=4)

    pairs = zip(flat.search(queries, 10), graph.search(queries, 10), strict=True)
    found = np.mean([len(set(a[0]) & set(b[0])) / 10 for a, b in pairs])

    assert found > 0.95


def test_a_file_round_trip_keeps_every_answer(tmp_path):
    for factory in ("Flat", "HNSW8"):
        index, _ = filled(factory)
        index.write(tmp_path / factory)
        again = VectorIndex(faiss, factory, 16)
        again.read(tmp_path / factory)
        queries = unit(5, 16, seed=5)
        for (rows, scores), (rows2, scores2) in zip(index.search(queries, 9), again.search(queries, 9), strict=True):
            assert (rows.tolist(), scores.tolist()) == (rows2.tolist(), scores2.tolist())


def test_a_file_of_another_kind_is_refused(tmp_path):
    filled("HNSW8")[0].write(tmp_path / "file")

    with pytest.raises(ValueError, match="another kind"):
        VectorIndex(faiss, "Flat", 16).read(tmp_path / "file")


def test_a_rebuilt_graph_says_that_results_may_differ(tmp_path, caplog):
    embedder = HashEmbedder(16)
    with FaissStore.create(tmp_path / "store", embedder, index="HNSW8") as store:
        store.add(["red apple", "green pear"])
    next((tmp_path / "store").glob("index-*")).unlink()

    FaissStore.open(tmp_path / "store", embedder).close()

    assert "its results may differ" in caplog.text


# The GPU, with a FAISS that claims to have one


class FakeGpu:
    """FAISS's GPU half, in front of the CPU's index."""

    METRIC_INNER_PRODUCT = faiss.METRIC_INNER_PRODUCT

    def __init__(self, *, gpus: int = 1, broken: str = "") -> None:
        self.gpus, self.broken, self.searches = gpus, broken, 0

    def __getattr__(self, name):
        return getattr(faiss, name)

    def StandardGpuResources(self):
        return object()

    def get_num_gpus(self):
        return self.gpus

    def index_cpu_to_gpu(self, resources, device, index):
        copy = faiss.clone_index(index)

        def search(vectors, k):
            if self.broken == "raises":
                raise RuntimeError("CUDA error 209 no kernel image is available")
            self.searches += 1
            scores, found = copy.search(vectors, k)
            return scores, found[::-1] if self.broken == "wrong" else found

        class OnGpu:
            ntotal = property(lambda _: copy.ntotal)
            add = staticmethod(copy.add)

        on_gpu = OnGpu()
        on_gpu.search = search
        return on_gpu


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (SimpleNamespace(), "CPU build"),
        (FakeGpu(gpus=0), "sees no GPU"),
        (FakeGpu(broken="raises"), "no kernel image"),
        (FakeGpu(broken="wrong"), "wrong answers"),
    ],
)
def test_without_a_gpu_that_works_the_reason_is_in_the_log(module, reason, caplog):
    caplog.set_level(logging.INFO)

    assert gpu_resources(module, "auto") is None
    assert reason in caplog.text
    with pytest.raises(InvalidInputError, match=reason):
        gpu_resources(module, "cuda")
    assert gpu_resources(module, "cpu") is None


def test_flat_searches_run_on_the_gpu_and_keep_up_with_what_is_added():
    fake = FakeGpu()
    index = VectorIndex(fake, "Flat", 16, gpu=gpu_resources(fake, "auto"))
    plain, vectors = filled("Flat")
    queries, done = unit(3, 16, seed=6), fake.searches
    for start in (0, 250):
        index.add(np.arange(start + 1, start + 251) * 2, vectors[start : start + 250])
        index.search(queries, 5)

    assert fake.searches == done + 2
    assert [rows.tolist() for rows, _ in index.search(queries, 5)] == [
        rows.tolist() for rows, _ in plain.search(queries, 5)
    ]


def test_filtered_searches_stay_on_the_cpu():
    fake = FakeGpu()
    index, _ = filled("Flat", gpu=object())
    index._faiss = fake

    index.search(unit(1, 16), 5, np.arange(100))

    assert fake.searches == 0


@pytest.mark.gpu
def test_the_gpu_agrees_with_the_cpu():
    resources = gpu_resources(faiss, "cuda")
    on_gpu, _ = filled("Flat", n=5000, gpu=resources)
    plain, _ = filled("Flat", n=5000)
    queries = unit(50, 16, seed=7)

    for (_, a), (_, b) in zip(on_gpu.search(queries, 100), plain.search(queries, 100), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
