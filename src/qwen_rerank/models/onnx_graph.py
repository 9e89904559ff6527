"""An ONNX graph read and judged before any runtime sees it: only known operators, no data from elsewhere, no false sizes.

A graph is a program and its file may come from anybody. So the protobuf message is read here, field by field and without
copies, and everything in it that is not a plain encoder is refused. What the runtime may then allocate is bounded in
`onnx_session`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from qwen_rerank.errors import ModelCorruptError, ModelError, ModelIncompleteError, UnsafeModelError
from qwen_rerank.models.names import Kind
from qwen_rerank.regular_files import read_regular

# Where exporters put a graph, in the order in which one is taken: first those with the weights as they were trained.
# A pair of ours lies in one folder, as reranker.onnx and embedder.onnx.
GRAPHS = ("onnx/model.onnx", "model.onnx", "onnx/model_quantized.onnx", "model_quantized.onnx")
_MORE_GRAPHS = ("onnx/model_*.onnx", "model_*.onnx")
MAX_GRAPH_BYTES = 2 * 1024**3 - 1  # a protobuf message cannot be larger; larger weights lie beside it
_MAX_EXTERNAL_BYTES = 64 * 1024**3
_MAX_NODES = 50_000
_MAX_TENSORS = 50_000
_MAX_RANK = 8
_MAX_FIELDS = 1_000_000  # of all messages; bounds what reading costs

# What encoders of published cross-encoders and embedders are made of. Nothing here runs other graphs (If, Loop, Scan),
# reads files, or handles strings, images or random numbers.
_STANDARD = """
    Abs Add And ArgMax ArgMin Attention BatchNormalization BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast CastLike Ceil Celu Clip Concat Constant ConstantOfShape
    Conv Cos CumSum DequantizeLinear Div Dropout DynamicQuantizeLinear Einsum Elu Equal Erf Exp Expand EyeLike Flatten
    Floor Gather GatherElements GatherND Gelu Gemm Greater GreaterOrEqual HardSigmoid HardSwish Identity IsInf IsNaN
    LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax LpNormalization MatMul MatMulInteger Max Mean
    MeanVarianceNormalization Min Mish Mod Mul Neg NonZero Not OneHot Or PRelu Pad Pow QLinearMatMul QuantizeLinear
    RMSNormalization Range Reciprocal ReduceL1 ReduceL2 ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd
    ReduceSum ReduceSumSquare Relu Reshape RotaryEmbedding Round ScatterElements ScatterND Selu Shape Sigmoid Sign
    SimplifiedLayerNormalization Sin Size Slice Softmax Softplus Softsign Split Sqrt Squeeze Sub Sum Swish Tan Tanh Tile
    TopK Transpose Trilu Unsqueeze Where Xor
"""
# Fused forms that ONNX Runtime's and Optimum's optimisers write.
_FUSED = """
    Attention BiasGelu DequantizeLinear DynamicQuantizeMatMul EmbedLayerNormalization FastGelu FusedGemm FusedMatMul
    GatherBlockQuantized Gelu MatMulIntegerToFloat MatMulNBits MultiHeadAttention QAttention QEmbedLayerNormalization
    QGemm QLinearAdd QLinearConcat QLinearMul QLinearReduceMean QLinearSigmoid QLinearSoftmax QuantizeLinear QuickGelu
    RotaryEmbedding SkipLayerNormalization SkipSimplifiedLayerNormalization
