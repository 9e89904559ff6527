"""Trees into packs without a scheduler."""

from collections.abc import Sequence

from qwen_rerank.packing import Pack, Tree, Waiting, fill


def plan_packs(trees: Sequence[Tree], *, token_budget: int) -> list[Pack]:
    """Return packs of at most `token_budget` tokens; a document that is longer with its prefix lies alone."""
    queue = [Waiting(tree) for tree in trees]
    packs: list[Pack] = []
    while queue := [item for item in queue if item.tokens]:
        packs.append(Pack(tuple(fill(queue, token_budget, force=True))))
    return packs
