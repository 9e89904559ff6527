"""LangChain's community package."""

from infinity_client.client import Client
from langchain_community.document_compressors import JinaRerank, jina_rerank
from langchain_community.document_compressors.infinity_rerank import InfinityRerank
from langchain_core.documents import Document
from told import DOCUMENTS, KEY, MODEL, QUERY, TOP_N, URL, answer, client

GIVEN = [Document(page_content=text, metadata={"place": place}) for place, text in enumerate(DOCUMENTS)]


def hits(found):
    return [(hit.metadata["place"], hit.metadata["relevance_score"], hit.page_content) for hit in found]


@client()
def jina():
    jina_rerank.JINA_API_URL = f"{URL}/v1/rerank"  # the class has no setting for it
    compressor = JinaRerank(jina_api_key=KEY, model=MODEL, top_n=TOP_N)
    return hits(compressor.compress_documents(GIVEN, QUERY))


@client()
def infinity():
    return by_infinity(URL)


@client()
def infinity_prefix():
    return by_infinity(f"{URL}/infinity")


def by_infinity(base_url):
    opened = Client(base_url=base_url, headers={"Authorization": f"Bearer {KEY}"})
    return hits(InfinityRerank(client=opened, model=MODEL, top_n=TOP_N).compress_documents(GIVEN, QUERY))


answer()
