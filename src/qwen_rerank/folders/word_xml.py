"""The text in the XML of Word: what a reader sees once all changes are accepted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_W = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"
# Around paragraphs, rows, cells and runs: content controls, insertions and where something was moved to.
_WRAPPERS = frozenset(_W + name for name in ("sdt", "sdtContent", "ins", "moveTo", "customXml", "smartTag"))
_UNSEEN = frozenset(
    [
        *(_W + name for name in ("del", "moveFrom", "pPr", "rPr", "rt")),
        "{http://schemas.openxmlformats.org/markup-compatibility/2006}Fallback",  # a text box once more
    ]
)
_MARKS = {_W + "tab": "\t", _W + "ptab": "\t", _W + "cr": "\n", _W + "noBreakHyphen": "-"}


def blocks(element: Any) -> Iterator[Any]:
    """Yield the paragraphs and tables of a body or a cell; a table of contents is none."""
    yield from _children(element, "p", "tbl")


def is_table(block: Any) -> bool:
    """Return whether a block is a table."""
    return bool(block.tag == _W + "tbl")


def _children(element: Any, *names: str) -> Iterator[Any]:
    tags = {_W + name for name in names}
    for child in element:
        if child.tag in tags:
            yield child
        elif child.tag in _WRAPPERS and not _is_contents(child):
            yield from _children(child, *names)


def _is_contents(control: Any) -> bool:
    gallery = control.find(f"{_W}sdtPr/{_W}docPartObj/{_W}docPartGallery")
    return gallery is not None and gallery.get(_W + "val") == "Table of Contents"


def text_of(paragraph: Any) -> str:
    """Return the text of a paragraph, with the text boxes in it."""
    return "".join(_texts(paragraph)).strip("\n")


def _texts(element: Any) -> Iterator[str]:
    for child in element:
        if child.tag == _W + "t":
            yield child.text or ""
        elif child.tag == _W + "br":
            yield "\n" if child.get(_W + "type", "textWrapping") == "textWrapping" else ""
        elif child.tag in _MARKS:
            yield _MARKS[child.tag]
        elif child.tag == _W + "p":
            yield "\n"
            yield from _texts(child)
            yield "\n"
        elif child.tag not in _UNSEEN:
            yield from _texts(child)


def rows(table: Any) -> Iterator[str]:
    """Yield each row of a table; a cell that is merged with the one above stands in every row that it reaches."""
    above: dict[int, str] = {}  # first column of a cell to its text
    for row in _children(table, "tr"):
        cells = []
        column = _number(row, "trPr/gridBefore", 0)
        for cell in _children(row, "tc"):
            merge = cell.find(f"{_W}tcPr/{_W}vMerge")
            if merge is None or merge.get(_W + "val", "continue") != "continue":
                above[column] = _cell(cell)
            cells.append(above.get(column, ""))
            column += _number(cell, "tcPr/gridSpan", 1)
        if any(cells):
            yield " | ".join(cells)


def _cell(cell: Any) -> str:
    found: list[str] = []
    for block in blocks(cell):
        found += rows(block) if is_table(block) else [text_of(block)]
    return "\n".join(found).strip()


def _number(element: Any, path: str, otherwise: int) -> int:
    found = element.find("/".join(_W + part for part in path.split("/")))
    value = "" if found is None else found.get(_W + "val", "")
    return int(value) if value.isdecimal() else otherwise
