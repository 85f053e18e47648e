"""HTTP sessions whose redirects cannot lead into a private network, or to another protocol.

A server of public data that answers "302, http://169.254.169.254/..." would otherwise have this machine read what only
this machine can reach. A URL of the user's own may be private: then it may redirect to private addresses, until a
redirect has led out of them.
"""

from __future__ import annotations

import ipaddress
import socket
from typing import Any

import aiohttp
from aiohttp.abc import ResolveResult
from yarl import URL

from data_shards.errors import ShardError


async def open_session(**options: Any) -> aiohttp.ClientSession:
    """Open a session, as the option ``get_client`` of fsspec's HTTP file system."""
    redirects = _Redirects()
    trace = aiohttp.TraceConfig()
    trace.on_request_redirect.append(redirects.check)
    if "connector" not in options:
        options["connector"] = aiohttp.TCPConnector(resolver=redirects)
    options["trace_configs"] = [*options.get("trace_configs", ()), trace]
    return aiohttp.ClientSession(**options)


def is_private(address: str) -> bool:
    """Whether an IP address is of this machine or of a private network.

    Raises:
        ValueError: it is no IP address.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(ip, "ipv4_mapped", None)  # ::ffff:127.0.0.1
    return not (mapped or ip).is_global


class _Redirects(aiohttp.ThreadedResolver):
    """Checks every redirect before it is followed, and again the address that its host has when it is connected to."""

    def __init__(self) -> None:
        super().__init__()
        self._public: set[str] = set()  # hosts that redirects led to

    async def check(self, session: Any, request: Any, redirect: Any) -> None:
        source, headers = redirect.url, redirect.response.headers
        target = source.join(URL(headers.get("Location") or headers.get("URI") or ""))
        if not hasattr(request, "may_be_private"):  # its first redirect, from the user's own URL
            request.may_be_private = await self._is_private(source.host)
        if target.scheme not in {source.scheme, "https"}:
            raise _refused(source.host, f"{target.scheme}://, and was requested with {source.scheme}://")
        private = await self._is_private(target.host)
        if private and not request.may_be_private:
            raise _refused(source.host, f"{target.host}, which is a private address")
        if not private:
            request.may_be_private = False
            self._public.add(str(target.host))

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = await super().resolve(host, port, family)
        if host in self._public and any(is_private(address["host"]) for address in found):
            raise _refused("a server", f"{host}, which now has a private address")
        return found

    async def _is_private(self, host: str | None) -> bool:
        try:
            return is_private(host or "")
        except ValueError:  # a name
            pass
        try:
            found = await super().resolve(host or "", family=socket.AF_UNSPEC)
        except OSError:
            return False  # a proxy may know it
        return any(is_private(address["host"]) for address in found)


def _refused(source: str | None, target: str) -> ShardError:
    return ShardError(
        f"{source} redirects to {target}; such a redirect is not followed (docs/security.md). If it is meant, give the "
        "address that it leads to"
    )
