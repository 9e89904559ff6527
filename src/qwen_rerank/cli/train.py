"""Commands of `qwen-rerank` for training: `train reranker` and `train embedder`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qwen_rerank.cli import options

if TYPE_CHECKING:
    from qwen_rerank.training import Example, TrainingData

_commands = typer.Typer(
    name="train", help="Fine-tune a reranker or an embedder on your own data.", no_args_is_help=True
)

Data = Annotated[
    Path,
    typer.Argument(
        help="JSONL of {query, positive(s), negative(s)} or {query, documents, scores}, or a folder in BEIR layout."
    ),
]
Output = Annotated[
    Path, typer.Option("--output", "-o", help="Folder of the trained model; states to resume lie in it.")
]
Split = Annotated[str, typer.Option("--split", help="Which qrels of a BEIR folder.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad-lines", help="Go on without lines that cannot be used.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last saved state; only your own (pickle).")]
Epochs = Annotated[float, typer.Option("--epochs", help="Passes over the data; may be a fraction.")]
BatchSize = Annotated[int, typer.Option("--batch-size", help="Queries of one step (pairs with pointwise).")]
LearningRate = Annotated[float, typer.Option("--learning-rate", help="Peak.")]
Seed = Annotated[int, typer.Option("--seed", help="Of everything random.")]


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    _commands.command()(reranker)
    _commands.command()(embedder)
    app.add_typer(_commands)


def reranker(
    data: Data,
    output: Output,
    model: options.Model = options.DEFAULT_MODEL,
    objective: Annotated[
        Literal["pointwise", "listwise", "distillation"],
        typer.Option("--objective", help="Binary cross entropy, softmax over each list, or a teacher's log-odds."),
    ] = "listwise",
    held_out: Annotated[
        Path | None, typer.Option("--held-out", help="JSONL to measure nDCG@10 on while training.")
    ] = None,
    negatives: Annotated[
        int, typer.Option("--negatives", help="Hard negatives to mine for each query from the corpus; 0 for none.")
    ] = 7,
    embedder: Annotated[
        str | None, typer.Option("--embedder", "-e", help="Mine with this embedder too, beside BM25.")
    ] = None,
    lora_rank: Annotated[int | None, typer.Option("--lora-rank", help="Train LoRA layers of this rank.")] = None,
    max_length: Annotated[int, typer.Option("--max-length", help="Tokens of one prompt.")] = 1024,
    instruction: options.Instruction = None,
    epochs: Epochs = 1.0,
    batch_size: BatchSize = 8,
    learning_rate: LearningRate = 1e-5,
    split: Split = "train",
    skip_bad_lines: SkipBad = False,
    resume: Resume = False,
    seed: Seed = 0,
) -> None:
    """Fine-tune a Qwen3 reranker; the result loads in Transformers, sentence-transformers, vLLM and this package."""
    from qwen_rerank.training import RerankerTraining, train_reranker

    training = RerankerTraining(
        objective=objective,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        max_length=max_length,
        lora_rank=lora_rank,
        instruction=instruction,
        seed=seed,
    )
    read = _read(data, split, skip_bad_lines)
    examples = read.examples
    if negatives and read.corpus and objective != "distillation":
        examples = _mine(read, negatives, embedder, seed)
    judged = _read(held_out, split, skip_bad_lines).examples if held_out else []
    report = train_reranker(model, examples, output, training=training, held_out=judged, resume=resume)
    _say(f"{report.folder}: loss {report.losses[0][1]:.4f} to {report.losses[-1][1]:.4f}")
    for step, value in report.evaluations:
        _say(f"  step {step}: nDCG@10 {value:.4f}")
    _say(f"Next: qwen-rerank rerank --model {output} …")


def embedder(
    data: Data,
    output: Output,
    base: Annotated[str, typer.Option("--base", help="'pocket', or the folder of a static embedder.")] = "pocket",
    epochs: Epochs = 3.0,
    batch_size: BatchSize = 512,
    learning_rate: LearningRate = 1e-3,
    split: Split = "train",
    skip_bad_lines: SkipBad = False,
    resume: Resume = False,
    seed: Seed = 0,
) -> None:
    """Train a static embedder; the result loads in sentence-transformers and, without torch, in this package."""
    from qwen_rerank.training import EmbedderTraining, train_embedder

    training = EmbedderTraining(epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, seed=seed)
    report = train_embedder(base, _read(data, split, skip_bad_lines).examples, output, training=training, resume=resume)
    _say(f"{report.folder}: loss {report.losses[0][1]:.4f} to {report.losses[-1][1]:.4f}")


def _read(path: Path, split: str, skip_bad_lines: bool) -> TrainingData:
    from qwen_rerank.training import load_training_data

    read = load_training_data(path, split=split, skip_bad_lines=skip_bad_lines)
    for bad in read.bad_lines:
        _say(f"skipped {bad.where}: {bad.reason}")
    _say(f"{path}: {len(read.examples)} examples, {len(read.bad_lines)} lines skipped")
    return read


def _mine(read: TrainingData, per_query: int, embedder: str | None, seed: int) -> list[Example]:
    from qwen_rerank.embedders import load_embedder
    from qwen_rerank.lexical import BM25Index
    from qwen_rerank.protocols import FirstStage
    from qwen_rerank.training import EmbeddedDocuments, Mining, mine_negatives

    stages: list[FirstStage] = [BM25Index(read.corpus)]
    if embedder is not None:
        stages.append(EmbeddedDocuments(read.corpus, load_embedder(embedder)))
    return mine_negatives(read.examples, stages, mining=Mining(per_query=per_query, seed=seed))


def _say(text: str) -> None:
    from qwen_rerank.cli.show import errors

    errors.print(text, highlight=False, markup=False)
