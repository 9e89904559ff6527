"""The mini reranker in torch: e5's encoder over a query and a document at once, and a score that starts as MaxSim.

Input ids are those of `tokenizer.json` for a pair: `<s> query: … </s> <s> passage: … </s>`. The document's positions begin
at 0 again, and every layer has one number that lowers (or raises) attention between the two texts. Far below zero, both
are read apart, and the score is what untrained e5 gives: MaxSim of the token states and the cosine of the means. Training
opens the way between them.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from origin import floats_of
from torch import nn

HIDDEN, HEADS = 384, 12
START, PAD, END = 0, 1, 2
QUERY_PREFIX, PASSAGE_PREFIX = 4, 3  # tokens of `<s> query:` and `<s> passage:`
APART = -1e4


class Layer(nn.Module):
    """One transformer layer of BERT, with a number for attention between the texts."""

    def __init__(self, intermediate: int, epsilon: float) -> None:
        super().__init__()
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.out = nn.Linear(HIDDEN, HIDDEN)
        self.attention_norm = nn.LayerNorm(HIDDEN, epsilon)
        self.up = nn.Linear(HIDDEN, intermediate)
        self.down = nn.Linear(intermediate, HIDDEN)
        self.norm = nn.LayerNorm(HIDDEN, epsilon)
        self.between = nn.Parameter(torch.tensor(-2.0))

    def forward(self, x: torch.Tensor, side: torch.Tensor, absent: torch.Tensor) -> torch.Tensor:
        """Return the next states; `side` is -1 in the query and +1 in the document, `absent` 1 where there is no token."""
        n, length, _ = x.shape
        q, k, v = self.qkv(x).view(n, length, 3, HEADS, HIDDEN // HEADS).permute(2, 0, 3, 1, 4)
        mix = self.mixed_plainly if x.device.type == "cpu" else self.mixed
        mixed = mix(q, k, v, side, absent)
        x = normed(self.attention_norm, x + self.out(mixed.transpose(1, 2).reshape(n, length, HIDDEN)))
        return normed(self.norm, x + self.down(F.gelu(self.up(x))))

    def mixed(self, q, k, v, side: torch.Tensor, absent: torch.Tensor) -> torch.Tensor:
        """Return what attention gathers, `(n, heads, length, hidden / heads)`, by the fused kernel."""
        # A mask in two more columns of q and k, so that the fast kernel without a mask serves: q.k gains
        # `between` for tokens of different sides (up to a constant, which softmax ignores) and APART for absent keys.
        root = (HIDDEN // HEADS) ** 0.5
        lower = -0.5 * self.between.to(side.dtype) * root * side
        ones = torch.full_like(side, root)
        zeros = torch.zeros_like(side)
        more_q = torch.stack([lower, ones, *[zeros] * 6], -1)[:, None].expand(-1, HEADS, -1, -1)
        more_k = torch.stack([side, APART * absent, *[zeros] * 6], -1)[:, None].expand(-1, HEADS, -1, -1)
        more_v = torch.zeros_like(more_q)
        return F.scaled_dot_product_attention(
            torch.cat([q, more_q.to(q.dtype)], -1),
            torch.cat([k, more_k.to(q.dtype)], -1),
            torch.cat([v, more_v.to(q.dtype)], -1),
            scale=1 / root,
        )[..., : HIDDEN // HEADS]

    def mixed_plainly(self, q, k, v, side: torch.Tensor, absent: torch.Tensor) -> torch.Tensor:
        """Return the same by two products: on a CPU the fused kernel takes three times as long there and back."""
        side = side.float()
        differ = 1 - side[:, :, None] * side[:, None]
        bias = (0.5 * self.between * differ + APART * absent.float()[:, None])[:, None]
        weights = torch.softmax((q / (HIDDEN // HEADS) ** 0.5 @ k.transpose(-1, -2)).float() + bias, -1)
        return weights.to(v.dtype) @ v


def normed(norm: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    """Return the normalised states in their own precision: autocast would widen them, which costs a third of the time."""
    with torch.autocast(x.device.type, enabled=False):
        return F.layer_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)


class Mini(nn.Module):
    """Encoder and head; `forward` gives one log-odds a pair."""

    def __init__(self, vocabulary: int, *, layers: int, intermediate: int, positions: int, epsilon: float) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, HIDDEN)
        self.positions = nn.Embedding(positions, HIDDEN)
        self.kinds = nn.Embedding(2, HIDDEN)
        self.embedding_norm = nn.LayerNorm(HIDDEN, epsilon)
        self.layers = nn.ModuleList(Layer(intermediate, epsilon) for _ in range(layers))
        self.weigh = nn.Linear(HIDDEN, 1)  # how much a token of the query counts
        self.extra = nn.Linear(2 * HIDDEN, 1)  # from both <s>
        self.scale = nn.Parameter(torch.tensor([40.0, 20.0]))  # of MaxSim and of the cosine
        for part in (self.weigh, self.extra):
            nn.init.zeros_(part.weight)
            nn.init.zeros_(part.bias)

    def states(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the last states, and 1 in the document where the query is 0, both of the shape of `ids`."""
        starts = (ids == START).cumsum(1)
        document = (starts > 1).long()
        place = torch.arange(ids.shape[1], device=ids.device)[None]
        begin = ((starts == 1) & (mask > 0)).sum(1, keepdim=True)
        x = self.words(ids) + self.positions((place - begin * document).clamp(0, 511)) + self.kinds(document)
        x = self.embedding_norm(x)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        side, absent = (2 * document - 1).to(x.dtype), (1 - mask).to(x.dtype)
        for layer in self.layers:
            x = layer(x, side, absent)
        return x, document

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return log-odds, `(n_pairs,)`."""
        states, document = self.states(ids, mask)
        with torch.autocast(ids.device.type, enabled=False):
            return self.head(states.float(), document, mask, ids)

    def head(self, states: torch.Tensor, document: torch.Tensor, mask: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Return the score of states: MaxSim over the words, the cosine of the means, and a line over both `<s>`."""
        place = torch.arange(ids.shape[1], device=ids.device)[None]
        of_query, of_document = mask * (1 - document), mask * document
        begin = of_query.sum(1, keepdim=True)
        word = mask * (ids != END)
        query_word = word * of_query * (place >= QUERY_PREFIX)
        document_word = word * of_document * (place >= begin + PASSAGE_PREFIX)
        unit = F.normalize(states, dim=-1)
        near = (unit @ unit.transpose(1, 2)).masked_fill(document_word[:, None] == 0, -1.0).amax(2)
        weight = torch.softmax(self.weigh(states)[..., 0].masked_fill(query_word == 0, APART), 1)
        mean_q, mean_d = (F.normalize((states * m[..., None]).sum(1), dim=-1) for m in (of_query, of_document))
        ends = torch.cat(
            [states[:, 0], states.gather(1, begin.clamp(max=ids.shape[1] - 1)[..., None].expand(-1, -1, HIDDEN))[:, 0]],
            -1,
        )
        return (
            self.scale[0] * (near * weight).sum(1) + self.scale[1] * (mean_q * mean_d).sum(1) + self.extra(ends)[:, 0]
        )


