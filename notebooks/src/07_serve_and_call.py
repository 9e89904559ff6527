# %% [markdown] lang="en"
# # 7 · Serve, and call servers correctly
#
# One GPU, many programs: put the reranker behind HTTP. This notebook starts our server, calls it, and then looks at the thing that goes wrong with **every** rerank server sooner or later: a slightly different prompt, HTTP 200, and scores that mean nothing.

# %% [markdown] lang="zh"
# # 7 · 部署服务，并且正确地调用
#
# 一块显卡，多个程序要用，那就把重排放到 HTTP 后面。这一节先启动我们自己的服务并调用它，再看看**每一种**重排服务迟早都会出的问题：提示词差了一点点，照样返回 HTTP 200，分数却毫无意义。

# %%
MODEL = "pocket"  # the real one: "Qwen/Qwen3-Reranker-0.6B"

# %% [markdown] lang="en"
# > `pocket` stands in here, a tiny model of Qwen3-Reranker's shape, because the subject is the prompt that such a model reads. **It is for learning and tests, ranks badly, and is not Qwen3-Reranker.**
#
# ## The same model, the same documents, five prompts

# %% [markdown] lang="zh"
# > 这里用的是 `pocket`：结构与 Qwen3-Reranker 相同的微型模型，因为这一节讲的是这类模型读的提示词。**它只用来学习和跑测试，排序很差，不是 Qwen3-Reranker。**
#
# ## 同一个模型，同样的文档，五种提示词

# %%
import matplotlib.pyplot as plt

from qwen_rerank.check.reference import Reference
from qwen_rerank.check.variants import VARIANTS

QUERY = "Which planet is known as the Red Planet?"
PLANETS = {
    "Venus": "Venus is often called Earth's twin because of its similar size and proximity.",
    "Mars": "Mars, known for its reddish appearance, is often referred to as the Red Planet.",
    "Jupiter": "Jupiter, the largest planet in our solar system, has a prominent red spot.",
    "Saturn": "Saturn, famous for its rings, is sometimes mistaken for the Red Planet.",
}
reference = Reference(MODEL)  # slow and plain: any prompt, one at a time
variants = {variant.key: variant for variant in VARIANTS}


def log_odds(key, query, documents):
    """Return what the model says when the prompt is made in that way."""
    return reference.log_odds([reference.ids(variants[key], query, document) for document in documents])


# %% picture=true
SHOWN = {
    "recipe": "the model card's prompt",
    "newline-short": "one newline short\n(vLLM's own template file)",
    "sglang-template": "no <think> block\n(SGLang's own template file)",
    "no-template": "no template at all\n(a forgotten flag)",
    "empty-prompt": "query and document dropped\n(apply_chat_template)",
}
figure, axes = plt.subplots(figsize=(7.5, 3.4), layout="constrained")
for row, key in enumerate(SHOWN):
    for name, value, color in zip(
        PLANETS, log_odds(key, QUERY, PLANETS.values()), ("tab:olive", "tab:red", "tab:brown", "tab:blue")
    ):
        axes.plot(value, row, "o", color=color, label=name if row == 0 else None, markersize=9, alpha=0.8)
figure.legend(frameon=False, ncols=4, loc="outside upper center", fontsize=9)
axes.set(
    yticks=range(len(SHOWN)), yticklabels=SHOWN.values(), xlabel=f"log-odds by {MODEL}", ylim=(len(SHOWN) - 0.5, -0.5)
)
axes.grid(axis="y", alpha=0.3)
axes.spines[["top", "right"]].set_visible(False)

# %% [markdown] lang="en"
# Only the first row is what the model was trained for. The others all happen (templates as their sources had them in November 2026): vLLM's example template ends in two newlines and Jinja eats one; SGLang's leaves out the `<think>` block; without `--chat-template` a server glues query and document together; and the newer `chat_template.jinja` of the model repositories drops both (all dots in one place: every pair gets the same score). **None of them raises an error.**
#
# Three defences, best first:
#
# 1. Run a server that builds the prompt itself and checks it at the start: ours, next section.
# 2. With vLLM or SGLang, send finished prompts as token ids: `HttpScorer(url, tokenizer="Qwen/Qwen3-Reranker-0.6B")`. Then the server's template does not matter.
# 3. Give the server a correct template, and check: last section.
#
# ## Our server

# %% [markdown] lang="zh"
# 只有第一行是模型训练时见过的。其余几种全都真实发生过（模板以 2026 年 11 月各项目源码为准）：vLLM 示例模板以两个换行结尾，被 Jinja 吃掉一个；SGLang 的模板漏了 `<think>` 段；忘了 `--chat-template`，服务就把查询和文档直接粘在一起；模型仓库里新版的 `chat_template.jinja` 则把两者都丢了（所有点叠在一处：每一对得分都一样）。**没有一种会报错。**
#
# 三道防线，从好到次：
#
# 1. 用自己拼提示词、启动时自检的服务：就是我们的，见下一节。
# 2. 用 vLLM 或 SGLang 时，直接发送拼好的 token id：`HttpScorer(url, tokenizer="Qwen/Qwen3-Reranker-0.6B")`，这样服务端用什么模板都无所谓。
# 3. 给服务端换上正确的模板，再检查一遍：见最后一节。
#
# ## 我们的服务

