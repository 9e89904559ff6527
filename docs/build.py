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
    """Have the search take any word of a question that says something, where it asks for all of all words.

    A question in whole words has some that no page has. The order of the results puts first what has most of the others;
    words that every question has would outweigh them in a heading such as "How many machines".
    """
    for script in site.rglob("workers/search.*.js"):
        text, n_found = _PARSER.subn(_loose_parser, script.read_text(encoding="utf-8"))
        if n_found != 1:
            raise RuntimeError(
                f"{script.name} parses a question in {n_found} places, not in one; look how it does now."
            )
        script.write_text(text, encoding="utf-8")


_PARSER = re.compile(r'parser:(\w+)=>(\w+)\(\1,"and",(\w+=>\(\{field:"\*".*?\}\}\))\)(?=,compiler:)')
_SAYS_NOTHING = (
    "[a-z]|about|am|an|and|any|are|as|at|be|been|but|by|can|could|did|do|does|for|from|get|had|has|have|how|if|in|is|it|its|me|my|need|needs|of|on|or|"
    "our|please|should|so|some|take|than|that|the|their|them|there|these|this|those|to|use|was|we|were|what|when|where|which|who|why|will|with|"
    "work|works|would|you|your"
)
_SAYS_NOTHING_ZH = (
    "怎么办|怎么样|怎么|怎样|如何|请问|为什么|什么|哪个|哪些|哪种|多少|是不是|能不能|可不可以|可以|吗|呢|？|！|。"
)


def _loose_parser(found: re.Match[str]) -> str:
    """Return the parser for any word, before which such words become spaces: the marked places stay where they are."""
    blank = "(word=>' '.repeat(word.length))"
    spaces = f"query.replace(/\\b(?:{_SAYS_NOTHING})\\b|[?!]|{_SAYS_NOTHING_ZH}/gi,{blank})"
    any_word = f'{found[2]}({found[1]},"or",{found[3]})'
    return (
        f"parser:{found[1]}=>(parse=>query=>{{const said={spaces};return parse(said.trim()?said:query)}})({any_word})"
    )


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
