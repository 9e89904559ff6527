"""API keys: where they come from, and who a request is."""

from __future__ import annotations

import codecs
import hashlib
import hmac
from collections.abc import Iterable, Sequence
from pathlib import Path

from qwen_rerank.errors import InvalidInputError
from qwen_rerank.regular_files import read_regular
from qwen_rerank.serve.errors import ApiError

MIN_KEY_CHARS = 8
MAX_KEY_CHARS = 512
_MOST_FILE_BYTES = 1 << 20

_KEY_HEADERS = (b"authorization", b"api-key", b"x-api-key")


class KeyRing:
    """The keys that open the server; without any, it is open to all.

    Args:
        keys: Printable ASCII without spaces, 8 to 512 characters each.
    """

    def __init__(self, keys: Iterable[str] = ()) -> None:
        # Digests of one length: the comparison's time tells neither a key's length nor how much of it was right.
        checked = [_checked(key) for key in dict.fromkeys(keys)]
        self._digests = [_digest(key.encode()) for key in checked]
        self._lengths = {len(key) for key in checked}

    def __len__(self) -> int:
        return len(self._digests)

    def identify(self, headers: Sequence[tuple[bytes, bytes]]) -> str:
        """Return who asks, as "key-1", "key-2", …; "open" where no keys are set.

        Raises:
            ApiError: 401 where the key is absent, wrong, or given more than once.
        """
        if not self._digests:
            return "open"
        given = [(name, value) for name, value in headers if name in _KEY_HEADERS]
        digest = _digest(_credential(given))
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if len(given) != 1 or not any(matches):
            message = "this server needs an API key: send `Authorization: Bearer KEY`."
            raise ApiError(401, "invalid_api_key", message, headers={"www-authenticate": 'Bearer realm="qwen-rerank"'})
        return f"key-{matches.index(True) + 1}"

    def shows_key(self, text: str, headers: Sequence[tuple[bytes, bytes]]) -> bool:
        """Whether a short text of a request holds one of the keys, or what the request itself gives as its key."""
        given = [_credential([header]) for header in headers if header[0] in _KEY_HEADERS]
        if any(credential and credential in text.encode() for credential in given):
            return True
        parts = (text[at : at + n].encode() for n in self._lengths for at in range(len(text) - n + 1))
        return any(_digest(part) in self._digests for part in parts)


def load_keys(*, listed: str | None = None, file: Path | None = None) -> list[str]:
    """Return keys from a comma-separated list and from a file with one a line (`#` starts a comment line).

    Raises:
        InvalidInputError: If the file cannot be read or holds no key.
    """
    keys = [key.strip() for key in (listed or "").split(",") if key.strip()]
    if file is None:
        return keys
    try:
        lines = [line.strip() for line in _decoded(read_regular(file, most_bytes=_MOST_FILE_BYTES)).splitlines()]
    except (OSError, UnicodeDecodeError) as exc:
        raise InvalidInputError(f"the API key file {str(file)!r} cannot be read ({exc}).") from exc
    found = [line for line in lines if line and not line.startswith("#")]
    if not found:
        raise InvalidInputError(f"the API key file {str(file)!r} holds no key; write one key a line.")
    return keys + found


def _decoded(content: bytes) -> str:
    """Return a file's text; editors on Windows save UTF-8 with a byte-order mark, or UTF-16."""
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if utf16 else "utf-8-sig")


def _checked(key: str) -> str:
    if not MIN_KEY_CHARS <= len(key) <= MAX_KEY_CHARS or not key.isascii() or not key.isprintable() or " " in key:
        raise InvalidInputError(
            f"an API key must be {MIN_KEY_CHARS} to {MAX_KEY_CHARS} printable ASCII characters without spaces "
            f"(one of {len(key)} characters was given; keys are not shown)."
        )
    return key


def _credential(given: Sequence[tuple[bytes, bytes]]) -> bytes:
    if len(given) != 1:
        return b""
    name, value = given[0]
    if name != b"authorization":
        return value
    scheme, _, credential = value.partition(b" ")
    return credential if scheme.lower() == b"bearer" else b""


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
