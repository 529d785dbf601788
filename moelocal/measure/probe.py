"""Measured speeds of this machine: what llama.cpp's own kernels do here, for each type of weights and each device.

    speeds = probe(machine, progress=bar.update)            # under a minute; Ctrl-C leaves nothing behind

For each type two small models are made, a dense one and one of many experts, and run: decode and prefill, repacked or
not. What models of hardly any weights take, of two depths, is what a token and a layer cost beside the weights, and is
taken off. Prompt batches of 128 and 512 tokens on 4 of 32 experts give each expert 16 and 64 rows; models get 32 (8 of
128) to 64 (8 of 64), and the more rows, the less each costs. The last layer counts for one token of a prompt: llama.cpp
computes only what somebody reads.

Types come by importance; when the time is up, the others get their usual speeds, scaled by what the measured ones did.
The first few, and what is not weights, are read several times, and the mean counts: computers change their speed for
seconds at a time.
"""

from __future__ import annotations

import errno
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from statistics import median

from moelocal.errors import LoadFailed, MoelocalError, OutOfMemory
from moelocal.machine.defaults import default_speeds
from moelocal.machine.hardware import Device, Machine
from moelocal.machine.speeds import UNLIMITED, DeviceSpeeds, Speeds, TypeSpeed
from moelocal.measure.disk import random_read_bytes_per_s, writable_parent
from moelocal.measure.probe_model import (
    FILE_BYTES,
    MAPPED_BYTES,
    N_EMBD,
    N_VOCAB,
    ProbeModel,
    attention_model,
    base_model,
    has_holes,
    probe_model,
    type_bytes,
    write_probe_model,
)
from moelocal.measure.readings import PROMPTS, Attention, Line, Reading, Where, mean, read_attention, read_speed
from moelocal.paths import hub_folder
from moelocal.units import format_bytes

TYPES = (
    "Q4_K", "Q6_K", "MXFP4", "Q8_0", "Q5_K", "F16", "Q4_0", "IQ4_XS", "Q3_K", "IQ3_S", "Q2_K", "IQ4_NL", "Q5_0",
    "IQ2_XS", "BF16",
)  # fmt: skip
_DENSE_TYPES = ("Q4_K", "Q6_K", "Q8_0")  # of the others, experts only: dense weights differ from them alike
BUDGET_S = 48.0  # then one more reading may still be running
_SPACE_BYTES = 400 << 20
_BASE_DEPTHS = (3, 8)
_LEAST_BY_TOKEN = 0.5  # of a long batch's time, likewise
_LEAST_SHARE = 0.2  # of a reading that can be the weights': noise may make the rest look longer than it is
_ATTENTION_WEIGHTS = N_EMBD * 64 * 10  # of a base model's layer: 4 heads of q and output, one of k and v
_FIRST, _OFTEN = 9, 4  # types: of the first pass, and of every pass
_SHARED, _SINGLE = attention_model(2), attention_model(16)
_CPU = "CPU"


@dataclass(slots=True)
class _Found:
    """What was read on one device so far."""

    device: Device
    bases: dict[tuple[bool, int], list[Reading]] = field(default_factory=dict)  # (by expert, layers)
    types: dict[tuple[ProbeModel, bool], list[Reading]] = field(default_factory=dict)  # (model, repacked)
    attention: dict[ProbeModel, list[Attention]] = field(default_factory=dict)
    plain: set[str] = field(default_factory=set)  # types that llama.cpp does not repack here

    def decode_line(self, by_expert: bool) -> Line:
        """Seconds of a decoded token of the base models."""
        few, many = (mean(self.bases[by_expert, depth]).decode_s for depth in _BASE_DEPTHS)
        return _line(few, many)

    def prefill_lines(self, by_expert: bool) -> dict[int, Line]:
        """Seconds of a batch of the base models, by its tokens."""
        few, many = (mean(self.bases[by_expert, depth]).prefill_s for depth in _BASE_DEPTHS)
        return {n: _line(few[n], many[n], n_idle=1) for n in few.keys() & many.keys()}

    def table(self, by_expert: bool) -> dict[tuple[str, bool], TypeSpeed]:
        """Speeds of the types."""
        return {
            (model.kind, repack): _speed(self, model, mean(readings))
            for (model, repack), readings in self.types.items()
            if model.by_expert == by_expert
        }


class _Late(Exception):
    """The time is up."""


