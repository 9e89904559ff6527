"""Where a model's name leads: to the package, to a folder, or to the hub at a pinned commit."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import huggingface_hub
import pytest

from qwen_rerank.errors import InvalidInputError, ModelError, ModelNotFoundError
from qwen_rerank.models.names import PINNED, find_model, find_tokenizer, why_no_hub
from tests.scorers.http.stub import Reply, serving


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """What the hub was asked for; every model is there, in an empty folder named after its revision."""
    asked = []

    def snapshot_download(name, *, revision, allow_patterns, ignore_patterns, local_files_only):
        asked.append((name, revision))
        assert not any("bin" in pattern or pattern in ("*", "*.py") for pattern in allow_patterns)
        return str(tmp_path / (revision or "main"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_official_names_are_pinned(hub):
    assert [find_model(name).revision for name in PINNED] == list(PINNED.values())
    assert hub == list(PINNED.items())


def test_a_given_revision_wins(hub):
    assert find_model("someone/fine-tuned", revision="a" * 40).revision == "a" * 40
    assert find_model("Qwen/Qwen3-Reranker-0.6B", revision="main").revision == "main"


def test_a_tokenizer_is_that_of_the_pinned_model(hub):
    name, commit = next(iter(PINNED.items()))
    assert find_tokenizer(name).parts[-2:] == (commit, "tokenizer.json")
    assert hub == [(name, commit)]


def test_a_tokenizer_may_be_named_by_its_file(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    assert find_tokenizer(str(path)) == find_tokenizer(str(tmp_path)) == path


def test_the_shipped_models_are_folders_of_the_package():
    reranker, embedder = find_model("pocket"), find_model("pocket", kind="embedder")
    assert (reranker.path / "config.json").is_file()
    assert (embedder.path / "modules.json").is_file()


def test_the_home_folder_may_be_written_short(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m").mkdir()
    assert find_model("~/m").path == tmp_path / "m"


@pytest.mark.parametrize(
    "name",
    ["missing", "./missing", "/no/such/folder", "a/b/c", "https://host/model", "x\x00y", "~nobody-of-that-name/m"],
)
def test_a_name_that_leads_nowhere_says_what_leads_somewhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFoundError, match="is no folder and no hub name"):
        find_model(name)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "config.json").touch()
    with pytest.raises(ModelNotFoundError, match="is a file, not a folder"):
        find_model(str(tmp_path / "config.json"))


def test_a_gguf_file_is_sent_to_the_server_that_reads_it(tmp_path):
    (tmp_path / "q4.gguf").touch()
    with pytest.raises(ModelError, match=r"GGUF file.*llama-server and give that server's URL"):
        find_model(str(tmp_path / "q4.gguf"))


@pytest.mark.parametrize("name", ["", " ", None, 3, "\ud800"])
def test_a_name_must_be_a_text(name):
    with pytest.raises(InvalidInputError, match="model"):
        find_model(name)


@pytest.mark.parametrize("name", ["pocket", str(Path(__file__).parent)])
def test_a_revision_is_for_hub_names_only(name):
    with pytest.raises(InvalidInputError, match="for hub names only"):
        find_model(name, revision="main")


def test_a_hub_that_cannot_be_reached_says_the_way_out():
    with pytest.raises(
        ModelNotFoundError,
        match=r"not in the local cache.*check how the name is spelt.*set HF_ENDPOINT.*give its folder",
    ):
        find_model("nobody/no-such-model")


@pytest.mark.parametrize(("kind", "option"), [("reranker", "--model mini"), ("embedder", "--embedder mini")])
def test_a_hub_that_cannot_be_reached_names_what_is_here_in_its_place(kind, option):
    with pytest.raises(ModelNotFoundError, match=option):
        find_model("nobody/no-such-model", kind=kind)


def test_a_name_that_is_nearly_a_published_one_is_told_so():
    with pytest.raises(ModelNotFoundError, match=r"how the name is spelt \(Qwen/Qwen3-Reranker-0\.6B\?\)"):
        find_model("Qwen/Qwen3-Reranker-O.6B")


def test_foreign_errors_of_the_hub_become_ours(monkeypatch):
    def snapshot_download(*args, **options):
        raise RuntimeError("proxy says no\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ModelNotFoundError, match=r"nobody/x \(revision main\).*RuntimeError: proxy says no\)"):
        find_model("nobody/x")


def test_a_dead_proxy_is_named_where_the_hub_cannot_be_reached(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")

    assert "through the proxy that HTTPS_PROXY names" in str(why_no_hub(timeout_s=2.0))


def test_a_socks_proxy_is_named_with_the_one_package_that_it_needs(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_session", Mock(side_effect=ImportError("Using SOCKS proxy, but …")))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")

    reason = str(why_no_hub(timeout_s=2.0))
    assert reason.endswith(": ALL_PROXY names a SOCKS proxy, which needs socksio: pip install socksio")


@pytest.mark.parametrize(("status", "reached"), [(200, True), (302, True), (404, True), (403, False), (502, False)])
def test_a_gateway_that_answers_in_the_hubs_place_is_not_taken_for_it(monkeypatch, status, reached):
    with serving(lambda _: Reply(status)) as server:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)

        assert (why_no_hub(timeout_s=5.0) is None) == reached
