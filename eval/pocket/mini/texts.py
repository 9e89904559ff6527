"""Passages and queries that the mini reranker learns from: labelled training splits and self-supervised pairs of many kinds.

    python eval/pocket/mini/texts.py --data COLLECTIONS --documentation build/mini/doc --output build/mini/texts

`--documentation` is a folder in which Debian's documentation packages lie unpacked (`apt-get download NAME`, `dpkg -x`),
one folder a package; `DOCUMENTATION` names them with their licences. Test and dev queries are never read. A passage that
shares a sentence with a collection of `HELD_OUT` is left out.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import random
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from html.parser import HTMLParser
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import sources
from sources import TRAINED_ON, Collection, load_collection, passages, python_functions, sentences

from qwen_rerank.lexical import terms

# Debian package -> (language, licence)
DOCUMENTATION = {
    "postgresql-doc-15": ("en", "PostgreSQL Licence"),
    "python3.11-doc": ("en", "PSF-2.0"),
    "sqlite3-doc": ("en", "public domain"),
    "nodejs-doc": ("en", "MIT"),
    "python-django-doc": ("en", "BSD-3-Clause"),
    "python-astropy-doc": ("en", "BSD-3-Clause"),
    "python-sympy-doc": ("en", "BSD-3-Clause"),
    "libreoffice-help-en-us": ("en", "MPL-2.0"),
    "libreoffice-help-zh-cn": ("zh", "MPL-2.0"),
}
WORDNET = ("wordnet-base", "WordNet 3.0 licence")
# More packages whose functions are read, with their licences.
CODE = {"networkx": "BSD-3-Clause", "sympy": "BSD-3-Clause", "pandas": "BSD-3-Clause", "nltk": "Apache-2.0"}
HELD_OUT = (
    "vaswani_npl",
    "cosqa",
    "dbpedia_entity_subset",
    "xquad_r_en",
    "xquad_r_zh",
    "rgb_zh_dev",
    "cacm",
    "cisi",
    "noveleval",
)
SHORTEST = {"en": 60, "zh": 20}  # characters of a passage
SCALES = {"en": (1, 220, 450, 900), "zh": (1, 80, 160, 330)}  # characters of a passage; 1 = one sentence
MEETING = 9000  # characters of a meeting that are read
SENTENCE = {"en": (25, 220), "zh": (8, 70)}  # characters of a sentence that may be a query


@dataclass(frozen=True)
class Passage:
    """A text, the document it is part of, and its source."""

    text: str
    document: str
    source: str


@dataclass(frozen=True)
class Query:
    """A query with the passages known to answer it; without one, only teachers say what is good."""

    query: str
    positives: tuple[int, ...]
    kind: str
    document: str
    labelled: bool = False


class Pool:
    """The passages of one language and the queries over them."""

    def __init__(self, language: str, generator: random.Random, forbidden: set[str]) -> None:
        self.language, self.generator, self.forbidden = language, generator, forbidden
        self.passages: list[Passage] = []
        self.queries: list[Query] = []
        self.dropped = 0
        self._place: dict[str, int] = {}

    def add(self, text: str, document: str, source: str) -> int | None:
        """Return the place of a passage; None where it is too short or shares a sentence with a held-out collection."""
        text = " ".join(text.split()) if source not in CODE_SOURCES else text.strip()
        if len(text) < SHORTEST[self.language]:
            return None
        if text in self._place:
            return self._place[text]
        if any(key in self.forbidden for key in keys(text)):
            self.dropped += 1
            return None
        self._place[text] = len(self.passages)
        self.passages.append(Passage(text, document, source))
        return self._place[text]

    def ask(self, query: str, place: int | None, kind: str, document: str, *, labelled: bool = False) -> None:
        """Add a query; `place` None means that no passage is known to answer it."""
        query = " ".join(query.split())[:300]
        if len(query) >= (2 if self.language == "zh" else 4):
            self.queries.append(Query(query, () if place is None else (place,), kind, document, labelled))


CODE_SOURCES: set[str] = {"standard library", *sources.DOCUMENTED_PACKAGES, *CODE}


def keys(text: str) -> Iterator[str]:
    """Return what says that two texts share a sentence: its first 60 letters and digits, where it has as many (or 24 Han)."""
    for sentence in sentences(text):
        plain = re.sub(r"[\W_]+", "", sentence.lower())
        enough = 20 if any("\u4e00" <= c <= "\u9fff" for c in plain) else 50
        if len(plain) >= enough:
            yield plain[:60]


# --- queries of many kinds -------------------------------------------------------------------------------------------


def keywords(pool: Pool, text: str, frequency: Counter[str]) -> str:
    """Return two to five of the rarer words of a text, in their order, as people type them into a search box."""
    found = [t for t in dict.fromkeys(terms(text)) if len(t) > 1 and not t.isdigit()]
    ranked = sorted(found, key=lambda t: frequency[t])[:12]
    chosen = set(pool.generator.sample(ranked, min(len(ranked), pool.generator.randint(2, 5))))
    kept = [t for t in found if t in chosen]
    if pool.language == "zh":  # a bigram whose neighbour was taken as well would repeat a character
        kept = [t for i, t in enumerate(kept) if i == 0 or kept[i - 1][-1] != t[0]]
    return " ".join(kept)


def crop(pool: Pool, text: str) -> str:
    """Return a span of words (English) or characters (Chinese) out of a text."""
    g = pool.generator
    if pool.language == "zh":
        n = g.randint(6, 24)
        at = g.randrange(max(1, len(text) - n))
        return text[at : at + n].strip("，。、；：,. ")
    words = text.split()
    n = g.randint(3, 14)
    at = g.randrange(max(1, len(words) - n))
    return " ".join(words[at : at + n])


QUESTIONS = {
    "en": (
        "what is {}",
        "how does {} work",
        "{}",
        "how to use {}",
        "explain {}",
        "{} example",
        "What is {}?",
        "Describe {}.",
    ),
    "zh": ("{}是什么", "什么是{}", "{}", "如何使用{}", "{}怎么用", "{}介绍", "请介绍一下{}", "{}？"),
}


def without(pool: Pool, text: str, sentence: str) -> str:
    """Return a passage without the sentence that serves as its query (one time in ten with it)."""
    return text if pool.generator.random() < 0.1 else text.replace(sentence, " ", 1)


def self_supervise(
    pool: Pool, body: str, document: str, source: str, titles: Iterable[str], *, chars: int, limit: int
) -> None:
    """Cut a text into passages and ask for them: by title, by a sentence of their own, by keywords, by a span."""
    g, language = pool.generator, pool.language
    parts = sentences(body) if chars == 1 else passages(body, chars=chars)
    parts = [p for p in parts if len(p) >= SHORTEST[language]]
    titles = [t for t in titles if len(t) > (1 if language == "zh" else 3)]
    chosen = set(g.sample(range(len(parts)), min(limit, len(parts))))
    for i, part in enumerate(parts):
        if i not in chosen:
            pool.add(part, document, source)
            continue
        draw = g.random()
        usable = [s for s in sentences(part) if SENTENCE[language][0] <= len(s) <= SENTENCE[language][1]]
        if i == 0 and titles and draw < 0.6:
            title = titles[-1] if draw < 0.35 else " ".join(titles[-2:])
            kind = "heading" if source in DOCUMENTATION else "title"
            pool.ask(g.choice(QUESTIONS[language]).format(title), pool.add(part, document, source), kind, document)
        elif len(usable) > 1 and draw < 0.75 and chars > 1:
            sentence = usable[0] if draw < 0.3 else g.choice(usable)
            place = pool.add(without(pool, part, sentence), document, source)
            if place is not None:
                pool.ask(sentence, place, "cloze", document)
        elif draw < 0.88:
            place = pool.add(part, document, source)
            words = keywords(pool, part, FREQUENCY[language])
            pool.ask(words.upper() if g.random() < 0.12 else words, place, "keywords", document)
        else:
            pool.ask(crop(pool, part), pool.add(part, document, source), "span", document)


FREQUENCY: dict[str, Counter[str]] = {"en": Counter(), "zh": Counter()}


def shout(pool: Pool) -> None:
    """Write one English query in twelve in capitals, and one in twelve without any: some collections do either."""
    changed = []
    for row in pool.queries:
        draw = pool.generator.random()
        text = row.query.upper() if draw < 1 / 12 else row.query.lower() if draw < 1 / 6 else row.query
        changed.append(Query(text, row.positives, row.kind, row.document, row.labelled))
    pool.queries = changed


# --- collections -----------------------------------------------------------------------------------------------------


def best_part(query: str, parts: list[str]) -> str:
    """Return the part that shares most terms with the query."""
    wanted = set(terms(query))
    return max(parts, key=lambda part: len(wanted & set(terms(part))))


def collection_rows(pool: Pool, collection: Collection, convert=lambda text: text) -> None:
    """Add a collection's passages and labelled queries, each query over passages and once more over single sentences."""
    g, language, name = pool.generator, pool.language, collection.name
    scales = SCALES[language]
    for key, text in collection.documents.items():
        title, document = convert(collection.titles[key]), f"{name}:{key}"
        body = convert(text)[len(title) :].strip() if title else convert(text)
        if name == "qmsum_long":  # a meeting has tens of thousands of characters: an excerpt of it
            at = g.randrange(max(1, len(body) - MEETING))
            body, chars = body[at : at + MEETING], g.choice(scales[2:])
        else:
            chars = 1 if g.random() < 0.35 else g.choice(scales[1:])
        self_supervise(pool, body, document, name, [title], chars=chars, limit=4)
    for query_id, relevance in collection.qrels.items():
        query = convert(collection.queries[query_id])
        for key in (key for key, grade in relevance.items() if grade > 0):
            text = convert(collection.documents[key])
            for first, last in collection.spans.get(query_id, {}).get(key, [])[:1]:
                text = "\n".join(text.split("\n")[first : last + 1])
            chars = g.choice(scales[2:])
            parts = passages(text, chars=chars)
            if parts:
                place = pool.add(best_part(query, parts)[: chars * 3 // 2], f"{name}:{key}", name)
                if place is not None:
                    pool.ask(query, place, "labelled", f"{name}:{key}", labelled=True)
                    pool.ask(query, None, "teacher", f"{name}:{key}")


# --- documentation ---------------------------------------------------------------------------------------------------


class Sections(HTMLParser):
    """Collects a page as (headings above, text) sections."""

    HEADINGS = ("h1", "h2", "h3", "h4", "h5")
    SKIPPED = ("script", "style", "nav", "header", "footer", "table", "aside")
    BREAKS = ("p", "li", "dd", "dt", "div", "pre", "br")

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[tuple[tuple[str, ...], str]] = []
        self._path: list[tuple[int, str]] = []
        self._text: list[str] = []
        self._heading: list[str] | None = None
        self._skip = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Begin a heading or a line."""
        if tag in self.SKIPPED:
            self._skip += 1
        elif tag in self.HEADINGS:
            self.end_section()
            self._heading = []
        elif tag in self.BREAKS:
            self._text.append("\n" if tag != "br" else " ")

    def handle_endtag(self, tag: str) -> None:
        """End a heading, which replaces those of its level and below."""
        if tag in self.SKIPPED:
            self._skip = max(0, self._skip - 1)
        elif tag in self.HEADINGS and self._heading is not None:
            level = int(tag[1])
            heading = re.sub(r"^[\d.]+\s+", "", " ".join("".join(self._heading).replace("¶", "").split()))
            self._path = [*(p for p in self._path if p[0] < level), (level, heading)]
            self._heading = None

    def handle_data(self, data: str) -> None:
        """Keep text."""
        if not self._skip:
            (self._heading if self._heading is not None else self._text).append(data)

    def end_section(self) -> None:
        """Close the section that is open."""
        lines = (" ".join(line.split()) for line in "".join(self._text).replace("¶", "").split("\n"))
        body = "\n".join(line for line in lines if len(line) > 1)
        if self._path and body:
            self.found.append((tuple(title for _, title in self._path), body))
        self._text = []


def html_sections(path: Path) -> list[tuple[tuple[str, ...], str]]:
    """Return the sections of one HTML file."""
    parser = Sections()
    parser.feed(path.read_text(encoding="utf-8", errors="replace"))
    parser.end_section()
    return parser.found


SKIPPED_PAGES = re.compile(
    r"(genindex|modindex|_modules|_sources|search|whatsnew|releases?/|changelog|/all\.html|bookmarks|contents\.html)"
)


def documentation_rows(pool: Pool, folder: Path, source: str, *, pages: int) -> None:
    """Add the sections of a documentation package: asked for by headings, sentences, keywords and spans."""
    found = sorted(path for path in folder.rglob("*.html") if not SKIPPED_PAGES.search(str(path)))
    if not found:
        raise SystemExit(f"{folder} holds no pages; fetch.py unpacks them there, and so does dpkg -x.")
    for path in pool.generator.sample(found, min(pages, len(found))):
        for titles, body in html_sections(path)[:25]:
            chars = pool.generator.choice(SCALES[pool.language][1:])
            self_supervise(pool, body, f"{source}:{path.name}", source, titles, chars=chars, limit=2)


def wordnet_rows(pool: Pool, folder: Path, *, limit: int) -> None:
    """Add dictionary entries: the words of a synset ask for its gloss, and a gloss for the entry."""
    lines = (folder / "usr/share/wordnet/data.noun").read_text(encoding="utf-8").splitlines()[29:]
    for line in pool.generator.sample(lines, limit):
        head, gloss = line.split(" | ", 1)
        fields = head.split()
        words = [fields[4 + 2 * i].replace("_", " ") for i in range(int(fields[3], 16))]
        text, draw = f"{', '.join(words)}: {gloss.strip()}", pool.generator.random()
        place = pool.add(text if draw < 0.5 else gloss.strip(), f"wordnet:{fields[0]}", "wordnet")
        if place is not None and draw < 0.75:
            pool.ask(
                pool.generator.choice(QUESTIONS["en"]).format(words[0]), place, "definition", f"wordnet:{fields[0]}"
            )
        elif place is not None:
            pool.ask(keywords(pool, gloss, FREQUENCY["en"]), place, "keywords", f"wordnet:{fields[0]}")


CODE_QUESTIONS = ("{}", "python {}", "how to {} in python", "{} python", "python function to {}", "python how to {}")


def code_rows(pool: Pool, *, limit: int, seed: int, every: int) -> None:
    """Add functions, half of them with their docstring: asked for by its summary or by the words of their name."""
    g = pool.generator
    for i, pair in enumerate(python_functions(limit, seed=seed, every=every)):
        name = re.match(r"def (\w+)", pair.document)
        head, _, body = pair.document.partition("\n")
        code = f'{head}\n    """{pair.query}."""\n{body}' if g.random() < 0.5 else pair.document
        place = pool.add(code, f"{pair.source}:{i}", pair.source)
        if place is None or name is None:
            continue
        words = " ".join(re.findall(r"[A-Z]?[a-z]+|[A-Z]+|\d+", name[1])).lower()
        summary = pair.query.rstrip(".")
        summary = summary[0].lower() + summary[1:]
        draw = g.random()
        if draw < 0.3:
            pool.ask(pair.query, place, "docstring", f"{pair.source}:{i}")
        elif draw < 0.7:
            short = " ".join(w for w in summary.split() if g.random() < 0.85)
            pool.ask(
                g.choice(CODE_QUESTIONS).format(re.sub(r"^(return|returns|compute|computes) ", "get ", short)),
                place,
                "code",
                f"{pair.source}:{i}",
            )
        else:
            rare = keywords(pool, summary, FREQUENCY["en"])
            pool.ask(
                g.choice(CODE_QUESTIONS[:2]).format(f"{words} {rare}" if draw < 0.85 else rare),
                place,
                "code",
                f"{pair.source}:{i}",
            )


# --- all of it -------------------------------------------------------------------------------------------------------


def held_out_keys(root: Path) -> set[str]:
    """Return the sentence keys of the collections that stay unseen."""
    found: set[str] = set()
    for name in HELD_OUT:
        for row in sources._lines(root / name, "corpus"):
            found.update(keys(row["text"]))
    return found


def share_of(collection: Collection, scale: float) -> Collection:
    """Return a share of the queries, at least 20, with their documents and as large a share of the others."""
    if scale == 1:
        return collection
    asked = list(collection.qrels)[: max(20, math.ceil(scale * len(collection.qrels)))]
    kept = {document for query in asked for document in collection.qrels[query]}
    kept.update(list(collection.documents)[: max(20, math.ceil(scale * len(collection.documents)))])
    return replace(
        collection,
        documents={key: text for key, text in collection.documents.items() if key in kept},
        qrels={query: collection.qrels[query] for query in asked},
    )


def build(root: Path, documentation: Path, language: str, *, seed: int, scale: float) -> Pool:
    """Return the pool of one language."""
    pool = Pool(language, random.Random(f"{seed} {language}"), held_out_keys(root))
    own = [name for name, (lang, _, _) in TRAINED_ON.items() if lang == language]
    loaded = [share_of(load_collection(root, name, TRAINED_ON[name][1]), scale) for name in own]
    for collection in loaded:
        for text in list(collection.documents.values())[:: 1 if language == "zh" else 2]:
            FREQUENCY[language].update(set(terms(text[:3000])))
    for collection in loaded:
        collection_rows(pool, collection)
        if collection.name == "drcd":
            from opencc import OpenCC

            collection_rows(pool, collection, OpenCC("t2s").convert)
    for name, (lang, _) in DOCUMENTATION.items():
        if lang == language:
            documentation_rows(
                pool, documentation / name, name, pages=math.ceil((2000 if lang == "zh" else 250) * scale)
            )
    if language == "en":
        wordnet_rows(pool, documentation / WORDNET[0], limit=math.ceil(6000 * scale))
        sources.DOCUMENTED_PACKAGES.update(CODE)
        code_rows(pool, limit=math.ceil(14000 * scale), seed=seed, every=math.ceil(1 / scale))
        shout(pool)
    return pool


def main() -> None:
    """Write `passages.<language>.jsonl.xz` and `queries.<language>.jsonl.xz`, and print their counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the collections in BEIR layout")
    parser.add_argument("--documentation", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the texts, for a rehearsal")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for language in ("en", "zh"):
        pool = build(options.data, options.documentation, language, seed=options.seed, scale=options.scale)
        for name, rows in (("passages", pool.passages), ("queries", pool.queries)):
            with lzma.open(options.output / f"{name}.{language}.jsonl.xz", "wt", encoding="utf-8", preset=6) as file:
                file.writelines(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)
        counts = {
            "language": language, "passages": len(pool.passages), "queries": len(pool.queries), "left out": pool.dropped,
            "sources": Counter(p.source for p in pool.passages), "kinds": Counter(q.kind for q in pool.queries),
            "characters": sum(len(p.text) for p in pool.passages),
        }  # fmt: skip
        print(json.dumps(counts), flush=True)


if __name__ == "__main__":
    main()
