"""Converters of the kinds that need a library: web pages, PDF, Word, slides, spreadsheets and books."""

from __future__ import annotations

import io
import posixpath
import re
import zipfile
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

from qwen_rerank.errors import InvalidInputError
from qwen_rerank.folders import word_xml
from qwen_rerank.folders.kinds import Converted, Limits, decoded, missing
from qwen_rerank.folders.sections import Headings, Section
from qwen_rerank.folders.tables import Refusals, row_sections, sheet_rows

_LEFT_OUT = ("script", "style", "noscript", "template", "svg", "nav", "head", "iframe")
_INLINE = frozenset(
    [
        "a",
        "abbr",
        "b",
        "bdi",
        "bdo",
        "big",
        "cite",
        "code",
        "data",
        "del",
        "dfn",
        "em",
        "font",
        "i",
        "ins",
        "kbd",
        "label",
        "mark",
        "q",
        "ruby",
        "rb",
        "rt",
        "rp",
        "s",
        "samp",
        "small",
        "span",
        "strike",
        "strong",
        "sub",
        "sup",
        "time",
        "tt",
        "u",
        "var",
        "wbr",
    ]
)
_DEEPEST = 200
_HEAD_BYTES = 4096
_CHARSET = re.compile(
    rb"""<meta\b[^>]*?\bcharset\s*=\s*["']?([\w.:-]+)|<\?xml\b[^>]*?\bencoding\s*=\s*["']([\w.:-]+)""", re.I
)
# A formula without its value, which no spreadsheet program has reckoned yet; an empty text is a value.
_FORMULA = re.compile(
    rb'<c\b(?![^>]*\bt="str")[^>]*>\s*(?:<f\b[^>]*/>|<f\b[^>]*>[^<]*</f>)\s*(?:<v\s*/>|<v>\s*</v>)?\s*</c>'
)


def html_sections(text: str, place: dict[str, Any] | None = None) -> list[Section]:
    """Return the sections of a page of HTML: its text, one block a line, cut at its headings."""
    try:
        from selectolax.lexbor import LexborHTMLParser
    except ImportError as exc:
        raise missing("reading HTML", "selectolax", exc) from exc
    tree = LexborHTMLParser(text)
    tree.strip_tags(list(_LEFT_OUT))
    headings, found = Headings(), []
    parts: list[str] = []
    block: int | None = None
    path: tuple[str, ...] = ()

    def end() -> None:
        joined = "\n".join(line for line in (" ".join(line.split()) for line in "".join(parts).split("\n")) if line)
        if joined:
            found.append(Section(joined, path, None, place or {}))
        parts.clear()

    root = tree.body or tree.root
    for node in root.traverse(include_text=True) if root is not None else ():
        tag = node.tag or ""
        if len(tag) == 2 and tag[0] == "h" and tag[1] in "123456":
            end()
            headings.enter(int(tag[1]), _title(node))
            path = headings.path
        elif tag == "-text":
            parent, depth = node.parent, 0
            preformatted = False
            while parent is not None and parent.tag in _INLINE and depth < _DEEPEST:
                parent, depth = parent.parent, depth + 1
            if parent is not None:
                preformatted = parent.tag == "pre"
            this = parent.mem_id if parent is not None else None
            if this != block:
                parts.append("\n")
                block = this
            parts.append(node.text(deep=False) if preformatted else " ".join(_spaced(node.text(deep=False))))
        elif tag == "br":
            parts.append("\n")
    end()
    return found


def _title(heading: Any) -> str:
    parts = (
        one.text(deep=False) if one.tag == "-text" else " "
        for one in heading.traverse(include_text=True)
        if one.tag in ("-text", "br")
    )
    return "".join(parts)


def _spaced(text: str) -> list[str]:
    """Return the words of a text; an empty one stands for white space at its ends."""
    words = text.split()
    if not words:
        return ["", ""] if text else []
    return [*([""] if text[0].isspace() else []), *words, *([""] if text[-1].isspace() else [])]


def read_html(data: bytes, text_column: str | None, limits: Limits) -> Converted:
    """Return the sections of a web page."""
    text, notes = _page_text(data)
    return Converted(html_sections(text), notes, [])


