"""Groups into batches without a scheduler."""

from collections.abc import Sequence

from qwen_rerank.scorers.qwen.packing import PackedBatch, QueryGroup, Waiting, fill


def plan_batches(groups: Sequence[QueryGroup], *, token_budget: int) -> list[PackedBatch]:
    """Return batches of at most `token_budget` tokens; a document that is longer with its prefix lies alone."""
    queue = [Waiting(group) for group in groups]
    batches: list[PackedBatch] = []
    while queue := [item for item in queue if item.tokens]:
        batches.append(PackedBatch(tuple(fill(queue, token_budget, force=True))))
    return batches
