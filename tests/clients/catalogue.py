"""Which clients are tried, how each is pointed at the server, and the documentation's tables of them and of real servers."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from tests.clients.environments import REQUIREMENTS, ROOT


@dataclass(frozen=True, kw_only=True)
class Client:
    """One way to the server.

    Attributes:
        group: Environment, and script `with_<group>.py`.
        calls: Functions of the script.
        package: Distribution that the client comes from.
        title: What the table calls it.
        setting: How it is pointed at the server; ROOT stands for the server's address.
        sends_key: Whether it can send a key.
        shows_error: Whether it shows the server's words when it is refused.
        plain_documents: Whether the server must be told to repeat documents as strings.
    """

    group: str
    calls: tuple[str, ...]
    package: str
    title: str
    setting: str
    sends_key: bool = True
    shows_error: bool = True
    plain_documents: bool = False

    @property
    def version(self) -> str:
        """The tried version."""
        return dict(requirement.split("==") for requirement in REQUIREMENTS[self.group])[self.package]


def _litellm(provider: str, setting: str, *calls: str) -> Client:
    title = f"LiteLLM, `{provider}/NAME`"
    return Client(group="litellm", calls=calls, package="litellm", title=title, setting=f"`api_base={setting}`")


def _llama_index(name: str, package: str, setting: str, call: str, **facts: bool) -> Client:
    package, title = f"llama-index-postprocessor-{package}-rerank", f"LlamaIndex `{name}`"
    return Client(group="llama_index", calls=(call,), package=package, title=title, setting=f"`{setting}`", **facts)


def _langchain(name: str, package: str, setting: str, *calls: str) -> Client:
    title = f"{package} `{name}`"
    return Client(group="langchain", calls=calls, package=package, title=title, setting=f"`base_url={setting}`")


def _haystack(name: str, package: str, setting: str, *calls: str) -> Client:
    title = f"Haystack `{name}`"
    return Client(group="haystack", calls=calls, package=package, title=title, setting=f"`{setting}`")


def _rerankers(provider: str, path: str) -> Client:
    call = {"text-embeddings-inference": "tei", "mixedbread.ai": "mixedbread"}.get(provider, provider)
    return Client(
        group="plain",
        calls=(f"rerankers_{call}",),
        package="rerankers",
        title=f'rerankers, `model_type="{provider}"`',
        setting=f"`url=ROOT{path}`",
        shows_error=False,
    )


CLIENTS = (
    Client(
        group="cohere",
        calls=("v1", "v1_objects"),
        package="cohere",
        title="Cohere SDK `Client`",
        setting="`base_url=ROOT`",
    ),
    Client(
        group="cohere",
        calls=("v2", "v2_async"),
        package="cohere",
        title="Cohere SDK `ClientV2`, `AsyncClientV2`",
        setting="`base_url=ROOT`",
    ),
    _langchain("CohereRerank", "langchain-cohere", "ROOT", "cohere"),
    _langchain("VoyageAIRerank", "langchain-voyageai", "ROOT/v1", "voyage", "voyage_async"),
    _langchain("NVIDIARerank", "langchain-nvidia-ai-endpoints", "ROOT/v1", "nvidia"),
    Client(
        group="langchain_community",
        calls=("jina",),
        package="langchain-community",
        title="langchain-community `JinaRerank`",
        setting="`jina_rerank.JINA_API_URL = ROOT/v1/rerank`",
    ),
    Client(
        group="langchain_community",
        calls=("infinity", "infinity_prefix"),
        package="langchain-community",
        title="langchain-community `InfinityRerank`",
        setting="`client=Client(base_url=ROOT)`",
        shows_error=False,
    ),
    _llama_index("CohereRerank", "cohere", "base_url=ROOT", "cohere"),
    _llama_index("JinaRerank", "jinaai", "base_url=ROOT/v1", "jina"),
    _llama_index("TextEmbeddingInference", "tei", "base_url=ROOT", "tei", shows_error=False),
    _llama_index("SiliconFlowRerank", "siliconflow", "base_url=ROOT/v1/rerank", "siliconflow"),
    _llama_index("XinferenceRerank", "xinference", "base_url=ROOT", "xinference", sends_key=False),
    _llama_index("NVIDIARerank", "nvidia", "base_url=ROOT/v1", "nvidia", shows_error=False),
    _litellm("hosted_vllm", "ROOT", "hosted_vllm", "hosted_vllm_v1", "hosted_vllm_instruction"),
    _litellm("cohere", "ROOT", "cohere"),
    _litellm("jina_ai", "ROOT", "jina_ai"),
    _litellm("infinity", "ROOT/infinity", "infinity"),
    replace(
        _litellm("infinity", "ROOT", "infinity_root"),
        setting="`api_base=ROOT` (`serve --plain-documents`)",
        plain_documents=True,
    ),
    _litellm("huggingface", "ROOT", "huggingface"),
    _litellm("voyage", "ROOT", "voyage"),
    _haystack("CohereRanker", "cohere-haystack", "api_base_url=ROOT", "cohere"),
    _haystack("JinaRanker", "jina-haystack", "base_url=ROOT/v1/rerank", "jina"),
    _haystack("HuggingFaceTEIRanker", "huggingface-api-haystack", "url=ROOT", "tei", "tei_raw"),
    Client(
        group="plain",
        calls=("voyage",),
        package="voyageai",
        title="voyageai `Client`",
        setting="`base_url=ROOT/v1`",
    ),
    Client(
        group="plain",
        calls=("xinference",),
        package="xinference-client",
        title="xinference-client `RESTfulClient`",
        setting="`base_url=ROOT`",
        sends_key=False,  # it asks the server first whether to send one, on a route that only Xinference has
    ),
    Client(
        group="plain",
        calls=("agno_cohere",),
        package="agno",
        title="agno `CohereReranker`",
        setting="`cohere_client=Client(base_url=ROOT)`",
        shows_error=False,
    ),
    _rerankers("cohere", "/v1/rerank"),
    _rerankers("jina", "/v1/rerank"),
    _rerankers("voyage", "/v1/rerank"),
    _rerankers("text-embeddings-inference", "/rerank"),
    replace(
        _rerankers("mixedbread.ai", "/v1/reranking"),
        title='rerankers, `APIRanker("NAME", KEY, "mixedbread.ai")`',
    ),
    _rerankers("pinecone", "/rerank"),
)

# Their request is tried as their source sends it, see test_applications.py.
APPLICATIONS = (
    ("Open WebUI", "`ROOT/v1/rerank`"),
    ("Dify", "`ROOT/v1`"),
    ("RAGFlow", "`ROOT` / `ROOT/v1`"),
    ("FastGPT", "`ROOT/v1/rerank`"),
    ("Milvus, vLLM / TEI", "`ROOT`"),
    ("LightRAG", "`ROOT/v1/rerank`"),
)

_HEADS = {
    "en": (
        "client",
        "where it is told the server's address, ROOT",
        "tried version",
        "request as in its source",
        "; sends no key",
    ),
    "zh": ("客户端", "服务器地址（ROOT）填在哪里", "试过的版本", "按其源码发出的请求", "；不发送密钥"),
}


def table(language: str) -> str:
    """Return the table in a language, "en" or "zh"."""
    *heads, by_source, keyless = _HEADS[language]
    rows = [heads, ["---"] * 3]
    rows += [[each.title, each.setting + ("" if each.sends_key else keyless), each.version] for each in CLIENTS]
    rows += [[title, setting, by_source] for title, setting in APPLICATIONS]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


_SERVER_TITLES = {"vllm": "vLLM", "llamacpp": "llama.cpp", "infinity": "Infinity", "xinference": "Xinference"}
_SERVER_HEADS = {
    "en": (
        "server",
        "really run",
        "`HttpScorer`: greatest distance in log-odds",
        "started wrongly, `qwen-rerank check` names",
    ),
    "zh": ("服务器", "真正运行过的版本", "`HttpScorer`：对数几率的最大差", "启动有误时 `qwen-rerank check` 指出"),
}
_SERVER_WORDS = {
    "en": ("with `tokenizer=` {}", "the server's own prompt {}", "it makes no prompt"),
    "zh": ("有 `tokenizer=` 时 {}", "服务器自己的提示 {}", "它不生成提示"),
}


def server_table(language: str) -> str:
    """Return the table of real servers, from what `tests.servers.running` saw, in a language."""
    results = ROOT / "eval" / "serving" / "results" / "servers.json"
    rows = [list(_SERVER_HEADS[language]), ["---"] * 4]
    for name, seen in json.loads(results.read_text(encoding="utf-8"))["servers"].items():
        distances = _distances(name, seen["settings"], language)
        rows.append([_SERVER_TITLES[name], f"`{seen['package']}` {seen['version']}", distances, _causes(seen)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _distances(name: str, settings: dict[str, Any], language: str) -> str:
    exact, own, none = _SERVER_WORDS[language]
    if "template" not in settings:
        return none
    client = settings["template"]["client"]
    parts = [own.format(f"{client[f'{name}, without tokenizer']['log_odds']:.1g}")]
    if name == "vllm":  # the one of them that takes exact prompts
        parts.insert(0, exact.format(f"{client[f'{name}, with tokenizer']['log_odds']:.1g}"))
    return "; ".join(parts)


def _causes(seen: dict[str, Any]) -> str:
    wrong = [each["check"]["cause"] for each in seen["settings"].values() if each["check"]["verdict"] == "wrong"]
    return ", ".join(f"`{cause}`" for cause in wrong) or "-"
