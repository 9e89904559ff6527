"""Pieces of pages that nobody types: drawn from the code, the committed results, and files that the package ships.

A page asks for one by a line of its own, `<!-- draw: NAME ARGUMENT -->`; what is drawn is in `PIECES`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import json
import re
import runpy
from collections.abc import Callable, Iterator
from html import escape
from typing import Any

from docs.tree import ROOT, subject

# What the program says in English, in Chinese: commands, errors, settings and metrics by name, options by their words.
_CHINESE: dict[str, dict[str, str]] = json.loads((ROOT / "docs" / "chinese.json").read_text(encoding="utf-8"))
_MARK = re.compile(r"^<!-- draw: (\w+)(?: (\S+))? -->$", re.MULTILINE)
_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)]+)\)")

_WORDS: dict[str, Any] = {
    "en": {
        "option": "option",
        "default": "default",
        "meaning": "what it does",
        "arguments": "arguments",
        "error": "error",
        "said": "what it says",
        "setting": "setting",
        "metric": "metric",
        "kind": "kind",
        "help": "cure",
        "files": ["file", "what it is"],
        "open": "the code",
    },
    "zh": {
        "option": "选项",
        "default": "默认值",
        "meaning": "作用",
        "arguments": "参数",
        "error": "错误",
        "said": "含义",
        "setting": "设置",
        "metric": "指标",
        "kind": "类型",
        "help": "怎么办",
        "files": ["文件", "是什么"],
        "open": "代码",
    },
}


def drawn(text: str, language: str) -> str:
    """Return a page with all pieces in their places; an unknown one is an error."""
    return _MARK.sub(lambda mark: PIECES[mark[1]](language, *filter(None, [mark[2]])), text)


def included(path: str, *, deeper: int = 1) -> str:
    """Return a Markdown file of the repository as part of a page: without its title, its headings `deeper` levels down.

    Links to files of the repository become their paths, since the site does not hold them; pictures beside it are copied.
    """
    folder = path.rpartition("/")[0]
    text = re.sub(r"\A# .*\n+", "", (ROOT / path).read_text(encoding="utf-8"))
    text = re.sub(r"^(#+ )", "#" * deeper + r"\1", text, flags=re.MULTILINE)

    def again(link: re.Match[str]) -> str:
        if link[1]:
            return f"![{link[2]}](PICTURES/{link[3].rpartition('/')[2]})"
        return f"{link[2]} (`{folder}/{link[3]}`)" if link[2] != link[3] else f"`{link[3]}`"

    return _LINK.sub(again, text)


def said(language: str, kind: str, name: str, english: str) -> str:
    """Return what the program says of something, in the page's language; what nobody has translated stays English."""
    return _CHINESE[kind].get(name, english) if language == "zh" else english


def table(heads: list[str], rows: Iterator[list[str]] | list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in lines)


def changelog(language: str) -> str:
    """Return the changelog."""
    return included("CHANGELOG.md", deeper=0)


def file(language: str, path: str) -> str:
    """Return any Markdown file of the repository; on a Chinese page its own Chinese section comes first."""
    text = included(path)
    if language == "en":
        return text
    english, _, chinese = text.partition("\n### 中文\n")
    return f"{chinese.strip()}\n\n（以下是英文原文。）\n\n{english}".strip()


def printed(language: str, name: str) -> str:
    """Return what a command printed, as a script of `eval` wrote it down for each language."""
    return f"```text\n{(ROOT / f'eval/results/{name}.{language}.txt').read_text(encoding='utf-8')}```"


def code_tree(language: str) -> str:
    """Return every file of the package with its line, a table for each folder."""
    package, parts = ROOT / "src" / "qwen_rerank", []
    folders = {path.parent for path in package.rglob("*.py")}
    for folder in sorted(folders, key=lambda f: (f != package, f)):
        rows = [[f"`{path.name}`", escape(subject(path), quote=False)] for path in sorted(folder.glob("*.py"))]
        parts.append(_folder(folder.relative_to(ROOT).as_posix(), rows, language))
    rows = [
        [f"`{path.relative_to(ROOT).as_posix()}`", escape(subject(path), quote=False)]
        for path in sorted((ROOT / "eval").rglob("*.py"))
    ]
    return "\n\n".join([*parts, _folder("eval", rows, language)])


def _folder(name: str, rows: list[list[str]], language: str) -> str:
    return f"### {name}\n\n{said(language, 'folders', name, '')}\n\n{table(_WORDS[language]['files'], rows)}"


def clients(language: str) -> str:
    """Return the clients that were tried against the server."""
    from tests.clients.catalogue import table

    return table(language)


def servers(language: str) -> str:
    """Return the real servers that the client and the check were tried on."""
    from tests.clients.catalogue import server_table

    return server_table(language)


