"""SDKs and small libraries."""

import agno.knowledge.document
import cohere
import voyageai
import xinference_client
from agno.knowledge.reranker.cohere import CohereReranker
from rerankers import Reranker
from rerankers.models.api_rankers import APIRanker
from told import DOCUMENTS, KEY, MODEL, QUERY, TOP_N, URL, answer, client


@client()
def voyage():
    asked = voyageai.Client(api_key=KEY, base_url=f"{URL}/v1").rerank(QUERY, DOCUMENTS, model=MODEL, top_k=TOP_N)
    return [(hit.index, hit.relevance_score, hit.document) for hit in asked.results]


@client()
def xinference():
    model = xinference_client.RESTfulClient(URL, api_key=KEY).get_model(MODEL)
    hits = model.rerank(DOCUMENTS, QUERY, top_n=TOP_N, return_documents=True)["results"]
    return [(hit["index"], hit["relevance_score"], hit["document"]["text"]) for hit in hits]


@client()
def rerankers_cohere():
    return by_rerankers("cohere", "/v1/rerank")


@client()
def rerankers_jina():
    return by_rerankers("jina", "/v1/rerank")


@client()
def rerankers_voyage():
    return by_rerankers("voyage", "/v1/rerank")


@client()
def rerankers_tei():
    return by_rerankers("text-embeddings-inference", "/rerank")


@client()
def rerankers_mixedbread():
    return found_by(APIRanker(MODEL, KEY, "mixedbread.ai", url=f"{URL}/v1/reranking"))


@client()
def rerankers_pinecone():
    return by_rerankers("pinecone", "/rerank")


def by_rerankers(provider, path):
    return found_by(Reranker(MODEL, model_type=provider, api_key=KEY, url=URL + path))


def found_by(ranker):
    found = ranker.rank(QUERY, DOCUMENTS, doc_ids=list(range(len(DOCUMENTS)))).top_k(TOP_N)
    return [(hit.document.doc_id, hit.score, hit.document.text) for hit in found]


@client()
def agno_cohere():
    given = [agno.knowledge.document.Document(content=text, id=str(place)) for place, text in enumerate(DOCUMENTS)]
    reranker = CohereReranker(model=MODEL, top_n=TOP_N, cohere_client=cohere.Client(KEY, base_url=URL))
    return [(int(hit.id), hit.reranking_score, hit.content) for hit in reranker.rerank(QUERY, given)]


answer()
