"""The contestants: one random model of the true shape, scored in several ways. Text in, log-odds out, all tokenize."""

from __future__ import annotations

import json
import logging
import tempfile
import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from qwen_rerank.prompt import DEFAULT_INSTRUCTION, PREFIX, SUFFIX, PromptTokenizer
from qwen_rerank.scorers.qwen import scorer as scorer_module
from qwen_rerank.scorers.qwen.checkpoint import Checkpoint
from qwen_rerank.scorers.qwen.config import QwenModelConfig
from qwen_rerank.scorers.qwen.scorer import QwenScorer

YES, NO = 9693, 2152
SHAPES = {
    "0.6B": {"hidden": 1024, "layers": 28, "heads": 16, "mlp": 3072, "tied": True},
    "4B": {"hidden": 2560, "layers": 36, "heads": 32, "mlp": 9728, "tied": True},
    "8B": {"hidden": 4096, "layers": 36, "heads": 32, "mlp": 12288, "tied": False},
    "tiny": {"hidden": 64, "layers": 2, "heads": 4, "mlp": 96, "tied": True},
}


class Contestant(Protocol):
    """Scores in its own way.

    Attributes:
        in_process: Whether its model is in this process, so that its memory can be read here.
    """

    in_process = True

    @abstractmethod
    def score(self, queries: Sequence[str], documents: Sequence[Sequence[str]]) -> list[np.ndarray]:
        """Return log-odds, one array for each query."""

    def tune(
        self, queries: Sequence[str], documents: Sequence[Sequence[str]], known: dict[str, float]
    ) -> dict[str, float]:
        """Take the settings that are best for this work: by the seconds `known`, or by trying; return those seconds."""
        return {}

    def settings(self) -> dict[str, Any]:
        """Return what a reader has to know of it."""
        return {}

    def forget(self) -> None:
        """Drop what was kept of queries and documents, so that a round computes what the first one did."""


def model_config(size: str, *, layers: int | None = None) -> Qwen3Config:
    """Return the shape of Qwen3-Reranker of that size."""
    shape = SHAPES[size]
    return Qwen3Config(
        hidden_size=shape["hidden"],
        num_hidden_layers=layers or shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=8 if size != "tiny" else 2,
        head_dim=128 if size != "tiny" else 32,
        intermediate_size=shape["mlp"],
        vocab_size=151_669,
        max_position_embeddings=40_960,
        rope_theta=1_000_000.0,
        rms_norm_eps=1e-6,
        tie_word_embeddings=shape["tied"],
        initializer_range=0.02,
    )


def random_model(config: Qwen3Config, *, dtype: torch.dtype, device: str) -> Qwen3ForCausalLM:
    """Return a random model, made on the device. Random weights say nothing of quality, and cost what trained ones do."""
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen3ForCausalLM._from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval()


def tried(
    seconds: Callable[[int], float], batch_sizes: Sequence[int], n_documents: int, *, times: int = 1
) -> dict[str, float]:
    """Return the best seconds of each batch size, but for those that make the same single batch as the one before."""
    useful = [size for i, size in enumerate(batch_sizes) if i == 0 or batch_sizes[i - 1] < n_documents]
    return {str(size): round(min(seconds(size) for _ in range(times)), 4) for size in useful}


class Recipe(Contestant):
    """The model card's code, in batches; `last_only` is the same with `logits_to_keep=1`."""

    def __init__(self, model: Any, tokenizer: Path, *, batch_size: int, last_only: bool) -> None:
        self._model, self._batch_size, self._last_only = model, batch_size, last_only
        self._tokenizer = AutoTokenizer.from_pretrained(tokenizer, padding_side="left")
        self._prefix = self._tokenizer.encode(PREFIX, add_special_tokens=False)
        self._suffix = self._tokenizer.encode(SUFFIX, add_special_tokens=False)

    def score(self, queries: Sequence[str], documents: Sequence[Sequence[str]]) -> list[np.ndarray]:
        """Return log-odds, one array for each query."""
        bodies = [
            f"<Instruct>: {DEFAULT_INSTRUCTION}\n<Query>: {query}\n<Document>: {document}"
            for query, texts in zip(queries, documents, strict=True)
            for document in texts
        ]
        scores = [self._batch(bodies[i : i + self._batch_size]) for i in range(0, len(bodies), self._batch_size)]
        return np.split(np.concatenate(scores), np.cumsum([len(texts) for texts in documents])[:-1])

    @torch.no_grad()
    def _batch(self, bodies: list[str]) -> np.ndarray:
        inputs = self._tokenizer(bodies, padding=False, add_special_tokens=False, return_attention_mask=False)
        inputs["input_ids"] = [self._prefix + ids + self._suffix for ids in inputs["input_ids"]]
        padded = self._tokenizer.pad(inputs, padding=True, return_tensors="pt").to(self._model.device)
        keep = {"logits_to_keep": 1} if self._last_only else {}
        logits = self._model(**padded, **keep).logits[:, -1, :].float()
        return (logits[:, YES] - logits[:, NO]).cpu().numpy()


