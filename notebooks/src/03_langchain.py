# %% [markdown] lang="en"
# # 3 · LangChain
#
# A reranker is one object more in a LangChain program. Here it is in the three places where people put it: behind any retriever, inside `ContextualCompressionRetriever`, and as a step of a chain; and the trap in the second one.

# %% [markdown] lang="zh"
# # 3 · LangChain
#
# 在 LangChain 程序里加重排，只多一个对象。这一节把它放进大家常放的三个位置：任意检索器后面、`ContextualCompressionRetriever` 里、链的一步；顺便看看第二个位置的坑。

# %%
MODEL = "mini"  # the real one: "Qwen/Qwen3-Reranker-0.6B"
EMBEDDER = "mini"  # the real one: "Qwen/Qwen3-Embedding-0.6B"

# %% [markdown] lang="en"
# > All results below are those of `mini`, a small pair that ships with the package; it is not Qwen3-Reranker. Change the two lines above for the real models.
#
# We start from what you already have: a LangChain vector store. This one lives in memory; yours may be Milvus, Qdrant, pgvector or Elasticsearch, and nothing below changes.

# %% [markdown] lang="zh"
# > 下面的结果都出自随包附带的小模型 `mini`，不代表 Qwen3-Reranker。改掉上面两行，就换成真模型。
#
# 从你手头已有的东西开始：一个 LangChain 向量库。这里用内存版；换成 Milvus、Qdrant、pgvector 或 Elasticsearch，下面的代码都不用改。

# %%
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import InMemoryVectorStore

from qwen_rerank import load_embedder, load_scorer
from qwen_rerank.samples import load_encyclopedia


class OurEmbeddings(Embeddings):
    """An embedder of this package, for LangChain."""

    def __init__(self, name):
        self.embedder = load_embedder(name)

    def embed_documents(self, texts):
        return self.embedder.embed_documents(texts).tolist()

    def embed_query(self, text):
        return self.embedder.embed_queries([text])[0].tolist()


sample = load_encyclopedia("en")  # about 500 sentences of Wikipedia
vector_store = InMemoryVectorStore(OurEmbeddings(EMBEDDER))
vector_store.add_documents(
    [Document(id=d.id, page_content=d.text, metadata=dict(d.metadata)) for d in sample.documents]
)
query = "What surrounds chloroplasts?"
right = sample.relevant[query]
print(query)

# %% [markdown] lang="en"
# ## 1. Behind any retriever

# %% [markdown] lang="zh"
# ## 1. 接在任意检索器后面

# %%
from qwen_rerank.langchain import QwenRerankCompressor, QwenRerankRetriever

scorer = load_scorer(MODEL)  # loaded once, shared by everything below
retriever = QwenRerankRetriever(base_retriever=vector_store.as_retriever(), scorer=scorer, k=3, fetch_k=20)
print(f"reranked by {MODEL}")
for document in retriever.invoke(query):
    mark = "✓" if document.id == right else " "
    print(f"{document.metadata['relevance_score']:.3f} {mark} {' · '.join(document.page_content.splitlines())[:100]}")

# %% picture=true
import matplotlib.pyplot as plt

N_SHOWN = 8
before = [document.id for document, _ in vector_store.similarity_search_with_score(query, k=20)]
after = retriever.invoke(query, k=20)
figure, axes = plt.subplots(figsize=(8, 3.8), layout="constrained")
for now, document in enumerate(after, start=1):
    was = before.index(document.id) + 1
    if now > N_SHOWN:
        continue
    color = "tab:green" if document.id == right else "tab:blue" if now <= 3 else "lightgray"
    axes.plot([0, 1], [was, now], color=color, marker="o", linewidth=3 if document.id == right else 1.5)
    text = document.page_content.split("\n", 1)[1]
    label = f"{now}  {'✓ ' if document.id == right else ''}{document.metadata['title']}: {text[:52]}…"
    axes.annotate(label, (1, now), xytext=(8, -3), textcoords="offset points", fontsize=8)
    axes.annotate(was, (0, was), xytext=(-8, -3), textcoords="offset points", ha="right", fontsize=8)
axes.axhline(3.5, color="tab:orange", linestyle="--", linewidth=1)
axes.annotate("above: what the LLM gets", (5, 3.5), xytext=(-4, 3), textcoords="offset points", ha="right", fontsize=7)
lowest = max(before.index(document.id) + 1 for document in after[:N_SHOWN])
axes.set(xlim=(-0.2, 5), ylim=(max(lowest, N_SHOWN) + 0.5, 0.5), xticks=[0, 1], yticks=[])
axes.set_xticklabels(["vector store", f"read by {MODEL}"], fontsize=8)
axes.set_title(query, loc="left", fontsize=10)
axes.spines[:].set_visible(False)

