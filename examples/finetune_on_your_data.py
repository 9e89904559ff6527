"""Teach a reranker your documents: train on one split, see the gain on another with its uncertainty.

    python examples/finetune_on_your_data.py
    python examples/finetune_on_your_data.py my-collection --train dev --test test
    python examples/finetune_on_your_data.py my-collection --model Qwen/Qwen3-Reranker-0.6B --lora-rank 16 --learning-rate 1e-4

A collection is a folder in BEIR layout (corpus.jsonl, queries.jsonl, qrels/<split>.tsv). Without one the shipped texts are used, half of
their titles as questions to train on and the other half to test on: too few to gain anything, enough to see every step.
'pocket', the default, has Qwen3-Reranker's shape and trains in seconds; it ranks badly and is not Qwen3-Reranker.

Needs, in a clone: pip install '.[train,eval]'.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qwen_rerank import BM25Index, Document, QwenScorer, Reranker, load_embedder
from qwen_rerank.evaluation.collection import Collection, load_beir
from qwen_rerank.evaluation.experiment import recall, rerank_run, score_run
from qwen_rerank.evaluation.measures import measure
from qwen_rerank.evaluation.significance import compare
from qwen_rerank.samples import load_sample
from qwen_rerank.training import (
    EmbeddedDocuments,
    Example,
    Mining,
    RerankerTraining,
    load_training_data,
    mine_negatives,
    train_reranker,
)

MEASURE = "nDCG@10"
DEPTH = 50


def main() -> None:
    """Mine negatives, train, and compare before and after on questions that were never seen."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("collection", type=Path, nargs="?", help="folder in BEIR layout")
    parser.add_argument("--train", default="train", help="split to train on")
    parser.add_argument("--test", default="test", help="split to measure on")
    parser.add_argument("--model", default="pocket", help="reranker to start from: a hub name, a folder, or 'pocket'")
    parser.add_argument("--output", type=Path, default=Path("my-reranker"), help="folder of the new model")
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="1e-5 suits the real models, 1e-4 LoRA")
    parser.add_argument("--lora-rank", type=int)
    arguments = parser.parse_args()

    if arguments.collection is None:
        examples, test = shipped()
    else:
        examples = load_training_data(arguments.collection, split=arguments.train).examples
        test = load_beir(arguments.collection, split=arguments.test)
    nearest = EmbeddedDocuments(test.documents, load_embedder("pocket"))
    mined = mine_negatives(examples, [BM25Index(test.documents), nearest], mining=Mining(per_query=7))
    usable = [example for example in mined if example.positives and example.negatives]
    print(f"{len(usable)} questions to train on, {len(test.queries)} to test on")

    training = RerankerTraining(
        objective="listwise",
        epochs=arguments.epochs,
        learning_rate=arguments.learning_rate,
        lora_rank=arguments.lora_rank,
        max_documents=8,
        max_length=512,
        train_embeddings=False,
    )
    report = train_reranker(arguments.model, usable, arguments.output, training=training)
    print(f"loss {report.losses[0][1]:.3f} to {report.losses[-1][1]:.3f}; saved in {report.folder}")

    found = recall(nearest, test, top_k=DEPTH).run
    values = {"first stage": measure(found, test.qrels, [MEASURE])}
    for name, model in (("before", arguments.model), ("after", str(report.folder))):
        scores = score_run(Reranker(QwenScorer(model, max_length=1024)), test, found, depth=DEPTH, name=name)
        values[name] = measure(rerank_run(found, scores, depth=DEPTH), test.qrels, [MEASURE])
    print(f"reranker: {arguments.model}")
    for name, result in values.items():
        print(f"{name:<12} {MEASURE} {result.means[MEASURE]:.3f}")
    gain = compare(values["before"].per_query[MEASURE], {"after": values["after"].per_query[MEASURE]})["after"]
    print(f"gain of the training: {gain.difference:+.3f} (95 %: {gain.low:+.3f} to {gain.high:+.3f})")


def shipped() -> tuple[list[Example], Collection]:
    """Return half of the shipped texts' titles with their bodies as examples, and the other half as a collection."""
    samples = [document for language in ("zh", "en") for document in load_sample(language).documents]
    documents = [Document(sample.id, sample.text.split("\n", 1)[1]) for sample in samples]
    titles = {sample.id: str(sample.metadata["title"]) for sample in samples}
    examples = [Example(titles[document.id], (document.text,), (1.0,)) for document in documents[::2]]
    queries = {document.id: titles[document.id] for document in documents[1::2]}
    return examples, Collection("shipped texts", "test", documents, queries, {query: {query: 1} for query in queries})


if __name__ == "__main__":
    main()
