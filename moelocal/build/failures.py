"""Why the converter failed, in a sentence with the next step.

Source: llama.cpp 0c1e57098, conversion/base.py, gguf-py/gguf/vocab.py (the texts of their exceptions).
"""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moelocal.errors import MoelocalError, OutOfMemory

_N_DETAILS = 6
_TOKENIZER_FILES = "Take the tokenizer's files from the model that it was made from."
_NEWER = "A newer llama-cpp-python may: pip install --upgrade llama-cpp-python"

Say = Callable[[re.Match[str], str], tuple[str, str]]


def _missing(match: re.Match[str], folder: str) -> tuple[str, str]:
    return f"{folder} lacks {Path(match[1]).name}, which the converter reads.", "Download the rest of the checkpoint."


_KNOWN: list[tuple[str, Say]] = [
    (
        r"BPE pre-tokenizer was not recognized",
        lambda _, folder: (
            f"The converter does not know the tokenizer of {folder}: how it splits text before BPE.",
            f"If it is a model of a known family, its tokenizer was changed: take the original's files. {_NEWER}",
        ),
    ),
    (
        r"trust_remote_code",
        lambda _, folder: (
            f"The tokenizer of {folder} is a program of the publisher's, which would run here.",
            "Look at its .py files; if you trust them: --trust-code",
        ),
    ),
    (
        r"Can ?not map tensor '([^']*)'",
        lambda match, _: (
            f"The converter does not know the tensor {match[1]}: a part of the model that it has no place for.",
            _NEWER,
        ),
    ),
    (
        r"(?:Quant method is not yet supported: |Quant format )'?([\w.-]+)",
        lambda match, _: (
            f"The converter cannot read weights quantized by {match[1]}.",
            "Take the model's unquantized checkpoint (BF16, F16 or FP8).",
        ),
    ),
    (
        r"multiple config groups|gptq dequantization is not",
        lambda _match, _: (
            "The converter cannot read weights quantized in this way.",
            "Take the model's unquantized checkpoint (BF16, F16 or FP8).",
        ),
    ),
    (
        r"Missing or incomplete model files: \[(.*)\]",
        lambda match, folder: (f"{folder} is not whole: {match[1]:.120}.", "Download the rest of the checkpoint."),
    ),
    (
        r"Mismatch between weight map",
        lambda _, folder: (f"The index of {folder} does not fit its files.", "Download the checkpoint again."),
    ),
    (
        r"could not find any of: (.*)",
        lambda match, folder: (
            f"config.json of {folder} lacks what the converter needs: one of {match[1].strip('()[],')}.",
            "Take config.json from the model that it was made from.",
        ),
    ),
    (r"No such file or directory: '([^']*)'", _missing),
    (r"File not found: (\S+)", _missing),
    (r"Cannot find (tokenizer\.model)", _missing),
    (
        r"Can't load tokenizer|Couldn't instantiate the backend tok|Cannot find .*tokenizer|No tokenizer file found",
        lambda _, folder: (f"The tokenizer of {folder} cannot be loaded: files of it are missing.", _TOKENIZER_FILES),
    ),
    (
        r"No module named '([^']*)'|requires? (?:the )?`?(tiktoken|sentencepiece|mistral-common|tokenizers)",
        lambda match, _: (
            f"The converter needs the Python package {match[1] or match[2]} for this model.",
            f"pip install {match[1] or match[2]}",
        ),
    ),
    (
        r"Architecture '([^']*)' not supported|Model (\S+) is not supported",
        lambda match, _: (f"The converter does not know the architecture {match[1] or match[2]}.", _NEWER),
    ),
]


def explain(called: str, last: Mapping[str, Any], status: int, printed: str) -> MoelocalError | OSError:
    """What to raise when the converter failed.

    Args:
        called: the checkpoint, for messages.
        last: what it told last: `error`, `text`, `errno`, `at`, `functions`, `logged`; nothing when it died.
        status: its exit status, negative for a signal.
        printed: the end of its stderr.
    """
    text = str(last.get("text", ""))
    if last.get("errno") in (errno.ENOSPC, errno.EDQUOT) or re.search(r"requested and \d+ written", text):
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    lines = tuple(line for line in printed.splitlines() if line.strip())[-_N_DETAILS:]
    is_killed = sys.platform != "win32" and status == -signal.SIGKILL and "error" not in last
    if last.get("error") == "MemoryError" or is_killed or "DefaultCPUAllocator: can't allocate" in text:
        return OutOfMemory(
            f"Memory ran out while {Path(called).name} was converted.", "Close other programs, then run it again."
        )
    if "error" not in last:
        how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        return MoelocalError(
            f"The converter ended without a word ({how}).", "Run again with -v to see its whole log.", lines
        )
    if last["error"] == "SystemExit":
        text = str(last.get("logged") or text)
    for pattern, say in _KNOWN:
        if match := re.search(pattern, text):
            message, hint = say(match, called)
            return MoelocalError(message, hint)
    if last["error"] == "KeyError":
        text = f"it looked for {text}, which is not there"
    reason = (text.strip().splitlines() or [last["error"]])[0].rstrip(".")
    if "set_vocab" in last.get("functions", ()):
        return MoelocalError(f"The tokenizer of {called} cannot be read: {reason:.300}.", _TOKENIZER_FILES)
    return MoelocalError(
        f"The converter cannot convert {Path(called).name}: {reason:.300} ({last['error']} at {last.get('at', '?')}).",
        "Run again with -v to see its whole log.",
    )