# %% [markdown] lang="en"
# `k` counts the answers and `fetch_k` the candidates: 20 are fetched, 3 come back. The answers are copies of your documents with all their metadata, and `metadata["relevance_score"]` added. Behind a `FaissStore` (`first_stage=` instead of `base_retriever=`) you also get `metadata["retrieval_score"]`, what the first stage thought.
#
# ## 2. In `ContextualCompressionRetriever`
#
# The classic way. Mind the trap: a `k` in the call goes to the **base** retriever, so the reranker gets three candidates and has nothing left to choose from. Nobody tells you; the answers are only worse. Let us count what the reranker really sees:

# %% [markdown] lang="zh"
# `k` 是要几个答案，`fetch_k` 是要多少候选：取 20 个，留 3 个。返回的是你的文档的副本，元数据原样保留，外加 `metadata["relevance_score"]`。如果第一阶段是 `FaissStore`（用 `first_stage=` 代替 `base_retriever=`），还会有 `metadata["retrieval_score"]`，即第一阶段给的分。
#
# ## 2. 放进 `ContextualCompressionRetriever`
#
# 老写法。注意这个坑：调用时写的 `k` 会传给**底层**检索器，重排只拿到三个候选，等于没得选。没有任何提示，只是答案变差。我们数一数重排究竟看到了几个：

# %%
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_core.callbacks import BaseCallbackHandler


class CountCandidates(BaseCallbackHandler):
    """Prints how many documents go into the step called "rerank"."""

    def on_chain_start(self, serialized, inputs, *, name=None, **kwargs):
        if name == "rerank":
            print(f"  the reranker sees {len(inputs['documents'])} candidates")


compressor = QwenRerankCompressor(scorer=scorer, top_n=3)
classic = ContextualCompressionRetriever(
    base_retriever=vector_store.as_retriever(search_kwargs={"k": 20}), base_compressor=compressor
)
watch = {"callbacks": [CountCandidates()]}
print("classic.invoke(query)")
classic.invoke(query, config=watch)
print("classic.invoke(query, k=3)   # the trap")
classic.invoke(query, config=watch, k=3)
print("retriever.invoke(query, k=3) # QwenRerankRetriever")
_ = retriever.invoke(query, config=watch, k=3)

# %% [markdown] lang="en"
# Set `top_n` on the compressor and leave `k` alone; or use `QwenRerankRetriever`, where `k` means what you think. The counter worked because the rerank step is a run of its own, called `rerank`, so you will also find it in LangSmith or any other tracer.
#
# ## 3. As a step of a chain

# %% [markdown] lang="zh"
# 要么在 compressor 上设 `top_n`、别碰 `k`；要么用 `QwenRerankRetriever`，它的 `k` 就是字面意思。能数出来，是因为重排在追踪里是单独的一步，名叫 `rerank`，在 LangSmith 等工具里也看得到。
#
# ## 3. 当作链的一步

# %%
from langchain_core.language_models import FakeListChatModel
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableParallel, RunnablePassthrough

rerank = (
    RunnableParallel(documents=vector_store.as_retriever(search_kwargs={"k": 20}), query=RunnablePassthrough())
    | compressor.as_runnable()
)


def as_text(documents):
    return "\n".join(
        f"[{document.metadata['title']}] {document.page_content.splitlines()[1]}" for document in documents
    )


prompt = ChatPromptTemplate.from_template("Answer from these notes:\n{notes}\n\nQuestion: {question}")
llm = FakeListChatModel(responses=["(put your chat model here)"])
chain = {"notes": rerank | as_text, "question": RunnablePassthrough()} | prompt | llm | StrOutputParser()
print(chain.invoke(query))
print("---")
print(prompt.invoke({"notes": as_text(rerank.invoke(query)), "question": query}).to_string())

# %% [markdown] lang="en"
# Everything here also works with `await` (`ainvoke`, `abatch`, `astream`): concurrent calls meet in the scorer and are computed in one batch.
#
# ## The other way round
#
# A LangChain retriever can also be the first stage of this package, so that evaluation, cascades and the server work over your existing index. This is all it takes:

# %% [markdown] lang="zh"
# 这里的一切都支持 `await`（`ainvoke`、`abatch`、`astream`）：并发的请求会在打分器里汇到一起，合成一批计算。
#
# ## 反过来用
#
# LangChain 检索器也可以当本包的第一阶段，这样评测、级联和服务都能直接用你现有的索引。三行就够：

# %%
from qwen_rerank import Reranker, TwoStageRetriever
from qwen_rerank.langchain import from_langchain

search = TwoStageRetriever(from_langchain(vector_store.as_retriever()), Reranker(scorer), top_k=20, top_n=1)
[hit] = search.retrieve(query)
print(
    f"{hit.document.text.splitlines()[1]}\nlog-odds {hit.log_odds:.2f} by {MODEL}, rank {hit.index + 1} in the first stage"
)

# %% [markdown] lang="en"
# **Next:** [4 · LlamaIndex](04_llama_index.ipynb)

# %% [markdown] lang="zh"
# **下一节：** [4 · LlamaIndex](04_llama_index.ipynb)
