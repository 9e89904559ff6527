# %% [markdown] lang="en"
# # 8 · Make it fast
#
# Most slow rerankers are not slow models; they are models that are asked badly. Four dials: what is computed, how much is asked at once, by how many callers, and how many documents there are to begin with.

# %% [markdown] lang="zh"
# # 8 · 跑得更快
#
# 多数重排慢，不是模型慢，而是问的方式不对。四个旋钮：到底算了什么、一次问多少、多少人同时问，以及一开始有多少文档。

# %%
MODEL = "pocket"  # the real one: "Qwen/Qwen3-Reranker-0.6B"

# %% [markdown] lang="en"
# > `pocket` stands in here, a tiny model of Qwen3-Reranker's shape, because the subject is the engine that computes such a model. **It is for learning and tests, ranks badly, and is not Qwen3-Reranker.** All times are of the small machine that made this page; run it on yours. A model a hundred times larger spends less of its time on overhead, so batching gains it less on a CPU, and more on a GPU.

# %% [markdown] lang="zh"
# > 这里用的是 `pocket`：结构与 Qwen3-Reranker 相同的微型模型，因为这一节讲的是计算这类模型的引擎。**它只用来学习和跑测试，排序很差，不是 Qwen3-Reranker。**所有耗时都来自生成本页的小机器，请在你的机器上跑。真模型大上百倍，花在额外开销上的比例更小：在 CPU 上合批的收益会小一些，在 GPU 上会大一些。

# %%
import time
from concurrent.futures import ThreadPoolExecutor

import matplotlib.pyplot as plt
import numpy as np

from qwen_rerank import QwenScorer
from qwen_rerank.samples import load_sample

sample = load_sample("en")
texts = [document.text for document in sample.documents]
queries = [document.metadata["title"] for document in sample.documents[:12]]
scorer = QwenScorer(MODEL)
scorer.score(queries[0], texts)  # warm up


def seconds(work, repeats=3):
    """Return the best of a few runs."""
    runs = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        runs.append(time.perf_counter() - started)
    return min(runs)


# %% [markdown] lang="en"
# ## 1. Do not compute the same thing twice
#
# All prompts of one query begin alike: system text, instruction, query. Written out one below the other and padded to the longest, as in most examples, that beginning is computed again for every document, and so is the padding. Count the tokens:

# %% [markdown] lang="zh"
# ## 1. 同样的东西别算两遍
#
# 同一条查询的所有提示词，开头都一样：系统文字、指令、查询。像多数示例那样一条条排好、补齐到最长，每篇文档都要把这段开头重算一遍，补齐的部分也白算。数一数 token：

# %%
from qwen_rerank.prompt import PromptEncoder
from qwen_rerank.scorers.qwen.checkpoint import load_checkpoint
from qwen_rerank.scorers.qwen.packing import group_prompts

checkpoint = load_checkpoint(MODEL)
encoder = PromptEncoder(checkpoint.tokenizer, spec=checkpoint.prompt_spec("transformers"))


def counted(query, documents):
    """Return tokens computed: padded to the longest, packed without padding, and with the common beginning shared."""
    prompts = [prompt.ids for prompt in encoder.encode(query, documents)]
    lengths = [len(prompt) for prompt in prompts]
    return max(lengths) * len(lengths), sum(lengths), group_prompts(prompts).tokens


counts = {
    name: counted(queries[0], batch)
    for name, batch in {"short texts": texts, "five times longer": [t * 5 for t in texts]}.items()
}

# %% picture=true
figure, axes = plt.subplots(figsize=(7.5, 2.8), layout="constrained")
for row, (padded, packed, shared) in enumerate(counts.values()):
    for start, width, color, label in (
        (0, shared, "tab:blue", "computed by this package"),
        (shared, packed - shared, "tab:orange", "the same beginning, again"),
        (packed, padded - packed, "lightgray", "padding"),
    ):
        axes.barh(row, width, left=start, color=color, label=label if row == 0 else None)
    axes.annotate(f"{padded / shared:.1f} times less work", (padded, row), xytext=(6, -3), textcoords="offset points")
figure.legend(frameon=False, ncols=3, loc="outside upper center", fontsize=9)
axes.invert_yaxis()
axes.set(
    yticks=[0, 1],
    yticklabels=counts,
    xlabel=f"tokens for one query with 36 documents ({MODEL})",
    xlim=(0, 1.35 * max(c[0] for c in counts.values())),
)
axes.spines[["top", "right"]].set_visible(False)

# %% [markdown] lang="en"
# Only the blue part is computed here. You need not do anything for it, but it tells you what to expect: **the shorter the documents, the larger the gain**; with long documents there is little to share. Also computed: only the last position's answer, and of it only the two words *yes* and *no*, not all 151,669.
#
# ## 2. Ask for much at once

# %% [markdown] lang="zh"
# 这里真正计算的只有蓝色部分。你什么都不用做，但要知道能指望多少：**文档越短，省得越多**；文档很长时，能共享的就不多了。另外，输出只算最后一个位置，而且只算 *yes*、*no* 两个词，而不是全部 151669 个。
#
# ## 2. 一次多问一些

# %%
some = texts[:12]
ways = {
    "one document a call": lambda: [scorer.score(query, [text]) for query in queries[:4] for text in some],
    "one query a call": lambda: [scorer.score(query, some) for query in queries[:4]],
    "score_many": lambda: scorer.score_many(queries[:4], [some] * 4),
}
speeds = {name: 4 * len(some) / seconds(work) for name, work in ways.items()}
figure, axes = plt.subplots(figsize=(7, 2), layout="constrained")
axes.bar_label(axes.barh(list(speeds), list(speeds.values()), color="tab:blue"), fmt=" %.0f")
axes.invert_yaxis()
axes.set(xlabel=f"documents a second ({MODEL}, this machine)")
axes.spines[["top", "right"]].set_visible(False)

