# %% [markdown] lang="en"
# # 6 · Evaluate, and choose
#
# Which first stage? How many candidates? Does the reranker help at all on *your* documents, what does it cost, and at which score should an answer be thrown away? Four questions that no published table can answer for you, and one afternoon that can.

# %% [markdown] lang="zh"
# # 6 · 评测与选择
#
# 第一阶段用哪个？要多少候选？重排在*你的*文档上到底有没有用、要花多少钱？分数低到多少就该扔掉？这四个问题，公开榜单回答不了，自己花一个下午就能回答。

# %%
MODEL = "mini"  # the real one: "Qwen/Qwen3-Reranker-0.6B"
EMBEDDER = "mini"  # the real one: "Qwen/Qwen3-Embedding-0.6B"
COLLECTION = None  # or a folder of your own in BEIR layout: corpus.jsonl, queries.jsonl, qrels/test.tsv
PRICE_PER_HOUR = 1.0  # of the machine this runs on, in your currency

# %% [markdown] lang="en"
# > All figures below are those of `mini`, a small pair that ships with the package; they say nothing about Qwen3-Reranker. What you can take home is the method.
#
# ## Labels: how many depends on how small a difference you want to see
#
# A label says: for this question, that document is right. The 506 English sentences of Wikipedia that ship with the package come with 60 of them. With 60 the interval around a gain is some ±0.05 wide, and a threshold stays a guess; the cell that draws the interval says how many questions ±0.02 takes. Labels of your own, `load_pairs` reads from a file with `{"query": …, "relevant": [ids]}` on each line.

# %% [markdown] lang="zh"
# > 下面的数字都出自随包附带的小模型 `mini`，不代表 Qwen3-Reranker。要学的是方法。
#
# ## 标注：想看清多小的差别，就要多少条
#
# 一条标注就是：对这个问题，那篇文档是对的。随包附带的 506 个英文维基百科句子配了 60 条。60 条的时候，提升的区间约有 ±0.05，阈值也只能估个大概；想缩到 ±0.02 要多少条，后面画区间的那一格会算出来。自己的标注放进文件，每行一个 `{"query": …, "relevant": [文档 id]}`，用 `load_pairs` 读。

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from qwen_rerank import Reranker, RerankError
from qwen_rerank.evaluation.collection import Collection, load_beir
from qwen_rerank.evaluation.stages import first_stage
from qwen_rerank.samples import load_encyclopedia


def labelled_samples():
    """Return the shipped English sentences with their questions as a collection."""
    sample = load_encyclopedia("en")
    queries = {f"q{number}": question for number, question in enumerate(sample.relevant)}
    qrels = {query: {sample.relevant[question]: 1} for query, question in queries.items()}
    return Collection("encyclopedia", "test", sample.documents, queries, qrels)


collection = load_beir(COLLECTION) if COLLECTION else labelled_samples()
print(f"{collection.name}: {len(collection.documents)} documents, {len(collection.queries)} questions")

# %% [markdown] lang="en"
# ## Which first stage, how many candidates, at what price?
#
# `sweep` tries everything with everything. Scoring is done once, to the greatest depth; all smaller depths follow from it. Times are measured apart, one question at a time, as a user waits for them. To compare models, instructions or ways of reading long documents, put more entries into the dictionary of rerankers.

# %% [markdown] lang="zh"
# ## 第一阶段用谁、要多少候选、花多少钱？
#
# `sweep` 把各种组合都跑一遍。打分只做一次，做到最深，浅的深度直接推出来；耗时另外测，一次一个问题，和用户等的时间一样。想比较不同的模型、指令或长文档策略，往 rerankers 字典里多放几项就行。

# %%
from qwen_rerank.evaluation.cache import ScoreCache
from qwen_rerank.evaluation.sweep import pareto, recommend, sweep

reranker = Reranker(MODEL)
stages = {
    name: first_stage(stage, collection, folder=Path("stores"))
    for name, stage in {"bm25": "bm25", "dense": EMBEDDER, "bm25+dense": f"bm25+{EMBEDDER}"}.items()
}
with ScoreCache("scores.db") as cache:  # kept on disk: a sweep that broke off goes on where it was
    outcomes = sweep(
        collection,
        stages,
        {MODEL: reranker},
        depths=(5, 10, 20),
        cache=cache,
        n_timed=5,
        price_per_hour=PRICE_PER_HOUR,
    )