"""
_OPERATORS = {
    domain: frozenset(names.split())
    for domain, names in {"": _STANDARD, "ai.onnx": _STANDARD, "com.microsoft": _FUSED}.items()
}
_BY_BATCH = ("DynamicQuantizeLinear", "DynamicQuantizeMatMul")
_CONTROL_FLOW = ("If", "Loop", "Scan", "SequenceMap")

# Bits of one element by TensorProto.DataType, and the field that holds elements one by one. Strings and complex numbers
# are left out: no encoder has them.
_BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 16: 16, 21: 4, 22: 4}
_FLOAT_DATA, _INT32_DATA, _INT64_DATA, _RAW_DATA, _DOUBLE_DATA, _UINT64_DATA = 4, 5, 7, 9, 10, 11
_ELEMENTS = {1: _FLOAT_DATA, 7: _INT64_DATA, 11: _DOUBLE_DATA, 12: _UINT64_DATA, 13: _UINT64_DATA} | dict.fromkeys(
    (2, 3, 4, 5, 6, 9, 10, 16), _INT32_DATA
)
TYPE_NAMES = {1: "float32", 2: "uint8", 3: "int8", 6: "int32", 7: "int64", 9: "bool", 10: "float16", 11: "float64"}

# Wire types of protobuf.
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
Fields = dict[int, list[int | memoryview]]


@dataclass(frozen=True, slots=True)
class Value:
    """An input or output of a graph.

    Attributes:
        name: Its name.
        dtype: TensorProto.DataType.
        shape: One entry a dimension, a name or None where it is open; None where even the rank is not said.
    """

    name: str
    dtype: int
    shape: tuple[int | str | None, ...] | None


@dataclass(frozen=True, slots=True)
class ExternalTensor:
    """A weight whose values lie in a file beside the graph.

    Attributes:
        name: Of the weight.
        dtype: TensorProto.DataType.
        shape: Its dimensions.
        path: The file.
        offset: Where in the file it begins, in bytes.
        n_bytes: How long it is.
    """

    name: str
    dtype: int
    shape: tuple[int, ...]
    path: Path
    offset: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Graph:
    """A graph that has passed every check.

    Attributes:
        path: Its file.
        data: The file's content, exactly what was checked.
        inputs: What it takes, by name.
        outputs: What it gives, by name.
        external: Weights that lie in files beside it.
        rounds_by_batch: Whether it rounds activations by the largest value of a whole batch.
    """

    path: Path
    data: bytes
    inputs: Mapping[str, Value]
    outputs: Mapping[str, Value]
    external: tuple[ExternalTensor, ...]
    rounds_by_batch: bool

    @property
    def n_bytes(self) -> int:
        """Bytes of graph and weights."""
        return len(self.data) + sum(tensor.n_bytes for tensor in self.external)


def read_graph(path: Path) -> Graph:
    """Return the graph in a file, checked.

    Raises:
        ModelIncompleteError: If the file, or one with weights that it names, is missing.
        ModelCorruptError: If it is no ONNX file, is cut short, or says sizes that its data do not have.
        UnsafeModelError: If it names data elsewhere, or operators that no encoder needs.
    """
    data = _content(path)
    try:
        return _Reader(path).graph(data)
    except (_Malformed, UnicodeDecodeError) as exc:
        raise ModelCorruptError(f"{path} is no sound ONNX file ({exc}); download it again.") from exc


def graph_files(graph: str | None) -> tuple[str, ...]:
    """Return the patterns of a model's files on the hub with one graph and the weights beside it."""
    graphs = GRAPHS[:2] if graph is None else (graph,)
    return ("*.json", "*.txt", *(pattern for name in graphs for pattern in (name, f"{name}*data")))


def graph_paths(folder: Path, kind: Kind = "reranker") -> list[Path]:
    """Return the graphs of a folder, in the order in which one is taken."""
    usual = [folder / name for name in (*GRAPHS, f"{kind}.onnx")]
    more = [path for pattern in _MORE_GRAPHS for path in sorted(folder.glob(pattern)) if path not in usual]
    return [path for path in (*usual, *more) if path.exists()]


def find_graph(folder: Path, graph: str | None, kind: Kind = "reranker") -> Path:
    """Return the graph of a folder: the named one, or the first of those that exporters write.

    Raises:
        ModelIncompleteError: If there is none.
        ModelError: If the name leads out of the folder.
    """
    if graph is None:
        found = graph_paths(folder, kind)
        if not found:
            raise ModelIncompleteError(
                f"{folder} has no ONNX graph ({', '.join(GRAPHS)}); export the model to ONNX, or use its safetensors."
            )
        return found[0]
    path = folder / graph
    if Path(graph).is_absolute() or ".." in Path(graph).parts:
        raise ModelError(f"graph must be a file in the model's folder, such as 'onnx/model.onnx', not {graph!r}.")
    if not path.exists():
        others = ", ".join(str(each.relative_to(folder)) for each in graph_paths(folder, kind))
        raise ModelIncompleteError(f"{path} is missing; the folder has {others or 'no graph'}.")
    return path


class _Malformed(Exception):
    """The bytes are not what they should be."""


