"""Find the proxy for a service in `HTTPS_PROXY`, `HTTP_PROXY`, `ALL_PROXY` and `NO_PROXY`."""

from __future__ import annotations

import ipaddress
import socket
import urllib.request
from urllib.parse import SplitResult, unquote, urlsplit

from urllib3.util import make_headers

from bidfmkd_fast import secrets
from bidfmkd_fast.errors import InputError


def is_loopback(host: str | None) -> bool:
    """Return True if the host, as a URL spells it, is this machine. No name is looked up.

    The unspecified addresses, 0.0.0.0 and ::, count too, because a connection to them reaches this
    machine.
    """
    if host is None:
        return False
    name = host.lower().removesuffix(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    address = _address(host)
    return address is not None and (address.is_loopback or address.is_unspecified)


def proxy_of(name: str, url: SplitResult) -> tuple[str, dict[str, str]] | None:
    """Return the URL of the proxy to use and the headers for it; None for a direct connection.

    The standard library reads the variables, in lower or upper case. Requests to this machine never
    go through a proxy.

    Raises:
        InputError: the proxy's URL cannot be used.
    """
    host, found = url.hostname or "", urllib.request.getproxies()
    proxy = found.get(url.scheme) or found.get("all")
    if (
        not proxy
        or is_loopback(host)
        or urllib.request.proxy_bypass(host)
        or _in_network(host, found.get("no", ""))
    ):
        return None
    secrets.register_url(proxy)
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    try:
        parts = urlsplit(proxy)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # brackets without an end, or a port that is no number
        usable = False
    if not usable:
        raise InputError(
            f"{name}: the proxy for {url.scheme} in the environment must be http://host:port or "
            f"https://host:port; got {secrets.shown_url(proxy)!r}"
        )
    headers = {}
    if parts.username is not None:
        user = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        headers = make_headers(proxy_basic_auth=user)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}", headers


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return the address that a host spells in numbers; None for a name.

    A connection accepts 127.1, 0x7f.1 and 2130706433 for 127.0.0.1, which `ipaddress` does not
    read, so `inet_aton` reads them. An IPv4 address inside an IPv6 address is returned as IPv4.
    """
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        # inet_aton ignores whatever follows white space.
        if not host.isascii() or any(map(str.isspace, host)):
            return None
        try:
            return ipaddress.IPv4Address(socket.inet_aton(host))
        except OSError:
            return None
    return getattr(address, "ipv4_mapped", None) or address


def _in_network(host: str, no_proxy: str) -> bool:
    """Return True if `NO_PROXY` lists a network, as 10.0.0.0/8, that holds the host's address."""
    address = _address(host)
    if address is None:
        return False
    for entry in no_proxy.split(","):
        try:
            if "/" in entry and address in ipaddress.ip_network(entry.strip(), strict=False):
                return True
        except ValueError:  # no network
            continue
    return False
