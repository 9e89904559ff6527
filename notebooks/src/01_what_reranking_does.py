# %% [markdown] lang="en"
# # 1 · What reranking does
#
# A search has two rounds. The **first stage** looks at millions of documents and keeps a hundred; it must be quick, so it compares vectors that were computed long before anybody asked. The **reranker** then reads each of these hundred *together with the question* and puts them in order.
#
# Here are both rounds on one query, and what the second one changes. Five minutes, no GPU, no download.

# %% [markdown] lang="zh"
# # 1 · 重排到底做了什么
#
# 一次搜索分两轮。**第一阶段（海选）** 面对上百万篇文档，只留下一百篇左右；它必须快，所以比的是事先算好的向量，那时候谁都还没提问。**重排（决赛）** 再把这一百篇逐篇和问题*放在一起读*，重新排出名次。
#
# 这一节就拿一条查询把两轮走一遍，看第二轮究竟改变了什么。五分钟读完，不用显卡，不用下载。

# %%
MODEL = "pocket"  # the real one: "Qwen/Qwen3-Reranker-0.6B"
EMBEDDER = "pocket"  # the real one: "Qwen/Qwen3-Embedding-0.6B"

# %% [markdown] lang="en"
# > `pocket` is a pair of models of a few megabytes that ships with the package. **It is for learning and tests; it is not Qwen3-Reranker**, and its mistakes are its own. Change the two lines above and everything below runs on the real models.

# %% [markdown] lang="zh"
# > `pocket` 是随包附带的一对小模型，只有几 MB，**只用来学习和跑测试，它不是 Qwen3-Reranker**，它犯的错也别算到 Qwen3-Reranker 头上。把上面两行改掉，下面的代码一个字不用动，跑的就是真模型。

# %%
import matplotlib.pyplot as plt
import numpy as np

from qwen_rerank import FaissStore, QwenScorer, Reranker, load_embedder
from qwen_rerank.samples import load_sample

sample = load_sample("zh")
query = sample.queries[0]
store = FaissStore.create("shop", embedder=load_embedder(EMBEDDER))
store.add(sample.documents)
reranker = Reranker(QwenScorer(MODEL))

candidates = store.search(query, top_k=10)
ranked = reranker.rerank(query, candidates)
print("query:", query)

# %% picture=true
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.8), width_ratios=[3, 2], layout="constrained")
for hit in ranked:
    was = candidates[hit.index].rank
    color = "tab:green" if hit.rank < was else "tab:red" if hit.rank > was else "tab:gray"
    left.plot([0, 1], [was, hit.rank], color=color, marker="o")
    left.annotate(f"{hit.document.id}  {was}", (0, was), xytext=(-8, -3), textcoords="offset points", ha="right")
    left.annotate(f"{hit.rank}  {hit.document.id}", (1, hit.rank), xytext=(8, -3), textcoords="offset points")
left.set(xlim=(-0.5, 1.5), xticks=[0, 1], xticklabels=["first stage", "reranked"], yticks=[], title="who moved")
left.spines[:].set_visible(False)
left.invert_yaxis()
right.barh([hit.document.id for hit in ranked], [hit.score for hit in ranked], color="tab:blue")
right.set(xlim=(0, 1), xlabel="P(yes)", title="the reranker's score")
right.spines[["top", "right"]].set_visible(False)
right.invert_yaxis()

# %%
for hit in ranked:
    was = candidates[hit.index].rank
    print(f"{hit.rank:>2} (was {was:>2})  {hit.score:.3f}  {hit.document.id:<7} {hit.document.metadata['title']}")

