"""Compares scores with a reference model, to name the prompt, output head and scale that they come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from qwen_rerank.check.findings import Finding
from qwen_rerank.check.probes import INSTRUCTED, INSTRUCTION, PROBES, ReportedByQuery, instruction_ignored
from qwen_rerank.check.scales import CLEARLY, CLOSE, Hypothesis, Match, Scale, decide, match
from qwen_rerank.check.variants import RECIPE, VARIANTS, Variant

if TYPE_CHECKING:
    from qwen_rerank.check.diagnosis import Subject
    from qwen_rerank.check.reference import Reference

_BY_KEY = {variant.key: variant for variant in VARIANTS}
_SHOWN = 3  # rivals that are named
_CERTAIN = 1e-4  # log-odds that two ways must at least lie apart to be told apart


@dataclass(frozen=True, slots=True)
class FittedPrompt:
    """A known prompt that a server's scores fit, with the head and the scale they fit it by.

    Attributes:
        reference: The model it was found with.
        variant: The prompt.
        head: The output head.
        scale: What the numbers are.
    """

    reference: Reference
    variant: Variant
    head: str
    scale: Scale

    def nearest(self, reported: np.ndarray, ways: Mapping[str, Sequence[np.ndarray]]) -> tuple[Match, Match] | None:
        """Return which of several ways to make the prompts the scores fit, and the next; None where none is clearly nearer.

        Args:
            reported: float64 `(n,)`, as the server sent them.
            ways: Name of a way to the token ids of all n prompts.
        """
        expected = [
            Hypothesis(name, self.head, self.reference.log_odds(prompts, head=self.head))
            for name, prompts in ways.items()
        ]
        found = [m for m in match(reported, expected) if m.scale.key == self.scale.key]
        if not found:  # the numbers cannot be of this scale
            return None
        near, far = found[:2]
        clear = near.distance <= CLEARLY * far.distance and far.distance - near.distance >= _CERTAIN
        return (near, far) if clear else None


@dataclass(frozen=True, slots=True)
class Agreement:
    """The outcome of a comparison with a reference model.

    Attributes:
        finding: For the report.
        fitted: The prompt that the scores fit, or None.
        first: Query to the index that the reference puts first.
        cause: Short name of the fault, "recipe" for none, "" for "cannot tell".
    """

    finding: Finding
    fitted: FittedPrompt | None = None
    first: dict[str, int] = field(default_factory=dict)
    cause: str = ""


def compare(subject: Subject, seen: ReportedByQuery, reference: Reference) -> Agreement:
    """Score all pairs with the reference under every known variant and find the nearest."""
    hypotheses = _hypotheses(reference)
    right = hypotheses[0].log_odds
    first, start = {}, 0
    for probe in PROBES:
        first[probe.query] = int(np.argmax(right[start : start + len(probe.documents)]))
        start += len(probe.documents)
    reported = np.concatenate([seen[probe.query] for probe in PROBES])
    matches = match(reported, hypotheses)
    rivals, following = decide(matches)
    from_recipe = min(m.distance for m in matches if m.hypothesis.prompt == RECIPE.key and m.hypothesis.head == "true")
    if not rivals:
        return Agreement(_matches_nothing(matches[0], from_recipe), first=first)
    if len({(m.hypothesis.prompt, m.hypothesis.head, m.scale.key) for m in rivals}) > 1:
        return Agreement(_undecided(rivals), first=first)
    best = rivals[0]
    variant = _BY_KEY[best.hypothesis.prompt]
    finding = _named(subject, best, variant, following, from_recipe)
    cause = variant.key if best.hypothesis.head == "true" else "embedding-head"
    if cause == RECIPE.key and best.scale.key in ("sigmoid-twice", "labels-swapped"):
        cause = best.scale.key
    return Agreement(finding, FittedPrompt(reference, variant, best.hypothesis.head, best.scale), first, cause)


def _hypotheses(reference: Reference) -> list[Hypothesis]:
    pairs = [(probe.query, document) for probe in PROBES for document in probe.documents]
    heads = ("true", "embedding") if reference.untied else ("true",)
    out: list[Hypothesis] = []
    known: set[tuple[bytes, ...]] = set()
    for variant in tqdm(VARIANTS, desc="reference", disable=None, leave=False):
        prompts = [reference.ids(variant, query, document) for query, document in pairs]
        key = tuple(ids.tobytes() for ids in prompts)
        if key in known:
            continue  # a fine-tuned checkpoint's own prompt may lack what this variant changes
        known.add(key)
        states = reference.hidden(prompts)
        out += [Hypothesis(variant.key, head, reference.of_hidden(states, head=head)) for head in heads]
    return out


def _matches_nothing(nearest: Match, from_recipe: float) -> Finding:
    return Finding(
        "agreement",
        "wrong",
        f"the scores are {from_recipe:.2f} (root mean square of log-odds) away from the reference with the model card's prompt.",
        f"cannot tell why: none of {len(VARIANTS)} known prompts fits; the nearest, {_BY_KEY[nearest.hypothesis.prompt].title}, "
        f"is {nearest.distance:.2f} away, and up to {CLOSE} would be rounding. Another model, quantisation, or damaged weights?",
        "check that server and --reference are the same checkpoint",
    )


def _undecided(rivals: list[Match]) -> Finding:
    titles = [_BY_KEY[m.hypothesis.prompt].title + _suffix(m) for m in rivals[:_SHOWN]]
    more = f" and {len(rivals) - _SHOWN} more" if len(rivals) > _SHOWN else ""
    fits = any(m.hypothesis.prompt == RECIPE.key and m.hypothesis.head == "true" for m in rivals)
    return Finding(
        "agreement",
        "unknown",
        f"the scores fit the reference with {' or '.join(titles)}{more} within {rivals[0].distance:.3f}.",
        f"cannot tell these apart: a match must be {1 / CLEARLY:.0f} times nearer than the next."
        + (" The model card's prompt is among them." if fits else ""),
        "use the served checkpoint itself as --reference, in the served dtype",
    )


def _named(subject: Subject, best: Match, variant: Variant, following: Match | None, from_recipe: float) -> Finding:
    apart = (
        ""
        if following is None
        else f"; the next nearest, {_BY_KEY[following.hypothesis.prompt].title}{_suffix(following)}, is {following.distance:.2f} away"
    )
    saw = f"the scores fit this prompt: {variant.title}{_suffix(best)}, within {best.distance:.4f} (root mean square of log-odds){apart}."
    if best.hypothesis.head == "embedding":
        return Finding(
            "agreement",
            "wrong",
            saw,
            "the output head of this checkpoint is not tied to the embedding, but the server read the embedding's rows "
            f"(0.5 for everything on the 8B); it is {from_recipe:.2f} away from right scores.",
            "use a release that reads lm_head (vLLM: after issue 27857), a converted seq-cls checkpoint, or HttpScorer on a "
            "generative server",
        )
    if variant is RECIPE:
        wrong = best.scale.key in ("sigmoid-twice", "labels-swapped")
        return Finding(
            "agreement", "wrong" if wrong else "ok", saw, proves=not wrong, cure="see range" if wrong else ""
        )
    why = f"{variant.why} It is {from_recipe:.2f} away from right scores."
    return Finding(
        "agreement", variant.status, saw, why, variant.cure_for(subject.dialect), proves=variant.status == "warning"
    )


def _suffix(found: Match) -> str:
    parts = []
    if found.hypothesis.head == "embedding":
        parts.append("the output head read from the embedding")
    if found.scale.key in ("sigmoid-twice", "labels-swapped"):
        parts.append(f"reported as {found.scale.title}")
    return f" ({', '.join(parts)})" if parts else ""


def compare_instruction(subject: Subject, fitted: FittedPrompt) -> Finding | None:
    """See whether an instruction arrives, by what the reference gives with and without it; None if it cannot be told."""
    if not subject.carries_instruction:
        return None
    query, texts = INSTRUCTED.query, INSTRUCTED.documents
    ways = {
        name: [fitted.reference.ids(fitted.variant, query, text, instruction=instruction) for text in texts]
        for name, instruction in (("with", INSTRUCTION), ("without", None))
    }
    found = fitted.nearest(subject.score(query, texts, instruction=INSTRUCTION).reported, ways)
    if found is None:
        return None
    near, far = found
    saw = f"the scores with another instruction fit the reference {near.hypothesis.prompt} it ({near.distance:.3f} against {far.distance:.2f})."
    return Finding("instruction", "ok", saw) if near.hypothesis.prompt == "with" else instruction_ignored(saw)
