"""Train both pocket models from public collections: one command, fixed seeds.

    pip install opencc-python-reimplemented==0.1.7
    python eval/pocket/train.py --data ../shared/data --work build/pocket --install

The stages keep what they made in `--work` and are skipped when it is there. `--install` copies the result into the
package. Two CPU cores and about an hour are enough.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from candidates import Pool, TeacherWeights, keyword_query
from embedder import rarity, start_vectors, teacher_folder, teacher_words
from lexical_start import centre, lexical_model, single
from safetensors.torch import load_file, save_file
from sources import (
    TRAINED_ON,
    Pair,
    labelled_pairs,
    load_collection,
    passage_pairs,
    passages,
    python_functions,
    simplified,
)
from tokenizers import Tokenizer
from vocabularies import count_words, embedder_tokenizer, reranker_tokenizer

from qwen_rerank import load_embedder
from qwen_rerank.embedders.static import StaticEmbedder
from qwen_rerank.lexical import terms
from qwen_rerank.prompt import PromptEncoder
from qwen_rerank.training import (
    EmbedderTraining,
    Example,
    RerankerTraining,
    load_training_data,
    train_embedder,
    train_reranker,
)

PACKAGE = Path(__file__).resolve().parents[2] / "src" / "qwen_rerank" / "pocket"
DIM = 256


@dataclass(frozen=True)
class Plan:
    """Examples of the reranker's training: queries of each language, characters of a passage, seed."""

    queries: int = 3000
    en_chars: int = 300
    zh_chars: int = 90
    seed: int = 7

    def chars(self, language: str) -> int:
        """Return the length of a passage."""
        return self.en_chars if language == "en" else self.zh_chars


TEACHER = {"en": TeacherWeights(overlap=4.5, dense=7.0), "zh": TeacherWeights()}
EMBEDDER = EmbedderTraining(epochs=3, batch_size=512, learning_rate=1e-3, seed=1)
RERANKER = RerankerTraining(
    objective="distillation",
    listwise_weight=0.85,
    batch_size=8,
    mini_batch_size=16,
    learning_rate=3e-4,
    warmup_ratio=0.04,
    max_length=320,
    max_documents=6,
    precision="bfloat16",
    train_embeddings=False,
    seed=1,
)


def main() -> None:
    """Run every stage whose result is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the collections in BEIR layout")
    parser.add_argument("--work", type=Path, required=True, help="folder for the stages' results")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--install", action="store_true", help="copy both models into the package")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    for stage, make in STAGES.items():
        if not (options.work / stage).exists():
            make(options)
        print(f"{stage}: done after {time.perf_counter() - started:.0f} s", flush=True)
    if options.install:
        install(options.work)
    print(f"all: done after {time.perf_counter() - started:.0f} s", flush=True)


def load_pairs(root: Path) -> dict[str, list[tuple[bool, Pair]]]:
    """Return for each language the pairs, each with whether a person labelled it."""
    pairs: dict[str, list[tuple[bool, Pair]]] = {"en": [], "zh": []}
    for name, (language, split, _) in TRAINED_ON.items():
        collection = load_collection(root, name, split)
        labelled = labelled_pairs(collection)
        free = passage_pairs(collection, language, per_document=40 if name == "qmsum_long" else 6, seed=1)
        if name == "drcd":
            labelled, free = labelled + simplified(labelled), free + simplified(free)
        pairs[language] += [(True, pair) for pair in labelled] + [(False, pair) for pair in free]
    pairs["en"] += [(False, pair) for pair in python_functions(12_000, seed=1)]
    return pairs


def make_embedder(options: argparse.Namespace) -> None:
    """Build the embedder's tokenizer and first vectors, and train them."""
    pairs = load_pairs(options.data)
    free = {language: [pair.document for known, pair in rows if not known] for language, rows in pairs.items()}
    words = count_words([*free["en"], *(pair.query for _, pair in pairs["en"])])
    tokenizer = embedder_tokenizer(words, free["zh"], teacher_words(), n_english=13_000, n_chinese=9_000)
    latin = np.array([token.isascii() for token in by_id(tokenizer)])
    weights = np.where(latin, rarity(tokenizer, free["en"]), rarity(tokenizer, free["zh"])).clip(min=0.1)
    vectors = start_vectors(tokenizer, weights.astype(np.float32), dim=DIM, seed=1)
    # A labelled pair counts three times: there are few, and they are what a search looks like.
    every = [pair for rows in pairs.values() for known, pair in rows for _ in range(3 if known else 1)]
    examples = [Example(pair.query, (pair.document[:1500],), (1.0,)) for pair in every if pair.document.strip()]
    train_embedder((tokenizer, vectors), examples, options.work / "embedder.part", training=EMBEDDER)
    (options.work / "embedder.part").rename(options.work / "embedder")


def by_id(tokenizer: Tokenizer) -> list[str]:
    """Return the tokens in the order of their ids."""
    vocabulary = tokenizer.get_vocab()
    return sorted(vocabulary, key=vocabulary.__getitem__)


