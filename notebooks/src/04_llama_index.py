# %% [markdown] lang="en"
# # 4 · LlamaIndex
#
# In LlamaIndex a reranker is a *node postprocessor*: `similarity_top_k` nodes come out of the index, `top_n` go into the answer. Here we add one, look at what it changes for 60 questions at once, and see which text of a node it really reads.

# %% [markdown] lang="zh"
# # 4 · LlamaIndex
#
# 在 LlamaIndex 里，重排是一个*节点后处理器*：索引取出 `similarity_top_k` 个节点，`top_n` 个进入回答。这一节加上它，在 60 个问题上看效果，再看看它读的到底是节点的哪段文字。

# %%
MODEL = "mini"  # the real one: "Qwen/Qwen3-Reranker-0.6B"
EMBEDDER = "mini"  # the real one: "Qwen/Qwen3-Embedding-0.6B"

# %% [markdown] lang="en"
# > All results below are those of `mini`, a small pair that ships with the package; it is not Qwen3-Reranker. Change the two lines above for the real models.

# %% [markdown] lang="zh"
# > 下面的结果都出自随包附带的小模型 `mini`，不代表 Qwen3-Reranker。改掉上面两行，就换成真模型。

# %%
from llama_index.core import VectorStoreIndex
from llama_index.core.embeddings import BaseEmbedding
from llama_index.core.llms import MockLLM
from llama_index.core.schema import MetadataMode, TextNode

from qwen_rerank import load_embedder, load_scorer
from qwen_rerank.llama_index import QwenRerankPostprocessor
from qwen_rerank.samples import load_encyclopedia

embedder = load_embedder(EMBEDDER)


class OurEmbedding(BaseEmbedding):
    """An embedder of this package, for LlamaIndex."""

    def _get_query_embedding(self, query):
        return embedder.embed_queries([query])[0].tolist()

    async def _aget_query_embedding(self, query):
        return self._get_query_embedding(query)

    def _get_text_embedding(self, text):
        return embedder.embed_documents([text])[0].tolist()


sample = load_encyclopedia("zh")  # 498 sentences of Wikipedia with 60 questions
nodes = [
    TextNode(
        id_=document.id,
        text=document.text.split("\n", 1)[1],
        metadata={"title": document.metadata["title"]},
    )
    for document in sample.documents
]
index = VectorStoreIndex(nodes, embed_model=OurEmbedding())

# %% [markdown] lang="en"
# ## The query engine, with two lines more

# %% [markdown] lang="zh"
# ## 查询引擎，多写两行

# %%
scorer = load_scorer(MODEL)
rerank = QwenRerankPostprocessor(scorer=scorer, top_n=3, keep_retrieval_score=True)
engine = index.as_query_engine(llm=MockLLM(), similarity_top_k=20, node_postprocessors=[rerank])
query = "药房技术员现在的新职责是什么?"
print(f"{query}   ({MODEL})")
for found in engine.query(query).source_nodes:
    print(f"{found.score:.3f} (cosine was {found.metadata['retrieval_score']:.3f})  {found.text[:40]}…")

# %% [markdown] lang="en"
# `keep_retrieval_score` keeps the first stage's score in the metadata, hidden from the embedding and from the LLM.
#
# ## What does it change, on more than one question?
#
# One example proves nothing. The shipped sentences come with 60 questions and the right sentence of each; we ask at which rank the right node stands, before and after. LlamaIndex has an evaluator for it, and it takes postprocessors:

# %% [markdown] lang="zh"
# `keep_retrieval_score` 会把第一阶段的分数留在元数据里，但不会进入嵌入文本，也不会给 LLM 看到。
#
# ## 只看一个问题不算数
#
# 一个例子证明不了什么。随包附带的句子配了 60 个问题，每个都知道正确的是哪一句；看正确的节点重排前后各排第几。LlamaIndex 自带评测器，可以接后处理器：

# %%
from llama_index.core.evaluation import RetrieverEvaluator

both = {}
for name, postprocessors in {
    "vector index": [],
    f"reranked by {MODEL}": [QwenRerankPostprocessor(scorer=scorer, top_n=10)],
}.items():
    evaluator = RetrieverEvaluator.from_metric_names(
        ["mrr", "hit_rate"],
        retriever=index.as_retriever(similarity_top_k=10),
        node_postprocessors=postprocessors,
    )
    both[name] = [await evaluator.aevaluate(text, expected_ids=[right]) for text, right in sample.relevant.items()]
    means = {
        metric: sum(r.metric_vals_dict[metric] for r in both[name]) / len(both[name]) for metric in ("mrr", "hit_rate")
    }
    print(f"{name:<17}", {metric: round(value, 3) for metric, value in means.items()})

