"""Train the mini reranker: mine candidate lists, let teachers judge them, learn their order and the labels.

    python eval/pocket/mini/train.py teachers --work build/mini
    python eval/pocket/mini/train.py lists --work build/mini
    python eval/pocket/mini/train.py train --work build/mini --name one --labels 0.5 --rate 1e-4 --seed 1
    python eval/pocket/mini/train.py train --work build/mini --name two --labels 0.3 --rate 6e-5 --seed 2
    python eval/pocket/mini/train.py combine --work build/mini --runs one two --name mini

`--work` holds `e5/` (of `origin.py`), `texts/` (of `texts.py`), `candidates.json.xz` (of `candidates.py`) and, for the
teacher of English, `minilm/` (of `teacher.py`). Seeds are fixed. It ran on one H100 GPU for minutes; on two CPU cores
the same number of lists takes days, a tenth of them hours.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from itertools import product
from pathlib import Path

import lists as mining
import numpy as np
import quality
import torch
import torch.nn.functional as F
from batches import LONGEST_QUERY, batch, by_length
from lists import TEACHERS, Lists, MiniLM, blended, read, tokenized
from model import Mini, from_origin

# How much of the target is the label; the rest is the teachers' opinion.
LABEL_SHARE = {
    "labelled": 0.6, "heading": 0.4, "title": 0.2, "cloze": 0.4, "keywords": 0.2, "span": 0.4,
    "definition": 0.4, "docstring": 0.5, "code": 0.4, "teacher": 0.0,
}  # fmt: skip
LANGUAGES = ("en", "zh")


def main() -> None:
    """Run one step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["teachers", "lists", "train", "combine"])
    parser.add_argument("--work", type=Path, default=Path("build/mini"))
    parser.add_argument("--output", type=Path, help="where results go; --work without it")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--longest", type=int, default=256, help="tokens of a pair")
    parser.add_argument("--tokens", type=int, default=32_768, help="tokens of one forward pass while training")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--limit", type=int, default=0, help="queries a language, for a rehearsal")
    parser.add_argument("--hard", type=int, default=12, help="candidates from each of BM25 and e5")
    parser.add_argument("--chance", type=int, default=4, help="candidates drawn at random")
    parser.add_argument("--seconds", type=float, default=20_000)
    parser.add_argument("--batch", type=int, default=64, help="lists of one step")
    parser.add_argument("--width", type=int, default=12, help="candidates of a list in one step")
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--sharp", type=float, default=2.0, help="how sharp the teachers' opinion is")
    parser.add_argument("--labels", type=float, default=1.0, help="factor of LABEL_SHARE")
    parser.add_argument("--runs", nargs="*", default=[], help="names of trained models to combine")
    parser.add_argument("--name", default="mini")
    parser.add_argument("--every", type=float, default=1e9, help="seconds between measurements")
    parser.add_argument("--only", nargs="*", help="collections to measure")
    parser.add_argument("--queries", type=int, default=400, help="queries of a collection to measure")
    options = parser.parse_args()
    options.output = options.output or options.work
    torch.manual_seed(options.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    if options.device == "cpu":
        torch.set_num_threads(options.workers)
    {"teachers": teachers, "lists": make_lists, "train": train, "combine": combine}[options.step](options)


# --- lists -----------------------------------------------------------------------------------------------------------


def make_lists(options: argparse.Namespace) -> None:
    """Write `lists.<language>.npz`: candidates, and the teachers' standardised opinions in steps of 1/20."""
    model = apart(from_origin(options.work / "e5")).to(options.device).eval()
    minilm = MiniLM(options.work / "minilm", options.device) if (options.work / "minilm").exists() else None
    for language in LANGUAGES:
        began = time.time()
        found = mining.mined(model, minilm, options.work / "e5", options.work / "texts", language, options)
        real = found.candidates >= 0
        z = np.stack([blended(found.teachers, real, np.eye(len(TEACHERS))[k]) for k in range(len(TEACHERS))], -1)
        np.savez_compressed(
            options.output / f"lists.{language}.npz",
            candidates=found.candidates.astype(np.int32),
            teachers=np.clip(np.round(z * 20), -127, 127).astype(np.int8),
            positives=found.positives.astype(np.int8),
        )
        best = z.argmax(1)[found.positives == 0]
        kinds = np.array(found.kinds)[found.positives == 0]
        first = {kind: [round(float(x), 3) for x in (best[kinds == kind] == 0).mean(0)] for kind in sorted(set(kinds))}
        note = {
            "language": language,
            "queries": len(real),
            "seconds": round(time.time() - began, 1),
            "positive first": first,
        }
        print(json.dumps(note), flush=True)


def apart(model: Mini) -> Mini:
    """Return the model with both texts read apart: untrained e5."""
    for layer in model.layers:
        layer.between.data.fill_(-30.0)
    return model


def read_lists(options: argparse.Namespace, language: str) -> Lists:
    """Return the lists of one language with their texts, tokenized."""
    stored = np.load(options.work / f"lists.{language}.npz")
    asked = read(options.work / "texts", "queries", language)
    if options.limit:
        asked = asked[:: max(1, len(asked) // options.limit)][: options.limit]
    bodies = [r["text"] for r in read(options.work / "texts", "passages", language)]
    where = {"folder": options.work / "e5", "device": options.device}
    return Lists(
        tokenized(texts=[r["query"] for r in asked], query=True, longest=LONGEST_QUERY, **where),
        tokenized(texts=bodies, query=False, longest=options.longest, **where),
        stored["candidates"],
        stored["teachers"].astype(np.float32) / 20,
        stored["positives"].astype(np.int64),
        [r["kind"] for r in asked],
    )


# --- training --------------------------------------------------------------------------------------------------------


class Chooser:
    """Draws the candidates of one step and makes their target."""

    def __init__(self, lists: Lists, weights: list[float], options: argparse.Namespace) -> None:
        self.lists, self.options = lists, options
        self.real = lists.candidates >= 0
        self.blend = np.where(self.real, (lists.teachers * np.array(weights, np.float32)).sum(-1) / sum(weights), -1e4)
        share = np.array([LABEL_SHARE[kind] for kind in lists.kinds], np.float32) * options.labels
        self.share = np.where(lists.positives == 0, share, 0).clip(0, 0.95)
        ok = self.real.sum(1) >= options.width
        self.usable = np.nonzero(ok)[0]

    def draw(self, rows: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return places `(rows, width)` and targets that sum to 1; the answer, where known, comes first."""
        noise = generator.random((len(rows), self.real.shape[1]))
        noise[~self.real[rows]] = 2
        known = self.lists.positives[rows] == 0
        noise[known, 0] = -1
        unknown = np.nonzero(~known)[0]  # the teachers' favourite is always in the list
        noise[unknown, self.blend[rows[unknown]].argmax(1)] = -1
        columns = np.argsort(noise, axis=1)[:, : self.options.width]
        value = np.take_along_axis(self.blend[rows], columns, 1) * self.options.sharp
        target = np.exp(value - value.max(1, keepdims=True))
        target /= target.sum(1, keepdims=True)
        share = self.share[rows][:, None]
        label = np.zeros_like(target)
        label[known, 0] = 1
        target = np.where(known[:, None], (1 - share) * target + share * label, target)
        return np.take_along_axis(self.lists.candidates[rows], columns, 1), target.astype(np.float32)


def train(options: argparse.Namespace) -> None:
    """Train for `--seconds`, measure, and write `<name>.npz` and `<name>.json`."""
    device, began = options.device, time.time()
    model = from_origin(options.work / "e5").to(device).train()
    model.words.weight.requires_grad_(False)  # the vocabulary keeps its four-bit blocks
    weights = json.loads((options.work / "weights.json").read_text(encoding="utf-8"))
    choosers = {language: Chooser(read_lists(options, language), weights[language], options) for language in LANGUAGES}
    measured = load_measured(options)
    body = [p for n, p in model.named_parameters() if p.requires_grad and n.startswith("layers") and "between" not in n]
    other = [p for n, p in model.named_parameters() if n.startswith(("positions", "kinds", "embedding_norm"))]
    gates = [layer.between for layer in model.layers]
    head = [*model.weigh.parameters(), *model.extra.parameters()]
    groups = [
        (body, 1.0, 0.01),
        (other, 0.3, 0.0),
        (gates, 100.0, 0.0),
        (head, 10.0, 0.01),
        ([model.scale], 2000.0, 0.0),
    ]
    optimizer = torch.optim.AdamW(
        [{"params": p, "lr": options.rate * factor, "weight_decay": decay} for p, factor, decay in groups],
        betas=(0.9, 0.98),
    )
    rates = [group["lr"] for group in optimizer.param_groups]
    generator = np.random.default_rng(options.seed)
    queues = {language: np.array([], np.int64) for language in LANGUAGES}
    share = {
        language: len(c.usable) / sum(len(c.usable) for c in choosers.values()) for language, c in choosers.items()
    }
    log: dict = {
        "options": {k: str(v) for k, v in vars(options).items()},
        "weights": weights,
        "loss": [],
        "measured": [],
    }
    step, tokens, pairs, started, paused, last = 0, 0, 0, time.time(), 0.0, time.time()
    print(json.dumps({"ready after": round(started - began, 1), "share": share}), flush=True)
    losses: list[torch.Tensor] = []
    while True:
        progress = (time.time() - started - paused) / options.seconds
        if progress >= 1:
            break
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * min(1.0, progress / 0.04 + 0.01) * (1 - progress)
        language = LANGUAGES[int(generator.random() > share["en"])]
        chooser = choosers[language]
        if len(queues[language]) < options.batch:
            queues[language] = generator.permutation(chooser.usable)
        rows, queues[language] = queues[language][: options.batch], queues[language][options.batch :]
        candidates, target = chooser.draw(rows, generator)
        a, b = np.repeat(rows, candidates.shape[1]), candidates.reshape(-1)
        lists = chooser.lists
        lengths = np.minimum(lists.queries.lengths[a] + lists.passages.lengths[b], options.longest)
        parts, scores = list(by_length(lengths, options.tokens)), []
        for part in parts:
            ids, mask = batch(lists.queries, lists.passages, a[part], b[part], options.longest)
            with torch.autocast(device, torch.bfloat16):
                scores.append(model(ids, mask).float())
        back = torch.as_tensor(np.argsort(np.concatenate(parts)), device=device)
        s = torch.cat(scores)[back].view(candidates.shape)
        goal = torch.as_tensor(target, device=device)
        likely = goal / goal.amax(1, keepdim=True)
        loss = -(goal * F.log_softmax(s, 1)).sum(1).mean() + 0.05 * F.binary_cross_entropy_with_logits(
            s - MIDDLE, likely
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step, tokens, pairs = step + 1, tokens + int(lengths.sum()), pairs + len(a)
        losses.append(loss.detach())
        if time.time() - last > 10:
            last = time.time()
            value = round(float(torch.stack(losses).mean()), 4)
            losses = []
            log["loss"].append([step, value])
            note = {
                "step": step,
                "loss": value,
                "tokens": tokens,
                "tokens/s": round(tokens / (last - started - paused)),
                "s": round(last - started),
            }
            print(json.dumps(note), flush=True)
        if time.time() - started - paused > (len(log["measured"]) + 1) * options.every:
            at = time.time()
            log["measured"].append(measure(model, measured, options, step))
            paused += time.time() - at
    log |= {"steps": step, "tokens": tokens, "pairs": pairs, "trained_s": round(time.time() - started - paused, 1)}
    log["gates"] = [round(g.item(), 2) for g in gates]
    log["scale"] = [round(x, 2) for x in model.scale.tolist()]
    save(model, options.output, options.name)
    log["measured"].append(measure(model, measured, options, step))
    (options.output / f"{options.name}.json").write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({k: log[k] for k in ("steps", "tokens", "pairs", "gates", "scale")}), flush=True)


MIDDLE = 45.0  # about where untrained scores lie


def load_measured(options: argparse.Namespace) -> list[quality.Measured]:
    """Return the collections of `candidates.py`."""
    return quality.load(
        options.work / "candidates.json.xz", options.work / "e5", longest=options.longest, device=options.device,
        only=options.only, queries=options.queries,
    )  # fmt: skip


def measure(
    model: Mini, measured: list, options: argparse.Namespace, step: int, stages: tuple[str, ...] = ("bm25",)
) -> dict:
    """Return and print nDCG@10 over first stages' candidates."""
    model.eval()
    found = quality.report(measured, model, longest=options.longest, tokens=4 * options.tokens, stages=stages)
    model.train()
    for stage, table in found.items():
        print(json.dumps({"step": step, "stage": stage, **table}), flush=True)
    return found


PARTS = 3


def save(model: Mini, folder: Path, name: str) -> None:
    """Write everything but the vocabulary, matrices in float16, in files that may travel."""
    state = {k: v.detach().cpu().numpy() for k, v in model.state_dict().items() if not k.startswith("words")}
    names = sorted(state)
    for i in range(PARTS):
        part = {k: state[k].astype(np.float16 if state[k].ndim > 1 else np.float32) for k in names[i::PARTS]}
        np.savez(folder / f"{name}.{i}.npz", **part)


def restored(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Return what `save` wrote, in float32."""
    parts = [np.load(folder / f"{name}.{i}.npz") for i in range(PARTS)]
    return {k: torch.from_numpy(part[k].astype(np.float32)) for part in parts for k in part}


def combine(options: argparse.Namespace) -> None:
    """Average trained models with each other and with the start; keep what is best on `CHOSEN_ON`, and measure it.

    Averages of models trained from one start forget less of what the start knew (Wortsman et al., 2022,
    arXiv:2203.05482 and arXiv:2109.01903).
    """
    start = from_origin(options.work / "e5")
    words = start.words.weight.detach().clone()
    states = [restored(options.output, name) for name in options.runs]
    begin = {k: v.clone() for k, v in start.state_dict().items() if not k.startswith("words")}
    mean = {k: torch.stack([state[k] for state in states]).mean(0) for k in begin}
    mixtures = dict(zip(options.runs, states, strict=True))
    mixtures["mean"] = mean
    for share in (0.85, 0.7, 0.5):
        mixtures[f"mean {share}, start {round(1 - share, 2)}"] = {
            k: share * mean[k] + (1 - share) * begin[k] for k in begin
        }
    measured = load_measured(options)
    stages = quality.with_e5(measured, options.work / "teachers.npz")
    log: dict = {}
    for name, state in mixtures.items():
        start.load_state_dict({**state, "words.weight": words})
        log[name] = measure(start.to(options.device), [c for c in measured if c.role == "chosen"], options, 0)
        log[name]["value"] = log[name]["bm25"]["mean chosen"][1]
        print(json.dumps({"mixture": name, "value": log[name]["value"]}), flush=True)
    best = max(mixtures, key=lambda name: log[name]["value"])
    start.load_state_dict({**mixtures[best], "words.weight": words})
    save(start, options.output, options.name)
    log["best"] = best
    log["measured"] = measure(start, measured, options, 0, stages)
    kept = {f"{c.name} {stage}": scores.astype(np.float32) for c in measured for stage, scores in c.scores.items()}
    np.savez_compressed(options.output / f"{options.name}-scores.npz", **kept)
    (options.output / f"{options.name}.json").write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")


# --- what the teachers are worth -------------------------------------------------------------------------------------


def teachers(options: argparse.Namespace) -> None:
    """Measure each teacher and blends of them over BM25's candidates; write `teachers.json`, and e5's own first stage."""
    device = options.device
    model = apart(from_origin(options.work / "e5")).to(device).eval()
    minilm = MiniLM(options.work / "minilm", device) if (options.work / "minilm").exists() else None
    result: dict = {}
    kept = {}
    sums: dict[str, Counter[str]] = {language: Counter() for language in LANGUAGES}
    for c in load_measured(options):
        size = {"longest": options.longest, "tokens": 4 * options.tokens}
        q_vectors, q_states, q_begins = mining.encoded(model, c.queries, mining.QUERY_PREFIX, **size)
        d_vectors, d_states, d_begins = mining.encoded(model, c.documents, mining.PASSAGE_PREFIX, **size)
        a, b = c.pairs("bm25")
        lists = np.array([[d for d, _ in run] + [-1] * (50 - len(run)) for run in c.runs["bm25"]])
        real = lists >= 0
        value = np.zeros((*real.shape, len(TEACHERS)), np.float32)
        value[..., 0][real] = [s for run in c.runs["bm25"] for _, s in run]
        value[..., 1][real] = mining.maxsim(q_states, q_begins, d_states, d_begins, a, b)
        value[..., 2][real] = (q_vectors[a] * d_vectors[b]).sum(1).cpu().numpy()
        if minilm and c.language == "en":
            q, d = (minilm.vectors(texts, size["tokens"]) for texts in c.texts)
            value[..., 3][real] = (q[a] * d[b]).sum(1).cpu().numpy()
        kept[c.name] = value.astype(np.float16)
        base = c.per_query("bm25", None)
        grid = {}
        english = (0, 0.5, 1, 1.5) if c.language == "en" and minilm else (0,)
        for weights in product((0, 0.25, 0.5, 1), (0.5, 1), (0, 0.5, 1), english):
            gain = c.per_query("bm25", blended(value, real, weights)[real]) - base
            grid[" ".join(map(str, weights))] = round(float(gain.mean()), 4)
        if c.role != "measured":
            sums[c.language].update(grid)
        cosine = q_vectors @ d_vectors.T
        top = cosine.topk(min(50, cosine.shape[1]), dim=1)
        c.runs["e5"] = [
            list(zip(i, s, strict=True)) for i, s in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ]
        hits = [len({d for d, _ in run} & {d for d, g in grades.items() if g > 0}) / sum(g > 0 for g in grades.values())
                for run, grades in zip(c.runs["e5"], c.grades, strict=True)]  # fmt: skip
        result[c.name] = {
            "bm25": round(float(base.mean()), 4),
            "e5 first stage": round(float(c.per_query("e5", None).mean()), 4),
            "e5 R@50": round(float(np.mean(hits)), 4),
            "pocket": round(float(c.per_query("pocket", None).mean()), 4),
            "gains": grid,
        }
        single = {
            f"{name} alone": round(float((c.per_query("bm25", value[..., k][real]) - base).mean()), 4)
            for k, name in enumerate(TEACHERS)
        }
        result[c.name] |= single
        print(json.dumps({"name": c.name, **{k: v for k, v in result[c.name].items() if k != "gains"}}), flush=True)
        kept[f"{c.name} e5"] = top.indices.cpu().numpy().astype(np.uint16)
    weights = {
        language: [float(w) for w in max(sums[language], key=sums[language].__getitem__).split()]
        for language in LANGUAGES
    }
    top_five = {language: sums[language].most_common(5) for language in LANGUAGES}
    print(json.dumps({"weights": weights, "best": top_five}), flush=True)
    (options.output / "weights.json").write_text(json.dumps(weights) + "\n", encoding="utf-8")
    (options.output / "teachers.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
    np.savez_compressed(options.output / "teachers.npz", **kept)


if __name__ == "__main__":
    main()
