"""The troubleshooting page, shipped with the package so that an error can point to it without a network."""

from __future__ import annotations

from importlib.resources import files

from qwen_rerank.checks import check_choice

_PAGES = {"en": "troubleshooting.md", "zh": "troubleshooting.zh-CN.md"}


def sections(language: str = "en") -> dict[str, str]:
    """Return topic to text of the page in `language`, "en" or "zh", in the page's order."""
    check_choice("language", language, tuple(_PAGES))
    page = files(__package__).joinpath(_PAGES[language]).read_text(encoding="utf-8")
    _, *parts = page.split("\n## ")
    return {title.strip(): body.strip() for title, _, body in (part.partition("\n") for part in parts)}