class _Reader:
    """Reads one file's messages; every method refuses what it does not know.

    Args:
        path: For messages, and for where data beside the graph may lie.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._external: list[ExternalTensor] = []
        self._read: set[str] = set()  # names that nodes take
        self._operators: set[str] = set()
        self._fields_left = _MAX_FIELDS

    def graph(self, data: bytes) -> Graph:
        """Return the graph of a ModelProto."""
        model = self._message(memoryview(data), single=(7,))
        if 7 not in model:
            raise _Malformed("it has no graph")
        if 25 in model:
            raise self._unsafe("defines functions of its own, which could call each other without end")
        if 20 in model:
            raise self._unsafe("holds a training graph")
        content = self._message(_bytes(model[7][0]))
        if 15 in content:
            raise self._unsafe("has sparse weights")
        nodes, weights = content.get(1, []), content.get(5, [])
        if len(nodes) > _MAX_NODES or len(weights) > _MAX_TENSORS:
            raise self._unsafe(f"has {len(nodes)} nodes and {len(weights)} weights, more than any encoder")
        for node in nodes:
            self._check_node(self._message(_bytes(node)))
        known = {self._check_tensor(self._message(_bytes(weight)), may_be_external=True) for weight in weights}
        inputs = [self._value(_bytes(entry)) for entry in content.get(11, [])]
        outputs = [self._value(_bytes(entry)) for entry in content.get(12, [])]
        return Graph(
            path=self._path,
            data=data,
            inputs={value.name: value for value in inputs if value.name not in known},  # old files list weights, too
            outputs={value.name: value for value in outputs},
            # The runtime drops a weight that nothing reads, and would not know it any more.
            external=tuple(tensor for tensor in self._external if tensor.name in self._read),
            rounds_by_batch=not self._operators.isdisjoint(_BY_BATCH),
        )

    def _check_node(self, node: Fields) -> None:
        operator, domain = _text(node.get(4)), _text(node.get(7))
        if operator in _CONTROL_FLOW:
            raise self._unsafe(f"has the operator {operator}, which runs other graphs")
        if operator not in _OPERATORS.get(domain, ()):
            name = f"{domain}.{operator}" if domain else operator
            raise self._unsafe(f"has the operator {name!r:.80}, which is none that encoders are made of")
        self._operators.add(operator)
        self._read.update(_texts(node.get(1, [])))
        _texts([*node.get(2, []), *node.get(3, [])])  # names that are no text would be printed by the runtime
        for entry in node.get(5, []):
            # 6, 11: graphs; 14, 15: types; 21: a parameter of a function; 22, 23: sparse tensors.
            attribute = self._message(_bytes(entry), single=(5,))
            _text(attribute.get(1))
            if not attribute.keys().isdisjoint((6, 11, 14, 15, 21, 22, 23)):
                raise self._unsafe(f"has a node {operator} that holds a graph or a type")
            for tensor in (*attribute.get(5, []), *attribute.get(10, [])):
                self._check_tensor(self._message(_bytes(tensor)), may_be_external=False)

    def _check_tensor(self, tensor: Fields, *, may_be_external: bool) -> str:
        """Return a tensor's name; its declared shape must be what its data have."""
        name, dtype = _text(tensor.get(8)), _number(tensor.get(2))
        shape = tuple(islice(_numbers(tensor.get(1, [])), _MAX_RANK + 1))
        if dtype not in _BITS or 3 in tensor:
            raise self._unsafe(f"has a weight {name!r:.80} of the data type {dtype}, which no encoder has")
        if len(shape) > _MAX_RANK or any(size >= 2**62 for size in shape):
            raise _Malformed(f"the weight {name!r:.80} has the shape {shape!r:.80}")
        count = math.prod(shape)
        n_bytes = (count * _BITS[dtype] + 7) // 8
        if _number(tensor.get(14)) or 13 in tensor:
            if not may_be_external:
                raise self._unsafe(f"has a constant {name!r:.80} with data in another file")
            self._external.append(self._locate(tensor, name, dtype, shape, n_bytes))
            return name
        if _RAW_DATA in tensor:
            found = len(_bytes(tensor[_RAW_DATA][-1]))
        else:
            n_bytes, found = count, _count(tensor, _ELEMENTS.get(dtype))
        if found != n_bytes:
            raise _Malformed(f"the weight {name!r:.80} says {n_bytes} and has {found} of data")
        return name

    def _locate(self, tensor: Fields, name: str, dtype: int, shape: tuple[int, ...], n_bytes: int) -> ExternalTensor:
        """Return where a weight lies, which is only ever a file right beside the graph."""
        entries = [self._message(_bytes(entry)) for entry in tensor.get(13, [])]
        where = {_text(entry.get(1)): _text(entry.get(2)) for entry in entries}
        location = where.get("location", "")
        if not location or Path(location).name != location or "\\" in location or location in (".", ".."):
            raise self._unsafe(f"has its weight {name!r:.80} in {location!r:.80}, outside its own folder")
        path = self._path.with_name(location)
        if not path.is_file():
            raise ModelIncompleteError(
                f"{path} is missing or no regular file, but {self._path.name} has weights there; download the model again."
            )
        if not _is_inside(path):
            raise self._unsafe(f"has its weight {name!r:.80} in {location!r:.80}, a link that leads out of its folder")
        try:
            offset = int(where.get("offset") or 0)
            length = int(where.get("length") or n_bytes)
        except ValueError as exc:
            raise _Malformed(f"the weight {name!r:.80} has a place that is no number") from exc
        size = path.stat().st_size
        if size > _MAX_EXTERNAL_BYTES or length != n_bytes or not 0 <= offset <= size - n_bytes:
            raise _Malformed(
                f"the weight {name!r:.80} needs {n_bytes} bytes at {offset} of {location}, which has {size}"
            )
        return ExternalTensor(name, dtype, shape, path, offset, n_bytes)

    def _unsafe(self, what: str) -> ModelError:
        return UnsafeModelError(f"{self._path} {what}; it is not run. Use the graph that the model's authors publish.")

    def _value(self, data: memoryview) -> Value:
        """Return a ValueInfoProto."""
        fields = self._message(data, single=(2,))
        kind = self._message(_bytes(fields[2][0]), single=(1,)) if 2 in fields else {}
        if 1 not in kind:
            raise _Malformed(f"{_text(fields.get(1))!r:.80} is no tensor")
        tensor = self._message(_bytes(kind[1][0]), single=(2,))
        shape = None
        if 2 in tensor:
            dims = [self._message(_bytes(dim)) for dim in self._message(_bytes(tensor[2][0])).get(1, [])]
            shape = tuple(_number(dim[1]) if 1 in dim else _text(dim.get(2)) or None for dim in dims)
        return Value(_text(fields.get(1)), _number(tensor.get(1)), shape)

    def _message(self, data: memoryview, *, single: tuple[int, ...] = ()) -> Fields:
        """Return the values of each field of a message; those of `single` must not come twice, as protobuf merges them."""
        fields: Fields = {}
        for number, value in _fields(data):
            fields.setdefault(number, []).append(value)
            self._fields_left -= 1
            if self._fields_left < 0:
                raise _Malformed(f"it has more than {_MAX_FIELDS:,} fields")
        for number in single:
            if len(fields.get(number, ())) > 1:
                raise _Malformed(f"field {number} comes twice")
        return fields


