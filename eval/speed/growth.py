"""How speed and memory grow: with a document's length, with documents, with callers, and with requests to the server.

    python eval/speed/growth.py --tokenizer FOLDER [--layers 2] [--quantize int8] [--out growth.json]

One engine of the true width with few layers and random weights, so that a thousand documents take seconds; the figures
show the shape of the curves, not the speed of a whole model. Each point is the best of its rounds; its memory is what
the process held at most above what it held before. Writes the JSON and a picture beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(1, str(Path(__file__).resolve().parents[2] / "src"))  # also where the package is not installed

import httpx2
from contestants import Engine, model_config, random_model
from measure import PeakMemory, hardware, versions
from workloads import Words

from qwen_rerank.serve.app import create_app
from qwen_rerank.serve.settings import ServeSettings

LENGTHS = (32, 128, 512, 2000, 8000)  # tokens of a document
COUNTS = (1, 10, 100, 1000)  # documents of a call
CALLERS = (1, 4, 16, 64)
AXES = {
    "document_tokens": "tokens of a document",
    "documents": "documents of 64 tokens",
    "callers": "callers, 4 documents of 64 tokens each",
    "server_requests": "requests at once to the server, 4 documents of 64 tokens each",
}


def main() -> None:
    """Measure each curve, and write what was found."""
    options = parse()
    machine = hardware("cpu")  # now: its load is that of others
    words = Words(options.tokenizer)
    model = random_model(model_config("0.6B", layers=options.layers), dtype=torch.bfloat16, device="cpu")
    engine = Engine(model, options.tokenizer, device="cpu", max_length=16_384, quantize=options.quantize)
    scorer = engine.scorer
    report: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": f"Qwen3-Reranker-0.6B shape, {options.layers} layers, random weights, {scorer.dtype}",
        "quantize": options.quantize,
        "hardware": machine,
        "versions": versions(),
        "token_budget": scorer.token_budget,
        "rounds": options.rounds,
    }
    scorer.score("warm", words.texts(16, 24))

    def measured(n_documents: int, work: Callable[[], float]) -> dict[str, float]:
        with PeakMemory("cpu") as peak:
            seconds = min(work() for _ in range(options.rounds))
        found = {"documents_per_s": n_documents / seconds, "seconds": seconds, "peak_bytes": float(peak.bytes)}
        print(f"{n_documents} documents: {found}", file=sys.stderr, flush=True)
        return found

    report["document_tokens"] = {
        str(length): measured(n, lambda n=n, length=length: score_once(scorer, words, n, length))
        for length in LENGTHS
        for n in [max(1, 2000 // length)]
    }
    report["documents"] = {str(n): measured(n, lambda n=n: score_once(scorer, words, n, 64)) for n in COUNTS}
    report["callers"] = {str(n): measured(4 * 2 * n, lambda n=n: call_from_threads(scorer, words, n)) for n in CALLERS}
    report["server_requests"] = {
        str(n): measured(4 * 2 * n, lambda n=n: asyncio.run(ask_server(scorer, words, n))) for n in CALLERS
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    draw(report, options.out.with_suffix(".png"))


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with the official tokenizer files")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--quantize", choices=["int8"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("growth.json"))
    return parser.parse_args()


def score_once(scorer: Any, words: Words, n: int, length: int) -> float:
    """Return the seconds of one call with `n` documents of so many tokens."""
    query, documents = words.text(12), words.texts(*[length] * n)
    start = time.perf_counter()
    scorer.score(query, documents)
    return time.perf_counter() - start


def call_from_threads(scorer: Any, words: Words, n: int) -> float:
    """Return the seconds of two calls of each of `n` callers, each with its own query."""
    requests = [(words.text(12), words.texts(*[64] * 4)) for _ in range(2 * n)]
    with ThreadPoolExecutor(n) as pool:
        start = time.perf_counter()
        list(pool.map(lambda request: scorer.score(*request), requests))
        return time.perf_counter() - start


async def ask_server(scorer: Any, words: Words, n: int) -> float:
    """Return the seconds of two requests of each of `n` clients to the server, in this process."""
    bodies = [{"query": words.text(12), "documents": words.texts(*[64] * 4)} for _ in range(2 * n)]
    app = create_app(scorer, settings=ServeSettings(max_queue_wait_s=600.0, request_timeout_s=600.0))
    transport = httpx2.ASGITransport(app)
    async with app.router.lifespan_context(app), httpx2.AsyncClient(transport=transport, base_url="http://s") as client:
        await app.state.backend.wait_loaded()
        gate = asyncio.Semaphore(n)

        async def ask(body: dict[str, Any]) -> None:
            async with gate:
                (await client.post("/v1/rerank", json=body, timeout=600)).raise_for_status()

        start = time.perf_counter()
        await asyncio.gather(*map(ask, bodies))
        return time.perf_counter() - start


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw documents per second and memory over each axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, places = pyplot.subplots(2, 2, figsize=(10, 7))
    for place, (name, label) in zip(places.flat, AXES.items(), strict=True):
        points = {int(n): found for n, found in report[name].items()}
        place.plot(list(points), [found["documents_per_s"] for found in points.values()], "o-", color="C0")
        place.set(xscale="log", xlabel=label, ylabel="documents/s")
        place.set_yscale("log") if name == "document_tokens" else place.set_ylim(bottom=0)
        place.set_xticks(list(points), [f"{n:,}" for n in points], minor=False)
        place.minorticks_off()
        memory = place.twinx()
        memory.plot(list(points), [found["peak_bytes"] / 2**20 for found in points.values()], "s--", color="C1")
        memory.set_ylabel("MiB beside what was held before", color="C1")
        memory.set_ylim(bottom=0)
    figure.suptitle(f"{report['model']}, {report['quantize'] or 'no quantization'}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
