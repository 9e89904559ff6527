"""What the server does under stress, with a stub engine whose right answers are known.

    python eval/serving/bench.py [clients] [overload] [busy] [sigterm] [--quick] [--out FOLDER] [--note TEXT]

Each prints its figures and writes them as JSON; `results.md` is the table of all. Exits with 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(1, str(Path(__file__).resolve().parents[2] / "src"))  # also where the package is not installed

from eval.serving import crowd, overload, sigterm
from eval.serving.report import table
from eval.speed.measure import hardware, versions

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("fastapi", "starlette", "uvicorn", "h11")


def measurements(*, quick: bool) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return what can be measured; `quick` is to see that it works, its figures say little."""
    if quick:
        return {
            "clients": lambda: crowd.measure(n_clients=50, n_rounds=2),
            "overload": lambda: overload.measure(service_s=0.02, factors=(1.0, overload.OVERLOAD), seconds=4.0),
            "busy": lambda: overload.measure(
                service_s=0.02, factors=(1.0, overload.OVERLOAD), seconds=4.0, busy_processes=1
            ),
            "sigterm": lambda: sigterm.measure(n_shutdowns=3),
        }
    return {
        "clients": lambda: crowd.measure(n_clients=500, n_rounds=10),
        "overload": lambda: overload.measure(
            service_s=0.02, factors=(0.5, 0.8, 1.0, 1.5, 2.0, 3.0, overload.OVERLOAD), seconds=20.0
        ),
        "busy": lambda: overload.measure(
            service_s=0.02, factors=(1.0, 1.5, 2.0, overload.OVERLOAD), seconds=20.0, busy_processes=1
        ),
        "sigterm": lambda: sigterm.measure(n_shutdowns=50),
    }


def main() -> int:
    """Run what was asked for."""
    known = measurements(quick=False)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(known)}; all by default")
    parser.add_argument("--quick", action="store_true", help="a minute in all, to see that it works")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON files")
    parser.add_argument("--note", default="", help="what else ran on the machine, kept with the figures")
    options = parser.parse_args()
    if unknown := set(options.names) - set(known):
        parser.error(f"{', '.join(sorted(unknown))}: choose from {', '.join(known)}")
    options.out.mkdir(parents=True, exist_ok=True)
    met = [run(name, options) for name in options.names or known]
    reports = {name: json.loads(path.read_text()) for name in known if (path := options.out / f"{name}.json").exists()}
    (options.out / "results.md").write_text(table(reports))
    print(table(reports))
    return 0 if all(met) else 1


def run(name: str, options: argparse.Namespace) -> bool:
    """Measure one thing, print it, write it, and say whether its bar was met."""
    report = {
        "command": " ".join(["python", "eval/serving/bench.py", name, *(["--quick"] if options.quick else [])]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": {**hardware("cpu"), "cores": os.cpu_count(), "niceness": os.nice(0)},
        "versions": {**versions(), **{package: version(package) for package in PACKAGES}},
        "note": options.note,
        "figures": measurements(quick=options.quick)[name](),
    }
    text = json.dumps(report, indent=1)
    print(text, flush=True)
    (options.out / f"{name}.json").write_text(text + "\n")
    return bool(report["figures"]["met"])


if __name__ == "__main__":
    sys.exit(main())
