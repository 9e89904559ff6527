"""Every error this package raises on purpose.

RerankError
├── InvalidInputError (also ValueError)      an argument is wrong
│   ├── InvalidTextError                     a text holds a lone surrogate or is no string
│   ├── FileError                            a line of a file cannot be read as what it should be
│   └── CalibrationError                     a calibration that cannot be read or is not monotone
│       └── CalibrationMismatchError         a calibration that was fitted for other settings
├── MissingExtraError (also ImportError)     an optional package is absent or broken
├── ModelError                               a checkpoint that cannot be used
│   ├── ModelNotFoundError                   no such folder or hub name
│   │   └── HubUnreachableError              the hub cannot be reached, and its cache has no such model
│   ├── ModelIncompleteError                 a file, shard or weight is missing, or unexpected
│   ├── ModelCorruptError                    a file cannot be read
│   ├── UnsafeModelError                     pickle weights, remote code, or a graph that is no plain model
│   └── TokenizerError                       control strings or labels are not single tokens
├── JobError                                 a bulk job that cannot go on
├── StoreError                               see `qwen_rerank.store`; one subclass for each cause
└── ScorerError                              scoring failed
    ├── ScorerClosedError                    the scorer was closed, or carried over a fork
    ├── NonFiniteScoreError                  the model gave NaN or infinity
    ├── DeviceOutOfMemoryError               one prompt alone does not fit the device
    ├── QueryTooLongError (InvalidInputError) the query leaves no room for a document
    ├── DocumentTooLongError                 only with long_documents="error"
    ├── DocumentScoringError                 some documents failed; carries the others' scores
    └── RerankServerError                    a rerank server answered badly
        ├── RerankTimeoutError               no answer before the deadline
        ├── BackendUnavailableError          connection refused or reset, or 5xx
        ├── BackendRejectedError             4xx: the request or the key is wrong
        ├── RateLimitedError                 429 and no time left to wait
        └── ProtocolError                    an answer that breaks the protocol
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from qwen_rerank.extras import pip_line

if TYPE_CHECKING:
    import numpy as np


class RerankError(Exception):
    """Base of every error of this package.

    Attributes:
        topic: The section of the troubleshooting page that helps, or ""; a traceback ends with the command for it.
    """

    topic: ClassVar[str] = ""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        if self.topic:
            self.add_note(f"What helps: qwen-rerank help {self.topic}")


class InvalidInputError(RerankError, ValueError):
    """An argument is wrong; the message holds its name, its value and what would be right."""


class InvalidTextError(InvalidInputError):
    """A text is not a string, or holds a lone surrogate that no encoding can carry."""


class FileError(InvalidInputError):
    """A file cannot be read as what it should be; the message begins with `file:line`."""

    def __init__(self, path: str | os.PathLike[str], line: int | None, reason: str) -> None:
        where = f"{os.fspath(path)}:{line}" if line is not None else os.fspath(path)
        super().__init__(f"{where}: {reason}")
        self.path = os.fspath(path)
        self.line = line
        self.reason = reason

    def __reduce__(self) -> tuple[type[FileError], tuple[str, int | None, str]]:
        """Keep the parts over pickling between processes."""
        return type(self), (self.path, self.line, self.reason)


class CalibrationError(InvalidInputError):
    """A calibration cannot be read, or is no monotone map to probabilities."""


class CalibrationMismatchError(CalibrationError):
    """A calibration was fitted for another scorer, instruction or way of reading long documents."""


class MissingExtraError(RerankError, ImportError):
    """A feature needs an optional package.

    Args:
        feature: The public name the user asked for.
        package: The distribution that is missing or broken.
        extra: The extra of this package that brings it.
        cause: The import's own error, kept in the message so that a broken install is not mistaken for a missing one.
        instead: What does without the package, if anything does.
    """

    def __init__(
        self, feature: str, *, package: str, extra: str, cause: BaseException | None = None, instead: str = ""
    ) -> None:
        reason = f" (the import failed with: {cause})" if cause is not None else ""
        way_out = f"; without it: {instead}" if instead else ""
        super().__init__(f"{feature} needs `{package}`: {pip_line(extra)}{reason}{way_out}")
        self.feature = feature
        self.package = package
        self.extra = extra


class ModelError(RerankError):
    """A checkpoint cannot be used; the message names the file."""

    topic = "model"


class ModelNotFoundError(ModelError):
    """No checkpoint at that path or hub name."""


class HubUnreachableError(ModelNotFoundError):
    """The model hub cannot be reached, and the checkpoint is not in its cache."""

    topic = "hub"


class ModelIncompleteError(ModelError):
    """A file, shard or weight is missing, or a weight is unexpected; nothing is ever initialised at random."""


class ModelCorruptError(ModelError):
    """A file of the checkpoint cannot be read as what it should be."""


class UnsafeModelError(ModelError):
    """The checkpoint would need pickle or code of its own, or its graph more than a model needs; it is refused."""


class TokenizerError(ModelError):
    """The tokenizer does not have each control string and label as exactly one token."""


class StoreError(RerankError):
    """A document store cannot do what was asked; the subclasses live in `qwen_rerank.store.errors`."""

    topic = "store"


class JobError(RerankError):
    """A bulk job cannot go on: another run took it over, a worker cannot do its block, or its folder is damaged."""


class ScorerError(RerankError):
    """Scoring failed."""


class ScorerClosedError(ScorerError):
    """The scorer was closed, or its process was forked after it started."""


class NonFiniteScoreError(ScorerError):
    """The model gave NaN or infinity for a document."""


class DeviceOutOfMemoryError(ScorerError):
    """A single prompt does not fit the device's memory."""

    topic = "memory"


