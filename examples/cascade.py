"""A cascade: the small reranker reads everything, the large one only what the smaller ones liked.

    python examples/cascade.py            # three times 'mini', to see the wiring; it is not Qwen3-Reranker
    python examples/cascade.py --real     # Qwen3-Reranker 0.6B → 4B → 8B, some 26 GB of weights in bfloat16

Needs, in a clone: pip install ., and the extra `local` for the real models. The real stages may live on different machines: a stage's model may be an address, such as http://gpu-2:8080.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from qwen_rerank import BM25Index, Cascade, Reranker, load_scorer
from qwen_rerank.samples import load_encyclopedia


@dataclass(frozen=True)
class Stage:
    """One reranker: the model, how many documents it passes on, and its size."""

    model: str
    top_n: int
    billions: float  # parameters


REAL = (
    Stage("Qwen/Qwen3-Reranker-0.6B", top_n=50, billions=0.6),
    Stage("Qwen/Qwen3-Reranker-4B", top_n=20, billions=4.0),
    Stage("Qwen/Qwen3-Reranker-8B", top_n=5, billions=8.2),
)
SMALL = tuple(Stage("mini", top_n=stage.top_n, billions=stage.billions) for stage in REAL)


def main() -> None:
    """Search the shipped sentences of Wikipedia through the cascade, and say what it saved."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--real", action="store_true", help="take the three published models")
    parser.add_argument("--query", default="Who led the most rapid expansion of the Mongol Empire?")
    arguments = parser.parse_args()
    stages = REAL if arguments.real else SMALL

    scorers = {stage.model: load_scorer(stage.model) for stage in stages}  # the same model is loaded once
    # A cascade goes wherever a reranker goes, into a TwoStageRetriever for example.
    cascade = Cascade([Reranker(scorers[stage.model], top_n=stage.top_n) for stage in stages])
    candidates = BM25Index(load_encyclopedia("en").documents).search(arguments.query, top_k=100)

    print(f"{arguments.query}   ({' → '.join(stage.model for stage in stages)})\n")
    for hit in cascade.rerank(arguments.query, candidates):
        print(f"{hit.rank}. {hit.score:.3f}  was {hit.index + 1:>2}  {' · '.join(hit.document.text.splitlines()):.90}")
    print(f"\n{saving(stages, n_candidates=100)}")


def saving(stages: tuple[Stage, ...], *, n_candidates: int) -> str:
    """Return in one sentence what a cascade costs beside its last model alone, in parameters times documents read."""
    reads = [n_candidates, *(stage.top_n for stage in stages[:-1])]
    work = sum(n * stage.billions for n, stage in zip(reads, stages, strict=True))
    alone = n_candidates * stages[-1].billions
    steps = ", ".join(f"{stage.billions:g}B reads {n}" for n, stage in zip(reads, stages, strict=True))
    return f"Of {n_candidates} candidates {steps}: {work / alone:.0%} of the work of {stages[-1].billions:g}B alone."


if __name__ == "__main__":
    main()
