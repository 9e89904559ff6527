"""LlamaIndex's postprocessors."""

from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.postprocessor.cohere_rerank import CohereRerank
from llama_index.postprocessor.jinaai_rerank import JinaRerank
from llama_index.postprocessor.nvidia_rerank import NVIDIARerank
from llama_index.postprocessor.siliconflow_rerank import SiliconFlowRerank
from llama_index.postprocessor.tei_rerank import TextEmbeddingInference
from llama_index.postprocessor.xinference_rerank import XinferenceRerank
from told import DOCUMENTS, KEY, MODEL, QUERY, TOP_N, URL, answer, client


def ask(postprocessor):
    nodes = [NodeWithScore(node=TextNode(text=text, id_=str(place))) for place, text in enumerate(DOCUMENTS)]
    found = postprocessor.postprocess_nodes(nodes, query_str=QUERY)
    return [(int(hit.node.id_), hit.score, hit.node.text) for hit in found]


@client()
def cohere():
    return ask(CohereRerank(top_n=TOP_N, model=MODEL, api_key=KEY, base_url=URL))


@client()
def jina():
    return ask(JinaRerank(top_n=TOP_N, model=MODEL, api_key=KEY, base_url=f"{URL}/v1"))


@client()
def siliconflow():
    return ask(SiliconFlowRerank(top_n=TOP_N, model=MODEL, api_key=KEY, base_url=f"{URL}/v1/rerank"))


@client()
def tei():
    return ask(TextEmbeddingInference(top_n=TOP_N, base_url=URL, auth_token=f"Bearer {KEY}"))


@client()
def xinference():
    return ask(XinferenceRerank(top_n=TOP_N, model=MODEL, base_url=URL))


@client(log_odds=True)
def nvidia():
    return ask(NVIDIARerank(top_n=TOP_N, model=MODEL, api_key=KEY, base_url=f"{URL}/v1"))


answer()
