"""llama.cpp's C API, opened once: library, log, devices, model and context loading.

`api()` returns the low-level binding (every `llama_*` function and struct). Only the low-level module is imported:
the package's own `__init__` brings numpy and the high-level `Llama` class, which cost 0.2 s and 25 MB.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections import deque
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from moelocal.engine import abi
from moelocal.errors import BadRequest, LoadFailed, OutOfMemory
from moelocal.machine.hardware import Device

if TYPE_CHECKING:
    from moelocal.plan.llama_flags import LlamaFlags
    from moelocal.plan.planner import Plan

GGML_TYPE = {"f16": 1, "q8_0": 8, "q4_0": 2}
LOAD_MODE = {"none": 0, "mmap": 1}
_LEVEL_CONTINUE = 5  # GGML_LOG_LEVEL_CONT
_LEVEL_DEBUG = 1
_LEVEL_WARN = 3
_KV_OVERRIDE_INT = 0  # enum llama_model_kv_override_type
_MIRROR_HEAD = 8


class Log:
    """What llama.cpp says, without its debug lines. Kept whole lines at a time; echoed to stderr when `verbose`;
    mirrored into shared memory so that a parent process can still read it after a native crash."""

    def __init__(self) -> None:
        self.lines: deque[tuple[int, str]] = deque(maxlen=2000)
        self.verbose = False
        self.mirror: Any = None
        self.on_line: Callable[[int, str], None] | None = None
        self._part = ""
        self._level = 0

    def write(self, level: int, text: str) -> None:
        """Takes one fragment; a line counts when its newline arrives."""
        if level != _LEVEL_CONTINUE:
            self._level = level
        if self._level == _LEVEL_DEBUG:
            return
        *whole, self._part = (self._part + text).split("\n")
        for line in whole:
            if self.verbose:
                print(line, file=sys.stderr)
            self.lines.append((self._level, line))
            if self.on_line is not None:
                self.on_line(self._level, line)
            if self.mirror is not None:
                mirror_write(self.mirror, line + "\n")

    def tail(self, n: int = 6) -> tuple[str, ...]:
        """The last `n` lines that a person can use: warnings and errors first choice, else whatever came last."""
        told = [line for level, line in self.lines if level >= _LEVEL_WARN and line.strip()]
        return tuple((told or [line for _, line in self.lines if line.strip()])[-n:])


def mirror_write(buffer: Any, text: str) -> None:
    """Appends to a ring in shared memory: 8 bytes of total length, then the ring itself."""
    size = len(buffer) - _MIRROR_HEAD
    data = text.encode(errors="replace")[-size:]
    total = int.from_bytes(buffer[:_MIRROR_HEAD], "little")
    start = _MIRROR_HEAD + total % size
    first = data[: len(buffer) - start]
    buffer[start : start + len(first)] = first
    buffer[_MIRROR_HEAD : _MIRROR_HEAD + len(data) - len(first)] = data[len(first) :]
    buffer[:_MIRROR_HEAD] = (total + len(data)).to_bytes(_MIRROR_HEAD, "little")


def mirror_read(buffer: Any) -> list[str]:
    """The lines that a ring written by `mirror_write` still holds."""
    size = len(buffer) - _MIRROR_HEAD
    total = int.from_bytes(buffer[:_MIRROR_HEAD], "little")
    ring = bytes(buffer[_MIRROR_HEAD:])
    data = ring[:total] if total <= size else ring[total % size :] + ring[: total % size]
    lines = data.decode(errors="replace").splitlines()
    return lines if total <= size else lines[1:]


LOG = Log()
_keep: list[Any] = []  # callbacks that native code holds for the life of the process


@lru_cache(maxsize=1)
def api() -> Any:
    """The low-level binding, with llama.cpp initialised and its log and abort message routed to `LOG`.

    Raises:
        MoelocalError: llama-cpp-python is missing or its library does not load.
    """
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # a debugger's stack trace helps no user
    low = abi.import_low_level()
    log_callback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(
        lambda level, text, _: LOG.write(level, (text or b"").decode(errors="replace"))
    )
    abort_callback = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(
        lambda text: LOG.write(4, (text or b"").decode(errors="replace") + "\n")
    )
    _keep.extend((log_callback, abort_callback))
    low.llama_log_set(log_callback, ctypes.c_void_p())
    abi.declare(low, "ggml_set_abort_callback", [type(abort_callback)], ctypes.c_void_p)(abort_callback)
    low.llama_backend_init()
    return low


class _Raw(NamedTuple):
    """A device as llama.cpp is told of it: `ggml_backend_dev_t`, the buffer type of its own memory, that one's name."""

    pointer: int
    buffer_type: int
    buffer_name: str


