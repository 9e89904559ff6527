"""What the READMEs show of real output: `python -m tests.readme_outputs` runs it again and writes it into both."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qwen_rerank.samples import LANGUAGES, load_demo_results

ROOT = Path(__file__).resolve().parents[1]
READMES = ("README.md", "README.zh-CN.md")
_COMMAND = f"{shlex.quote(sys.executable)} -m qwen_rerank"
FILE_LINES = 4  # of what a search of files prints
BY_MINI = "# printed by mini, the small model that ships with the package, in its place"

REQUEST = re.compile(r"curl http://127\.0\.0\.1:8080(\S+) .*? -d '(.*?)'\n```", re.DOTALL)
_PYTHON = re.compile(r"```python\n(.*?)```(\n+```text\n(.*?)```)?", re.DOTALL)
_REAL = re.compile(r"Qwen/Qwen3-(Reranker|Embedding)-0\.6B")


def small(code: str) -> str:
    """Return code with the shipped pair in place of the real one."""
    return _REAL.sub("mini", code)


def snippets(text: str) -> list[tuple[str, str]]:
    """Return (code, shown output or "") of every Python block but those that need a running server."""
    return [(code, shown) for code, _, shown in _PYTHON.findall(text) if "http://" not in code]


def run(code: str, folder: Path) -> str:
    """Return what a block prints with the small models in place of the real ones, and says so."""
    printed = output([sys.executable, "-c", small(code)], folder)
    return f"{BY_MINI}\n{printed}" if printed and small(code) != code else printed


def demo() -> str:
    """Return the first two places of the demo's first question in each language, and its counts."""
    with TemporaryDirectory() as folder:
        printed = output([sys.executable, "-m", "qwen_rerank", "demo", "--top-n", "2"], Path(folder))
    lines = [line.rstrip() for line in printed.splitlines()]
    shown = []
    for language in LANGUAGES:
        query = load_demo_results()["cases"][language][0]
        start = next(i for i, line in enumerate(lines) if line.startswith(query))
        shown += [*lines[start : lines.index("", start + 4)], ""]
    shown += [
        line for line in lines if line.startswith(tuple(f"{language}: the right passage" for language in LANGUAGES))
    ]
    return "\n".join(shown).rstrip()


def answer(text: str) -> str:
    """Return the server's answer to the README's request, as JSON, and whose it is."""
    import httpx2

    from qwen_rerank import load_scorer
    from qwen_rerank.serve.app import create_app

    found = REQUEST.search(text)
    assert found, "the README shows no request"

    async def ask() -> dict[str, Any]:
        app = create_app(load_scorer("mini"))
        async with (
            app.router.lifespan_context(app),
            httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://server") as client,
        ):
            await app.state.backend.wait_loaded()
            return (await client.post(found[1], json=json.loads(found[2]))).json()

    given = asyncio.run(ask())
    results = [{**row, "relevance_score": round(row["relevance_score"], 3)} for row in given["results"]]
    return json.dumps({"model": given["model"], "results": results}, ensure_ascii=False)


def files(text: str) -> str:
    """Return what the README's commands over a folder say: all of the indexing, and how what the search prints begins."""
    [commands] = re.findall(r"^```bash\n((?:.*\n)?qwen-rerank index .*\n(?:.*\n)*?)```", text, re.MULTILINE)
    *before, search = commands.splitlines()
    with TemporaryDirectory() as folder:
        written, found = (
            output(["bash", "-ec", lines.replace("build/", f"{folder}/").replace("qwen-rerank", _COMMAND)], ROOT)
            for lines in ("exec 2>&1\n" + "\n".join(before), search)
        )
    [*report, _, _] = [line.rstrip() for line in written.splitlines()]  # behind it stands the command that follows here
    lines = [line.rstrip() for line in found.splitlines() if line.strip()]
    return "\n".join([*report, *lines[:FILE_LINES], "    …"])


def with_outputs(text: str) -> str:
    """Return a README with its outputs as they are now."""

    def again(match: re.Match[str]) -> str:
        code = match[1]
        if "http://" in code:
            return match[0]
        with TemporaryDirectory() as folder:
            printed = run(code, Path(folder))
        return f"```python\n{code}```" + (f"\n\n```text\n{printed}```" if printed else "")

    text = _PYTHON.sub(again, text)
    text = _between(
        text, "demo", f"```text\n$ qwen-rerank demo --top-n 2  # one of its questions in each language\n{demo()}\n```"
    )
    text = _between(text, "files", f"```text\n{files(text)}\n```")
    return _between(text, "answer", f"```json\n{answer(text)}\n```")


def _between(text: str, name: str, content: str) -> str:
    return re.sub(
        rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m: f"{m[1]}{content}\n{m[2]}", text, flags=re.DOTALL
    )


def output(command: list[str], folder: Path) -> str:
    """Return what a command prints, without a network; it must succeed."""
    environment = {**os.environ, "COLUMNS": "96", "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8", env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


if __name__ == "__main__":
    for readme in READMES:
        path = ROOT / readme
        path.write_text(with_outputs(path.read_text(encoding="utf-8")), encoding="utf-8")
