"""Train the mini reranker: mine candidate lists, let teachers judge them, learn their order and the labels.

    python eval/pocket/mini/train.py teachers --work build/mini
    python eval/pocket/mini/train.py lists --work build/mini --languages en zh
    python eval/pocket/mini/train.py train --work build/mini --name one --steps 1033 --labels 0.5 --rate 1e-4 --seed 1
    python eval/pocket/mini/train.py combine --work build/mini --runs one --name mini

`--work` holds `e5/` (of `origin.py`), `texts/` (of `texts.py`), `candidates.json.xz` (of `candidates.py`) and, for the
teacher of English, `minilm/` (of `teacher.py`). `make.py` runs all of it. A run has a fixed number of steps and saves what
its next step depends on, so one that was killed goes on to the same weights.
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
from batches import LONGEST_QUERY
from learning import LANGUAGES, Chooser, Settings, Training
from lists import TEACHERS, Lists, MiniLM, blended, read, tokenized
from model import Mini, from_origin
from tqdm import tqdm


def main() -> None:
    """Run one step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["teachers", "lists", "train", "combine"])
    parser.add_argument("--work", type=Path, default=Path("build/mini"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--longest", type=int, default=256, help="tokens of a pair")
    parser.add_argument("--tokens", type=int, help="tokens of one forward pass: 65,536 on a GPU, 4,096 on a CPU")
    parser.add_argument("--kept", type=int, help="tokens of one backward pass: all of a step on a GPU, 16,384 on a CPU")
    parser.add_argument("--workers", type=int, default=2, help="threads of a CPU, and processes that split words")
    parser.add_argument("--languages", nargs="*", default=list(LANGUAGES), help="whose lists to make")
    parser.add_argument("--hard", type=int, default=12, help="candidates from each of BM25 and e5")
    parser.add_argument("--chance", type=int, default=4, help="candidates drawn at random")
    parser.add_argument("--steps", type=int, default=1033)
    parser.add_argument("--batch", type=int, default=96, help="lists of one step")
    parser.add_argument("--width", type=int, default=12, help="candidates of a list in one step")
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--sharp", type=float, default=2.0, help="how sharp the teachers' opinion is")
    parser.add_argument("--labels", type=float, default=1.0, help="factor of LABEL_SHARE")
    parser.add_argument("--every", type=float, default=600, help="seconds between checkpoints")
    parser.add_argument("--runs", nargs="*", default=[], help="names of trained models to combine")
    parser.add_argument("--name", default="mini")
    parser.add_argument("--whole", action="store_true", help="combine: measure all collections over all first stages")
    options = parser.parse_args()
    gpu = not options.device.startswith("cpu")
    options.tokens = options.tokens or (65_536 if gpu else 4_096)
    options.kept = options.kept or (1 << 20 if gpu else 16_384)
    torch.manual_seed(options.seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cuda.matmul.allow_tf32 = True
    if not gpu:
        torch.set_num_threads(options.workers)
    {"teachers": teachers, "lists": make_lists, "train": train, "combine": combine}[options.step](options)


# --- lists -----------------------------------------------------------------------------------------------------------


def make_lists(options: argparse.Namespace) -> None:
    """Write `lists.<language>.npz`: candidates, and the teachers' standardised opinions in steps of 1/20."""
    model = apart(from_origin(options.work / "e5")).to(options.device).eval()
    minilm = MiniLM(options.work / "minilm", options.device) if (options.work / "minilm").exists() else None
    for language in options.languages:
        began = time.time()
        found = mining.mined(model, minilm, options.work / "e5", options.work / "texts", language, options)
        real = found.candidates >= 0
        z = np.stack([blended(found.teachers, real, np.eye(len(TEACHERS))[k]) for k in range(len(TEACHERS))], -1)
        np.savez_compressed(
            options.work / f"lists.{language}.npz",
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


def train(options: argparse.Namespace) -> None:
    """Train for `--steps`, saving `<name>.checkpoint` on the way, and write `<name>.*.npz` and `<name>.json`."""
    settings = Settings(**{field: getattr(options, field) for field in Settings.__dataclass_fields__})
    weights = json.loads((options.work / "weights.json").read_text(encoding="utf-8"))
    choosers = {language: Chooser(read_lists(options, language), weights[language], settings) for language in LANGUAGES}
    training = Training(from_origin(options.work / "e5").to(options.device), choosers, settings)
    checkpoint = options.work / f"{options.name}.checkpoint"
    if checkpoint.exists():
        training.resume(checkpoint)
    began = saved = time.time()
    done = len(training.losses)
    for _ in (bar := tqdm(range(done, settings.steps), desc=options.name, initial=done, total=settings.steps)):
        training.step()
        bar.set_postfix(loss=f"{np.mean(training.losses[-20:]):.4f}")
        if time.time() - saved > options.every:
            training.save(checkpoint)
            saved = time.time()
    training.save(checkpoint)
    save(training.model, options.work, options.name)
    log = {
        "options": {k: str(v) for k, v in vars(options).items()},
        "weights": weights,
        "loss": [round(x, 4) for x in training.losses],
        "steps": settings.steps,
        "tokens": training.tokens,
        "pairs": training.pairs,
        "seconds of the last start": [len(training.losses) - done, round(time.time() - began, 1)],
        "gates": [round(layer.between.item(), 2) for layer in training.model.layers],
        "scale": [round(x, 2) for x in training.model.scale.tolist()],
    }
    (options.work / f"{options.name}.json").write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")


def load_measured(options: argparse.Namespace) -> list[quality.Measured]:
    """Return the collections of `candidates.py`."""
    return quality.load(
        options.work / "candidates.json.xz", options.work / "e5", longest=options.longest, device=options.device
    )


def measure(model: Mini, measured: list, options: argparse.Namespace, stages: tuple[str, ...] = ("bm25",)) -> dict:
    """Return and print nDCG@10 over first stages' candidates."""
    found = quality.report(measured, model.eval(), longest=options.longest, tokens=4 * options.tokens, stages=stages)
    for stage, table in found.items():
        print(json.dumps({"stage": stage, **table}), flush=True)
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
    """Average trained models with each other and with the start; keep what is best on `CHOSEN_ON`, with its scores there.

    Averages of models trained from one start forget less of what the start knew (Wortsman et al., 2022,
    arXiv:2203.05482 and arXiv:2109.01903). One run alone is taken as it is.
    """
    start = from_origin(options.work / "e5")
    words = start.words.weight.detach().clone()
    states = [restored(options.work, name) for name in options.runs]
    begin = {k: v.clone() for k, v in start.state_dict().items() if not k.startswith("words")}
    mixtures = dict(zip(options.runs, states, strict=True))
    if len(states) > 1:
        mean = mixtures["mean"] = {k: torch.stack([state[k] for state in states]).mean(0) for k in begin}
        for share in (0.85, 0.7, 0.5):
            mixtures[f"mean {share}, start {round(1 - share, 2)}"] = {
                k: share * mean[k] + (1 - share) * begin[k] for k in begin
            }
    measured = load_measured(options)
    chosen = [c for c in measured if c.role == "chosen"]
    log: dict = {}
    kept: dict[str, dict[str, np.ndarray]] = {}
    for name, state in mixtures.items():
        start.load_state_dict({**state, "words.weight": words})
        log[name] = measure(start.to(options.device), chosen, options)
        log[name]["value"] = log[name]["bm25"]["mean chosen"][1]
        kept[name] = {f"{c.name} bm25": c.scores["bm25"].astype(np.float32) for c in chosen}
        print(json.dumps({"mixture": name, "value": log[name]["value"]}), flush=True)
    best = log["best"] = max(mixtures, key=lambda name: log[name]["value"])
    start.load_state_dict({**mixtures[best], "words.weight": words})
    save(start, options.work, options.name)
    if options.whole:
        log["measured"] = measure(start, measured, options, quality.with_e5(measured, options.work / "teachers.npz"))
    np.savez_compressed(options.work / f"{options.name}-scores.npz", **kept[best])
    (options.work / f"{options.name}.json").write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")


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
    (options.work / "weights.json").write_text(json.dumps(weights) + "\n", encoding="utf-8")
    (options.work / "teachers.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
    np.savez_compressed(options.work / "teachers.npz", **kept)


if __name__ == "__main__":
    main()
