"""The playground: its page, its samples, its search; and all of it as a reader uses it, in a real browser."""

from __future__ import annotations

import ast
import json
import subprocess

import pytest
from langchain_core.documents import Document
from llama_index.core.schema import NodeWithScore, TextNode

from qwen_rerank import FaissStore, QwenScorer
from qwen_rerank.folders import sync_folder
from qwen_rerank.samples import load_demo_results, load_encyclopedia
from qwen_rerank.serve.backend import State
from qwen_rerank.testing import OverlapScorer
from tests.serve.browser import browser, find
from tests.serve.conftest import KEY, app_client, live_server


async def test_the_page_needs_nothing_from_elsewhere_and_may_run_nothing_else(client):
    page = await client.get("/")
    policy = page.headers["content-security-policy"]

    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "script-src 'sha256-" in policy
    assert "style=" not in page.text
    for word in ("http://", "https://", "//cdn", "@import", "eval("):
        assert word not in page.text.replace("http://www.w3.org/2000/svg", "")


async def test_a_search_shows_both_rounds_over_a_sample():
    async with app_client(OverlapScorer()) as client:
        samples = (await client.get("/playground/samples")).json()
        query = samples["zh"]["queries"][0]
        answer = (await client.post("/playground/search", json={"query": query, "collection": "zh"})).json()

    assert set(samples["zh"]["queries"]) < set(samples["zh"]["questions"]) == set(load_encyclopedia("zh").queries)
    assert answer["n_documents"] == len(load_encyclopedia("zh").documents)
    assert len(answer["first"]) == len(answer["final"]) == 20
    assert [hit["score"] for hit in answer["first"]] == sorted((hit["score"] for hit in answer["first"]), reverse=True)
    assert [hit["score"] for hit in answer["final"]] == sorted((hit["score"] for hit in answer["final"]), reverse=True)
    assert sorted(hit["index"] for hit in answer["final"]) == list(range(20))


async def test_a_samples_question_tells_where_its_right_passage_stands():
    sample = load_encyclopedia("en")
    query = load_demo_results()["bm25"]["cases"]["en"][0]
    async with app_client(OverlapScorer()) as client:
        known = (await client.post("/playground/search", json={"query": query, "collection": "en"})).json()
        other = (await client.post("/playground/search", json={"query": "Mongol Empire", "collection": "en"})).json()
        lost = (await client.post("/playground/search", json={"query": query, "collection": "en", "top_k": 1})).json()

    assert known["first"][known["right"]["index"]]["id"] == sample.relevant[query]
    assert other["right"] is None
    assert lost["right"] == {"index": None}
    assert "mongol" in known["terms"]


async def test_the_page_counts_what_was_counted(client):
    samples, made = (await client.get("/playground/samples")).json(), load_demo_results()

    for language in ("zh", "en"):
        assert samples[language]["count"] == {"model": made["model"], **made["bm25"]["counts"][language]}
        assert samples[language]["queries"] == made["bm25"]["cases"][language]


async def test_texts_without_a_word_of_the_query_come_last_in_the_first_round(client):
    answer = (
        await client.post("/playground/search", json={"query": "red", "texts": ["blue 1", "a red one 2", "green 3"]})
    ).json()

    assert [hit["text"] for hit in answer["first"]] == ["a red one 2", "blue 1", "green 3"]
    assert [hit["score"] > 0 for hit in answer["first"]] == [True, False, False]
    assert answer["prompt"] is None  # this scorer has no prompt to show


async def test_a_server_with_a_store_searches_it_and_tells_where_each_passage_stands(tmp_path):
    (tmp_path / "笔记").mkdir()
    (tmp_path / "笔记" / "租约.md").write_text("# 租约\n\n租约六月到期。\n", encoding="utf-8")
    with FaissStore.create(tmp_path / "store", None) as store:
        sync_folder(store, [tmp_path / "笔记"])
        async with app_client(OverlapScorer(), first_stage=store, keys=(KEY,)) as client:
            wanted = {"query": "租约到期", "collection": "store"}
            refused = await client.post("/playground/search", json=wanted)
            client.headers["authorization"] = f"Bearer {KEY}"
            answer = (await client.post("/playground/search", json=wanted)).json()
            nothing = (await client.post("/playground/search", json={**wanted, "query": "?!"})).json()

    assert refused.status_code == 401
    assert [(hit["place"], hit["text"]) for hit in answer["first"]] == [("笔记/租约.md:1", "# 租约\n\n租约六月到期。")]
    assert (answer["first_stage"], answer["n_documents"], len(answer["final"])) == ("store", 1, 1)
    assert (nothing["first"], nothing["final"], nothing["prompt"]) == ([], [], None)