class SentenceTransformers(Contestant):
    """`CrossEncoder` on its native causal path, with the same model inside, at its best batch size."""

    def __init__(self, model: Any, tokenizer: Path, *, batch_sizes: Sequence[int], tried: int) -> None:
        from sentence_transformers import CrossEncoder
        from sentence_transformers.base.modules import Transformer
        from sentence_transformers.cross_encoder.modules import LogitScore

        self._batch_sizes, self._batch_size, self._tried, self._model = batch_sizes, batch_sizes[0], tried, model
        with tempfile.TemporaryDirectory() as folder:
            small = Qwen3ForCausalLM(model_config("tiny"))
            small.save_pretrained(folder)
            AutoTokenizer.from_pretrained(tokenizer, padding_side="left").save_pretrained(folder)
            how = {"method": "forward", "method_output_name": "logits"}
            body = Transformer(
                folder,
                transformer_task="text-generation",
                modality_config={"text": how, "message": {**how, "format": "flat"}},
                module_output_name="causal_logits",
                processing_kwargs={"chat_template": {"add_generation_prompt": True}},
            )
        # The loaded model only brought the module into shape; this one is scored.
        body.model = model
        body.tokenizer.chat_template = chat_template()
        self._encoder = CrossEncoder(
            modules=[body, LogitScore(YES, NO)], device=str(model.device), activation_fn=torch.nn.Identity()
        )

    def score(self, queries: Sequence[str], documents: Sequence[Sequence[str]]) -> list[np.ndarray]:
        """Return log-odds, one array for each query."""
        pairs = [(query, text) for query, texts in zip(queries, documents, strict=True) for text in texts]
        scores = self._encoder.predict(pairs, batch_size=self._batch_size, show_progress_bar=False)
        return np.split(np.asarray(scores, dtype=np.float32), np.cumsum([len(texts) for texts in documents])[:-1])

    def tune(
        self, queries: Sequence[str], documents: Sequence[Sequence[str]], known: dict[str, float]
    ) -> dict[str, float]:
        """Take the fastest batch size, each tried once on the first queries."""
        some = next((i for i, n in enumerate(accumulate(map(len, documents)), 1) if n >= self._tried), len(queries))

        def seconds(size: int) -> float:
            self._batch_size, start = size, time.perf_counter()
            self.score(queries[:some], documents[:some])
            return time.perf_counter() - start

        times = (
            2 if self._model.device.type == "cuda" else 1
        )  # a GPU's first run of a shape is slow by as much as it takes
        found = known or tried(seconds, self._batch_sizes, sum(map(len, documents[:some])), times=times)
        self._batch_size = int(min(found, key=found.__getitem__))
        return found


def chat_template() -> str:
    """Return a chat template that renders the model card's prompt; its last newlines are written out, as Jinja trims."""
    prefix, suffix = json.dumps(PREFIX), json.dumps(SUFFIX)
    role = "(messages | selectattr('role', 'eq', '{}') | map(attribute='content') | first)".format
    instruction = json.dumps(f"<Instruct>: {DEFAULT_INSTRUCTION}\n<Query>: ")
    document = json.dumps("\n<Document>: ")
    return f"{{{{ {prefix} + {instruction} + {role('query')} + {document} + {role('document')} + {suffix} }}}}"


class Engine(Contestant):
    """This package's engine, with a copy of the same weights in the shape it reads."""

    def __init__(self, model: Any, tokenizer: Path, *, outliers: bool = False, **options: Any) -> None:
        checkpoint = as_checkpoint(model, tokenizer)
        if outliers:
            plant_outliers(checkpoint.weights, checkpoint.config)
        self.config = checkpoint.config
        self.weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        load, scorer_module.load_checkpoint = scorer_module.load_checkpoint, lambda *_, **__: checkpoint
        self._warnings: list[str] = []  # kernels that cannot be used here, say
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: self._warnings.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("qwen_rerank").addHandler(handler)
        try:
            self.scorer = QwenScorer("random", **options)
        finally:
            scorer_module.load_checkpoint = load

    def score(self, queries: Sequence[str], documents: Sequence[Sequence[str]]) -> list[np.ndarray]:
        """Return log-odds, one array for each query."""
        return self.scorer.score_many(queries, documents)

    def settings(self) -> dict[str, Any]:
        """Return the dtype, what the engine warned of, and of 8 bits how much of the weights is not in them."""
        found: dict[str, Any] = {"dtype": str(self.scorer.dtype), "warnings": self._warnings}
        if quantization := self.scorer.quantization:
            found |= {
                "exact_share_of_weights": quantization.exact_share,
                "matrices_in_groups": len(quantization.grouped),
            }
        return found


