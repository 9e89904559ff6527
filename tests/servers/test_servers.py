"""Real servers, unchanged, with a small checkpoint of Qwen3's architecture: what the client gets, what `check` says."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest

from tests.servers.running import RESULTS, SERVERS, measure, version_of

# An environment takes minutes and gigabytes to make, and vLLM up to minutes to start.
pytestmark = [pytest.mark.servers, pytest.mark.timeout(3_600)]
EXACT = 1e-4
CLOSE = 0.02  # llama.cpp computes in other precisions

seen = cache(measure)


def clients(name: str, setting: str, *, tokenizer: bool) -> list[dict[str, Any]]:
    """Return what came back, with the dialect found out and named."""
    found = seen(name, setting)["client"]
    return [found[f"{dialect}, {'with' if tokenizer else 'without'} tokenizer"] for dialect in ("auto", name)]


@pytest.mark.parametrize("setting", SERVERS["vllm"].settings)
def test_with_a_tokenizer_vllm_is_exact_however_it_was_started(setting):
    for asked in clients("vllm", setting, tokenizer=True):
        assert (asked["log_odds"], asked["instructed"]) == (pytest.approx(0, abs=EXACT),) * 2


@pytest.mark.parametrize(("name", "close"), [("vllm", EXACT), ("llamacpp", CLOSE), ("xinference", EXACT)])
def test_a_server_that_makes_the_prompt_is_right_without_a_tokenizer(name, close):
    for asked in clients(name, "template", tokenizer=False):
        assert asked["log_odds"] == pytest.approx(0, abs=close)


@pytest.mark.parametrize("name", ["llamacpp", "infinity"])
def test_an_instruction_that_a_server_would_ignore_is_refused(name):
    [setting, *_] = SERVERS[name].settings
    for asked in clients(name, setting, tokenizer=False):
        assert "cannot be given an instruction" in asked["says"]


@pytest.mark.parametrize(
    ("name", "setting", "verdict", "cause", "cure"),
    [
        ("vllm", "template", "right", "recipe", None),
        ("vllm", "logits", "right", "recipe", None),
        ("vllm", "no template", "wrong", "no-template", "--chat-template qwen3.jinja"),
        ("llamacpp", "template", "right", "recipe", None),
        ("llamacpp", "no template", "wrong", "no-template", "convert the checkpoint"),
        ("llamacpp", "labels swapped", "wrong", "labels-swapped", "see range"),
        ("infinity", "no template", "wrong", "no-template", "makes no prompts"),
        ("xinference", "template", "right", "recipe", None),
    ],
)
def test_check_names_what_is_wrong_and_the_cure(name, setting, verdict, cause, cure):
    said = seen(name, setting)["check"]

    assert (said["verdict"], said["cause"]) == (verdict, cause)
    assert cure is None or cure in said["cures"]["agreement"]


def test_logits_where_probabilities_are_usual_are_refused_and_pointed_out():
    for asked in clients("vllm", "logits", tokenizer=False):
        assert "scores='logit' takes them as logits" in asked["says"]
    assert seen("vllm", "logits")["check"]["rows"]["range"] == "warning"


def test_a_vllm_that_generates_says_what_it_is_instead_of_not_found():
    [asked, _] = clients("vllm", "generates", tokenizer=False)

    assert "generates scores through HttpScorer(url, tokenizer=...)" in asked["says"]
    assert "generates scores through" in seen("vllm", "generates")["check"]["says"]


@pytest.mark.parametrize("name", SERVERS)
def test_the_committed_results_are_of_the_version_that_runs_here(name):
    assert json.loads(RESULTS.read_text())["servers"][name]["version"] == version_of(name)
