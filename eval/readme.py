"""Draw the figures of the READMEs and of the documentation from the committed results: `python eval/readme.py`."""

from __future__ import annotations

import json
import re
from html import escape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SPEED = "eval/speed/results/cpu-2-cores.json"
FORMATS = "eval/speed/results/formats-28-layers.json"  # every format, and peers in 8 bits
GPU = "eval/speed/results/gpu-0.6B.json"
PUBLISHED = "eval/published/qwen3-reranker.json"
PICTURES = ROOT / "docs" / "pictures"
READMES = {"README.md": "en", "README.zh-CN.md": "zh"}

_ONE_QUERY = {
    SPEED: "1x16x128",
    FORMATS: "1x16x128",
    GPU: "1x50x128",
}  # documents of 128 tokens, one query: the first row of both reports
_NAMES = {
    "engine": "qwen-rerank",
    "vllm": "vLLM",
    "sentence-transformers": "sentence-transformers",
    "recipe": "model card",
    "engine-int8": "qwen-rerank, int8",
    "vllm-int8": "vLLM, W8A8",
    "llama-q8": "llama.cpp, Q8_0",
    "openvino-int8": "OpenVINO, int8",
    "onnxruntime-int8": "ONNX Runtime, int8",
}
_COLOURS = {
    "light": {"paper": "#ffffff", "ink": "#1f2328", "faint": "#656d76", "bar": "#b8c0cc", "ours": "#3f6fd1"},
    "dark": {"paper": "#0d1117", "ink": "#e6edf3", "faint": "#8b949e", "bar": "#4a5361", "ours": "#6f9bf2"},
}

SPEED_TEXT = {
    "en": (
        "In bfloat16, as checkpoints come, the engine scores on {threads} CPU cores {st_low:.1f} to {st_high:.1f} times as many documents a second as "
        "sentence-transformers at its best batch size and {vllm_low:.2f} to {vllm_high:.2f} times as many as vLLM (20 to 2,000 tokens a document), and "
        '`quantize="int8"` {int8_low:.1f} to {int8_high:.1f} times its own bfloat16 ([formats]({formats_path})); in float32 {recipe:.1f} times as many as the model card\'s code, {st:.1f} times '
        "sentence-transformers and {vllm:.2f} times vLLM (128 tokens, [figures]({cpu_path}); {long:.2f} times at 2,000, in the run of the formats); on one {gpu} {gpu_st:.1f} times "
        "sentence-transformers (128 tokens, [GPU]({gpu_path})). All with random weights of the 0.6B shape; [what was tried](eval/speed/LOG.md)."
    ),
    "zh": (
        "检查点通常以 bfloat16 发布：此时在 {threads} 个 CPU 核上，引擎每秒打分的文档数是 sentence-transformers（取其最佳批大小）的 {st_low:.1f} 到 {st_high:.1f} 倍、vLLM 的 {vllm_low:.2f} 到 "
        '{vllm_high:.2f} 倍（每篇 20 到 2,000 token），`quantize="int8"` 又是自身 bfloat16 的 {int8_low:.1f} 到 {int8_high:.1f} 倍（[各格式]({formats_path})）；'
        "float32 是模型卡代码的 {recipe:.1f} 倍、sentence-transformers 的 {st:.1f} 倍、vLLM 的 {vllm:.2f} 倍（128 token，[数据]({cpu_path})；2,000 token 时 {long:.2f} 倍，取自前一份数据）；"
        "在一块 {gpu} 上是 sentence-transformers 的 {gpu_st:.1f} 倍（128 token，[GPU 数据]({gpu_path})）。都用 0.6B 的形状、随机权重；[试过什么](eval/speed/LOG.md)。"
    ),
}
PUBLISHED_TEXT = {
    "en": (
        "Published by [the authors of the models]({source}) and measured by them, not by us; each reranks the first 100 of Qwen3-Embedding-0.6B "
        "([figures]({path})):"
    ),
    "zh": "由[模型作者]({source})发布、由他们测得，不是我们测的；都是对 Qwen3-Embedding-0.6B 的前 100 个候选重排（[数据]({path})）：",
}
PUBLISHED_HEADS = {
    "en": {
        "MTEB-R": "English, MTEB-R",
        "CMTEB-R": "Chinese, CMTEB-R",
        "MMTEB-R": "many languages, MMTEB-R",
        "MLDR": "long documents, MLDR",
        "MTEB-Code": "code, MTEB-Code",
        "FollowIR": "instructions, FollowIR",
    },
    "zh": {
        "MTEB-R": "英文 MTEB-R",
        "CMTEB-R": "中文 CMTEB-R",
        "MMTEB-R": "多语言 MMTEB-R",
        "MLDR": "长文档 MLDR",
        "MTEB-Code": "代码 MTEB-Code",
        "FollowIR": "遵循指令 FollowIR",
    },
}
ALONE = {"en": "{} alone", "zh": "只用 {}"}
CORES = {"en": "{threads} cores of an {cpu}", "zh": "{cpu} 的 {threads} 个核"}
UNITS = {"en": "documents a second", "zh": "每秒打分的文档数"}


