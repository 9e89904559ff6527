"""An app in this process, and a server on a socket of this machine."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx2
import pytest

from qwen_rerank.serve.app import create_app
from qwen_rerank.serve.process import Server, listen, make_server
from qwen_rerank.serve.settings import ServeSettings
from tests.serve.stubs import Oracle

KEY = "correct-horse-battery"
OTHER_KEY = "staple-of-another-user"


class Client(httpx2.AsyncClient):
    """Talks to an app in this process; `backend` is the app's."""

    backend: Any

    async def rerank(self, **body: Any) -> httpx2.Response:
        """Ask with a query and documents unless they are given."""
        return await self.post("/v1/rerank", json={"query": "q", "documents": ["a 1", "b 2"], **body})


@contextlib.asynccontextmanager
async def app_client(
    scorer: Any = None, *, keys: tuple[str, ...] = (), first_stage: Any = None, **settings: Any
) -> AsyncIterator[Client]:
    """Yield a client of a fresh app that is ready."""
    app = create_app(scorer or Oracle(), first_stage=first_stage, settings=ServeSettings(**settings), api_keys=keys)
    async with (
        app.router.lifespan_context(app),
        Client(transport=httpx2.ASGITransport(app), base_url="http://server") as client,
    ):
        client.backend = app.state.backend
        await client.backend.wait_loaded()
        yield client


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    """A client of an app that scores each text with the number it ends with."""
    async with app_client() as client:
        yield client


class Live:
    """A server on a socket, in a thread of this process."""

    def __init__(self, server: Server, port: int) -> None:
        self.server = server
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.backend = server.backend


@contextlib.contextmanager
def live_server(
    scorer: Callable[[], Any] = Oracle, *, keys: tuple[str, ...] = (), first_stage: Any = None, **settings: Any
) -> Iterator[Live]:
    """Yield a server that is ready, and stop it afterwards."""
    sock = listen("127.0.0.1", 0)
    server = make_server(scorer, first_stage=first_stage, settings=ServeSettings(**settings), api_keys=keys)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    live = Live(server, sock.getsockname()[1])
    try:
        with httpx2.Client(transport=httpx2.HTTPTransport(retries=5)) as client:
            while client.get(f"{live.url}/health/ready").status_code != 200:
                pass
        yield live
    finally:
        server.should_exit = True
        thread.join(30)


@pytest.fixture
def live() -> Iterator[Live]:
    """A server on a socket."""
    with live_server() as server:
        yield server
