"""The loss for distillation of lists; the pointwise and listwise losses are sentence-transformers' own."""

from __future__ import annotations

from qwen_rerank.errors import MissingExtraError

try:
    import torch
    from sentence_transformers.cross_encoder import CrossEncoder
    from sentence_transformers.util import batch_to_device
    from torch import Tensor, nn
    from torch.nn.functional import cross_entropy, mse_loss
except ImportError as exc:
    raise MissingExtraError("Training", package="sentence-transformers", extra="train", cause=exc) from exc


class DistillationLoss(nn.Module):
    """Mean squared error to a teacher's log-odds, and if wished the cross entropy to the teacher's order.

    Args:
        model: The student.
        mini_batch_size: Pairs of one forward pass.
        listwise_weight: Weight of the cross entropy between the softmax over each query's documents of teacher and
            student; the squared error has the rest to 1.
    """

    def __init__(self, model: CrossEncoder, *, mini_batch_size: int, listwise_weight: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self.mini_batch_size = mini_batch_size
        self.listwise_weight = listwise_weight

    def forward(
        self, inputs: list[list[str]], labels: list[Tensor], prompt: str | None = None, task: str | None = None
    ) -> Tensor:
        """Return the loss of queries with their documents.

        Args:
            inputs: Queries, and for each its list of documents.
            labels: For each query the teacher's log-odds, `(n_documents,)`.
            prompt: Instruction.
            task: Unused; part of the trainer's interface.
        """
        queries, lists = inputs
        pairs = [(query, text) for query, texts in zip(queries, lists, strict=True) for text in texts]
        scores = score_pairs(self.model, pairs, mini_batch_size=self.mini_batch_size, prompt=prompt)
        teacher = [label.float().to(scores.device) for label in labels]
        student = torch.split(scores, [len(label) for label in teacher])
        squared = mse_loss(scores, torch.cat(teacher))
        order = torch.stack(
            [cross_entropy(own, other.softmax(dim=0)) for own, other in zip(student, teacher, strict=True)]
        ).mean()
        return (1.0 - self.listwise_weight) * squared + self.listwise_weight * order


def score_pairs(
    model: CrossEncoder, pairs: list[tuple[str, str]], *, mini_batch_size: int, prompt: str | None
) -> Tensor:
    """Return float32 `(n_pairs,)` with gradients, `mini_batch_size` pairs at a time, input order."""
    # Neighbours in length share a forward pass, so that little of it is padding.
    order = sorted(range(len(pairs)), key=lambda i: sum(len(text.encode()) for text in pairs[i]))
    parts = []
    for start in range(0, len(pairs), mini_batch_size):
        batch = [pairs[i] for i in order[start : start + mini_batch_size]]
        features = batch_to_device(model.preprocess(batch, prompt=prompt), model.device)
        parts.append(model(features)["scores"].view(-1))
    scores = torch.cat(parts).float()
    return scores[torch.tensor(order, device=scores.device).argsort()]
