"""What a request to the server costs beside the engine that answers it, in CPU time.

    python eval/serving/cost.py [--src TREE] [--rounds N] [--documents N] [--tokens N] [--out FILE] [--note TEXT]

The same checkpoint (one layer, random weights) scores the same texts, new ones each round, in processes of their own:
`QwenScorer.score` in one, `Reranker.rerank` in the next, and `POST /v1/rerank` in a server whose client lives in this
process. Rounds take turns, so that what else the machine does meets all alike. A figure is the CPU time of that one
process, all its threads, from before the request is sent until its answer is there: the median of the rounds. `TREE` is
a checkout of this repository, by default the one that this script lies in. Exits with 1 when the server costs more than
15 ms above the engine.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from eval.size.made import ROOT, commit, documents, machine, make_model

BAR_MS = 15.0
WARM_UPS = 3
QUERY = "what is asked in round {}"


def main() -> int:
    """Run the three processes, round by round; 1 when the bar is missed."""
    if sys.argv[1:2] == ["--process"]:
        process(sys.argv[2], sys.argv[3], json.loads(sys.argv[4]))
        return 0
    options = arguments()
    settings = {"documents": options.documents, "tokens": options.tokens}
    with tempfile.TemporaryDirectory() as folder:
        model = str(make_model(Path(folder) / "model", layers=options.layers))
        ways = {way: Measured(way, model, settings, options) for way in ("engine", "reranker", "server")}
        for number in range(WARM_UPS + options.rounds):
            for way in ways.values():
                way.ask(number)
        for way in ways.values():
            way.close()
    figures = {name: way.figures() for name, way in ways.items()}
    above = {name: round(figures[name]["median_ms"] - figures["engine"]["median_ms"], 2) for name in ways}
    report = {
        "command": "python eval/serving/cost.py",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(options.src),
        "machine": machine(),
        "note": options.note,
        "request": {**settings, "layers": options.layers, "threads": options.threads, "rounds": options.rounds},
        "cpu_ms": figures,
        "above_the_engine_ms": {name: above[name] for name in ("reranker", "server")},
        "bar_ms": BAR_MS,
        "met": above["server"] <= BAR_MS,
    }
    text = json.dumps(report, indent=1)
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")
    return 0 if report["met"] else 1


def arguments() -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--src", type=Path, default=ROOT, metavar="TREE", help="the checkout to measure")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--documents", type=int, default=100, help="of one request")
    parser.add_argument("--tokens", type=int, default=128, help="of one document")
    parser.add_argument("--layers", type=int, default=1, help="of the checkpoint")
    parser.add_argument("--threads", type=int, default=1, help="of torch; with several, those that wait spin")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON there as well")
    parser.add_argument("--note", default="", help="what else ran on the machine, kept with the figures")
    return parser.parse_args()


class Measured:
    """A process that is asked once a round, and the CPU time that each took it."""

    def __init__(self, way: str, model: str, settings: dict[str, int], options: argparse.Namespace) -> None:
        self._settings = settings
        self._cpu_ms: list[float] = []
        self._wall_ms: list[float] = []
        threads = {name: str(options.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--process", way, model, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **threads, "PYTHONPATH": str(options.src.resolve() / "src")},
        )
        port = int(self._line())
        self._server = http.client.HTTPConnection("127.0.0.1", port, timeout=120) if port else None

    def ask(self, number: int) -> None:
        """Let it do one round's work."""
        body = json.dumps({"query": QUERY.format(number), "documents": round_texts(number, self._settings)})
        self._tell(f"prepare {number}")
        before = int(self._tell("cpu"))
        begin = time.perf_counter()
        if self._server is None:
            self._tell(f"work {number}")
        else:
            self._server.request("POST", "/v1/rerank", body, {"content-type": "application/json"})
            answer = self._server.getresponse()
            content = answer.read()
            if answer.status != 200:
                raise SystemExit(f"the server answered {answer.status}: {content[:500]!r}")
        self._wall_ms.append((time.perf_counter() - begin) * 1e3)
        self._cpu_ms.append((int(self._tell("cpu")) - before) / 1e6)

    def figures(self) -> dict[str, float]:
        """Return the median and the spread of the rounds after the warm-ups."""
        cpu = sorted(self._cpu_ms[WARM_UPS:])
        quarters = statistics.quantiles(cpu, n=4) if len(cpu) > 1 else cpu * 3
        found = {"median_ms": statistics.median(cpu), "from_ms": quarters[0], "to_ms": quarters[2], "least_ms": cpu[0]}
        found["wall_median_ms"] = statistics.median(self._wall_ms[WARM_UPS:])
        return {name: round(value, 2) for name, value in found.items()}

    def close(self) -> None:
        """End the process."""
        self._tell("end")
        self._process.wait(30)

    def _tell(self, line: str) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        return self._line()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("a measured process ended; its own message stands above.")
        return line


def round_texts(number: int, settings: dict[str, Any]) -> list[str]:
    """Return the documents of a round."""
    return list(documents(settings["documents"], seed=number, tokens=settings["tokens"]).values())


def process(way: str, model: str, settings: dict[str, int]) -> None:
    """Be one of the processes: print a port when ready (0 for none), then do what the lines of the input say."""
    from qwen_rerank import QwenScorer, Reranker

    load = partial(QwenScorer, model, device="cpu")
    if way == "server":
        try:
            from qwen_rerank.serve.process import listen, serve
        except ImportError:  # a checkout from before the module had this name
            from qwen_rerank.serve.runner import listen, serve  # type: ignore[import-not-found,no-redef]

        listener = listen("127.0.0.1", 0)
        threading.Thread(target=obey_when_ready, args=(listener.getsockname()[1], settings), daemon=True).start()
        serve(load, listener=listener)
    else:
        scorer = load()
        obey(settings, port=0, ask=scorer.score if way == "engine" else Reranker(scorer).rerank)


def obey_when_ready(port: int, settings: dict[str, int]) -> None:
    """Wait for this process's server, then `obey`."""
    status = 0
    while status != 200:
        time.sleep(0.1)
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("GET", "/health/ready")
        status = connection.getresponse().status
        connection.close()
    obey(settings, port=port)


def obey(settings: dict[str, int], *, port: int, ask: Callable[[str, list[str]], Any] | None = None) -> None:
    """Do what each line of the input says, and answer with one line; the last ends the process."""
    texts: list[str] = []
    print(port, flush=True)
    for line in sys.stdin:
        order, _, number = line.strip().partition(" ")
        if order == "prepare":
            texts = round_texts(int(number), settings)
        elif order == "work" and ask is not None:
            ask(QUERY.format(number), texts)
        print(time.process_time_ns(), flush=True)
        if order == "end":
            os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
