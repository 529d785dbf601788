"""Lends this machine to another one: llama.cpp's own RPC server, started and ended from Python.

The server blocks in native code, so it runs in a thread, while the main thread waits for signals.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import signal
import socket
import sys
import threading
import time
from types import FrameType

from moelocal.errors import BadRequest, MoelocalError

_START_S = 20.0  # a GPU's driver takes its time


class Worker:
    """A running RPC server. Open it with `start_worker`, then `wait` until a signal ends it."""

    def __init__(self, host: str, port: int, threads: int, verbose: bool) -> None:
        self.host, self.port = host, port
        self._ended = threading.Event()
        self._signal = 0
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self._on_signal)
        if not verbose:
            _silence_native_output()
        self._failure: MoelocalError | None = None
        threading.Thread(target=self._serve, args=(threads,), name="rpc-server", daemon=True).start()

    def _serve(self, threads: int) -> None:
        from moelocal.engine import rpc

        try:
            rpc.serve(self.host, self.port, threads)
        except MoelocalError as error:
            self._failure = error
        self._ended.set()

    def _on_signal(self, signum: int, _: FrameType | None) -> None:
        self._signal = signum  # no more: an Event that the main thread is waiting for would lock itself up

    def wait_until_ready(self) -> None:
        """Returns once it accepts connections.

        Raises:
            MoelocalError: it ended before that.
        """
        target = "127.0.0.1" if self.host == "0.0.0.0" else self.host
        deadline = time.monotonic() + _START_S
        while not (self._signal or self._ended.is_set()) and time.monotonic() < deadline:
            try:
                socket.create_connection((target, self.port), 1.0).close()
                return
            except OSError:
                self._ended.wait(0.02)
        if not self._signal:
            raise self._failure or self._stopped()

    def wait(self) -> int:
        """Waits for Ctrl-C or a request to end. Returns that signal.

        Raises:
            MoelocalError: the server ended by itself.
        """
        while not self._signal and not self._ended.wait(0.1):  # a wait without a limit holds signals back on Windows
            pass
        if not self._signal:
            raise self._failure or self._stopped()
        return self._signal

    def _stopped(self) -> MoelocalError:
        return MoelocalError(
            f"llama.cpp's RPC server at {self.host}:{self.port} ended.", "Run again with -v to see what it says."
        )


def start_worker(host: str, port: int, threads: int, verbose: bool = False) -> Worker:
    """Starts the server; it accepts connections when this returns.

    Raises:
        BadRequest: a host that is not this machine's, or a port that is taken or not allowed.
        MoelocalError: llama.cpp was built without RPC, or its server does not start.
    """
    from moelocal.engine import rpc

    address = _own_address(host)
    _check_port(address, port, host)
    rpc.rpc_function("ggml_backend_rpc_start_server")
    worker = Worker(address, port, threads, verbose)
    worker.wait_until_ready()
    return worker


def is_loopback(address: str) -> bool:
    """Whether only programs on this machine reach that address."""
    return ipaddress.ip_address(address).is_loopback


def address_for_others(address: str) -> str:
    """What to type on another machine to reach a server bound to `address`: 0.0.0.0 becomes this machine's own."""
    if address != "0.0.0.0":
        return address
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # an address of no machine: nothing is sent, the system only picks a route
        except OSError:
            return socket.gethostname()
        return str(probe.getsockname()[0])


def _own_address(host: str) -> str:
    """llama.cpp binds to IPv4 addresses in digits only."""
    try:
        return socket.gethostbyname(host)
    except OSError as error:
        raise BadRequest(
            f"{host!r} is not a host name or IPv4 address.",
            "Give 127.0.0.1 (this machine only) or 0.0.0.0 (every network).",
        ) from error


def _check_port(address: str, port: int, host: str) -> None:
    """Binds once from Python, since llama.cpp does not say why it cannot."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        if sys.platform != "win32":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise MoelocalError(f"Port {port} is in use already.", f"Try another: --port {port + 1}") from error
            if error.errno == errno.EADDRNOTAVAIL:
                raise BadRequest(
                    f"{host} is not an address of this machine.", "Give one of its own, or 0.0.0.0 for all of them."
                ) from error
            raise MoelocalError(
                f"The worker cannot listen at {host}:{port}: {error.strerror}.", "Try a port above 1023."
            ) from error


def _silence_native_output() -> None:
    """llama.cpp prints to standard output: from here on only Python's own text arrives there."""
    sys.stdout.flush()
    own = os.dup(1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)
    sys.stdout = os.fdopen(own, "w", encoding=sys.stdout.encoding)