def devices() -> tuple[Device, ...]:
    """The devices that llama.cpp can compute on, in its order."""
    return tuple(device for device, _ in _devices())


def buffer_names() -> dict[str, str]:
    """Device name -> the name of its buffer type, under which the log and overrides know it."""
    return {device.name: raw.buffer_name for device, raw in _devices()}


def lendable() -> tuple[int, ...]:
    """Pointers to the devices worth lending to another machine: the GPUs, else the CPU."""
    found = _devices()
    gpus = [raw.pointer for device, raw in found if device.kind == "gpu"]
    return tuple(gpus or [raw.pointer for device, raw in found if device.name == "CPU"])


def _devices() -> list[tuple[Device, _Raw]]:
    low = api()

    def call(name: str, *args: Any) -> Any:
        return abi.ggml(low, "ggml_backend_" + name)(*args)

    found = []
    for index in range(call("dev_count")):
        pointer = call("dev_get", index)
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        call("dev_memory", pointer, ctypes.byref(free), ctypes.byref(total))
        backend, kind = _backend_name(call("reg_name", call("dev_backend_reg", pointer))), call("dev_type", pointer)
        is_gpu = kind in (abi.KIND_GPU, abi.KIND_IGPU)
        buffer_type = call("dev_buffer_type", pointer)
        buffer_name = call("buft_name", buffer_type).decode(errors="replace")
        device = Device(
            name=call("dev_name", pointer).decode(errors="replace"),
            description=call("dev_description", pointer).decode(errors="replace"),
            kind="rpc" if backend.startswith("RPC") else "gpu" if is_gpu else "cpu",
            total_bytes=total.value,
            free_bytes=free.value,
            backend=backend,
            # Metal calls Apple's GPU a discrete one, yet its memory is the system's
            shares_ram=kind == abi.KIND_IGPU or (backend == "Metal" and sys.platform == "darwin"),
            buffer_name=buffer_name if backend.startswith("RPC") else "",
        )
        found.append((device, _Raw(pointer, buffer_type, buffer_name)))
    return found


def backends() -> tuple[str, ...]:
    """The backends that this llama.cpp was built with, such as CPU, CUDA, RPC."""
    low = api()
    count = abi.declare(low, "ggml_backend_reg_count", [], ctypes.c_size_t)
    get = abi.declare(low, "ggml_backend_reg_get", [ctypes.c_size_t], ctypes.c_void_p)
    name = abi.declare(low, "ggml_backend_reg_name", [ctypes.c_void_p], ctypes.c_char_p)
    return tuple(_backend_name(name(get(index))) for index in range(count()))


def _backend_name(name: bytes) -> str:
    """A backend's name as people know it."""
    text = name.decode(errors="replace")
    return "Metal" if text == "MTL" else text


def version() -> str:
    """Which engine this is: the binding's version and ggml's version and commit, `0.3.36 (ggml 0.25.3, 0c1e57098)`.

    The binding's version is read from the name of its metadata folder: importlib.metadata takes 20 ms to import.
    """
    low = api()
    parts = [
        abi.declare(low, f"ggml_{what}", [], ctypes.c_char_p)().decode(errors="replace")
        for what in ("version", "commit")
    ]
    site = Path(low.__file__).parent.parent
    found = [path.stem.split("-")[1] for path in site.glob("llama_cpp_python-*.dist-info")]
    return f"{found[0] if found else 'unknown'} (ggml {', '.join(parts)})"


