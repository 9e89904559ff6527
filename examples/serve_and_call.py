"""Serve a reranker, and call it: as plain HTTP, as a scorer, and with many requests at once.

    python examples/serve_and_call.py

Needs, in a clone: pip install '.[serve,client]'. In production the first half is one command on the machine with the GPU:

    QWEN_RERANK_API_KEYS=… qwen-rerank serve --model Qwen/Qwen3-Reranker-0.6B --host 0.0.0.0

'mini', the default, is a small model that ships with the package; it is not Qwen3-Reranker.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx2

from qwen_rerank import BM25Index, Candidate, HttpScorer, Reranker
from qwen_rerank.samples import load_encyclopedia

START_TIMEOUT_S = 300


def main() -> None:
    """Start a server on a free port of this machine, use it in three ways, stop it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mini", help="a hub name, a folder, or 'mini'")
    arguments = parser.parse_args()

    key = secrets.token_urlsafe()
    with serving(arguments.model, key) as url:
        print(f"ready at {url}; a person would open that address in a browser")
        plain_http(url, key)
        with HttpScorer(url, api_key=key) as scorer:  # asks the server what it is; knows vLLM, SGLang, Cohere, … too
            as_a_scorer(scorer)
            asyncio.run(many_at_once(scorer))


def plain_http(url: str, key: str) -> None:
    """Call the route that Cohere's and Jina's clients call."""
    query = "药房技术员现在的新职责是什么?"
    [candidates] = found("zh", [query])
    answer = httpx2.post(
        f"{url}/v1/rerank",
        headers={"authorization": f"Bearer {key}"},
        json={"query": query, "documents": [c.document.text for c in candidates], "top_n": 2},
        timeout=60,
        trust_env=False,  # no proxy to this machine
    )
    answer.raise_for_status()
    print(f"\nPOST /v1/rerank, {query} ({answer.json()['model']})")
    for row in answer.json()["results"]:
        print(f"  {row['relevance_score']:.3f}  {one_line(candidates[row['index']].document.text)}")


def as_a_scorer(scorer: HttpScorer) -> None:
    """Use the server wherever a model goes."""
    query = "What surrounds chloroplasts?"
    [candidates] = found("en", [query])
    print(f"\nReranker(HttpScorer(…)), {query} ({scorer.name})")
    for hit in Reranker(scorer, top_n=2).rerank(query, candidates):
        print(f"  {hit.score:.3f}  {one_line(hit.document.text)}")


async def many_at_once(scorer: HttpScorer) -> None:
    """Ask several things together; the server computes them in common packs."""
    relevant = dict(list(load_encyclopedia("en").relevant.items())[:8])
    reranker, candidates = Reranker(scorer, top_n=1), found("en", list(relevant))
    started = time.perf_counter()
    answers = await asyncio.gather(*map(reranker.arerank, relevant, candidates))
    seconds = time.perf_counter() - started
    right = sum(hits[0].document.id == answer for hits, answer in zip(answers, relevant.values(), strict=True))
    print(
        f"\n{len(relevant)} questions at once in {seconds:.2f} s; {right} of {len(relevant)} have the right sentence first"
    )


def found(language: str, queries: list[str]) -> list[list[Candidate]]:
    """Return what a first stage by words finds among the shipped sentences of Wikipedia, for each query."""
    first_stage = BM25Index(load_encyclopedia(language).documents)
    return [first_stage.search(query, top_k=20) for query in queries]


def one_line(text: str) -> str:
    """Return a text's beginning on one line."""
    return " · ".join(text.splitlines())[:80]


@contextmanager
def serving(model: str, key: str) -> Iterator[str]:
    """Run `qwen-rerank serve` on a free port of this machine, and give its address once it is ready."""
    port = free_port()
    command = [sys.executable, "-c", "from qwen_rerank.cli import main; main()", "serve"]
    server = subprocess.Popen(
        [*command, "--model", model, "--port", str(port), "--log-level", "error"],
        env={**os.environ, "QWEN_RERANK_API_KEYS": key},
    )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(url, server)
        yield url
    finally:
        server.terminate()  # answers what it has admitted, then ends
        server.wait()


def free_port() -> int:
    """Return a port that nobody listens on just now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def wait_until_ready(url: str, server: subprocess.Popen[bytes]) -> None:
    """Return when the model is loaded and has passed the server's check of itself.

    Raises:
        RuntimeError: If the server ends, or is not ready in time.
    """
    deadline = time.monotonic() + START_TIMEOUT_S
    while server.poll() is None and time.monotonic() < deadline:
        try:
            if httpx2.get(f"{url}/health/ready", trust_env=False).status_code == 200:
                return
        except httpx2.TransportError:  # the port is not open yet
            pass
        time.sleep(0.1)
    raise RuntimeError("the server did not become ready; what it printed above says why.")


if __name__ == "__main__":
    main()
