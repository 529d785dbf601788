"""Raw declarations of llama.cpp and ggml: the low-level module, structs and functions that it leaves out.

Every function comes from the handle that llama.cpp itself was opened with: another handle would be another ggml, whose
registered devices llama.cpp never sees.

Source: llama.cpp 0c1e57098, include/llama.h, ggml/include/ggml-backend.h, ggml/include/ggml-rpc.h.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import sys
import tempfile
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from moelocal.errors import MoelocalError

POINTER = ctypes.c_void_p
SIZE = ctypes.c_size_t
SIZES = ctypes.POINTER(ctypes.c_size_t)
KIND_CPU, KIND_GPU, KIND_IGPU = 0, 1, 2  # enum ggml_backend_dev_type; 3 is ACCEL, a CPU's helper

_FUNCTIONS: dict[str, tuple[list[Any], Any]] = {
    "ggml_backend_dev_count": ([], SIZE),
    "ggml_backend_dev_get": ([SIZE], POINTER),
    "ggml_backend_dev_name": ([POINTER], ctypes.c_char_p),
    "ggml_backend_dev_description": ([POINTER], ctypes.c_char_p),
    "ggml_backend_dev_type": ([POINTER], ctypes.c_int),
    "ggml_backend_dev_memory": ([POINTER, SIZES, SIZES], None),
    "ggml_backend_dev_buffer_type": ([POINTER], POINTER),
    "ggml_backend_dev_backend_reg": ([POINTER], POINTER),
    "ggml_backend_reg_name": ([POINTER], ctypes.c_char_p),
    "ggml_backend_register": ([POINTER], None),
    "ggml_backend_buft_name": ([POINTER], ctypes.c_char_p),
    "ggml_backend_cpu_buffer_type": ([], POINTER),
    "ggml_backend_rpc_add_server": ([ctypes.c_char_p], POINTER),
    "ggml_backend_rpc_start_server": (
        [ctypes.c_char_p, ctypes.c_char_p, SIZE, SIZE, ctypes.POINTER(POINTER)],
        None,
    ),
}


class BufferOverride(ctypes.Structure):
    """`llama_model_tensor_buft_override`: tensors whose name the pattern finds go into that buffer type."""

    _fields_ = [("pattern", ctypes.c_char_p), ("buft", POINTER)]


def declare(low: Any, name: str, argtypes: Sequence[Any], restype: Any) -> Any:
    """A function of llama.cpp's own handle, typed.

    Raises:
        AttributeError: this build has no such function.
    """
    function = _symbol(low, name)
    function.argtypes, function.restype = list(argtypes), restype
    return function


def _symbol(low: Any, name: str) -> Any:
    """Windows does not look into the libraries that llama.dll depends on: there ggml's own, of the same folder, are
    asked, which gives the modules that are loaded already."""
    try:
        return low._lib[name]
    except AttributeError:
        folder = Path(low._lib._name).parent
        for library in ("ggml.dll", "ggml-base.dll", "ggml-cpu.dll", "ggml-rpc.dll"):
            if (folder / library).exists() and hasattr(found := ctypes.CDLL(str(folder / library)), name):
                return found[name]
        raise


def ggml(low: Any, name: str) -> Any:
    """One of the ggml functions named above, typed.

    Raises:
        AttributeError: this build has no such function (RPC is a build option).
    """
    return declare(low, name, *_FUNCTIONS[name])


def import_low_level(name: str = "llama_cpp") -> Any:
    """A module of the package `llama_cpp`, without running the package's `__init__`.

    Raises:
        MoelocalError: llama-cpp-python is missing or its library does not load.
    """
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        raise MoelocalError("llama-cpp-python is not installed.", "Install it: pip install llama-cpp-python")
    package = types.ModuleType("llama_cpp")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules.setdefault("llama_cpp", package)
    try:
        return importlib.import_module(f"llama_cpp.{name}")
    except (RuntimeError, OSError) as error:
        raise MoelocalError(
            f"llama.cpp's library does not load: {error}.",
            "Build it again: pip install --force-reinstall --no-cache-dir llama-cpp-python",
        ) from error
    finally:
        if sys.modules.get("llama_cpp") is package:
            del sys.modules["llama_cpp"]  # whoever imports the package later gets all of it


@contextmanager
def captured_stderr() -> Iterator[Callable[[], list[str]]]:
    """Keeps what native code prints to stderr off the screen. Gives a function that returns its lines afterwards."""
    with tempfile.TemporaryFile() as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)

        def lines() -> list[str]:
            return text.decode(errors="replace").splitlines()

        text = b""
        try:
            yield lines
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            text = file.read()


def leave_out_unread(low: Any, context: int) -> None:
    """Has the last layer compute only tokens whose logits are asked for, where an architecture would compute all of
    them for a predictor of further tokens that is not there: gpt-oss, Qwen3-Next, Gemma 4 and others.

    Source: llama.cpp 0c1e57098, src/llama-ext.h `llama_set_embeddings_nextn(context, value, masked)`, C++: where
    compilers name it otherwise (Windows), nothing changes.
    """
    with suppress(AttributeError):
        switch = declare(
            low, "_Z26llama_set_embeddings_nextnP13llama_contextbb", [ctypes.c_void_p] + [ctypes.c_bool] * 2, None
        )
        switch(context, False, True)


def marked_batch(low: Any, ids: Sequence[int], marks: Sequence[bool]) -> tuple[Any, Any]:
    """A batch of tokens of which the marked ones give logits; and what it points to, to be held while it is used."""
    array = (ctypes.c_int32 * len(ids))(*ids)
    flags = (ctypes.c_int8 * len(ids))(*marks)
    batch = low.llama_batch_get_one(array, len(ids))
    batch.logits = ctypes.cast(flags, ctypes.POINTER(ctypes.c_int8))
    return batch, (array, flags)