# %% [markdown] lang="en"
# One document a call is the worst you can do: nothing is shared and the device idles between calls. For a data set use `score_many` (or `Reranker.rerank_many`, `TwoStageRetriever.retrieve_many`): all queries go in, and packs are filled across them.
#
# ## 3. Callers at the same time

# %% [markdown] lang="zh"
# 一次一篇是最糟的用法：什么都共享不了，设备在两次调用之间空转。批量任务用 `score_many`（或 `Reranker.rerank_many`、`TwoStageRetriever.retrieve_many`）：所有查询一起交进去，跨查询装包。
#
# ## 3. 多个调用者同时来


# %%
def ask(n_threads):
    """Ask 48 times for five documents from so many threads."""
    with ThreadPoolExecutor(n_threads) as pool:
        list(pool.map(lambda i: scorer.score(queries[i % 12], texts[i % 12 : i % 12 + 5]), range(48)))


alone, together = seconds(lambda: ask(1)), seconds(lambda: ask(8))
print(f"{MODEL}: 48 questions from 8 threads take {together / alone:.0%} of the time of one thread")

# %% [markdown] lang="en"
# One scorer, many callers: threads, coroutines (`ascore`) and requests of the server all meet in front of the same worker, which fills its next pack from whoever is waiting. So **share one scorer**; do not make one for each thread, and do not put a lock around it.
#
# How many tokens one pack holds is chosen for you (`token_budget`). Leave it alone unless memory is short: should a pack not fit after all, it is halved and tried again, and stays smaller from then on.
#
# ## 4. Ask for less

# %% [markdown] lang="zh"
# 一个打分器，许多调用者：线程、协程（`ascore`）和服务收到的请求，都排在同一个工作线程前面，它每次从所有等待者手里凑满下一批。所以**共用一个打分器**，别每个线程建一个，也别在外面加锁。
#
# 一批装多少 token 会自动选好（`token_budget`），除非内存紧张，不用管。万一真放不下，会自动减半重试，以后也就用小的。
#
# ## 4. 少问一些

# %%
for factor in (1, 3):
    longer = [text * factor for text in texts]
    computed = {n: counted(queries[1], longer[:n])[2] for n in (4, 8, 16, 32)}
    print(f"documents of {np.mean([len(text) for text in longer]):.0f} characters, tokens by top_k: {computed}")

# %% [markdown] lang="en"
# Work is `top_k` × length: twice the one or the other, twice the tokens. Nothing else you can do is as effective as halving one of them: choose `top_k` where recall flattens (notebooks 2 and 6), cut boilerplate from documents before they are indexed, and let a small model go first: `Cascade([Reranker(small, top_n=20), Reranker(large, top_n=10)])` lets the large one read only what the small one liked.
#
# ## The same score every time
#
# What else is in a pack changes a score by rounding, in the sixth digit or so (in bfloat16, in the second or third). Where that matters, `deterministic=True` gives the same bits whatever else is computed. It costs speed; how much is printed below:

# %% [markdown] lang="zh"
# 工作量就是 `top_k` × 长度：哪一个翻倍，token 就翻倍。没有什么比把其中一个减半更有效：`top_k` 取在召回变平的地方（第 2、6 节）；入库前去掉文档里的套话；先让小模型过一遍：`Cascade([Reranker(small, top_n=20), Reranker(large, top_n=10)])`，大模型只读小模型看中的。
#
# ## 每次分数都一样
#
# 同一批里还有什么别的文档，会因为舍入影响分数，大约在第六位有效数字（bfloat16 是第二、三位）。如果这一点要紧，`deterministic=True` 保证无论同时在算什么，结果逐位相同；代价是速度，慢多少下面会打印：

# %%
with QwenScorer(MODEL, deterministic=True) as exact:
    together, alone = exact.score(queries[0], texts), [exact.score(queries[0], [text])[0] for text in texts]
    print("deterministic: identical" if np.array_equal(together, alone) else "deterministic: different")
    slow = seconds(lambda: exact.score(queries[0], texts))
together, alone = scorer.score(queries[0], texts), [scorer.score(queries[0], [text])[0] for text in texts]
print(f"otherwise: up to {np.abs(together - np.array(alone)).max():.0e} apart")
print(f"it takes {slow / seconds(lambda: scorer.score(queries[0], texts)):.2f} times as long here")

# %% [markdown] lang="en"
# ## Checklist
#
# - One shared scorer; `score_many` for data sets; concurrent callers for traffic, or the server.
# - `top_k` no larger than recall needs, documents no longer than they must be.
# - A GPU where people wait. On a small CPU even 0.6B takes seconds for ten paragraphs ([figures](../../eval/speed/LOG.md)): fine for jobs over night. `qwen-rerank doctor` says what your machine has.
# - Several GPUs: one server each, `HttpScorer([url1, url2])` shares the work.
# - Measure on your machine, with your lengths, before believing anybody's figures, these included.

# %% [markdown] lang="zh"
# ## 清单
#
# - 共用一个打分器；批量任务用 `score_many`；线上流量靠并发调用，或者用服务。
# - `top_k` 够召回就行，文档别比需要的长。
# - 有人在等结果，就用 GPU。在小 CPU 上，即使是 0.6B，读十段文字也要好几秒（[数据](../../eval/speed/LOG.md)），适合夜里跑的批量任务。`qwen-rerank doctor` 会告诉你这台机器有什么。
# - 多块 GPU：每块起一个服务，`HttpScorer([url1, url2])` 自动分担。
# - 别急着信任何人的数字，包括这里的；先用你的文档长度，在你的机器上测。
