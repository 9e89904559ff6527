"""The process that serves: its port, its signals, its end when the model hangs, and a parent that starts it again."""

from __future__ import annotations

import asyncio
import gc
import ipaddress
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from types import FrameType

import uvicorn
from fastapi import FastAPI

from qwen_rerank.errors import InvalidInputError
from qwen_rerank.protocols import FirstStage, SimpleScorer
from qwen_rerank.scorers.adapted import as_scorer
from qwen_rerank.serve.app import create_app
from qwen_rerank.serve.backend import Backend, State
from qwen_rerank.serve.connection import protocol_class
from qwen_rerank.serve.settings import ServeSettings

logger = logging.getLogger("qwen_rerank.serve")

EXIT_HUNG = 70
EXIT_FORCED = 143
_LAST_WORDS_S = 1.0
_SPARE_FILES = 64  # descriptors kept for everything that is no connection

_COMMAND = "from qwen_rerank.cli import main; main()"
_LISTENER = "QWEN_RERANK_LISTENER_FD"
_HEALTHY_S = 30.0  # a server that lived this long is started again at once
_MAX_QUICK_DEATHS = 5


def serve(
    load: Callable[[], SimpleScorer | str],
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    first_stage: FirstStage | None = None,
    settings: ServeSettings | None = None,
    api_keys: Sequence[str] = (),
    no_auth: bool = False,
    listener: socket.socket | None = None,
) -> None:
    """Serve until a signal says to stop; SIGTERM answers what is admitted, a second one ends at once.

    The exit status is 0 after the first, 143 after the second, and 70 where the model hung.

    Args:
        load: Returns the scorer, or a name that `load_scorer` knows; called in a thread, while the port answers 503.
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one, and the log says which.
        first_stage: A store, or another first stage, that the page at `/` searches.
        settings: Limits; None for the defaults.
        api_keys: Keys that open the server.
        no_auth: Listen on other addresses than this machine's own without any key.
        listener: A socket that listens already, instead of host and port.

    Raises:
        InvalidInputError: If it would listen to others without a key, or cannot listen there at all.
    """
    check_exposure(host, has_keys=bool(api_keys), no_auth=no_auth)
    sock = listener or listen(host, port)
    server = make_server(
        partial(_load_to_stay, load),
        first_stage=first_stage,
        settings=settings or ServeSettings(),
        api_keys=api_keys,
    )
    address, bound, *_ = sock.getsockname()
    url = f"http://[{address}]:{bound}" if ":" in address else f"http://{address}:{bound}"
    event = {"url": url, "address": address, "port": bound, "keys": len(api_keys), "pid": os.getpid()}
    logger.info("listening", extra={"event": event})
    server.run(sockets=[sock])


def _load_to_stay(load: Callable[[], SimpleScorer | str]) -> SimpleScorer:
    """Return the scorer, and take all that is there by now out of the garbage collector's sight.

    A full pass over a server's libraries and model stops every request for a tenth of a second and more, and under load
    there is one every few seconds.
    """
    scorer = as_scorer(load())
    gc.collect()
    gc.freeze()
    return scorer


def make_server(
    load: Callable[[], SimpleScorer | str],
    *,
    first_stage: FirstStage | None = None,
    settings: ServeSettings,
    api_keys: Sequence[str] = (),
) -> Server:
    """Return a server that `run(sockets=[…])` starts."""
    app = create_app(load=load, first_stage=first_stage, settings=settings, api_keys=api_keys)
    config = uvicorn.Config(
        app,
        http=protocol_class(_within_file_limit(settings)),
        ws="none",
        loop="asyncio",
        lifespan="on",
        h11_max_incomplete_event_size=settings.max_head_bytes,
        timeout_keep_alive=int(settings.keep_alive_s),
        timeout_graceful_shutdown=int(settings.grace_s),
        server_header=False,
        date_header=True,
        proxy_headers=False,
        access_log=False,
        log_config=None,
    )
    return Server(config, app, settings)


