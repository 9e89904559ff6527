# %% [markdown] lang="en"
# # 5 · Long documents
#
# A model reads a limited number of tokens at once. What happens to the rest of a long document decides whether it is found at all, and most programs cut it off without saying so. Here you see the cut, and the other way: reading in windows.

# %% [markdown] lang="zh"
# # 5 · 长文档
#
# 模型一次能读的 token 有限。文档超出的部分怎么处理，直接决定它能不能被找到；而大多数程序只是悄悄截掉。这一节让你看见这一刀切在哪里，以及另一种办法：分窗口读。

# %%
MODEL = "mini"  # the real one: "Qwen/Qwen3-Reranker-0.6B"

# %% [markdown] lang="en"
# > All results below are those of `mini`, a small pair that ships with the package; it is not Qwen3-Reranker. Change the line above for the real model. It reads 256 tokens at once (`max_length=256`), so that a document of two pages is already too long. The real models read 8,192 tokens by default; the picture is the same, with longer documents.

# %% [markdown] lang="zh"
# > 下面的结果都出自随包附带的小模型 `mini`，不代表 Qwen3-Reranker。改掉上面一行，就换成真模型。它一次只读 256 个 token（`max_length=256`），两页纸就算长文档了。真模型默认读 8192 个 token，道理一样，只是文档更长。

# %%
import matplotlib.pyplot as plt

from qwen_rerank import Reranker, load_scorer
from qwen_rerank.samples import load_sample

sample = load_sample("en")
query = "why does my bread come out heavy and dense"
answer = next(document.text for document in sample.documents if document.id == "en/br-1")
others = [document.text for document in sample.documents if document.id.split("/")[1][:2] not in ("br", "gd")]


def handbook(place):
    """Return a handbook with the answer as its paragraph number `place`."""
    return "\n\n".join([*others[:place], answer, *others[place:]])


scorer = load_scorer(MODEL, max_length=256)
places = range(len(others) + 1)
[fit] = scorer.fit(query, [handbook(0)])
print(f"{len(handbook(0))} characters, at least {fit.tokens} tokens; beside this query there is room for {fit.room}")

# %% [markdown] lang="en"
# ## Where the answer stands decides
#
# We take one handbook of short texts about everything, and put the one paragraph that answers the question first, second, third … and last. Then we score the handbook in both ways.

# %% [markdown] lang="zh"
# ## 答案在哪儿，结果就在哪儿
#
# 拿一本什么都讲一点的手册，把唯一能回答问题的那一段依次放在第一、第二、第三……直到最后，再用两种方式给整本手册打分。

# %%
curves = {}
for strategy in ("truncate", "windows"):
    reranker = Reranker(scorer, long_documents=strategy)
    hits = reranker.rerank(query, [handbook(place) for place in places])
    curves[strategy] = [hit.log_odds for hit in sorted(hits, key=lambda hit: hit.index)]
alone = scorer.score(query, [answer])[0]
without = Reranker(scorer, long_documents="windows").rerank(query, ["\n\n".join(others)])[0].log_odds

# %% picture=true
where = [handbook(place).index(answer) for place in places]
figure, axes = plt.subplots(figsize=(7.5, 3.4), layout="constrained")
axes.axvspan(0, fit.kept_chars, color="tab:orange", alpha=0.12, linewidth=0)
axes.annotate(
    "what truncation keeps",
    (0, 0),
    xycoords=("data", "axes fraction"),
    xytext=(4, 4),
    textcoords="offset points",
    fontsize=8,
    color="tab:orange",
)
axes.set_title(f"{query}   ({MODEL})", loc="left", fontsize=10)
axes.plot(where, curves["truncate"], "o-", color="tab:orange", label="truncate")
axes.plot(where, curves["windows"], "o-", color="tab:blue", label="windows")
axes.axhline(alone, color="gray", linestyle=":", linewidth=1, label="the paragraph alone")
axes.axhline(without, color="gray", linestyle="--", linewidth=1, label="windows, handbook without the answer")
figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=4)
axes.set(xlabel="where the answer begins (characters from the start)", ylabel="log-odds of the handbook")
axes.spines[["top", "right"]].set_visible(False)

# %% [markdown] lang="en"
# Orange falls off a cliff: behind the cut, the answer does not exist, and the score says "irrelevant". Blue does not care where the answer stands.
#
# Nothing is cut in silence here: `truncated` says that it happened. And only the *document's end* is ever cut, never the query and never the end of the prompt. (Cutting the finished prompt, as some servers do, removes the place where the model is asked for its answer; scores are then noise.)

# %% [markdown] lang="zh"
# 橙线直接掉下悬崖：切掉之后，答案就等于不存在，模型就说“不相关”。蓝线则完全不在乎答案在哪儿。
#
# 本包不会悄悄截断：`truncated` 会告诉你。而且切的永远只是*文档的末尾*，不会切查询，也不会切提示词的结尾。（有些服务直接截断拼好的整段提示词，连让模型作答的位置都切没了，分数就成了噪声。）

# %%
[cut] = Reranker(scorer).rerank(query, [handbook(20)])
print(f"truncate: log-odds {cut.log_odds:6.2f}, truncated={cut.truncated}, windows={cut.windows}")
[hit] = Reranker(scorer, long_documents="windows").rerank(query, [handbook(20)])
print(f"windows:  log-odds {hit.log_odds:6.2f}, truncated={hit.truncated}, windows={hit.windows}")

