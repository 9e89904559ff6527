"""Small ONNX models, made node by node, for tests to change."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper, numpy_helper

INT64, FLOAT = TensorProto.INT64, TensorProto.FLOAT


def value(name, dtype, shape):
    return helper.make_tensor_value_info(name, dtype, shape)


def graph(nodes=(), weights=(), *, inputs=None, outputs=None, **options):
    """Return a model whose output is twice the mean of its ids, with more nodes before it."""
    own = [
        helper.make_node("Cast", ["input_ids"], ["floats"], to=FLOAT),
        helper.make_node("ReduceMean", ["floats"], ["mean"], axes=[1], keepdims=1),
        helper.make_node("Mul", ["mean", "two"], ["logits"]),
    ]
    content = helper.make_graph(
        [*nodes, *own],
        "g",
        inputs or [value("input_ids", INT64, ["rows", "tokens"])],
        outputs or [value("logits", FLOAT, ["rows", 1])],
        [numpy_helper.from_array(np.float32([2]), "two"), *weights],
    )
    return helper.make_model(content, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, **options)


def growing(size):
    """Return a graph of some hundred bytes that makes a square of `size` in between."""
    shape = numpy_helper.from_array(np.int64([size, size]), "shape")
    nodes = [
        helper.make_node("ConstantOfShape", ["shape"], ["square"]),
        helper.make_node("ReduceMax", ["square"], ["zero"], keepdims=0),
        helper.make_node("Add", ["two", "zero"], ["three"]),
    ]
    model = graph(nodes, [shape])
    model.graph.node[-1].input[1] = "three"
    return model
