"""Objects in copies, threads and forked processes: what these share of one, and what each needs for itself."""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, Protocol, Self, TypeVar

from qwen_rerank.errors import InvalidInputError, ScorerClosedError

P = ParamSpec("P")
T = TypeVar("T")


class SharedCopies:
    """An object whose copies are itself: it holds what is too large or too alive to be there twice."""

    __slots__ = ()

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


def made_from(make: Callable[..., T], settings: Mapping[str, Any]) -> T:
    """Return what `make` gives for settings: what a pickle of a model holds in its place."""
    return make(**settings)


class ComputeThread:
    """The one thread in which a model computes: one job at a time, and a forked child has a thread of its own.

    OpenMP keeps helper threads for every thread that ever computed. A fork copies what it knows of them and not the
    helpers, so the first parallel product in the thread that forked would wait for ever; a new thread has none to wait for.

    Args:
        name: For people who look at threads.

    Attributes:
        on_cpu: Whether the model may be used in a forked child; a GPU's may not.
    """

    def __init__(self, name: str) -> None:
        self.on_cpu = True
        self._name = name
        self._pid = os.getpid()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name)
        renew_in_child(self)

    def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return what `work` returns.

        Raises:
            ScorerClosedError: In a forked child, where the model is on a GPU.
        """
        if not self.on_cpu and os.getpid() != self._pid:
            raise ScorerClosedError(
                f"this model is on a GPU and belongs to process {self._pid}, so it cannot be used in the forked process "
                f"{os.getpid()}; load it there in processes started with the 'spawn' method."
            )
        return self._pool.submit(work, *args, **kwargs).result()

    def renew(self) -> None:
        """Forget the parent's thread."""
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=self._name)


def check_gpu_after_fork() -> None:
    """Refuse to load onto a GPU in a process forked from one that used it, which CUDA cannot do.

    Raises:
        InvalidInputError: In such a process.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda._is_in_bad_fork():
        raise InvalidInputError(
            f"process {os.getpid()} was forked from one that used the GPU, and CUDA cannot be used in it; start processes "
            "with the 'spawn' method, or pass device='cpu'."
        )


class Renewed(Protocol):
    """An object that must make something anew in a forked child: a lock that may be held, a thread that is not there."""

    def renew(self) -> None:
        """Make it anew; runs in the child before anything else of it."""


_renewed: weakref.WeakSet[Renewed] = weakref.WeakSet()


def renew_in_child(owner: Renewed) -> None:
    """Have `owner.renew()` called in every process that is forked from this one, as long as there is an owner."""
    _renewed.add(owner)


class ForkLock:
    """A lock that is free in a forked child, whoever held it in the parent."""

    def __init__(self) -> None:
        self.renew()
        renew_in_child(self)

    def renew(self) -> None:
        """Be free."""
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def _renew_all() -> None:
    # The tokenizers' thread pool is not there either; their library knows, unless somebody insists on threads.
    if os.environ.get("TOKENIZERS_PARALLELISM") and "tokenizers" in sys.modules:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for owner in list(_renewed):
        owner.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all)