def troubleshooting(language: str) -> str:
    """Return the page behind `qwen-rerank help`, one heading a topic."""
    from qwen_rerank.help import sections

    parts = []
    for topic, body in sections(language).items():
        first, _, rest = body.partition("\n")
        parts.append(f"## {first.strip('*').rstrip('.。')} {{#{topic}}}\n\n`qwen-rerank help {topic}`\n{rest}")
    start = {"en": "Start", "zh": "开始"}[language]
    return "\n\n".join(parts).replace(f"`docs/{language}/start.md`", f"[{start}](../start.md#in-china)")


def cli(language: str) -> str:
    """Return every command with its arguments and options, as the command line itself declares them."""
    import typer

    from qwen_rerank.cli import app

    return "\n\n".join(_commands(typer.main.get_command(app), "qwen-rerank", language))


def _commands(command: Any, name: str, language: str) -> Iterator[str]:
    subcommands = getattr(command, "commands", {})
    if not subcommands:
        yield _command(command, name, language)
    for word, sub in subcommands.items():
        if not sub.hidden:
            yield from _commands(sub, f"{name} {word}", language)


def _command(command: Any, name: str, language: str) -> str:
    words = _WORDS[language]
    shown = [p for p in command.params if not getattr(p, "hidden", False) and "--help" not in p.opts]
    arguments = [p for p in shown if p.param_type_name == "argument"]
    options = [p for p in shown if p.param_type_name == "option"]
    usage = " ".join([name, *(_metavar(p) for p in arguments), *(["[OPTIONS]"] if options else [])])
    own = name.removeprefix("qwen-rerank ")
    meant = said(language, "commands", own, inspect.cleandoc(command.help or ""))
    parts = [f"## {name} {{#{own.replace(' ', '-')}}}", meant]
    parts.append(f"```text\n{usage}\n```")
    if arguments:
        rows = [[f"`{_metavar(p)}`", _meaning(p, language)] for p in arguments]
        parts.append(table([words["arguments"], words["meaning"]], rows))
    if options:
        rows = [[_option(p), _default(p), _meaning(p, language)] for p in options]
        parts.append(table([words["option"], words["default"], words["meaning"]], rows))
    return "\n\n".join(parts)


def _meaning(parameter: Any, language: str) -> str:
    text = getattr(parameter, "help", None) or ""
    return said(language, "options", text, text)


def _metavar(parameter: Any) -> str:
    name = parameter.name.upper().strip("_") + ("…" if parameter.nargs == -1 or parameter.multiple else "")
    return name if parameter.required else f"[{name}]"


def _option(parameter: Any) -> str:
    names = [*reversed(parameter.opts), *parameter.secondary_opts]
    return ", ".join(f"`{name}`" for name in sorted(names, key=lambda n: (n in parameter.secondary_opts, len(n) > 2)))


def _default(parameter: Any) -> str:
    value = parameter.default
    if value is None or value is False or callable(value) or value == () or "Sentinel" in type(value).__name__:
        return ""
    return f"`{' '.join(map(str, value)) if isinstance(value, list | tuple) else value}`"


def settings(language: str) -> str:
    """Return the server's settings with their defaults."""
    from qwen_rerank.serve.settings import ServeSettings

    words, meanings = _WORDS[language], _attributes(ServeSettings)
    rows = [
        [f"`{f.name}`", f"`{f.default!r}`", said(language, "settings", f.name, meanings[f.name])]
        for f in dataclasses.fields(ServeSettings)
    ]
    return table([words["setting"], words["default"], words["meaning"]], rows)


def _attributes(cls: type) -> dict[str, str]:
    """Return what the docstring says of each attribute."""
    block = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")[2]
    found = re.findall(r"^    (\w+): (.*(?:\n        .*)*)", block, re.MULTILINE)
    return {name: re.sub(r"\s+", " ", text) for name, text in found}


def metrics(language: str) -> str:
    """Return every counter of a running server, as its own page describes it."""
    words = _WORDS[language]
    text = asyncio.run(_metrics_page())
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    helps = re.findall(r"^# HELP (\S+) (.*)$", text, re.MULTILINE)
    rows = [
        [f"`{name}`", kinds[name], said(language, "metrics", name, meaning)]
        for name, meaning in helps
        if not name.endswith("_created")
    ]
    return table([words["metric"], words["kind"], words["meaning"]], rows)


async def _metrics_page() -> str:
    import httpx2

    from qwen_rerank.serve.app import create_app
    from qwen_rerank.testing import OverlapScorer

    app = create_app(OverlapScorer())
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://server") as client:
        return (await client.get("/metrics")).text


