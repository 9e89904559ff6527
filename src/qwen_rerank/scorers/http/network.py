"""The way to a server: its routes, the proxies and certificates of the environment, and headers of the user's own."""

from __future__ import annotations

import ipaddress
import os
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from qwen_rerank.errors import InvalidInputError

_VERSION = re.compile(r"/v\d$")
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_OURS = frozenset(
    {
        "host",
        "content-length",
        "content-type",
        "transfer-encoding",
        "connection",
        "accept",
        "accept-encoding",
        "te",
        "upgrade",
    }
)


def route_url(base: str, path: str) -> str:
    """Return the address of a route of a server, by its root or by an address that ends in `/v1`.

    A version is not said twice; `/v1` stays before `/rerank`, where Infinity and gateways are set up so; any other route
    stands at the root.
    """
    if path != "/rerank":
        base = _VERSION.sub("", base)
    return base + path


@dataclass(frozen=True, slots=True)
class EnvironmentProxy:
    """A proxy that the environment names.

    Attributes:
        variable: That names it.
        address: Of the proxy, with its password if it has one.
    """

    variable: str
    address: str = field(repr=False)

    @property
    def shown(self) -> str:
        """The address without user and password."""
        try:
            parts = urlsplit(self.address)
            port = f":{parts.port}" if parts.port else ""
        except ValueError:
            return "an address that is none"
        return f"{parts.scheme}://{parts.hostname or ''}{port}"

    def problem(self, host: str, reason: str) -> InvalidInputError:
        """Return the error for a proxy that cannot be used."""
        return InvalidInputError(
            f"the proxy {self.shown}, which {self.variable} names, cannot be used ({reason}); correct {self.variable}, or add "
            f"{host} to NO_PROXY."
        )


def proxy_for(url: str) -> EnvironmentProxy | None:
    """Return the proxy to a server; none to this machine, nor where NO_PROXY says so."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if _is_loopback(host) or proxy_bypass(parts.netloc) or proxy_bypass(host) or _in_a_network_without(host):
        return None
    proxies = getproxies()
    for scheme in (parts.scheme, "all"):
        if value := proxies.get(scheme):
            names = (f"{scheme}_proxy", f"{scheme.upper()}_PROXY")
            variable = next((name for name in names if os.environ.get(name)), "the system's network settings")
            return EnvironmentProxy(variable, value if "://" in value else f"http://{value}")
    return None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _in_a_network_without(host: str) -> bool:
    """Whether NO_PROXY holds a network (10.0.0.0/8) that an address is in."""
    try:
        address = ipaddress.ip_address(host)
        networks = [entry.strip() for entry in getproxies().get("no", "").split(",") if "/" in entry]
        return any(address in ipaddress.ip_network(network, strict=False) for network in networks)
    except ValueError:
        return False


def trusted_certificates(verify: bool | str) -> ssl.SSLContext | None:
    """Return the context of the CAs that the user or the environment names, or None for the system's.

    Raises:
        InvalidInputError: If there are no certificates there; names the argument or the variable.
    """
    if isinstance(verify, str):
        return _context("verify", verify)
    if file := os.environ.get("SSL_CERT_FILE"):
        return _context("SSL_CERT_FILE", file)
    if folder := os.environ.get("SSL_CERT_DIR"):
        return ssl.create_default_context(capath=folder)
    return None


def _context(name: str, path: str) -> ssl.SSLContext:
    here = Path(path).expanduser()
    if not here.is_file() and not here.is_dir():
        raise InvalidInputError(
            f"{name} names {path!r}, where there is no file or folder; give a file with the CA's certificate in PEM."
        )
    try:
        if here.is_dir():
            return ssl.create_default_context(capath=str(here))
        return ssl.create_default_context(cafile=str(here))
    except (OSError, ValueError) as exc:  # ssl.SSLError is an OSError
        raise InvalidInputError(
            f"{name} names {path!r}, which holds no certificate in PEM ({exc}); give the CA's certificate."
        ) from exc


def check_verify(value: object) -> bool | str:
    """Return what `verify=` may be: True, or the path of a CA's certificate."""
    if value is True:
        return True
    if not isinstance(value, str | os.PathLike) or not str(value):
        raise InvalidInputError(
            f"verify must be True or the path of a file with the CA's certificate in PEM, not {value!r}; a server's own "
            "certificate can be given as that file."
        )
    _context("verify", os.fspath(value))
    return os.fspath(value)


def check_headers(value: object, *, has_key: bool) -> dict[str, str]:
    """Return headers with names in lower case; no message shows a value, which may be a key."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise InvalidInputError(f"headers must be a mapping of names to texts, not {type(value).__name__}.")
    headers = {}
    for name, text in value.items():
        if not isinstance(name, str) or not _HEADER_NAME.fullmatch(name):
            raise InvalidInputError(f"headers has the name {name!r:.80}, which no HTTP header can have.")
        if name.lower() in _OURS:
            raise InvalidInputError(f"headers must not set {name!r}, which belongs to the request itself.")
        if not isinstance(text, str) or not text.isascii() or not text.isprintable() or text != text.strip():
            raise InvalidInputError(
                f"headers[{name!r}] must be a text of printable ASCII characters (it is not shown)."
            )
        headers[name.lower()] = text
    if has_key and "authorization" in headers:
        raise InvalidInputError("headers sets 'authorization', which api_key sets, too; give one of the two.")
    return headers


def certificate_problem(url: str, exc: BaseException) -> str | None:
    """Return why a connection's certificate or TLS failed and what to do, or None if that was not it."""
    found: BaseException | None = exc
    while found is not None and not isinstance(found, ssl.SSLError):
        found = found.__cause__ or found.__context__
    if isinstance(found, ssl.SSLCertVerificationError):
        return (
            f"{url} shows a certificate that is not trusted ({found.verify_message}); give the CA's certificate, or the "
            "server's own, as verify='ca.pem' or in SSL_CERT_FILE."
        )
    if isinstance(found, ssl.SSLError) and found.reason in (
        "WRONG_VERSION_NUMBER",
        "RECORD_LAYER_FAILURE",
        "HTTP_REQUEST",
    ):
        return f"{url} speaks no TLS ({found.reason}); is it an http:// address?"
    return None
