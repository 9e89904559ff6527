"""Any real file becomes text with its place, or a sentence that says why not."""

from __future__ import annotations

import zipfile
from dataclasses import replace
from email.message import EmailMessage

import docx
import openpyxl
import pytest
from docx.oxml import parse_xml
from docx.oxml.ns import nsdecls

from qwen_rerank.errors import InvalidInputError
from qwen_rerank.folders.converters import KINDS, PLAIN, kind_of
from qwen_rerank.folders.encodings import decode
from qwen_rerank.folders.kinds import Limits
from qwen_rerank.folders.mail import read_mail
from qwen_rerank.folders.office import read_docx, read_epub, read_html, read_xlsx
from qwen_rerank.folders.worker import Converter
from tests.folders import files


@pytest.fixture(scope="module")
def converter():
    with Converter() as made:
        yield made


def convert(converter, path):
    data = path.read_bytes()
    return converter.convert(path, kind_of(path, data[:4096]), data)


@pytest.fixture(scope="module")
def office(tmp_path_factory):
    return {path.name: path for path in files.office(tmp_path_factory.mktemp("office"))}


@pytest.mark.parametrize("suffix", [".pdf", ".docx", ".pptx", ".xlsx", ".epub", ".ipynb", ".html"])
@pytest.mark.parametrize(("stem", "expected"), [("租约", files.ZH), ("lease", files.EN)])
def test_every_kind_gives_its_text_under_its_heading(converter, office, stem, expected, suffix):
    title, text = expected
    found = convert(converter, office[stem + suffix]).sections

    assert text in " ".join("\n".join(one.text for one in found).split("\n"))
    assert title in {name for one in found for name in one.heading}


def test_pages_slides_cells_and_rows_are_told(converter, office):
    places = {name: convert(converter, office[name]).sections[-1].place for name in office if name.startswith("lease")}

    assert places["lease.pdf"] == {"page": 1}
    assert places["lease.pptx"] == {"slide": 1}
    assert places["lease.ipynb"] == {"cell": 2}
    assert places["lease.epub"] == {"chapter": 1}
    assert places["lease.xlsx"] == {
        "fields": {"item": "garage", "note": "dry", "price": 80},
        "sheet": "Lease",
        "row": 4,
    }


def test_what_no_reader_sees_on_a_page_is_left_out(converter, office):
    text = "\n".join(one.text for one in convert(converter, office["lease.html"]).sections)

    assert [word for word in ("menu", "alert", "b{}") if word in text] == []
    assert text.endswith("a\nb")


def test_an_encrypted_and_a_scanned_pdf_are_named(converter, tmp_path):
    assert convert(converter, files.pdf(tmp_path / "half.pdf", ["a", ""])).notes == [
        "1 of 2 pages have no text (scanned?)"
    ]
    with pytest.raises(InvalidInputError, match="encrypted PDF"):
        convert(converter, files.pdf(tmp_path / "locked.pdf", ["a"], password="secret"))
    with pytest.raises(InvalidInputError, match="scanned PDF: none of its 2 pages"):
        convert(converter, files.pdf(tmp_path / "scan.pdf", ["", ""]))


def test_an_encrypted_word_file_and_a_broken_one_are_named(converter, tmp_path):
    for name, data, said in (
        ("a.docx", b"\xd0\xcf\x11\xe0\xa1\xb1", "encrypted .docx"),
        ("b.xlsx", b"PK", "no readable .xlsx"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InvalidInputError, match=said):
            convert(converter, tmp_path / name)


def test_what_grows_when_it_is_unpacked_is_refused(converter, tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.docx", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("word/document.xml", b" " * (Limits().bytes + 1))

    with pytest.raises(InvalidInputError, match="bytes when unpacked; at most"):
        convert(converter, tmp_path / "bomb.docx")


def test_too_many_pages_or_bytes_are_refused(tmp_path):
    path = files.pdf(tmp_path / "long.pdf", ["a"] * 3)
    kind = KINDS[".pdf"]

    with pytest.raises(InvalidInputError, match="a PDF of 3 pages; at most 2"):
        kind.convert(path.read_bytes(), None, replace(kind.limits, pages=2))
    with Converter() as converter, pytest.raises(InvalidInputError, match="at most 10 are read"):
        converter.convert(path, replace(kind, limits=replace(kind.limits, file_bytes=10)), path.read_bytes())


def test_a_file_that_takes_too_long_costs_itself_alone(office):
    with Converter(seconds=0.001) as converter:
        with pytest.raises(InvalidInputError, match=r"not read within 0\.001 seconds"):
            convert(converter, office["lease.pdf"])
        converter._seconds = None
        assert convert(converter, office["lease.pdf"]).sections


ZH = "A\n" + files.ZH[1]


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        *((ZH, name) for name in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "gb18030")),
        ("编号,名称,说明\n1,键盘,机械\n", "gb18030"),
        ("このアパートの契約は六月に終わります。カタカナ", "shift_jis"),
        ("Le café est fermé à Noël ; l'été prochain, nous rouvrirons.", "latin-1"),
        ("租約於六月結束，請提前一個月通知房東。", "big5"),
        ("Договор аренды заканчивается в июне.", "cp1251"),
        ("임대 계약은 6월에 끝납니다.", "euc_kr"),
    ],
)
def test_text_is_read_in_the_encoding_that_people_have(text, encoding):
    assert decode(text.encode(encoding))[0].lstrip("\ufeff") == text


