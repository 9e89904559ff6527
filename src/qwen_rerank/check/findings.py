"""`Finding` and `Report`: what a check found, and the verdict of all findings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Status = Literal["ok", "wrong", "warning", "unknown", "skipped"]
Verdict = Literal["right", "wrong", "cannot tell"]

EXIT_CODES: dict[Verdict, int] = {"right": 0, "wrong": 1, "cannot tell": 2}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        check: Its name.
        status: "ok", "wrong", "warning" (right, but mind this), "unknown" (looked, could not tell), "skipped".
        saw: What was seen, with the numbers.
        why: What it means; "" where there is nothing to add.
        cure: The exact flag, template or setting that helps; "" where nothing is to be cured.
        proves: Whether an "ok" shows that scores are right, not only that nothing odd was seen.
    """

    check: str
    status: Status
    saw: str
    why: str = ""
    cure: str = ""
    proves: bool = False


@dataclass(frozen=True, slots=True)
class Report:
    """All findings about one model or server."""

    target: str
    findings: Sequence[Finding]
    cause: str = ""  # key of the prompt or head variant that the scores fit, or ""
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> Verdict:
        """Return "wrong" if anything is, "right" only if something proves it, else "cannot tell"."""
        if any(finding.status == "wrong" for finding in self.findings):
            return "wrong"
        proven = any(finding.status in ("ok", "warning") and finding.proves for finding in self.findings)
        return "right" if proven else "cannot tell"

    @property
    def exit_code(self) -> int:
        """0 right, 1 wrong, 2 cannot tell."""
        return EXIT_CODES[self.verdict]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON data."""
        return {
            "target": self.target,
            "verdict": self.verdict,
            "cause": self.cause or None,
            "facts": self.facts,
            "findings": [asdict(finding) for finding in self.findings],
        }