# %% [markdown] lang="en"
# Green lines went up, red ones went down. The query asks for a *mechanical keyboard for programmers* and the shop also sells membrane keyboards, gaming keyboards, a cleaning kit for mechanical keyboards, and texts in which a keyboard interrupt stops a Python program. To a vector all of that is "about keyboards". Only somebody who reads the query and the text together can say which of them a programmer would buy.
#
# ## Why the second round can see more
#
# ```text
# first stage   query    ──▶ vector ─┐
#                                    ├─▶ cosine            the document was embedded without knowing the query:
#               document ──▶ vector ─┘                     microseconds a document, and details are gone
#
# reranker      query + document ──▶ model ──▶ yes / no?   every word of one sees every word of the other:
#                                                          milliseconds a document, so only for a hundred
# ```
#
# This is the text that the model reads, the same for every Qwen3-Reranker:

# %% [markdown] lang="zh"
# 绿线是名次上升的，红线是下降的。查询要的是*适合程序员的机械键盘*，而店里还有薄膜键盘、电竞键盘、机械键盘清洁套装，甚至有一篇讲 Python 的“键盘中断”。在向量看来，这些统统“和键盘有关”；只有把查询和正文放在一起读，才分得清程序员会买哪一把。
#
# ## 为什么第二轮看得更细
#
# ```text
# 第一阶段   查询 ──▶ 向量 ─┐
#                           ├─▶ 余弦             算文档向量时还不知道会问什么：
#            文档 ──▶ 向量 ─┘                    每篇几微秒，但细节已经丢了
#
# 重排       查询 + 文档 ──▶ 模型 ──▶ yes / no？  两边的每个词都能看到对方的每个词：
#                                                每篇几毫秒，所以只用在那一百篇上
# ```
#
# 模型读到的就是下面这段文字，所有 Qwen3-Reranker 都一样：

# %%
from qwen_rerank.prompt import DEFAULT_INSTRUCTION, PromptSpec

prompt = PromptSpec()
print(prompt.prefix + prompt.body(DEFAULT_INSTRUCTION, query, "…the document…") + prompt.suffix)

# %% [markdown] lang="en"
# The model does not write an answer. We look at the one place where it would, and compare two words:
#
# $$\text{log-odds} = \text{logit}(\text{yes}) - \text{logit}(\text{no}) \qquad\qquad P(\text{yes}) = \frac{1}{1 + e^{-\text{log-odds}}}$$
#
# Two things that many articles get wrong:
#
# - **Do not build this text with `tokenizer.apply_chat_template`.** The templates in the model repositories were changed in 2026: they now drop the message that holds query and document, every pair gets the same score, and nothing raises an error. This package builds the prompt from constants.
# - **There is no need for `trust_remote_code=True`.** The model has no code of its own; the switch would let whoever can change the repository run programs on your machine. This package has no such switch.
#
# ## Compare log-odds, not probabilities

# %% [markdown] lang="zh"
# 模型并不真的写出回答。我们只看它将要作答的那个位置，比较两个词：
#
# $$\text{log-odds} = \text{logit}(\text{yes}) - \text{logit}(\text{no}) \qquad\qquad P(\text{yes}) = \frac{1}{1 + e^{-\text{log-odds}}}$$
#
# 有两件事，网上很多文章写错了：
#
# - **不要用 `tokenizer.apply_chat_template` 拼这段文字。** 2026 年模型仓库里的模板改过，新模板会把装着查询和文档的那条消息丢掉：每一对得分都一样，而且不报任何错。本包用常量拼提示词，从不读模板。
# - **不需要 `trust_remote_code=True`。** 这个模型没有自带代码；打开这个开关，等于让能改仓库的人在你的机器上执行程序。本包根本没有这个开关。
#
# ## 比较时看对数几率，别看概率

# %%
figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
line = np.linspace(-10, 10, 400)
axes.plot(line, 1 / (1 + np.exp(-line)), color="lightgray")
axes.scatter([hit.log_odds for hit in ranked], [hit.score for hit in ranked], color="tab:blue", zorder=2)
for p in (0.9983, 0.9995):
    x = np.log(p / (1 - p))
    axes.scatter(x, p, color="tab:red", zorder=2)
    axes.annotate(f"{p} is {x:.2f}", (x, p), xytext=(0, -28 if p < 0.999 else -14), textcoords="offset points")