def _page_text(data: bytes) -> tuple[str, list[str]]:
    """Return a page as text, in the encoding that its head names."""
    named = _CHARSET.search(data[:_HEAD_BYTES])
    return decoded(data, (named[1] or named[2]).decode() if named else None)


def read_pdf(data: bytes, text_column: str | None, limits: Limits) -> Converted:
    """Return the sections of a PDF, one a page."""
    try:
        import pypdfium2
    except ImportError as exc:
        raise missing("reading PDF", "pypdfium2", exc) from exc
    try:
        document = pypdfium2.PdfDocument(data)
    except pypdfium2.PdfiumError as exc:
        if "password" in str(exc).lower():
            raise InvalidInputError("an encrypted PDF; save it without its password.") from exc
        raise InvalidInputError(f"no readable PDF ({exc}).") from exc
    count = len(document)
    if count > limits.pages:
        raise InvalidInputError(f"a PDF of {count} pages; at most {limits.pages} are read.")
    entries = _outline(document)
    found, empty, headings = [], 0, Headings()
    for number in range(count):
        for level, title in entries.get(number, []):
            headings.enter(level, title)
        page = document[number]
        text = page.get_textpage().get_text_bounded().replace("\r\n", "\n").replace("\ufffe", "")
        page.close()
        if text.strip():
            found.append(Section(text, headings.path, None, {"page": number + 1}))
        else:
            empty += 1
    if not found:
        raise InvalidInputError(f"a scanned PDF: none of its {count} pages has text; run it through OCR first.")
    return Converted(found, [f"{empty} of {count} pages have no text (scanned?)"] if empty else [], [])


def _outline(document: Any) -> dict[int, list[tuple[int, str]]]:
    """Return the (level, title) of bookmarks that begin on each page; a broken outline is none."""
    entries: dict[int, list[tuple[int, str]]] = {}
    try:
        for mark in document.get_toc(max_depth=6):
            target = mark.get_dest()
            if target is not None and (index := target.get_index()) is not None:
                entries.setdefault(index, []).append((mark.level + 1, mark.get_title()))
    except Exception:  # the text does not depend on it
        return {}
    return entries


def _check_zip(data: bytes, limits: Limits, what: str) -> zipfile.ZipFile:
    """Return the archive, whose files together are no larger than the limit."""
    if data.startswith(b"\xd0\xcf\x11\xe0"):
        raise InvalidInputError(f"an encrypted {what}, or one of before 2007; save it as {what} without a password.")
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as exc:
        raise InvalidInputError(f"no readable {what} ({exc}).") from exc
    total = sum(entry.file_size for entry in archive.infolist())
    if total > limits.bytes:
        raise InvalidInputError(f"{total} bytes when unpacked; at most {limits.bytes} are read.")
    return archive


def read_docx(data: bytes, text_column: str | None, limits: Limits) -> Converted:
    """Return the sections of a Word file."""
    try:
        import docx
        from docx.text.paragraph import Paragraph
    except ImportError as exc:
        raise missing("reading Word files", "python-docx", exc) from exc
    _check_zip(data, limits, ".docx")
    document = docx.Document(io.BytesIO(data))
    headings, found = Headings(), []
    path: tuple[str, ...] = ()
    parts: list[str] = []
    for block in word_xml.blocks(document.element.body):
        if word_xml.is_table(block):
            parts += word_xml.rows(block)
            continue
        text = word_xml.text_of(block)
        style = Paragraph(block, document).style
        level = _heading_level(style.name if style is not None else "")
        if level is not None and text.strip():
            if any(part.strip() for part in parts):
                found.append(Section("\n\n".join(parts), path))
            headings.enter(level, text)
            parts, path = [], headings.path
        if text.strip():
            parts.append(text)
    if any(part.strip() for part in parts):
        found.append(Section("\n\n".join(parts), path))
    return Converted(found, [], [])


def _heading_level(style: str) -> int | None:
    if style == "Title":
        return 0
    name, _, number = style.rpartition(" ")
    return int(number) if name in ("Heading", "标题") and number.isdecimal() else None


