"""HTML out: a policy that lets a page run its own script and style, talk to its own server, and nothing else."""

from __future__ import annotations

import base64
import hashlib
import html

from starlette.responses import Response


def page_response(title: str, body: str, *, style: str, script: str = "", language: str = "en") -> Response:
    """Return a whole page; `body` is markup, `style` and `script` are put in as they are."""
    text = (
        f'<!doctype html>\n<html lang="{language}">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n{body}\n"
        + (f"<script>{script}</script>\n" if script else "")
        + "</body>\n</html>\n"
    )
    return Response(text, media_type="text/html; charset=utf-8", headers=page_headers(style=style, script=script))


def page_headers(*, style: str, script: str) -> dict[str, str]:
    """Return the headers that let exactly this style and script run."""
    policy = (
        "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"frame-ancestors 'none'; style-src '{_hash(style)}'; script-src {repr(_hash(script)) if script else repr('none')}"
    )
    return {"content-security-policy": policy, "cache-control": "no-cache", "x-frame-options": "DENY"}


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode()
