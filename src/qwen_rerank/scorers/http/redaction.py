"""`Secrets`: what no message of ours and no log record of the HTTP library may show, whatever a server sends back."""

from __future__ import annotations

import base64
import html
import logging
import re
import reprlib
import weakref
from collections.abc import Iterable

HIDDEN = "***"
FRAGMENT_CHARS = 8  # a shorter piece of a key is no help to anyone, and hiding it would garble messages
_SHOWN_CHARS = 200
_READ_CHARS = 4096  # of a foreign text, which is cut before it is searched

# One character as servers and libraries write it: percent-encoded (also twice), escaped as in JSON or a repr, an entity.
_WRITTEN = re.compile(
    r"%(?:25){0,8}([0-9a-fA-F]{2})|\\{1,8}u([0-9a-fA-F]{4})|\\{1,8}x([0-9a-fA-F]{2})|(&#?\w{1,8};)|\\{1,8}[nrt]|(.)",
    re.DOTALL,
)
_LOGGERS = ("httpx2", *(f"httpcore2.{part}" for part in ("connection", "http11", "http2", "proxy", "socks")))
_REPR = reprlib.Repr()  # reads no more of a large value than it shows
_REPR.maxstring = _REPR.maxlong = _SHOWN_CHARS
_live: weakref.WeakSet[Secrets] = weakref.WeakSet()


class Secrets:
    """Keys, and how to take them out of a text that somebody else wrote.

    Found are pieces of `FRAGMENT_CHARS` characters and more, in either case, percent-encoded, escaped, in base64 or hex,
    and with white space or backslashes between.

    Args:
        values: The keys; each word of a header's value counts.
    """

    def __init__(self, values: Iterable[str] = ()) -> None:
        words = {word for value in values for word in value.split()}
        self._pieces: dict[int, set[str]] = {}
        for form in {form.replace("\\", "") for word in words for form in _forms(word)} - {""}:
            size = min(FRAGMENT_CHARS, len(form))
            pieces = self._pieces.setdefault(size, set())
            pieces.update(form[start : start + size] for start in range(len(form) - size + 1))
        _live.add(self)

    def hide(self, text: str) -> str:
        """Return `text` with *** for each piece of a key."""
        if not self._pieces or not text:
            return text
        read, spans = [], []
        for match in _WRITTEN.finditer(text):
            for char in _read(match).casefold():
                if char != "\\" and not char.isspace() and char.isprintable():
                    read.append(char)
                    spans.append(match.span())
        plain = "".join(read)
        found = sorted(
            (spans[start][0], spans[start + size - 1][1])
            for size, pieces in self._pieces.items()
            for start in range(len(plain) - size + 1)
            if plain[start : start + size] in pieces
        )
        out: list[str] = []
        end = 0
        for first, last in found:
            if first > end or not out:
                out += [text[end:first], HIDDEN]
            end = max(end, last)
        return "".join([*out, text[end:]])

    def shown(self, foreign: object, limit: int = _SHOWN_CHARS) -> str:
        """Return what another side sent as a message may hold it: without keys, printable, at most `limit` characters."""
        text = (foreign if isinstance(foreign, str) else _REPR.repr(foreign))[:_READ_CHARS]
        return "".join(c if c.isprintable() else " " for c in self.hide(text))[:limit]


class _LogFilter(logging.Filter):
    """Takes the keys of all live scorers out of the HTTP library's own records: at DEBUG it logs each header."""

    def filter(self, record: logging.LogRecord) -> bool:
        for secrets in list(_live):
            message = record.getMessage()
            if (hidden := secrets.hide(message)) != message:
                record.msg, record.args = hidden, ()
        return True


def guard_library_logs() -> None:
    """Filter the loggers of the HTTP library; more than once is the same as once."""
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_FILTER)


_FILTER = _LogFilter()


def _forms(word: str) -> set[str]:
    """Return how a key may be written, in lower case."""
    raw = word.encode()
    forms = {word, raw.hex()}
    for before in range(3):  # base64 depends on where in a group of three bytes the key begins
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            encoded = encode(b"\0" * before + raw).decode()
            # The characters at both ends also hold bits of the neighbours.
            whole = encoded[(before * 8 + 5) // 6 : (len(raw) + before) * 8 // 6]
            if len(whole) >= FRAGMENT_CHARS:
                forms.add(whole)
    return {form.casefold() for form in forms}


def _read(match: re.Match[str]) -> str:
    """Return the character that `_WRITTEN` found."""
    percent, unicode, byte, entity, plain = match.groups()
    if code := percent or unicode or byte:
        return chr(int(code, 16))
    return html.unescape(entity) if entity else plain or ""
