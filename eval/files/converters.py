"""Converters of office files, compared on ten files: size of the installation, seconds, and how much of the text comes out.

    python -m eval.files.converters build/converters      # a virtual environment below it for each tool; writes the table

The environments are made by hand, `python -m venv build/converters/markitdown` and so on, with the packages that `INSTALLED`
names; one that is not there is left out of the table. Two files are real: a specification as PDF, whose published HTML is the
reference, and one of its pages. Eight are made here, in Chinese and English, so that their text is known. Recall is the share of
the reference's runs of three words (of Chinese, characters) that a tool's output has.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from html import unescape
from pathlib import Path

from eval.speed.measure import hardware
from tests.folders import files

HERE = Path(__file__).parent
SPECIFICATION = Path("/usr/share/doc/shared-mime-info")  # Debian's package shared-mime-info
INSTALLED = {
    "ours": "pypdfium2 python-docx python-pptx openpyxl selectolax charset-normalizer pathspec",
    "markitdown": "markitdown[pdf,docx,pptx,xlsx]",
    "kreuzberg": "kreuzberg",
    "docling": "docling",
}
# Runs in the tool's own environment: loads the tool once, converts each file, and tells seconds and text.
WORKER = r"""
import json, sys, time
from pathlib import Path
tool, *paths = sys.argv[1:]
begin = time.perf_counter()
if tool == "ours":
    from qwen_rerank.folders.converters import kind_of
    def convert(path):
        data = Path(path).read_bytes()
        kind = kind_of(Path(path), data[:4096])
        return "\n".join("\n".join(s.heading) + "\n" + s.text for s in kind.convert(data, None, kind.limits).sections)
elif tool == "markitdown":
    from markitdown import MarkItDown
    made = MarkItDown()
    convert = lambda path: made.convert(path).text_content
elif tool == "kreuzberg":
    import kreuzberg
    def convert(path):
        try:
            return kreuzberg.extract_file_sync(path).content
        except AttributeError:
            import asyncio
            return asyncio.run(kreuzberg.extract_file(path)).content
elif tool == "docling":
    from docling.document_converter import DocumentConverter
    made = DocumentConverter()
    convert = lambda path: made.convert(path).document.export_to_markdown()
result = {"load_s": time.perf_counter() - begin}
for path in paths:
    begin = time.perf_counter()
    try:
        text, error = convert(path), None
    except Exception as exc:
        text, error = "", f"{type(exc).__name__}: {str(exc)[:150]}"
    result[path] = {"s": time.perf_counter() - begin, "text": text, "error": error}
Path("answer.json").write_text(json.dumps(result), encoding="utf-8")
"""


def make(folder: Path) -> dict[Path, str]:
    """Return ten files with the text that each should give."""
    pages = sorted((SPECIFICATION / "shared-mime-info-spec.html").glob("*.html"))
    largest = max(pages, key=lambda path: path.stat().st_size)
    made = {
        SPECIFICATION / "shared-mime-info-spec.pdf": " ".join(map(of_html, pages)),
        largest: of_html(largest),
    }
    expected = {".docx": "rent 900", ".pptx": "said aloud", ".xlsx": "garage dry 80"}
    for path in files.office(folder):
        title, text = files.ZH if path.stem == "租约" else files.EN
        chinese = {".pdf", ".docx", ".pptx", ".xlsx", ".epub"}
        if path.suffix in (chinese if path.stem == "租约" else {".docx", ".pptx", ".xlsx"}):
            made[path] = f"{title} {text} {expected.get(path.suffix, '')}"
    return made


def of_html(path: Path) -> str:
    """Return the text of a page, by a rule that none of the tools uses."""
    text = path.read_text(encoding="utf-8", errors="replace")
    body = re.sub(r"(?s)<(script|style|head)\b.*?</\1>", " ", text)
    return unescape(re.sub(r"<[^>]+>", " ", body))


def runs(text: str) -> set[tuple[str, ...]]:
    """Return the runs of three words, of Chinese three characters."""
    words = re.findall(r"[\u4e00-\u9fff]|[^\W_]+", text.lower())
    return set(zip(words, words[1:], words[2:], strict=False))


def recall(text: str, reference: str) -> float:
    """Return the share of the reference's runs that a text has."""
    wanted = runs(reference)
    return len(wanted & runs(text)) / len(wanted)