def probe(
    machine: Machine,
    progress: Callable[[float], None] | None = None,
    note: Callable[[str], None] | None = None,
    budget_s: float = BUDGET_S,
    types: Sequence[str] = TYPES,
    file_bytes: int = FILE_BYTES,
) -> Speeds:
    """Measures this machine's devices and disk.

    Args:
        progress: called with 0.0 to 1.0.
        note: told in a sentence what was not measured.
        budget_s: when to stop; what is running then is finished.
        types: ggml type names, the most important first.
        file_bytes: of the models made for it: many times a CPU's caches, unless only a test looks.

    Raises:
        KeyboardInterrupt: Ctrl-C; no file is left.
        MoelocalError: no room for the files.
    """
    with _folder() as folder:
        work = _Probe(machine, Path(folder), progress, note or (lambda _: None), time.monotonic() + budget_s)
        try:
            return work.run(types, file_bytes)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise _no_room() from error
            raise


def _folder() -> tempfile.TemporaryDirectory[str]:
    if shutil.disk_usage(tempfile.gettempdir()).free < _SPACE_BYTES:
        raise _no_room()
    return tempfile.TemporaryDirectory(prefix="moelocal-probe-", ignore_cleanup_errors=True)


def _no_room() -> MoelocalError:
    place = tempfile.gettempdir()
    free = format_bytes(shutil.disk_usage(place).free)
    return MoelocalError(
        f"Measuring needs {format_bytes(_SPACE_BYTES)} for a minute, but {place} has {free} free.",
        "Free some space, or use another folder: TMPDIR=FOLDER moelocal doctor --probe",
    )