def check_exposure(host: str, *, has_keys: bool, no_auth: bool) -> None:
    """Refuse to be open to others by accident.

    Raises:
        InvalidInputError: If `host` is not this machine's own address and there is neither a key nor `no_auth`.
    """
    if has_keys or no_auth or _is_loopback(host):
        return
    raise InvalidInputError(
        f"host {host!r} lets other machines in, and no API key is set; give keys (--api-key-file or "
        "QWEN_RERANK_API_KEYS), listen on 127.0.0.1, or say --no-auth if something in front asks for keys."
    )


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket.

    Raises:
        InvalidInputError: If the address cannot be had.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        # Named, not left at 0: asyncio turns Nagle's wait off only where a socket says that it is TCP, and with the wait
        # each answer comes up to 40 ms late.
        sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        if os.name == "posix":  # under Windows it would let two servers have one port
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(2048)
    except (OSError, OverflowError) as exc:
        raise InvalidInputError(
            f"{host}:{port} cannot be listened on ({exc}); choose another --host or --port."
        ) from exc
    return sock


class Server(uvicorn.Server):
    """uvicorn's server with our way to end."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, settings: ServeSettings) -> None:
        super().__init__(config)
        self.backend: Backend = app.state.backend
        self._settings = settings
        self._hung = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal, to end with status 0; end at once at the second, with status 143."""
        if self.should_exit or self.backend.state is State.DRAINING:
            self.should_exit = self.force_exit = True
        else:
            asyncio.get_running_loop().call_soon_threadsafe(self._drain)

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until the end; leave at once where a thread of the model would hold the interpreter back."""
        await super().serve(sockets)
        if tasks := list(self.server_state.tasks):  # cancelled when the grace was over; they tell their clients so
            await asyncio.wait(tasks, timeout=_LAST_WORDS_S)
        code = EXIT_HUNG if self._hung else EXIT_FORCED if self.force_exit else 0
        if code or self.backend.busy:
            logging.shutdown()
            os._exit(code)

    def _drain(self) -> None:
        self.backend.enter(State.DRAINING, "the server is shutting down")
        asyncio.get_running_loop().call_later(self._settings.drain_delay_s, self._close)

    def _close(self) -> None:
        self.should_exit = True

    async def main_loop(self) -> None:
        """Run until told to end, or until the model hangs."""
        watch = asyncio.create_task(self._watch())
        await super().main_loop()
        watch.cancel()

    async def _watch(self) -> None:
        queue = self.backend.queue
        while queue.stalled_s < self._settings.watchdog_s:
            await asyncio.sleep(min(1.0, self._settings.watchdog_s / 10))
        logger.error("the model has not moved for %g s; the process ends", self._settings.watchdog_s)
        self._hung = True
        self.backend.enter(State.STALLED, "the model hangs")
        queue.abandon()
        self.should_exit = True


def _within_file_limit(settings: ServeSettings) -> ServeSettings:
    """Return the settings with no more connections than there are file descriptors for."""
    try:
        import resource
    except ImportError:  # Windows, where there is no such limit to keep
        return settings
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max(8, soft - _SPARE_FILES)
    return replace(settings, max_connections=min(settings.max_connections, most))


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


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
        InvalidInputError: If the address cannot be had, or this is Windows.
    """
    if os.name == "nt":
        raise InvalidInputError("--supervise cannot hand its port on under Windows; let a service manager restart it.")
    listener = listen(host, port)
    listener.set_inheritable(True)
    return _Supervisor(listener).run()


class _Supervisor:
    """A parent that keeps the port and starts the server again when it dies."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._child: subprocess.Popen[bytes] | None = None
        self._stopping = False
        self._untold: int | None = None  # a signal that came while a child was being started

    def run(self) -> int:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._forward)
        quick_deaths = 0
        while not self._stopping:
            started = time.monotonic()
            code = self._run_child()
            if self._stopping or code == 0:
                return code if code >= 0 else 128 - code
            quick_deaths = quick_deaths + 1 if time.monotonic() - started < _HEALTHY_S else 0
            logger.error("the server died", extra={"event": {"exit_status": code, "quick_deaths": quick_deaths}})
            if quick_deaths >= _MAX_QUICK_DEATHS:
                return code if code > 0 else 1
            time.sleep(0.1 * 2**quick_deaths)
        return 0  # told while there was no child to pass it on to

    def _run_child(self) -> int:
        descriptor = self._listener.fileno()
        self._child = None
        child = self._child = subprocess.Popen(
            [sys.executable, "-c", _COMMAND, *sys.argv[1:]],
            pass_fds=[descriptor],
            env={**os.environ, _LISTENER: str(descriptor)},
        )
        if self._untold is not None:
            child.send_signal(self._untold)
        return child.wait()

    def _forward(self, number: int, _: FrameType | None) -> None:
        self._stopping = True
        if self._child is not None:
            self._child.send_signal(number)
        else:
            self._untold = number
