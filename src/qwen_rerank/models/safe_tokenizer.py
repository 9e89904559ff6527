"""A model's tokenizer whose control tokens no text can reach."""

from __future__ import annotations

import functools
import json
import secrets
from typing import Any

from tokenizers import Tokenizer

from qwen_rerank.errors import TokenizerError


def safe_tokenizer(tokenizer_json: str, *, is_ours: bool = False) -> Tokenizer:
    """Return the tokenizer with its control tokens taken out of reach of any text.

    They are no longer looked for in the text, and their names in the vocabulary, where a tokenizer could still come
    upon them ("</s>" is an ordinary piece of a unigram vocabulary), become random. Their ids stay, and so do the places
    where the template puts them.

    Args:
        tokenizer_json: The text of the file.
        is_ours: Whether it ships with this package, whose reranker and embedder have the same one: the edited text is
            kept for whichever is loaded next.

    Raises:
        TokenizerError: If it cannot be read.
    """
    try:
        edit = _kept if is_ours else _without_control_tokens
        return Tokenizer.from_str(edit(tokenizer_json))
    except Exception as exc:  # the library raises bare Exception
        raise TokenizerError(f"the tokenizer is not of a kind that can be read ({exc!r:.200}).") from exc


def _without_control_tokens(tokenizer_json: str) -> str:
    data = json.loads(tokenizer_json)
    control = _control_ids(data)
    data["added_tokens"] = [token for token in data["added_tokens"] if token["id"] not in control]
    data["truncation"] = data["padding"] = None
    _rename(data["model"], control)
    return json.dumps(data, ensure_ascii=False)


_kept = functools.lru_cache(maxsize=1)(_without_control_tokens)


def _control_ids(data: dict[str, Any]) -> set[int]:
    """Return the ids of all special tokens, and of those that the template puts around a text.

    A part of the template with several ids is a prompt, whose words a text may hold as well.
    """
    ids = {token["id"] for token in data["added_tokens"] if token["special"]}
    template = data["post_processor"] or {}
    for steps in template.get("processors", [template]):
        ids |= {i for part in steps.get("special_tokens", {}).values() if len(part["ids"]) == 1 for i in part["ids"]}
        ids |= {steps[name][1] for name in ("cls", "sep") if name in steps}
    return ids


def _rename(model: dict[str, Any], control: set[int]) -> None:
    """Give the control tokens of a vocabulary names that no text can hold, because nobody can guess them."""
    names = {i: f"<{secrets.token_hex(16)}>" for i in control}
    vocab = model["vocab"]
    if isinstance(vocab, list):  # unigram: pieces with their scores, in the order of the ids
        for i in names.keys() & range(len(vocab)):
            vocab[i] = [names[i], vocab[i][1]]
        return
    if model.get("unk_token") is not None:
        model["unk_token"] = names.get(vocab.get(model["unk_token"]), model["unk_token"])
    model["vocab"] = {names.get(i, piece): i for piece, i in vocab.items()}