class QueryTooLongError(ScorerError, InvalidInputError):
    """Instruction and query alone fill the prompt, so no document fits beside them."""

    topic = "long-text"


class DocumentTooLongError(ScorerError):
    """A document is longer than its room and long documents were declared an error."""

    topic = "long-text"


class DocumentScoringError(ScorerError):
    """Some documents could not be scored.

    Attributes:
        failed: Input index to the error of that document.
        scores: float32 `(n_documents,)`, log-odds of the others; NaN at the failed indices.
    """

    def __init__(self, failed: Mapping[int, Exception], scores: np.ndarray) -> None:
        first = min(failed)
        super().__init__(
            f"{len(failed)} of {len(scores)} documents could not be scored; the first is documents[{first}]: "
            f"{type(failed[first]).__name__}: {failed[first]}"
        )
        self.failed = dict(failed)
        self.scores = scores

    def __reduce__(self) -> tuple[type[DocumentScoringError], tuple[dict[int, Exception], np.ndarray]]:
        """Keep the parts over pickling between processes."""
        return type(self), (self.failed, self.scores)


class RerankServerError(ScorerError):
    """A rerank server answered badly.

    Attributes:
        url: The address asked, without credentials.
        status: HTTP status, or None when there was no answer.
        excerpt: At most 200 printable characters of the answer.
        code: The server's own name for its error, or "".
        retry_after_s: Seconds that the server asks to wait, or None.
    """

    def __init__(
        self,
        message: str,
        *,
        url: str,
        status: int | None = None,
        excerpt: str = "",
        code: str = "",
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.url = url
        self.status = status
        self.excerpt = excerpt
        self.code = code
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[Any, ...]:
        """Keep the parts over pickling between processes."""
        names = ("url", "status", "excerpt", "code", "retry_after_s")
        return _rebuild_server_error, (type(self), str(self), {name: getattr(self, name) for name in names})


def _rebuild_server_error(cls: type[RerankServerError], message: str, parts: dict[str, Any]) -> RerankServerError:
    return cls(message, **parts)


class RerankTimeoutError(RerankServerError, TimeoutError):
    """No complete answer before the total deadline."""

    topic = "port"


class BackendUnavailableError(RerankServerError):
    """Connection refused or reset, or a 5xx that retries did not cure."""

    topic = "port"


class BackendRejectedError(RerankServerError):
    """The server refused the request (4xx); trying again would not help."""


class RateLimitedError(RerankServerError):
    """429 after every retry, or the time that the server asks for is more than what is left."""


class ProtocolError(RerankServerError):
    """The answer breaks the protocol; no score is ever made up for it."""
