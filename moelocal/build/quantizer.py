"""llama.cpp's quantizer in a process of its own, which ends with this one.

    with Quantizer("model.gguf") as quantizer:
        lines = quantizer.rehearse(order)       # what it would do, in llama.cpp's words
        for line in quantizer.work(target, files): ...

Leaving a `with` ends the process at once, whatever it does.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from moelocal.engine.llama import OUT_OF_MEMORY
from moelocal.errors import LoadFailed, MoelocalError, OutOfMemory

_WARNING = 3  # GGML_LOG_LEVEL_WARN
_N_DETAILS = 6
_UNTELLING = re.compile(r"^[=\s]*$|^warning: \S+\s+- ncols|applying manual override")
_WRITE_FAILED = re.compile(r"basic_ios|iostream")


class Quantizer:
    """The process. `source`: the file's name, for messages; `on_log` gets llama.cpp's log, by lines."""

    def __init__(self, source: str, on_log: Callable[[str], None] | None = None) -> None:
        self._source, self._on_log = source, on_log
        self._told: deque[str] = deque(maxlen=_N_DETAILS)  # warnings and errors
        self._last = ""  # line of the log
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moelocal.build.quantize_child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            encoding="utf-8",
            errors="replace",
        )

    def __enter__(self) -> Quantizer:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()  # before its input closes, which it would take for our end
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def rehearse(self, order: Mapping[str, object]) -> list[str]:
        """What llama.cpp would do with each tensor, in its words. `order`: what `quantize_child` reads.

        Raises:
            MoelocalError: it refuses, or crashed.
        """
        self._send(order)
        return list(self._until_done())

    def work(self, target: Path, files: Sequence[Path]) -> Iterator[str]:
        """Does it; gives llama.cpp's log. `target` is what it is told to write, `files` what it then does write.

        Raises:
            MoelocalError: it failed, or crashed.
            OSError: the disk did.
        """
        self._send({"output": str(target), "files": [str(file) for file in files]})
        yield from self._until_done()

    def _send(self, message: Mapping[str, object]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it died; reading tells why

    def _until_done(self) -> Iterator[str]:
        assert self._process.stdout is not None
        for raw in self._process.stdout:
            level, _, line = raw.rstrip("\n").partition(" ")
            if level == "=":
                if line != "1":
                    raise self._failure()
                return
            if not level.isdigit():
                continue  # not ours: something that native code printed
            if self._on_log is not None:
                self._on_log(line)
            self._last = line
            if int(level) >= _WARNING and not _UNTELLING.search(line):
                self._told.append(line)
            yield line
        raise self._crash(self._process.wait())

    def _failure(self) -> MoelocalError | OSError:
        """llama.cpp's reason in a sentence."""
        text = "\n".join(self._told)
        if _WRITE_FAILED.search(text):
            return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if OUT_OF_MEMORY.search(text):
            return self._out_of_memory()
        if found := re.search(r"unknown model architecture: '([^']*)'", text):
            return LoadFailed(
                f"llama.cpp does not know the architecture {found[1]!r} of {self._source}.",
                "A newer llama-cpp-python may: pip install --upgrade llama-cpp-python",
            )
        if found := re.search(r"tensor '([^']*)' has invalid data", text):
            return LoadFailed(
                f"{self._source} is damaged: tensor {found[1]} holds values that are no numbers.",
                "Get or convert the file again.",
            )
        if "quantized data validation failed" in text:
            return MoelocalError(
                f"{self._source} cannot be quantized to this type: values became infinite.",
                "Choose another type (Q8_0 and BF16 take any value), or another importance matrix.",
                tuple(self._told),
            )
        reason = re.findall(r"failed to quantize: (.*)", text)
        return LoadFailed(
            f"llama.cpp cannot quantize {self._source}: {reason[-1].rstrip('.') if reason else 'it gave no reason'}.",
            "Run again with -v to see llama.cpp's whole log.",
            tuple(line for line in self._told if not reason or reason[-1] not in line),
        )

    def _out_of_memory(self) -> OutOfMemory:
        return OutOfMemory(
            f"Memory ran out while {self._source} was quantized.", "Close other programs, then run it again."
        )

    def _crash(self, status: int) -> MoelocalError:
        """What to say of a process that ended without a word. `status`: negative for a signal."""
        self._errors.seek(0)
        printed = [line for line in self._errors.read().decode(errors="replace").splitlines() if line.strip()]
        details = tuple([*self._told, *printed][-_N_DETAILS:])
        if OUT_OF_MEMORY.search("\n".join(details)) or (sys.platform != "win32" and status == -signal.SIGKILL):
            return self._out_of_memory()
        how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        at = re.match(r"\[\s*\d+/\s*\d+\] (\S+)", self._last)
        after = f" after tensor {at[1]}" if at else ""
        return MoelocalError(
            f"llama.cpp crashed ({how}) while it quantized {self._source}{after}.",
            "Run again with -v to see its whole log; another --type may work.",
            details,
        )
