"""First stages by name over a collection: BM25, an embedder over FAISS, or the fusion of several."""

from __future__ import annotations

import hashlib
from pathlib import Path

from qwen_rerank.embedders import load_embedder
from qwen_rerank.evaluation.collection import Collection
from qwen_rerank.lexical import BM25Index
from qwen_rerank.pipeline import FusedFirstStage
from qwen_rerank.protocols import FirstStage
from qwen_rerank.store import FaissStore


def first_stage(name: str, collection: Collection, *, folder: Path) -> FirstStage:
    """Return the first stage called `name` over the collection's documents.

    Args:
        name: "bm25"; an embedder's name or folder; or several joined by "+", which are fused by reciprocal rank.
        collection: Its documents are searched.
        folder: Where the stores of embedders are kept; one that is there is used again.
    """
    parts = name.split("+")
    if len(parts) > 1:
        return FusedFirstStage([first_stage(part, collection, folder=folder) for part in parts])
    if name == "bm25":
        return BM25Index(collection.documents)
    return _dense(name, collection, folder)


def _dense(name: str, collection: Collection, folder: Path) -> FaissStore:
    embedder = load_embedder(name)
    digest = hashlib.sha256(f"{collection.name}\0{embedder.fingerprint}".encode())
    for document in collection.documents:
        digest.update(f"{document.id}\0{document.text}\0".encode("utf-8", "surrogatepass"))
    path = folder / f"{collection.name}-{digest.hexdigest()[:16]}"
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = (
        FaissStore.open(path, embedder=embedder)
        if path.exists()
        else FaissStore.create(path, embedder=embedder, words=False)
    )
    with writer:
        if len(writer) < len(collection.documents):  # new, or a run that broke off
            writer.upsert(collection.documents)
    return FaissStore.open(path, embedder=embedder, read_only=True)  # readers may be many, a writer is alone
