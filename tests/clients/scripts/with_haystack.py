"""Haystack's rankers."""

from haystack import Document
from haystack.utils import Secret
from haystack_integrations.components.rankers.cohere import CohereRanker
from haystack_integrations.components.rankers.huggingface_api import HuggingFaceTEIRanker
from haystack_integrations.components.rankers.jina import JinaRanker
from told import DOCUMENTS, KEY, MODEL, QUERY, TOP_N, URL, answer, client

GIVEN = [Document(id=str(place), content=text) for place, text in enumerate(DOCUMENTS)]
SECRET = Secret.from_token(KEY)


def hits(ranker):
    if hasattr(ranker, "warm_up"):
        ranker.warm_up()
    found = ranker.run(query=QUERY, documents=GIVEN)["documents"]
    return [(int(hit.id), hit.score, hit.content) for hit in found]


@client()
def cohere():
    return hits(CohereRanker(model=MODEL, top_k=TOP_N, api_key=SECRET, api_base_url=URL))


@client()
def jina():
    return hits(JinaRanker(model=MODEL, top_k=TOP_N, api_key=SECRET, base_url=f"{URL}/v1/rerank"))


@client()
def tei():
    return hits(HuggingFaceTEIRanker(url=URL, top_k=TOP_N, token=SECRET))


@client(log_odds=True)
def tei_raw():
    return hits(HuggingFaceTEIRanker(url=URL, top_k=TOP_N, token=SECRET, raw_scores=True))


answer()
