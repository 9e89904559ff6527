# %% [markdown] lang="en"
# # 2 · Two-stage search with FAISS
#
# A store of documents on disk, a search with a filter, a reranker behind it, and the one number that you have to choose: how many candidates the first stage hands over (`top_k`). At the end we damage the store and see what happens.

# %% [markdown] lang="zh"
# # 2 · 用 FAISS 做两阶段检索
#
# 把文档存到磁盘上，带条件检索，后面接重排，再选好唯一需要你拿主意的数字：第一阶段交出多少候选（`top_k`）。最后我们把存储弄坏，看看会怎样。

# %%
MODEL = "mini"  # the real one: "Qwen/Qwen3-Reranker-0.6B"
EMBEDDER = "mini"  # the real one: "Qwen/Qwen3-Embedding-0.6B"

# %% [markdown] lang="en"
# > All results below are those of `mini`, a small pair that ships with the package; it is not Qwen3-Reranker. Change the two lines above for the real models.

# %% [markdown] lang="zh"
# > 下面的结果都出自随包附带的小模型 `mini`，不代表 Qwen3-Reranker。改掉上面两行，就换成真模型。

# %%
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from qwen_rerank import Document, FaissStore, Reranker, RerankError, TwoStageRetriever, load_embedder
from qwen_rerank.samples import load_encyclopedia

samples = [load_encyclopedia(language) for language in ("en", "zh")]
documents = [
    Document(document.id, document.text, {"title": document.metadata["title"], "lang": sample.language})
    for sample in samples
    for document in sample.documents
]
embedder = load_embedder(EMBEDDER)
store = FaissStore.create("library", embedder=embedder)
store.add(documents)

reranker = Reranker(MODEL)
retriever = TwoStageRetriever(store, reranker, top_k=20, top_n=3)
print(f"{len(store)} sentences of Wikipedia; first stage: words and vectors of {EMBEDDER}; reranked by {MODEL}")
for hit in retriever.retrieve("What surrounds chloroplasts?"):
    title, text = hit.document.text.split("\n", 1)
    print(f"{hit.rank}. {hit.score:.3f} (was {hit.index + 1:>2})  {title}: {text[:90]}…")

# %% [markdown] lang="en"
# That is the whole thing: `FaissStore` recalls 20, `Reranker` keeps 3. `create` never opens an existing store and `open` never makes a new one, so a typo in a path is an error and not an empty result.
#
# ## How many candidates?
#
# The reranker can only reorder what it is given: if the right document is not among the `top_k`, it is lost. If `top_k` is large, every search costs more. To see the trade we need questions with known answers; the shipped sentences come with some; here are the 60 English ones.

# %% [markdown] lang="zh"
# 就这么多：`FaissStore` 召回 20 篇，`Reranker` 留下 3 篇。`create` 从不打开已有的存储，`open` 从不新建，所以路径写错会报错，而不是悄悄返回空结果。
#
# ## 要多少候选？
#
# 重排只能给拿到手的文档排序：正确的那篇若不在 `top_k` 里，就再也回不来了；`top_k` 太大，每次搜索又更贵。想看清这笔账，需要一批知道答案的问题；随包附带的这些句子正好配了一些，这里用 60 个英文的。

# %%
relevant = samples[0].relevant
found = [store.search(question, top_k=20) for question in relevant]
ranked = reranker.rerank_many(list(relevant), found)  # one scoring pass gives every depth

depths = [1, 2, 3, 5, 10, 20]
recalled, first = [], []
for depth in depths:
    recalled.append(np.mean([r in [c.document.id for c in hits[:depth]] for r, hits in zip(relevant.values(), found)]))
    best = [min((h for h in hits if h.index < depth), key=lambda h: h.rank) for hits in ranked]
    first.append(np.mean([hit.document.id == right for hit, right in zip(best, relevant.values())]))

# %% picture=true
figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
axes.plot(depths, recalled, "o--", color="tab:gray", label="found at all (recall)")
axes.plot(depths, first, "o-", color="tab:blue", label=f"first after {MODEL} has read the top_k")
axes.axhline(recalled[0], color="tab:orange", linewidth=1, label="first without reranking")
axes.set(
    xscale="log",
    xticks=depths,
    xticklabels=depths,
    xlabel="top_k",
    ylabel=f"share of {len(relevant)} questions",
    ylim=(0.6, 1.02),
)
axes.minorticks_off()
axes.legend(fontsize=8, loc="lower right", frameon=False)
axes.spines[["top", "right"]].set_visible(False)
for depth, share, right in zip(depths, recalled, first):
    print(f"top_k {depth:>2}: found {share:.3f}, first after {MODEL} {right:.3f}")

