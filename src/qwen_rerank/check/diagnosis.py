"""Runs all checks on a server, as an application sees it, or on a local model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from qwen_rerank.check import probes, tokens
from qwen_rerank.check.agreement import Agreement, FittedPrompt, compare, compare_instruction
from qwen_rerank.check.findings import Finding, Report
from qwen_rerank.check.probes import PROBES
from qwen_rerank.check.scales import CLOSE
from qwen_rerank.checks import shown_address
from qwen_rerank.errors import DocumentScoringError, InvalidInputError, RerankError, RerankServerError
from qwen_rerank.models.folder import read_tokenizer
from qwen_rerank.models.names import find_tokenizer
from qwen_rerank.prompt import PromptEncoder, PromptTokenizer

if TYPE_CHECKING:
    from qwen_rerank.check.reference import Reference
    from qwen_rerank.scorers.http import HttpScorer
    from qwen_rerank.scorers.qwen import QwenScorer

_REFUSED = (400, 422)  # the statuses of a server that finds fault with a request's values


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckOptions:
    """The options of a check.

    Attributes:
        reference: Folder or hub name of the checkpoint that is served, or an opened one; its scores are computed here,
            slowly.
        tokenizer: Folder or hub name for its tokenizer alone; counts tokens where there is no reference.
        dialect: Of a server; "auto" asks it.
        model: Name to ask a server for.
        api_key: For the server.
        timeout_s: Seconds of one request.
        long_tokens: Longest prompt that is tried.
    """

    reference: str | Reference | None = None
    tokenizer: str | None = None
    dialect: str = "auto"
    model: str | None = None
    api_key: str | None = field(default=None, repr=False)
    timeout_s: float = 60.0
    long_tokens: int | None = 16_384


@dataclass(frozen=True, slots=True)
class Reported:
    """The answer to one request.

    Attributes:
        reported: float64 `(n,)`, the scores as the server sent them.
        prompt_tokens: Tokens that it counted, or None.
        cut_here: Whether the client had to cut a document, because the server refused it as too long.
    """

    reported: np.ndarray
    prompt_tokens: int | None
    cut_here: bool = False


class Subject(Protocol):
    """Something that scores.

    Attributes:
        title: For people.
        dialect: Of a server; "local" for a model in this process.
        carries_instruction: Whether it can be given one.
        length: Tokens of its longest prompt, or None.
        models: Names it goes by.
    """

    title: str
    dialect: str
    carries_instruction: bool
    length: int | None
    models: tuple[str, ...]

    def score(self, query: str, documents: Sequence[str], *, instruction: str | None = None) -> Reported:
        """Return scores as an application would get them."""
        ...


class ServerSubject:
    """A server asked as applications ask it: by its rerank route, without special wishes."""

    def __init__(self, scorer: HttpScorer) -> None:
        self.scorer = scorer
        self.session = scorer.open()
        self.dialect = self.session.dialect.name
        self.title = f"{self.dialect} server at {scorer.config.url[0]}"
        self.carries_instruction = self.session.dialect.carries_instruction
        self.length = self.session.length
        named = (scorer.config.model,) if scorer.config.model else ()
        self.models: tuple[str, ...] = (*named, *self.session.models)

    def score(self, query: str, documents: Sequence[str], *, instruction: str | None = None) -> Reported:
        """Return scores as the server sends them by default.

        Raises:
            DocumentScoringError: If some have none.
        """
        from qwen_rerank.scorers.http import ServerScores

        found = self.scorer.score_details(query, documents, instruction=instruction)
        if found.errors or not isinstance(found, ServerScores):
            raise DocumentScoringError(found.errors, found.log_odds)
        lengths = np.array([len(document) for document in documents])
        cut_here = bool(np.any((found.kept_chars >= 0) & (found.kept_chars < lengths)))
        return Reported(found.reported, found.prompt_tokens, cut_here)


class LocalSubject:
    """A model in this process; its scores are log-odds."""

    dialect = "local"
    carries_instruction = True

    def __init__(self, scorer: QwenScorer) -> None:
        self.scorer = scorer
        self.title = f"local model {scorer.name}"
        self.length: int | None = scorer.max_length
        self.models: tuple[str, ...] = (scorer.name,)

    def score(self, query: str, documents: Sequence[str], *, instruction: str | None = None) -> Reported:
        """Return log-odds."""
        return Reported(self.scorer.score(query, documents, instruction=instruction).astype(np.float64), None)


def check(target: str, options: CheckOptions | None = None) -> Report:
    """Check whether the scores of a server (an address) or a local model (folder, hub name, "pocket") are right.

    Raises:
        RerankError: If the target cannot be reached or loaded, or gives no scores at all.
    """
    options = options or CheckOptions()
    if target.startswith(("http://", "https://")):
        return _check_server(target, options)
    if "://" in target:
        raise InvalidInputError(
            f"target must be an http address, a folder or a model name, not {shown_address(target)}."
        )
    return _check_local(target, options)


def _check_server(url: str, options: CheckOptions) -> Report:
    from qwen_rerank.scorers.http import HttpScorer  # brings httpx2, which a local model's check does without

    with HttpScorer(
        url,
        dialect=options.dialect,
        mode="server-template",
        model=options.model,
        api_key=options.api_key,
        timeout_s=options.timeout_s,
        scores="raw",
    ) as scorer:
        subject = ServerSubject(scorer)
        reference = _open(options.reference)
        report = _run(url, subject, reference, options)
        findings = [*report.findings, *_exact_prompts(subject, reference, options)]
    return Report(url, findings, report.cause, report.facts)


def _check_local(model: str, options: CheckOptions) -> Report:
    from qwen_rerank.scorers.qwen import QwenScorer  # brings torch, which a server's check does without

    subject = LocalSubject(QwenScorer(model))
    # The slow path of the very checkpoint is what the engine must equal.
    return _run(model, subject, _open(options.reference or model), options)


def _open(reference: str | Reference | None) -> Reference | None:
    if not isinstance(reference, str):
        return reference
    from qwen_rerank.check.reference import Reference  # brings torch and transformers

    return Reference(reference)


def _run(target: str, subject: Subject, reference: Reference | None, options: CheckOptions) -> Report:
    local = subject.dialect == "local"
    first = {probe.query: subject.score(probe.query, probe.documents) for probe in PROBES}
    seen = {query: scores.reported for query, scores in first.items()}
    agreement = None if reference is None else compare(subject, seen, reference)
    fitted = agreement.fitted if agreement is not None else None
    scale = fitted.scale if fitted is not None else None
    findings = [Finding("reached", "ok", _introduce(subject))]
    findings.append(probes.golden(subject, seen, scale or probes.apparent_scale(seen, local=local)))
    findings.append(agreement.finding if agreement is not None else _no_reference())
    findings.append(probes.constant(seen))
    findings.append(probes.value_range(seen, scale.key if scale else None, local=local))
    findings.append(_order(seen, agreement))
    instruction = _instruction(subject, fitted)
    findings.append(instruction)
    findings += _texts(subject, reference, fitted, options, first[PROBES[0].query])
    cause = agreement.cause if agreement is not None else ""
    if cause == "recipe" and instruction.status == "wrong":
        cause = "instruction-ignored"
    facts = {
        "dialect": subject.dialect,
        "models": list(subject.models),
        "length": subject.length,
        "reference": None if reference is None else reference.name,
        "scores": {query: [float(value) for value in values] for query, values in seen.items()},
    }
    return Report(target, findings, cause, facts)


def _order(seen: probes.ReportedByQuery, agreement: Agreement | None) -> Finding:
    found = probes.order(seen, agreement.first if agreement is not None else None)
    fitted = agreement.fitted if agreement is not None else None
    explained = fitted is not None and fitted.variant.status == "warning"
    # Another good prompt may order other documents first; that is no fault of its own.
    return replace(found, status="warning") if explained and found.status == "wrong" else found


def _introduce(subject: Subject) -> str:
    model = f", model {subject.models[0]}" if subject.models else ""
    length = f", prompts of up to {subject.length} tokens" if subject.length else ""
    return f"{subject.title}{model}{length}."


def _no_reference() -> Finding:
    return Finding(
        "agreement",
        "skipped",
        "no reference model was given.",
        "without one only gross faults can be seen, unless golden pairs are known.",
        "give --reference, the folder or hub name of the served checkpoint",
    )


def _instruction(subject: Subject, fitted: FittedPrompt | None) -> Finding:
    try:
        compared = compare_instruction(subject, fitted) if fitted is not None else None
        return probes.instruction(subject) if compared is None else compared
    except RerankServerError as exc:
        if exc.status not in _REFUSED:
            raise
        # The same server answered all that was asked without one.
        return probes.instruction_refused(str(exc))


def _texts(
    subject: Subject, reference: Reference | None, fitted: FittedPrompt | None, options: CheckOptions, first: Reported
) -> list[Finding]:
    encoder, tokenizer = _encoder(reference, options)
    return [
        tokens.counted(subject, encoder, tokenizer, first, fitted),
        tokens.long_document(subject, fitted, options.long_tokens),
        tokens.control_strings(subject, encoder, tokenizer, fitted),
    ]


def _encoder(
    reference: Reference | None, options: CheckOptions
) -> tuple[PromptEncoder, PromptTokenizer] | tuple[None, None]:
    if reference is not None:
        return reference.encoder, reference.tokenizer
    if options.tokenizer is None:
        return None, None
    path = find_tokenizer(options.tokenizer)
    tokenizer = PromptTokenizer(read_tokenizer(path), source=str(path))
    return PromptEncoder(tokenizer, max_length=32_768), tokenizer


def _exact_prompts(subject: ServerSubject, reference: Reference | None, options: CheckOptions) -> list[Finding]:
    """See whether the server gives right scores for prompts that are built on this side."""
    source = options.tokenizer or (reference.path if reference is not None else None)
    if not subject.session.dialect.token_routes or source is None:
        return []
    from qwen_rerank.scorers.http import HttpScorer

    config = subject.scorer.config
    try:
        with HttpScorer(
            config.url, dialect=subject.dialect, mode="token-ids", model=config.model, api_key=options.api_key,
            tokenizer=source, timeout_s=config.timeout_s,
        ) as scorer:  # fmt: skip
            got = np.concatenate([scorer.score(probe.query, probe.documents) for probe in PROBES]).astype(np.float64)
            route = scorer.open().path
    except RerankError as exc:
        return [Finding("exact prompts", "warning", f"prompts as token ids are not scored: {exc}")]
    if reference is None:
        return [
            Finding(
                "exact prompts",
                "unknown",
                f"{route} takes prompts as token ids; give --reference to compare the scores.",
            )
        ]
    prompts = [ids for probe in PROBES for ids in _recipe_ids(reference, probe.query, probe.documents)]
    gap = float(np.sqrt(np.mean((got - reference.log_odds(prompts)) ** 2)))
    saw = f"{route} with token ids is {gap:.4f} (root mean square of log-odds) away from the reference."
    if gap <= CLOSE:
        note = "HttpScorer with tokenizer= gives right scores on this server, whatever its template."
        return [Finding("exact prompts", "ok", saw, note)]
    return [
        Finding("exact prompts", "warning", saw, "not the prompt but the model, its head or its precision differs.")
    ]


def _recipe_ids(reference: Reference, query: str, documents: tuple[str, ...]) -> list[np.ndarray]:
    return [prompt.ids for prompt in reference.encoder.encode(query, documents)]