def _content(path: Path) -> bytes:
    if not path.exists():
        raise ModelIncompleteError(f"{path} is missing; download the model again.")
    try:
        return read_regular(path, most_bytes=MAX_GRAPH_BYTES)
    except OSError as exc:
        raise ModelCorruptError(f"{path} cannot be read as a graph ({exc}); download it again.") from exc


def _is_inside(path: Path) -> bool:
    """Return whether a file lies in its folder, or in the hub's cache, whose snapshots are links to the blobs beside them."""
    folder, target = path.parent.resolve(), path.resolve()
    if target.parent == folder:
        return True
    snapshots = next((parent for parent in folder.parents if parent.name == "snapshots"), None)
    return snapshots is not None and target.parent == snapshots.parent / "blobs"


# --- protobuf ----------------------------------------------------------------------------------------------------------


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    at, end = 0, len(data)
    while at < end:
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if number == 0:
            raise _Malformed("a field has the number 0")
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        if kind == _BYTES:
            length, at = _varint(data, at)
        elif kind in (_FIXED32, _FIXED64):
            length = 4 if kind == _FIXED32 else 8
        else:
            raise _Malformed(f"a field has the wire type {kind}")
        if length > end - at:
            raise _Malformed("it is cut short")
        yield number, data[at : at + length]
        at += length


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise _Malformed("it is cut short")
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value & (2**64 - 1), at
    raise _Malformed("a number has no end")


def _bytes(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise _Malformed("a number stands where a message should")
    return value


def _text(values: list[int | memoryview] | None) -> str:
    return str(_bytes(values[-1]), "utf-8") if values else ""


def _texts(values: Sequence[int | memoryview]) -> list[str]:
    return [str(_bytes(value), "utf-8") for value in values]


def _number(values: list[int | memoryview] | None) -> int:
    if not values:
        return 0
    if not isinstance(values[-1], int):
        raise _Malformed("a message stands where a number should")
    return values[-1]


def _numbers(values: list[int | memoryview]) -> Iterator[int]:
    """Yield the numbers of a repeated field, written one by one or packed."""
    for value in values:
        if isinstance(value, int):
            yield value
            continue
        at = 0
        while at < len(value):
            number, at = _varint(value, at)
            yield number


def _count(tensor: Fields, field: int | None) -> int:
    """Return how many elements a typed field holds."""
    if field is None:
        return 0
    size = {_FLOAT_DATA: 4, _DOUBLE_DATA: 8}.get(field)
    total = 0
    for value in tensor.get(field, []):
        if isinstance(value, int):
            total += 1
        elif size:
            total += len(value) // size
        else:
            total += int(np.count_nonzero(np.frombuffer(value, np.uint8) < 128))  # each number ends with such a byte
    return total
