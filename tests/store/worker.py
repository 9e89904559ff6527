"""A process that writes to a store and says what it does, for tests that kill it. Run as a script.

Every line on its output is one JSON value: `["begin", operation]` before and `["done"]` after each.
"""

from __future__ import annotations

import json
import os
import random
import sys
from multiprocessing.connection import Connection
from typing import Any

from qwen_rerank.store import FaissStore
from qwen_rerank.testing import HashEmbedder
from qwen_rerank.types import Document

POOL = [f"d{i}" for i in range(24)]


def say(*parts: Any) -> None:
    os.write(1, json.dumps(parts).encode() + b"\n")


def random_operation(rng: random.Random, round: int, step: int) -> list[Any]:
    kinds = {"upsert": 8, "add": 6, "delete": 5, "save": 2, "metadata": 2, "declare": 1, "compact": 1, "reopen": 1}
    [kind] = rng.choices(list(kinds), list(kinds.values()))
    if kind == "add":
        return [kind, [[f"r{round}-{step}-{i}", f"apple {step} {rng.random()}"] for i in range(rng.randint(1, 3))]]
    if kind == "upsert":
        return [kind, [[name, f"pear {round} {rng.random()}"] for name in rng.sample(POOL, rng.randint(1, 4))]]
    if kind == "declare":
        return [kind, [f"field{rng.randrange(5)}"]]
    return [kind, rng.sample(POOL, rng.randint(1, 4)) if kind in ("delete", "metadata") else []]


def apply(store: FaissStore, operation: list[Any]) -> FaissStore:
    kind, argument = operation
    if kind in ("add", "upsert"):
        getattr(store, kind)([Document(id, text, {"length": len(text)}) for id, text in argument])
    elif kind == "delete":
        store.delete(argument)
    elif kind == "metadata":
        store.update_metadata({id: {"changed": True} for id in argument})
    elif kind == "declare":
        store.declare(argument)
    elif kind == "reopen":
        store.close()
        return FaissStore.open(store.path, HashEmbedder(16))
    else:
        getattr(store, kind)()
    return store


def apply_to_model(model: dict[str, str], operation: list[Any]) -> dict[str, str]:
    kind, argument = operation
    if kind in ("add", "upsert"):
        return {**model, **dict(argument)}
    if kind == "delete":
        return {id: text for id, text in model.items() if id not in argument}
    return model


def run(path: str, operations: str, output: Connection) -> None:
    """Be the script in a forked process."""
    os.dup2(output.fileno(), 1)
    output.close()
    main(path, operations)


def main(path: str, operations: str) -> None:
    say("opening")
    store = FaissStore.open(path, HashEmbedder(16))
    steps = json.loads(operations)
    rng = random.Random(steps) if isinstance(steps, int) else None
    for step in range(100_000):
        if rng is None and step == len(steps):
            break
        operation = random_operation(rng, steps, step) if rng else steps[step]
        say("begin", operation)
        store = apply(store, operation)
        say("done")
    store.close()
    say("closed")


if __name__ == "__main__":
    main(*sys.argv[1:])
