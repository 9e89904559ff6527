"""Filters in the store: SQL agrees with the plain evaluation, indexed or not, and `top_k` is kept."""

from __future__ import annotations

from datetime import date, datetime

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_rerank import BM25Index, FaissStore
from qwen_rerank.errors import InvalidInputError
from qwen_rerank.filters import matches, parse_filter
from qwen_rerank.store import CorruptStoreError, StoreReadOnlyError
from qwen_rerank.store.filter_sql import compile_filter
from qwen_rerank.testing import HashEmbedder
from qwen_rerank.types import Document

KEYS = ["a", "b", "c d", 'q"uote', "数"]
TEXTS = ["", "x", "y", "zh", "数", "2024-05-01", "2024-05-01T12:00:00+08:00", "2024-05-02", "2024-02-30", "'", "%"]
NUMBERS = [-3, 0, 1, 2, 2.0, 2**63 - 1, -(2**63), 0.1, -1.5, 1e300, 0.30000000000000004]
SCALARS = [None, True, False, *NUMBERS, *TEXTS]
LISTS = [[], ["x"], [1, True, None], ["数", 2.0, "2024-05-01"], [["x"]], [{"a": 1}]]
VALUES = [*SCALARS, *LISTS, {"a": 1}, 2**70]
CONTENTS = [
    {},
    *({key: value} for key in KEYS for value in VALUES),
    *({"a": a, "数": b} for a in VALUES[::3] for b in VALUES[::4]),
]

_scalars = st.sampled_from(SCALARS)
_dates = st.dates(date(2024, 4, 30), date(2024, 5, 3)) | st.datetimes(datetime(2024, 5, 1), datetime(2024, 5, 2))
_ordered = st.sampled_from([*NUMBERS, *TEXTS]) | _dates
_plain_tests = (
    st.dictionaries(st.sampled_from(["$eq", "$ne", "$contains"]), _scalars | _dates, min_size=1, max_size=2)
    | st.dictionaries(st.sampled_from(["$gt", "$gte", "$lt", "$lte"]), _ordered, min_size=1, max_size=2)
    | st.dictionaries(st.sampled_from(["$in", "$nin"]), st.lists(_scalars | _dates, max_size=4), min_size=1)
    | st.fixed_dictionaries({"$exists": st.booleans()})
)
_tests = _plain_tests | st.fixed_dictionaries({"$not": _plain_tests})
_filters = st.dictionaries(st.sampled_from(KEYS), _tests | _scalars | _dates | st.just([]), max_size=2)
for _ in range(3):
    _several = st.lists(_filters, min_size=1, max_size=3)
    _filters = _filters | st.one_of(
        st.fixed_dictionaries({"$not": _filters}),
        st.fixed_dictionaries({"$or": _several}),
        st.fixed_dictionaries({"$and": _several}),
    )


@pytest.fixture(scope="module", params=[(), ("a", "c d", "数")], ids=["no index", "indexed"])
def shelves(tmp_path_factory, request):
    with FaissStore.create(tmp_path_factory.mktemp("f") / "s", HashEmbedder(2), indexed_fields=request.param) as store:
        store.add([Document(str(row), "word", metadata) for row, metadata in enumerate(CONTENTS, start=1)])
        yield store


@settings(max_examples=250, suppress_health_check=[HealthCheck.too_slow])
@given(_filters)
def test_sql_keeps_what_the_plain_evaluation_keeps(shelves, filter):
    condition = parse_filter(filter)
    expected = [row for row, metadata in enumerate(CONTENTS, start=1) if matches(condition, metadata)]

    compiled = compile_filter(filter, declared=shelves._settings.indexed_fields)
    assert shelves._database.matching_rows(*compiled).tolist() == expected


@pytest.mark.parametrize("filter", [{"n": {"$lt": 3}}, {"n": {"$in": [1, 2, 0]}}, {"$not": {"n": {"$gte": 3}}}])
def test_the_store_and_bm25_take_the_same_filters(path, embedder, filter):
    documents = [Document(str(i), f"apple tree {i}", {"n": i}) for i in range(9)]
    with FaissStore.create(path, embedder) as store:
        store.add(documents)

        for stage in (store, BM25Index(documents)):
            assert {hit.document.id for hit in stage.search("apple", 9, filter=filter)} == {"0", "1", "2"}
            assert len(stage.search("apple", 2, filter=filter)) == 2
            with pytest.raises(InvalidInputError, match=r"there are \$eq"):
                stage.search("apple", 2, filter={"n": {"$like": 1}})


