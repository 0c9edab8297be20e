"""Who may ask: the key, and pages of other sites that a browser on this machine shows.

A server on loopback needs no key, but a browser would let any web page send it requests. A request that says from which
page it comes (Origin) must come from this server's own; and while the server listens on loopback only, the name in Host
must be one of loopback's: a foreign name that was made to lead here (DNS rebinding) is refused.
"""

import hmac
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from aki_megatron.evaluate.serving.errors import ApiError


def is_loopback(host: str) -> bool:
    """Return whether a name or address leads to this machine only."""
    name = host.strip("[]").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True)
class Access:
    """What is asked of a request.

    key            of the server; empty: none is needed
    loopback_only  whether Host must name loopback
    """

    key: str = ""
    loopback_only: bool = True

    def check(self, headers: Mapping[str, str], *, needs_key: bool) -> None:
        """Raise ApiError (401, 403) for a request that may not be answered."""
        host = headers.get("host", "")
        if self.loopback_only and host and not is_loopback(_hostname(host)):
            raise ApiError(
                403, "The name in Host is not one of this machine; ask http://127.0.0.1.", code="forbidden_host"
            )
        origin = headers.get("origin")
        if origin is not None and _address(origin) != host.lower():
            raise ApiError(403, "Pages of other sites may not ask this server.", code="forbidden_origin")
        if needs_key and self.key and not hmac.compare_digest(_given_key(headers), _key_bytes(self.key)):
            raise ApiError(
                401,
                "The key is missing or wrong; send it in the header Authorization, after the word Bearer.",
                code="invalid_api_key",
            )


LOCAL = Access()
"""Everybody on this machine, without a key."""


def _hostname(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _address(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _key_bytes(key: str) -> bytes:
    return key.encode(errors="surrogateescape")  # as the environment had it


def _given_key(headers: Mapping[str, str]) -> bytes:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip().encode("latin-1") if scheme.lower() == "bearer" else b""  # headers are decoded as latin-1
