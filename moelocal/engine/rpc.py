"""Other machines' devices through llama.cpp's RPC: workers found and added here, this machine lent to others.

llama.cpp ends the process when a worker does not answer as expected, so each one is asked first from Python: whether
it is there, free, and speaks this llama.cpp's version.

Source: llama.cpp 0c1e57098, ggml/src/ggml-rpc/ggml-rpc.cpp: send_rpc_cmd, negotiate_hello, RPC_CMD_HELLO;
ggml/include/ggml-rpc.h: RPC_PROTO_*_VERSION.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import threading
from collections.abc import Sequence
from typing import Any

import psutil

from moelocal.engine import abi, llama
from moelocal.engine.address import parse_endpoint
from moelocal.errors import BadRequest, MoelocalError
from moelocal.machine.rebuild import rebuild_command, this_installation
from moelocal.machine.system import System

_TIMEOUT_S = 3.0
_HELLO = bytes([14]) + struct.pack("<Q", 24) + bytes(24)  # command, size, capabilities of the connection: none
_HELLO_ANSWER_BYTES = 8 + 3 + 1 + 24  # size; version; padding; capabilities
_SILENCE = {  # a machine that is gone closes nothing: after about 12 s without a sign of life the line is dropped
    "SO_KEEPALIVE": (socket.SOL_SOCKET, 1),
    "TCP_KEEPIDLE": (socket.IPPROTO_TCP, 5),  # seconds
    "TCP_KEEPALIVE": (socket.IPPROTO_TCP, 5),  # its name on macOS
    "TCP_KEEPINTVL": (socket.IPPROTO_TCP, 2),
    "TCP_KEEPCNT": (socket.IPPROTO_TCP, 3),
    "TCP_USER_TIMEOUT": (socket.IPPROTO_TCP, 12_000),  # ms; Linux only: what was sent and not acknowledged
}
_MAX_WORKERS = 16  # GGML_RPC_MAX_SERVERS
_registered: set[str] = set()  # a registry stays for the life of the process


def add_workers(endpoints: Sequence[str]) -> tuple[str, ...]:
    """Registers the devices of these workers, which `llama.devices()` then lists; each worker once, under however many
    names. Returns their addresses in digits.

    Raises:
        BadRequest: not an address, or too many.
        MoelocalError: no worker answers there within 3 s, or this llama.cpp has no RPC.
    """
    wanted = [parse_endpoint(text) for text in endpoints]
    if not wanted:
        return ()
    add_server = rpc_function("ggml_backend_rpc_add_server")
    register = abi.ggml(llama.api(), "ggml_backend_register")
    found = tuple(dict.fromkeys(check_worker(host, port) for host, port in dict.fromkeys(wanted)))
    if len({*_registered, *found}) > _MAX_WORKERS:
        raise BadRequest(f"llama.cpp takes at most {_MAX_WORKERS} workers.", "Give --rpc less often.")
    for address in found:
        if address in _registered:
            continue
        registry = add_server(address.encode())
        if not registry:
            raise MoelocalError(f"The worker at {address} lends no device.", "Look at what it printed.")
        register(registry)
        _registered.add(address)
    return found


def drop_when_silent() -> None:
    """Has the system drop this process's lines to workers when the other machine is gone: llama.cpp waits for ever, and
    only ends when the line does. For POSIX systems, whose sockets are plain files.

    Source: tcp(7).
    """
    for connection in psutil.Process().net_connections("tcp") if os.name == "posix" else ():
        if not connection.raddr or "{}:{}".format(*connection.raddr) not in _registered:
            continue
        with socket.socket(fileno=os.dup(connection.fd)) as line:
            for name, (level, value) in _SILENCE.items():
                if hasattr(socket, name):
                    line.setsockopt(level, getattr(socket, name), value)


def rpc_function(name: str) -> Any:
    """One of llama.cpp's RPC functions.

    Raises:
        MoelocalError: llama.cpp was built without RPC.
    """
    try:
        return abi.ggml(llama.api(), name)
    except AttributeError as error:
        version = llama.version().split()[0]
        command = rebuild_command((), llama.backends(), False, version, System(), this_installation())
        raise MoelocalError("This llama.cpp was built without RPC.", f"Build it again: {command}") from error


def check_worker(host: str, port: int, timeout_s: float = _TIMEOUT_S) -> str:
    """Asks a worker for its version; in a thread, since looking up a name has no time limit of its own. Returns its
    address in digits.

    Raises:
        MoelocalError: nobody there, busy with another client, not a worker, or another version of llama.cpp.
    """
    outcome: list[MoelocalError | str] = []
    connected = threading.Event()
    thread = threading.Thread(target=lambda: outcome.append(_hello(host, port, timeout_s, connected)), daemon=True)
    thread.start()
    thread.join(timeout_s)
    if outcome:
        answer = outcome[0]
    elif connected.is_set():
        answer = MoelocalError(
            f"The worker at {host}:{port} does not answer: it serves another client.",
            "A worker serves one at a time: end the other one, or start a second worker on another port.",
        )
    else:
        answer = _unreachable(host, port, f"no answer within {timeout_s:g} s")
    if isinstance(answer, MoelocalError):
        raise answer
    return answer


def _hello(host: str, port: int, timeout_s: float, connected: threading.Event) -> MoelocalError | str:
    """A worker's address in digits, or what is wrong with it."""
    try:
        connection = socket.create_connection((host, port), timeout_s)
    except OSError as error:
        return _unreachable(host, port, (error.strerror or str(error)).lower())
    answer, address = b"", "{}:{}".format(*connection.getpeername()[:2])
    connected.set()
    with connection:
        try:
            connection.settimeout(2 * timeout_s)  # who waits for it has given up by then
            connection.sendall(_HELLO)
            while len(answer) < _HELLO_ANSWER_BYTES and (piece := connection.recv(_HELLO_ANSWER_BYTES)):
                answer += piece
        except OSError:
            pass  # told below, as an answer too short
    if len(answer) < _HELLO_ANSWER_BYTES or struct.unpack_from("<Q", answer)[0] != _HELLO_ANSWER_BYTES - 8:
        return MoelocalError(
            f"What listens at {host}:{port} is not a moelocal worker of this version.",
            "Check the port, and that both machines have the same moelocal and llama-cpp-python.",
        )
    return address


def _unreachable(host: str, port: int, why: str) -> MoelocalError:
    is_here = host in ("localhost", "127.0.0.1")
    command = f"moelocal worker --port {port}" if is_here else f"moelocal worker --host 0.0.0.0 --port {port}"
    return MoelocalError(f"No worker answers at {host}:{port} ({why}).", f"Start it on that machine: {command}")


def serve(host: str, port: int, threads: int) -> None:
    """Lends this machine's GPUs, or its CPU where there is none. Blocks until the process ends, or the port is lost.

    Raises:
        MoelocalError: llama.cpp was built without RPC.
    """
    start = rpc_function("ggml_backend_rpc_start_server")
    pointers = llama.lendable()
    array = (ctypes.c_void_p * len(pointers))(*pointers)
    start(f"{host}:{port}".encode(), None, threads, len(pointers), array)
