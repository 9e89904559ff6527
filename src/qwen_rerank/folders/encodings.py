"""Bytes of a text file to its characters, whichever encoding somebody's editor wrote."""

from __future__ import annotations

import codecs
import re
import unicodedata

from qwen_rerank.errors import InvalidInputError, MissingExtraError

_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# What people's files are in, so that a short text is not taken for one of the sixty others that its bytes would fit.
_LIKELY = ("gb18030", "shift_jis", "big5", "euc_kr", "euc_jp", "cp1252", "cp1250", "cp1251", "iso8859_15")
# What pages say, to what browsers take it for.
_DECLARED = {
    **{name: name for name in ("big5", "gb18030", "euc-jp", "iso-2022-jp", "koi8-r", "koi8-u")},
    **{f"{name}{n}": f"cp{n}" for name in ("windows-", "cp") for n in range(1250, 1259)},
    **{f"iso-8859-{n}": f"iso8859-{n}" for n in (2, 3, 4, 5, 6, 7, 8, 10, 13, 14, 15, 16)},
    **dict.fromkeys(("iso-8859-1", "latin1", "us-ascii", "ascii"), "cp1252"),
    **dict.fromkeys(("gb2312", "gbk", "x-gbk"), "gb18030"),
    **dict.fromkeys(("shift_jis", "shift-jis", "sjis", "x-sjis"), "cp932"),
    **dict.fromkeys(("euc-kr", "ks_c_5601-1987"), "cp949"),
    **dict.fromkeys(("tis-620", "iso-8859-11", "windows-874"), "cp874"),
    "iso-8859-9": "cp1254",
}
_SAMPLE_BYTES = 64 * 1024


def is_binary(head: bytes) -> bool:
    """Return whether the first bytes of a file are those of no text."""
    if head.startswith(tuple(bom for bom, _ in _BOMS[1:])):
        return False
    return b"\0" in head and _wide(head) is None


def decode(data: bytes, declared: str | None = None) -> tuple[str, str]:
    """Return a text and the encoding it was in, with the number of broken characters where there are a few.

    Args:
        data: The bytes.
        declared: The encoding that the text itself names; believed unless the text is Unicode or does not fit it.

    Raises:
        InvalidInputError: If it is in none that is known.
        MissingExtraError: If it is not Unicode and the package that detects encodings is missing.
    """
    encoding = next((name for bom, name in _BOMS if data.startswith(bom)), None) or _wide(data[:_SAMPLE_BYTES])
    try:
        return data.decode(encoding or "utf-8"), encoding or "utf-8"
    except UnicodeDecodeError as exc:
        if encoding and encoding != "utf-8-sig":
            raise InvalidInputError(f"no {encoding} ({exc.reason} at byte {exc.start}).") from exc
    for name in ("utf-8", _DECLARED.get(str(declared).lower())):
        if name is not None and (found := _nearly(data, name)) is not None:
            return found
    detected = _detect(data)
    try:
        return data.decode(detected), detected
    except UnicodeDecodeError as exc:
        raise InvalidInputError(f"in no encoding that is known (nearest: {detected}); convert it to UTF-8.") from exc


def _nearly(data: bytes, encoding: str) -> tuple[str, str] | None:
    """Return a text whose characters beyond ASCII are nearly all of this encoding, the few others replaced."""
    text = data.decode(encoding, "replace")
    broken = text.count("\ufffd")
    sound = len(text) - len(text.encode("ascii", "ignore")) - broken
    # One character at the very end that is cut in two says little against an encoding that all others are of.
    cut = broken == 1 and text.endswith("\ufffd") and sound >= 3
    if broken * 10 > sound and not cut:
        return None
    return text, encoding if not broken else f"{encoding}, broken characters: {broken}"


def _wide(head: bytes) -> str | None:
    """Return the kind of UTF-16 without a byte-order mark, told by zero bytes and by what the text would be."""
    if b"\0" not in head or len(head) % 2:
        return None
    texts = {name: head.decode(name, "replace") for name in ("utf-16-le", "utf-16-be")}
    strange = {name: sum(map(_is_strange, text)) for name, text in texts.items()}
    best = min(strange, key=strange.__getitem__)
    return best if strange[best] * 50 <= len(texts[best]) and any(char.isspace() for char in texts[best]) else None


def _is_strange(char: str) -> bool:
    return char == "\ufffd" or (unicodedata.category(char) in ("Cn", "Co", "Cc") and char not in "\t\r\n\f")


def _detect(data: bytes) -> str:
    try:
        from charset_normalizer import from_bytes
    except ImportError as exc:
        raise MissingExtraError(
            "reading text that is not UTF-8", package="charset-normalizer", extra="files", cause=exc
        ) from exc
    high = [byte for byte in data[:_SAMPLE_BYTES] if byte >= 0x80]
    # A single accented letter among ASCII is a Western text; the characters of East Asia come in pairs.
    if len(high) and _lonely(data[:_SAMPLE_BYTES]) > 0.7:
        return "cp1252" if _decodes(data, "cp1252") else "latin-1"
    best = from_bytes(data[:_SAMPLE_BYTES], cp_isolation=list(_LIKELY), threshold=0.6).best()
    if best is not None and _decodes(data, best.encoding):
        # Simplified Chinese reads as Korean syllables with some Chinese characters among them, which Koreans hardly write.
        chinese = best.encoding in ("euc_kr", "cp949") and re.search("[\u4e00-\u9fff]", data.decode(best.encoding))
        return "gb18030" if chinese and _decodes(data, "gb18030") else str(best.encoding)
    for name in _LIKELY:
        if _decodes(data, name):
            return name
    raise InvalidInputError("in no encoding that is known; convert it to UTF-8.")


def _lonely(data: bytes) -> float:
    """Return the share of runs of bytes from 0x80 up that are one byte long."""
    runs, single, length = 0, 0, 0
    for byte in data + b"\n":
        if byte >= 0x80:
            length += 1
        elif length:
            runs, single, length = runs + 1, single + (length == 1), 0
    return single / runs if runs else 0.0


def _decodes(data: bytes, encoding: str) -> bool:
    try:
        data.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True
