"""A native crash must not end the program silently: the work runs in a child process, and its parent, still plain
Python, tells what happened. The child's llama.cpp log is in memory that both share, so its last lines survive.

Forked before anything heavy is loaded, so it costs a few milliseconds. Where that cannot be (Windows, macOS),
llama.cpp's own abort message is all there is.
"""

from __future__ import annotations

import mmap
import os
import re
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import Any

from moelocal.errors import MoelocalError, OutOfMemory

_RING_BYTES = 1 << 15
_MAX_ATTEMPTS = 2
# Source: llama.cpp 0c1e57098, ggml/src/ggml-rpc/ggml-rpc.cpp, RPC_STATUS_ASSERT and rpc_dispatcher::start
_WORKER_GONE = re.compile("Remote RPC server crashed|Failed to connect to")
_ENDINGS = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT) if sys.platform != "win32" else (signal.SIGTERM,)


_shared: mmap.mmap | None = None  # byte 0: which attempt the child is; byte 1: whether it may be repeated


def guard(hint: str = "") -> None:
    """Returns in a child process; the parent waits for it and ends as it ends. A child that dies for want of memory
    between `repeatable(True)` and `repeatable(False)` gets a successor, which learns of it from `attempt`.

    Raises:
        MoelocalError: in the parent, when native code killed the child. `hint` is added to what to try.
    """
    global _shared
    if not hasattr(os, "fork") or sys.platform == "darwin":  # Metal does not work in a forked child
        return
    _shared = mmap.mmap(-1, mmap.PAGESIZE)
    terminal = _terminal_settings()
    while True:
        ring = mmap.mmap(-1, _RING_BYTES)
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        child = os.fork()
        if child == 0:
            _die_with(parent)
            from moelocal.engine.llama import LOG

            LOG.mirror = ring
            return
        status = _wait(child)
        _restore_terminal(terminal)
        if os.WIFEXITED(status):
            os._exit(os.WEXITSTATUS(status))
        failure = _crash(os.WTERMSIG(status), ring, hint)
        if not isinstance(failure, OutOfMemory) or not _shared[1] or _shared[0] >= _MAX_ATTEMPTS - 1:
            raise failure
        _shared[0] += 1


def attempt() -> int:
    """How many processes before this one died for want of memory while they loaded the model."""
    return _shared[0] if _shared else 0


def repeatable(may: bool) -> None:
    """Whether a new process may begin again: nothing was shown or read yet."""
    if _shared:
        _shared[1] = may


def _wait(child: int) -> int:
    """Waits for the child; Ctrl-C is the child's business, requests to end are passed on."""

    def pass_on(signum: int, _: FrameType | None) -> None:
        with suppress(ProcessLookupError):
            os.kill(child, signum)

    before = {signum: signal.signal(signum, pass_on) for signum in _ENDINGS}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.SIG_IGN)
    status = os.waitpid(child, 0)[1]
    for signum, handler in before.items():
        signal.signal(signum, handler)
    return status


def _die_with(parent: int) -> None:
    """Asks Linux to end this child when its parent is killed."""
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)


def _crash(signum: int, ring: mmap.mmap, hint: str) -> MoelocalError | SystemExit | KeyboardInterrupt:
    if signum == signal.SIGINT:
        return KeyboardInterrupt()
    if signum in (*_ENDINGS, signal.SIGPIPE):
        return SystemExit(128 + signum)
    from moelocal.engine.llama import OUT_OF_MEMORY, mirror_read

    lines = [line for line in mirror_read(ring) if line.strip()]
    details = tuple(lines[-6:])
    if signum == signal.SIGKILL:
        return OutOfMemory(
            "The system killed the process (signal 9), most likely because memory ran out.",
            f"Try a smaller context (--ctx 4096) or a smaller quantization. {hint}".strip(),
            details,
        )
    text = "\n".join(lines)
    if signum == signal.SIGABRT and "RPC handshake failed" in text:
        return MoelocalError(
            "A worker runs another version of llama.cpp.",
            f"Install the same moelocal and llama-cpp-python on both machines. {hint}".strip(),
            details,
        )
    if signum == signal.SIGABRT and _WORKER_GONE.search(text):
        return MoelocalError(
            "A worker vanished: its program ended or the network failed.",
            f"Start it again on its machine (moelocal worker) and repeat this, or leave --rpc out. {hint}".strip(),
            details,
        )
    if signum == signal.SIGABRT and OUT_OF_MEMORY.search(text):
        return OutOfMemory(
            "Memory ran out on one of the devices.",
            f"Close other programs, or try a smaller context (--ctx 4096). {hint}".strip(),
            details,
        )
    return MoelocalError(
        f"llama.cpp crashed ({signal.Signals(signum).name}).",
        f"Try --cpu-only, a smaller --ctx, or run again with -v for its whole log. {hint}".strip(),
        details,
    )


def _terminal_settings() -> list[Any] | None:
    import termios

    try:
        return termios.tcgetattr(0)
    except (termios.error, OSError, ValueError):
        return None


def _restore_terminal(settings: list[Any] | None) -> None:
    if settings is not None:
        import termios

        with suppress(termios.error, OSError):
            if os.tcgetpgrp(0) != os.getpgrp():
                return  # in the background it would be stopped
            termios.tcsetattr(0, termios.TCSADRAIN, settings)