class Vllm(Contestant):
    """vLLM's scoring with prefix caching, its model in a process of its own, where it is installed.

    With `int8` its W8A8: weights of one scale an output row, activations of one a token, and no matrix left out.
    """

    in_process = False

    def __init__(
        self,
        model: Any,
        tokenizer: Path,
        *,
        folder: Path,
        dtype: str,
        max_length: int,
        int8: bool = False,
        **options: Any,
    ) -> None:
        from vllm import LLM

        if not folder.exists():
            model.save_pretrained(folder)
            AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
            if int8:
                write_w8a8(folder)
        self._llm = LLM(
            model=str(folder),
            dtype=dtype,
            max_model_len=max_length,
            enable_prefix_caching=True,
            runner="pooling",
            hf_overrides={
                "architectures": ["Qwen3ForSequenceClassification"],
                "classifier_from_token": ["no", "yes"],
                "is_original_qwen3_reranker": True,
            },
            **options,
        )

    def forget(self) -> None:
        """Empty the prefix cache but for what all prompts begin with: a second round must not read the first's keys."""
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not empty its prefix cache, so that its next round would be too fast.")
        self.score(["warm"], [["up"]])

    def score(self, queries: Sequence[str], documents: Sequence[Sequence[str]]) -> list[np.ndarray]:
        """Return log-odds, one array for each query."""
        pairs = [(query, text) for query, texts in zip(queries, documents, strict=True) for text in texts]
        head = PREFIX + f"<Instruct>: {DEFAULT_INSTRUCTION}\n<Query>: "
        prompts = [f"{head}{query}\n<Document>: {text}{SUFFIX}" for query, text in pairs]
        outputs = self._llm.classify(prompts, use_tqdm=False)
        found = np.array([output.outputs.probs[-1] for output in outputs], dtype=np.float64)
        scores = np.log(found / (1 - found)).astype(np.float32)
        return np.split(scores, np.cumsum([len(texts) for texts in documents])[:-1])


def write_w8a8(folder: Path) -> None:
    """Write the linear weights of a saved model in 8 bits, in the format of compressed-tensors, which vLLM reads."""
    path = folder / "model.safetensors"
    stored, found = load_file(path), {}
    for name, weight in stored.items():
        found[name] = weight
        if name.endswith("_proj.weight"):
            scale = weight.float().abs().amax(dim=1, keepdim=True) / 127
            found[name] = (weight.float() / scale).round().to(torch.int8)
            found[f"{name}_scale"] = scale.to(weight.dtype)
    save_file(found, path, metadata={"format": "pt"})
    eight_bits = {"num_bits": 8, "type": "int", "symmetric": True}
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head", "score"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**eight_bits, "strategy": "channel", "dynamic": False},
                "input_activations": {**eight_bits, "strategy": "token", "dynamic": True},
            }
        },
    }
    (folder / "config.json").write_text(json.dumps(config))


def plant_outliers(weights: dict[str, torch.Tensor], config: QwenModelConfig) -> None:
    """Give every fourth MLP one input channel that is 2,048 times as large and counts as much less; no exact score moves."""
    for i in range(0, config.n_layers, 4):
        at, channel = f"model.layers.{i}.", 3
        for name, factor in (
            ("post_attention_layernorm", 2048),
            ("mlp.gate_proj", 1 / 2048),
            ("mlp.up_proj", 1 / 2048),
        ):
            changed = weights[f"{at}{name}.weight"].clone()
            changed[..., channel] *= factor
            weights[f"{at}{name}.weight"] = changed


def shape_of(config: Qwen3Config) -> QwenModelConfig:
    """Return a shape as the engine reads it."""
    return QwenModelConfig(
        kind="causal",
        tied=config.tie_word_embeddings,
        hidden_size=config.hidden_size,
        n_layers=config.num_hidden_layers,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        intermediate_size=config.intermediate_size,
        rms_norm_eps=config.rms_norm_eps,
        rope_theta=1_000_000.0,
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
    )


def as_checkpoint(model: Any, tokenizer: Path) -> Checkpoint:
    """Return the model as an opened checkpoint, without writing files."""
    weights = dict(model.state_dict())
    rows = weights.pop("lm_head.weight")
    text = (tokenizer / "tokenizer.json").read_text()
    return Checkpoint(
        name="random",
        revision=None,
        path=tokenizer,
        config=shape_of(model.config),
        weights=weights,
        head=(rows[YES].float() - rows[NO].float()).cpu(),
        tokenizer=PromptTokenizer(text),
        tokenizer_json=text,
        prompt={},
        fingerprint="random",
    )
