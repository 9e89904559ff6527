"""The Cohere SDK."""

import asyncio

import cohere
from told import DOCUMENTS, KEY, MODEL, QUERY, TOP_N, URL, answer, client

ASK = {"model": MODEL, "query": QUERY, "documents": DOCUMENTS, "top_n": TOP_N}


@client()
def v1():
    given = cohere.Client(KEY, base_url=URL).rerank(**ASK, return_documents=True)
    return [(hit.index, hit.relevance_score, hit.document.text) for hit in given.results]


@client()
def v1_objects():
    objects = [{"text": text} for text in DOCUMENTS]
    given = cohere.Client(KEY, base_url=URL).rerank(**{**ASK, "documents": objects})
    return [(hit.index, hit.relevance_score) for hit in given.results]


@client()
def v2():
    given = cohere.ClientV2(KEY, base_url=URL).rerank(**ASK)
    return [(hit.index, hit.relevance_score) for hit in given.results]


@client()
def v2_async():
    given = asyncio.run(cohere.AsyncClientV2(KEY, base_url=URL).rerank(**ASK, max_tokens_per_doc=4096))
    return [(hit.index, hit.relevance_score) for hit in given.results]


answer()
