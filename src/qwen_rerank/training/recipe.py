"""The model under training as one sentence-transformers module: exact prompts in, log-odds out."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwen_rerank.errors import MissingExtraError
from qwen_rerank.prompt import PromptEncoder

try:
    import torch
    from safetensors.torch import save_model
    from sentence_transformers.base.modules import InputModule
    from torch import nn
    from transformers import DynamicCache, PreTrainedModel
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Model
except ImportError as exc:
    raise MissingExtraError("Training", package="sentence-transformers", extra="train", cause=exc) from exc

# transformers renames the argument during version 5.
_CACHE = "cache" if "cache" in inspect.signature(Qwen3Model.forward).parameters else "past_key_values"


class RecipeModel(InputModule):
    """Scores (query, document) pairs with the recipe's prompt, built as token ids and never by a chat template.

    The tokens that all prompts of a batch start with are computed once; the scores are those of whole prompts.

    Args:
        backbone: A `Qwen3ForCausalLM`, with or without LoRA layers in it.
        encoder: Builds the prompts.
        share_prefix: Whether to compute the common start once; not possible with gradient checkpointing.
    """

    def __init__(self, backbone: PreTrainedModel, encoder: PromptEncoder, *, share_prefix: bool = True) -> None:
        super().__init__()
        self.backbone = backbone
        self.encoder = encoder
        self.share_prefix = share_prefix
        self.processor = None  # nothing for the trainer to save beside the weights

    def preprocess(
        self, inputs: Sequence[Sequence[str]], prompt: str | None = None, **_: Any
    ) -> dict[str, torch.Tensor]:
        """Return the ids of the pairs: `prefix_ids` `(n_shared,)`, `input_ids` `(n, longest)`, `lengths` `(n,)`.

        Args:
            inputs: Pairs of query and document.
            prompt: An instruction for all of them; None means the encoder's.
        """
        prompts = encode_pairs(self.encoder, inputs, instruction=prompt)
        n_shared = common_length(prompts) if self.share_prefix else 0
        rest = [ids[n_shared:] for ids in prompts]
        padded = np.zeros((len(rest), max(map(len, rest))), dtype=np.int64)
        for row, ids in zip(padded, rest, strict=True):
            row[: len(ids)] = ids
        return {
            "prefix_ids": torch.from_numpy(prompts[0][:n_shared].astype(np.int64)),
            "input_ids": torch.from_numpy(padded),
            "lengths": torch.tensor([len(ids) for ids in rest]),
        }

    def forward(self, features: dict[str, torch.Tensor], **_: Any) -> dict[str, torch.Tensor]:
        """Add `scores`, float32 `(n, 1)`: the log-odds."""
        ids, lengths = features["input_ids"], features["lengths"]
        decoder, head = self._decoder_and_head()
        shared = features["prefix_ids"]
        arguments: dict[str, Any] = {"use_cache": False}
        if len(shared):
            cache = DynamicCache()
            decoder(input_ids=shared[None], use_cache=True, **{_CACHE: cache})
            cache.batch_repeat_interleave(len(ids))
            arguments = {"use_cache": True, _CACHE: cache}
        # Padding stands on the right and the mask is causal, so no real token ever looks at it.
        hidden = decoder(input_ids=ids, **arguments).last_hidden_state
        last = hidden[torch.arange(len(ids), device=hidden.device), lengths - 1]
        # Outside autocast: bfloat16 would turn close scores into ties.
        with torch.autocast(hidden.device.type, enabled=False):
            rows: torch.Tensor = head.get_parameter("weight")
            direction = rows[self.encoder.yes_id].float() - rows[self.encoder.no_id].float()
            features["scores"] = (last.float() @ direction)[:, None]
        return features

    def _decoder_and_head(self) -> tuple[nn.Module, nn.Module]:
        model = self.backbone.get_base_model() if hasattr(self.backbone, "get_base_model") else self.backbone
        return model.model, model.lm_head

    def save(self, output_path: str, *_: Any, **__: Any) -> None:
        """Save the weights as they are, LoRA layers apart, for resuming; `save_checkpoint` makes the plain form."""
        save_model(self, str(Path(output_path) / "model.safetensors"))


def encode_pairs(
    encoder: PromptEncoder, pairs: Sequence[Sequence[str]], *, instruction: str | None
) -> list[np.ndarray]:
    """Return the ids of each (query, document), int32 `(n_tokens,)`, in input order."""
    by_query: dict[str, list[int]] = {}
    for i, (query, _) in enumerate(pairs):
        by_query.setdefault(query, []).append(i)
    out: dict[int, np.ndarray] = {}
    for query, rows in by_query.items():
        prompts = encoder.encode(query, [pairs[i][1] for i in rows], instruction=instruction)
        out.update((i, prompt.ids) for i, prompt in zip(rows, prompts, strict=True))
    return [out[i] for i in range(len(pairs))]


def common_length(prompts: Sequence[np.ndarray]) -> int:
    """Return how many ids all prompts start with, at least one less than the shortest has."""
    limit = min(map(len, prompts)) - 1
    first = prompts[0][:limit]
    for ids in prompts[1:]:
        differs = np.flatnonzero(first != ids[: len(first)])
        if len(differs):
            first = first[: differs[0]]
    return len(first)
