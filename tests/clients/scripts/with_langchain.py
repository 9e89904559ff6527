"""LangChain's partner packages."""

import asyncio

from langchain_cohere import CohereRerank
from langchain_core.documents import Document
from langchain_nvidia_ai_endpoints import NVIDIARerank
from langchain_voyageai import VoyageAIRerank
from told import DOCUMENTS, KEY, MODEL, QUERY, TOP_N, URL, answer, client

GIVEN = [Document(page_content=text, metadata={"place": place}) for place, text in enumerate(DOCUMENTS)]


def hits(found):
    return [(hit.metadata["place"], hit.metadata["relevance_score"], hit.page_content) for hit in found]


@client()
def cohere():
    compressor = CohereRerank(base_url=URL, cohere_api_key=KEY, model=MODEL, top_n=TOP_N)
    return hits(compressor.compress_documents(GIVEN, QUERY))


@client()
def voyage():
    compressor = VoyageAIRerank(base_url=f"{URL}/v1", api_key=KEY, model=MODEL, top_k=TOP_N)
    return hits(compressor.compress_documents(GIVEN, QUERY))


@client()
def voyage_async():
    compressor = VoyageAIRerank(base_url=f"{URL}/v1", api_key=KEY, model=MODEL, top_k=TOP_N)
    return hits(asyncio.run(compressor.acompress_documents(GIVEN, QUERY)))


@client(log_odds=True)
def nvidia():
    compressor = NVIDIARerank(base_url=f"{URL}/v1", api_key=KEY, model=MODEL, top_n=TOP_N)
    return hits(compressor.compress_documents(GIVEN, QUERY))


answer()
