"""Peers in 8 bits beside vLLM's: llama.cpp, OpenVINO and ONNX Runtime, each with the same random weights."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contestants import NO, YES, Contestant, as_checkpoint, tried
from torch.nn.functional import scaled_dot_product_attention, silu
from transformers import AutoModelForCausalLM

from qwen_rerank.prompt import DEFAULT_INSTRUCTION, PREFIX, SUFFIX, PromptEncoder, PromptTokenizer
from qwen_rerank.scorers.qwen.model import rotary_table

_TEMPLATE = PREFIX + f"<Instruct>: {DEFAULT_INSTRUCTION}\n<Query>: {{{{query}}}}\n<Document>: {{{{document}}}}" + SUFFIX
_GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


class LlamaCpp(Contestant):
    """llama.cpp with Q8_0 weights, through the kernels for this CPU that node-llama-cpp ships; a process of its own.

    Its rankings are computed one after the other and share no prefix.
    """

    in_process = False

    def __init__(self, model: Any, tokenizer: Path, *, folder: Path, node_modules: Path | None, threads: int) -> None:
        if node_modules is None:
            raise RuntimeError("--node-modules names no folder in which node-llama-cpp is installed")
        package = json.loads((node_modules / "node-llama-cpp" / "package.json").read_text(encoding="utf-8"))
        self._version = package["version"]
        path = folder / "model.gguf"
        if not path.exists():
            folder.mkdir()
            write_gguf(model, tokenizer, path)
        script = Path(__file__).with_name("llama_rank.mjs")
        command = ["node", str(script), str(node_modules), str(path), _TEMPLATE, str(threads)]
        self._node = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if self._read() != "ready":
            raise RuntimeError("node-llama-cpp did not start")

    def _read(self) -> str:
        line: str = self._node.stdout.readline()  # type: ignore[union-attr]
        return line.strip()

    def score(self, queries: Sequence[str], documents: Sequence[Sequence[str]]) -> list[np.ndarray]:
        """Return log-odds, one array for each query."""
        self._node.stdin.write(json.dumps(list(zip(queries, documents, strict=True))) + "\n")  # type: ignore[union-attr]
        self._node.stdin.flush()  # type: ignore[union-attr]
        probabilities = [np.array(found) for found in json.loads(self._read())]
        return [np.log(found / (1 - found)).astype(np.float32) for found in probabilities]

    def settings(self) -> dict[str, Any]:
        """Return the package's version."""
        return {"node-llama-cpp": self._version}


