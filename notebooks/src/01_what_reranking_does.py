# %% [markdown] lang="en"
# # 1 · What reranking does
#
# A search has two rounds. The **first stage** looks at millions of documents and keeps a hundred; it must be quick, so it compares words, or vectors that were computed long before anybody asked. The **reranker** then reads each of these hundred *together with the question* and puts them in order. (Here it is twenty, so that a CPU is quick.)
#
# Here are both rounds on real questions: what the second one gains, how often, and where it does not help. Five minutes, no GPU, no download.

# %% [markdown] lang="zh"
# # 1 · 重排到底做了什么
#
# 一次搜索分两轮。**第一阶段（海选）** 面对上百万篇文档，只留下一百篇左右；它必须快，所以只比共有的词，或者事先算好的向量，那时候谁都还没提问。**重排（决赛）** 再把这一百篇逐篇和问题*放在一起读*，重新排出名次。（这一节只留二十篇，好让 CPU 也算得快。）
#
# 这一节用真实的问题把两轮走一遍：第二轮带来了什么，多久带来一次，什么时候帮不上忙。五分钟读完，不用显卡，不用下载。

# %%
MODEL = "mini"  # the real one: "Qwen/Qwen3-Reranker-0.6B"

# %% [markdown] lang="en"
# > `mini` is a small model that ships with the package and needs no torch: what you see below is its work, with its mistakes, and **not Qwen3-Reranker's**. Change the line above and everything below runs on the real model, but for two things that stay `mini`'s: the count over all 60 questions, and which questions are shown. Both come from a file in the package (`eval/demo.py` makes it).
#
# We search about 500 sentences of Wikipedia, with 60 questions whose right sentence is known; once in English, once in Chinese. (XQuAD-R, CC BY-SA 4.0. SQuAD, where its questions come from, was among the training data of the model that `mini` was grown from.)

# %% [markdown] lang="zh"
# > `mini` 是随包附带的小模型，不需要 torch。下面的结果都是它算的，对错都算它的，**不代表 Qwen3-Reranker**。把上面那行改掉，下面跑的就是真模型；只有两样始终是 `mini` 的：60 个问题的总计数，以及挑了哪几个问题来看。这两样都读自包里的一个文件（由 `eval/demo.py` 生成）。
#
# 要搜的是维基百科的约 500 个句子，配 60 个知道正确句子的问题；英文一遍，中文一遍。（XQuAD-R，CC BY-SA 4.0。这些问题出自 SQuAD，而 `mini` 的前身 e5 训练时用过 SQuAD。）

# %%
import matplotlib.pyplot as plt
import numpy as np
from scipy.stats import binomtest

from qwen_rerank import BM25Index, Reranker, TwoStageRetriever
from qwen_rerank.samples import load_demo_results, load_encyclopedia

reranker = Reranker(MODEL)
samples = {language: load_encyclopedia(language) for language in ("en", "zh")}
lines = {  # the first stage ranks by shared words; notebook 2 puts a store of vectors in its place
    language: TwoStageRetriever(BM25Index(sample.documents), reranker, top_k=20, top_n=20)
    for language, sample in samples.items()
}


def search(language, query):
    """Return both rounds of one search, and the number of the right sentence among the candidates."""
    rounds = lines[language].retrieve_rounds(query)
    right = samples[language].relevant[query]
    return rounds, next(i for i, candidate in enumerate(rounds.candidates) if candidate.document.id == right)


def sentence(hit, n_chars=84):
    """Return the beginning of a document without its title, which is the article's."""
    text = hit.document.text.split("\n", 1)[1]
    return text if len(text) <= n_chars else text[: n_chars - 1] + "…"


cases = load_demo_results()["bm25"][
    "cases"
]  # chosen by a rule: the right sentence rose the farthest to the first place …
helped = {language: cases[language][0] for language in ("en", "zh")}
not_helped = {language: cases[language][-1] for language in ("en", "zh")}  # … and, last, where it fell the farthest

