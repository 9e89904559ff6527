"""The tokenizers of the two pocket models."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from qwen_rerank.prompt import DEFAULT_INSTRUCTION, PREFIX, SUFFIX, PromptSpec

_HAN_RUN = re.compile(r"[\u3400-\u9fff]+")
_WORD = re.compile(r"[a-z]+|[0-9]+")

# The split of the Qwen tokenizers: https://github.com/QwenLM/Qwen3-Embedding uses it unchanged.
_QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")


def count_words(texts: Iterable[str]) -> Counter[str]:
    """Return how often each lower-cased word of ASCII letters or digits occurs."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(_WORD.findall(text.lower()))
    return counts


def embedder_tokenizer(
    english: Counter[str], chinese: list[str], teacher_words: list[str], *, n_english: int, n_chinese: int
) -> Tokenizer:
    """Return a unigram tokenizer: words of lower-case Latin letters, Han characters and words, numbers.

    Args:
        english: Counts of `count_words`.
        chinese: Chinese texts.
        teacher_words: The teacher's vocabulary, most frequent first; `##` marks pieces inside words.
        n_english: English tokens.
        n_chinese: Chinese tokens.
    """
    scores = _log_shares(_english_tokens(english, teacher_words, n_english), _chinese_tokens(chinese, n_chinese))
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), *scores.items()], unk_id=0, byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[^\p{L}\p{N}]+"), "removed"),
            pre_tokenizers.Split(Regex(r"\p{Han}+|\p{N}+|[\p{L}&&[^\p{Han}]]+"), "isolated"),
        ]
    )
    return tokenizer


def _english_tokens(counts: Counter[str], teacher_words: list[str], limit: int) -> dict[str, float]:
    whole = [word for word in teacher_words if re.fullmatch(r"[a-z]+", word)]
    inner = [word[2:] for word in teacher_words if re.fullmatch(r"##[a-z]{2,5}", word)][:700]
    chosen = dict.fromkeys("abcdefghijklmnopqrstuvwxyz0123456789")
    chosen |= dict.fromkeys([str(n) for n in range(10, 100)] + [str(n) for n in range(1900, 2031)])
    chosen |= dict.fromkeys(inner)
    chosen |= dict.fromkeys(word for word, n in counts.most_common(6000) if n >= 12 and len(word) > 1)
    for word in whole:
        if len(chosen) >= limit:
            break
        chosen.setdefault(word)
    whole_set = set(whole)
    # A piece that is no word of its own is a last resort, so that it never replaces a word.
    return {word: counts[word] + (2.0 if word in whole_set or counts[word] else 0.1) for word in chosen}


def _chinese_tokens(texts: list[str], limit: int) -> dict[str, float]:
    runs = [run for text in texts for run in _HAN_RUN.findall(text)]
    characters = Counter(char for run in runs for char in run)
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[^\p{Han}]+"), "removed")
    trainer = trainers.UnigramTrainer(vocab_size=limit, max_piece_length=4, show_progress=False, unk_token="<unk>")
    tokenizer.train_from_iterator(runs, trainer)
    words = {
        tok: math.exp(score)
        for tok, score in json.loads(tokenizer.to_str())["model"]["vocab"]
        if len(tok) > 1 and _HAN_RUN.fullmatch(tok)
    }
    total = sum(characters.values())
    kept = {char: float(n) for char, n in characters.items() if n >= 2}
    ranked = sorted(words, key=words.__getitem__, reverse=True)[: limit - len(kept)]
    return {**{char: 0.1 * n for char, n in kept.items()}, **{word: words[word] * total for word in ranked}}


def _log_shares(*groups: dict[str, float]) -> dict[str, float]:
    scores = {}
    for group in groups:
        total = sum(group.values())
        scores |= {token: math.log(n / total) for token, n in group.items()}
    return scores


def reranker_tokenizer(english: list[str], chinese: list[str], *, size: int) -> Tokenizer:
    """Return a byte-level BPE tokenizer of the Qwen form with `size` tokens, the control tokens among them.

    Han characters are never merged with one another: at this size words would be cut differently in query and
    document, and single characters always match.
    """
    prompt = PREFIX + PromptSpec().body(DEFAULT_INSTRUCTION, "x", "x") + SUFFIX
    apart = [" ".join(_HAN_RUN.sub(lambda run: " ".join(run[0]), text).split()) for text in chinese]
    corpus = [*english, *(prompt for _ in range(1000)), *(f"{w} yes {w} no" for w in ("", "\n") * 1000)]
    # The byte pair that joins a space to a Han character must not be learned from the spaces put in above.
    han = [char for text in apart for char in text.split(" ")]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN_SPLIT), "isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(_CONTROL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        min_frequency=2,
    )
    tokenizer.train_from_iterator([*corpus, *han], trainer)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_tokens(
        [AddedToken(name, special=name.startswith("<|"), normalized=False) for name in _CONTROL_TOKENS]
    )
    return tokenizer
