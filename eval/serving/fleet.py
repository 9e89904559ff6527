"""Two servers behind one `HttpScorer`, and one of them is killed under load: what is lost?

    python eval/serving/fleet.py [--seconds 10] [--out FILE] [--note TEXT]

The engine of each server is a stub that takes 20 ms a call, so two of them answer about twice as much as one. Exits with 1
when a request is lost.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(1, str(Path(__file__).resolve().parents[2] / "src"))  # also where the package is not installed

from eval.serving.load import percentiles_ms
from eval.speed.measure import hardware, versions
from qwen_rerank import HttpScorer
from qwen_rerank.errors import RerankError
from tests.serve.process import stub_server

CLIENTS = 12
SERVICE_S = 0.02


def measure(seconds: float) -> dict[str, Any]:
    """Return answers a second before and after one of the servers was killed, and what was lost."""
    answers: list[tuple[float, float]] = []  # when, and seconds that it took
    lost: list[str] = []
    with (
        stub_server("Slow", arguments=[SERVICE_S]) as one,
        stub_server("Slow", arguments=[SERVICE_S]) as two,
        HttpScorer([one.url, two.url], dialect="cohere", model="oracle", max_concurrency=CLIENTS) as scorer,
    ):
        start = time.perf_counter()

        def ask(number: int) -> None:
            while (now := time.perf_counter() - start) < seconds:
                try:
                    scorer.score(f"question {number}-{now}", [f"text {number}"])
                except RerankError as exc:
                    lost.append(f"{type(exc).__name__}: {exc}"[:200])
                    continue
                answers.append((time.perf_counter() - start, time.perf_counter() - start - now))

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(CLIENTS)]
        for thread in threads:
            thread.start()
        time.sleep(seconds / 2)
        killed_at = time.perf_counter() - start
        one.process.send_signal(signal.SIGKILL)
        for thread in threads:
            thread.join()
    before = [each for at, each in answers if seconds / 8 <= at < killed_at]
    after = [each for at, each in answers if at >= killed_at]
    return {
        "clients": CLIENTS,
        "service_s": SERVICE_S,
        "answers": len(answers),
        "lost": len(lost),
        "lost_why": sorted(set(lost))[:3],
        "killed_at_s": round(killed_at, 2),
        "answers_per_s_before": round(len(before) / (killed_at - seconds / 8), 1),
        "answers_per_s_after": round(len(after) / (seconds - killed_at), 1),
        "before_ms": percentiles_ms(before),
        "after_ms": percentiles_ms(after),
    }


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "fleet.json")
    parser.add_argument("--note", default="", help="what else ran on the machine, kept with the figures")
    options = parser.parse_args()
    report = {
        "command": f"python eval/serving/fleet.py --seconds {options.seconds:g}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware("cpu"),
        "versions": versions(),
        "note": options.note,
        "figures": measure(options.seconds),
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["figures"], indent=1))
    return 0 if not report["figures"]["lost"] else 1


if __name__ == "__main__":
    sys.exit(main())
