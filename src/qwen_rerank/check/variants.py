"""The prompts that servers are known to make instead of the recipe's.

Each was seen in a server's sources or a user's report; the texts are rendered here, so that a reference model can
score them and a server's scores can be recognised.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from qwen_rerank.prompt import DEFAULT_INSTRUCTION, PromptSpec

REPOSITORY_INSTRUCTION = "Given the user query, retrieval the relevant passages"
_JUDGE = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".'
)
_TEMPLATE = "qwen-rerank template {server} > qwen3.jinja, and start the server with --chat-template qwen3.jinja"
VLLM_FLAGS = (
    '--hf_overrides \'{"architectures":["Qwen3ForSequenceClassification"],"classifier_from_token":["no","yes"],'
    '"is_original_qwen3_reranker":true}\''
)
_NO_PROMPTS = (
    "Infinity makes no prompts; serve this model with vLLM, SGLang, llama.cpp, Xinference or qwen-rerank serve"
)
_IDS = "or send exact prompts: HttpScorer(url, tokenizer=...)"

Render = Callable[[PromptSpec, str, str, str], str]


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to make a prompt.

    Attributes:
        key: Short name.
        title: For people.
        render: Spec, instruction, query and document to the text of the prompt.
        status: How bad it is that a server does this.
        why: What is different, and what it does to the scores.
        cure: What helps, by the server's dialect; "" is for any.
    """

    key: str
    title: str
    render: Render
    status: Literal["ok", "warning", "wrong"]
    why: str
    cure: dict[str, str]

    def cure_for(self, dialect: str) -> str:
        """Return what helps on this kind of server."""
        return self.cure.get(dialect, self.cure.get("", ""))


def _recipe(spec: PromptSpec, instruction: str, query: str, document: str) -> str:
    return spec.prefix + spec.body(instruction, query, document) + spec.suffix


def _no_template(spec: PromptSpec, instruction: str, query: str, document: str) -> str:
    return query + document


def _newline_short(spec: PromptSpec, instruction: str, query: str, document: str) -> str:
    return _recipe(replace(spec, suffix=spec.suffix.removesuffix("\n")), instruction, query, document)


def _without_think(spec: PromptSpec) -> PromptSpec:
    return replace(spec, suffix=spec.suffix.split("<think>")[0])


def _no_think(spec: PromptSpec, instruction: str, query: str, document: str) -> str:
    return _recipe(_without_think(spec), instruction, query, document)


def _sglang(spec: PromptSpec, instruction: str, query: str, document: str) -> str:
    return _recipe(_without_think(spec), _full_stop(instruction), query, document)


def _empty(spec: PromptSpec, instruction: str, query: str, document: str) -> str:
    return _recipe(spec, instruction, "", "")


def _empty_doubled(spec: PromptSpec, instruction: str, query: str, document: str) -> str:
    return _recipe(spec, _JUDGE, "", "") + spec.suffix


def _two_newlines(spec: PromptSpec, instruction: str, query: str, document: str) -> str:
    return _recipe(replace(spec, separator="\n\n"), instruction, query, document)


def _other_instruction(spec: PromptSpec, instruction: str, query: str, document: str) -> str:
    other = REPOSITORY_INSTRUCTION if instruction == DEFAULT_INSTRUCTION else instruction
    return _recipe(spec, other, query, document)


def _stopped_instruction(spec: PromptSpec, instruction: str, query: str, document: str) -> str:
    return _recipe(spec, _full_stop(instruction), query, document)


def _no_suffix(spec: PromptSpec, instruction: str, query: str, document: str) -> str:
    return _recipe(replace(spec, suffix=""), instruction, query, document)


def _full_stop(instruction: str) -> str:
    return instruction + "." if instruction == DEFAULT_INSTRUCTION else instruction


RECIPE = Variant("recipe", "the model card's prompt", _recipe, "ok", "", {})

VARIANTS = (
    RECIPE,
    Variant(
        "no-template",
        "no template: query and document side by side",
        _no_template,
        "wrong",
        "the server was started without a score template, and does not use the tokenizer's; scores are near random.",
        {
            "vllm": _TEMPLATE.format(server="vllm") + f" and {VLLM_FLAGS}; {_IDS}",
            "sglang": _TEMPLATE.format(server="sglang") + f"; {_IDS}",
            "infinity": _NO_PROMPTS,
            "llamacpp": "convert the checkpoint with llama.cpp's own converter, which writes the prompt into the GGUF file",
            "": "give the server the model card's prompt as its rerank template",
        },
    ),
    Variant(
        "newline-short",
        "the prompt ends one newline short",
        _newline_short,
        "wrong",
        "vLLM's own qwen3_reranker.jinja does this: the file ends in two newlines and Jinja removes one, so the answer "
        "is read one token off.",
        {"vllm": _TEMPLATE.format(server="vllm") + f"; {_IDS}", "": "end the template's file with one more newline"},
    ),
    Variant(
        "sglang-template",
        "no <think> block, and an instruction with a full stop",
        _sglang,
        "wrong",
        "SGLang's own qwen3_reranker.jinja does this; the model is asked before its thinking is closed.",
        {
            "sglang": _TEMPLATE.format(server="sglang") + f"; {_IDS}",
            "": "end the template in <think>\\n\\n</think>\\n\\n",
        },
    ),
    Variant(
        "no-think",
        "no <think> block",
        _no_think,
        "wrong",
        "the model is asked before its thinking is closed.",
        {
            "vllm": _TEMPLATE.format(server="vllm") + f"; {_IDS}",
            "sglang": _TEMPLATE.format(server="sglang") + f"; {_IDS}",
            "": "end the template in <think>\\n\\n</think>\\n\\n",
        },
    ),
    Variant(
        "empty-prompt",
        "a prompt with neither query nor document",
        _empty,
        "wrong",
        "the hub's newer chat_template.jinja reads the roles query and document and drops user messages.",
        {
            "vllm": _TEMPLATE.format(server="vllm") + f"; {_IDS}",
            "sglang": _TEMPLATE.format(server="sglang") + f"; {_IDS}",
            "": "give the server the model card's prompt; never the tokenizer's chat template",
        },
    ),
    Variant(
        "empty-prompt-doubled",
        "a prompt with neither query nor document, and its end twice",
        _empty_doubled,
        "wrong",
        "the hub's newer chat_template.jinja drops user messages and already brings the end that the code appends again.",
        {"": "build the prompt from the model card's strings, not with apply_chat_template"},
    ),
    Variant(
        "two-newlines",
        "the authors' other prompt: fields joined by two newlines",
        _two_newlines,
        "warning",
        "the authors' vLLM code does this, and their published results; scores differ from the model card's prompt.",
        {"": "compare only scores of the same prompt; QwenScorer(template='vllm') makes this one"},
    ),
    Variant(
        "repository-instruction",
        f"another default instruction: {REPOSITORY_INSTRUCTION!r}",
        _other_instruction,
        "warning",
        "the authors' example code has this default; the model card has another.",
        {"": "send the instruction with every request"},
    ),
    Variant(
        "instruction-full-stop",
        "the default instruction with a full stop",
        _stopped_instruction,
        "warning",
        "the server's template ends the default instruction with a full stop; scores shift a little.",
        {"": "send the instruction with every request"},
    ),
    Variant(
        "suffix-cut",
        "the end of the prompt is missing",
        _no_suffix,
        "wrong",
        "a length limit cut the prompt's end, or the template lacks it; the model is never asked for its answer.",
        {"": "cut documents, not prompts: HttpScorer(url, tokenizer=...), or max_tokens_per_doc on vLLM"},
    ),
)