async def test_without_a_store_there_is_none_to_search(client):
    answer = await client.post("/playground/search", json={"query": "q", "collection": "store"})

    assert (answer.status_code, "start it with --store" in answer.json()["detail"]) == (422, True)
    assert (await client.get("/playground/samples")).json()["has_store"] is False


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"query": "q"}, 422),
        ({"query": "q", "texts": []}, 422),
        ({"query": "q", "texts": [" "]}, 422),
        ({"query": "q", "texts": ["a"] * 201}, 413),
        ({"query": "q", "collection": "fr"}, 422),
        ({"query": "", "collection": "en"}, 422),
    ],
)
async def test_a_search_that_cannot_be_done_says_why(client, body, status):
    response = await client.post("/playground/search", json=body)

    assert response.status_code == status
    assert response.json()["detail"]


async def test_the_prompt_on_show_is_the_one_that_was_scored():
    with QwenScorer("pocket", device="cpu", max_length=256) as scorer:
        async with app_client(scorer, instruction="Find it") as client:
            body = {"query": "red", "texts": ["a red planet " + "far away " * 400]}
            answer = (await client.post("/playground/search", json=body)).json()
        [prompt] = scorer.encoder.encode("red", body["texts"], instruction="Find it")
        spec = scorer.encoder.spec

    shown = spec.prefix + spec.body("Find it", "red", body["texts"][0][: prompt.kept_chars]) + spec.suffix
    assert "".join(part["text"] for part in answer["prompt"]) == shown


async def test_a_query_without_words_still_shows_the_second_round(client):
    answer = (await client.post("/playground/search", json={"query": "?!", "texts": ["a 1", "b 2"]})).json()

    assert [hit["index"] for hit in answer["final"]] == [1, 0]


async def test_a_search_needs_the_key_and_the_page_does_not():
    async with app_client(keys=(KEY,)) as client:
        page = await client.get("/")
        search = await client.post("/playground/search", json={"query": "q", "collection": "en"})

    assert (page.status_code, search.status_code) == (200, 401)


@pytest.fixture(scope="module")
def page():
    if find() is None:
        pytest.skip("no Chromium on this machine")
    with browser() as page:
        yield page


READY = "document.querySelectorAll('#final li').length > 3 && document.querySelector('#rounds').getAttribute('aria-busy') === 'false'"
MARK = "document.querySelector('#final').dataset.old = 'yes'; document.querySelector('#final li').dataset.old = 'yes'"
CHANGED = f"{READY} && !document.querySelector('#final li').dataset.old"


@pytest.mark.browser
def test_a_newcomer_sees_both_rounds_at_once_in_their_language(page):
    with live_server(OverlapScorer) as server:
        for language, word in (("zh-CN", "决赛"), ("en-US", "Reranked")):
            page.open(server.url, language=language)
            page.until(READY)
            assert word in page.text("#rounds")
            assert len(page.texts("#first li")) == len(page.texts("#final li")) == 8
            assert page.run("document.querySelectorAll('#lines path').length") > 0
        page.click("#lang-zh")
        assert "海选" in page.text("#rounds")
        assert page.run("document.documentElement.lang") == "zh-CN"

    assert page.problems == []
    assert all(url.startswith(server.url) for url in page.requests)


@pytest.mark.browser
def test_searching_ones_own_texts_with_instruction_and_threshold(page):
    with live_server(OverlapScorer) as server:
        page.open(server.url)
        page.until(READY)
        page.run(MARK)
        page.click("input[value=own]")
        page.until(CHANGED)
        page.run(
            "document.querySelector('#texts').value = 'red planet mars\\nblue sea\\nred wine\\n<img src=x onerror=alert(1)>'"
        )
        page.run("document.querySelector('#query').value = 'red planet'; " + MARK)
        page.click("#go")
        page.until(CHANGED)
        titles = page.texts("#final .title")
        unlimited = page.text("#final-note")
        page.run("const t = document.querySelector('#threshold'); t.value = 0.6; t.dispatchEvent(new Event('input'))")

        assert titles[:2] == ["red planet mars", "red wine"]
        assert "threshold" not in unlimited  # at 0 there is none to speak of
        assert page.text("#final-note") == "1 of 4 at or above the threshold."
        assert page.run("document.querySelectorAll('#final li.below').length") == 3
        assert page.run("document.querySelectorAll('#rounds img').length") == 0
        assert "<img src=x" in page.text("#final")
    assert page.problems == []