for outcome in outcomes:
    print(
        f"{outcome.label:<28} nDCG@10 {outcome.means['nDCG@10']:.3f}  {outcome.p50_ms:6.1f} ms  {outcome.cost:.4f} for 1,000 searches"
    )

# %% picture=true
front = pareto(outcomes, primary="nDCG@10", price=lambda outcome: outcome.cost)
figure, axes = plt.subplots(figsize=(7.5, 3.6), layout="constrained")
for name, color in zip(stages, ("tab:orange", "tab:green", "tab:blue")):
    rows = [outcome for outcome in outcomes if outcome.first_stage == name]
    axes.plot([o.cost for o in rows], [o.means["nDCG@10"] for o in rows], "o-", color=color, alpha=0.4, label=name)
    for o in rows:
        axes.annotate(
            o.depth or "alone", (o.cost, o.means["nDCG@10"]), xytext=(3, 5), textcoords="offset points", fontsize=7
        )
axes.plot(
    [o.cost for o in front],
    [o.means["nDCG@10"] for o in front],
    "*",
    color="black",
    markersize=9,
    label="nothing is better and cheaper",
)
axes.legend(fontsize=8, frameon=False, loc="lower right")
axes.set(
    xscale="log", xlabel=f"cost of 1,000 searches at {PRICE_PER_HOUR} an hour", ylabel=f"nDCG@10 (reranked by {MODEL})"
)
axes.spines[["top", "right"]].set_visible(False)

# %%
print(recommend(outcomes, max_p95_ms=1000).sentence)

# %% [markdown] lang="en"
# The numbers at the dots are the candidates that were reranked. The stars are the settings worth talking about; everything below them is worse *and* dearer. `recommend` takes the fastest one that is **shown to lose next to nothing** (0.01) against the best; one that these questions merely cannot tell from it is named, not taken. What "shown" means is the subject of the next section.
#
# The cost is plain arithmetic: seconds of one search × 1,000 ÷ 3,600 × price of an hour. It holds for one search after another; a server that batches concurrent searches is cheaper ([notebook 8](08_make_it_fast.ipynb)).
#
# ## Is that difference real?

# %% [markdown] lang="zh"
# 点旁的数字是重排的候选数。带星的才值得讨论，其余的都*又差又贵*。`recommend` 选的是**有证据表明几乎不比最好的差**（不超过 0.01）的那些里最快的一个；只是这些问题分不出高下的，会点名，但不会选。什么叫“有证据”，下一节说。
#
# 成本就是简单的算术：一次搜索的秒数 × 1000 ÷ 3600 × 每小时价格。这是一个接一个搜的价；服务端把并发请求合批会更便宜（[第 8 节](08_make_it_fast.ipynb)）。
#
# ## 这点差别是真的吗？

# %%
from qwen_rerank.evaluation.significance import compare, mean_interval

by_label = {outcome.label: outcome for outcome in outcomes}
before, after = by_label["bm25+dense"], by_label[f"bm25+dense → {MODEL} @20"]
result = compare(before.per_query, {"reranked": after.per_query})["reranked"]
print(
    f"difference {result.difference:+.3f}, 95 % interval {result.low:+.3f} … {result.high:+.3f}, p = {result.p_value:.3f}"
)
print(f"better for {result.wins} questions, worse for {result.losses}, equal for {result.ties}")

deltas = np.array([after.per_query[query] - before.per_query[query] for query in collection.queries])
needed = (1.96 * deltas.std(ddof=1) / 0.02) ** 2  # the interval of a mean narrows with the root of their number
print(f"for an interval of ±0.02: about {needed:.0f} questions like these {len(deltas)}")
shuffled = np.random.default_rng(0).permutation(deltas)
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
ordered = np.sort(deltas)[::-1]
left.bar(range(len(ordered)), ordered, width=1, color=np.where(ordered > 0, "tab:blue", "tab:orange"))
left.set(xlabel="questions, most helped first", ylabel=f"change of nDCG@10 by {MODEL}")
for n in (5, 10, 20, 40, len(deltas)):
    low, high = mean_interval(shuffled[:n])
    right.plot([n, n], [low, high], color="tab:blue", linewidth=3)
    right.plot(n, shuffled[:n].mean(), "o", color="tab:blue")