@pytest.mark.parametrize(
    ("data", "text"),
    [
        pytest.param("日志记录".encode()[:-1], "日志记\ufffd", id="cut in a character"),
        pytest.param(
            "量子计算与信息检索。".encode() * 9 + b"\xe9\x87", "量子计算与信息检索。" * 9 + "\ufffd", id="long"
        ),
        pytest.param("Grüße, Köln. ".encode() * 9 + b"\xc3 und", "Grüße, Köln. " * 9 + "\ufffd und", id="a stray byte"),
        pytest.param(
            b"\xef\xbb\xbf\xc3\xbc" * 1 + "ü".encode() * 20 + b"\xff", "\ufeff" + "ü" * 21 + "\ufffd", id="BOM"
        ),
    ],
)
def test_a_broken_byte_makes_no_other_encoding_of_utf_8(data, text):
    assert decode(data) == (text, "utf-8, broken characters: 1")


@pytest.mark.parametrize(
    ("text", "encoding", "declared"),
    [
        ("Привет мир, это проверка.", "koi8-r", '<meta charset="koi8-r">'),
        ("Şırnak ilinde güneşli gün, ığdır.", "cp1254", '<meta http-equiv=x content="text/html; charset=iso-8859-9">'),
        ("مرحبا بالعالم هذه صفحة اختبار", "cp1256", "<?xml version='1.0' encoding='windows-1256'?>"),
        ("租约于六月结束。", "gb18030", "<meta charset=gb2312>"),
        ("Ein Café in Köln", "utf-8", "<meta charset=iso-8859-1>"),
        ("Ein Café in Köln", "cp1252", "<meta charset=rot13>"),
    ],
)
def test_a_page_is_read_in_the_encoding_that_it_names_unless_it_is_unicode(text, encoding, declared):
    (section,) = read_html(f"{declared}<p>{text}".encode(encoding), None, Limits()).sections

    assert section.text == text


def test_a_heading_of_two_lines_is_two_words():
    (section,) = read_html(b"<h1>Foo<br>B<b>a</b>r</h1><h2>Sub</h2>x", None, Limits()).sections[1:]

    assert section.heading == ("Foo Bar", "Sub")


def test_a_word_file_is_read_as_it_is_once_its_changes_are_accepted(tmp_path):
    document = docx.Document()
    paragraph = document.add_paragraph("kept")
    for change in (
        "<w:ins {}><w:r><w:tab/><w:t>inserted</w:t></w:r></w:ins>",
        "<w:del {}><w:r><w:delText>deleted</w:delText></w:r></w:del>",
        "<w:moveFrom {}><w:r><w:t>moved</w:t></w:r></w:moveFrom>",
    ):
        paragraph._p.append(parse_xml(change.format(nsdecls("w"))))
    control = "<w:sdt {}><w:sdtContent><w:p><w:r><w:t>control</w:t></w:r></w:p></w:sdtContent></w:sdt>"
    paragraph._p.addnext(parse_xml(control.format(nsdecls("w"))))
    table = document.add_table(2, 4)
    for cell, text in zip(table._cells, ["year", "", "5", "5", "", "sum", "", "7"], strict=True):
        cell.text = text
    table.cell(0, 0).merge(table.cell(1, 0))
    table.cell(1, 1).merge(table.cell(1, 2))
    table.cell(1, 3).add_table(1, 1).cell(0, 0).text = "inner"
    document.save(tmp_path / "a.docx")

    (section,) = read_docx((tmp_path / "a.docx").read_bytes(), None, Limits()).sections
    assert section.text.split("\n\n") == ["kept\tinserted", "control", "year |  | 5 | 5", "year | sum | 7\ninner"]


