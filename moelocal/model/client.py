"""The way to the Hugging Face hub: its library's client, patience while it is busy, and its refusals in plain words.

    with translated(repo):
        answer = patiently(lambda: ask_the_library(repo))

huggingface_hub is slow to import, so that happens inside. It respects HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE, proxies;
what of these cannot be used is told before its import fails of it.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, TypeVar
from urllib.parse import urlsplit

from moelocal.errors import ModelNotFound, MoelocalError

_LEAST_WAIT_S, _TOLD_WAIT_S, _MOST_WAIT_S = 0.5, 3.0, 60.0
_TRIES = 5
RETRIED = (408, 425, 429, 500, 502, 503, 504)
"""Answers of a server that may be different a little later."""
_MAY_BE_EMPTY = ("HF_ENDPOINT", "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME")
_PROXIES = ("http", "https", "socks5", "socks5h")

T = TypeVar("T")


class HubError(MoelocalError):
    """The hub, or the way there, refuses; `status` is the HTTP status, 0 without an answer."""

    def __init__(self, message: str, hint: str = "", status: int = 0) -> None:
        super().__init__(message, hint)
        self.status = status


def prepare() -> None:
    """Before huggingface_hub is imported or asked: variables that are set but empty are as good as not set, as in
    `paths`; those that it could not use are named.

    Raises:
        HubError: with the variable.
    """
    for name in _MAY_BE_EMPTY:
        if os.environ.get(name) == "":
            del os.environ[name]
    if "HF_ENDPOINT" in os.environ and _fault(os.environ["HF_ENDPOINT"], ("http", "https")):
        shown = os.environ["HF_ENDPOINT"]
        raise HubError(
            f"HF_ENDPOINT is no address of a hub: {shown!r:.100}.", "Write it like https://huggingface.co, or unset it."
        )
    for kind in ("http_proxy", "https_proxy", "all_proxy"):
        name = kind if kind in os.environ else kind.upper()
        address = os.environ.get(name, "")
        if address and (fault := _fault(address if "://" in address else f"http://{address}", _PROXIES)):
            raise HubError(f"{name} cannot be used: {fault}.", f"Write it like http://HOST:PORT, or unset {name}.")


def _fault(address: str, schemes: tuple[str, ...]) -> str:
    """What is wrong with an address; '' for nothing."""
    try:
        parts = urlsplit(address)
        is_whole = parts.scheme.lower() in schemes and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets without an end; a port that is no number, or too large
        is_whole = False
    if not is_whole:
        return f"{address!r:.100} is no address that leads somewhere"
    if parts.scheme.lower().startswith("socks") and importlib.util.find_spec("socksio") is None:
        return "a SOCKS proxy needs the package socksio, which is not installed"
    return ""


def client() -> Any:
    """The HTTP client that huggingface_hub uses, with its proxies and certificates."""
    prepare()
    from huggingface_hub import get_session

    return get_session()


def hub_utils() -> Any:
    """huggingface_hub.utils, which does not declare to type checkers what it exports."""
    prepare()
    return importlib.import_module("huggingface_hub.utils")


@cache
def http() -> Any:
    """The HTTP library of that client, for its exceptions: which one depends on huggingface_hub's version."""
    return importlib.import_module(type(client()).__module__.partition(".")[0])


def headers() -> dict[str, str]:
    """Headers of a request to the hub: the user's token, if there is one.

    Raises:
        HubError: the token cannot be sent.
    """
    check_token()
    return {**hub_utils().build_hf_headers(library_name="moelocal"), "Accept-Encoding": "identity"}


def check_token() -> None:
    """Looks at the user's token, which must be of plain letters to be sent.

    Raises:
        HubError: with where it comes from.
    """
    from huggingface_hub import constants, get_token

    if re.fullmatch(r"[!-~]*", get_token() or ""):
        return
    name = next((name for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if os.environ.get(name)), "")
    raise HubError(
        f"{name or constants.HF_TOKEN_PATH} holds letters that no token of the hub has.",
        f"Copy the token again, or {f'unset {name}' if name else 'log in anew: hf auth login'}.",
    )


def endpoint() -> str:
    """Where the hub is: HF_ENDPOINT, or huggingface.co."""
    prepare()
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def patiently(ask: Callable[[], T]) -> T:
    """What `ask` returns, asked again with growing pauses while the hub is busy or the line is bad."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    for attempt in range(_TRIES):
        try:
            return ask()
        except OfflineModeIsEnabled:
            raise
        except HfHubHTTPError as error:
            if error.response.status_code not in RETRIED or attempt == _TRIES - 1:
                raise
            wait_s = pause_s(attempt, error.response.headers)
        except http().TransportError:
            if attempt >= 1:  # a name that is unknown, or nobody at home: that does not change in seconds
                raise
            wait_s = pause_s(attempt, {})
        time.sleep(wait_s)
    raise AssertionError("the last attempt returns or raises")


def pause_s(attempt: int, answered: Any) -> float:
    """Seconds to wait before asking again: what the server says (`Retry-After`, `RateLimit`), else longer each time.
    A long wait is told as a warning of Python's logging, which goes to stderr."""
    told = str(answered.get("Retry-After", ""))
    if not told and (limit := re.search(r";\s*t=(\d+)", str(answered.get("RateLimit", "")))):
        told = limit[1]  # seconds until the hub counts anew
    wait_s = min(float(told) if told.isdecimal() else _LEAST_WAIT_S * 2**attempt, _MOST_WAIT_S)
    if wait_s >= _TOLD_WAIT_S:
        logging.getLogger(__name__).warning("The hub is asked again in %.0f s.", wait_s)
    return wait_s