# %%
import socket
import subprocess
import time

import httpx2

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
server = subprocess.Popen(
    ["qwen-rerank", "serve", "--model", MODEL, "--port", str(port)],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
)
url = f"http://127.0.0.1:{port}"


def is_ready():
    try:
        return httpx2.get(f"{url}/health/ready", trust_env=False).status_code == 200
    except httpx2.TransportError:
        return False


while not is_ready():  # 503 while the model loads and checks itself
    if server.poll() is not None:
        raise RuntimeError("the server ended; run the command in a terminal to see why")
    time.sleep(0.2)
print("ready")

# %%
import json

question = {"query": QUERY, "documents": list(PLANETS.values()), "top_n": 2}
answer = httpx2.post(f"{url}/v1/rerank", json=question, trust_env=False).json()  # no proxy to this machine
print(json.dumps(answer, indent=1))

# %% [markdown] lang="en"
# In a terminal it is `qwen-rerank serve`, and at the root of that address there is a playground for people. The route and the fields are those of Cohere and Jina, so their clients work unchanged, and so does whatever you have that can talk to vLLM. It listens to this machine alone; on any other address it refuses to start without an API key.
#
# From Python, a server is simply another scorer. Everything you have seen (LangChain, LlamaIndex, long documents, cascades, evaluation) takes it in place of the local model:

# %% [markdown] lang="zh"
# 在终端里就是一句 `qwen-rerank serve`，浏览器打开这个地址的根路径还有一个试用页面。路由和字段与 Cohere、Jina 一致，它们的客户端不用改就能连，能调 vLLM 的程序也一样。默认只监听本机；换成别的地址而不设 API key，它拒绝启动。
#
# 在 Python 里，服务只是另一种打分器。前面见过的一切（LangChain、LlamaIndex、长文档、级联、评测）都可以拿它代替本地模型：

# %%
from qwen_rerank import HttpScorer, QwenScorer, Reranker

remote = HttpScorer(url)  # asks the server what it is
for hit in Reranker(remote).rerank(QUERY, list(PLANETS.values())):
    print(f"{hit.rank}. {hit.log_odds:6.2f}  {hit.document.text}")
local = QwenScorer(MODEL).score(QUERY, list(PLANETS.values()))
print("largest difference to the local model:", f"{abs(remote.score(QUERY, list(PLANETS.values())) - local).max():.0e}")

# %% [markdown] lang="en"
# ## Every server answers differently
#
# | server | path | results under | score | text of a document | instruction |
# | --- | --- | --- | --- | --- | --- |
# | ours | `/v1/rerank` | `results` | `relevance_score` | `document.text`, if asked | `instruction` |
# | vLLM | `/v1/rerank` | `results` | `relevance_score` | `document.text` | `instruction`, if its template reads it |
# | SGLang | `/v1/rerank` | **a bare list** | `score` | `document` (a string) | `instruct` |
# | TEI | `/rerank`, documents as `texts` | a bare list | `score` | `text`, if asked | none; it cannot load Qwen3-Reranker |
# | llama.cpp | `/v1/rerank` | `results` | `relevance_score` | none | none |
# | Xinference | `/v1/rerank` | `results` | `relevance_score` | object or string | inside `kwargs`, as JSON |
# | Cohere | `/v2/rerank` | `results` | `relevance_score` | none | none |
#
# Code that reads `response["results"]` breaks on SGLang, whatever a tutorial says. `HttpScorer` knows them all, finds out which one it talks to, asks for logits where it can, splits requests at each server's limit, and refuses an instruction where it would be ignored.
#
# ## Is this server right?
#
# Here is a stand-in that says it is a vLLM whose `--chat-template` was forgotten. It answers in the right shape, with HTTP 200:

# %% [markdown] lang="zh"
# ## 每种服务的返回都不一样
#
# | 服务 | 路径 | 结果在哪 | 分数字段 | 文档原文 | 指令字段 |
# | --- | --- | --- | --- | --- | --- |
# | 本包 | `/v1/rerank` | `results` | `relevance_score` | `document.text`，按需返回 | `instruction` |
# | vLLM | `/v1/rerank` | `results` | `relevance_score` | `document.text` | `instruction`，模板认它才有用 |
# | SGLang | `/v1/rerank` | **直接就是列表** | `score` | `document`（字符串） | `instruct` |
# | TEI | `/rerank`，文档字段叫 `texts` | 直接就是列表 | `score` | `text`，按需返回 | 没有；它也加载不了 Qwen3-Reranker |
# | llama.cpp | `/v1/rerank` | `results` | `relevance_score` | 没有 | 没有 |
# | Xinference | `/v1/rerank` | `results` | `relevance_score` | 对象或字符串 | 放在 `kwargs` 里，JSON 字符串 |
# | Cohere | `/v2/rerank` | `results` | `relevance_score` | 没有 | 没有 |
#
# 写 `response["results"]` 的代码，碰到 SGLang 就会出错，不管教程怎么说。`HttpScorer` 全都认识：自动识别对面是谁，能要 logit 就要 logit，按各家上限拆请求；对面会忽略指令的，它直接拒绝。
#
# ## 这个服务算得对吗？
#
# 下面这个替身自称是 vLLM，但忘了 `--chat-template`。它返回的格式完全正确，状态码也是 200：

