"""Hold the pair that `export.py` wrote against torch: log-odds of the trained weights, and vectors of e5.

    python eval/pocket/mini/check.py --work build/mini --pair build/mini/pair

Both sides read the same pairs of development collections, torch in float32 and ONNX Runtime in eight bits.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import quality
import torch
from batches import batch, tokenized
from model import from_origin
from train import apart, restored

from qwen_rerank import CrossEncoderScorer, load_embedder

QUERIES, DEPTH = 2, 8  # of each collection
CLOSE = 0.98  # correlation and cosine that eight bits keep


@torch.inference_mode()
def main() -> None:
    """Print the largest differences; fail where eight bits changed the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/mini"))
    parser.add_argument("--name", default="mini")
    parser.add_argument("--pair", type=Path, required=True, help="folder of the exported pair")
    options = parser.parse_args()
    e5, odds = options.work / "e5", json.loads((options.work / "odds.json").read_text(encoding="utf-8"))
    model = from_origin(e5).eval()
    words = model.words.weight.detach()
    plain = apart(from_origin(e5)).eval()
    model.load_state_dict({**restored(options.work, options.name), "words.weight": words})
    scorer, embedder = CrossEncoderScorer(str(options.pair), backend="onnx"), load_embedder(str(options.pair))
    ours: list[float] = []
    theirs: list[float] = []
    cosines: list[float] = []
    for c in quality.load(options.work / "candidates.json.xz", e5, longest=256, device="cpu", queries=QUERIES):
        if c.role != "chosen":
            continue
        asked, documents = c.texts
        for j, run in enumerate(c.runs["bm25"]):
            places = np.array([d for d, _ in run[:DEPTH]])
            ids, mask = batch(c.queries, c.documents, np.full(len(places), j), places, 256)
            ours += (odds["scale"] * (model(ids, mask) - odds["middle"])).tolist()
            theirs += scorer.score(asked[j], [documents[d] for d in places]).tolist()
        chosen = [documents[d] for d, _ in c.runs["bm25"][0][:DEPTH]]
        texts = tokenized(e5, chosen, query=False, longest=256, device="cpu")
        ids, mask = batch(texts, None, np.arange(len(chosen)), np.arange(len(chosen)), 256)
        means = torch.nn.functional.normalize((plain.states(ids, mask)[0] * mask[..., None]).sum(1), dim=-1)
        cosines += (means.numpy() * embedder.embed_documents(chosen)).sum(1).tolist()
    apart_by = np.abs(np.array(ours) - np.array(theirs))
    report = {
        "pairs": len(ours),
        "log-odds, mean difference": round(float(apart_by.mean()), 4),
        "log-odds, largest difference": round(float(apart_by.max()), 4),
        "correlation": round(float(np.corrcoef(ours, theirs)[0, 1]), 5),
        "vectors": len(cosines),
        "smallest cosine": round(min(cosines), 5),
    }
    print(json.dumps(report), flush=True)
    (options.work / "check.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if min(report["correlation"], report["smallest cosine"]) < CLOSE:
        raise SystemExit(f"The exported pair is not the trained one: correlation or cosine below {CLOSE}.")


if __name__ == "__main__":
    main()
