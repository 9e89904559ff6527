"""A reference model that scores any prompt, slowly and plainly: one prompt at a time, float32, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qwen_rerank.errors import MissingExtraError, ModelCorruptError

try:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
except ImportError as exc:
    raise MissingExtraError("a reference model", package="transformers", extra="transformers", cause=exc) from exc

from qwen_rerank.check.variants import RECIPE, Variant
from qwen_rerank.prompt import PromptEncoder, PromptSpec
from qwen_rerank.scorers.qwen.checkpoint import load_checkpoint

_AFFORDABLE = 10**12  # weights times tokens: about ten seconds on two cores
_EMBEDDING = "model.embed_tokens.weight"


class Reference:
    """Log-odds of prompts, by the true output head and by the one that some servers read in its place.

    Args:
        model: Folder or hub name of a checkpoint.
        revision: Commit on the hub.

    Attributes:
        name: As the user named it.
        path: Its folder.
        spec: The checkpoint's prompt strings.
        instruction: Its default instruction.
        longest: Tokens of the longest prompt that takes seconds, not minutes.
        untied: Whether the output head differs from the embedding's rows, so that reading those would be wrong.
    """

    def __init__(self, model: str, *, revision: str | None = None) -> None:
        checkpoint = load_checkpoint(model, revision=revision)
        self.name = checkpoint.name
        self.path = str(checkpoint.path)
        self.spec: PromptSpec = checkpoint.prompt_spec("transformers")
        self.tokenizer = checkpoint.tokenizer
        self._instruction = checkpoint.instruction
        self.encoder = self.encoder_for(checkpoint.config.max_positions)
        self.instruction = self.encoder.instruction
        embedding = checkpoint.weights[_EMBEDDING]
        rows = embedding[self.encoder.yes_id].float() - embedding[self.encoder.no_id].float()
        self.heads = {"true": checkpoint.head, "embedding": rows}
        self.untied = checkpoint.config.kind != "seq-cls" and not torch.equal(checkpoint.head, rows)
        self._model = _load(str(checkpoint.path), checkpoint.config.kind)
        self._states: dict[bytes, torch.Tensor] = {}
        layers = sum(p.numel() for p in self._model.parameters()) - embedding.numel()
        self.longest = _AFFORDABLE // max(1, layers)

    def encoder_for(self, max_length: int) -> PromptEncoder:
        """Return the recipe's encoder for prompts of at most `max_length` tokens."""
        return PromptEncoder(self.tokenizer, spec=self.spec, instruction=self._instruction, max_length=max_length)

    def ids(self, variant: Variant, query: str, document: str, *, instruction: str | None = None) -> np.ndarray:
        """Return the ids that a server makes of a pair: of the rendered text, control strings read as such."""
        if variant is RECIPE:
            [prompt] = self.encoder.encode(query, [document], instruction=instruction)
            return prompt.ids
        return self.text_ids(variant.render(self.spec, instruction or self.instruction, query, document))

    def text_ids(self, text: str) -> np.ndarray:
        """Return the ids of a whole prompt's text, control strings read as such."""
        return self.tokenizer.control_ids(text)

    def log_odds(self, prompts: Sequence[np.ndarray], *, head: str = "true") -> np.ndarray:
        """Return the log-odds of prompts, float64 `(n_prompts,)`."""
        return self.of_hidden(self.hidden(prompts), head=head)

    def hidden(self, prompts: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """Return the last position's hidden state of each prompt, float32 `(hidden_size,)`; each prompt is run once."""
        with torch.inference_mode():
            for ids in prompts:
                if ids.tobytes() not in self._states:
                    self._states[ids.tobytes()] = self._last(ids)
        return [self._states[ids.tobytes()] for ids in prompts]

    def of_hidden(self, states: Sequence[torch.Tensor], *, head: str = "true") -> np.ndarray:
        """Return the log-odds of hidden states, float64 `(n,)`."""
        return np.array([float(state @ self.heads[head]) for state in states])

    def _last(self, ids: np.ndarray) -> torch.Tensor:
        out = self._model(input_ids=torch.from_numpy(ids.astype(np.int64))[None], use_cache=False)
        return out.last_hidden_state[0, -1].float()  # type: ignore[no-any-return]


def _load(path: str, kind: str) -> torch.nn.Module:
    """Return the model without its output head."""
    family = AutoModelForSequenceClassification if kind == "seq-cls" else AutoModelForCausalLM
    try:
        model = family.from_pretrained(
            path, dtype=torch.float32, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
    except (OSError, ValueError, RuntimeError) as exc:
        raise ModelCorruptError(f"{path} cannot be loaded by transformers ({exc}).") from exc
    return model.eval().model  # type: ignore[no-any-return]