start, end = hit.best_window
print(f"\ncharacters {start} to {end} gave the score:\n")
print(handbook(20)[start:end].strip())

# %% [markdown] lang="en"
# `best_window` is a span of *your* text, so it can be highlighted, quoted, or handed to an LLM instead of the whole document. Windows end at sentences where they can, and neighbours overlap a little (`window_overlap=0.1`), so that no sentence is lost between two of them.
#
# ## One score out of many windows

# %% [markdown] lang="zh"
# `best_window` 是*你的*原文里的一段区间，可以高亮、引用，或者只把这一段交给 LLM。窗口尽量在句末收尾，相邻窗口略有重叠（`window_overlap=0.1`），不会有句子掉进缝里。
#
# ## 多个窗口，怎么合成一个分

# %%
text = handbook(20)
step = (end - start) // 4
starts = list(range(0, len(text) - (end - start) + step, step))
sliding = scorer.score(query, [text[s : s + end - start] for s in starts])

figure, axes = plt.subplots(figsize=(7.5, 2.6), layout="constrained")
axes.fill_between(
    [s + (end - start) / 2 for s in starts], sliding, min(sliding), color="tab:blue", alpha=0.25, linewidth=0
)
for aggregate in ("max", "topk-mean", "mean", "first"):
    [folded] = Reranker(scorer, long_documents="windows", aggregate=aggregate).rerank(query, [text])
    axes.axhline(folded.log_odds, color="gray", linewidth=1, linestyle=":")
    axes.annotate(
        f"{aggregate} {folded.log_odds:.1f}",
        (1, folded.log_odds),
        xycoords=("axes fraction", "data"),
        fontsize=8,
        va="center",
    )
axes.axvspan(text.index(answer), text.index(answer) + len(answer), color="tab:green", alpha=0.3, linewidth=0)
axes.set(
    xlabel="middle of the window (characters); green: the answer", ylabel=f"log-odds by {MODEL}", xlim=(0, len(text))
)
axes.spines[["top", "right"]].set_visible(False)

# %% [markdown] lang="en"
# - `max`: one good passage makes a document relevant. The right choice for questions and answers, and the default.
# - `mean`, `topk-mean`: the document as a whole has to be about the query. For "find similar contracts".
# - `first`: only the beginning counts, where that is what your documents are like (abstracts, news).
#
# One warning about `max`: a longer document has more tickets in the lottery. If very long documents win too often on your data, try `topk-mean`, and measure ([notebook 6](06_evaluate_and_choose.ipynb)); a calibration or threshold belongs to one strategy and is refused by any other.
#
# ## What it costs

# %% [markdown] lang="zh"
# - `max`：有一段答得好，整篇就算相关。问答场景该用它，也是默认值。
# - `mean`、`topk-mean`：要求整篇都在讲这件事，适合“找相似合同”之类。
# - `first`：只看开头，适合摘要、新闻这类开头就是重点的文档。
#
# 提醒一句：用 `max` 时，文档越长，抽中好分的机会越多。如果在你的数据上特别长的文档总是占便宜，试试 `topk-mean`，再测一测（[第 6 节](06_evaluate_and_choose.ipynb)）。校准和阈值只对一种策略有效，换了策略会被拒绝。
#
# ## 代价是多少

# %%
whole = sum(one.tokens for one in scorer.fit(query, text.split("\n\n")))
print(f"tokens of this document that are read: {fit.room} (truncate), about {whole} plus the overlap (windows)")
for name, one in (("English", answer), ("Chinese", load_sample("zh").documents[0].text)):
    print(f"{name}: {scorer.fit('q', [one])[0].tokens / len(one):.2f} tokens a character with the tokenizer of {MODEL}")

# %% [markdown] lang="en"
# Windows read everything, so they cost what the length costs. Two dials: `window_tokens` makes windows shorter than the model's limit (worth trying: a passage about one thing is easier to judge than thirty pages about ten), and a smaller `top_k` makes fewer documents. With the official tokenizer, count about 0.25 tokens a character for English, 0.6 to 0.7 for Chinese; `mini` has another vocabulary, see above.
#
# If a document that does not fit should be an error rather than a compromise, say so:

# %% [markdown] lang="zh"
# 分窗口就是全读，文档多长就花多少。有两个旋钮：`window_tokens` 让窗口比模型上限更短（值得一试：只讲一件事的一段，比讲十件事的三十页好判断）；`top_k` 调小，文档就少。用官方分词器，英文大约每字符 0.25 个 token，中文每字 0.6 到 0.7 个；`mini` 用的是另一个词表，见上。
#
# 如果放不下就该报错、不想将就，直接说：

# %%
from qwen_rerank import RerankError

try:
    Reranker(scorer, long_documents="error").rerank(query, [answer, handbook(20)])
except RerankError as error:
    print(f"{type(error).__name__}: {error}")

# %% [markdown] lang="en"
# With `on_error="last"` that one document goes to the end of the list with its `error`, and the others keep their scores: one over-long document never fails the whole request.
#
# **Next:** [6 · Evaluate, and choose](06_evaluate_and_choose.ipynb)

# %% [markdown] lang="zh"
# 设 `on_error="last"`，就只有这一篇带着 `error` 排到最后，其余照常打分：不会因为一篇超长，整个请求都失败。
#
# **下一节：** [6 · 评测与选择](06_evaluate_and_choose.ipynb)