# %% [markdown] lang="en"
# The dashed line is a ceiling: no reranker gets above it. It flattens early, while the cost is a straight line: twice the candidates, twice the work. So: raise `top_k` until the dashed line stops paying, not because a tutorial said 100. Where the blue line falls while the dashed one still rises, the reranker is being fooled by the extra candidates; a bigger model helps there, more candidates do not.
#
# ## Two ways to find, in one store

# %% [markdown] lang="zh"
# 虚线是天花板，任何重排都越不过它。它很快就平了，而开销是一条直线：候选翻倍，计算翻倍。所以 `top_k` 加到虚线不再上升就够了，不必因为教程写了 100 就用 100。如果虚线还在升、蓝线却往下掉，说明多出来的候选把重排模型骗了：这时该换大一点的模型，而不是加候选。
#
# ## 一个存储，两种找法

# %%
for mode in ("dense", "lexical", "hybrid"):
    hits = store.search("蒸汽機的效率", top_k=3, mode=mode)
    print(f"{mode:8} {hits[0].score_kind} {hits[0].score:.3f}")
    for hit in hits:
        print("        ", " · ".join(hit.document.text.split("\n", 1))[:60])

# %% [markdown] lang="en"
# "dense" compares vectors, "lexical" ranks by common words (BM25); the default, "hybrid", fuses the two by their ranks and finds what either of them finds. The query above is written in traditional characters, the documents in simplified ones: for words they are the same. A fused score says nothing but the order, so every candidate tells in `score_kind` what its score is.
#
# ## Filters run before the search

# %% [markdown] lang="zh"
# "dense" 比较向量，"lexical" 按共有的词排序（BM25）；默认的 "hybrid" 按名次把两者融合，任何一种找到的都在里面。上面的查询是繁体，文档是简体：按词找时两者等同。融合得分只表示先后，所以每个候选都用 `score_kind` 说明自己的得分是什么。
#
# ## 先过滤，再检索

# %%
for filter in ({"lang": "zh"}, {"lang": {"$in": ["en", "fr"]}}, {"$not": {"lang": "zh"}}):
    hits = store.search("steam engine 蒸汽机", top_k=3, filter=filter)
    print(filter, [hit.document.metadata["title"] for hit in hits])

# %% [markdown] lang="en"
# The condition picks the rows in SQL and the search runs over those alone, so a filtered search still returns its full `top_k`. (Filtering *after* the search would have thrown away most of the candidates.) `retriever.retrieve(query, filter={...})` passes it through.
#
# ## Change, close, open again

# %% [markdown] lang="zh"
# 条件先用 SQL 选出行，向量检索只在这些行上做，所以带条件也能拿满 `top_k`。（要是检索*之后*再过滤，候选多半已经丢光了。）`retriever.retrieve(query, filter={...})` 会原样传下去。
#
# ## 修改、关闭、重新打开

# %%
first_id, other_id = documents[0].id, documents[1].id
store.upsert([Document(first_id, "A sentence of our own.", {"lang": "en"})])
print(store.delete([other_id, "no-such-id"]), "deleted")
try:
    FaissStore.open("library", embedder=embedder)
except RerankError as error:
    print(f"{type(error).__name__}: {error}")

store.close()
with FaissStore.open("library", embedder=embedder, read_only=True) as reader:
    print(len(reader), "documents;", reader.get([first_id])[0].text)

# %% [markdown] lang="en"
# One handle writes, any number read (`read_only=True`). When `add`, `upsert` or `delete` returns, the change is on the disk. The store also remembers which embedder made its vectors and refuses another one, because vectors of two models cannot be compared:

# %% [markdown] lang="zh"
# 同一时间只有一个句柄能写，读的不限（`read_only=True`）。`add`、`upsert`、`delete` 返回时，改动已经落盘。存储还记得向量是谁算的，换一个嵌入模型来打开会被拒绝，因为两个模型的向量没法比：

