from __future__ import annotations

import subprocess
import sys

from qwen_rerank import Embedder, FaissStore, load_embedder


def test_pocket_ships_with_the_package(tmp_path):
    embedder = load_embedder("pocket")

    assert isinstance(embedder, Embedder)
    assert load_embedder("pocket").fingerprint == embedder.fingerprint
    with FaissStore.create(tmp_path / "store", embedder) as store:
        store.add(["The apple grows on a tree.", "银行提高了利率。"])
        assert store.search("a tree with apples", 1)[0].document.text == "The apple grows on a tree."
        assert store.search("银行利率", 1)[0].document.text == "银行提高了利率。"


def test_pocket_needs_neither_torch_nor_sentence_transformers():
    code = "import sys, qwen_rerank; qwen_rerank.load_embedder('pocket'); print({'torch', 'sentence_transformers'} & set(sys.modules))"

    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
