"""`moelocal worker` and `--rpc` as people use them: real processes on this machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from moelocal.engine import abi, rpc
from moelocal.engine.address import parse_endpoint
from moelocal.errors import BadRequest, MoelocalError
from moelocal.serve import worker as serve_worker
from tests.cli.test_run import ANSWER, QUESTION, QUICK, command, refused, run
from tests.workers import free_port, signal_all, worker

Tiny = Callable[[str], Path]


@contextmanager
def listener(answer: bytes | None) -> Iterator[int]:
    """A port where somebody listens who is no worker: says `answer` and hangs up, or never says anything."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        held = []

        def serve() -> None:
            try:
                while True:
                    connection, _ = server.accept()
                    held.append(connection)
                    if answer is not None:
                        connection.recv(64)
                        connection.sendall(answer)
                        connection.close()
            except OSError:
                return

        threading.Thread(target=serve, daemon=True).start()
        yield int(server.getsockname()[1])
        for connection in held:
            connection.close()


def test_a_model_runs_on_a_worker() -> None:
    with worker() as (port, process):
        done = run("run", "demo", QUESTION, "--rpc", f"127.0.0.1:{port}", "--json", *QUICK)
        assert done.returncode == 0, done.stderr
        document = json.loads(done.stdout)
        assert document["text"] == ANSWER
        assert "rpc" in [device["kind"] for device in document["plan"]["devices"]]
        again = run("run", "demo", QUESTION, "--rpc", f"localhost:{port}", *QUICK)
        assert again.stdout == ANSWER + "\n", "it serves one client after another"
        process.terminate()
        out, err = process.communicate(timeout=20)
        assert process.returncode == 0
        assert out == f"moelocal run MODEL --rpc 127.0.0.1:{port}\n"
        assert "Only this machine can connect" in err and "Warning" not in err and "Traceback" not in err


def test_ctrl_c_ends_a_worker() -> None:
    with worker() as (port, process):
        assert process.stdout is not None and process.stdout.readline()
        signal_all(process, signal.SIGINT)
        assert process.wait(timeout=20) == 130
        assert process.stderr is not None and "Traceback" not in process.stderr.read()
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", port), 1)


def test_beyond_loopback_it_warns_and_names_an_address() -> None:
    with worker("--host", "0.0.0.0") as (port, process):
        assert process.stdout is not None
        line = process.stdout.readline().split()
        assert line[:4] == ["moelocal", "run", "MODEL", "--rpc"] and line[4].endswith(f":{port}")
        assert not line[4].startswith("0.0.0.0")
        process.terminate()
        assert "no authentication" in process.communicate(timeout=20)[1]


def test_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        refused(run("worker", "--port", str(port)), 1, f"Port {port} is in use", f"--port {port + 1}")


@pytest.mark.parametrize(
    ("host", "words"), [("no.such.host.invalid", "not a host name"), ("192.0.2.7", "not an address")]
)
def test_a_bad_host(host: str, words: str) -> None:
    refused(run("worker", "--host", host, "--port", str(free_port())), 2, words, "0.0.0.0")


@pytest.mark.parametrize("port", ["0", "65536", "x"])
def test_a_bad_port(port: str) -> None:
    refused(run("worker", "--port", port), 2, "--port")