# %%
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

from qwen_rerank.calibration import sigmoid


class ForgottenTemplate(BaseHTTPRequestHandler):
    def do_GET(self):
        self.reply({"object": "list", "data": [{"id": "qwen3-reranker", "object": "model", "owned_by": "vllm"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path != "/v1/rerank":
            return self.reply({"error": {"message": "Not Found", "code": 404}}, status=404)
        scores = sigmoid(log_odds("no-template", body["query"], body["documents"]))
        rows = [
            {"index": i, "document": {"text": text}, "relevance_score": p}
            for i, (text, p) in enumerate(zip(body["documents"], scores))
        ]
        return self.reply(
            {
                "id": "rerank-1",
                "model": "qwen3-reranker",
                "results": sorted(rows, key=lambda row: -row["relevance_score"]),
            }
        )

    def reply(self, payload, status=200):
        data = json.dumps(payload).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments):
        pass


stand_in = HTTPServer(("127.0.0.1", 0), ForgottenTemplate)
threading.Thread(target=stand_in.serve_forever, daemon=True).start()
wrong = f"http://127.0.0.1:{stand_in.server_port}"
print(httpx2.post(f"{wrong}/v1/rerank", json=question, trust_env=False).status_code)

# %%
from qwen_rerank.check import CheckOptions, check


def verdict(address):
    """Print what the check found, in short; `qwen-rerank check ADDRESS` prints all of it."""
    report = check(address, CheckOptions(reference=reference, long_tokens=1000))
    print("verdict:", report.verdict)
    for finding in report.findings:
        if finding.check == "agreement":
            print(f"  {finding.saw}\n  {finding.why}\n  {finding.cure}".rstrip())


verdict(wrong)
print()
verdict(url)

# %% [markdown] lang="en"
# The check scores a few pairs with the checkpoint itself, compares them with what the server said, and finds out which of the known wrong prompts fits. On a real server: `qwen-rerank check http://HOST:8000 --reference Qwen/Qwen3-Reranker-0.6B`; exit status 1 means wrong, so it belongs into your deployment script.
#
# Starting the others correctly:
#
# ```bash
# qwen-rerank template vllm > qwen3.jinja
# vllm serve Qwen/Qwen3-Reranker-0.6B --chat-template qwen3.jinja \
#   --hf_overrides '{"architectures":["Qwen3ForSequenceClassification"],"classifier_from_token":["no","yes"],"is_original_qwen3_reranker":true}'
#
# qwen-rerank template sglang > qwen3.jinja
# python -m sglang.launch_server --model-path Qwen/Qwen3-Reranker-0.6B --chat-template qwen3.jinja   # and no --is-embedding
# ```
#
# You will see `--trust-remote-code` in many such lines. **It is not needed, and it is not safe**: Qwen3-Reranker has no code of its own, and the flag would run whatever code the repository holds tomorrow.
#
# **Next:** [8 · Make it fast](08_make_it_fast.ipynb)

# %% [markdown] lang="zh"
# 检查的办法是：用原始权重自己算几对的分数，和服务给的比，再认出它用的是哪一种错误的提示词。对真实服务：`qwen-rerank check http://HOST:8000 --reference Qwen/Qwen3-Reranker-0.6B`；退出码为 1 就是算错了，适合写进部署脚本。
#
# 其他服务的正确启动方式：
#
# ```bash
# qwen-rerank template vllm > qwen3.jinja
# vllm serve Qwen/Qwen3-Reranker-0.6B --chat-template qwen3.jinja \
#   --hf_overrides '{"architectures":["Qwen3ForSequenceClassification"],"classifier_from_token":["no","yes"],"is_original_qwen3_reranker":true}'
#
# qwen-rerank template sglang > qwen3.jinja
# python -m sglang.launch_server --model-path Qwen/Qwen3-Reranker-0.6B --chat-template qwen3.jinja   # 不要加 --is-embedding
# ```
#
# 网上很多命令带着 `--trust-remote-code`。**既不需要，也不安全**：Qwen3-Reranker 没有自带代码，这个开关会去执行仓库里将来可能出现的任何代码。
#
# **下一节：** [8 · 跑得更快](08_make_it_fast.ipynb)

# %%
server.terminate()  # answers what it has admitted, then ends
server.wait()
stand_in.shutdown()