# %% picture=true
import matplotlib.pyplot as plt

labels = ["1", "2", "3", "4-10", "not found"]


def place(result):
    ids = result.retrieved_ids
    return (
        "not found"
        if result.expected_ids[0] not in ids
        else (*labels[:3], *["4-10"] * 7)[ids.index(result.expected_ids[0])]
    )


figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
for shift, (name, results) in enumerate(both.items()):
    counts = [sum(place(result) == label for result in results) for label in labels]
    color = ("tab:gray", "tab:blue")[shift]
    bars = axes.bar([i + 0.4 * shift - 0.2 for i in range(5)], counts, width=0.38, label=name, color=color)
    axes.bar_label(bars, fontsize=8)
axes.legend(frameon=False)
axes.set(
    xticks=range(5),
    xticklabels=labels,
    xlabel="rank of the right node",
    ylabel=f"questions (of {len(sample.relevant)})",
)
axes.spines[["top", "right"]].set_visible(False)

# %% [markdown] lang="en"
# The last pair of bars is equal, and always will be: what the index did not find, no reranker brings back. `hit_rate` at 10 is therefore the same in both rows above; only the order inside the ten can improve. If the hit rate is your problem, raise `similarity_top_k` or improve the first stage.
#
# 60 questions are few. Whether such a difference is more than luck is the subject of [notebook 6](06_evaluate_and_choose.ipynb).
#
# ## Which text is read?
#
# A node has several faces. The reranker reads the one for embeddings (`MetadataMode.EMBED`), the same that your index was built on. So what you exclude there, the reranker does not see either, and what you leave in costs tokens in every call:

# %% [markdown] lang="zh"
# 最后一对柱子一样高，而且永远一样高：索引没找到的，重排变不出来。所以上面两行的 `hit_rate`（前 10）完全相同，能改善的只是这十个内部的顺序。要是命中率就不行，该加大 `similarity_top_k`，或者换更好的第一阶段。
#
# 60 个问题不多。这点差别是真是碰巧，[第 6 节](06_evaluate_and_choose.ipynb)专门讲。
#
# ## 它读的是哪段文字？
#
# 一个节点有好几副面孔。重排读的是用于嵌入的那一副（`MetadataMode.EMBED`），和建索引时一样。所以你在那里排除掉的，重排也看不到；留着的，每次调用都要花 token：

# %%
node = TextNode(
    text="猫狗等小型宠物不能带进车厢。", metadata={"title": "列车宠物托运", "file_path": "/a/very/long/path.pdf"}
)
print(node.get_content(MetadataMode.EMBED))
node.excluded_embed_metadata_keys = ["file_path"]
print("--- without file_path")
print(node.get_content(MetadataMode.EMBED))

# %% [markdown] lang="en"
# ## Save and load the settings
#
# `to_dict` describes the postprocessor and its scorer by configuration. No weights and no keys travel; the model loads on first use.

# %% [markdown] lang="zh"
# ## 保存和恢复设置
#
# `to_dict` 只记录后处理器和打分器的配置，不含权重和密钥；模型在第一次使用时才加载。

# %%
data = rerank.to_dict()
print({name: data[name] for name in ("class_name", "top_n", "keep_retrieval_score")})
again = QwenRerankPostprocessor.from_dict(data)
answers = again.postprocess_nodes(index.as_retriever(similarity_top_k=20).retrieve(query), query_str=query)
print([answer.node.text[:14] + "…" for answer in answers])

# %% [markdown] lang="en"
# Everything also works asynchronously (`engine.aquery`, `apostprocess_nodes`), and both of LlamaIndex's event systems see the rerank step.
#
# **Next:** [5 · Long documents](05_long_documents.ipynb)

# %% [markdown] lang="zh"
# 所有操作都有异步版（`engine.aquery`、`apostprocess_nodes`），LlamaIndex 的两套事件系统也都能看到重排这一步。
#
# **下一节：** [5 · 长文档](05_long_documents.ipynb)
