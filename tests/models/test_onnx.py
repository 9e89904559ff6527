"""A graph from a stranger: what is no plain encoder is refused with a sentence, and memory has a bound."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from qwen_rerank.errors import (
    DeviceOutOfMemoryError,
    ModelCorruptError,
    ModelError,
    ModelIncompleteError,
    ScorerError,
    UnsafeModelError,
)
from qwen_rerank.models import onnx_session
from qwen_rerank.models.onnx_graph import read_graph
from qwen_rerank.models.onnx_session import OnnxSession, graph_digest
from tests.models.graphs import FLOAT, INT64, graph, growing, value

IDS = np.array([[1, 2, 3], [4, 5, 0]])


def write(folder, model):
    path = folder / "model.onnx"
    path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    return path


def load(folder, model):
    return OnnxSession(read_graph(write(folder, model)), output=None, rank=(1, 2), threads=1)


def test_a_plain_graph_runs(tmp_path):
    np.testing.assert_array_equal(load(tmp_path, graph()).run({"input_ids": IDS}), [[4], [6]])


def test_what_is_read_is_what_the_library_reads(tmp_path):
    """Our reader against the official one: names, types, shapes."""
    model = graph(inputs=[value("input_ids", INT64, ["rows", None])], outputs=[value("logits", FLOAT, ["rows", 1])])
    found = read_graph(write(tmp_path, model))

    assert found.inputs["input_ids"].shape == ("rows", None)
    assert (found.outputs["logits"].shape, found.outputs["logits"].dtype) == (("rows", 1), FLOAT)
    assert found.data == model.SerializeToString()


# Files


@pytest.mark.parametrize("data", [b"", b"\xff" * 100, b"no protobuf at all", b"\x3a\xff\xff\xff\xff\x0f", b"\x0b"])
def test_garbage_is_no_graph(tmp_path, data):
    with pytest.raises(ModelCorruptError, match=r"model\.onnx is no sound ONNX file"):
        load(tmp_path, data)


@settings(max_examples=150)
@given(st.data())
def test_a_damaged_file_is_refused_or_scores_and_never_does_worse(tmp_path_factory, data):
    said, whole = [], bytearray(graph().SerializeToString())
    if data.draw(st.booleans()):
        whole = whole[: data.draw(st.integers(0, len(whole) - 1))]
    else:
        for place in data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=4)):
            whole[place] = data.draw(st.integers(0, 255))
    try:
        load(tmp_path_factory.mktemp("m"), bytes(whole)).run({"input_ids": IDS})
    except (ModelError, ScorerError) as error:
        said.append(str(error))
    assert max(map(len, said), default=0) < 600


def test_a_pipe_and_a_missing_file_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "model.onnx")
    with pytest.raises(ModelCorruptError, match="no regular file"):
        read_graph(tmp_path / "model.onnx")
    with pytest.raises(ModelIncompleteError, match="is missing"):
        read_graph(tmp_path / "other.onnx")


def test_a_message_that_comes_twice_is_refused(tmp_path):
    """Protobuf would merge the two, and what was checked would not be what runs."""
    with pytest.raises(ModelCorruptError, match="field 7 comes twice"):
        load(tmp_path, graph().SerializeToString() + graph().SerializeToString())


def test_more_fields_than_any_model_has_are_not_read_to_the_end(tmp_path):
    with pytest.raises(ModelCorruptError, match="more than 1,000,000 fields"):
        load(tmp_path, b"\x08\x01" * 1_100_000)


# Weights elsewhere


def outside(location, *, offset=0, length=4):
    weight = TensorProto(name="w", data_type=FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    for key, entry in (("location", location), ("offset", offset), ("length", length)):
        weight.external_data.add(key=key, value=str(entry))
    return graph([helper.make_node("Identity", ["w"], ["o"])], [weight])


@pytest.mark.parametrize("location", ["../secret", "/etc/hostname", "a/b", "..", ".", "", "a\\b"])
def test_data_outside_the_folder_is_refused(tmp_path, location):
    (tmp_path.parent / "secret").write_bytes(b"1234")
    with pytest.raises(UnsafeModelError, match="outside its own folder"):
        load(tmp_path, outside(location))


def test_a_link_out_of_the_folder_is_refused_but_for_the_hubs_cache(tmp_path):
    folder, blobs = tmp_path / "snapshots/abc/onnx", tmp_path / "blobs"
    for path in (folder, blobs, tmp_path / "else"):
        path.mkdir(parents=True)
        (path / "0a").write_bytes(b"1234")
    (folder / "data").symlink_to(blobs / "0a")
    load(folder, outside("data"))

    (folder / "data").unlink()
    (folder / "data").symlink_to(tmp_path / "else/0a")
    with pytest.raises(UnsafeModelError, match="a link that leads out of its folder"):
        load(folder, outside("data"))


@pytest.mark.parametrize(
    ("where", "error", "message"),
    [
        ({"location": "none"}, ModelIncompleteError, "none is missing"),
        ({"location": "data", "offset": 1}, ModelCorruptError, "needs 4 bytes at 1 of data, which has 4"),
        ({"location": "data", "offset": -4}, ModelCorruptError, "needs 4 bytes at -4"),
        ({"location": "data", "length": 10**15}, ModelCorruptError, "needs 4 bytes"),
        ({"location": "data", "offset": "x"}, ModelCorruptError, "no number"),
    ],
)
def test_data_that_is_not_there_is_named(tmp_path, where, error, message):
    (tmp_path / "data").write_bytes(b"1234")
    with pytest.raises(error, match=message):
        load(tmp_path, outside(**where))


def test_the_digest_covers_weights_beside_the_graph(tmp_path):
    digests = set()
    for content in (b"1234", b"1235"):
        (tmp_path / "data").write_bytes(content)
        digests.add(graph_digest(read_graph(write(tmp_path, outside("data")))))

    assert len(digests) == 2


# Operators


def branch(name):
    return helper.make_graph([], name, [], [value("two", FLOAT, [1])])


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (
            helper.make_node("If", ["c"], ["o"], then_branch=branch("a"), else_branch=branch("b")),
            "the operator If, which runs other graphs",
        ),
        (helper.make_node("Loop", ["n", "c"], ["o"], body=branch("a")), "the operator Loop"),
        (helper.make_node("Scan", ["n"], ["o"], body=branch("a"), num_scan_inputs=1), "the operator Scan"),
        (helper.make_node("Relu", ["two"], ["o"], body=branch("a")), "a node Relu that holds a graph"),
        (helper.make_node("Evil", ["two"], ["o"], domain="com.evil"), r"'com\.evil\.Evil', which is none"),
        (helper.make_node("Evil", ["two"], ["o"]), "the operator 'Evil'"),
        (helper.make_node("EPContext", [], ["o"], domain="com.microsoft"), "EPContext"),
        (helper.make_node("RandomNormal", [], ["o"], shape=[1]), "RandomNormal"),
        (helper.make_node("StringConcat", ["a", "b"], ["o"]), "StringConcat"),
    ],
)
def test_an_operator_that_no_encoder_needs_is_refused(tmp_path, node, message):
    with pytest.raises(UnsafeModelError, match=message):
        load(tmp_path, graph([node]))


def test_functions_are_refused_before_they_call_each_other(tmp_path):
    call = helper.make_node("F", ["x"], ["y"], domain="own")
    function = helper.make_function("own", "F", ["x"], ["y"], [call], [helper.make_opsetid("own", 1)])

    with pytest.raises(UnsafeModelError, match="functions of its own, which could call each other without end"):
        load(tmp_path, graph([helper.make_node("F", ["two"], ["o"], domain="own")], functions=[function]))


def test_a_constant_with_data_elsewhere_is_refused(tmp_path):
    constant = TensorProto(name="w", data_type=FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    constant.external_data.add(key="location", value="/etc/hostname")

    with pytest.raises(UnsafeModelError, match="a constant 'w' with data in another file"):
        load(tmp_path, graph([helper.make_node("Constant", [], ["o"], value=constant)]))


# Sizes


@pytest.mark.parametrize("dims", [[10**12], [2**40, 2**40], [-1], [2**62, 4], [2], [0], [1] * 9])
@pytest.mark.parametrize("fields", [{"raw_data": b"1234"}, {"float_data": [1.0]}], ids=["raw", "typed"])
def test_a_weight_has_exactly_the_data_that_its_shape_says(tmp_path, dims, fields):
    weight = TensorProto(name="w", data_type=FLOAT, **fields)
    weight.dims.extend(dims)
    with pytest.raises(ModelCorruptError, match="the weight 'w'"):
        load(tmp_path, graph(weights=[weight]))


@pytest.mark.parametrize(
    "weight",
    [
        helper.make_tensor("w", TensorProto.INT64, [3], [1, 300, -1]),
        helper.make_tensor("w", TensorProto.INT32, [2], [-1, 70000]),
        helper.make_tensor("w", TensorProto.UINT8, [2], [200, 1]),
        helper.make_tensor("w", TensorProto.FLOAT16, [2], [1.0, 2.0]),
        helper.make_tensor("w", TensorProto.DOUBLE, [2, 1], [1.0, 2.0]),
        helper.make_tensor("w", TensorProto.BOOL, [], [True]),
        numpy_helper.from_array(np.zeros((0, 4), np.float32), "w"),
    ],
    ids=lambda weight: TensorProto.DataType.Name(weight.data_type),
)
def test_every_way_of_writing_a_weight_is_counted_right(tmp_path, weight):
    load(tmp_path, graph(weights=[weight]))


def test_a_string_weight_is_refused(tmp_path):
    with pytest.raises(UnsafeModelError, match="data type 8"):
        load(tmp_path, graph(weights=[helper.make_tensor("w", TensorProto.STRING, [1], [b"a"])]))


def test_a_run_may_not_allocate_more_than_its_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_session, "WORKING_BYTES", 10_000_000)

    np.testing.assert_array_equal(load(tmp_path, growing(1000)).run({"input_ids": IDS}), [[4], [6]])
    with pytest.raises(DeviceOutOfMemoryError, match="needs more than"):
        load(tmp_path, growing(2000)).run({"input_ids": IDS})
    with pytest.raises(DeviceOutOfMemoryError):
        load(tmp_path, growing(10**6)).run({"input_ids": IDS})


MEMORY = """
import sys
from pathlib import Path
import numpy as np
from qwen_rerank.models import onnx_graph, onnx_session

