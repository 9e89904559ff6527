"""`qwen-rerank doctor` and `help`: what is wrong, and the line that cures it."""

from __future__ import annotations

import pickle
import re
import sys
import traceback
from importlib import import_module

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from qwen_rerank.cli import app, doctor
from qwen_rerank.errors import ModelNotFoundError, RerankError
from qwen_rerank.extras import pip_line
from qwen_rerank.help import sections


def test_both_faiss_wheels_at_once_are_a_problem_with_its_cure():
    (finding,) = doctor._faiss({"faiss-cpu": "1.15.1", "faiss-gpu": "1.15.2"})

    assert finding.level == "problem"
    assert finding.seen.startswith("faiss-cpu 1.15.1 and faiss-gpu 1.15.2 overwrite")
    assert "pip uninstall -y faiss-cpu faiss-gpu" in finding.cure


def test_a_missing_faiss_is_a_note_with_its_extra():
    (finding,) = doctor._faiss({})

    assert (finding.level, finding.cure) == ("note", pip_line("faiss-cpu"))


def test_a_base_install_has_no_problem_and_says_what_torch_would_bring(monkeypatch):
    monkeypatch.setattr(
        doctor, "installed_version", {"tokenizers": "1", "safetensors": "1", "huggingface-hub": "1"}.get
    )

    findings = {finding.subject: finding for finding in (*doctor._core(), *doctor._extras(), *doctor._hardware())}

    assert {finding.level for finding in findings.values()} == {"ok", "note"}
    assert findings["extra local"].cure == pip_line("local")
    assert "mini scores here (--model mini), or a server" in findings["largest model"].seen


@pytest.mark.parametrize(
    ("gib", "dtype", "largest"),
    [
        pytest.param(1, "bfloat16", "none", id="too small for all"),
        pytest.param(4, "bfloat16", "Qwen/Qwen3-Reranker-0.6B", id="small GPU"),
        pytest.param(16, "bfloat16", "Qwen/Qwen3-Reranker-4B", id="T4"),
        pytest.param(24, "bfloat16", "Qwen/Qwen3-Reranker-8B", id="A10G"),
        pytest.param(24, "float32", "Qwen/Qwen3-Reranker-4B", id="laptop in float32"),
    ],
)
def test_the_largest_model_that_fits_is_named(gib, dtype, largest):
    finding = doctor._fitting("here", gib * 1024**3, dtype=dtype)

    assert finding.seen.startswith(largest)
    assert f"here ({gib} GiB) in {dtype}" in finding.seen
    assert finding.cure.startswith("try: qwen-rerank demo")


@pytest.mark.parametrize("broken", ["torch", "faiss", "huggingface_hub"])
def test_a_package_that_does_not_import_is_a_problem_and_no_crash(monkeypatch, broken):
    monkeypatch.setitem(sys.modules, broken, None)

    problems = [finding for finding in doctor.examine() if finding.level == "problem"]

    assert [finding.cure.startswith("pip ") for finding in problems] == [True]


def test_a_problem_is_exit_status_1_and_the_report_says_what_to_type_next(monkeypatch):
    monkeypatch.setattr(doctor, "_faiss", lambda wheels: [doctor.Observation("problem", "faiss", "broken", "mend it")])

    result = CliRunner().invoke(app, ["doctor"])

    assert result.exit_code == 1
    assert "✗ faiss: broken\n    mend it\n" in result.output
    assert "qwen-rerank demo\n" in result.output


def test_every_finding_has_something_to_read():
    findings = doctor.examine()

    assert all(finding.subject and finding.seen for finding in findings)
    assert {"Python", "torch", "faiss", "model hub"} <= {finding.subject for finding in findings}


def test_both_languages_have_the_same_topics():
    english, chinese = sections("en"), sections("zh")

    assert list(english) == list(chinese)
    assert {"model", "hub", "long-text", "slow", "memory", "scores", "port", "store", "faiss"} == set(english)
    for topic in english:
        pages = english[topic], chinese[topic].replace("`docs/zh/", "`docs/en/")
        codes = [set(re.findall(r"`([^`]+)`", page)) for page in pages]
        assert {code for code in codes[0] ^ codes[1] if code.isascii()} <= {"from_pretrained(…).save_pretrained(…)"}


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_command_and_option_on_the_page_exists(language):
    text = "\n".join(sections(language).values())
    commands = re.findall(r"`(qwen-rerank [^`]+)`", text)

    assert len(commands) > 5
    for command in commands:
        _, *words = command.split()
        node, group = get_command(app), get_command(app)
        while words and hasattr(group, "commands"):
            node = group = group.commands[words.pop(0)]
        options = {name for parameter in node.params for name in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options, command


def test_every_error_of_a_topic_leads_to_a_section():
    import_module("qwen_rerank.store.errors")  # brings more subclasses
    kinds, found = [RerankError], set()
    while kinds:
        kind = kinds.pop()
        kinds += kind.__subclasses__()
        found.add(kind.topic)
    assert found - {""} <= set(sections("en"))
    assert {"model", "store", "memory", "long-text", "port", "faiss"} <= found


def test_a_traceback_ends_with_the_section_that_helps():
    error = ModelNotFoundError("no such model")

    assert traceback.format_exception(error)[-1] == "What helps: qwen-rerank help model\n"
    assert str(error) == "no such model"
    assert pickle.loads(pickle.dumps(error)).__notes__ == error.__notes__


def test_the_hub_is_asked_and_not_only_named(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")

    seen = doctor._hub()

    assert seen.level == "note"
    assert "cannot be reached (http://127.0.0.1:9: " in seen.seen
    assert "a mirror: export HF_ENDPOINT=" in seen.cure


def test_a_hub_that_does_not_answer_is_given_two_seconds(monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("qwen_rerank.models.names.why_no_hub", lambda *, timeout_s: asked.append(timeout_s))

    assert doctor._hub().level == "ok"
    assert asked == [2.0]