# %% picture=true
plt.rcParams["font.family"] = [
    "DejaVu Sans",
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Serif CJK JP",
    "PingFang SC",
    "Microsoft YaHei",
]
figure, panels = plt.subplots(2, 1, figsize=(9, 5.6), layout="constrained")
for axes, (language, query) in zip(panels, helped.items()):
    rounds, right = search(language, query)
    n_shown = max(5, right + 1)
    for hit in rounds.ranked:
        was = hit.index + 1
        color, width = ("tab:green", 3) if hit.index == right else ("tab:gray", 1)
        if max(was, hit.rank) <= n_shown:
            axes.plot([0, 1], [was, hit.rank], color=color, linewidth=width, marker="o")
        elif hit.rank <= n_shown:  # from below what is drawn
            axes.plot(1, hit.rank, color=color, marker="o")
            axes.annotate(
                f"was {was}", (1, hit.rank), xytext=(-8, -3), textcoords="offset points", ha="right", fontsize=7
            )
        elif was <= n_shown:
            axes.plot(0, was, color=color, marker="o")
            axes.annotate(
                f"now {hit.rank}",
                (0, was),
                xytext=(8, -3),
                textcoords="offset points",
                fontsize=7,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            )
    for hit in rounds.ranked[:n_shown]:
        mark = "✓ " if hit.index == right else ""
        label = f"{hit.rank}  {mark}{sentence(hit, 84 if language == 'en' else 46)}"
        axes.annotate(label, (1, hit.rank), xytext=(8, -3), textcoords="offset points", fontsize=8)
    for was in range(1, n_shown + 1):
        axes.annotate(was, (0, was), xytext=(-8, -3), textcoords="offset points", ha="right", fontsize=8)
    axes.set(xlim=(-0.1, 4.6), ylim=(n_shown + 0.5, 0.5), xticks=[0, 1], yticks=[])
    axes.set_xticklabels(["shared words", f"read by {MODEL}"], fontsize=8)
    axes.set_title(query, loc="left", fontsize=10)
    axes.spines[:].set_visible(False)

# %% [markdown] lang="en"
# The green line is the right sentence; *was 10* says that it stood 10th before, too low to be drawn, and *now 11* that it is 11th now. Look at what stood above it in the first stage, and why:

# %% [markdown] lang="zh"
# 绿线是正确的那句；*was*、*now* 是画面之外的名次（原来第几、现在第几）。看看第一阶段把什么排在它上面，想想为什么：

# %%
for language, query in helped.items():
    rounds, right = search(language, query)
    print(f"{query}   ({MODEL})")
    for rank, candidate in enumerate(rounds.candidates[:3], start=1):
        print(f"  first stage {rank}. {sentence(candidate)}")
    hit = rounds.ranked[0]
    print(f"  reranked    1. {sentence(hit)}   (was {hit.index + 1}{', right' if hit.index == right else ''})\n")

# %% [markdown] lang="en"
# The first sentences repeat the question's words: *Mongol Empire*, *expansion*. The right one shares a single content word with it and says the rest in others: *the speed of expansion reached its peak* is *the most rapid expansion*, and *Genghis's successor Ögedei Khan* is *who*. Counting words cannot see that; a model that reads both texts together can.
#
# In the Chinese question the sentences in front speak of pharmacy technicians, word by word as it does; of those three the right one alone says what is **new** about their work **now**.
#
# ## One question proves nothing: all of them

# %% [markdown] lang="zh"
# 英文那题，排在前面的句子重复了问题里的词：*Mongol Empire*、*expansion*。正确的那句只和问题共有一个实词，其余换了说法：*扩张的速度达到顶峰* 就是 *最快的扩张*，*成吉思汗的继任者窝阔台* 就是 *谁*。只数共有的词看不出来，把两段放在一起读的模型看得出来。
#
# 中文那题，前面几句都逐字写着“药房技术员”，可这三句里只有对的那句讲的是他们**如今新的**职责。
#
# ## 一个问题不算数：全部数一遍

# %%
made = load_demo_results()  # by eval/demo.py; `qwen-rerank demo --all` counts the second kind again
for first_stage, counts in (("shared words", made["bm25"]["counts"]), ("words and vectors", made["counts"])):
    for language, count in counts.items():
        n, gained, lost = count["questions"], count["gained"], count["lost"]
        sign = binomtest(gained, changed := gained + lost)  # over the questions that changed
        low, high = changed * (2 * np.array(sign.proportion_ci()) - 1)  # Clopper and Pearson's
        print(
            f"{language}, first stage by {first_stage:<17}  right one first: {count['before']} → {count['after']} of {n} "
            f"by {made['model']}; {gained} better, {lost} worse; 95 % {low:+.1f} to {high:+.1f}, p = {sign.pvalue:.2f}"
        )

