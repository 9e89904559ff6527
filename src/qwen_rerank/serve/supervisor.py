"""A parent that keeps the port and starts the server again when it dies."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from types import FrameType

from qwen_rerank.serve.runner import listen

logger = logging.getLogger("qwen_rerank.serve")

_COMMAND = "from qwen_rerank.cli import main; main()"
_LISTENER = "QWEN_RERANK_LISTENER_FD"
_HEALTHY_S = 30.0  # a server that lived this long is started again at once
_MAX_QUICK_DEATHS = 5


def is_child() -> bool:
    """Whether this process was started by a supervisor."""
    return _LISTENER in os.environ


def inherited_listener() -> socket.socket | None:
    """Return the supervisor's listening socket in its child, else None."""
    descriptor = os.environ.get(_LISTENER)
    return socket.socket(fileno=int(descriptor)) if descriptor else None


def supervise(host: str, port: int) -> int:
    """Run this very command line as a child until it ends well or is told to stop; return its exit status.

    A child that a signal killed has the status 128 and the signal's number, as in a shell.

    The listening socket stays open here, so clients that come while the child starts wait instead of being refused.

    Raises:
        InvalidInputError: If the address cannot be had.
    """
    listener = listen(host, port)
    listener.set_inheritable(True)
    return _Supervisor(listener).run()


class _Supervisor:
    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._child: subprocess.Popen[bytes] | None = None
        self._stopping = False

    def run(self) -> int:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._forward)
        quick_deaths = 0
        while True:
            started = time.monotonic()
            code = self._run_child()
            if self._stopping or code == 0:
                return code if code >= 0 else 128 - code
            quick_deaths = quick_deaths + 1 if time.monotonic() - started < _HEALTHY_S else 0
            logger.error("the server died", extra={"event": {"exit_status": code, "quick_deaths": quick_deaths}})
            if quick_deaths >= _MAX_QUICK_DEATHS:
                return code if code > 0 else 1
            time.sleep(0.1 * 2**quick_deaths)

    def _run_child(self) -> int:
        descriptor = self._listener.fileno()
        self._child = subprocess.Popen(
            [sys.executable, "-c", _COMMAND, *sys.argv[1:]],
            pass_fds=[descriptor],
            env={**os.environ, _LISTENER: str(descriptor)},
        )
        return self._child.wait()

    def _forward(self, number: int, _: FrameType | None) -> None:
        self._stopping = True
        if self._child is not None:
            self._child.send_signal(number)
