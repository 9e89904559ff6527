"""The site as a reader has it: every question finds its answer by search, in both languages, and nothing comes from elsewhere."""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Iterator

import pytest

from docs import build
from tests.serve.browser import Page, browser, find

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(find() is None, reason="needs a Chromium"),
]

_RESULTS = """[...[...document.querySelectorAll("body *")].find((node) => node.shadowRoot).shadowRoot.querySelectorAll("ol a")]
    .map((link) => link.getAttribute("href"))"""
# The button does nothing before the page's script runs, so it is clicked until the dialog is there.
_OPENED = """(() => {
    const input = [...document.querySelectorAll("body *")].map((n) => n.shadowRoot?.querySelector("dialog[open] input")).find(Boolean);
    if (input) { input.focus(); return true; }
    document.querySelector(".md-search__button").click();
})()"""
QUESTIONS = {
    "how do I filter by year?": "howto/vector-store/#filter",
    "what does 429 mean?": "reference/errors/#codes",
    "I am out of memory": "reference/troubleshooting/#memory",
    "Xinference 用哪个 dialect？": "zh/howto/call-a-server/#dialects",
    "为什么所有分数都是 0.99？": "zh/explanation/scores/#saturated",
    "显存不够怎么办？": "zh/reference/troubleshooting/#memory",
    "which dialect for Xinference?": "howto/call-a-server/#dialects",
    "why are all scores 0.99?": "explanation/scores/#saturated",
    "怎么在没有网络的机器上用？": "zh/start/#offline",
    "阈值怎么定？": "zh/howto/choose/#threshold",
    "长文档": "zh/howto/long-documents/",
    "魔搭": "zh/start/#in-china",
    "国内下载模型很慢怎么办？": "zh/start/#in-china",
    "服务返回 429 是什么意思？": "zh/reference/errors/#codes",
    "document longer than the model reads": "howto/long-documents/",
    "which k and which threshold should I take?": "howto/choose/#threshold",
    "how do I use a GPU?": "start/#with-a-gpu",
    "how do I run it without internet?": "start/#offline",
    "how do I set an API key?": "howto/serve/#keys",
    "does it work with Milvus?": "howto/vector-store/#own",
    "怎么设置密钥？": "zh/howto/serve/#keys",
    "一百万条数据要多少内存？": "zh/howto/vector-store/#size",
    "多个进程能同时写一个库吗？": "zh/explanation/store/#readers",
}


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files and says nothing."""

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    assert build.main() == 0
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(build.SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with browser() as page:
        yield page


def search(page: Page, question: str) -> list[str]:
    """Return where the results lead, best first, without the words that they mark."""
    page.until("document.readyState === 'complete'")
    page.until(_OPENED)
    page.write(question)
    page.until(f"{_RESULTS}.length")
    return page.run(f"{_RESULTS}.map((link) => link.replace(/\\?h=[^#]*/, ''))")


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_question_finds_its_answer_first(page, site, question):
    answer = QUESTIONS[question]
    page.open(site + ("zh/" if answer.startswith("zh/") else ""))

    assert site + answer in search(page, question)[:2]


@pytest.mark.parametrize("width", [390, 1360])
@pytest.mark.parametrize("path", ["", "zh/start/", "howto/serve/", "zh/reference/models/", "reference/cli/"])
def test_a_page_fits_its_window_and_loads_nothing_from_elsewhere(page, site, path, width):
    page.requests.clear()
    page.open(site + path, width=width)
    page.until("document.readyState === 'complete' && document.querySelector('article h1') !== null")

    assert page.run("document.documentElement.scrollWidth <= innerWidth")
    assert page.problems == []
    assert [url for url in page.requests if not url.startswith((site, "data:"))] == []


def test_the_switch_leads_to_the_same_page_in_the_other_language(page, site):
    page.open(f"{site}explanation/scores/")
    page.until("document.querySelector('a[hreflang=zh]') !== null")

    assert page.run("document.querySelector('a[hreflang=zh]').href") == f"{site}zh/explanation/scores/"