# %% [markdown] lang="en"
# Better and worse: questions whose right sentence came to the first place, or lost it. *p* says how often so uneven a split comes about by tossing a coin for each question that changed, and the 95 % interval says how large the true gain, in questions, may well be. So behind words *and* vectors this gain **cannot be told from chance**, and behind words alone it is a hint and no proof: most of these questions were easy, a better first stage leaves less to gain, and sixty are too few for a small gain. [The model's card](../../src/qwen_rerank/mini/README.md) has eight collections, large enough for narrower intervals.
#
# ## Where it does not help

# %% [markdown] lang="zh"
# better、worse 是正确的那句升到第一、或从第一掉下来的问题数；p 是说：如果有变化的每个问题都靠抛硬币决定好坏，出现这样悬殊的结果有多大可能；95 % 后面是相应的区间，单位是问题数。可见第一阶段既看词又看向量时，这点提升**和碰运气分不开**；只看词时也只是有苗头，还算不上证据：这些问题大多不难，第一阶段越好，能涨的越少，六十个问题又太少，看不出小的差别。[模型卡](../../src/qwen_rerank/mini/README.md)里有八个数据集，问题更多，区间更窄。
#
# ## 帮不上忙的时候

# %%
for language, query in not_helped.items():
    rounds, right = search(language, query)
    after = next(hit for hit in rounds.ranked if hit.index == right)
    print(f"{query}   ({MODEL})")
    print(f"  right, {right + 1} → {after.rank}: {sentence(after)}")
    print(f"  now first:    {sentence(rounds.ranked[0])}\n")

# %% [markdown] lang="en"
# Two kinds of failure. *The most successful indicator was developed for … Charles Porter by Charles Richard* is right, but torn out of its article it no longer says what kind of indicator it speaks of: the reranker reads the article's title and this sentence, nothing around it, and the sentence with *steam engine indicator* in it looks better, though it names nobody. That is our reading of one case; where the sentence before holds what the answer speaks of, longer passages are worth a try.
#
# In the Chinese question the sentence that now stands first answers it as well (*ruled Đại Việt in Vietnam*), and the labels name another one alone. Read what you count as an error before you blame a model.
#
# ## Why the second round can see more
#
# ```text
# first stage   query    ──▶ vector ─┐
#                                    ├─▶ cosine            the document was embedded without knowing the query:
#               document ──▶ vector ─┘                     microseconds a document, and details are gone
#
# reranker      query + document ──▶ model ──▶ yes / no?   every word of one sees every word of the other:
#                                                          milliseconds a document on a GPU, tens and more on a CPU:
#                                                          so only for a hundred, or twenty
# ```
#
# This is the text that a Qwen3-Reranker reads, the same for every size (`mini` reads the two texts as they are and has no prompt):

# %% [markdown] lang="zh"
# 两种失败。*The most successful indicator was developed for … Charles Porter by Charles Richard*（最成功的指示器由查尔斯·理查德为查尔斯·波特研制）是对的，可是从文章里单独摘出来，说的是哪种指示器就没了：重排模型只读到文章标题和这一句，前后文都没有，于是带着 *steam engine indicator* 字样的那句看起来更像答案，其实它谁也没提。这只是我们对一个例子的解读；答案说的是什么写在前一句里时，值得试试把段落切长一点。
#
# 中文那题，现在排第一的句子其实也答对了（“统治着越南大越”），只是标注里只认另一句。先读一读算成错误的例子，再怪模型。
#
# ## 为什么第二轮看得更细
#
# ```text
# 第一阶段   查询 ──▶ 向量 ─┐
#                           ├─▶ 余弦             算文档向量时还不知道会问什么：
#            文档 ──▶ 向量 ─┘                    每篇几微秒，但细节已经丢了
#
# 重排       查询 + 文档 ──▶ 模型 ──▶ yes / no？  两边的每个词都能看到对方的每个词：
#                                                GPU 上每篇几毫秒，CPU 上几十毫秒甚至更久，
#                                                所以只用在那一百篇（或二十篇）上
# ```
#
# Qwen3-Reranker 读到的就是下面这段文字，各种大小都一样（`mini` 直接读两段文本，没有提示词）：

# %%
from qwen_rerank.prompt import DEFAULT_INSTRUCTION, PromptSpec

prompt = PromptSpec()
print(prompt.prefix + prompt.body(DEFAULT_INSTRUCTION, helped["en"], "…the document…") + prompt.suffix)

