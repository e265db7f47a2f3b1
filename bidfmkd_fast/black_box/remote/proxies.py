"""Find the proxy for a service in `HTTPS_PROXY`, `HTTP_PROXY`, `ALL_PROXY` and `NO_PROXY`."""

from __future__ import annotations

import ipaddress
import urllib.request
from urllib.parse import SplitResult, unquote, urlsplit

from urllib3.util import make_headers

from bidfmkd_fast import secrets
from bidfmkd_fast.errors import InputError


def is_loopback(host: str | None) -> bool:
    """Return True if the host is this machine."""
    if host is None:
        return False
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


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


def _in_network(host: str, no_proxy: str) -> bool:
    """Return True if `NO_PROXY` lists a network, as 10.0.0.0/8, that holds the host's address."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    for entry in no_proxy.split(","):
        try:
            if "/" in entry and address in ipaddress.ip_network(entry.strip(), strict=False):
                return True
        except ValueError:  # no network
            continue
    return False