def system_info() -> str:
    """What the CPU kernels were built for, in llama.cpp's words: `CPU : AVX2 = 1 | ... | REPACK = 1 |`."""
    return str(api().llama_print_system_info().decode(errors="replace"))


def supports_rpc() -> bool:
    """Whether this build can use, and lend, machines over the network."""
    return bool(api().llama_supports_rpc())


def open_model(
    paths: Sequence[Path],
    plan: Plan,
    flags: LlamaFlags,
    progress: Callable[[float], bool] | None = None,
    is_dry: bool = False,
) -> int:
    """Loads a checkpoint (all its shards, in order) and returns the `llama_model *`.

    Args:
        flags: which device holds what.
        progress: called with 0.0 to 1.0; returning False stops the load.
        is_dry: without weights, only to see what a context would allocate.

    Raises:
        KeyboardInterrupt: `progress` stopped it.
        LoadFailed, OutOfMemory: with llama.cpp's last words attached.
        BadRequest: a device that is not there.
    """
    low = api()
    params = low.llama_model_default_params()
    params.load_mode = LOAD_MODE[plan.load_mode]
    params.use_extra_bufts = plan.repack
    params.no_host = plan.no_host
    if is_dry:
        params.no_alloc, params.load_mode = True, LOAD_MODE["none"]  # mapped, it would abort
    held = [*_place(params, flags), _use_experts(params, flags.experts_used)]
    stopped = False

    def on_progress(fraction: float, _: Any) -> bool:
        nonlocal stopped
        stopped = True  # also if the next line is interrupted
        stopped = progress is not None and not progress(fraction)
        return not stopped

    params.progress_callback = low.llama_progress_callback(on_progress)
    LOG.lines.clear()
    names = [os.fsencode(path) for path in paths]
    if len(names) == 1:
        model = low.llama_model_load_from_file(names[0], params)
    else:
        array = (ctypes.c_char_p * len(names))(*names)
        model = low.llama_model_load_from_splits(array, len(names), params)
    del held
    if stopped:
        if model:
            low.llama_model_free(model)
        raise KeyboardInterrupt
    if not model:
        raise _load_error(paths[0].name)
    return int(model)


def _place(params: Any, flags: LlamaFlags) -> list[Any]:
    """Writes devices, split and overrides into the parameters. Returns the arrays that these now point to."""
    params.n_gpu_layers = flags.n_gpu_layers
    if flags.devices is None:
        return []
    known = {device.name: raw for device, raw in _devices()}
    for name in (*flags.devices, *(name for _, name in flags.overrides)):
        if name not in known:
            raise BadRequest(f"There is no device {name}.", f"llama.cpp has these: {', '.join(known)}.")
    n = len(flags.devices)
    chosen = (ctypes.c_void_p * (n + 1))(*(known[name].pointer for name in flags.devices))  # ends with NULL
    shares = (ctypes.c_float * max(n, api().llama_max_devices()))(*flags.tensor_split)
    overrides = (abi.BufferOverride * (len(flags.overrides) + 1))()
    for entry, (pattern, name) in zip(overrides, flags.overrides, strict=False):
        entry.pattern, entry.buft = pattern.encode(), known[name].buffer_type
    params.devices = ctypes.cast(chosen, ctypes.c_void_p)
    params.tensor_split = ctypes.cast(shares, ctypes.POINTER(ctypes.c_float))
    params.tensor_buft_overrides = ctypes.cast(overrides, ctypes.c_void_p)
    return [chosen, shares, overrides]


def _use_experts(params: Any, override: tuple[str, int] | None) -> Any:
    """Writes another number of experts per token into the parameters. Returns the array that these now point to."""
    if override is None:
        return None
    array = (api().llama_model_kv_override * 2)()  # ends with an empty key
    array[0].tag, array[0].key, array[0].value.val_i64 = _KV_OVERRIDE_INT, override[0].encode(), override[1]
    params.kv_overrides = array
    return array


def offload_prompts_from(n_tokens: int | None) -> None:
    """Sets the batch size from which a GPU computes prompts with experts copied over; None: llama.cpp's own (32).

    Backends read it once, when the library is opened: call it before anything else here. What the user set stays.
    """
    if n_tokens is not None:
        os.environ.setdefault("GGML_OP_OFFLOAD_MIN_BATCH", str(n_tokens))