def measure(tool: str, environment: Path, wanted: dict[Path, str]) -> dict[str, object]:
    """Return what one tool gave."""
    own = {**os.environ, "PYTHONPATH": str(HERE.parents[1] / "src") if tool == "ours" else ""}
    python = environment / "bin" / "python"
    runner = Path(sys.executable) if tool == "ours" else python.absolute()  # ours also imports the package around it
    with tempfile.TemporaryDirectory() as folder:
        command = [runner, "-c", WORKER, tool, *map(str, wanted)]
        done = subprocess.run(command, env=own, cwd=folder, capture_output=True, text=True, timeout=900)
        if done.returncode:
            return {"failed": done.stderr.strip().splitlines()[-1][:200]}
        answer = json.loads(Path(folder, "answer.json").read_text(encoding="utf-8"))
    size = sum(path.lstat().st_size for path in environment.rglob("*") if not path.is_symlink())
    listed = subprocess.run([python, "-m", "pip", "list", "--format", "json"], capture_output=True, text=True)
    packages = {row["name"]: row["version"] for row in json.loads(listed.stdout)}
    rows = {
        path.name: {
            "s": round(answer[str(path)]["s"], 3),
            "recall": round(recall(answer[str(path)]["text"], reference), 3),
            "error": answer[str(path)]["error"],
        }
        for path, reference in wanted.items()
    }
    main = {name: packages[name] for name in re.findall(r"[\w-]+(?=\[|\s|$)", INSTALLED[tool]) if name in packages}
    return {
        "install_mb": round(size / 1e6),
        "packages": len(packages),
        "versions": main,
        "load_s": round(answer["load_s"], 2),
        "files": rows,
    }


def page(result: dict[str, dict[str, object]]) -> str:
    """Return the table."""
    tools = {name: one for name, one in result.items() if name != "hardware"}
    good = {name: one for name, one in tools.items() if "failed" not in one}
    names = list(next(iter(good.values()))["files"])  # type: ignore[call-overload]
    lines = [
        "# Converters compared on ten files",
        "",
        "Drawn by `python -m eval.files.converters`; the same figures are in converters.json. Recall of the text (1 is all of it), and",
        "seconds, on a machine that did other work too. The environment's size has pip and setuptools in it.",
        "",
        f"| | {' | '.join(good)} |",
        f"|---|{'---|' * len(good)}",
        f"| installed, MB | {' | '.join(str(one['install_mb']) for one in good.values())} |",
        f"| packages | {' | '.join(str(one['packages']) for one in good.values())} |",
        f"| import, s | {' | '.join(str(one['load_s']) for one in good.values())} |",
    ]
    for name in names:
        cells = []
        for one in good.values():
            row = one["files"][name]  # type: ignore[index]
            cells.append(
                f"failed: {row['error'].split(':')[0]}" if row["error"] else f"{row['recall']:.2f}, {row['s']:.2f} s"
            )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    versions = "; ".join(f"{name}: {json.dumps(one['versions'])}" for name, one in good.items())
    failed = [f"{name} did not run: {one['failed']}" for name, one in tools.items() if "failed" in one]
    missing = [f"{name} is not in this table: it was not run." for name in INSTALLED if name not in tools]
    return "\n".join([*lines, "", f"Versions: {versions}.", *failed, *missing, ""])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every tool that is installed and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("environments", type=Path)
    given = parser.parse_args(arguments)
    result: dict[str, object] = {"hardware": hardware("cpu")}
    with tempfile.TemporaryDirectory() as folder:
        wanted = make(Path(folder))
        for tool in INSTALLED:
            if (given.environments / tool / "bin" / "python").exists():
                result[tool] = measure(tool, given.environments / tool, wanted)
                print(tool, result[tool], file=sys.stderr)
    (HERE / "converters.json").write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    (HERE / "converters.md").write_text(page(result), encoding="utf-8")


if __name__ == "__main__":
    main()