def read_pptx(data: bytes, text_column: str | None, limits: Limits) -> Converted:
    """Return the sections of slides."""
    try:
        import pptx
    except ImportError as exc:
        raise missing("reading slides", "python-pptx", exc) from exc
    _check_zip(data, limits, ".pptx")
    slides = pptx.Presentation(io.BytesIO(data)).slides
    if len(slides) > limits.pages:
        raise InvalidInputError(f"{len(slides)} slides; at most {limits.pages} are read.")
    found = []
    for number, slide in enumerate(slides, start=1):
        parts = list(_shape_texts(slide.shapes, depth=0))
        if slide.has_notes_slide and slide.notes_slide.notes_text_frame is not None:
            parts.append(slide.notes_slide.notes_text_frame.text)
        text = "\n".join(part for part in parts if part.strip())
        title = slide.shapes.title
        heading = (" ".join(title.text.split()),) if title is not None and title.text.strip() else ()
        if text:
            found.append(Section(text, heading, None, {"slide": number}))
    return Converted(found, [], [])


def _shape_texts(shapes: Any, *, depth: int) -> Iterator[str]:
    for shape in shapes:
        if getattr(shape, "shapes", None) is not None and depth < 20:
            yield from _shape_texts(shape.shapes, depth=depth + 1)
        elif shape.has_text_frame:
            yield shape.text_frame.text
        elif getattr(shape, "has_table", False):
            yield from (" | ".join(cell.text for cell in row.cells) for row in shape.table.rows)


def read_xlsx(data: bytes, text_column: str | None, limits: Limits) -> Converted:
    """Return the sections of a spreadsheet, one a row."""
    try:
        import openpyxl
    except ImportError as exc:
        raise missing("reading spreadsheets", "openpyxl", exc) from exc
    archive = _check_zip(data, limits, ".xlsx")
    book = openpyxl.load_workbook(io.BytesIO(data), read_only=True, data_only=True)
    found: list[Section] = []
    refusals = Refusals()
    for sheet in book.worksheets[: limits.pages]:
        name = str(sheet.title)

        def place(number: int, name: str = name) -> dict[str, Any]:
            return {"sheet": name, "row": number}

        rows = sheet_rows(sheet.iter_rows(values_only=True))
        found += row_sections(rows, refusals, text_column=text_column, heading=(name,), place=place)
    if not found and refusals.rows:
        raise InvalidInputError(refusals.rows[0][1])
    sheets = (name for name in archive.namelist() if name.startswith("xl/worksheets/") and name.endswith(".xml"))
    empty = sum(len(_FORMULA.findall(archive.read(name))) for name in sheets)
    notes = [f"formulas without a value: {empty}; save it in a spreadsheet program"] if empty else []
    return Converted(found, notes, refusals.rows, refusals.count)


def read_epub(data: bytes, text_column: str | None, limits: Limits) -> Converted:
    """Return the sections of a book."""
    from xml.etree import ElementTree

    archive = _check_zip(data, limits, ".epub")
    names = set(archive.namelist())
    if "META-INF/rights.xml" in names:
        raise InvalidInputError("an encrypted book (DRM); its text cannot be read.")
    try:
        container = ElementTree.fromstring(archive.read("META-INF/container.xml"))
        package = next(e.attrib["full-path"] for e in container.iter() if e.tag.endswith("rootfile"))
        root = ElementTree.fromstring(archive.read(package))
        items = {e.attrib["id"]: e.attrib["href"] for e in root.iter() if e.tag.endswith("}item")}
        spine = [items.get(e.attrib["idref"], "") for e in root.iter() if e.tag.endswith("itemref")]
    except (KeyError, StopIteration, ElementTree.ParseError, zipfile.BadZipFile) as exc:
        raise InvalidInputError(f"no readable EPUB ({type(exc).__name__}: {exc}).") from exc
    found: list[Section] = []
    lost = 0
    for number, href in enumerate(spine[: limits.pages], start=1):
        written = href.split("#")[0]
        places = (
            posixpath.normpath(posixpath.join(posixpath.dirname(package), one)) for one in (unquote(written), written)
        )
        name = next((one for one in places if one in names), None)
        if name is None:
            lost += 1
        else:
            found += html_sections(_page_text(archive.read(name))[0], {"chapter": number})
    return Converted(found, [f"chapters that are not in the book: {lost} of {len(spine)}"] if lost else [], [])