def test_llama_cpp_without_rpc(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(low: object, name: str) -> None:
        raise AttributeError(name)

    monkeypatch.setattr(abi, "ggml", missing)
    for attempt in (lambda: serve_worker.start_worker("127.0.0.1", free_port(), 1), lambda: rpc.add_workers(["h:1"])):
        with pytest.raises(MoelocalError, match="without RPC") as caught:
            attempt()
        assert "-DGGML_RPC=on" in caught.value.hint


@pytest.mark.parametrize("text", ["", ":", ":50052", "host:", "host:0", "host:x", "host:70000", "a:b:c", "::1"])
def test_addresses(text: str) -> None:
    if text == "host:":
        assert parse_endpoint(text) == ("host", 50052)
        return
    with pytest.raises(BadRequest, match="address"):
        parse_endpoint(text)


def test_options_that_contradict() -> None:
    refused(run("run", "demo", "x", "--rpc", "127.0.0.1:1", "--cpu-only"), 2, "exclude each other")
    refused(run("run", "demo", "x", "--rpc", "nonsense:port"), 2, "nonsense:port", "HOST:PORT")


def test_nobody_there() -> None:
    port = free_port()
    start = time.monotonic()
    done = run("run", "demo", QUESTION, "--rpc", f"127.0.0.1:{port}", *QUICK)
    assert time.monotonic() - start < 10
    refused(done, 1, f"127.0.0.1:{port}", "refused", f"moelocal worker --port {port}")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a full queue refuses")
def test_a_host_that_is_silent_takes_three_seconds() -> None:
    """A full queue of connections drops further ones, as a firewall does."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server:
        port = server.getsockname()[1]
        waiting = [socket.socket() for _ in range(4)]
        for connection in waiting:
            connection.setblocking(False)
            connection.connect_ex(("127.0.0.1", port))
        start = time.monotonic()
        with pytest.raises(MoelocalError, match=f"127.0.0.1:{port}") as caught:
            rpc.check_worker("127.0.0.1", port)
        assert 1 < time.monotonic() - start < 3.5
        assert f"moelocal worker --port {port}" in caught.value.hint
        for connection in waiting:
            connection.close()


def test_the_hint_for_another_machine() -> None:
    with pytest.raises(MoelocalError, match="invalid:50052") as caught:
        rpc.check_worker("no.such.host.invalid", 50052)
    assert "moelocal worker --host 0.0.0.0 --port 50052" in caught.value.hint


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", bytes(100)])
def test_somebody_else_listens_there(answer: bytes) -> None:
    with listener(answer) as port, pytest.raises(MoelocalError, match="not a moelocal worker"):
        rpc.check_worker("127.0.0.1", port)


def test_a_busy_worker() -> None:
    with listener(None) as port, pytest.raises(MoelocalError, match="another client"):
        rpc.check_worker("127.0.0.1", port, timeout_s=0.3)


def test_one_client_at_a_time_and_one_worker_under_two_names() -> None:
    with worker() as (port, process):
        assert process.stdout is not None and process.stdout.readline()  # it has probed itself
        with (
            socket.create_connection(("127.0.0.1", port), 5),
            pytest.raises(MoelocalError, match="another client"),
        ):
            rpc.check_worker("127.0.0.1", port)
        names = ["--rpc", f"localhost:{port}", "--rpc", f"127.0.0.1:{port}"]
        done = run("run", "demo", QUESTION, *names, *QUICK)
        assert done.stdout == ANSWER + "\n", done.stderr


@pytest.mark.skipif(os.name != "posix", reason="sockets are no files")
def test_a_line_is_dropped_when_the_machine_at_its_other_end_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    with listener(None) as port, socket.create_connection(("127.0.0.1", port)) as line:
        with socket.create_connection(("127.0.0.1", port)) as other:
            monkeypatch.setattr(rpc, "_registered", {f"127.0.0.1:{port}"})
            rpc.drop_when_silent()
            assert other.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert line.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert line.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == 3
        monkeypatch.setattr(rpc, "_registered", set())
        with socket.create_connection(("127.0.0.1", port)) as strange:
            rpc.drop_when_silent()
            assert not strange.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


def test_a_worker_that_vanishes_in_the_middle_of_an_answer() -> None:
    with worker() as (port, process):
        args = ["run", "demo", "Tell me a story.", "--raw", "--max-tokens", "100000", "--ctx", "4096", *QUICK]
        pipe = subprocess.PIPE
        asked = subprocess.Popen(command(*args, "--rpc", f"127.0.0.1:{port}"), stdout=pipe, stderr=pipe, text=True)
        assert asked.stdout is not None and asked.stdout.read(20)
        signal_all(process, signal.SIGKILL)
        out, err = asked.communicate(timeout=30)
        assert asked.returncode == 1, (out, err)
        assert "Error: A worker vanished" in err and "moelocal worker" in err and "Traceback" not in err


def test_a_chat_keeps_what_was_said_when_the_worker_vanishes(tmp_path: Path) -> None:
    home = {**os.environ, "MOELOCAL_HOME": str(tmp_path)}
    with worker() as (port, process):
        args = command("chat", "demo", "--rpc", f"127.0.0.1:{port}", *QUICK)
        pipe = subprocess.PIPE
        chat = subprocess.Popen(args, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=home)
        assert chat.stdin is not None and chat.stdout is not None
        chat.stdin.write(QUESTION + "\n")
        chat.stdin.flush()
        assert ANSWER in chat.stdout.readline()
        time.sleep(0.5)  # the conversation is written after the answer
        signal_all(process, signal.SIGKILL)
        _, err = chat.communicate("And of Spain?\n", timeout=30)
        assert chat.returncode == 1 and "A worker vanished" in err and "/load previous" in err
    kept = subprocess.run(
        [sys.executable, "-m", "moelocal", "chat", "demo", *QUICK],
        input="/load previous\n/show\n", capture_output=True, text=True, env=home, timeout=60,
    )  # fmt: skip
    assert ANSWER in kept.stdout + kept.stderr


@pytest.mark.skipif(shutil.which("prlimit") is None, reason="prlimit is Linux's")
def test_a_worker_with_less_memory_than_it_says(tmp_path: Path) -> None:
    """The plan puts all on it, the load fails there, and a smaller plan is tried; the next time at once."""
    home = {**os.environ, "MOELOCAL_HOME": str(tmp_path)}
    with worker(memory_bytes=1 << 30) as (port, _):
        args = ["run", "demo", QUESTION, "--rpc", f"127.0.0.1:{port}", "--ctx", "600000", "--kv-type", "f16", *QUICK]
        done = run(*args, env=home)
        assert (done.returncode, done.stdout) == (0, ANSWER + "\n"), done.stderr
        assert "not enough memory" in done.stderr and "Trying again with" in done.stderr
        assert len(list((tmp_path / "plans").iterdir())) == 1
        again = run(*args, env=home)
        assert again.stdout == ANSWER + "\n" and "Trying again" not in again.stderr
