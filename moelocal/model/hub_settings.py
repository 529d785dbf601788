"""The user's settings of the way to the hub, checked before huggingface_hub and its HTTP library stumble over them."""

from __future__ import annotations

import importlib.util
import os
from urllib.parse import urlsplit

from moelocal.errors import HubError

_PROXIES = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY")
_EMPTY_MEANS_UNSET = ("HF_ENDPOINT", "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")


def check() -> None:
    """Call it before huggingface_hub is imported, which reads these settings then.

    Raises:
        HubError: one of them cannot be; it is named.
    """
    for name in _EMPTY_MEANS_UNSET:
        if os.environ.get(name) == "":
            del os.environ[name]
    if (endpoint := os.environ.get("HF_ENDPOINT")) and not _is_address(endpoint, ("http", "https")):
        raise HubError(f"HF_ENDPOINT is no web address: {endpoint:.80}", "Write it like https://huggingface.co")
    for name in (one for pair in _PROXIES for one in (pair, pair.lower())):
        if not (proxy := os.environ.get(name)):
            continue
        full = proxy if "://" in proxy else f"http://{proxy}"
        if not _is_address(full, ("http", "https", "socks5", "socks5h")):
            raise HubError(f"{name} is no proxy's address: {proxy:.80}", "Write it like http://host:port")
        if full.startswith("socks") and importlib.util.find_spec("socksio") is None:
            raise HubError(
                f"{name} is a SOCKS proxy, for which a package is missing.", "Install it: pip install socksio"
            )
    if (token := os.environ.get("HF_TOKEN")) and not token.strip().isascii():
        raise HubError("HF_TOKEN is no token: it has letters that none has.", "Copy it again: hf auth login")


def _is_address(text: str, schemes: tuple[str, ...]) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme.lower() in schemes and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
