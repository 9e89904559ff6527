"""`EndpointPool`: equal servers by their addresses, the least busy one first; and which addresses are allowed."""

from __future__ import annotations

import ipaddress
import itertools
import re
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from qwen_rerank.checks import shown_address
from qwen_rerank.errors import InvalidInputError

_LONGEST_OUTAGE_S = 30.0
_ROUTE = re.compile(r"(?<!/)(?:/(?:rerank|score|classify|models|docs|health))?/*$")


def check_url(value: object) -> str:
    """Return a server's root, or its address with `/v1`, without the route and trailing slashes that people copy along.

    Raises:
        InvalidInputError: If it is no plain http or https address: user names, queries and fragments are refused.
    """
    if not isinstance(value, str) or not value.isprintable() or any(c.isspace() for c in value):
        raise InvalidInputError(f"url must be an address such as 'http://host:8000', not {shown_address(value)}.")
    parts = _split(value)
    if parts is None:
        raise InvalidInputError(
            "url is no valid address: its host or port is none; give one such as 'http://host:8000'."
        )
    if parts.username is not None or parts.password is not None:
        # The address itself is not repeated: it holds a password.
        raise InvalidInputError("url must not hold a user name or password; give the key as api_key=.")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InvalidInputError(f"url must start with http:// or https:// and name a host, not {shown_address(value)}.")
    if parts.query or parts.fragment:
        raise InvalidInputError(
            f"url must not hold a query or fragment, as that of {shown_address(value)} does; give the server's root."
        )
    return _ROUTE.sub("", value, count=1)


def _split(value: str) -> SplitResult | None:
    with suppress(ValueError):  # which repeats what it could not read, and that may be a key
        parts = urlsplit(value)
        _ = parts.hostname, parts.port
        return parts
    return None


def check_urls(value: object) -> tuple[str, ...]:
    """Return one address or several, each once."""
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, Sequence) or not values:
        raise InvalidInputError(
            f"url must be an address or a list of addresses of equal servers, not {shown_address(value)}."
        )
    return tuple(dict.fromkeys(check_url(item) for item in values))


def public_address(host: str, port: int) -> str:
    """Return an IP address of `host` after checking that every one of them is public.

    The connection is made to this very address, so a name that resolves otherwise a moment later changes nothing.

    Raises:
        InvalidInputError: If the host resolves to a private, loopback or otherwise reserved address.
        OSError: If it does not resolve.
    """
    found = [info[4][0] for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    for address in found:
        ip = ipaddress.ip_address(str(address).split("%")[0])
        mapped = getattr(ip, "ipv4_mapped", None) or ip
        if not mapped.is_global or mapped.is_multicast:
            raise InvalidInputError(
                f"url names {host}, which resolves to {address}; only public addresses are allowed here."
            )
    return str(found[0])


@dataclass(slots=True)
class Endpoint:
    """One server.

    Attributes:
        url: Its root.
        in_flight: Requests under way.
        failures: Failed attempts since the last answer.
        retry_at: Clock time before which it is left alone.
    """

    url: str
    in_flight: int = 0
    failures: int = 0
    retry_at: float = 0.0


class EndpointPool:
    """Chooses the least busy server; one that failed is out for 1, 2, 4 … 30 seconds, then tried by one request."""

    def __init__(self, urls: Sequence[str]) -> None:
        self.endpoints = [Endpoint(url) for url in urls]
        self._turns = itertools.count()

    def acquire(self, now: float, *, avoid: Endpoint | None = None) -> Endpoint:
        """Return the server to ask; `avoid` only if there is no other.

        The caller gives it back with `release`, and the number of `failures` that it has now.
        """
        others = [e for e in self.endpoints if e is not avoid] or self.endpoints
        ready = [e for e in others if e.retry_at <= now]
        if ready:
            turn = next(self._turns)
            chosen = min(ready, key=lambda e: (e.in_flight, (self.endpoints.index(e) - turn) % len(self.endpoints)))
        else:
            chosen = min(others, key=lambda e: e.retry_at)
        if chosen.failures:
            chosen.retry_at = now + _outage_s(chosen.failures)  # others wait for what this one request finds
        chosen.in_flight += 1
        return chosen

    def has_another(self, endpoint: Endpoint, now: float) -> bool:
        """Return whether a server other than this one can be asked now."""
        return any(each is not endpoint and each.retry_at <= now for each in self.endpoints)

    def release(self, endpoint: Endpoint, now: float, *, failed: bool, failures_then: int) -> None:
        """Give a server back and say whether it could be reached; `failures_then` are those at `acquire`."""
        endpoint.in_flight -= 1
        if not failed:
            endpoint.failures, endpoint.retry_at = 0, 0.0
        elif endpoint.failures == failures_then:  # else another of those under way when it died has counted
            endpoint.failures += 1
            endpoint.retry_at = now + _outage_s(endpoint.failures)


def _outage_s(failures: int) -> float:
    return float(min(_LONGEST_OUTAGE_S, 2.0 ** (failures - 1)))