@pytest.mark.browser
def test_a_servers_own_store_is_what_the_page_searches(page, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "lease.md").write_text("# Lease\n\nThe lease ends in June.\n")
    with FaissStore.create(tmp_path / "store", None) as store:
        sync_folder(store, [tmp_path / "notes"])
        with live_server(OverlapScorer, first_stage=store) as server:
            page.open(server.url)
            page.until("document.querySelector('input[value=store]')?.checked")
            page.until("document.querySelector('#model').innerText === 'Model: overlap.'")  # before any search
            page.run("document.querySelector('#query').value = 'when does the lease end'")
            page.click("#go")
            page.until("document.querySelectorAll('#final li').length === 1")

            assert page.texts("#final .title") == ["notes/lease.md:1"]
            assert page.text("#first-note") == "The store found 1 of 1 passages, by meaning and by words."


@pytest.mark.browser
def test_ones_own_texts_come_with_a_question_that_fits_them(page):
    with live_server(OverlapScorer) as server:
        page.open(server.url)
        page.until(READY)
        page.run("document.querySelector('#query').value = 'a question about something else'")
        page.run(MARK)
        page.click("input[value=own]")
        page.until(CHANGED)

        asked = page.run("document.querySelector('#query').value")
        assert asked == load_demo_results()["bm25"]["cases"]["en"][0]
        answer = next(d for d in load_encyclopedia("en").documents if d.id == load_encyclopedia("en").relevant[asked])
        assert answer.text.split("\n")[1] in page.run("document.querySelector('#texts').value")


@pytest.mark.browser
def test_the_right_text_is_marked_in_both_rounds_with_the_words_it_shares(page):
    with live_server(OverlapScorer) as server:
        page.open(server.url)
        page.until(READY)
        assert page.run("document.querySelectorAll('#final li.right').length") == 1
        assert page.text("#right-note").startswith("The right text stands at place ")
        assert "Mongol" in page.texts("#first .snippet b") + page.texts("#first .snippet b")[0].split()
        assert page.text("#count").startswith("Counted over all 60 questions")
        page.click("input[value=own]")
        page.until("document.querySelector('#right-note').hidden && document.querySelector('#count').hidden")


class Retriever:
    def invoke(self, query):
        return [Document(page_content="it's blue"), Document(page_content=f"{query}, red")]


class Index:
    """Hands the postprocessors on in place of a query engine."""

    def as_query_engine(self, *, similarity_top_k, node_postprocessors):
        self.postprocessors = node_postprocessors
        return self

    def query(self, query):
        nodes = [NodeWithScore(node=TextNode(text=text)) for text in ("it's blue", f"{query}, red")]
        [reranker] = self.postprocessors
        return [hit.node.text for hit in reranker.postprocess_nodes(nodes, query_str=query)]


@pytest.mark.browser
def test_the_snippets_run_whatever_the_query_holds(page, capsys):
    query = """it's "quoted" \\ $HOME 键盘"""
    with live_server(OverlapScorer) as server:
        page.open(server.url)
        page.until(READY)
        page.run(f"document.querySelector('#query').value = {json.dumps(query)}")
        snippets = {}
        for name in ("curl", "langchain", "llamaindex"):
            page.click(f"#tab-{name}")
            snippets[name] = page.text("#code")
        answer = subprocess.run(["sh", "-c", snippets["curl"]], capture_output=True, text=True, check=True).stdout
        names = {"retriever": Retriever(), "index": Index()}
        exec(snippets["langchain"], names)
        exec(snippets["llamaindex"], names)

    assert len(json.loads(answer)["results"]) == 3
    assert [document.page_content for document in names["documents"]] == [f"{query}, red", "it's blue"]
    assert ast.literal_eval(capsys.readouterr().out) == [f"{query}, red", "it's blue"]