axes.set(xlabel="log-odds", ylabel="P(yes)", ylim=(-0.05, 1.1))
axes.spines[["top", "right"]].set_visible(False)

# %% [markdown] lang="en"
# Blue: our ten candidates. Red: two scores from a user's report about the real model, for the *wrong* city (0.9983) and the right one (0.9995). As probabilities they look alike; as log-odds they are more than one apart. So this package orders by log-odds, always, and hands out both: `hit.log_odds` and `hit.score`.
#
# It also shows why a rule such as "keep everything above 0.6", which you will find in tutorials, is not a rule: 0.6 would keep that wrong city. A threshold has to be **fitted on your own labels**; notebook 6 does it in ten lines.
#
# ## Is it worth it? It depends on your data

# %% [markdown] lang="zh"
# 蓝点是刚才的十个候选。红点来自一位用户对真模型的反馈：*答错*的城市得 0.9983，答对的得 0.9995。看概率几乎一样，看对数几率差了一个多单位。所以本包永远按对数几率排序，两个值都给你：`hit.log_odds` 和 `hit.score`。
#
# 这也说明教程里常见的“大于 0.6 就保留”靠不住：按 0.6，那个错误的城市照样留下。阈值必须**用你自己的标注数据拟合**，第 6 节用十行代码做完。
#
# ## 值不值得加重排？看你的数据

# %%
# Published by the authors (README of QwenLM/Qwen3-Embedding): the top 100 of Qwen3-Embedding-0.6B, reranked.
tasks = ["MTEB-R\nEnglish", "CMTEB-R\nChinese", "MLDR\nlong documents", "MTEB-Code\ncode"]
first_stage = np.array([61.82, 71.02, 50.26, 75.41])
published = {
    "0.6B": np.array([65.80, 71.31, 67.28, 73.42]),
    "4B": np.array([69.76, 75.94, 69.97, 81.20]),
    "8B": np.array([69.02, 77.45, 70.19, 81.22]),
}
figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
for place, (size, values) in enumerate(published.items()):
    bars = axes.bar(np.arange(4) + 0.27 * (place - 1), values - first_stage, width=0.25, label=f"Qwen3-Reranker-{size}")
    axes.bar_label(bars, fmt="%+.1f", fontsize=7)
axes.axhline(0, color="gray", linewidth=1)
axes.legend(fontsize=8, frameon=False)
axes.set(xticks=range(4), xticklabels=tasks, ylabel="points over the first stage", ylim=(-4, 22))
axes.spines[["top", "right"]].set_visible(False)

# %% [markdown] lang="en"
# Read it honestly. The 0.6B model gains 4.0 points on English and 17 on long documents, but **0.3 on Chinese**, and it **loses 2.0 on code**. The 4B is the best all-rounder. (The 77.45 that is often quoted is the 8B on **CMTEB-R**, the Chinese tasks; on MTEB-R it has 69.02, less than the 4B.) And MLDR, where the gain is largest, is among the sets that the model was trained on.
#
# A table of somebody else's documents cannot tell you what happens on yours. Measuring takes an afternoon and a few dozen labels: [notebook 6](06_evaluate_and_choose.ipynb).
#
# **Next:** [2 · Two-stage search with FAISS](02_two_stage_search.ipynb)

# %% [markdown] lang="zh"
# 老老实实看这张图：0.6B 在英文上涨 4.0 分，在长文档上涨 17 分，可是**中文只涨 0.3**，**代码反而掉 2.0**。4B 最均衡。（常被引用的 77.45 是 8B 在 **CMTEB-R** 即中文任务上的成绩，不是 MTEB-R；MTEB-R 上 8B 是 69.02，还不如 4B。）另外，涨得最多的 MLDR 本身就在训练数据里。
#
# 别人的数据上的表格，说明不了你的数据上会怎样。自己测一次，只要一个下午和几十条标注：[第 6 节](06_evaluate_and_choose.ipynb)。
#
# **下一节：** [2 · 用 FAISS 做两阶段检索](02_two_stage_search.ipynb)

# %%
store.close()