right.axhline(0, color="gray", linewidth=1)
right.set(xlabel="questions measured", ylabel="mean change, 95 % interval")
for axes in (left, right):
    axes.spines[["top", "right"]].set_visible(False)

# %% [markdown] lang="en"
# Left: a mean hides that reranking helps some questions and hurts others. Right: the same comparison with the first 5, 10, 20 … questions only. With few questions the bar is long: it would have agreed with almost any story. **If the bar touches zero, you do not know yet**; you need more labels, not more decimals. When several settings are compared, `compare` also corrects for having looked many times (Holm).
#
# Now read the questions that were hurt. Ten minutes with them teach more than a week of tuning:

# %% [markdown] lang="zh"
# 左图：平均数看不出来，重排帮了一些问题，也害了一些。右图：同样的比较，只用前 5、10、20……个问题。问题少的时候线段很长，什么结论都能“支持”。**线段碰到零，就是还不知道**：该多标几条，而不是多写几位小数。同时比较好几种设置时，`compare` 还会做多重比较校正（Holm）。
#
# 然后把变差的问题读一遍，十分钟比调一星期参数更有收获：

# %%
from qwen_rerank.evaluation.experiment import recall, rerank_run, score_run
from qwen_rerank.evaluation.explain import largest_moves

found = recall(stages["bm25+dense"], collection, top_k=20)
with ScoreCache("scores.db") as cache:
    scores = score_run(reranker, collection, found.run, depth=20, cache=cache)
run = rerank_run(found.run, scores, depth=20)
_, hurt = largest_moves(collection, (found.run, before.per_query), (run, after.per_query), n=3)
for move in hurt:
    print(
        f"{move.query}\n   right answer: rank {move.relevant_before} → {move.relevant_after}\n   now first: {move.top_after.splitlines()[-1][:100]}"
    )

# %% [markdown] lang="en"
# ## At which score do I throw an answer away?
#
# Tutorials say 0.6. Let us see what 0.6 does here. Blue are right answers, grey the others:

# %% [markdown] lang="zh"
# ## 分数低到多少该扔掉？
#
# 教程说 0.6。看看 0.6 在这里是什么效果。蓝色是正确答案，灰色是其余候选：

# %%
from qwen_rerank.calibration import sigmoid
from qwen_rerank.evaluation.calibrate import cross_fitted, fit, label, reliability, threshold_for

pairs = label(scores, collection.qrels)
raw = sigmoid(pairs.log_odds)
calibration = fit(pairs, kind="platt", fitted_for=reranker.calibration_key())
fitted = cross_fitted(
    pairs, kind="platt", fitted_for=reranker.calibration_key()
)  # each pair judged by a fit that has not seen it

figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
bins = np.linspace(pairs.log_odds.min(), pairs.log_odds.max(), 40)
left.hist(pairs.log_odds[~pairs.labels], bins, density=True, color="tab:gray", alpha=0.6, label="other candidates")
left.hist(pairs.log_odds[pairs.labels], bins, density=True, color="tab:blue", alpha=0.6, label="right answers")
left.axvline(np.log(0.6 / 0.4), color="tab:red", linewidth=1)
left.annotate(" 0.6", (np.log(0.6 / 0.4), 0.95), xycoords=("data", "axes fraction"), color="tab:red", fontsize=8)
left.set(xlabel=f"log-odds by {MODEL}", yticks=[])
left.legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
right.plot([0, 1], [0, 1], "--", color="gray", linewidth=1)
for name, probabilities, color in (("sigmoid", raw, "tab:orange"), ("calibrated", fitted, "tab:blue")):
    points = reliability(probabilities, pairs.labels, n_bins=8)
    right.plot([p.predicted for p in points], [p.observed for p in points], "o-", color=color, label=name)
