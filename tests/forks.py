"""Run as a program with a folder: uses everything, forks a child for each kind of use, and prints what came of them.

The parent computes in parallel first, so that OpenMP has helper threads, which no child has.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

PATIENCE_S = 60
TEXTS = [f"text {number} about cats and dogs " * 20 for number in range(8)]


def in_child(action: Callable[[], object]) -> str:
    """Return what an action says in a forked child; "hangs" where it does."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            said = str(action())
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    deadline = time.monotonic() + PATIENCE_S
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, 9)
            os.waitpid(child, 0)
            return "hangs"
        time.sleep(0.02)
    with open(read, "rb") as pipe:
        return pipe.read().decode()


def torch_alone() -> dict[str, str]:
    """The parent only uses torch; what is ours is imported in the child."""

    def new() -> str:
        from qwen_rerank import load_scorer

        return str(bool(np.isfinite(load_scorer("pocket").score("cats", TEXTS)).all()))

    return {"QwenScorer after torch alone": in_child(new)}


def everything(folder: Path) -> dict[str, str]:
    """The parent uses scorers, embedders and stores of every kind."""
    import faiss
    from langchain_core.documents import Document

    from qwen_rerank import BM25Index, CrossEncoderScorer, FaissStore, QwenScorer, ScorerPool, load_embedder
    from qwen_rerank.langchain import QwenRerankCompressor
    from tests.scorers.cross_encoders import make_bert

    bert = str(make_bert(folder / "bert"))
    qwen, cross_encoder, embedder = (
        QwenScorer("pocket"),
        CrossEncoderScorer(bert, device="cpu"),
        load_embedder("pocket"),
    )
    dense = load_embedder(str(make_embedder(folder / "dense")), device="cpu")
    pool, lexical = ScorerPool([cross_encoder]), BM25Index(TEXTS)
    compressor = QwenRerankCompressor(model="pocket", top_n=2)
    pages = [Document(text) for text in TEXTS]
    compressor.compress_documents(pages, "cats")
    vectors = np.random.default_rng(0).random((20_000, 64), dtype=np.float32)
    index = faiss.IndexFlatIP(64)
    index.add(vectors)
    index.search(vectors[:200], 5)

    def scores(scorer: object) -> str:
        expected = cross_encoder_scores if scorer is not qwen else None
        found = scorer.score("cats", TEXTS)
        return str(expected is None or bool(np.allclose(found, expected, atol=1e-5)))

    def embeds(model: object) -> str:
        return str(model.embed_documents(TEXTS).shape == (len(TEXTS), model.dim))

    def new_store() -> str:
        with FaissStore.create(folder / "store", embedder=embedder) as store:
            store.add([f"{text} {number}" for number in range(400) for text in TEXTS])
            store.search_many(["cats"] * 40, 3)
            return str(len(store.search("cats", 3)) == 3)

    cross_encoder_scores = cross_encoder.score("cats", TEXTS)
    qwen.score("cats", TEXTS)
    for model in (embedder, dense):
        model.embed_documents(TEXTS)
    return {
        "an inherited QwenScorer": in_child(lambda: scores(qwen)),
        "a new QwenScorer": in_child(lambda: np.isfinite(QwenScorer("pocket").score("cats", TEXTS)).all()),
        "an inherited CrossEncoderScorer": in_child(lambda: scores(cross_encoder)),
        "a new CrossEncoderScorer": in_child(lambda: scores(CrossEncoderScorer(bert, device="cpu"))),
        "an inherited ScorerPool": in_child(lambda: scores(pool)),
        "an inherited StaticEmbedder": in_child(lambda: embeds(embedder)),
        "an inherited SentenceTransformerEmbedder": in_child(lambda: embeds(dense)),
        "a new SentenceTransformerEmbedder": in_child(
            lambda: embeds(load_embedder(str(folder / "dense"), device="cpu"))
        ),
        "a new FaissStore": in_child(new_store),
        "an inherited BM25Index": in_child(lambda: len(lexical.search("cats", 3)) == 3),
        "an inherited QwenRerankCompressor": in_child(lambda: len(compressor.compress_documents(pages, "cats")) == 2),
    }


def make_embedder(folder: Path) -> Path:
    """Write a sentence-transformers model of one layer with random weights."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizer

    from tests.scorers.cross_encoders import LETTERS, SIZES

    folder.mkdir(parents=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    BertTokenizer(vocab=str(folder / "vocab.txt"), model_max_length=64).save_pretrained(folder / "bert")
    BertModel(BertConfig(vocab_size=len(vocabulary), max_position_embeddings=64, **SIZES)).save_pretrained(
        folder / "bert"
    )
    transformer = Transformer(str(folder / "bert"))
    SentenceTransformer(modules=[transformer, Pooling(transformer.get_embedding_dimension())]).save(str(folder))
    return folder


if __name__ == "__main__":
    torch.set_num_threads(2)
    (torch.randn(1500, 1500) @ torch.randn(1500, 1500)).sum()
    print(json.dumps({**torch_alone(), **everything(Path(sys.argv[1]))}))