def kib(name):
    return int(Path("/proc/self/status").read_text().partition(name)[2].split()[0])

session = onnx_session.OnnxSession(onnx_graph.read_graph(Path(sys.argv[1])), output=None, rank=(1, 2), threads=1)
loaded = kib("VmHWM:")
session.run({"input_ids": np.ones((1, 3), np.int64)})
print(loaded, kib("VmHWM:"), kib("VmRSS:"))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to tell the peak of memory")
def test_loading_computes_nothing_and_a_run_gives_its_memory_back(tmp_path):
    """The graph makes a square of 400 MB, which could be folded into it."""
    path = write(tmp_path, growing(10_000))
    done = subprocess.run([sys.executable, "-c", MEMORY, str(path)], capture_output=True, text=True, check=True)
    loaded, peak, after = map(int, done.stdout.split())

    assert loaded < 300_000
    assert peak > loaded + 300_000
    assert after < loaded + 50_000


# What goes in and comes out


ROWS = ["rows", "tokens"]


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        ([value("pixels", INT64, ROWS)], None, "takes 'pixels', which is neither"),
        ([value("attention_mask", INT64, ROWS)], None, "takes attention_mask and no input_ids"),
        ([value("input_ids", FLOAT, ROWS)], None, r"takes input_ids as float32 \(rows, tokens\); it must be int64"),
        ([value("input_ids", INT64, ["rows"])], None, r"as int64 \(rows\)"),
        ([value("input_ids", INT64, [1, 512])], None, "export it with both sizes open"),
        (None, [value("floats", INT64, ROWS)], r"gives 'floats' as int64 \(rows, tokens\)"),
        (None, [value("logits", FLOAT, ["a", "b", "c"])], "expected float32 with 1 or 2 dimensions"),
        (None, [value("mean", FLOAT, ROWS), value("floats", FLOAT, ROWS)], "gives mean, floats and not one output"),
    ],
)
def test_wrong_inputs_and_outputs_are_named(tmp_path, inputs, outputs, message):
    with pytest.raises(ModelError, match=message):
        load(tmp_path, graph(inputs=inputs, outputs=outputs))


