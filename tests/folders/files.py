"""Files of every kind, made here: small, in English and in Chinese."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

import docx
import openpyxl
import pptx
from reportlab.lib.pagesizes import A5
from reportlab.pdfbase import pdfmetrics
from reportlab.pdfbase.cidfonts import UnicodeCIDFont
from reportlab.pdfgen import canvas

ZH = ("租约", "租约于六月三十日结束，租客须提前一个月通知房东。")
EN = ("Lease", "The lease ends on 30 June; the tenant tells the landlord a month before.")

_CONTAINER = (
    '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
    '<rootfile full-path="OPS/book.opf"/></rootfiles></container>'
)


def pdf(path: Path, pages: Sequence[str], *, password: str | None = None, titles: Sequence[str] = ()) -> Path:
    """Write a PDF; an empty page is a drawing without text, as a scanner makes it."""
    pdfmetrics.registerFont(UnicodeCIDFont("STSong-Light"))
    sheet = canvas.Canvas(str(path), pagesize=A5, encrypt=password)
    for number, text in enumerate(pages):
        if number < len(titles):
            sheet.bookmarkPage(f"p{number}")
            sheet.addOutlineEntry(titles[number], f"p{number}", level=0)
        sheet.setFont("STSong-Light", 10)
        sheet.rect(20, 20, 50, 50, fill=1)
        for row, line in enumerate(text.splitlines()):
            sheet.drawString(30, 550 - 14 * row, line)
        sheet.showPage()
    sheet.save()
    return path


def word(path: Path, title: str, text: str) -> Path:
    document = docx.Document()
    document.add_heading(title, level=1)
    document.add_paragraph(text)
    table = document.add_table(rows=1, cols=2)
    table.rows[0].cells[0].text, table.rows[0].cells[1].text = "rent", "900"
    document.save(str(path))
    return path


def slides(path: Path, title: str, text: str) -> Path:
    show = pptx.Presentation()
    slide = show.slides.add_slide(show.slide_layouts[1])
    slide.shapes.title.text, slide.placeholders[1].text = title, text
    slide.notes_slide.notes_text_frame.text = "said aloud"
    show.save(str(path))
    return path


def sheet(path: Path, title: str, text: str) -> Path:
    book = openpyxl.Workbook()
    book.active.title = title
    for row in (["item", "note", "price"], ["flat", text, 900], [None, None, None], ["garage", "dry", 80]):
        book.active.append(row)
    book.save(path)
    return path


def book(path: Path, title: str, text: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("mimetype", "application/epub+zip")
        archive.writestr("META-INF/container.xml", _CONTAINER)
        archive.writestr(
            "OPS/book.opf",
            '<package xmlns="http://www.idpf.org/2007/opf"><manifest><item id="a" href="a.xhtml"/></manifest>'
            '<spine><itemref idref="a"/></spine></package>',
        )
        page = f"<html><head><title>no</title></head><body><h1>{title}</h1><p>{text}</p></body></html>"
        archive.writestr("OPS/a.xhtml", page.encode())
    return path


def notebook(path: Path, title: str, text: str) -> Path:
    cells = [
        {"cell_type": "markdown", "source": [f"# {title}\n", text], "metadata": {}},
        {"cell_type": "code", "source": "print('rent')", "metadata": {}, "outputs": [], "execution_count": None},
    ]
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}), encoding="utf-8")
    return path


def page(path: Path, title: str, text: str) -> Path:
    path.write_text(
        f"<html><head><style>b{{}}</style></head><body><nav>menu</nav><h1>{title}</h1><p>{text[:9]}<b>{text[9:]}</b></p>"
        "<script>alert(1)</script><pre>a\n  b</pre></body></html>",
        encoding="utf-8",
    )
    return path


def office(folder: Path) -> list[Path]:
    """Write a PDF, Word, slides, spreadsheet, book, notebook and web page in both languages; return them."""
    made = []
    for language, (title, text) in {"zh": ZH, "en": EN}.items():
        stem = folder / ("租约" if language == "zh" else "lease")
        made.append(pdf(stem.with_suffix(".pdf"), [text, ""], titles=[title]))
        for suffix, write in {
            ".docx": word, ".pptx": slides, ".xlsx": sheet, ".epub": book, ".ipynb": notebook, ".html": page,
        }.items():  # fmt: skip
            made.append(write(stem.with_suffix(suffix), title, text))
    return made
