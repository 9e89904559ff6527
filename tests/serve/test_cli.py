"""`qwen-rerank serve` with a real, very small model."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
from typer.testing import CliRunner

from qwen_rerank.cli import app
from qwen_rerank.scorers.cross_encoder import CrossEncoderScorer
from tests.checkpoints import small_checkpoint
from tests.scorers.cross_encoders import make_bert
from tests.serve.conftest import KEY
from tests.serve.process import ROOT, running

SERVE = ["-m", "qwen_rerank", "serve"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("models") / "small-reranker")


def failing(*options: str, env: dict[str, str] | None = None) -> str:
    """Run a command that must fail before it opens a port; return what it says."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    done = subprocess.run(
        [sys.executable, *SERVE, "--port", str(port), *options],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
        env={**os.environ, **(env or {})},
    )
    assert done.returncode != 0
    assert "listening" not in done.stderr
    assert "Traceback" not in done.stderr
    with socket.socket() as sock:
        assert sock.connect_ex(("127.0.0.1", port)) != 0
    return done.stderr


def test_a_model_is_served_with_keys_names_and_long_documents_in_windows(model):
    options = ["--model", str(model), "--port", "0", "--served-name", "mine", "--long-documents", "windows"]
    body = {
        "model": "mine",
        "query": "适合程序员的机械键盘",
        "documents": ["键盘", "x " * 20_000],
        "return_details": True,
    }
    with running([*SERVE, *options, "--max-length", "1024"], env={"QWEN_RERANK_API_KEYS": KEY}) as server:
        refused = httpx2.post(f"{server.url}/v1/rerank", json=body, timeout=60)
        answer = httpx2.post(f"{server.url}/v1/rerank", json=body, headers={"api-key": KEY}, timeout=60).json()
        status = server.stop()

    results = {result["index"]: result for result in answer["results"]}
    assert refused.status_code == 401
    assert answer["model"] == "mine"
    assert (results[0]["windows"], results[0]["truncated"]) == (1, False)
    assert results[1]["windows"] > 1
    assert status == 0


@pytest.mark.parametrize("old", [[], ["--kind", "cross-encoder"]], ids=["a name is enough", "as it was once said"])
def test_a_cross_encoder_is_served_with_its_dtype_and_length(tmp_path, monkeypatch, old):
    loaded = []
    monkeypatch.setattr("qwen_rerank.serve.process.serve", lambda load, **options: loaded.append(load()))
    monkeypatch.setattr("qwen_rerank.serve.telemetry.configure", lambda **options: None)
    options = [
        "--model",
        str(make_bert(tmp_path / "m")),
        "--dtype",
        "bfloat16",
        "--max-length",
        "20",
        "--device",
        "cpu",
    ]

    done = CliRunner().invoke(app, ["serve", *options, *old])

    assert done.exit_code == 0, done.output
    assert ("--kind is not needed any more" in done.output) is bool(old)
    assert isinstance(loaded[0], CrossEncoderScorer)
    assert (loaded[0].config.dtype, loaded[0].config.max_length) == ("bfloat16", 20)


def test_the_prompt_tokens_are_those_of_the_real_prompts(model):
    """Every token of every prompt counts: frame, instruction, query, and what is read of the document."""
    from qwen_rerank.scorers.qwen import QwenScorer

    texts = ["键盘 keyboard", "", "z" * 900]
    with QwenScorer(str(model), max_length=512, device="cpu") as scorer:
        expected = sum(len(prompt.ids) for prompt in scorer.encoder.encode("q w e", texts))
    with running([*SERVE, "--model", str(model), "--port", "0", "--max-length", "512", "--device", "cpu"]) as server:
        answer = httpx2.post(f"{server.url}/v1/rerank", json={"query": "q w e", "documents": texts}, timeout=60).json()

    assert answer["usage"] == {"prompt_tokens": expected, "total_tokens": expected}


def test_a_killed_server_is_started_again_on_the_same_port():
    with running([*SERVE, "--model", "mini", "--port", "0", "--supervise"]) as server:
        child = server.wait_for(message="listening")["pid"]
        os.kill(child, signal.SIGKILL)
        server.events.clear()
        server.wait_for(state="ready")
        answer = httpx2.post(f"{server.url}/v1/rerank", json={"query": "q", "documents": ["a"]}, timeout=60)
        status = server.stop()

    assert answer.status_code == 200
    assert status == 0


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: None, "small-reranker"),
        (lambda folder: folder.mkdir(), "config.json"),
        (lambda folder: folder.write_text("x"), "small-reranker"),
    ],
    ids=["missing", "empty", "a file"],
)
def test_a_wrong_model_ends_before_a_port_is_opened(tmp_path, damage, says):
    damage(tmp_path / "small-reranker")

    assert says in failing("--model", str(tmp_path / "small-reranker"))


def test_other_machines_are_not_let_in_by_accident(model):
    assert "--no-auth" in failing("--model", str(model), "--host", "0.0.0.0")
    said = failing("--model", str(model), "--api-keys", "short")
    assert "keys are not shown" in said
    assert "short" not in said.replace("shorter", "")