@pytest.mark.parametrize(("ids", "out"), [(TensorProto.INT32, FLOAT), (INT64, TensorProto.FLOAT16)])
def test_other_widths_of_ids_and_scores_are_taken(tmp_path, ids, out):
    model = graph(inputs=[value("input_ids", ids, ROWS)], outputs=[value("narrow", out, ["rows", 1])])
    model.graph.node.append(helper.make_node("Cast", ["logits"], ["narrow"], to=out))
    found = load(tmp_path, model).run({"input_ids": IDS})

    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, [[4], [6]])


def test_a_graph_that_does_not_fit_together_is_refused(tmp_path):
    with pytest.raises(ModelCorruptError, match="cannot be loaded"):
        load(tmp_path, graph([helper.make_node("Add", ["nowhere", "two"], ["o"])]))


def test_what_the_runtime_says_is_raised_and_not_printed(tmp_path, capfd):
    session = load(tmp_path, growing(10**7))
    with pytest.raises(DeviceOutOfMemoryError):
        session.run({"input_ids": IDS})
    assert capfd.readouterr() == ("", "")


def test_the_library_agrees_that_the_plain_graph_is_sound():
    """So the tests above refuse for the reason that they name."""
    onnx.checker.check_model(graph())
    onnx.checker.check_model(growing(10))
