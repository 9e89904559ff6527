"""Checks of how a server tokenizes: its token count, control strings in a document, documents that are too long."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from qwen_rerank.check.agreement import FittedPrompt
from qwen_rerank.check.findings import Finding
from qwen_rerank.check.probes import CAPITAL, CONTROL, FILLER, PROBES
from qwen_rerank.check.variants import RECIPE, VARIANTS, Variant
from qwen_rerank.errors import BackendRejectedError, BackendUnavailableError, DocumentScoringError
from qwen_rerank.prompt import PromptEncoder, PromptTokenizer

if TYPE_CHECKING:
    from qwen_rerank.check.diagnosis import Reported, Subject
    from qwen_rerank.check.reference import Reference

_EXACT = "exact prompts: HttpScorer(url, tokenizer=...)"


def counted(
    subject: Subject,
    encoder: PromptEncoder | None,
    tokenizer: PromptTokenizer | None,
    first: Reported,
    fitted: FittedPrompt | None,
) -> Finding:
    """Compare `usage.prompt_tokens` with what the recipe's prompts have."""
    if subject.dialect == "local":
        return Finding("token count", "skipped", "a local model sends no count.")
    if first.prompt_tokens is None:
        return Finding("token count", "skipped", f"a {subject.dialect} server does not say how many tokens it read.")
    if encoder is None or tokenizer is None:
        return Finding("token count", "skipped", f"{first.prompt_tokens} tokens counted; give --tokenizer to compare.")
    probe = PROBES[0]
    sizes = {variant.key: _size(variant, encoder, tokenizer) for variant in VARIANTS}
    expected = sizes[RECIPE.key]
    saw = f"{first.prompt_tokens} tokens for {len(probe.documents)} pairs; the model card's prompts have {expected}."
    if first.prompt_tokens == expected:
        return Finding("token count", "ok", saw)
    if fitted is not None:
        variant = fitted.variant
        as_named = first.prompt_tokens == sizes[variant.key]
        return Finding(
            "token count", variant.status if as_named else "warning", saw,
            f"{variant.title} has {sizes[variant.key]}.", variant.cure_for(subject.dialect),
        )  # fmt: skip
    fitting = [variant for variant in VARIANTS if sizes[variant.key] == first.prompt_tokens]
    if not fitting:
        return Finding(
            "token count",
            "warning",
            saw,
            "the server makes other prompts, or counts otherwise; which, a sum cannot tell.",
        )
    titles = " or ".join(variant.title for variant in fitting)
    certain = all(variant.status == "wrong" for variant in fitting)
    cure = fitting[0].cure_for(subject.dialect)
    return Finding("token count", "wrong" if certain else "warning", saw, f"that is the count of {titles}.", cure)


def _size(variant: Variant, encoder: PromptEncoder, tokenizer: PromptTokenizer) -> int:
    probe = PROBES[0]
    texts = (variant.render(encoder.spec, encoder.instruction, probe.query, document) for document in probe.documents)
    return sum(len(tokenizer.control_ids(text)) for text in texts)


def control_strings(
    subject: Subject,
    encoder: PromptEncoder | None,
    tokenizer: PromptTokenizer | None,
    fitted: FittedPrompt | None,
) -> Finding:
    """See whether a document can end its own turn."""
    got = subject.score(CAPITAL, [CONTROL])
    by_score = _control_by_score(got, fitted)
    by_count = _control_by_count(got, encoder, tokenizer, fitted)
    read = by_score if by_score is not None else by_count
    if read is None:
        return Finding(
            "control strings",
            "unknown",
            f"a document with <|im_end|> in it scored {got.reported[0]:.4g}.",
            "cannot tell whether it was read as text or as a control token without --reference, or a token count and --tokenizer.",
        )
    how = "score" if by_score is not None else "token count"
    if not read:
        return Finding("control strings", "ok", f"<|im_end|> in a document is read as plain text (by its {how}).")
    return Finding(
        "control strings",
        "warning",
        f"<|im_end|> in a document is read as a control token (by its {how}).",
        "a document can end its turn and answer in the model's place; whoever writes documents can choose their scores.",
        _safe_way(subject),
    )


def _control_by_score(got: Reported, fitted: FittedPrompt | None) -> bool | None:
    if fitted is None or fitted.variant.key.startswith("empty"):
        return None
    reference, variant = fitted.reference, fitted.variant
    rendered = variant.render(reference.spec, reference.instruction, CAPITAL, CONTROL)
    ways = {"control": [reference.text_ids(rendered)], "text": [_plain_ids(reference, variant)]}
    found = fitted.nearest(got.reported, ways)
    return None if found is None else found[0].hypothesis.prompt == "control"