def from_origin(folder: Path) -> Mini:
    """Return the model with e5's weights, as `origin.py` wrote them, and an untrained head."""
    facts = json.loads((folder / "origin.json").read_text(encoding="utf-8"))
    words = floats_of(np.load(folder / "embeddings.npz")["blocks"])
    stored = np.load(folder / "layers.npz")

    def tensor(name: str) -> torch.Tensor:
        array = stored[name]
        return torch.from_numpy(floats_of(array) if array.dtype == np.uint8 else array)

    model = Mini(
        len(words),
        layers=facts["layers"],
        intermediate=facts["intermediate"],
        positions=facts["positions"],
        epsilon=facts["epsilon"],
    )
    state = model.state_dict()
    state["words.weight"] = torch.from_numpy(words)
    state["positions.weight"] = tensor("emb.pos").view(-1, HIDDEN)
    state["kinds.weight"] = tensor("emb.type").view(-1, HIDDEN)[:1].repeat(2, 1)  # e5 knows one kind of text
    state["embedding_norm.weight"], state["embedding_norm.bias"] = tensor("emb.ln.w"), tensor("emb.ln.b")
    ours = {"out": "ao", "up": "fi", "down": "fo", "attention_norm": "aln", "norm": "oln"}
    for i in range(facts["layers"]):
        for kind in ("weight", "bias"):
            short = {"weight": "w", "bias": "b"}[kind]
            state[f"layers.{i}.qkv.{kind}"] = torch.cat([tensor(f"l{i}.{part}.{short}") for part in "qkv"])
            for name, theirs in ours.items():
                state[f"layers.{i}.{name}.{kind}"] = tensor(f"l{i}.{theirs}.{short}")
    model.load_state_dict(state)
    return model


