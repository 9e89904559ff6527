"""Fine-tuning of a Qwen3 reranker on sentence-transformers' trainer, full or with LoRA."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from qwen_rerank.checks import check_choice, check_count, check_positive, check_probability, is_finite
from qwen_rerank.documents import Example
from qwen_rerank.errors import InvalidInputError, MissingExtraError, ModelError

try:
    import torch
    from datasets import Dataset
    from safetensors.torch import load_model
    from sentence_transformers.cross_encoder import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments
    from sentence_transformers.cross_encoder.evaluation import CrossEncoderRerankingEvaluator
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss, ListNetLoss
    from transformers import AutoModelForCausalLM
except ImportError as exc:
    raise MissingExtraError("train_reranker", package="sentence-transformers", extra="train", cause=exc) from exc

from qwen_rerank.prompt import PromptEncoder
from qwen_rerank.scorers.qwen.checkpoint import Checkpoint, load_checkpoint
from qwen_rerank.training.losses import DistillationLoss
from qwen_rerank.training.recipe import RecipeModel
from qwen_rerank.training.saving import save_checkpoint

logger = logging.getLogger(__name__)

OBJECTIVES = ("pointwise", "listwise", "distillation")


@dataclass(frozen=True, slots=True, kw_only=True)
class RerankerTraining:
    """The settings of a reranker's training.

    Attributes:
        objective: "pointwise" (binary cross entropy on each pair), "listwise" (softmax over a query's documents) or
            "distillation" (squared error to a teacher's log-odds).
        listwise_weight: With "distillation": share of the loss that compares the order of each list, 0 to 1.
        epochs: Passes over the examples; may be a fraction.
        max_steps: Ends the training early; -1 for no limit.
        batch_size: Examples (queries with their documents) of one step; pairs with "pointwise".
        mini_batch_size: Pairs of one forward pass.
        learning_rate: Peak; it rises over `warmup_ratio` of the steps and falls linearly to 0.
        warmup_ratio: Share of the steps.
        weight_decay: Of AdamW.
        max_length: Tokens of one prompt; documents are cut to fit.
        max_documents: Documents of one example; positives come first.
        train_embeddings: Whether the token embeddings (and a tied output head) are trained; with few examples they are
            better left as they are, and each step is cheaper.
        lora_rank: Rank of LoRA layers on all linear layers; None trains every weight.
        lora_alpha: Scale of the LoRA layers; None means twice the rank.
        instruction: Put into every prompt; None means the checkpoint's default.
        template: "transformers" or "vllm", as for scoring.
        precision: "auto" is bfloat16 autocast where a GPU has it, else float32. Weights stay float32.
        gradient_checkpointing: Saves memory, costs time.
        eval_steps: Steps between evaluations and between saved states; None means ten in all.
        seed: Of everything random.
    """

    objective: Literal["pointwise", "listwise", "distillation"] = "listwise"
    listwise_weight: float = 0.0
    epochs: float = 1.0
    max_steps: int = -1
    batch_size: int = 8
    mini_batch_size: int = 32
    learning_rate: float = 1e-5
    warmup_ratio: float = 0.1
    weight_decay: float = 0.01
    max_length: int = 1024
    max_documents: int = 16
    train_embeddings: bool = True
    lora_rank: int | None = None
    lora_alpha: int | None = None
    instruction: str | None = None
    template: Literal["transformers", "vllm"] = "transformers"
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    gradient_checkpointing: bool = False
    eval_steps: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("objective", self.objective, OBJECTIVES)
        check_choice("precision", self.precision, ("auto", "bfloat16", "float32"))
        check_probability("listwise_weight", self.listwise_weight)
        check_probability("warmup_ratio", self.warmup_ratio)
        for name in ("batch_size", "mini_batch_size", "max_length", "max_documents"):
            check_count(name, getattr(self, name))
        for name in ("lora_rank", "lora_alpha", "eval_steps"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        check_positive("epochs", self.epochs)
        check_positive("learning_rate", self.learning_rate)
        if not is_finite(self.weight_decay) or self.weight_decay < 0:
            raise InvalidInputError(f"weight_decay must be a finite number of at least 0, not {self.weight_decay!r}.")
        if self.max_steps != -1:
            check_count("max_steps", self.max_steps)
        check_count("seed", self.seed, minimum=0)
        check_choice("template", self.template, ("transformers", "vllm"))
        if not isinstance(self.gradient_checkpointing, bool):
            raise InvalidInputError(
                f"gradient_checkpointing must be True or False, not {self.gradient_checkpointing!r}."
            )


@dataclass(frozen=True, slots=True)
class TrainingReport:
    """The result of a reranker's training.

    Attributes:
        folder: The plain checkpoint.
        losses: (step, loss) as logged.
        evaluations: (step, nDCG@10 on the held-out examples), empty without them.
    """

    folder: Path
    losses: tuple[tuple[int, float], ...]
    evaluations: tuple[tuple[int, float], ...]


def train_reranker(
    base: str,
    examples: Sequence[Example],
    output: str | Path,
    *,
    training: RerankerTraining | None = None,
    held_out: Sequence[Example] = (),
    resume: bool = False,
) -> TrainingReport:
    """Fine-tune a Qwen3 reranker and save a plain `Qwen3ForCausalLM` checkpoint.

    The result loads in stock Transformers, in sentence-transformers' `CrossEncoder`, in vLLM and in `QwenScorer`.
    States for resuming lie in `<output>/states`; they hold pickled optimizer state, so resume only your own.

    Args:
        base: Hub name, folder, or "pocket".
        examples: With teacher scores for "distillation", with labels otherwise.
        output: Folder of the new checkpoint.
        training: How to train; None means the defaults.
        held_out: Labelled examples for nDCG@10 during the training; the state with the best value is kept.
        resume: Whether to go on from the last state in `<output>/states`.

    Raises:
        InvalidInputError: If the examples do not fit the objective, or there is nothing to resume.
        ModelError: If the base cannot be trained.
        MissingExtraError: If the `train` extra, or peft for LoRA, is not installed.
    """
    training = training or RerankerTraining()
    _check_examples(examples, training)
    torch.manual_seed(training.seed)
    checkpoint = load_checkpoint(base)
    module = _module(checkpoint, training)
    model = CrossEncoder(modules=[module], num_labels=1)
    states = Path(output) / "states"
    last = _last_state(states) if resume else None
    trainer = _RerankerTrainer(
        model=model,
        args=_arguments(training, states, n_rows=_n_rows(examples, training), evaluate=bool(held_out)),
        train_dataset=_dataset(examples, training),
        loss=_loss(model, training),
        evaluator=_evaluator(held_out, training) if held_out else None,
    )
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    folder = save_checkpoint(module, checkpoint, Path(output))
    history = trainer.state.log_history
    return TrainingReport(
        folder,
        tuple((row["step"], float(row["loss"])) for row in history if "loss" in row),
        tuple((row["step"], float(row[_METRIC])) for row in history if _METRIC in row),
    )


_NAME = "held_out"
_METRIC = f"eval_{_NAME}_ndcg@10"


class _RerankerTrainer(CrossEncoderTrainer):
    """Loads a saved state into the model at hand; LoRA layers and prompt need no rebuilding that way."""

    def _load_from_checkpoint(self, checkpoint_path: str) -> None:
        module = self.model[0]
        load_model(module, str(Path(checkpoint_path) / "model.safetensors"))
        # The two names of a tied head are one tensor on disk.
        if module.backbone.config.tie_word_embeddings:
            (
                module.backbone.get_base_model() if hasattr(module.backbone, "get_base_model") else module.backbone
            ).tie_weights()

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """Add none: it tokenizes single texts for statistics, and this model reads pairs."""


def _check_examples(examples: Sequence[Example], training: RerankerTraining) -> None:
    if not examples:
        raise InvalidInputError("examples is empty; give at least one query with documents.")
    wanted = training.objective == "distillation"
    wrong = sum(example.teacher != wanted for example in examples)
    if wrong:
        needed = "teacher scores (`documents` and `scores`)" if wanted else "labels (`positive` and `negative`)"
        raise InvalidInputError(f"objective {training.objective!r} needs {needed}, but {wrong} examples have none.")
    if training.objective == "listwise":
        flat = sum(not example.positives or not example.negatives for example in examples)
        if flat:
            raise InvalidInputError(
                f"{flat} examples have only positives or only negatives, so a list has no order to learn; "
                "mine negatives first (`mine_negatives`)."
            )


def _module(checkpoint: Checkpoint, training: RerankerTraining) -> RecipeModel:
    encoder = PromptEncoder(
        checkpoint.tokenizer,
        spec=checkpoint.prompt_spec(training.template),
        instruction=training.instruction if training.instruction is not None else checkpoint.instruction,
        max_length=training.max_length,
    )
    try:
        backbone = AutoModelForCausalLM.from_pretrained(
            str(checkpoint.path),
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            attn_implementation="sdpa",
        )
    except (OSError, ValueError) as exc:
        raise ModelError(f"{checkpoint.name} cannot be loaded for training ({exc}).") from exc
    if training.gradient_checkpointing:
        backbone.gradient_checkpointing_enable({"use_reentrant": False})
        backbone.enable_input_require_grads()
    if not training.train_embeddings:
        backbone.get_input_embeddings().requires_grad_(False)
    if training.lora_rank is not None:
        backbone = _with_lora(backbone, training)
    return RecipeModel(backbone, encoder, share_prefix=not training.gradient_checkpointing)


def _with_lora(backbone: Any, training: RerankerTraining) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as exc:
        raise MissingExtraError("LoRA", package="peft", extra="train", cause=exc) from exc
    rank = training.lora_rank
    config = LoraConfig(
        r=rank,
        lora_alpha=training.lora_alpha or 2 * (rank or 0),
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    )
    return get_peft_model(backbone, config)


def _loss(model: CrossEncoder, training: RerankerTraining) -> torch.nn.Module:
    loss: torch.nn.Module
    if training.objective == "pointwise":
        loss = BinaryCrossEntropyLoss(model)
    elif training.objective == "listwise":
        loss = _ListNet(model, mini_batch_size=training.mini_batch_size)
    else:
        loss = DistillationLoss(
            model, mini_batch_size=training.mini_batch_size, listwise_weight=training.listwise_weight
        )
    return loss


class _ListNet(ListNetLoss):
    """ListNet whose labels 1 and 0 mean all the weight on the positives: their softmax would leave some elsewhere."""

    def forward(
        self, inputs: list[Any], labels: list[torch.Tensor], prompt: str | None = None, task: str | None = None
    ) -> torch.Tensor:
        sharp = [torch.where(label > 0, 0.0, -1e4) for label in labels]
        loss: torch.Tensor = super().forward(inputs, sharp, prompt=prompt, task=task)
        return loss


def _rows(examples: Sequence[Example], training: RerankerTraining) -> list[Example]:
    """Return the examples with at most `max_documents` documents each, positives first."""
    rows = []
    for example in examples:
        by_score = np.argsort(-np.asarray(example.scores), kind="stable")
        order = by_score.tolist()[: training.max_documents]
        documents = tuple(example.documents[i] for i in order)
        rows.append(Example(example.query, documents, tuple(example.scores[i] for i in order), example.teacher))
    return rows


def _n_rows(examples: Sequence[Example], training: RerankerTraining) -> int:
    if training.objective != "pointwise":
        return len(examples)
    return sum(min(len(example.documents), training.max_documents) for example in examples)


def _dataset(examples: Sequence[Example], training: RerankerTraining) -> Dataset:
    rows = _rows(examples, training)
    if training.objective != "pointwise":
        return Dataset.from_dict(
            {
                "query": [row.query for row in rows],
                "documents": [list(row.documents) for row in rows],
                "labels": [list(row.scores) for row in rows],
            }
        )
    pairs = [(row.query, text, score) for row in rows for text, score in zip(row.documents, row.scores, strict=True)]
    queries, documents, labels = zip(*pairs, strict=True)
    return Dataset.from_dict({"query": queries, "document": documents, "label": labels})


def _evaluator(held_out: Sequence[Example], training: RerankerTraining) -> CrossEncoderRerankingEvaluator:
    samples = [
        {"query": e.query, "positive": list(e.positives), "negative": list(e.negatives)}
        for e in held_out
        if e.positives and e.negatives
    ]
    if not samples:
        raise InvalidInputError("held_out has no example with both a positive and a negative, so nothing to measure.")
    return CrossEncoderRerankingEvaluator(
        samples, at_k=10, name=_NAME, batch_size=training.mini_batch_size, write_csv=False
    )


def _arguments(
    training: RerankerTraining, states: Path, *, n_rows: int, evaluate: bool
) -> CrossEncoderTrainingArguments:
    per_epoch = -(-n_rows // training.batch_size)
    n_steps = training.max_steps if training.max_steps > 0 else max(1, round(per_epoch * training.epochs))
    every = training.eval_steps or max(1, n_steps // 10)
    cuda = torch.cuda.is_available()
    half = training.precision == "bfloat16" or (
        training.precision == "auto" and cuda and torch.cuda.is_bf16_supported()
    )
    return CrossEncoderTrainingArguments(
        output_dir=str(states),
        num_train_epochs=training.epochs,
        max_steps=training.max_steps,
        per_device_train_batch_size=training.batch_size,
        learning_rate=training.learning_rate,
        warmup_steps=round(training.warmup_ratio * n_steps),
        weight_decay=training.weight_decay,
        bf16=half,
        use_cpu=not cuda,
        seed=training.seed,
        data_seed=training.seed,
        eval_strategy="steps" if evaluate else "no",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=evaluate,
        metric_for_best_model=_METRIC if evaluate else None,
        greater_is_better=True if evaluate else None,
        logging_steps=max(1, min(every, 20)),
        report_to=[],
        disable_tqdm=None,
        dataloader_pin_memory=cuda,
    )


def _last_state(states: Path) -> Path:
    found = [path for path in states.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    if not found:
        raise InvalidInputError(f"there is no saved state in {str(states)!r} to resume from; train without resume.")
    return max(found, key=lambda path: int(path.name.rsplit("-", 1)[1]))