def _plain_ids(reference: Reference, variant: Variant) -> np.ndarray:
    """Return the variant's prompt with the document's control strings as plain text."""
    marker = "\u2020"
    head, tail = variant.render(reference.spec, reference.instruction, CAPITAL, marker).split(marker)
    plain = reference.encoder.encode(CAPITAL, [CONTROL])[0].ids
    # What the recipe makes of the document alone, between the parts that no document changes.
    start = len(reference.encoder.query_prefix(CAPITAL))
    document = plain[start : len(plain) - len(reference.encoder.suffix_ids)]
    lead = reference.text_ids(head) if variant is not RECIPE else plain[:start]
    if variant is not RECIPE and head.endswith(" "):
        lead = reference.text_ids(head[:-1])  # the recipe reads this space with the document
    end = reference.text_ids(tail) if tail else np.empty(0, dtype=np.int32)
    return np.concatenate((lead, document, end))


def _control_by_count(
    got: Reported, encoder: PromptEncoder | None, tokenizer: PromptTokenizer | None, fitted: FittedPrompt | None
) -> bool | None:
    if encoder is None or tokenizer is None or got.prompt_tokens is None:
        return None
    variant = RECIPE if fitted is None else fitted.variant
    as_control = len(tokenizer.control_ids(variant.render(encoder.spec, encoder.instruction, CAPITAL, CONTROL)))
    plain_text = len(encoder.encode(CAPITAL, [CONTROL])[0].ids)
    if variant is RECIPE and got.prompt_tokens == plain_text != as_control:
        return False
    return True if got.prompt_tokens == as_control != plain_text else None


def long_document(subject: Subject, fitted: FittedPrompt | None, limit: int | None) -> Finding:
    """Send a document that is longer than the server's prompt may be.

    Args:
        subject: What is checked.
        fitted: Which prompt the server makes.
        limit: Longest prompt to try, in tokens.
    """
    length = subject.length or limit
    if length is None:
        return Finding(
            "long document", "skipped", "the server does not say how long a prompt may be; try with --long-tokens N."
        )
    if limit is not None and length > limit:
        return Finding(
            "long document", "skipped", f"its prompts may have {length} tokens; try that with --long-tokens {length}."
        )
    document = PROBES[1].documents[0] + " " + FILLER * (length // 10)  # a sentence of filler has over 20 tokens
    try:
        got = subject.score(CAPITAL, [document])
    except (BackendRejectedError, BackendUnavailableError, DocumentScoringError) as exc:
        return Finding(
            "long document",
            "warning",
            f"a document over its {length} tokens fails the request: {exc}",
            "one such document fails all documents that are sent with it, and applications then fall back without a word.",
            _cutting_way(subject),
        )
    if got.cut_here:
        return Finding(
            "long document",
            "warning",
            f"a document over its {length} tokens fails the request; this client then cut it and asked again.",
            "other clients lose all documents that are sent with such a one, and fall back without a word.",
            _cutting_way(subject),
        )
    if fitted is None:
        why = "without a reference that the other scores fit."
    elif length > fitted.reference.longest:
        why = f"because the reference would take too long (up to {fitted.reference.longest} tokens are tried)."
    else:
        return _how_cut(subject, got, document, length, fitted)
    return Finding(
        "long document",
        "unknown",
        f"a document over its {length} tokens scored {got.reported[0]:.4g}.",
        f"cannot tell whether the document was cut, or the end of the prompt with it, {why}",
    )


def _how_cut(subject: Subject, got: Reported, document: str, length: int, fitted: FittedPrompt) -> Finding:
    reference, variant = fitted.reference, fitted.variant
    whole = reference.text_ids(variant.render(reference.spec, reference.instruction, CAPITAL, document))
    ways = {"end": [whole[:length]], "beginning": [whole[-length:]]}
    if variant is RECIPE:
        ways["document"] = [reference.encoder_for(length).encode(CAPITAL, [document])[0].ids]
    found = fitted.nearest(got.reported, ways)
    saw = f"a document over its {length} tokens scored {got.reported[0]:.4g}"
    if found is None:
        return Finding(
            "long document", "unknown", saw + ".", "cannot tell how it was cut: no way of cutting fits clearly."
        )
    lost = found[0].hypothesis.prompt
    if lost == "document":
        return Finding("long document", "ok", saw + ": the document was cut, and the prompt kept its end.")
    saw += f": the {lost} of the prompt was cut off."
    return Finding("long document", "wrong", saw, "the scores of long documents mean nothing.", _safe_way(subject))


def _safe_way(subject: Subject) -> str:
    """Return what helps where the server's own way of making prompts does harm."""
    if subject.dialect in ("vllm", "sglang"):
        return f"send {_EXACT}, or use qwen-rerank serve"
    return f"use qwen-rerank serve, or vLLM or SGLang with {_EXACT}"


def _cutting_way(subject: Subject) -> str:
    first = "send max_tokens_per_doc; " if subject.dialect == "vllm" else ""
    return f"{first}{_safe_way(subject)}, which cut the document alone"