def read(path: str) -> Any:
    """Return a committed result."""
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


def speed(language: str) -> str:
    """Return the picture and the sentence on speed."""
    cpu, gpu = read(SPEED), read(GPU)
    over, gpu_over = (
        report["workloads"][_ONE_QUERY[path]]["engine_over"] for path, report in ((SPEED, cpu), (GPU, gpu))
    )
    workloads = read(FORMATS)["workloads"]
    formats = [workload["engine_over"] for workload in workloads.values()]
    in_float32 = (workloads["1x2x2000"]["contestants"][f"{name}-float32"] for name in ("engine", "vllm"))
    ours, theirs = (result["documents_per_s"] for result in in_float32)
    st, vllm = ([ratios[name] for ratios in formats] for name in ("sentence-transformers", "vllm"))
    int8 = [1 / ratios["engine-int8"] for ratios in formats]
    sentence = SPEED_TEXT[language].format(
        threads=cpu["hardware"]["threads"],
        recipe=over["recipe"],
        st=over["sentence-transformers"],
        vllm=over["vllm"],
        long=ours / theirs,
        gpu=gpu["hardware"]["gpu"].split()[1],
        gpu_st=gpu_over["sentence-transformers"],
        st_low=min(st),
        st_high=max(st),
        vllm_low=min(vllm),
        vllm_high=max(vllm),
        int8_low=min(int8),
        int8_high=max(int8),
        formats_path=FORMATS,
        cpu_path=SPEED,
        gpu_path=GPU,
    )
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="docs/pictures/speed.{language}.dark.svg">'
        f'<img alt="{escape(UNITS[language])}" src="docs/pictures/speed.{language}.light.svg"></picture>\n\n{sentence}'
    )


def published(language: str) -> str:
    """Return the authors' table, with how far each reranker is above its first stage."""
    table = read(PUBLISHED)
    [(first, alone)] = table["first_stage"].items()
    rows = [["", *(PUBLISHED_HEADS[language][column] for column in table["columns"])], ["---", *["---:"] * len(alone)]]
    rows.append([ALONE[language].format(first), *(f"{value:.2f}" for value in alone)])
    for name, values in table["rerankers"].items():
        cells = [f"{value:.2f} ({value - before:+.1f})" for value, before in zip(values, alone)]
        rows.append([f"**{name}**" if name.startswith("Qwen3") else name, *cells])
    text = PUBLISHED_TEXT[language].format(source=table["source"], path=PUBLISHED)
    return f"{text}\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows)


def speed_picture(language: str, scheme: str) -> str:
    """Return the bars of every report as SVG."""
    colours, y, parts = _COLOURS[scheme], 22, []
    for path in _ONE_QUERY:
        report = read(path)
        contestants = report["workloads"][_ONE_QUERY[path]]["contestants"]
        rates = {name: contestants[name]["documents_per_s"] for name in _NAMES if name in contestants}
        hardware = report["hardware"]
        title = hardware.get("gpu") or CORES[language].format(**hardware)
        parts.append(_words(16, y, f"{title}, {report['dtype']}: {UNITS[language]}", colours["faint"]))
        for name, rate in sorted(rates.items(), key=lambda item: -item[1]):
            y += 24
            width = 380 * rate / max(rates.values())
            fill = colours["ours" if name.startswith("engine") else "bar"]
            parts.append(_words(190, y, _NAMES[name], colours["ink"], anchor="end"))
            parts.append(f'<rect x="200" y="{y - 13}" width="{width:.1f}" height="17" rx="3" fill="{fill}"/>')
            parts.append(_words(208 + width, y, f"{rate:,.2f}" if rate < 10 else f"{rate:,.0f}", colours["ink"]))
        y += 40
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 680 {y - 20}" width="680" '
        "font-family=\"system-ui, 'Noto Sans CJK SC', 'PingFang SC', 'Microsoft YaHei', sans-serif\" font-size=\"14\">\n"
        f'<rect width="100%" height="100%" rx="8" fill="{colours["paper"]}"/>\n{body}\n</svg>\n'
    )


def _words(x: float, y: float, text: str, colour: str, *, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y}" fill="{colour}" text-anchor="{anchor}">{escape(text)}</text>'


def pictures() -> dict[Path, str]:
    """Return every picture with its text."""
    return {
        PICTURES / f"speed.{language}.{scheme}.svg": speed_picture(language, scheme)
        for language in READMES.values()
        for scheme in _COLOURS
    }


def with_figures(text: str, language: str) -> str:
    """Return a README with its figures as the results have them."""
    for name, content in (("speed", speed(language)), ("published", published(language))):
        place = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text = re.sub(place, lambda match, content=content: f"{match[1]}{content}\n{match[2]}", text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    for readme, language in READMES.items():
        path = ROOT / readme
        path.write_text(with_figures(path.read_text(encoding="utf-8"), language), encoding="utf-8")
    for path, text in pictures().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
