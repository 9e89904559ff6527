"""What the host does for a query before the device may start: texts in, a packed group of prompts out.

    python eval/speed/host.py --tokenizer FOLDER --collections FOLDER [--out FILE]

CPU time of this process (all threads), median of several rounds in which the contestants take turns: the tokenizers
library alone with and without offsets, tiktoken's loop alone, and ours from texts to the group, with and without the
faster way. 100 documents of 128 tokens, English and Chinese. The ids of all contestants are compared.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from measure import hardware, versions

from qwen_rerank.prompt import PromptEncoder
from qwen_rerank.scorers.qwen.packing import group_prompts
from qwen_rerank.tokenizer import PromptTokenizer

N_DOCUMENTS, N_TOKENS, ROUNDS = 100, 128, 31
LANGUAGES = {"English": "scifact", "Chinese": "dureader_demo"}
QUERY = "what is asked for here?"


def documents(tokenizer: PromptTokenizer, folder: Path) -> list[str]:
    """Return consecutive stretches of a collection's texts, of as many tokens each."""
    path = next(found for found in (folder / "corpus.jsonl", folder / "corpus.jsonl.gz") if found.is_file())
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    text = " ".join(json.loads(line)["text"] for line in raw.decode().split("\n")[:600] if line)[:400_000]
    offsets = tokenizer._plain.encode(text, add_special_tokens=False).offsets
    spans = [(offsets[i * N_TOKENS][0], offsets[(i + 1) * N_TOKENS - 1][1]) for i in range(N_DOCUMENTS)]
    return [text[start:end] for start, end in spans]


def in_turn(contestants: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return each contestant's median CPU time in milliseconds."""
    seen: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(ROUNDS):
        for name, work in contestants.items():
            started = time.process_time()
            work()
            seen[name].append(1e3 * (time.process_time() - started))
    return {name: round(statistics.median(values), 2) for name, values in seen.items()}


def measured(source: str, texts: list[str]) -> dict[str, object]:
    """Return the times of one language, after comparing the ids."""
    fast, slow = PromptEncoder(PromptTokenizer(source)), PromptEncoder(PromptTokenizer(source))
    slow._tokenizer.__dict__["_ranked"] = None
    plain, ranked = fast._tokenizer._plain, fast._tokenizer._ranked
    if ranked is None:
        raise SystemExit("tiktoken is not installed, or the vocabulary is not one that it is equal for.")
    expected = [encoding.ids for encoding in plain.encode_batch_fast(texts, add_special_tokens=False)]
    if [ranked.encode(text).ids for text in texts] != expected:
        raise SystemExit("the two ways give different ids.")

    def ours(encoder: PromptEncoder) -> Callable[[], object]:
        return lambda: group_prompts([prompt.ids for prompt in encoder.encode_checked(QUERY, texts, None)])

    times = in_turn(
        {
            "tokenizers, encode_batch": lambda: plain.encode_batch(texts, add_special_tokens=False),
            "tokenizers, encode_batch_fast": lambda: plain.encode_batch_fast(texts, add_special_tokens=False),
            "tiktoken, encode_ordinary": lambda: [ranked.encode(text) for text in texts],
            "ours, texts to group, by tokenizers": ours(slow),
            "ours, texts to group": ours(fast),
        }
    )
    return {"characters": sum(map(len, texts)), "cpu_ms": times}


def main() -> None:
    """Measure both languages and print the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with the official tokenizer.json")
    parser.add_argument("--collections", type=Path, required=True, help="folder with scifact and dureader_demo")
    parser.add_argument("--out", type=Path, help="write the JSON there as well")
    options = parser.parse_args()
    source = (options.tokenizer / "tokenizer.json").read_text(encoding="utf-8")
    tokenizer = PromptTokenizer(source)
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware("cpu"),
        "versions": versions(),
        "documents": N_DOCUMENTS,
        "tokens_per_document": N_TOKENS,
        "languages": {
            language: measured(source, documents(tokenizer, options.collections / name))
            for language, name in LANGUAGES.items()
        },
    }
    text = json.dumps(report, indent=1, ensure_ascii=False)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
