"""Write the shipped pair as ONNX: one graph for the reranker (ids in, one log-odds out), one for the embedder, one vocabulary.

    python eval/pocket/mini/export.py --work build/mini --name mini --output src/qwen_rerank/mini

The vocabulary's four-bit rows lie in `vocabulary.bin`, which both graphs read. Products run in eight bits
(DynamicQuantizeMatMul), whose inputs share one scale a batch, but for the last product of a layer: a few tokens have states
far larger than all others there, so each token has its own. The embedder's matrices are e5's own four-bit blocks, copied,
which a session turns into eight bits a row once, when it loads. ONNX Runtime's fused normalisation is four times slower on
CPUs than its parts written out, so it is written out.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
from model import APART, END, HEADS, HIDDEN, PAD, PASSAGE_PREFIX, QUERY_PREFIX, START
from onnx import TensorProto, helper, numpy_helper
from origin import unpacked

LEVELS = 127
LONGEST = 256  # tokens of a pair in training
OPSET, CONTRIB, IR = 21, "com.microsoft", 10  # the first with four-bit numbers


class Graph:
    """Nodes and initializers, gathered one call an operator."""

    def __init__(self, inputs: list[str]) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []
        self.inputs = inputs
        self._names = 0

    def add(self, op: str, *inputs: str, domain: str = "", outputs: int = 1, **attributes) -> str | list[str]:
        """Add a node and return the name of its output (or names)."""
        self._names += 1
        names = [f"{op}_{self._names}" + (f"_{i}" if i else "") for i in range(outputs)]
        self.nodes.append(
            helper.make_node(op, list(inputs), names, name=f"{op}_{self._names}", domain=domain, **attributes)
        )
        return names[0] if outputs == 1 else names

    def constant(self, value, name: str = "") -> str:
        """Add an initializer and return its name."""
        self._names += 1
        name = name or f"c_{self._names}"
        self.tensors.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def packed(self, pairs: np.ndarray, shape: tuple[int, int]) -> str:
        """Add four-bit numbers from 0 to 15, two a byte, as an initializer and return its name."""
        self._names += 1
        name = f"c_{self._names}"
        self.tensors.append(TensorProto(name=name, data_type=TensorProto.UINT4, dims=shape, raw_data=pairs.tobytes()))
        return name

    def model(self, output: str, shape: list) -> onnx.ModelProto:
        """Return the whole model with one float32 output."""
        ids = [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"]) for name in self.inputs]
        last = helper.make_node("Identity", [output], ["logits" if shape[-1] == 1 else "embeddings"], name="last")
        out = helper.make_tensor_value_info(last.output[0], TensorProto.FLOAT, shape)
        graph = helper.make_graph([*self.nodes, last], "mini", ids, [out], self.tensors)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR, producer_name="qwen-rerank")


# --- numbers ---------------------------------------------------------------------------------------------------------


def nibbles(values: np.ndarray) -> np.ndarray:
    """Return integers from -8 to 7 as bytes of two, the first in the low half, moved to 0..15."""
    moved = (values + 8).astype(np.uint8)
    return moved[..., ::2] | (moved[..., 1::2] << 4)


def product(g: Graph, x: str, weight: str, scales: np.ndarray, bias: np.ndarray, *, after_gelu: bool) -> str:
    """Add `x @ weight * scales + bias` in eight bits; `weight` is int8 `(in, out)`."""
    parts = [weight, g.constant(scales.astype(np.float32)), g.constant(np.zeros(len(scales), np.int8))]
    added = g.constant(bias.astype(np.float32))
    if not after_gelu:
        return g.add("DynamicQuantizeMatMul", x, *parts, added, domain=CONTRIB)
    # GELU gives no less than -0.17, so the largest value tells the size of a token's states.
    top = g.add("Max", g.add("ReduceMax", x, g.constant(np.array([-1])), keepdims=1), g.constant(np.float32(0.25)))
    found = g.add("DynamicQuantizeMatMul", g.add("Div", x, top), *parts, domain=CONTRIB)
    return g.add("Add", g.add("Mul", found, top), added)


def linear_four(g: Graph, x: str, blocks: list[np.ndarray], bias: np.ndarray, *, after_gelu: bool) -> str:
    """Add a product with e5's own four-bit rows, which constant folding turns into eight bits a row on loading."""
    values, scales = (np.concatenate(parts) for parts in zip(*(unpacked(b) for b in blocks), strict=True))
    n, k = values.shape
    whole = np.abs(values.reshape(n, -1, 32).astype(np.float32) * scales[..., None]).max((1, 2)) / LEVELS + 1e-12
    packed = g.packed(nibbles(values), (n, k))
    middle = g.packed(nibbles(np.zeros((n, k // 32), np.int8)), (n, k // 32))
    share = g.add("Cast", g.constant((scales / whole[:, None]).astype(np.float16)), to=TensorProto.FLOAT)
    both = g.add("DequantizeLinear", packed, share, middle, axis=1, block_size=32)
    both = g.add("Transpose", g.add("Cast", g.add("Round", both), to=TensorProto.INT8), perm=[1, 0])
    return product(g, x, both, whole, bias, after_gelu=after_gelu)


def linear_eight(g: Graph, x: str, weight: np.ndarray, bias: np.ndarray, *, after_gelu: bool) -> str:
    """Add a product with rows rounded to `LEVELS` steps."""
    scales = np.abs(weight).max(1) / LEVELS + 1e-12
    values = np.round(weight / scales[:, None]).astype(np.int8).T.copy()
    return product(g, x, g.constant(values), scales, bias, after_gelu=after_gelu)


def vocabulary(folder: Path, output: Path) -> tuple[onnx.TensorProto, onnx.TensorProto]:
    """Write `vocabulary.bin` and return the two tensors that point into it: four-bit rows and their float16 scales."""
    values, scales = unpacked(np.load(folder / "embeddings.npz")["blocks"])
    packed, halves = nibbles(values), scales.astype(np.float16)
    data = packed.tobytes() + halves.tobytes()
    (output / "vocabulary.bin").write_bytes(data)
    tensors = []
    for name, kind, shape, offset, size in (
        ("vocabulary", TensorProto.UINT8, packed.shape, 0, packed.nbytes),
        ("vocabulary.scales", TensorProto.FLOAT16, halves.shape, packed.nbytes, halves.nbytes),
    ):
        tensor = onnx.TensorProto(name=name, data_type=kind, dims=shape, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", "vocabulary.bin"), ("offset", offset), ("length", size)):
            tensor.external_data.add(key=key, value=str(value))
        tensors.append(tensor)
    return tensors[0], tensors[1]


# --- the encoder -----------------------------------------------------------------------------------------------------


def embedded(g: Graph, words: tuple[onnx.TensorProto, onnx.TensorProto], place: str, kind: str, weights) -> str:
    """Add word, position and kind vectors of the ids, normalised."""
    g.tensors += list(words)
    rows = g.add(
        "GatherBlockQuantized", words[0].name, "input_ids", words[1].name,
        domain=CONTRIB, bits=4, block_size=32, gather_axis=0, quantize_axis=1,
    )  # fmt: skip
    x = g.add("Cast", rows, to=TensorProto.FLOAT)
    x = g.add("Add", x, g.add("Gather", g.constant(weights("positions.weight").astype(np.float32)), place))
    x = g.add("Add", x, g.add("Gather", g.constant(weights("kinds.weight").astype(np.float32)), kind))
    return normalised(g, x, weights("embedding_norm.weight"), weights("embedding_norm.bias"))


def normalised(g: Graph, x: str, weight: np.ndarray, bias: np.ndarray) -> str:
    """Add layer normalisation, written out."""
    last = g.constant(np.array([-1]))
    centred = g.add("Sub", x, g.add("ReduceMean", x, last))
    variance = g.add("ReduceMean", g.add("Mul", centred, centred), last)
    spread = g.add("Sqrt", g.add("Add", variance, g.constant(np.float32(1e-12))))
    return g.add("Add", g.add("Mul", g.add("Div", centred, spread), g.constant(weight)), g.constant(bias))


def layer(g: Graph, x: str, bias: str, weights, linear) -> str:
    """Add one transformer layer; `bias` is what attention adds, `(batch, 1, sequence, sequence)`."""
    qkv = linear("qkv", x)
    q, k, v = g.add("Split", qkv, outputs=3, axis=-1, num_outputs=3)
    mixed = g.add("MultiHeadAttention", q, k, v, "", "", bias, domain=CONTRIB, num_heads=HEADS)
    x = normalised(
        g, g.add("Add", x, linear("out", mixed)), weights("attention_norm.weight"), weights("attention_norm.bias")
    )
    up = g.add("Gelu", linear("up", x), domain=CONTRIB)
    return normalised(g, g.add("Add", x, linear("down", up)), weights("norm.weight"), weights("norm.bias"))


def absent(g: Graph, mask: str) -> str:
    """Add what attention adds for keys without a token, `(batch, 1, 1, sequence)`."""
    value = g.add("Mul", g.add("Sub", mask, g.constant(np.float32(1))), g.constant(np.float32(-APART)))
    return g.add("Unsqueeze", value, g.constant(np.array([1, 2])))


def unit(g: Graph, x: str) -> str:
    """Add division by the length of the last axis."""
    length = g.add("ReduceL2", x, g.constant(np.array([-1])), keepdims=1)
    return g.add("Div", x, g.add("Max", length, g.constant(np.float32(1e-12))))


def mean_of(g: Graph, x: str, mask: str) -> str:
    """Add the unit vector of the sum of states where `mask` is 1, `(batch, 1, hidden)`."""
    return unit(g, g.add("MatMul", g.add("Unsqueeze", mask, g.constant(np.array([1]))), x))


def reranker(state: dict[str, np.ndarray], words, *, layers: int, scale: float, middle: float) -> onnx.ModelProto:
    """Return the graph of `Mini.forward`, its score made log-odds as `scale * (score - middle)`."""
    g = Graph(["input_ids", "attention_mask"])
    weights = state.__getitem__
    one = g.constant(np.float32(1))
    mask = g.add("Cast", "attention_mask", to=TensorProto.FLOAT)
    starts = g.add(
        "CumSum",
        g.add("Cast", g.add("Equal", "input_ids", g.constant(np.int64(START))), to=TensorProto.INT64),
        g.constant(np.int64(1)),
    )
    kind = g.add("Cast", g.add("Greater", starts, g.constant(np.int64(1))), to=TensorProto.INT64)
    document = g.add("Cast", kind, to=TensorProto.FLOAT)
    of_query, of_document = g.add("Mul", mask, g.add("Sub", one, document)), g.add("Mul", mask, document)
    # Places: in the document they begin at 0 again.
    at = g.add(
        "Sub",
        g.add(
            "CumSum",
            g.add("Add", g.add("Mul", kind, g.constant(np.int64(0))), g.constant(np.int64(1))),
            g.constant(np.int64(1)),
        ),
        g.constant(np.int64(1)),
    )
    begin = g.add("Cast", g.add("ReduceSum", of_query, g.constant(np.array([1])), keepdims=1), to=TensorProto.INT64)
    place = g.add("Sub", at, g.add("Mul", begin, kind))
    limits = [g.constant(np.int64(0)), g.constant(np.int64(len(weights("positions.weight")) - 1))]
    x = embedded(g, words, g.add("Clip", place, *limits), kind, weights)
    # Attention between the texts: +1 where query and document differ.
    side = g.add("Sub", g.add("Mul", document, g.constant(np.float32(2))), one)
    product = g.add(
        "MatMul",
        g.add("Unsqueeze", side, g.constant(np.array([2]))),
        g.add("Unsqueeze", side, g.constant(np.array([1]))),
    )
    differ = g.add(
        "Unsqueeze", g.add("Mul", g.add("Sub", one, product), g.constant(np.float32(0.5))), g.constant(np.array([1]))
    )
    hidden = absent(g, mask)
    for i in range(layers):

        def own(name: str, i: int = i) -> np.ndarray:
            return state[f"layers.{i}.{name}"]

        def linear(name: str, x: str, own=own) -> str:
            return linear_eight(g, x, own(f"{name}.weight"), own(f"{name}.bias"), after_gelu=name == "down")

        bias = g.add("Add", g.add("Mul", differ, g.constant(own("between").reshape(()).astype(np.float32))), hidden)
        x = layer(g, x, bias, own, linear)
    # The score: MaxSim over the words, the cosine of the means, and a line over both <s>.
    word = g.add(
        "Mul",
        mask,
        g.add("Sub", one, g.add("Cast", g.add("Equal", "input_ids", g.constant(np.int64(END))), to=TensorProto.FLOAT)),
    )

    def beyond(first: int, of: str) -> str:
        real = g.add("Cast", g.add("GreaterOrEqual", place, g.constant(np.int64(first))), to=TensorProto.FLOAT)
        return g.add("Mul", g.add("Mul", word, of), real)

    query_word, document_word = beyond(QUERY_PREFIX, of_query), beyond(PASSAGE_PREFIX, of_document)
    units = unit(g, x)
    near = g.add("MatMul", units, g.add("Transpose", units, perm=[0, 2, 1]))
    known = g.add("Cast", g.add("Unsqueeze", document_word, g.constant(np.array([1]))), to=TensorProto.BOOL)
    near = g.add(
        "ReduceMax", g.add("Where", known, near, g.constant(np.float32(-1))), g.constant(np.array([2])), keepdims=0
    )
    gate = g.add(
        "Squeeze",
        g.add("MatMul", x, g.constant(weights("weigh.weight").T.astype(np.float32))),
        g.constant(np.array([2])),
    )
    gate = g.add("Where", g.add("Cast", query_word, to=TensorProto.BOOL), gate, g.constant(np.float32(APART)))
    weight = g.add("Softmax", gate, axis=1)
    maxsim = g.add("ReduceSum", g.add("Mul", near, weight), g.constant(np.array([1])), keepdims=1)
    cosine = g.add("Mul", mean_of(g, x, of_query), mean_of(g, x, of_document))
    cosine = g.add("ReduceSum", cosine, g.constant(np.array([1, 2])), keepdims=0)
    cosine = g.add("Unsqueeze", cosine, g.constant(np.array([1])))
    # Both <s>: place 0 of either text, picked by a product with what is 1 there alone.
    first = g.add("Cast", g.add("Equal", place, g.constant(np.int64(0))), to=TensorProto.FLOAT)
    ends = [
        g.add("MatMul", g.add("Unsqueeze", g.add("Mul", first, of), g.constant(np.array([1]))), x)
        for of in (of_query, of_document)
    ]
    line = g.add("MatMul", g.add("Concat", *ends, axis=2), g.constant(weights("extra.weight").T.astype(np.float32)))
    line = g.add("Squeeze", line, g.constant(np.array([2])))
    factors = [float(f) * scale for f in weights("scale")]
    shift = scale * (float(weights("extra.bias")[0]) - middle)
    total = g.add("Mul", maxsim, g.constant(np.float32(factors[0])))
    total = g.add("Add", total, g.add("Mul", cosine, g.constant(np.float32(factors[1]))))
    total = g.add("Add", total, g.add("Mul", line, g.constant(np.float32(scale))))
    return g.model(g.add("Add", total, g.constant(np.float32(shift))), ["batch", 1])


def embedder(folder: Path, words, *, layers: int) -> onnx.ModelProto:
    """Return the graph of e5: ids of single texts in, unit vectors out."""
    g = Graph(["input_ids", "attention_mask"])
    stored = np.load(folder / "layers.npz")
    names = {
        "positions.weight": stored["emb.pos"].reshape(-1, HIDDEN), "kinds.weight": stored["emb.type"].reshape(-1, HIDDEN),
        "embedding_norm.weight": stored["emb.ln.w"], "embedding_norm.bias": stored["emb.ln.b"],
    }  # fmt: skip
    mask = g.add("Cast", "attention_mask", to=TensorProto.FLOAT)
    kind = g.add("Mul", "input_ids", g.constant(np.int64(0)))
    ones = g.add("Add", kind, g.constant(np.int64(1)))
    place = g.add("Sub", g.add("CumSum", ones, g.constant(np.int64(1))), g.constant(np.int64(1)))
    x = embedded(g, words, place, kind, names.__getitem__)
    side = g.add("Add", g.add("Mul", mask, g.constant(np.float32(0))), g.constant(np.float32(0)))
    zeros = g.add(
        "Unsqueeze",
        g.add(
            "MatMul",
            g.add("Unsqueeze", side, g.constant(np.array([2]))),
            g.add("Unsqueeze", side, g.constant(np.array([1]))),
        ),
        g.constant(np.array([1])),
    )
    bias = g.add("Add", zeros, absent(g, mask))
    parts = {"qkv": ("q", "k", "v"), "out": ("ao",), "up": ("fi",), "down": ("fo",)}
    norms = {"attention_norm": "aln", "norm": "oln"}
    for i in range(layers):

        def linear(name: str, x: str, i: int = i) -> str:
            pieces = parts[name]
            bias = np.concatenate([stored[f"l{i}.{p}.b"] for p in pieces])
            return linear_four(g, x, [stored[f"l{i}.{p}.w"] for p in pieces], bias, after_gelu=name == "down")

        def own(name: str, i: int = i) -> np.ndarray:
            part, kind = name.split(".")
            return stored[f"l{i}.{norms[part]}.{kind[0]}"]

        x = layer(g, x, bias, own, linear)
    return g.model(g.add("Squeeze", mean_of(g, x, mask), g.constant(np.array([1]))), ["batch", HIDDEN])


def state_of(folder: Path, name: str) -> dict[str, np.ndarray]:
    """Return the trained weights, float32, as `train.py` saved them."""
    parts = [np.load(path) for path in sorted(folder.glob(f"{name}.?.npz"))]
    if not parts:
        raise SystemExit(f"{folder} has no {name}.0.npz; run train.py first.")
    return {key: part[key].astype(np.float32) for part in parts for key in part}


def settings(facts: dict) -> dict[str, dict]:
    """Return what loaders read beside the graphs: the kind of model and its limits, and the embedder's prompts."""
    config = {
        "architectures": ["BertForSequenceClassification"],
        "model_type": "bert",
        "id2label": {"0": "LABEL_0"},
        "num_hidden_layers": facts["layers"],
        "hidden_size": facts["hidden"],
        "max_position_embeddings": facts["positions"],
        "vocab_size": facts["kept"],
        "pad_token_id": PAD,
    }
    limit = {"model_max_length": LONGEST}
    prompts = {"prompts": {"query": "query: ", "document": "passage: "}, "similarity_fn_name": "cosine"}
    return {"config.json": config, "tokenizer_config.json": limit, "config_sentence_transformers.json": prompts}


def main() -> None:
    """Write `reranker.onnx`, `embedder.onnx`, `vocabulary.bin`, `tokenizer.json` and `config.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/mini"))
    parser.add_argument("--name", default="mini")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    facts = json.loads((options.work / "e5" / "origin.json").read_text(encoding="utf-8"))
    odds = json.loads((options.work / "odds.json").read_text(encoding="utf-8"))
    words = vocabulary(options.work / "e5", options.output)
    state = state_of(options.work, options.name)
    models = {
        "reranker": reranker(state, words, layers=facts["layers"], scale=odds["scale"], middle=odds["middle"]),
        "embedder": embedder(options.work / "e5", words, layers=facts["layers"]),
    }
    for name, model in models.items():
        path = options.output / f"{name}.onnx"
        onnx.save(model, path)
        print(path, round(path.stat().st_size / 1e6, 2), "MB")
    shutil.copy(options.work / "e5" / "tokenizer.json", options.output / "tokenizer.json")
    for name, content in settings(facts).items():
        (options.output / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