OUT_OF_MEMORY = re.compile(
    r"unable to allocate|failed to allocate|out of memory|bad_alloc|cannot allocate|cudaMalloc"
    r"|alloc_tensor_range|ErrorOutOfDeviceMemory",
    re.IGNORECASE,
)


def _load_error(what: str) -> LoadFailed | OutOfMemory:
    """Puts llama.cpp's reason for refusing into one sentence."""
    details = LOG.tail()
    text = "\n".join(line for _, line in LOG.lines)
    if OUT_OF_MEMORY.search(text):
        return OutOfMemory(
            f"There is not enough memory to load {what}.",
            "Close other programs, choose a smaller quantization, or a smaller context with --ctx.",
            details,
        )
    if found := re.search(r"unknown model architecture: '([^']*)'", text):
        return LoadFailed(
            f"llama.cpp does not know the architecture {found[1]!r} of {what}.",
            "A newer llama-cpp-python may: pip install --upgrade llama-cpp-python",
            details,
        )
    reason = re.search(r"error loading model: (.*)", text)
    return LoadFailed(
        f"llama.cpp cannot load {what}: {reason[1].rstrip('.') if reason else 'it gave no reason'}.",
        "Run again with -v to see llama.cpp's whole log; download the file again if it may be damaged.",
        details,
    )


def open_context(model: int, plan: Plan, n_ctx: int, abort: tuple[Any, Any] | None, on_node: Any = None) -> int:
    """Creates the context (KV cache and work buffers) and returns the `llama_context *`.

    Args:
        abort: a C function `bool (*)(void *)` and its argument, asked between graph nodes on the CPU.
        on_node: a callback that sees every graph node (`watch.Watch.callback`); the caller keeps it alive.

    Raises:
        OutOfMemory: there is no room for the KV cache or the work buffers.
        LoadFailed: llama.cpp refuses these settings for this model.
    """
    low = api()
    params = low.llama_context_default_params()
    params.n_ctx = n_ctx
    params.n_batch = params.n_ubatch = min(plan.n_ubatch, n_ctx)
    params.n_outputs_max = plan.n_outputs  # of a prompt one: no n_ubatch x n_vocab buffer
    params.n_threads, params.n_threads_batch = plan.threads, plan.threads_batch or plan.threads
    if plan.flash_attn is not None:
        params.flash_attn_type = int(plan.flash_attn)  # llama_flash_attn_type; else -1: automatic
    params.type_k = params.type_v = GGML_TYPE[plan.kv_type]
    params.swa_full = False
    params.op_offload = plan.n_gpu_layers != 0
    params.no_perf = True
    if on_node is not None:
        params.cb_eval = on_node
    if abort is not None:
        params.abort_callback = ctypes.cast(abort[0], low.ggml_abort_callback)
        params.abort_callback_data = ctypes.cast(abort[1], ctypes.c_void_p)
    LOG.lines.clear()
    context = low.llama_init_from_model(model, params)
    if context:
        abi.leave_out_unread(low, context)
        return int(context)
    details = LOG.tail()
    if OUT_OF_MEMORY.search("\n".join(line for _, line in LOG.lines)):
        raise OutOfMemory(
            f"There is not enough memory for a context of {n_ctx:,} tokens.",
            f"Try a shorter one: --ctx {max(512, n_ctx // 2)}",
            details,
        )
    raise LoadFailed(
        f"llama.cpp cannot open a context of {n_ctx:,} tokens for this model.",
        "Run again with -v for its whole log.",
        details,
    )


def schema_to_grammar(schema: str) -> str:
    """A JSON schema as a GBNF grammar.

    Raises:
        BadRequest: not JSON, or a schema that cannot be expressed.
    """
    try:
        return str(abi.import_low_level("llama_grammar").json_schema_to_gbnf(schema))
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError, RuntimeError) as error:
        raise BadRequest(
            f"The JSON schema cannot be used: {error}.", 'It must be a JSON object such as {"type": "object", ...}.'
        ) from error
