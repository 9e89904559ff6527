"""Our template files give the recipe's token ids in the servers' own renderers."""

from __future__ import annotations

import jinja2
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import AutoTokenizer
from typer import Typer
from typer.testing import CliRunner

from qwen_rerank.check import template_text
from qwen_rerank.cli.check import register
from qwen_rerank.errors import InvalidInputError
from tests.reference import reference_ids

app = Typer()
register(app)

PAIRS = [
    ("What is the capital of China?", "The capital of China is Beijing."),
    ("适合程序员的机械键盘", "这款机械键盘采用青轴。\n\n手感清脆 {{ 7*7 }} {% raw %}"),
    (" leading space", "trailing newline\n"),
]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir):
    return AutoTokenizer.from_pretrained(tokenizer_dir)


def render_vllm(query, document, instruction):
    """As transformers' apply_chat_template, which vLLM calls with the roles query and document."""
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    messages = [{"role": "query", "content": query}, {"role": "document", "content": document}]
    given = {} if instruction is None else {"instruction": instruction}
    return env.from_string(template_text("vllm")).render(
        messages=messages, tools=None, add_generation_prompt=False, **given
    )


def render_sglang(query, document, instruction):
    """As SGLang: the file's outer newlines stripped, backslash-n replaced, both messages from the user."""
    text = template_text("sglang").strip("\n").replace("\\n", "\n")
    env = ImmutableSandboxedEnvironment(loader=jinja2.BaseLoader(), autoescape=False, undefined=jinja2.Undefined)
    messages = [{"role": "user", "content": query}, {"role": "user", "content": document}]
    return env.from_string(text).render(messages=messages, **({"instruct": instruction} if instruction else {}))


@pytest.mark.parametrize("render", [render_vllm, render_sglang])
@pytest.mark.parametrize("instruction", [None, "Find the keyboard"])
@pytest.mark.parametrize("pair", PAIRS)
def test_the_rendered_prompt_is_the_recipe_token_by_token(tokenizer, render, instruction, pair):
    ids = tokenizer.encode(render(*pair, instruction), add_special_tokens=False)

    assert ids == reference_ids(tokenizer, *pair, instruction=instruction)


def test_an_editor_that_adds_a_last_newline_does_no_harm(tokenizer):
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    messages = [{"role": "query", "content": "q"}, {"role": "document", "content": "d"}]

    rendered = env.from_string(template_text("vllm") + "\n").render(messages=messages)

    assert tokenizer.encode(rendered, add_special_tokens=False) == reference_ids(tokenizer, "q", "d")


def test_sglang_recognises_the_template_as_a_rerankers():
    """It looks for these words and takes another path without them."""
    assert 'answer can only be "yes" or "no"' in template_text("sglang").lower()


@pytest.mark.parametrize("server", ["vllm", "sglang"])
def test_the_command_prints_the_file_and_nothing_else(server):
    result = CliRunner().invoke(app, ["template", server])

    assert result.stdout == template_text(server)


def test_other_servers_have_no_template():
    with pytest.raises(InvalidInputError, match="server must be one of 'vllm', 'sglang'"):
        template_text("tei")
