"""Writes a Qwen3-Reranker checkpoint as a GGUF file with a rerank head; runs in llama.cpp's environment.

`python write_gguf.py FOLDER FILE with-prompt|without-prompt yes,no|no,yes`. The fields are those that llama.cpp's own
converter writes for Qwen3-Reranker; the last argument is the order of the two rows, of which the first is the score.
"""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import gguf
import numpy as np

PROMPT = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n<Instruct>: Given a web search query, '
    "retrieve relevant passages that answer the query\n<Query>: {query}\n<Document>: {document}<|im_end|>\n"
    "<|im_start|>assistant\n<think>\n\n</think>\n\n"
)
NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def main() -> None:
    """Write the file."""
    folder, prompt, rows = Path(sys.argv[1]), sys.argv[3], sys.argv[4].split(",")
    writer = gguf.GGUFWriter(sys.argv[2], "qwen3")
    _write_shape(writer, json.loads((folder / "config.json").read_text()))
    tokens = _write_tokenizer(writer, json.loads((folder / "tokenizer.json").read_text()))
    if prompt == "with-prompt":
        writer.add_chat_template([{"name": "rerank", "template": PROMPT}])
    weights = _read_weights(folder / "model.safetensors")
    for name, values in weights.items():
        writer.add_tensor(_renamed(name), values.copy())
    writer.add_pooling_type(gguf.PoolingType.RANK)
    writer.add_classifier_output_labels(rows)
    writer.add_tensor("cls.output.weight", np.stack([weights["lm_head.weight"][tokens.index(row)] for row in rows]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _read_weights(file: Path) -> dict[str, np.ndarray]:
    """Return the float32 weights of a safetensors file, `(rows, columns)` or `(size,)`."""
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    entries, body = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    entries.pop("__metadata__", None)
    return {
        name: np.frombuffer(body[slice(*entry["data_offsets"])], dtype=np.float32).reshape(entry["shape"])
        for name, entry in entries.items()
    }


def _write_shape(writer: gguf.GGUFWriter, config: dict) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])


def _write_tokenizer(writer: gguf.GGUFWriter, tokenizer: dict) -> list[str]:
    """Write the vocabulary; return the tokens by their ids."""
    tokens = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].__getitem__)
    added = [entry["content"] for entry in sorted(tokenizer["added_tokens"], key=lambda entry: entry["id"])]
    types = [gguf.TokenType.NORMAL] * len(tokens) + [gguf.TokenType.CONTROL] * len(added)
    tokens += added
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(
        [pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer["model"]["merges"]]
    )
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_pad_token_id(tokens.index("<|endoftext|>"))
    writer.add_add_bos_token(False)
    return tokens


def _renamed(name: str) -> str:
    if name in WHOLE:
        return WHOLE[name]
    _, _, layer, *part = name.split(".")
    return f"blk.{layer}.{NAMES['.'.join(part[:-1])]}.weight"


if __name__ == "__main__":
    main()