class _Probe:
    """The measuring of one machine, while it goes on."""

    def __init__(
        self,
        machine: Machine,
        folder: Path,
        progress: Callable[[float], None] | None,
        note: Callable[[str], None],
        deadline: float,
    ) -> None:
        self._machine, self._folder, self._progress, self._note = machine, folder, progress, note
        self._start, self._deadline = time.monotonic(), deadline
        self._found = [_Found(device) for device in machine.devices if device.name == _CPU or device.kind != "cpu"]
        self._speeds = Speeds()
        self._loads: dict[str, list[float]] = {"load_bytes_per_s": [], "repack_bytes_per_s": [], "copy_bytes_per_s": []}
        self._hops: list[float] = []

    def run(self, types: Sequence[str], file_bytes: int) -> Speeds:
        """Everything, in the order of importance."""
        passes = (types[:_FIRST], (*types[:_OFTEN], *types[_FIRST:]), types[:_OFTEN])
        late = set(types)
        self._read_bases()
        self._read_disk()
        try:
            for i, kinds in enumerate(passes):
                if i:
                    self._read_bases()
                for kind in kinds:
                    self._read_type(kind, file_bytes)
                    late.discard(kind)
                self._tell((i + 1) / len(passes))
        except _Late:
            if late:
                names = ", ".join(kind for kind in types if kind in late)
                self._note(f"The time was up before these types were measured: {names}. Their speeds are estimates.")
        devices = {found.device.name: self._device_speeds(found) for found in self._found if found.bases}
        loads = {name: median(values) for name, values in self._loads.items() if values}
        hop_s = median(self._hops) if self._hops else self._speeds.hop_s
        return replace(self._speeds, devices=devices, hop_s=hop_s, **loads)

    def _tell(self, fraction: float) -> None:
        if self._progress is not None:
            elapsed = (time.monotonic() - self._start) / max(0.1, self._deadline - self._start)
            self._progress(min(1.0, max(fraction, elapsed)))

    # -- readings ---------------------------------------------------------------------------------------------------

    def _read(self, model: ProbeModel, where: Where, prompts: tuple[int, ...] = PROMPTS) -> Reading:
        return read_speed(self._path(model), model, where, prompts)

    def _path(self, model: ProbeModel) -> Path:
        """The file of a model, written if it is not the one that is there."""
        path = self._folder / f"{'-'.join(map(str, astuple(model)))}.gguf"
        if not path.exists():
            for old in self._folder.glob("*.gguf"):
                old.unlink()
            write_probe_model(model, path)
        return path

    def _where(self, device: Device, repack: bool = False) -> Where:
        return Where(device.name, device.name, self._machine.cpu.cores, repack)

    def _read_bases(self) -> None:
        """What is not weights, on every device that works; hops."""
        for by_expert in (True, False):
            for n_layers in _BASE_DEPTHS:
                for found in list(self._found):
                    if found.attention:  # not the first time
                        self._check_time()
                    try:
                        reading = self._read_base(found, base_model(by_expert, n_layers))
                    except (LoadFailed, OutOfMemory) as error:
                        if found.device.name == _CPU:
                            raise
                        self._found.remove(found)
                        self._note(f"{found.device.name} could not be measured: {error.message}")
                    else:
                        found.bases.setdefault((by_expert, n_layers), []).append(reading)
                    self._tell(0.0)
        for model in (_SHARED, _SINGLE):
            for found in self._found:
                attention = read_attention(self._path(model), model, self._where(found.device))
                found.attention.setdefault(model, []).append(attention)
                self._tell(0.0)

    def _check_time(self) -> None:
        """Raises _Late when the time is up."""
        if time.monotonic() > self._deadline:
            raise _Late

    def _read_base(self, found: _Found, model: ProbeModel) -> Reading:
        """Of the deeper model with experts hops too: it has more of them against the same noise."""
        reading = self._read(model, self._where(found.device))
        if found.device.kind != "cpu" and model.by_expert and model.n_layers == _BASE_DEPTHS[-1]:
            apart = Where(found.device.name, _CPU, self._machine.cpu.cores)
            more_s = self._read(model, apart, ()).decode_s - reading.decode_s
            self._hops.append(max(1e-6, more_s / (2 * model.n_layers)))
        return reading

    def _read_disk(self) -> None:
        place = writable_parent(hub_folder()) or self._folder
        try:
            speed = random_read_bytes_per_s(place)
        except OSError:
            speed = random_read_bytes_per_s(self._folder)
        if speed is None:
            self._note("This system offers no way to measure the disk past its cache.")
        else:
            self._speeds = replace(self._speeds, disk_bytes_per_s=speed)
        self._tell(0.0)

    def _read_type(self, kind: str, file_bytes: int) -> None:
        for by_expert in (True, False) if kind in _DENSE_TYPES else (True,):
            small = probe_model(kind, by_expert, file_bytes)
            spread = (
                probe_model(kind, by_expert, self._mapped_bytes(file_bytes)) if by_expert and has_holes(kind) else small
            )
            for found in self._found:
                is_cpu = found.device.name == _CPU
                for model, repack in ((spread, False), (small, True)) if is_cpu else ((small, False),):
                    if repack and kind in found.plain:
                        continue
                    self._check_time()
                    reading = self._read(model, self._where(found.device, repack))
                    if reading.decode_s:
                        found.types.setdefault((model, repack), []).append(reading)
                        self._keep_load(found, model, reading)
                    else:
                        found.plain.add(kind)
                    self._tell(0.0)

    def _mapped_bytes(self, file_bytes: int) -> int:
        """Of a model whose experts lie as far apart as a real one's, as far as memory allows."""
        return max(file_bytes, min(MAPPED_BYTES * file_bytes // FILE_BYTES, self._machine.ram_free_bytes // 4))

    def _keep_load(self, found: _Found, model: ProbeModel, reading: Reading) -> None:
        if model.by_expert and has_holes(model.kind):
            return  # the system makes these pages, nothing is read
        base_load_s = mean(found.bases[True, _BASE_DEPTHS[0]]).load_s
        load_s = max(_LEAST_SHARE * reading.load_s, reading.load_s - base_load_s)
        on_cpu = "repack_bytes_per_s" if reading.repacked_bytes else "load_bytes_per_s"
        name = on_cpu if found.device.name == _CPU else "copy_bytes_per_s"
        self._loads[name].append(model.held_bytes / load_s)

    # -- what follows from them -------------------------------------------------------------------------------------

    def _device_speeds(self, found: _Found) -> DeviceSpeeds:
        """Measured types; for the others the usual speeds, scaled alike."""
        usual = default_speeds(found.device, self._machine.cpu)
        experts, dense = found.table(True), found.table(False)
        tables = {True: experts or dense, False: _completed(dense, experts)}
        bandwidth = max(
            (speed.decode_bytes_per_s for speed in tables[False].values()), default=usual.bandwidth_bytes_per_s
        )
        line = found.decode_line(True)
        read_s = _base_layer_bytes() / bandwidth
        cache_bytes_per_s, decode_macs_per_s, prefill_macs_per_s = _attention(found)
        return DeviceSpeeds(
            dense=_completed(tables[False], usual.dense),
            expert=_completed(tables[True], usual.expert),
            layer_s=max(_LEAST_SHARE * line.layer_s, line.layer_s - read_s),
            token_s=max(_LEAST_SHARE * line.fixed_s, line.fixed_s - type_bytes("Q8_0", N_EMBD * N_VOCAB) / bandwidth),
            decode_macs_per_s=decode_macs_per_s,
            prefill_macs_per_s=prefill_macs_per_s,
            prefill_values_per_s=_values_per_s(found, tables[False], prefill_macs_per_s),
            cache_bytes_per_s=cache_bytes_per_s,
            measured=bool(experts or dense),
        )


def _line(few_s: float, many_s: float, n_idle: int = 0) -> Line:
    """Through the readings of the two base models, of which `n_idle` layers hardly work."""
    few, many = (depth - n_idle for depth in _BASE_DEPTHS)
    layer_s = max(0.0, (many_s - few_s) / (many - few))
    return Line(max(0.0, few_s - few * layer_s), layer_s)


def _speed(found: _Found, model: ProbeModel, reading: Reading) -> TypeSpeed:
    """Bytes per second and weights per second, without what is not weights.

    A batch takes what makes the weights ready plus a share for each token: the line through two lengths of it.
    """
    beside = found.decode_line(model.by_expert).at(model.n_layers)
    decode_s = max(_LEAST_SHARE * reading.decode_s, reading.decode_s - beside)
    n_working = model.n_layers - 1
    lines = found.prefill_lines(model.by_expert)
    batches = {
        n: max(_LEAST_SHARE * batch_s, batch_s - lines[n].at(n_working))
        for n, batch_s in reading.prefill_s.items()
        if n in lines
    }
    few, many = min(batches), max(batches)
    token_s = batches[many] / many
    if few < many:
        token_s = min(token_s, max(_LEAST_BY_TOKEN * token_s, (batches[many] - batches[few]) / (many - few)))
    ready_s = batches[many] - many * token_s
    held = model.held_bytes * n_working / model.n_layers
    batch_bytes_per_s = held / ready_s if ready_s > held / UNLIMITED else UNLIMITED
    return TypeSpeed(model.active_bytes / decode_s, model.weights_per_layer * n_working / token_s, batch_bytes_per_s)


def _attention(found: _Found) -> tuple[float, float, float]:
    """Bytes of the cache per second, multiplications per second of one query at a time, and of a prompt's.

    Two models multiply as much, and one has eight times the cache: what it takes longer is reading.
    """
    shared, single = (Attention.mean(found.attention[model]) for model in (_SHARED, _SINGLE))
    byte_s = max(0.0, single.decode_s - shared.decode_s) / (_SINGLE.cache_bytes - _SHARED.cache_bytes)
    macs_s = max(_LEAST_SHARE * shared.decode_s, shared.decode_s - byte_s * _SHARED.cache_bytes)
    macs = _SHARED.attention_macs
    return min(UNLIMITED, 1 / byte_s if byte_s else UNLIMITED), macs / macs_s, macs / shared.prefill_s


def _values_per_s(found: _Found, dense: dict[tuple[str, bool], TypeSpeed], macs_per_s: float) -> float:
    """Values of activations that a layer passes on per second: what the base model's layers take for a prompt, without
    their weights and their attention."""
    n, line = max(found.prefill_lines(True).items())
    layer_s, base = line.layer_s, base_model(True, 1)
    rates = [rate.prefill_weights_per_s for (kind, _), rate in dense.items() if kind == "Q8_0"]
    weights_s = (_ATTENTION_WEIGHTS + base.weights_per_layer) * n / rates[0] if rates else 0.0
    attention_s = base.attention_macs * n * n / 2 / macs_per_s
    beside_s = max(_LEAST_SHARE * layer_s, layer_s - weights_s - attention_s)
    return N_EMBD * n / beside_s if beside_s > 0 else UNLIMITED


def _base_layer_bytes() -> float:
    """Bytes of attention, router and tiny experts that one layer of the base model reads."""
    base = base_model(True, 1)
    attention = type_bytes("Q8_0", _ATTENTION_WEIGHTS)
    return base.active_bytes + attention + type_bytes("F32", N_EMBD * base.n_experts)


def _completed(
    measured: dict[tuple[str, bool], TypeSpeed], usual: dict[tuple[str, bool], TypeSpeed]
) -> dict[tuple[str, bool], TypeSpeed]:
    """The measured speeds, and for types that nobody measured the usual ones, scaled as the measured ones differ."""
    both = measured.keys() & usual.keys()
    if not both:
        return measured or usual
    decode = median(measured[key].decode_bytes_per_s / usual[key].decode_bytes_per_s for key in both)
    prefill = median(measured[key].prefill_weights_per_s / usual[key].prefill_weights_per_s for key in both)
    batch = median(speed.batch_bytes_per_s for speed in measured.values())
    kinds = {kind for kind, _ in measured}
    scaled = {
        key: TypeSpeed(speed.decode_bytes_per_s * decode, speed.prefill_weights_per_s * prefill, batch)
        for key, speed in usual.items()
        if key[0] not in kinds
    }
    return {**scaled, **measured}
