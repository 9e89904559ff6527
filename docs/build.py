"""Build the documentation in both languages into `site/`: `python -m docs.build`; a warning or a dead link ends it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from docs.drawing import ROOT, drawn

DOCS = ROOT / "docs"
STAGED = ROOT / "build" / "docs"
SITE = ROOT / "site"
LANGUAGES = ("en", "zh")
_PICTURES = (
    DOCS / "pictures",
    ROOT / "examples" / "pictures",
    ROOT / "notebooks" / "pictures",
    ROOT / "eval" / "store",
)


def main() -> int:
    """Write the pages with all that is drawn, make the site of them, and follow every link in it."""
    for folder in (SITE, STAGED):
        shutil.rmtree(folder, ignore_errors=True)
    for language in LANGUAGES:
        stage(language)
        command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean", "-f", f"{language}.yml"]
        if code := subprocess.run(command, cwd=STAGED, check=False).returncode:
            return code
    loosen_search(STAGED / "site")
    shutil.move(STAGED / "site", SITE)
    dead = dead_links(SITE)
    print("\n".join(dead) or f"{sum(1 for _ in SITE.rglob('*.html'))} pages in {SITE.relative_to(ROOT)}/, no dead link")
    return 1 if dead else 0


def stage(language: str) -> None:
    """Write one language's pages and pictures, and the settings, to where the site is made of them."""
    pages = STAGED / language
    shutil.copytree(DOCS / "assets", pages / "assets")
    for folder in _PICTURES:
        for picture in folder.iterdir():
            if picture.suffix in {".svg", ".png"}:
                (pages / "pictures").mkdir(exist_ok=True)
                shutil.copy(picture, pages / "pictures")
    for source in (DOCS / language).rglob("*.md"):
        target = pages / source.relative_to(DOCS / language)
        target.parent.mkdir(parents=True, exist_ok=True)
        up = "../" * (len(target.relative_to(pages).parts) - 1)
        target.write_text(
            drawn(source.read_text(encoding="utf-8"), language).replace("](PICTURES/", f"]({up}pictures/"), "utf-8"
        )
    for settings in DOCS.glob("*.yml"):
        shutil.copy(settings, STAGED)
    shutil.copytree(DOCS / "overrides", STAGED / "overrides", dirs_exist_ok=True)


def loosen_search(site: Path) -> None:
    """Have the search take any word of a question, where it asks for all of them.

    A question in whole words has some that no page has. The order of the results puts first what has most of them.
    """
    for script in site.rglob("workers/search.*.js"):
        text, n_found = re.subn(r'"and"(?=,\w+=>\(\{field:"\*")', '"or"', script.read_text(encoding="utf-8"))
        if n_found != 1:
            raise RuntimeError(
                f"{script.name} asks for all words in {n_found} places, not in one; look how it does now."
            )
        script.write_text(text, encoding="utf-8")


class Page(HTMLParser):
    """The links and anchors of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what the tag points at and what it is called."""
        for name, value in attrs:
            if value and name in {"href", "src"}:
                self.links.add(value)
            elif value and name in {"id", "name"}:
                self.anchors.add(value)


def dead_links(site: Path) -> list[str]:
    """Return one line for each link inside the site that leads nowhere, and for each thing loaded from elsewhere."""
    pages = {path.resolve(): Page(path) for path in site.rglob("*.html") if path.name != "404.html"}
    found = []
    for path, page in pages.items():
        for link in sorted(page.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            missing_anchor = target in pages and parts.fragment and unquote(parts.fragment) not in pages[target].anchors
            if not target.exists() or (missing_anchor and not parts.fragment.startswith("__")):
                found.append(f"{path.relative_to(site.resolve())}: {link} leads nowhere")
        found += [
            f"{path.relative_to(site.resolve())}: {one} is loaded from elsewhere" for one in loaded_from_elsewhere(path)
        ]
    return found


def loaded_from_elsewhere(path: Path) -> list[str]:
    """Return the scripts, fonts, styles and pictures that a page takes from another host: the site works offline."""
    text = path.read_text(encoding="utf-8")
    tags = re.findall(
        r"<(?:script|img|iframe)[^>]+src=\"(https?://[^\"]+)\"|<link[^>]+rel=\"?(?:stylesheet|preconnect)\"?[^>]+href=\"(https?://[^\"]+)\"",
        text,
    )
    return sorted({first or second for first, second in tags})


if __name__ == "__main__":
    sys.exit(main())