@pytest.mark.parametrize("kind", ["$not", "$or", "$and", "field"])
def test_the_deepest_and_widest_filter_is_compiled(shelves, kind):
    filter = {"a": {"$contains": date(2024, 5, 1), "$in": [1, "x", None]}, "b": {"$ne": 3.5}}
    for _ in range(7):
        wrapped = filter if kind == "$not" else [filter, {"b": {"$gt": "x"}}]
        filter = {"a": {"$not": {"$not": {"$eq": 1}}}} if kind == "field" else {kind: wrapped, "a": {"$gte": 1}}
    shelves._database.matching_rows(*compile_filter(filter))
    deep: dict = {"$or": [{f"k{i}": i} for i in range(230)]}
    for level in range(2):
        deep = {"$or" if level else "$and": [deep, *({f"k{i}": {"$contains": i}} for i in range(230))]}
    shelves._database.matching_rows(*compile_filter(deep))
    wide = {"$or": [{"a": {"$not": {"$lt": i}}, "b": i} for i in range(300)]}

    assert shelves._database.matching_rows(*compile_filter(wide)).size


@pytest.mark.parametrize("index", ["Flat", "HNSW8"])
def test_a_filter_that_keeps_few_or_many_still_gives_top_k(path, embedder, index):
    with FaissStore.create(path, embedder, index=index, indexed_fields=["n"]) as store:
        store.add([Document(str(i), f"apple tree {i}", {"n": i}) for i in range(600)])

        for kept in (1, 20, 300):
            assert len(store.search("apple tree", 20, filter={"n": {"$lt": kept}})) == min(20, kept)


def test_fields_can_be_declared_later_and_stay_declared(store, path, embedder):
    before = store.search("grows", 9, filter={"year": {"$gte": 2021}})
    store.declare(["year"])
    store.declare(["year", "kind"])
    store.add([Document("plum", "grows", {"year": 2022})])
    store.close()

    with FaissStore.open(path, embedder) as again:
        plan = again._database._all(
            "EXPLAIN QUERY PLAN SELECT row FROM documents WHERE json_type(metadata, '$.\"year\"') = 'integer'"
        )
        assert b"USING INDEX field_0" in plan[0][-1]
        found = {hit.document.id for hit in again.search("grows", 9, filter={"year": {"$gte": 2021}})}
        assert found == {hit.document.id for hit in before} | {"plum"}
        assert again.verify().ok


def test_a_reader_follows_a_declaration(store, path, embedder):
    with FaissStore.open(path, embedder, read_only=True) as reader:
        store.declare(["year"])
        store.add([Document("plum", "grows", {"year": 2022})])

        assert [hit.document.id for hit in reader.search("grows", 9, filter={"year": 2022})] == ["plum"]
        with pytest.raises(StoreReadOnlyError):
            reader.declare(["kind"])


@pytest.mark.parametrize("fields", ["year", [3], ['a"b'], [""], ["$x"], ["a\0"], None])
def test_what_cannot_be_declared_is_refused(store, path, embedder, fields):
    with pytest.raises(InvalidInputError, match="indexed_fields"):
        store.declare(fields)
    with pytest.raises(InvalidInputError, match="indexed_fields"):
        FaissStore.create(path / "new", embedder, indexed_fields=fields)


@pytest.mark.parametrize(
    "change", ["DROP INDEX field_0", "CREATE INDEX field_7 ON documents (json_type(x), json_extract(y))"]
)
def test_an_index_that_is_missing_or_too_much_is_noticed(store, path, embedder, change):
    import sqlite3

    store.declare(["year"])
    store.close()
    connection = sqlite3.connect(path / "documents.sqlite3")
    connection.execute(change.replace("(x)", "(metadata, '$.x')").replace("(y)", "(metadata, '$.x')"))
    connection.commit()
    connection.close()

    with pytest.raises(CorruptStoreError, match="declared fields"):
        FaissStore.open(path, embedder)


def test_a_remembered_filter_is_forgotten_with_the_next_commit(store):
    assert len(store.search("grows", 9, filter={"year": 2020})) == 2
    store.add([Document("plum", "grows", {"year": 2020})])

    assert len(store.search("grows", 9, filter={"year": 2020})) == 3


@pytest.mark.parametrize("mode", ["dense", "lexical", "hybrid"])
def test_a_filter_goes_on_after_the_newest_documents_were_deleted(tmp_path, mode):
    with FaissStore.create(tmp_path / "store", HashEmbedder(16)) as store:
        store.add([Document(f"{n}", f"apple {n}", {"n": n}) for n in range(20)])
        for newest in (19, 18, 17):
            store.delete([f"{newest}"])
            found = store.search("apple", 99, mode=mode, filter={"n": {"$gte": 15}})

    assert sorted(hit.document.id for hit in found) == ["15", "16"]