def write_gguf(model: Any, tokenizer: Path, path: Path) -> None:
    """Write the model for llama.cpp: matrices in Q8_0, a classifier of "yes" and "no" on the last row."""
    import gguf

    shape, text = model.config, json.loads((tokenizer / "tokenizer.json").read_text())
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_name("random")
    writer.add_block_count(shape.num_hidden_layers)
    writer.add_context_length(shape.max_position_embeddings)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_freq_base(1_000_000.0)
    writer.add_layer_norm_rms_eps(shape.rms_norm_eps)
    writer.add_pooling_type(gguf.PoolingType.RANK)
    writer.add_classifier_output_labels(["yes", "no"])
    # 1. the tokenizer
    added = {token["content"]: token["id"] for token in text["added_tokens"]}
    ids = {**text["model"]["vocab"], **added}
    tokens = [f"[PAD{i}]" for i in range(shape.vocab_size)]
    kinds = [gguf.TokenType.UNUSED] * shape.vocab_size
    for token, i in ids.items():
        tokens[i], kinds[i] = token, gguf.TokenType.CONTROL if token in added else gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    merges = text["model"]["merges"]
    writer.add_token_merges([each if isinstance(each, str) else " ".join(each) for each in merges])
    writer.add_eos_token_id(added["<|im_end|>"])
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    # 2. the weights
    kind = gguf.GGMLQuantizationType.Q8_0

    def add(name: str, weight: torch.Tensor) -> None:
        values = weight.detach().float().numpy()
        if values.ndim == 1:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    weights = dict(model.state_dict())
    rows = weights["lm_head.weight"]
    add("token_embd.weight", weights["model.embed_tokens.weight"])
    add("output_norm.weight", weights["model.norm.weight"])
    add("cls.output.weight", torch.stack([rows[YES], rows[NO]]))
    for i in range(shape.num_hidden_layers):
        for ours, theirs in _GGUF_NAMES.items():
            add(f"blk.{i}.{theirs}.weight", weights[f"model.layers.{i}.{ours}.weight"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class PaddedModel(torch.nn.Module):
    """The model as converters read it: prompts of one length, padded on the left, to log-odds."""

    def __init__(self, model: Any, tokenizer: Path, *, longest: int) -> None:
        super().__init__()
        checkpoint = as_checkpoint(model, tokenizer)
        self.shape, self.head = checkpoint.config, checkpoint.head
        # Buffers, and matrices as ONNX multiplies them, `(in, out)`: ONNX Runtime quantises neither constants of the
        # graph nor what is behind a transposition.
        for name, weight in checkpoint.weights.items():
            exact = weight.detach().float()
            self.register_buffer(name.replace(".", "_"), exact.t().contiguous() if "_proj" in name else exact)
        half = rotary_table(self.shape, longest)
        self._cosine, self._sine = (torch.cat([part, part], dim=1) for part in half)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return log-odds `(n,)` of ids int64 `(n, length)`; the mask is 0 where there is no token."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cosine, sine = self._cosine[positions][:, None], self._sine[positions][:, None]
        order = torch.ones_like(mask[:1]).cumsum(1)
        seen = (order[:, None, None, :] <= order[:, None, :, None]) & (mask[:, None, None, :] > 0)
        bias = torch.where(seen, 0.0, -1e4)
        hidden = self._weight("model.embed_tokens")[ids]
        for i in range(self.shape.n_layers):
            hidden = hidden + self._attention(f"model.layers.{i}.", hidden, cosine, sine, bias)
            at = f"model.layers.{i}."
            normed = self._norm(hidden, at + "post_attention_layernorm")
            gated = silu(self._linear(normed, at + "mlp.gate_proj")) * self._linear(normed, at + "mlp.up_proj")
            hidden = hidden + self._linear(gated, at + "mlp.down_proj")
        return self._norm(hidden[:, -1], "model.norm") @ self.head

    def _attention(self, at: str, hidden: torch.Tensor, cosine: Any, sine: Any, bias: torch.Tensor) -> torch.Tensor:
        normed, shape = self._norm(hidden, at + "input_layernorm"), self.shape
        n, length = hidden.shape[0], hidden.shape[1]

        def heads(name: str, count: int) -> torch.Tensor:
            found = self._linear(normed, f"{at}self_attn.{name}_proj").view(n, length, count, shape.head_dim)
            if name != "v":
                found = self._norm(found, f"{at}self_attn.{name}_norm")
            return found.transpose(1, 2)

        def rotated(x: torch.Tensor) -> torch.Tensor:
            first, second = x.chunk(2, dim=-1)
            return x * cosine + torch.cat([-second, first], dim=-1) * sine

        def repeated(x: torch.Tensor) -> torch.Tensor:
            times = shape.n_heads // shape.n_kv_heads
            wide = x[:, :, None].expand(n, shape.n_kv_heads, times, length, shape.head_dim)
            return wide.reshape(n, shape.n_heads, length, shape.head_dim)

        query, key = rotated(heads("q", shape.n_heads)), rotated(heads("k", shape.n_kv_heads))
        value = heads("v", shape.n_kv_heads)
        found = scaled_dot_product_attention(query, repeated(key), repeated(value), attn_mask=bias)
        flat = found.transpose(1, 2).reshape(n, length, shape.n_heads * shape.head_dim)
        return self._linear(flat, at + "self_attn.o_proj")

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        # Written out: ONNX's operator set 17 has no such operation.
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.shape.rms_norm_eps)
        return x * scale * self._weight(name)

    def _weight(self, name: str) -> torch.Tensor:
        return self.get_buffer(f"{name}.weight".replace(".", "_"))

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ self._weight(name)


class PaddedPeer(Contestant):
    """A runtime that takes padded batches, at the best of a few batch sizes; prompts of similar length share a batch."""

    def __init__(self, tokenizer: Path, *, batch_sizes: Sequence[int]) -> None:
        self._encoder = PromptEncoder(PromptTokenizer((tokenizer / "tokenizer.json").read_text()))
        self._batch_sizes, self._batch_size = batch_sizes, batch_sizes[0]

    @abstractmethod
    def batch(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Return log-odds `(n,)` of ids and mask, int64 `(n, length)`."""

    def score(self, queries: Sequence[str], documents: Sequence[Sequence[str]]) -> list[np.ndarray]:
        """Return log-odds, one array for each query."""
        prompts = [
            prompt.ids
            for query, texts in zip(queries, documents, strict=True)
            for prompt in self._encoder.encode(query, texts)
        ]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
        scores = np.empty(len(prompts), dtype=np.float32)
        for start in range(0, len(order), self._batch_size):
            chosen = order[start : start + self._batch_size]
            length = len(prompts[chosen[0]])
            ids, mask = (np.zeros((len(chosen), length), dtype=np.int64) for _ in range(2))
            for row, i in enumerate(chosen):
                ids[row, length - len(prompts[i]) :] = prompts[i]
                mask[row, length - len(prompts[i]) :] = 1
            scores[chosen] = self.batch(ids, mask)
        return np.split(scores, np.cumsum([len(texts) for texts in documents])[:-1])

    def tune(
        self, queries: Sequence[str], documents: Sequence[Sequence[str]], known: dict[str, float]
    ) -> dict[str, float]:
        """Take the fastest batch size, each tried once on some documents of the first query."""
        some = list(documents[0])[: max(self._batch_sizes)]

        def seconds(size: int) -> float:
            self._batch_size, start = size, time.perf_counter()
            self.score(queries[:1], [some])
            return time.perf_counter() - start

        found = known or tried(seconds, self._batch_sizes, len(some))
        self._batch_size = int(min(found, key=found.__getitem__))
        return found


def converted(convert: Callable[[Path, Path], None], model: Any, tokenizer: Path, folder: Path) -> Path:
    """Return the folder with what `convert` writes there, once, in a process of its own: its float32 copies are not the peer's."""
    if not folder.exists():
        model.save_pretrained(folder)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            pool.submit(convert, folder, tokenizer).result()
        for path in folder.iterdir():
            if not path.name.startswith("small"):  # gigabytes that nobody reads again
                path.unlink()
    return folder


def saved_model(folder: Path, tokenizer: Path) -> PaddedModel:
    """Return a saved model as converters read it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    return PaddedModel(model, tokenizer, longest=4096)


EXAMPLE = (torch.ones(2, 9, dtype=torch.int64), torch.ones(2, 9, dtype=torch.int64))


@torch.no_grad()
def convert_for_openvino(folder: Path, tokenizer: Path) -> None:
    """Write `small.xml`: weights in 8 bits by NNCF."""
    import nncf
    import openvino

    found = openvino.convert_model(saved_model(folder, tokenizer), example_input=EXAMPLE, input=[[-1, -1], [-1, -1]])
    openvino.save_model(nncf.compress_weights(found, mode=nncf.CompressWeightsMode.INT8_SYM), folder / "small.xml")


class OpenVino(PaddedPeer):
    """OpenVINO with 8-bit weights of NNCF, and rows that its CPU plugin quantises as they come."""

    def __init__(self, model: Any, tokenizer: Path, *, folder: Path, threads: int, **options: Any) -> None:
        super().__init__(tokenizer, **options)
        import openvino

        small = converted(convert_for_openvino, model, tokenizer, folder) / "small.xml"
        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": "32",
        }
        self._compiled = openvino.Core().compile_model(small, "CPU", settings)

    def batch(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Return log-odds `(n,)`."""
        found: np.ndarray = self._compiled([ids, mask])[0]
        return found


@torch.no_grad()
def convert_for_onnxruntime(folder: Path, tokenizer: Path) -> None:
    """Write `small.onnx`: weights in 8 bits, one scale an output row."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    exact, small = (str(folder / name) for name in ("exact.onnx", "small.onnx"))  # above 2 GiB no Path is taken
    axes = {0: "prompts", 1: "length"}
    torch.onnx.export(
        saved_model(folder, tokenizer),
        EXAMPLE,
        exact,
        input_names=["ids", "mask"],
        output_names=["scores"],
        dynamic_axes={"ids": axes, "mask": axes, "scores": {0: "prompts"}},
        dynamo=False,
        opset_version=17,
        external_data=True,
    )
    quantize_dynamic(
        exact,
        small,
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        weight_type=QuantType.QInt8,
        use_external_data_format=True,
    )


class OnnxRuntime(PaddedPeer):
    """ONNX Runtime with its dynamic quantisation: 8-bit weights of one scale an output row, activations of one a batch."""

    def __init__(self, model: Any, tokenizer: Path, *, folder: Path, threads: int, **options: Any) -> None:
        super().__init__(tokenizer, **options)
        import onnxruntime

        small = converted(convert_for_onnxruntime, model, tokenizer, folder) / "small.onnx"
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(str(small), settings, providers=["CPUExecutionProvider"])

    def batch(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Return log-odds `(n,)`."""
        found: np.ndarray = self._session.run(None, {"ids": ids, "mask": mask})[0]
        return found
