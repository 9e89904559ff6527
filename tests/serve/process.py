"""A real server process with a stub scorer: `python -m tests.serve.process '{"scorer": "Oracle", ...}'`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class ServerProcess:
    """A running server and the events it has logged so far."""

    process: subprocess.Popen[str]
    events: list[dict[str, Any]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    port: int = 0
    arrived: threading.Condition = field(default_factory=threading.Condition)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait_for(self, **fields: Any) -> dict[str, Any]:
        """Return the first event with these fields; fails if the process ends without one."""

        def found() -> dict[str, Any] | None:
            return next((e for e in self.events if fields.items() <= e.items()), None)

        with self.arrived:
            self.arrived.wait_for(lambda: found() or self.process.poll() is not None, timeout=60)
            event = found()
        if event is None:
            raise AssertionError(f"no event {fields} in {self.lines}")
        return event

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit status."""
        self.process.send_signal(number)
        return self.process.wait(60)

    def follow(self) -> None:
        """Read the log until it ends."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self.arrived:
                self.lines.append(line)
                with contextlib.suppress(ValueError):
                    self.events.append(json.loads(line))
                self.arrived.notify_all()
        self.process.wait()
        with self.arrived:
            self.arrived.notify_all()


@contextlib.contextmanager
def running(
    command: Sequence[str], *, ready: bool = True, env: dict[str, str] | None = None
) -> Iterator[ServerProcess]:
    """Start a server process, wait until it is ready, and end it afterwards."""
    process = subprocess.Popen(
        [sys.executable, *command],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
        env={**os.environ, **(env or {})},
    )
    server = ServerProcess(process)
    reader = threading.Thread(target=server.follow, daemon=True)
    reader.start()
    try:
        server.port = server.wait_for(message="listening")["port"]
        if ready:
            server.wait_for(state="ready")
        yield server
    finally:
        process.kill()
        process.wait()
        reader.join(10)
        assert process.stderr is not None
        process.stderr.close()


@contextlib.contextmanager
def stub_server(scorer: str = "Oracle", *, ready: bool = True, **options: Any) -> Iterator[ServerProcess]:
    """Run a stub of `tests.serve.stubs`; `arguments` go to it, `settings` to `ServeSettings`, the rest to `serve`."""
    config = json.dumps({"scorer": scorer, **options})
    with running(["-m", "tests.serve.process", config], ready=ready) as server:
        yield server


def main() -> None:
    from qwen_rerank.serve import telemetry
    from qwen_rerank.serve.process import serve
    from qwen_rerank.serve.settings import ServeSettings
    from tests.serve import stubs

    config = json.loads(sys.argv[1])
    telemetry.configure()
    make = getattr(stubs, config.pop("scorer"))
    arguments = config.pop("arguments", [])
    settings = ServeSettings(**config.pop("settings", {}))
    serve(lambda: make(*arguments), port=0, settings=settings, **config)


if __name__ == "__main__":
    main()
