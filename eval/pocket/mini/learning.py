"""One run of training: which lists come next, what a step learns from them, and how a run that was stopped goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from batches import batch, by_length
from lists import Lists
from model import Mini
from safetensors import safe_open
from safetensors.torch import save_file

LANGUAGES = ("en", "zh")
MIDDLE = 45.0  # about where untrained scores lie
# How much of the target is the label; the rest is the teachers' opinion.
LABEL_SHARE = {
    "labelled": 0.6, "heading": 0.4, "title": 0.2, "cloze": 0.4, "keywords": 0.2, "span": 0.4,
    "definition": 0.4, "docstring": 0.5, "code": 0.4, "teacher": 0.0,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides the weights that come out; the same settings, lists, threads and device give the same bits."""

    steps: int
    batch: int = 96  # lists of one step
    width: int = 12  # candidates of a list in one step
    rate: float = 1e-4
    labels: float = 1.0  # factor of LABEL_SHARE
    sharp: float = 2.0  # how sharp the teachers' opinion is
    seed: int = 1
    longest: int = 256  # tokens of a pair
    tokens: int = 65_536  # of one forward pass
    kept: int = 1 << 20  # tokens whose states are kept for one backward pass: memory, about 200 KB each


class Chooser:
    """Draws the candidates of one step and makes their target."""

    def __init__(self, lists: Lists, weights: list[float], settings: Settings) -> None:
        self.lists, self.settings = lists, settings
        self.real = lists.candidates >= 0
        self.blend = np.where(self.real, (lists.teachers * np.array(weights, np.float32)).sum(-1) / sum(weights), -1e4)
        share = np.array([LABEL_SHARE[kind] for kind in lists.kinds], np.float32) * settings.labels
        self.share = np.where(lists.positives == 0, share, 0).clip(0, 0.95)
        self.usable = np.nonzero(self.real.sum(1) >= settings.width)[0]

    def draw(self, rows: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return places `(rows, width)` and targets that sum to 1; the answer, where known, comes first."""
        noise = generator.random((len(rows), self.real.shape[1]))
        noise[~self.real[rows]] = 2
        known = self.lists.positives[rows] == 0
        noise[known, 0] = -1
        unknown = np.nonzero(~known)[0]  # the teachers' favourite is always in the list
        noise[unknown, self.blend[rows[unknown]].argmax(1)] = -1
        columns = np.argsort(noise, axis=1)[:, : self.settings.width]
        value = np.take_along_axis(self.blend[rows], columns, 1) * self.settings.sharp
        target = np.exp(value - value.max(1, keepdims=True))
        target /= target.sum(1, keepdims=True)
        share = self.share[rows][:, None]
        label = np.zeros_like(target)
        label[known, 0] = 1
        target = np.where(known[:, None], (1 - share) * target + share * label, target)
        return np.take_along_axis(self.lists.candidates[rows], columns, 1), target.astype(np.float32)


def together(tokens: np.ndarray, most: int) -> Iterator[np.ndarray]:
    """Yield groups of places, the longest first, each of about `most` tokens at most."""
    order = np.argsort(-tokens, kind="stable")
    group = (np.cumsum(tokens[order]) - 1) // most
    yield from np.split(order, np.nonzero(np.diff(group))[0] + 1)


class Training:
    """A model on its way: `step` learns from the next lists, `save` writes all that the next step depends on."""

    def __init__(self, model: Mini, choosers: Mapping[str, Chooser], settings: Settings) -> None:
        self.model, self.choosers, self.settings = model.train(), choosers, settings
        model.words.weight.requires_grad_(False)  # the vocabulary keeps its four-bit blocks
        named = list(model.named_parameters())
        groups = [
            ([p for n, p in named if n.startswith("layers") and "between" not in n], 1.0, 0.01),
            ([p for n, p in named if n.startswith(("positions", "kinds", "embedding_norm"))], 0.3, 0.0),
            ([layer.between for layer in model.layers], 100.0, 0.0),
            ([*model.weigh.parameters(), *model.extra.parameters()], 10.0, 0.01),
            ([model.scale], 2000.0, 0.0),
        ]
        self.optimizer = torch.optim.AdamW(
            [{"params": p, "lr": settings.rate * factor, "weight_decay": decay} for p, factor, decay in groups],
            betas=(0.9, 0.98),
        )
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.generator = np.random.default_rng(settings.seed)
        self.queues = {language: np.array([], np.int64) for language in choosers}
        usable = {language: len(chooser.usable) for language, chooser in choosers.items()}
        self.english = usable["en"] / sum(usable.values())
        self.losses: list[float] = []  # of every step
        self.tokens = self.pairs = 0

    def step(self) -> float:
        """Learn from the next lists and return their loss."""
        progress = len(self.losses) / self.settings.steps
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * min(1.0, progress / 0.04 + 0.01) * (1 - progress)
        language = LANGUAGES[int(self.generator.random() > self.english)]
        chooser, size = self.choosers[language], self.settings.batch
        if len(self.queues[language]) < size:
            self.queues[language] = self.generator.permutation(chooser.usable)
        rows, self.queues[language] = self.queues[language][:size], self.queues[language][size:]
        candidates, target = chooser.draw(rows, self.generator)
        lists = chooser.lists
        tokens = lists.queries.lengths[rows][:, None] + lists.passages.lengths[candidates]
        tokens = np.minimum(tokens, self.settings.longest)
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        # Lists that lie together are learned from together; their gradients add up to those of the whole step.
        for group in together(tokens.sum(1), self.settings.kept):
            loss = self.loss(lists, rows[group], candidates[group], target[group]) * (len(group) / len(rows))
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.losses.append(total)
        self.tokens, self.pairs = self.tokens + int(tokens.sum()), self.pairs + candidates.size
        return total

    def loss(self, lists: Lists, rows: np.ndarray, candidates: np.ndarray, target: np.ndarray) -> torch.Tensor:
        """Return how far scores are from the target, mean over lists: as an order, and a little pair by pair."""
        device, longest = lists.queries.ids.device, self.settings.longest
        a, b = np.repeat(rows, candidates.shape[1]), candidates.reshape(-1)
        lengths = np.minimum(lists.queries.lengths[a] + lists.passages.lengths[b], longest)
        parts, scores = list(by_length(lengths, self.settings.tokens)), []
        for part in parts:
            ids, mask = batch(lists.queries, lists.passages, a[part], b[part], longest)
            with torch.autocast(device.type, torch.bfloat16):
                scores.append(self.model(ids, mask).float())
        back = torch.as_tensor(np.argsort(np.concatenate(parts)), device=device)
        found = torch.cat(scores)[back].view(candidates.shape)
        goal = torch.as_tensor(target, device=device)
        likely = goal / goal.amax(1, keepdim=True)
        order = -(goal * F.log_softmax(found, 1)).sum(1).mean()
        return order + 0.05 * F.binary_cross_entropy_with_logits(found - MIDDLE, likely)

    def save(self, path: Path) -> None:
        """Write everything that the next step depends on: weights, optimizer, what is drawn next, and the counts."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items() if not k.startswith("words")}
        for place, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{place}.{key}": value for key, value in state.items()}
        tensors |= {f"queue.{language}": torch.from_numpy(rows.copy()) for language, rows in self.queues.items()}
        note = {
            "settings": asdict(self.settings), "generator": self.generator.bit_generator.state,
            "losses": self.losses, "tokens": self.tokens, "pairs": self.pairs,
        }  # fmt: skip
        unfinished = path.with_suffix(".unfinished")
        tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        save_file(tensors, unfinished, metadata={"note": json.dumps(note)})
        os.replace(unfinished, path)  # a run killed here still has the checkpoint before

    def resume(self, path: Path) -> None:
        """Go on where `save` wrote; settings other than those of the checkpoint are refused."""
        with safe_open(path, "pt") as file:
            note = json.loads(file.metadata()["note"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if note["settings"] != asdict(self.settings):
            raise SystemExit(f"{path} is of a run with other settings ({note['settings']}); remove it to begin anew.")
        words = self.model.words.weight.detach()
        state = {name.removeprefix("model."): v for name, v in tensors.items() if name.startswith("model.")}
        self.model.load_state_dict({**state, "words.weight": words})
        state = self.optimizer.state_dict()
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, place, key = name.split(".")
                state["state"].setdefault(int(place), {})[key] = value
        self.optimizer.load_state_dict(state)
        self.queues = {language: tensors[f"queue.{language}"].numpy() for language in self.queues}
        self.generator.bit_generator.state = note["generator"]
        self.losses, self.tokens, self.pairs = note["losses"], note["tokens"], note["pairs"]