def make_start(options: argparse.Namespace) -> None:
    """Build the reranker's tokenizer and first weights."""
    generator = random.Random(1)
    pairs = load_pairs(options.data)
    english = [text[:600] for _, pair in pairs["en"] for text in (pair.document, pair.query)]
    chinese = [text[:400] for _, pair in pairs["zh"] for text in (pair.document, pair.query)]
    generator.shuffle(english)
    generator.shuffle(chinese)
    tokenizer = reranker_tokenizer(english[:30_000], chinese, size=12_000)
    weights = np.minimum(rarity(tokenizer, english[:20_000]), rarity(tokenizer, chinese[:20_000]))
    model = lexical_model(tokenizer, StaticEmbedder(options.work / "embedder"), weights, seed=1)
    encoder = PromptEncoder(tokenizer.to_str(), max_length=320)
    sample = [pair for language in ("en", "zh") for _, pair in generator.sample(pairs[language], 40)]
    prompts = [encoder.encode(p.query, [p.document])[0].ids.tolist() for p in sample]
    centre(model, prompts, yes=single(tokenizer, "yes"), no=single(tokenizer, "no"), level=-1.0)
    folder = options.work / "start.part"
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG, indent=2), encoding="utf-8")
    folder.rename(options.work / "start")


TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "add_prefix_space": False,
    "clean_up_tokenization_spaces": False,
    "model_max_length": 8192,
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "padding_side": "left",
}


def make_examples(options: argparse.Namespace) -> None:
    """Collect queries with candidates and the teacher's log-odds, as JSONL."""
    plan = Plan()
    embedder = StaticEmbedder(options.work / "embedder")
    generator = random.Random(plan.seed)
    examples: list[Example] = []
    for language, rows in load_pairs(options.data).items():
        pairs = list(queries_with_passages(rows, plan.chars(language), generator, limit=3 * plan.queries))
        teacher = load_embedder(str(teacher_folder())) if language == "en" else embedder
        pool = Pool(list(dict.fromkeys(pair.document for _, pair in pairs)), embedder, teacher)
        # Half of the queries are labelled ones where there are enough, the rest self-supervised.
        labelled = [pair for known, pair in pairs if known][: plan.queries // 2]
        chosen = labelled + [pair for known, pair in pairs if not known][: plan.queries - len(labelled)]
        made = (pool.example(pair, TEACHER[language], generator, n=RERANKER.max_documents) for pair in chosen)
        examples += [example for example in made if example is not None]
    generator.shuffle(examples)
    part = options.work / "examples.part"
    with open(part, "w", encoding="utf-8") as file:
        for example in examples:
            row = {key: value for key, value in asdict(example).items() if key != "teacher"}
            row["scores"] = [round(score, 3) for score in row["scores"]]
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    part.rename(options.work / "examples")


def make_reranker(options: argparse.Namespace) -> None:
    """Train the reranker; an interrupted training goes on from its last saved state."""
    part = options.work / "reranker.part"
    resume = any((part / "states").glob("checkpoint-*/trainer_state.json"))
    examples = load_training_data(options.work / "examples").examples
    report = train_reranker(str(options.work / "start"), examples, part, training=RERANKER, resume=resume)
    print(f"loss {report.losses[0][1]:.3f} to {report.losses[-1][1]:.3f}", flush=True)
    part.rename(options.work / "reranker")


def queries_with_passages(
    rows: list[tuple[bool, Pair]], chars: int, generator: random.Random, *, limit: int
) -> Iterator[tuple[bool, Pair]]:
    """Yield pairs cut to the passage that fits the query best; some free ones become keyword queries."""
    rows = list(rows)
    generator.shuffle(rows)
    rows = [row for row in rows if row[0]] + [row for row in rows if not row[0]][:limit]
    cut = [(known, Pair(p.query[:160], best_passage(p, chars), p.source)) for known, p in rows]
    cut = [(known, pair) for known, pair in cut if len(pair.document) >= 12 and pair.query.strip()]
    frequency = Counter(term for _, pair in cut for term in set(terms(pair.document)))
    for known, pair in cut:
        usable = [t for t in terms(pair.document) if len(t) > 1 and 1 < frequency[t] < len(cut) // 20]
        if known or len(set(usable)) < 5 or generator.random() > 0.3:
            yield known, pair
        else:
            yield known, Pair(keyword_query(pair.document, frequency, usable, generator), pair.document, pair.source)


def best_passage(pair: Pair, chars: int) -> str:
    """Return the passage of the document that shares the most terms with the query; of code the beginning."""
    if pair.source not in TRAINED_ON and "(simplified)" not in pair.source:
        return pair.document[:chars]
    wanted = set(terms(pair.query))
    parts = passages(pair.document, chars=chars)
    return max(parts, key=lambda part: len(wanted & set(terms(part))), default="")[: chars * 5 // 4]


def install(work: Path) -> None:
    """Copy both models into the package, weights as float16."""
    reranker = work / "reranker"
    for source, name, files in (
        (work / "embedder", "embedder", EMBEDDER_FILES),
        (reranker, "reranker", RERANKER_FILES),
    ):
        (PACKAGE / name).mkdir(parents=True, exist_ok=True)
        for file in files:
            shutil.copyfile(source / file, PACKAGE / name / file)
    weights = {key: tensor.half().contiguous() for key, tensor in load_file(reranker / "model.safetensors").items()}
    save_file(weights, PACKAGE / "reranker" / "model.safetensors", metadata={"format": "pt"})
    config = PACKAGE / "reranker" / "config.json"
    saved = json.loads(config.read_text(encoding="utf-8")) | {"dtype": "float16"}
    config.write_text(json.dumps(saved, indent=2) + "\n", encoding="utf-8")


EMBEDDER_FILES = ("model.safetensors", "tokenizer.json", "modules.json", "config_sentence_transformers.json")
RERANKER_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


STAGES = {"embedder": make_embedder, "start": make_start, "examples": make_examples, "reranker": make_reranker}


if __name__ == "__main__":
    main()
