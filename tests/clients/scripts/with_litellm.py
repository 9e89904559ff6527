"""LiteLLM, one function a provider."""

import litellm
from told import DOCUMENTS, INSTRUCTION, KEY, MODEL, QUERY, TOP_N, URL, answer, client


def ask(provider, api_base, **options):
    given = litellm.rerank(
        model=f"{provider}/{MODEL}",
        query=QUERY,
        documents=DOCUMENTS,
        top_n=TOP_N,
        api_key=KEY,
        api_base=api_base,
        **options,
    )
    hits = [hit if isinstance(hit, dict) else hit.model_dump() for hit in given.results]
    return [
        (hit["index"], hit["relevance_score"], *([hit["document"]["text"]] if hit.get("document") else []))
        for hit in hits
    ]


@client()
def hosted_vllm():
    return ask("hosted_vllm", URL)


@client()
def hosted_vllm_v1():
    return ask("hosted_vllm", f"{URL}/v1", return_documents=False)


@client(instructed=True)
def hosted_vllm_instruction():
    return ask("hosted_vllm", URL, instruction=INSTRUCTION)


@client()
def cohere():
    return ask("cohere", URL)


@client()
def jina_ai():
    return ask("jina_ai", URL)


@client()
def infinity():
    return ask("infinity", f"{URL}/infinity")


@client()
def infinity_root():
    return ask("infinity", URL)


@client()
def huggingface():
    return ask("huggingface", URL)


@client()
def voyage():
    return ask("voyage", URL)


answer()