@contextmanager
def translated(repo: str) -> Iterator[None]:
    """Turns errors of the hub's client into plain words about a repository.

    Raises:
        ModelNotFound: there is no such repository, or it is private.
        HubError: everything else.
    """
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise _gated(repo, error.response.status_code) from error
    except errors.OfflineModeIsEnabled as error:
        raise HubError(f"HF_HUB_OFFLINE forbids to look for {repo} on the hub.", "Unset HF_HUB_OFFLINE.") from error
    except errors.RepositoryNotFoundError as error:
        from moelocal.model.catalog import entries
        from moelocal.model.store import alike

        close = [] if any(entry.repo.lower() == repo.lower() for entry in entries()) else alike(repo)
        check = f"Did you mean {' or '.join(close)}?" if close else "Check the name, and HF_ENDPOINT if it is set."
        raise ModelNotFound(
            f"There is no repository {repo} on {_site()}, or it is private.",
            f"{check} For a private one, log in: hf auth login, or set HF_TOKEN.",
        ) from error
    except errors.HfHubHTTPError as error:
        raise refusal(repo, error.response) from error
    except errors.HFValidationError as error:
        raise ModelNotFound(
            f"{repo!r:.120} cannot be the name of a repository.", "Write it like owner/repo."
        ) from error
    except (http().HTTPError, http().InvalidURL, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of this disk
        raise unreachable(error) from error


def refusal(repo: str, response: Any) -> HubError:
    """What an HTTP status that is no success means, for a person."""
    from huggingface_hub import get_token

    status = int(response.status_code)
    if status < 400 or status == 511:  # sent on to nowhere; 511: the network wants a login
        return not_the_hub()
    page = f"{endpoint()}/{repo}"
    if response.headers.get("X-Error-Code") == "GatedRepo":
        return _gated(repo, status)
    if status in (401, 403) and not get_token():
        text = f"{_site()} does not let everybody have {repo}."
        return HubError(text, f"Look at {page}, then log in: hf auth login, or set HF_TOKEN.", status)
    if status == 401:
        text = f"{_site()} does not accept your token: it has expired, or was revoked."
        return HubError(text, f"Make a new one at {endpoint()}/settings/tokens, then: hf auth login", status)
    if status == 403:
        text = f"{_site()} does not let you have {repo}: your token has no right to it."
        return HubError(text, f"Ask for access at {page}, then log in: hf auth login", status)
    if status == 404:
        return HubError(f"{page} does not have that file any more.", "Look again: the repository has changed.", status)
    if status == 416:
        return HubError(f"{page} has other bytes than it says.", "Try again later, or another repository.", status)
    if status == 429:
        text = f"{_site()} says that there were too many requests from here."
        return HubError(text, "Wait some minutes. With a token more are allowed: hf auth login", status)
    if status >= 500:
        return HubError(f"{_site()} has trouble: it answers {status}.", "Try again in some minutes.", status)
    return HubError(f"{_site()} refuses: it answers {status}.", f"See {page}", status)


def _gated(repo: str, status: int) -> HubError:
    page = f"{endpoint()}/{repo}"
    return HubError(
        f"{repo} is gated: its publisher wants you to agree to something first.",
        f"Open {page} and ask for access there, then log in: hf auth login, or set HF_TOKEN.",
        status,
    )


def unreachable(error: Any) -> HubError:
    """What a connection that failed means, for a person."""
    if isinstance(error, http().TooManyRedirects):
        return HubError(f"{_site()} sends from one address to another without an end.", "Try again later.")
    if isinstance(error, (http().UnsupportedProtocol, http().InvalidURL)):
        return HubError(f"{_site()} leads to an address that cannot be: {error}.", "Check HF_ENDPOINT and the proxy.")
    text = str(error) or type(error).__name__
    site = _site()
    with suppress(AttributeError, RuntimeError):  # what the request was sent on to may be another host
        site = error.request.url.netloc.decode("ascii", "replace")
    return HubError(
        f"{site} cannot be reached: {text.rstrip('.'):.200}.",
        "Check the network, and HF_ENDPOINT or HTTPS_PROXY if they are set. What is here is used offline.",
    )


def not_the_hub() -> HubError:
    """What an answer means that the hub would not give."""
    return HubError(
        f"{_site()} does not answer like the Hugging Face hub.",
        "Check HF_ENDPOINT if it is set, and in a browser whether this network wants a login. What is here is used "
        "offline.",
    )


def _site() -> str:
    return endpoint().partition("://")[2] or endpoint()