@pytest.mark.browser
def test_what_is_copied_is_what_is_shown(page):
    with live_server(OverlapScorer) as server:
        page.open(server.url)
        page.until(READY)
        allowed = ["clipboardReadWrite", "clipboardSanitizedWrite"]
        page.call("Browser.grantPermissions", permissions=allowed, origin=server.url)
        page.click("#tab-curl")
        page.click("#copy")
        page.until("document.querySelector('#copy').innerText === 'Copied'")

        assert page.run("navigator.clipboard.readText()") == page.text("#code")


@pytest.mark.browser
def test_a_key_is_asked_for_and_used(page):
    with live_server(OverlapScorer, keys=(KEY,)) as server:
        page.open(server.url)
        page.until("!document.querySelector('#message').hidden")
        assert "API key" in page.text("#message")
        page.write("not the key")  # the field has the focus
        page.press("Enter", code=13, text="\r")
        page.until("document.querySelector('#message').innerText.includes('does not know this key')")
        page.run("document.querySelector('#key').value = ''")
        page.write(KEY)
        page.press("Enter", code=13, text="\r")
        page.until(READY)

        assert page.run("document.querySelector('#message').hidden") is True
        page.click("#tab-curl")
        assert 'Authorization: Bearer $QWEN_RERANK_API_KEY"' in page.text("#code")
        assert KEY not in page.run("document.documentElement.outerHTML")
        assert page.run("JSON.stringify([localStorage.length, sessionStorage.length, document.cookie])") == '[0,0,""]'


@pytest.mark.browser
def test_the_keyboard_reaches_everything(page):
    with live_server(OverlapScorer) as server:
        page.open(server.url)
        page.until(READY)
        page.click("#options summary")
        page.run("document.body.focus()")
        reached: set[str] = set()
        for _ in range(60):
            page.press("Tab", code=9)
            reached.add(
                page.run("(() => { const n = document.activeElement; return n.id || n.name || n.className; })()")
            )
        page.run("document.querySelector('#tab-prompt').focus()")
        page.press("ArrowRight", code=39)

        assert {
            "lang-zh",
            "collection",
            "query",
            "go",
            "instruction",
            "threshold",
            "title",
            "all",
            "tab-prompt",
            "panel",
        } <= reached
        assert page.run("document.activeElement.id") == "tab-curl"
        assert "key" not in reached  # this server asks for none
        page.press("Tab", code=9)
        page.press("Tab", code=9)
        assert page.run("document.activeElement.id") == "copy"

        page.run("document.querySelector('#final .title').focus()")
        page.press("Enter", code=13, text="\r")
        assert page.run("document.querySelector('#final li').className") == "near open"
        assert page.run("document.querySelectorAll('#first li.near').length") == 1


@pytest.mark.browser
def test_a_narrow_screen_needs_no_sideways_scrolling(page):
    with live_server(OverlapScorer) as server:
        for width in (320, 390, 760):
            page.open(server.url, width=width, height=800)
            page.until(READY)
            assert page.run("document.documentElement.scrollWidth <= window.innerWidth")
            assert page.run("document.querySelector('#final .snippet').offsetHeight") > 0  # text before anybody taps


@pytest.mark.browser
@pytest.mark.parametrize("size", [(1280, 720), (390, 844)])
@pytest.mark.parametrize("language", ["en-US", "zh-CN"])
def test_the_first_result_is_seen_without_scrolling(page, size, language):
    with live_server(OverlapScorer) as server:
        page.open(server.url, width=size[0], height=size[1], language=language)
        page.until(READY)
        assert page.run("document.querySelector('#final li').getBoundingClientRect().bottom <= window.innerHeight")


@pytest.mark.browser
def test_the_pocket_models_prompt_is_shown_with_its_foreign_parts_marked(page):
    from qwen_rerank.scorers.qwen import QwenScorer

    with live_server(lambda: QwenScorer("pocket", device="cpu")) as server:
        page.open(server.url)
        page.until(READY)

        assert page.text("#code").startswith("<|im_start|>system\nJudge whether")
        assert page.run("[...document.querySelectorAll('#code mark')].map((m) => m.className)") == [
            "instruction",
            "query",
            "document",
        ]


@pytest.mark.browser
def test_a_page_opened_while_the_model_loads_asks_again_by_itself(page):
    with live_server(OverlapScorer) as server:
        server.backend.enter(State.LOADING, "the model is loading")
        page.open(server.url)
        page.until("document.querySelector('#message').innerText.includes('not ready yet')")
        server.backend.enter(State.READY, "")
        page.until(READY)

        assert page.run("document.querySelector('#message').hidden") is True
