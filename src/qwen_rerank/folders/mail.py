"""Mail that was saved as a file: its subject, who wrote it to whom and when, and its text."""

from __future__ import annotations

from email import message_from_bytes, policy
from typing import cast

from qwen_rerank.folders.kinds import Converted, Limits, decoded
from qwen_rerank.folders.office import html_sections
from qwen_rerank.folders.sections import Section

_SHOWN = ("From", "To", "Cc", "Date", "Subject")


def read_mail(data: bytes, text_column: str | None, limits: Limits) -> Converted:
    """Return the section of a message; of its attachments only how many there are."""
    message = message_from_bytes(data, policy=policy.default)
    head = "\n".join(f"{name}: {' '.join(str(message[name]).split())}" for name in _SHOWN if message[name])
    body = message.get_body(("plain", "html"))
    text = ""
    notes: list[str] = []
    if body is not None:
        # By our own decoder: that of the library replaces all that it does not know.
        text, notes = decoded(cast(bytes, body.get_payload(decode=True)) or b"", body.get_content_charset())
        if body.get_content_subtype() == "html":
            text = "\n".join(one.text for one in html_sections(text))
    if count := sum(1 for _ in message.iter_attachments()) if message.is_multipart() else 0:
        notes.append(f"attachments that are not read: {count}")
    subject = " ".join(str(message["Subject"] or "").split())
    whole = f"{head}\n\n{text.replace(chr(13), '').strip()}".strip()
    return Converted([Section(whole, (subject,) if subject else ())] if whole else [], notes, [])