def errors(language: str) -> str:
    """Return every error with what it says and the section that helps."""
    from qwen_rerank import errors as base
    from qwen_rerank.store import errors as store

    words = _WORDS[language]
    rows = []
    for module in (base, store):
        for name, cls in vars(module).items():
            if inspect.isclass(cls) and issubclass(cls, base.RerankError) and cls.__module__ == module.__name__:
                cure = f"[{cls.topic}](troubleshooting.md#{cls.topic})" if cls.topic else ""
                meant = inspect.cleandoc(cls.__doc__ or "").split("\n")[0]
                rows.append([f"`{name}`", said(language, "errors", name, meant), cure])
    return table([words["error"], words["said"], words["help"]], rows)


def published(language: str) -> str:
    """Return the authors' table."""
    return _without_links(_figures()["published"](language))


def speed(language: str) -> str:
    """Return the picture of speed, light or dark as the page is, and its sentence."""
    text = _figures()["speed"](language)
    sentence = text.partition("</picture>\n\n")[2]
    pictures = [
        f"![{escape(_figures()['UNITS'][language])}](PICTURES/speed.{language}.{scheme}.svg#only-{scheme})"
        for scheme in ("light", "dark")
    ]
    return f"{''.join(pictures)}\n\n{_without_links(sentence)}"


_FOLDER_COSTS = {
    "en": {
        "index": "Measured with `mini` on {threads} cores of an {cpu}: {passages:,} passages are indexed in {minutes:.0f} minutes, {rate:.0f} a second, "
        "with {memory:.1f} GB of memory at most.",
        "search": "In a store of {documents:,} passages half of {queries} questions were answered within {p50_s:.2f} s and all within {max_s:.2f} s once the "
        "models were loaded, `mini` reading {depth} candidates of each (figures: `eval/files/README.md`).",
    },
    "zh": {
        "index": "实测（`mini`，{cpu} 的 {threads} 个核）：{passages:,} 段建库用 {minutes:.0f} 分钟，每秒 {rate:.0f} 段，内存最多 {memory:.1f} GB。",
        "search": "库里有 {documents:,} 段、模型已加载时，让 `mini` 读 {depth} 个候选：{queries} 个问题有一半在 {p50_s:.2f} 秒内答出，最慢 {max_s:.2f} 秒"
        "（数据见 `eval/files/README.md`）。",
    },
}


def folder_costs(language: str) -> str:
    """Return what it takes to index ten thousand passages of files, where that was measured, and to search them."""
    found = json.loads((ROOT / "eval" / "files" / "folder.json").read_text(encoding="utf-8"))
    said = []
    for step in ("index", "search"):
        if one := found.get(step):
            rates = (
                {"rate": one["passages"] / one["seconds"], "minutes": one["seconds"] / 60} if "seconds" in one else {}
            )
            facts = {**one, **one["hardware"], **rates, "memory": one["peak_mb"] / 1000}
            said.append(_FOLDER_COSTS[language][step].format(**facts))
    return ("" if language == "zh" else " ").join(said)


def _figures() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "eval" / "readme.py"))


def _without_links(text: str) -> str:
    return _LINK.sub(lambda link: f"{link[2]}: `{link[3]}`", text)


def examples(language: str) -> str:
    """Return every example: what it is for, what it prints, and its code to copy."""
    parts = []
    for path in sorted((ROOT / "examples").glob("*.py")):
        code = path.read_text(encoding="utf-8").rstrip()
        title = said(language, "examples", path.stem, code.removeprefix('"""').partition("\n")[0])
        listing = "\n".join(f"    {line}" if line else "" for line in code.splitlines())
        parts.append(
            f"### {path.stem} {{#{path.stem}}}\n\n{title}\n\n![{path.stem}](PICTURES/{path.stem}.svg)\n\n"
            f'??? note "{_WORDS[language]["open"]}: examples/{path.name}"\n\n    ```python\n{listing}\n    ```'
        )
    return "\n\n".join(parts)


def notebooks(language: str) -> str:
    """Return every notebook: its title and picture, and the file."""
    parts = []
    for path in sorted((ROOT / "notebooks" / language).glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        title = next(line for cell in cells for line in cell["source"] if line.startswith("# ")).strip("# \n")
        parts.append(
            f"### {title} {{#notebook-{int(path.stem[:2])}}}\n\n![{escape(title)}](PICTURES/{path.stem}.png)\n\n"
            f"`jupyter lab notebooks/{language}/{path.name}`"
        )
    return "\n\n".join(parts)


PIECES: dict[str, Callable[..., str]] = {
    "changelog": changelog,
    "cli": cli,
    "clients": clients,
    "errors": errors,
    "examples": examples,
    "file": file,
    "folder_costs": folder_costs,
    "metrics": metrics,
    "notebooks": notebooks,
    "printed": printed,
    "published": published,
    "servers": servers,
    "settings": settings,
    "speed": speed,
    "tree": code_tree,
    "troubleshooting": troubleshooting,
}
