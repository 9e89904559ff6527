"""Training of a static embedder on sentence-transformers' trainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from qwen_rerank.checks import check_choice, check_count, check_positive
from qwen_rerank.documents import Example
from qwen_rerank.embedders.static import TOKENIZER, WEIGHTS, StaticEmbedder
from qwen_rerank.errors import InvalidInputError, MissingExtraError
from qwen_rerank.models.names import find_model

try:
    import torch
    from datasets import Dataset
    from safetensors.torch import load_file, save_file
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding
except ImportError as exc:
    raise MissingExtraError("train_embedder", package="sentence-transformers", extra="train", cause=exc) from exc


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedderTraining:
    """The settings of a static embedder's training: each query against its positive, the batch's others as negatives.

    Attributes:
        epochs: Passes over the pairs; may be a fraction.
        batch_size: Pairs of one step; more is harder and better.
        learning_rate: Peak; it falls linearly to 0.
        temperature: Cosines are divided by it.
        dtype: Of the saved vectors.
        seed: Of the order of the pairs.
    """

    epochs: float = 3.0
    batch_size: int = 512
    learning_rate: float = 1e-3
    temperature: float = 0.05
    dtype: str = "float16"
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("batch_size", self.batch_size, minimum=2)
        check_choice("dtype", self.dtype, ("float16", "float32"))
        for name in ("epochs", "learning_rate", "temperature"):
            check_positive(name, getattr(self, name))
        check_count("seed", self.seed, minimum=0)


@dataclass(frozen=True, slots=True)
class EmbedderReport:
    """The result of a training: the folder, and (step, loss) as logged."""

    folder: Path
    losses: tuple[tuple[int, float], ...]


def train_embedder(
    base: str | Path | tuple[Tokenizer, np.ndarray],
    examples: Sequence[Example],
    output: str | Path,
    *,
    training: EmbedderTraining | None = None,
    resume: bool = False,
) -> EmbedderReport:
    """Train a static embedder; the folder loads in sentence-transformers and in `StaticEmbedder`.

    Every positive of an example makes a pair with its query; negatives are not read, the batch has enough.
    States for resuming lie in `<output>/states`; they hold pickled optimizer state, so resume only your own.

    Args:
        base: "pocket", the folder of a static embedder, or a tokenizer with vectors float32 `(n_tokens, dim)`.
        examples: Queries with positives.
        output: Folder of the new embedder.
        training: How to train; None means the defaults.
        resume: Whether to go on from the last state in `<output>/states`.

    Raises:
        InvalidInputError: If there are fewer than two pairs, or there is nothing to resume.
        ModelError: If the base cannot be read.
    """
    training = training or EmbedderTraining()
    pairs = [(example.query, text) for example in examples for text in example.positives]
    if len(pairs) < 2:
        raise InvalidInputError(f"the examples hold {len(pairs)} positive pair(s); at least two are needed.")
    folder = Path(output)
    states = folder / "states"
    if resume and not any(states.glob("checkpoint-*/trainer_state.json")):
        raise InvalidInputError(f"there is no saved state in {str(states)!r} to resume from; train without resume.")
    torch.manual_seed(training.seed)
    tokenizer, vectors = _read(base) if isinstance(base, str | Path) else base
    model = SentenceTransformer(
        modules=[StaticEmbedding(tokenizer, embedding_weights=vectors.astype(np.float32)), Normalize()],
        device=_device(),
    )
    trainer = _EmbedderTrainer(
        model=model,
        args=_arguments(training, states, n_pairs=len(pairs)),
        train_dataset=Dataset.from_dict({"query": [q for q, _ in pairs], "document": [d for _, d in pairs]}),
        loss=MultipleNegativesRankingLoss(model, scale=1.0 / training.temperature),
    )
    trainer.train(resume_from_checkpoint=resume or None)
    _save(model, folder, training.dtype)
    losses = tuple((row["step"], float(row["loss"])) for row in trainer.state.log_history if "loss" in row)
    return EmbedderReport(folder, losses)


class _EmbedderTrainer(SentenceTransformerTrainer):
    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """Add none: it would tokenize samples of the data for a card that is not written."""


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _read(name: str | Path) -> tuple[Tokenizer, np.ndarray]:
    folder = find_model(str(name), kind="embedder").path
    StaticEmbedder(folder)  # says what is wrong with a folder that is no static embedder
    vectors = load_file(folder / WEIGHTS)["embedding.weight"].float().numpy()
    return Tokenizer.from_file(str(folder / TOKENIZER)), vectors


def _arguments(training: EmbedderTraining, states: Path, *, n_pairs: int) -> SentenceTransformerTrainingArguments:
    n_steps = max(1, round(training.epochs * n_pairs / training.batch_size))
    return SentenceTransformerTrainingArguments(
        output_dir=str(states),
        num_train_epochs=training.epochs,
        per_device_train_batch_size=training.batch_size,
        learning_rate=training.learning_rate,
        use_cpu=not torch.cuda.is_available(),
        seed=training.seed,
        data_seed=training.seed,
        save_strategy="steps",
        save_steps=max(1, n_steps // 5),
        save_total_limit=2,
        logging_steps=max(1, min(20, n_steps // 10)),
        report_to=[],
        disable_tqdm=None,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def _save(model: SentenceTransformer, folder: Path, dtype: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model.save(str(folder), create_model_card=False)
    vectors = model[0].embedding.weight.detach().cpu().to(getattr(torch, dtype))
    save_file({"embedding.weight": vectors.contiguous()}, folder / WEIGHTS)
