from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import faiss
import numpy as np
import pytest

from qwen_rerank.errors import InvalidInputError
from qwen_rerank.store import FaissStore, InvalidEmbeddingError
from qwen_rerank.store.faiss_build import gpu_resources
from qwen_rerank.store.index import VectorIndex, parse_factory, planned
from qwen_rerank.store.tuning import measure_effort
from qwen_rerank.testing import HashEmbedder
from qwen_rerank.types import Document


def unit(n: int, dim: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def filled(factory: str, n: int = 500, dim: int = 16, **options) -> tuple[VectorIndex, np.ndarray]:
    vectors = unit(n, dim)
    index = VectorIndex(faiss, factory, dim, stored=lambda rows: vectors[rows // 2 - 1], **options)
    index.start(n, lambda count: vectors[:count])
    index.add(np.arange(1, n + 1) * 2, vectors)  # even row numbers
    return index, vectors


@pytest.mark.parametrize(
    ("given", "factory"),
    [
        ("auto", "auto"),
        ("Flat", "Flat"),
        ("HNSW32", "HNSW32"),
        ("HNSW016,Flat", "HNSW16"),
        ("HNSW32,SQ8,RFlat", "HNSW32,SQ8,RFlat"),
        ("IVF8,Flat", "IVF8,Flat"),
        ("IVF64,SQ8", "IVF64,SQ8"),
        ("IVF64,PQ8", "IVF64,PQ8"),
        ("SQfp16", "SQfp16"),
        ("IVF64,SQ8,RFlat", "IVF64,SQ8,RFlat"),
    ],
)
def test_parse_factory(given, factory):
    assert parse_factory(given, 16) == factory


@pytest.mark.parametrize(
    "given",
    [
        "HNSW",
        "HNSW3",
        "HNSW129",
        "flat",
        "",
        None,
        3,
        "Flat\n",
        "IVF8",
        "IVF8,PQ7",
        "PCA8,Flat",
        "PQ4x4fs",
        "HNSW8,SQ8",
        "HNSW8,Flat,SQ8,RFlat",
    ],
)
def test_other_factories_are_refused_with_what_there_is(given):
    with pytest.raises(InvalidInputError, match="'HNSW32' or 'HNSW32,SQ8,RFlat'"):
        parse_factory(given, 16)


@pytest.mark.parametrize(
    ("factory", "count", "kind"),
    [
        ("auto", 0, "Flat"),
        ("auto", 99_999, "Flat"),
        ("auto", 100_000, "HNSW32,SQ8,RFlat"),
        ("auto", 1_000_000, "HNSW32,SQ8,RFlat"),
        ("HNSW32", 1, "HNSW32"),
        ("IVF8,Flat", 319, "Flat"),
        ("IVF8,Flat", 320, "IVF8,Flat"),
        ("SQ8", 999, "Flat"),
        ("HNSW32,SQ8,RFlat", 999, "Flat"),
    ],
)
def test_the_index_is_chosen_by_size(factory, count, kind):
    assert planned(factory, count) == kind


def mask(rows, size=1001):
    """For each row number whether it is among these."""
    found = np.zeros(size, dtype=bool)
    found[rows] = True
    return found


@pytest.mark.parametrize("n_queries", [1, 50])
def test_flat_is_brute_force(n_queries):
    index, vectors = filled("Flat")
    queries = unit(n_queries, 16, seed=1)

    for query, (rows, scores) in zip(queries, index.search(queries, 10), strict=True):
        order = np.argsort(-(vectors @ query), kind="stable")[:10]
        assert rows.tolist() == ((order + 1) * 2).tolist()
        np.testing.assert_allclose(scores, (vectors @ query)[order], atol=1e-6)


@pytest.mark.parametrize("factory", ["Flat", "HNSW8", "IVF8,SQ8", "IVF8,Flat", "IVF8,SQ8,RFlat"])
@pytest.mark.parametrize("keep", [1, 7, 40, 450])
def test_a_search_among_few_gives_as_many_as_there_are(factory, keep):
    index, _ = filled(factory)
    allowed = np.sort(np.random.default_rng(2).permutation(500)[:keep]) + 1

    rows, _ = index.search(unit(1, 16, seed=3), 40, mask(allowed * 2))[0]

    assert len(rows) == min(40, keep)
    assert set(rows) <= set(allowed * 2)


@pytest.mark.parametrize("factory", ["Flat", "HNSW8", "IVF8,SQ8", "SQ8", "IVF8,SQ8,RFlat"])
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
    after = index.search(vectors[1990:1991], 5, mask(before[0], size=4001))[0]
    assert set(after[0]) <= set(before[0])
    np.testing.assert_array_equal(index.vectors(), vectors[1200:])


def test_hnsw_finds_nearly_what_flat_finds():
    flat, _ = filled("Flat", n=3000)
    graph, _ = filled("HNSW16", n=3000)
    queries = unit(50, 16, seed=4)

    pairs = zip(flat.search(queries, 10), graph.search(queries, 10), strict=True)
    found = np.mean([len(set(a[0]) & set(b[0])) / 10 for a, b in pairs])

    assert found > 0.95


@pytest.mark.parametrize(
    "factory", ["IVF32,SQ8", "IVF32,Flat", "IVF32,PQ8x6", "SQ4", "IVF32,SQ8,RFlat", "SQ4,RFlat", "HNSW16,SQ8,RFlat"]
)
def test_lists_and_few_bits_find_nearly_what_flat_finds_with_its_scores(factory):
    flat, vectors = filled("Flat", n=3000)
    lists, _ = filled(factory, n=3000, effort=32)
    queries = unit(50, 16, seed=4)

    found = []
    for query, a, b in zip(queries, flat.search(queries, 10), lists.search(queries, 10), strict=True):
        found.append(len(set(a[0]) & set(b[0])) / 10)
        np.testing.assert_allclose(b[1], vectors[b[0] // 2 - 1] @ query, atol=1e-6)
    assert np.mean(found) > 0.85


@pytest.mark.parametrize("factory", ["IVF32,SQ8", "IVF32,SQ8,RFlat", "HNSW16", "HNSW16,SQ8,RFlat"])
@pytest.mark.parametrize("keep", [10, 300, 2500])
def test_a_filtered_search_finds_nearly_all(keep, factory):
    flat, _ = filled("Flat", n=3000)
    lists, _ = filled(factory, n=3000, effort=16)
    allowed = np.sort(np.random.default_rng(2).permutation(3000)[:keep] + 1) * 2
    pairs = zip(*(one.search(unit(30, 16, seed=5), 10, mask(allowed, size=6001)) for one in (flat, lists)), strict=True)

    assert np.mean([len(set(a[0]) & set(b[0])) / 10 for a, b in pairs]) > 0.95


def test_a_store_that_grows_takes_the_index_that_suits_it(tmp_path, monkeypatch):
    monkeypatch.setattr("qwen_rerank.store.index._AUTO_FLAT", 600)
    embedder = HashEmbedder(16)
    vectors = unit(1200, 16)
    with FaissStore.create(tmp_path / "store", embedder) as store:
        for start in range(0, 1200, 300):
            names = [Document(str(n), f"text {n}") for n in range(start, start + 300)]
            store.add(names, vectors=vectors[start : start + 300])
        assert store._vectors.index.kind == "HNSW32,SQ8,RFlat"
        before = store.search_vectors(vectors[:5], 9)
        assert store.verify().ok
    with FaissStore.open(tmp_path / "store", embedder) as again:
        assert again._vectors.index.kind == "HNSW32,SQ8,RFlat"
        assert again.search_vectors(vectors[:5], 9) == before
    next((tmp_path / "store").glob("index-*")).unlink()
    with FaissStore.open(tmp_path / "store", embedder) as anew:
        assert (len(anew._vectors.index), anew._vectors.index.kind) == (1200, "HNSW32,SQ8,RFlat")


@pytest.fixture
def tuned_lists(tmp_path, monkeypatch):
    """A store "auto" of lists, as it once built them, tuned; from now on it builds graphs."""
    monkeypatch.setattr("qwen_rerank.store.index._AUTO_FLAT", 400)
    with monkeypatch.context() as before, FaissStore.create(tmp_path / "s", HashEmbedder(16), words=False) as store:
        before.setattr("qwen_rerank.store.index.planned", lambda _, count: "IVF8,SQ8" if count else "Flat")
        store.add([str(n) for n in range(500)], vectors=unit(500, 16))
        assert store.tune(target=0.5, top_k=10)[-1].effort == store._vectors.index.effort > 0
        assert store._vectors.index.kind == "IVF8,SQ8"
    return tmp_path / "s"


@pytest.mark.parametrize("change", ["none", "compact", "rebuild_index", "lost file"])
def test_an_effort_that_was_tuned_for_lists_is_none_for_a_graph(tuned_lists, change, caplog):
    if change == "lost file":
        next(tuned_lists.glob("index-*")).unlink()
    with FaissStore.open(tuned_lists, HashEmbedder(16)) as store:
        if change in ("compact", "rebuild_index"):
            getattr(store, change)()
        now = (store._vectors.index.kind, store._vectors.index.effort > 0)
        assert now == (("IVF8,SQ8", True) if change == "none" else ("HNSW32,SQ8,RFlat", False))
    assert caplog.text.count("store tune") == (change != "none")
    caplog.clear()
    with FaissStore.open(tuned_lists, HashEmbedder(16)) as again:
        assert (again._vectors.index.kind, again._vectors.index.effort > 0) == now
        assert again.verify().ok
    assert not caplog.text


def test_a_reader_never_takes_the_nodes_of_a_graph_for_its_lists(tuned_lists):
    with (
        FaissStore.open(tuned_lists, HashEmbedder(16), read_only=True) as reader,
        FaissStore.open(tuned_lists, HashEmbedder(16)) as writer,
    ):
        assert reader._vectors.index.effort > 0
        writer.compact()
        kept = writer.tune(target=0.5, top_k=10)[-1].effort
        assert len(reader.search_vectors(unit(1, 16), 5)[0]) == 5
        assert (writer._vectors.index.effort, reader._vectors.index.effort) == (kept, 0)


def test_tuning_of_lists_is_not_kept_where_a_graph_came_in_meanwhile(tuned_lists, monkeypatch):
    with FaissStore.open(tuned_lists, HashEmbedder(16)) as store:
        monkeypatch.setattr("qwen_rerank.store.faiss_store.exact_rows", lambda *_: store.rebuild_index() or [{1}] * 200)
        assert not any(one.chosen for one in store.tune(top_k=10))
        assert (store._vectors.index.looks_into, store._vectors.index.effort) == ("nodes", 0)


def test_an_index_of_one_kind_keeps_its_effort_when_built_anew(tmp_path):
    with FaissStore.create(tmp_path / "s", HashEmbedder(16), index="IVF8,SQ8", words=False) as store:
        store.add([str(n) for n in range(500)], vectors=unit(500, 16))
        effort = store.tune(target=0.5, top_k=10)[-1].effort
        store.compact()
        assert store._vectors.index.effort == effort
    next((tmp_path / "s").glob("index-*")).unlink()
    with FaissStore.open(tmp_path / "s", HashEmbedder(16)) as again:
        assert again._vectors.index.effort == effort


def test_searches_and_writes_go_on_while_the_index_is_built_anew(tmp_path, monkeypatch):
    embedder = HashEmbedder(16)
    with FaissStore.create(tmp_path / "store", embedder, index="HNSW8") as store:
        store.add([f"apple {n}" for n in range(50)], vectors=unit(50, 16))
        real = VectorIndex.add

        def slow(index, rows, vectors):
            monkeypatch.setattr(VectorIndex, "add", real)
            with ThreadPoolExecutor(1) as other:  # another thread would wait for ever if the store were held
                assert other.submit(lambda: len(store.search("apple", 9))).result(timeout=30) == 9
                other.submit(lambda: store.add(["meanwhile"], vectors=unit(1, 16, seed=9))).result(timeout=30)
            store.delete(store.ids()[:1])
            real(index, rows, vectors)

        monkeypatch.setattr(VectorIndex, "add", slow)
        store.compact()
        assert (len(store), len(store._vectors.index), store.verify().ok) == (50, 50, True)


def test_tuning_keeps_the_first_effort_that_finds_enough(tmp_path):
    vectors, embedder = unit(2000, 16), HashEmbedder(16)
    with FaissStore.create(tmp_path / "s", embedder, index="IVF32,SQ8", words=False) as store:
        assert store.tune() == []
        store.add([str(n) for n in range(2000)], vectors=vectors)
        tried = store.tune(target=0.9, top_k=10)
        assert [one.effort for one in tried] == [1, 2, 3, 4, 6, 8, 11, 16, 23, 32][: len(tried)]
        assert (
            [one.recall_low >= 0.9 for one in tried]
            == [one.chosen for one in tried]
            == [*[False] * (len(tried) - 1), True]
        )
        kept = store.tune(["apple", "pear tree"], top_k=10)[-1]
    with FaissStore.open(tmp_path / "s", embedder) as again:
        assert (again._vectors.index.effort, kept.chosen) == (kept.effort, True)
        assert again.verify().ok


def test_one_query_is_no_proof_and_no_recall_is_below_nothing():
    index, _ = filled("IVF8,SQ8")
    queries, exact = unit(3, 16, seed=4), [{2, 4}, set(), set()]
    one = measure_effort(index, queries[:1], [set(index.search(queries[:1], 2)[0][0].tolist())], 2, 8)
    some = measure_effort(index, queries, [set(index.search(queries[:1], 2)[0][0].tolist()), *exact[1:]], 2, 8)

    assert (one.recall, one.recall_low) == (1.0, 0.0)
    assert (some.recall, some.recall_low) == (pytest.approx(1 / 3), 0.0)


@pytest.mark.parametrize(("top_k", "first"), [(10, 32), (100, 128), (2000, 2500)])
def test_a_graph_is_not_tuned_to_fewer_nodes_than_are_found(top_k, first):
    """Fewer would be kept for what they were not: a search for the best 100 looks into 125, whatever it is told."""
    graph, _ = filled("HNSW8,SQ8,RFlat", n=1000)

    assert graph.efforts(top_k)[0] == first
    assert filled("IVF8,SQ8")[0].efforts(top_k)[0] == 1


def test_an_exact_index_needs_no_tuning(store):
    assert store.tune() == []
    with pytest.raises(InvalidInputError, match="target"):
        store.tune(target=2)


def test_float16_vectors_take_half_the_space_and_keep_their_scores(tmp_path):
    vectors, embedder = unit(200, 64), HashEmbedder(64)
    sizes = {}
    for kind in ("float32", "float16"):
        with FaissStore.create(tmp_path / kind, embedder, vectors=kind, words=False) as store:
            store.add([str(n) for n in range(200)], vectors=vectors)
            found = store.search_vectors(vectors[:3], 5)
            sizes[kind] = store._database._all("SELECT sum(length(vector)) FROM vectors")[0][0]
        with FaissStore.open(tmp_path / kind, embedder) as again:
            assert (again.search_vectors(vectors[:3], 5), again.verify().ok) == (found, True)
            assert [hits[0].score for hits in found] == pytest.approx([1, 1, 1], abs=1e-3)
    assert sizes["float16"] * 2 == sizes["float32"]


def test_a_vector_too_large_for_float16_is_refused(tmp_path):
    with (
        FaissStore.create(tmp_path / "s", HashEmbedder(2), metric="ip", vectors="float16") as store,
        pytest.raises(InvalidEmbeddingError, match="infinity"),
    ):
        store.add(["a"], vectors=np.array([[1e6, 0]]))


def test_a_file_round_trip_keeps_every_answer(tmp_path):
    for factory in ("Flat", "HNSW8", "IVF8,SQ8", "IVF8,SQ8,RFlat"):
        index, _ = filled(factory)
        index.write(tmp_path / factory)
        again = VectorIndex(faiss, factory, 16, stored=index._stored)
        again.read(tmp_path / factory)
        queries = unit(5, 16, seed=5)
        for (rows, scores), (rows2, scores2) in zip(index.search(queries, 9), again.search(queries, 9), strict=True):
            assert (rows.tolist(), scores.tolist()) == (rows2.tolist(), scores2.tolist())


@pytest.mark.parametrize("before", ["IVF8,SQ8", "IVF8,SQ8,RFlat"])
def test_a_file_of_lists_that_auto_built_before_is_still_read(tmp_path, monkeypatch, before):
    monkeypatch.setattr("qwen_rerank.store.index._AUTO_FLAT", 400)
    lists, _ = filled(before)
    lists.write(tmp_path / "file")
    again = VectorIndex(faiss, "auto", 16, stored=lists._stored)
    again.read(tmp_path / "file")

    assert (again.kind, again.outgrown) == (before, False)
    queries = unit(5, 16, seed=5)
    for (rows, _), (rows2, _) in zip(lists.search(queries, 9), again.search(queries, 9), strict=True):
        assert rows.tolist() == rows2.tolist()


def test_a_file_of_another_kind_is_refused(tmp_path):
    filled("HNSW8")[0].write(tmp_path / "file")

    with pytest.raises(ValueError, match="another kind"):
        VectorIndex(faiss, "Flat", 16).read(tmp_path / "file")


@pytest.mark.parametrize(("factory", "says"), [("HNSW8", True), ("auto", True), ("HNSW32,SQ8,RFlat", False)])
def test_a_rebuilt_graph_says_that_results_may_differ(tmp_path, caplog, monkeypatch, factory, says):
    monkeypatch.setattr("qwen_rerank.store.index._AUTO_FLAT", 2)  # the third is kept as it is: too few to train with
    embedder = HashEmbedder(16)
    with FaissStore.create(tmp_path / "store", embedder, index=factory) as store:
        store.add(["red apple", "green pear"])
    next((tmp_path / "store").glob("index-*")).unlink()

    FaissStore.open(tmp_path / "store", embedder).close()

    assert ("its results may differ" in caplog.text) == says


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

    index.search(unit(1, 16), 5, mask(np.arange(100)))

    assert fake.searches == 0


@pytest.mark.gpu
def test_the_gpu_agrees_with_the_cpu():
    resources = gpu_resources(faiss, "cuda")
    on_gpu, _ = filled("Flat", n=5000, gpu=resources)
    plain, _ = filled("Flat", n=5000)
    queries = unit(50, 16, seed=7)

    for (_, a), (_, b) in zip(on_gpu.search(queries, 100), plain.search(queries, 100), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