@pytest.mark.parametrize(
    ("body", "charset", "subtype", "encoding"),
    [("Schöne Grüße", "utf-8", "plain", []), ("<p>Schöne <b>Grüße", "latin-1", "html", ["cp1252"])],
)
def test_a_mail_is_read_as_its_reader_sees_it(body, charset, subtype, encoding):
    mail = EmailMessage()
    mail["From"], mail["Subject"] = "Ann <ann@example.org>", "Grüße aus Köln"
    mail.set_content(body, subtype=subtype, charset=charset, cte="base64")
    mail.add_attachment(b"x", maintype="image", subtype="png", filename="a.png")

    found = read_mail(mail.as_bytes(), None, Limits())
    assert [one.text for one in found.sections] == [
        "From: Ann <ann@example.org>\nSubject: Grüße aus Köln\n\nSchöne Grüße"
    ]
    assert (found.sections[0].heading, found.notes) == (
        ("Grüße aus Köln",),
        [*encoding, "attachments that are not read: 1"],
    )


def test_every_chapter_of_a_book_is_found_or_counted(tmp_path):
    with zipfile.ZipFile(files.book(tmp_path / "a.epub", *files.EN), "a") as archive:
        archive.writestr("OPS/pkg/b 2.xhtml", "<p>two")
        archive.writestr("Text/c.xhtml", "<p>three")
        archive.writestr("META-INF/container.xml", archive.read("META-INF/container.xml").replace(b"OPS/", b"OPS/pkg/"))
        hrefs = ("../a.xhtml", "b%202.xhtml", "../../Text/c.xhtml#top", "lost.xhtml")
        items = "".join(f'<item id="{n}" href="{href}"/>' for n, href in enumerate(hrefs))
        spine = "".join(f'<itemref idref="{n}"/>' for n in range(len(hrefs)))
        archive.writestr(
            "OPS/pkg/book.opf",
            f'<package xmlns="http://www.idpf.org/2007/opf"><manifest>{items}</manifest><spine>{spine}</spine></package>',
        )

    found = read_epub((tmp_path / "a.epub").read_bytes(), None, Limits())
    assert [one.text for one in found.sections][1:] == ["two", "three"]
    assert found.notes == ["chapters that are not in the book: 1 of 4"]


def test_formulas_without_a_value_are_counted(tmp_path):
    book = openpyxl.Workbook()
    for row in (["a", "total"], [1, "=A2*2"], [2, "=A3*2"]):
        book.active.append(row)
    book.save(tmp_path / "a.xlsx")

    found = read_xlsx((tmp_path / "a.xlsx").read_bytes(), None, Limits())
    assert found.notes == ["formulas without a value: 2; save it in a spreadsheet program"]


def test_a_file_without_a_known_suffix_is_read_where_it_is_text(tmp_path):
    assert kind_of(tmp_path / "LICENSE", b"Apache License") is PLAIN
    assert kind_of(tmp_path / "notes.log", "日志".encode()[:4]) is PLAIN
    assert kind_of(tmp_path / "picture.png", b"\x89PNG\r\n\x1a\n\0\0") is None
    assert kind_of(tmp_path / "x.bin", bytes(range(256))) is None


@pytest.mark.parametrize(
    ("name", "text", "headings"),
    [
        ("a.md", "# A\na\n```\n# no\n```\n## B\nb\n# C #\nc", [("A",), ("A", "B"), ("C",)]),
        ("b.md", "before\n\nTitle\n=====\ntext\n\nSub\n---\nx", [(), ("Title",), ("Title", "Sub")]),
        (
            "c.rst",
            "=====\nTitle\n=====\n\nSub\n---\nx\n\nSub 2\n-----\ny",
            [("Title",), ("Title", "Sub"), ("Title", "Sub 2")],
        ),
        ("d.py", "import a\n\n@deco\ndef f():\n    pass\n\n\nclass B:\n    x = 1\n", [(), ("f",), ("B",)]),
        ("f.md", "# A\na\x0cb\u2028c\n# B\nd", [("A",), ("B",)]),
        ("e.go", "package a\n\nfunc Run() {}\n", [(), ("Run",)]),
    ],
)
def test_headings_are_found(converter, tmp_path, name, text, headings):
    (tmp_path / name).write_text(text, encoding="utf-8")

    found = convert(converter, tmp_path / name).sections
    assert [one.heading for one in found] == headings
    lines = text.split("\n")
    assert all(one.text.split("\n")[0] == lines[(one.line or 0) - 1] for one in found)
