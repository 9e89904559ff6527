"""Compares scores with a reference model, to name the prompt, output head and scale that they come from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from tqdm.auto import tqdm

from qwen_rerank.check.findings import Finding
from qwen_rerank.check.probes import INSTRUCTED, INSTRUCTION, PROBES, ReportedByQuery, instruction_ignored
from qwen_rerank.check.scales import CLEARLY, CLOSE, Hypothesis, Match, Scale, decide, match
from qwen_rerank.check.variants import RECIPE, VARIANTS, Variant

if TYPE_CHECKING:
    from qwen_rerank.check.diagnosis import Subject
    from qwen_rerank.check.reference import Reference

_BY_KEY = {variant.key: variant for variant in VARIANTS}
_SHOWN = 3  # rivals that are named


@dataclass(frozen=True, slots=True)
class Agreement:
    """The outcome of a comparison with a reference model.

    Attributes:
        finding: For the report.
        variant: The prompt that the scores fit, or None.
        scale: What the numbers are, or None.
        head: The output head they fit.
        first: Query to the index that the reference puts first.
        cause: Short name of the fault, "recipe" for none, "" for "cannot tell".
    """

    finding: Finding
    variant: Variant | None = None
    scale: Scale | None = None
    head: str = "true"
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
    return Agreement(finding, variant, best.scale, best.hypothesis.head, first, cause)


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


def compare_instruction(subject: Subject, reference: Reference, agreement: Agreement) -> Finding | None:
    """See whether an instruction arrives, by what the reference gives with and without it; None if it cannot be told."""
    if not subject.carries_instruction or agreement.variant is None or agreement.scale is None:
        return None
    texts = INSTRUCTED.documents
    seen = subject.score(INSTRUCTED.query, texts, instruction=INSTRUCTION).reported
    with_it, without = (
        Hypothesis(name, agreement.head, _expected(reference, agreement, instruction))
        for name, instruction in (("with", INSTRUCTION), ("without", None))
    )
    if not agreement.scale.possible(seen):
        return None
    near, far = [m for m in match(seen, [with_it, without]) if m.scale.key == agreement.scale.key]
    if near.distance > CLEARLY * far.distance or far.distance - near.distance < 1e-4:
        return None
    saw = f"the scores with another instruction fit the reference {near.hypothesis.prompt} it ({near.distance:.3f} against {far.distance:.2f})."
    return Finding("instruction", "ok", saw) if near.hypothesis.prompt == "with" else instruction_ignored(saw)


def _expected(reference: Reference, agreement: Agreement, instruction: str | None) -> np.ndarray:
    variant = agreement.variant or RECIPE
    prompts = [reference.ids(variant, INSTRUCTED.query, text, instruction=instruction) for text in INSTRUCTED.documents]
    return reference.log_odds(prompts, head=agreement.head)