# %% [markdown] lang="en"
# Qwen3-Reranker does not write an answer. We look at the one place where it would, and compare two words:
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
# Qwen3-Reranker 并不真的写出回答。我们只看它将要作答的那个位置，比较两个词：
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
rounds, _ = search("en", helped["en"])
figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
line = np.linspace(-10, 10, 400)
axes.plot(line, 1 / (1 + np.exp(-line)), color="lightgray")
axes.scatter(
    [hit.log_odds for hit in rounds.ranked],
    [hit.score for hit in rounds.ranked],
    color="tab:blue",
    zorder=2,
    label=f"scores of {MODEL}",
)
reported = np.array([0.9983, 0.9995])
spread = np.log(reported / (1 - reported))
axes.scatter(spread, reported, color="tab:red", zorder=2, label="a user's report: wrong city, right city")
for p, x, place in zip(reported, spread, ((4.2, 0.62), (7.4, 0.78))):
    axes.annotate(
        f"{p} is {x:.2f}", (x, p), xytext=place, fontsize=8, arrowprops={"arrowstyle": "-", "color": "tab:red"}
    )
axes.set(xlabel="log-odds", ylabel="score", xlim=(-10.5, 10.5), ylim=(-0.05, 1.1))
axes.legend(frameon=False, loc="center left", fontsize=8)
axes.spines[["top", "right"]].set_visible(False)

# %% [markdown] lang="en"
# Blue: the twenty candidates of the English question above, as `mini` scores them. Red: two scores from a user's report about Qwen3-Reranker, for the *wrong* city (0.9983) and the right one (0.9995). As probabilities they look alike; as log-odds they are more than one apart. So this package orders by log-odds, always, and hands out both: `hit.log_odds` and `hit.score`.
#
# It also shows why a rule such as "keep everything above 0.6", which you will find in tutorials, is not a rule: 0.6 would keep that wrong city. A threshold has to be **fitted on your own labels**; notebook 6 does it in ten lines.
#
# ## Is it worth it? It depends on your data

# %% [markdown] lang="zh"
# 蓝点是上面那个英文问题的二十个候选，由 `mini` 打分。红点来自一位用户对 Qwen3-Reranker 的反馈：*答错*的城市得 0.9983，答对的得 0.9995。看概率几乎一样，看对数几率差了一个多单位。所以本包永远按对数几率排序，两个值都给你：`hit.log_odds` 和 `hit.score`。
#
# 这也说明教程里常见的“大于 0.6 就保留”靠不住：按 0.6，那个错误的城市照样留下。阈值必须**用你自己的标注数据拟合**，第 6 节用十行代码做完。
#
# ## 值不值得加重排？看你的数据

# %%
# Of Qwen3-Reranker, published by its authors (README of QwenLM/Qwen3-Embedding): the top 100 of Qwen3-Embedding-0.6B, reranked.
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
axes.set_title(
    "published by the models' authors (README of QwenLM/Qwen3-Embedding), not measured here", loc="left", fontsize=8
)
axes.spines[["top", "right"]].set_visible(False)

# %% [markdown] lang="en"
# Read it honestly. The 0.6B model gains 4.0 points on English and 17 on long documents, but **0.3 on Chinese**, and it **loses 2.0 on code**. The 4B comes close to the 8B at half its size, and leads it on English. (The 77.45 that is often quoted is the 8B on **CMTEB-R**, the Chinese tasks; on MTEB-R it has 69.02, less than the 4B.) And MLDR, where the gain is largest, is among the sets that the model was trained on.
#
# A table of somebody else's documents cannot tell you what happens on yours. Measuring takes an afternoon and about fifty questions with a known answer: [notebook 6](06_evaluate_and_choose.ipynb).
#
# **Next:** [2 · Two-stage search with FAISS](02_two_stage_search.ipynb)

# %% [markdown] lang="zh"
# 老老实实看这张图：0.6B 在英文上涨 4.0 分，在长文档上涨 17 分，可是**中文只涨 0.3**，**代码反而掉 2.0**。4B 只有 8B 的一半大，却与它相差不多，英文上还略胜一筹。（常被引用的 77.45 是 8B 在 **CMTEB-R** 即中文任务上的成绩，不是 MTEB-R；MTEB-R 上 8B 是 69.02，还不如 4B。）另外，涨得最多的 MLDR 本身就在训练数据里。
#
# 别人的数据上的表格，说明不了你的数据上会怎样。自己测一次，只要一个下午和五十来个有标准答案的问题：[第 6 节](06_evaluate_and_choose.ipynb)。
#
# **下一节：** [2 · 用 FAISS 做两阶段检索](02_two_stage_search.ipynb)
