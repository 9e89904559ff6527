"""Draw the READMEs' figures from the committed results: `python eval/readme.py`."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SPEED = Path("eval/speed/results/cpu-2-cores.json")
GPU = Path("eval/speed/results/gpu-0.6B.json")
POCKET = Path("eval/pocket/results/results.md")
READMES = {"README.md": "en", "README.zh-CN.md": "zh"}

SPEED_TEXT = {
    "en": (
        "On {threads} cores of an {cpu} ({dtype}, the 0.6B shape with random weights, text in and scores out, in turn in one run, "
        "1 query × {documents} documents of 128 tokens) the engine scores **{rate:.2f} documents/s: ×{recipe:.1f} the model card's code, "
        "×{st:.1f} sentence-transformers at its best batch size, ×{vllm:.2f} vLLM** (×{long:.2f} at 2,000 tokens); with 20 to 400 tokens a document ×{mixed:.1f} sentence-transformers at its best "
        "batch size, ×{mixed_default:.1f} at its default. Tokens that prompts share are computed once, nothing is padded. "
        "Sharing prefixes is not new (RadixMLP in TEI, SGLang's multi-item scoring, vLLM's prefix cache); having it exact in a library is. "
        "[All figures]({path}), [what was tried](eval/speed/LOG.md); on an {gpu} (bf16) it scores {gpu_documents:,.0f} documents/s of 128 tokens, "
        "×{gpu_over:.1f} sentence-transformers ([figures]({gpu_path}), `python eval/speed/gpu.py`)."
    ),
    "zh": (
        "在 {cpu} 的 {threads} 个核上（{dtype}，0.6B 的形状、随机权重，从文本到分数全程计时，各家在同一次测试里轮流运行，1 个查询 × {documents} 篇 128 token 的文档），"
        "引擎每秒打分 **{rate:.2f} 篇：是模型卡代码的 {recipe:.1f} 倍，sentence-transformers（取其最佳批大小）的 {st:.1f} 倍，vLLM 的 {vllm:.2f} 倍**（2,000 token 时为 {long:.2f} 倍）；文档长度在 20 到 400 token 之间时，"
        "是 sentence-transformers 最佳批大小的 {mixed:.1f} 倍、默认批大小的 {mixed_default:.1f} 倍。"
        "各提示词共有的前缀只算一次，没有填充。共享前缀并不新鲜（TEI 的 RadixMLP、SGLang 的多项打分、vLLM 的前缀缓存都有），新的是一个可直接导入、"
        "分数精确的库。[全部数据]({path})，[试过什么](eval/speed/LOG.md)；在一块 {gpu}（bf16）上，每秒给 "
        "{gpu_documents:,.0f} 篇 128 token 的文档打分，是 sentence-transformers 的 {gpu_over:.1f} 倍"
        "（[数据]({gpu_path})，`python eval/speed/gpu.py`）。"
    ),
}
POCKET_TEXT = {
    "en": (
        "What the small shipped models do on public collections (nDCG@10; BM25 and the embedder alone beside them, paired 95 % intervals; "
        "[model card](src/qwen_rerank/pocket/MODEL_CARD.md)). They say nothing about Qwen3-Reranker:"
    ),
    "zh": (
        "随包小模型在公开数据集上的表现（nDCG@10，旁边是 BM25 和只用词向量的结果，配对 95% 置信区间；[模型卡](src/qwen_rerank/pocket/MODEL_CARD.md)）。"
        "这些数字不代表 Qwen3-Reranker："
    ),
}


def speed(language: str) -> str:
    """Return the sentences on speed."""
    report = json.loads((ROOT / SPEED).read_text(encoding="utf-8"))
    gpu = json.loads((ROOT / GPU).read_text(encoding="utf-8"))
    workload, on_gpu = report["workloads"]["1x16x128"], gpu["workloads"]["1x50x128"]
    mixed = report["workloads"]["2x6 mixed 20-400"]
    # The largest size tried holds all documents, as the default of 32 does.
    *_, one_batch = mixed["contestants"]["sentence-transformers"]["seconds_by_batch_size"].values()
    return SPEED_TEXT[language].format(
        threads=report["hardware"]["threads"],
        cpu=report["hardware"]["cpu"],
        dtype=report["dtype"],
        documents=workload["documents"],
        rate=workload["contestants"]["engine"]["documents_per_s"],
        recipe=workload["engine_over"]["recipe"],
        st=workload["engine_over"]["sentence-transformers"],
        vllm=workload["engine_over"]["vllm"],
        long=report["workloads"]["1x2x2000"]["engine_over"]["vllm"],
        mixed=mixed["engine_over"]["sentence-transformers"],
        mixed_default=one_batch / min(mixed["contestants"]["engine"]["seconds"]),
        path=SPEED,
        gpu=gpu["hardware"]["gpu"].split()[1],
        gpu_documents=on_gpu["contestants"]["engine"]["documents_per_s"],
        gpu_over=on_gpu["engine_over"]["sentence-transformers"],
        gpu_path=GPU,
    )


def evaluate(language: str) -> str:
    """Return the table of the pocket models."""
    return f"{POCKET_TEXT[language]}\n\n{(ROOT / POCKET).read_text(encoding='utf-8').strip()}"


def with_figures(text: str, language: str) -> str:
    """Return a README with its figures as the results have them."""
    for name, content in (("speed", speed(language)), ("evaluate", evaluate(language))):
        place = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text = re.sub(place, lambda match, content=content: f"{match[1]}{content}\n{match[2]}", text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    for readme, language in READMES.items():
        path = ROOT / readme
        path.write_text(with_figures(path.read_text(encoding="utf-8"), language), encoding="utf-8")