def from_graph(folder: Path) -> Mini:
    """Return the shipped reranker in torch, with the weights of `reranker.onnx` made float32; its scores are log-odds."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(folder / "reranker.onnx").graph
    value = {tensor.name: numpy_helper.to_array(tensor).astype(np.float32) for tensor in graph.initializer}
    maker = {name: node for node in graph.node for name in node.output}
    taker = {name: node for node in graph.node for name in node.input}

    def of(op: str) -> list:
        return [node for node in graph.node if node.op_type == op]

    def back(node, *places: int):
        """Follow inputs back to where they come from."""
        for place in places:
            node = maker[node.input[place]]
        return node

    packed = value["vocabulary"].astype(np.uint8)
    words = np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1).astype(np.float32) - 8
    positions, kinds = (value[node.input[0]] for node in of("Gather"))
    attention, products = of("MultiHeadAttention"), of("DynamicQuantizeMatMul")
    state = {
        "words.weight": words * np.repeat(value["vocabulary.scales"], 32, axis=1),
        "positions.weight": positions,
        "kinds.weight": kinds,
    }
    norms = ["embedding_norm", *(f"layers.{i}.{n}" for i in range(len(attention)) for n in ("attention_norm", "norm"))]
    for name, node in zip(norms, (n for n in of("Div") if maker[n.input[1]].op_type == "Sqrt"), strict=True):
        scaled = taker[node.output[0]]
        state |= {f"{name}.weight": value[scaled.input[1]], f"{name}.bias": value[taker[scaled.output[0]].input[1]]}
    names = [f"layers.{i}.{name}" for i in range(len(attention)) for name in ("qkv", "out", "up", "down")]
    for name, node in zip(names, products, strict=True):
        state[f"{name}.weight"] = (value[node.input[1]] * value[node.input[2]]).T
        after = node if len(node.input) > 4 else taker[taker[node.output[0]].output[0]]
        state[f"{name}.bias"] = value[after.input[-1]]
    for i, node in enumerate(attention):
        state[f"layers.{i}.between"] = value[back(node, 5, 0).input[1]]
    shifted = maker[of("Identity")[-1].input[0]]
    line, cosine, maxsim = back(shifted, 0, 1), back(shifted, 0, 0, 1), back(shifted, 0, 0, 0)
    factor = value[line.input[1]]
    state |= {
        "scale": np.array([value[maxsim.input[1]], value[cosine.input[1]]]),
        "extra.weight": value[back(line, 0, 0).input[1]].T * factor,
        "extra.bias": value[shifted.input[1]].reshape(1),
        "weigh.weight": value[back(of("Softmax")[0], 0, 1, 0).input[1]].T,
        "weigh.bias": np.zeros(1, np.float32),  # softmax ignores it
    }
    intermediate = len(state["layers.0.up.bias"])
    model = Mini(len(packed), layers=len(attention), intermediate=intermediate, positions=len(positions), epsilon=1e-12)
    model.load_state_dict({name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in state.items()})
    return model.eval()