# %%
from qwen_rerank.testing import HashEmbedder

try:
    FaissStore.open("library", embedder=HashEmbedder())
except RerankError as error:
    print(f"{type(error).__name__}: {error}")

# %% [markdown] lang="en"
# ## Break it
#
# In the folder, SQLite holds the truth; the FAISS file is only an index over it. A damaged index is built again without a word. A damaged truth is an error, never a quietly shorter result.

# %% [markdown] lang="zh"
# ## 弄坏它
#
# 目录里 SQLite 是唯一的真相，FAISS 文件只是它上面的索引。索引坏了，重建就是，不打扰你；真相坏了，一定报错，绝不悄悄少给几条结果。

# %%
print(sorted(path.name for path in Path("library").iterdir()))
[index_file] = Path("library").glob("*.faiss")
index_file.write_bytes(b"damaged")
with FaissStore.open("library", embedder=embedder) as repaired:
    print("index damaged:", repaired.verify())

# %%
shutil.copytree("library", "damaged")
database = Path("damaged", "documents.sqlite3")
content = bytearray(database.read_bytes())
place = content.find("元朝".encode())
content[place : place + 6] = "青蛙".encode()
database.write_bytes(content)
try:
    FaissStore.open("damaged", embedder=embedder)
except RerankError as error:
    print(f"{type(error).__name__}: {error}")

# %% [markdown] lang="en"
# Two characters of one text were changed behind SQLite's back, and the store noticed. Nothing in it is ever unpickled, so a store that somebody sends you cannot run code on your machine either.
#
# ## A folder of files
#
# People have folders, not lists of documents. `sync_folder` reads Markdown, PDF, Word, slides, sheets, HTML, notebooks and code, cuts each file into passages that know their place, and names what it left out. Run again, it embeds only what changed.

# %% [markdown] lang="zh"
# 绕过 SQLite 改了一篇正文里的两个字，存储立刻发现了。另外它从不反序列化 pickle，所以别人发给你的存储也没法在你机器上执行代码。
#
# ## 一个装着文件的文件夹
#
# 手里有的多半是文件夹，不是文档列表。`sync_folder` 能读 Markdown、PDF、Word、幻灯片、表格、HTML、笔记本和代码，把每个文件切成知道自己出处的段落，没读的文件也一一说明。再跑一遍，只为改动过的重新计算向量。

# %%
from qwen_rerank.folders import sync_folder

notes = Path("笔记")
notes.mkdir()
Path(notes, "租约.md").write_text("# 租约\n\n## 到期\n\n租约六月三十日到期，要提前一个月通知房东。\n", encoding="utf-8")
Path(notes, "dog.txt").write_text("The dog eats at six.", encoding="utf-8")
Path(notes, "cat.png").write_bytes(b"\x89PNG\0")

with FaissStore.open_or_create("notes-store", embedder) as kept:
    report = sync_folder(kept, [notes])
    print(report.counts, *report.skipped)

    Path(notes, "dog.txt").write_text("The dog eats at seven.", encoding="utf-8")
    print(sync_folder(kept, [notes]).counts)

    [hit] = TwoStageRetriever(kept, reranker, top_n=1).retrieve("租约什么时候到期")
    print(hit.document.metadata["source"], "line", hit.document.metadata["line"], repr(hit.document.text))

# %% [markdown] lang="en"
# In a terminal the same is `qwen-rerank index 笔记 --store notes-store` and `qwen-rerank search notes-store "…"`.
#
# **When it grows:** up to 100,000 vectors, `index="auto"` compares with every one of them, which is exact. Beyond that it reads a part of them and is approximate; `store.tune()` measures how much of the exact answer that finds, and keeps the least effort that finds 95 %.
#
# **Next:** [3 · LangChain](03_langchain.ipynb)

# %% [markdown] lang="zh"
# 在终端里，同样的事是 `qwen-rerank index 笔记 --store notes-store` 和 `qwen-rerank search notes-store "…"`。
#
# **数据多了以后：** 十万个向量以内，`index="auto"` 会和每一个都比一遍，结果精确。再多就只读其中一部分，是近似的；`store.tune()` 会测出它找到了精确结果的多少，并保留够到 95 % 的最小开销。
#
# **下一节：** [3 · LangChain](03_langchain.ipynb)
