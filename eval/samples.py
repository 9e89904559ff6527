"""Make the encyclopedia samples of the package: sentences of twenty Wikipedia articles and sixty questions on them.

    python eval/samples.py FOLDER

FOLDER holds `xquad_r_en` and `xquad_r_zh` (XQuAD-R of LAReQA, Roy et al. 2020, CC BY-SA 4.0) in BEIR layout. The articles
are those below; of each, three questions are drawn by a fixed seed, the same in both languages. Questions whose text
stands twice are left out. The Chinese titles are ours, since the collection has English ones.
"""

from __future__ import annotations

import csv
import json
import random
import sys
from pathlib import Path
from typing import Any

TARGET = Path(__file__).resolve().parents[1] / "src/qwen_rerank/samples"
QUESTIONS_AN_ARTICLE = 3
ARTICLES = {
    "a1": "华沙", "a3": "尼古拉·特斯拉", "a5": "教师", "a11": "蒸汽机", "a12": "氧", "a14": "阿波罗计划", "a16": "亚马孙雨林",
    "a20": "黑死病", "a21": "地质学", "a25": "成吉思汗", "a26": "药学", "a27": "免疫系统", "a31": "哈佛大学", "a34": "神秘博士",
    "a36": "元朝", "a37": "肯尼亚", "a39": "叶绿体", "a40": "素数", "a41": "莱茵河", "a47": "力",
}  # fmt: skip


def article_of(document: str) -> str:
    """Return the article that a sentence's id names: `a3` of `a3p0s2`."""
    return document.split("p")[0]


def rows(path: Path) -> list[dict[str, Any]]:
    """Return the JSON lines of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def main(folder: Path) -> None:
    """Write the sentences of both languages and the questions."""
    chosen: list[str] = []
    questions: list[dict[str, str]] = []
    for language in ("en", "zh"):
        source = folder / f"xquad_r_{language}"
        sentences = [
            {
                "id": row["_id"],
                "title": ARTICLES[article_of(row["_id"])] if language == "zh" else row["title"],
                "text": row["text"],
            }
            for row in rows(source / "corpus.jsonl")
            if article_of(row["_id"]) in ARTICLES
        ]
        lines = "".join(json.dumps(sentence, ensure_ascii=False) + "\n" for sentence in sentences)
        (TARGET / f"encyclopedia.{language}.jsonl").write_text(lines, encoding="utf-8")
        with (source / "qrels/test.tsv").open(encoding="utf-8", newline="") as file:
            relevant = {row["query-id"]: row["corpus-id"] for row in csv.DictReader(file, delimiter="\t")}
        texts = {row["_id"]: row["text"] for row in rows(source / "queries.jsonl")}
        if not chosen:
            draw, seen = random.Random(0), [*texts.values()]
            for article in ARTICLES:
                asked = [q for q in texts if article_of(relevant[q]) == article and seen.count(texts[q]) == 1]
                chosen += sorted(draw.sample(asked, QUESTIONS_AN_ARTICLE))
        questions += [{"collection": language, "text": texts[q], "relevant": relevant[q]} for q in chosen]
    lines = "".join(json.dumps(question, ensure_ascii=False) + "\n" for question in questions)
    (TARGET / "encyclopedia.questions.jsonl").write_text(lines, encoding="utf-8")
    print(f"{len(questions)} questions written to {TARGET}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