right.set(xlabel="promised probability", ylabel="share that is right")
right.legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
for axes in (left, right):
    axes.spines[["top", "right"]].set_visible(False)

# %%
kept = raw >= 0.6
print(
    f"0.6 on the raw score: precision {pairs.labels[kept].mean():.2f}, recall {pairs.labels[kept].sum() / pairs.labels.sum():.2f}"
)
chosen = threshold_for(pairs, fitted, recall=0.9)
low, high = chosen.precision_interval
print(
    f"{chosen.value:.2f} on the calibrated one: recall {chosen.recall:.2f}, precision {chosen.precision:.2f} (95 %: {low:.2f} … {high:.2f})"
)

# %% [markdown] lang="en"
# The right-hand picture asks: of the answers that were promised "70 %", are 70 % right? On the dashed line, yes. The raw score is an opinion of the model, not a frequency in your data; a calibration (two numbers here, fitted on the labels) makes it one. It **never changes the order**. And mind the interval: that is how exactly 60 questions can tell.
#
# So: say what you want ("find 90 % of the right answers", or `precision=0.9`), and let the labels give the number. Save it with what it was fitted for:

# %% [markdown] lang="zh"
# 右图问的是：凡是“承诺 70%”的，真有七成是对的吗？落在虚线上就是。原始分数只是模型的看法，不是你数据里的频率；校准（这里就两个数，用标注拟合）把它变成频率，而且**绝不改变顺序**。也请看清区间：60 个问题只能精确到这个程度。
#
# 所以正确的做法是：说出你要什么（“找回九成正确答案”，或者 `precision=0.9`），让标注给出数字。存下来，连同它是为谁拟合的：

# %%
from qwen_rerank import Calibration

calibration.save("calibration.json")
careful = Reranker(MODEL, calibration=Calibration.load("calibration.json"), threshold=chosen.value)
question = next(iter(collection.queries.values()))
for hit in careful.rerank(question, stages["bm25+dense"].search(question, top_k=20)):
    print(f"{hit.score:.2f}", hit.document.text.splitlines()[-1][:100])
try:
    Reranker(MODEL, calibration=Calibration.load("calibration.json"), long_documents="windows")
except RerankError as error:
    print(f"{type(error).__name__}: {error}")

# %% [markdown] lang="en"
# Another model, template, instruction or way of reading long documents gives other scores, so the calibration refuses it instead of being wrong in silence.
#
# ## The same without Python, and two last warnings
#
# ```bash
# qwen-rerank eval sweep FOLDER -f bm25 -f mini -m mini --price-per-hour 1 --max-ms 500
# qwen-rerank eval calibrate FOLDER --recall 0.9 --save calibration.json
# qwen-rerank eval report runs        # everything as one HTML page
# ```
#
# - **Do not measure on what a model was trained on.** Qwen3-Reranker has seen T2Ranking, DuReader, MS MARCO, MIRACL, MLDR and others; the commands above say so when they see such a name.
# - **Do not tune and report on the same questions.** Keep some labels that you never look at.
#
# **Next:** [7 · Serve and call](07_serve_and_call.ipynb)

# %% [markdown] lang="zh"
# 换了模型、模板、指令或长文档策略，分数就变了，所以校准会直接拒绝，而不是悄悄给出错的概率。
#
# ## 不写 Python 也行，最后再提醒两句
#
# ```bash
# qwen-rerank eval sweep FOLDER -f bm25 -f mini -m mini --price-per-hour 1 --max-ms 500
# qwen-rerank eval calibrate FOLDER --recall 0.9 --save calibration.json
# qwen-rerank eval report runs        # 所有结果汇成一个 HTML 页面
# ```
#
# - **别在模型的训练数据上评测。** Qwen3-Reranker 见过 T2Ranking、DuReader、MS MARCO、MIRACL、MLDR 等；上面的命令遇到这些名字会提醒你。
# - **别用同一批问题既调参又报成绩。** 留一部分标注，平时绝不看。
#
# **下一节：** [7 · 部署与调用](07_serve_and_call.ipynb)
