"""The child process in which llama.cpp quantizes: see `build/quantize.py`, which starts it.

In: a line of JSON, what to do; another one, where to, when it shall begin in earnest; then nothing, until the parent is
gone: then what is half written is removed and this process ends, whatever llama.cpp does.
Out: llama.cpp's log, each line after its level, and a line `= STATUS` after the rehearsal and after the work.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any


def _main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    order = json.loads(sys.stdin.readline())
    from moelocal.engine import llama, quantizing

    llama.LOG.on_line = lambda level, line: print(level, line, flush=True)
    source = Path(order["source"])
    settings = quantizing.Settings(**order["settings"], imatrix=_means(order["imatrix"]))
    done = quantizing.run(source, Path(os.devnull), settings, is_dry=True)
    print(f"= {int(done)}", flush=True)
    if not done or not (begin := sys.stdin.readline()):
        return
    target, files = json.loads(begin).values()
    is_whole = threading.Event()
    threading.Thread(target=_end_with_parent, args=(files, is_whole), daemon=True).start()
    done = quantizing.run(source, Path(target), settings)
    if done:
        is_whole.set()
    print(f"= {int(done)}", flush=True)


def _means(imatrix: str | None) -> dict[str, Any]:
    """The importances as the quantizer wants them."""
    if imatrix is None:
        return {}
    from moelocal.build import imatrix_file

    return {name: entry.means().ravel() for name, entry in imatrix_file.read(Path(imatrix)).entries.items()}


def _end_with_parent(files: list[str], is_whole: threading.Event) -> None:
    """Waits for the end of the parent, and does not survive it."""
    sys.stdin.read()
    if not is_whole.is_set():
        for file in files:
            Path(file).unlink(missing_ok=True)
    os._exit(1)


if __name__ == "__main__":
    _main()
