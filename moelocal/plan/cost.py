"""Seconds per token of a placement: facts about the model, the machine's measured speeds and a setting in, a prediction
out. Pure.

    decode  = sum over devices of bytes read per token / bandwidth of (type, repacked, dense or expert)
              + attention: KV bytes / bandwidth, or multiplications / rate
              + what a layer and a token cost beside + hops between devices
              + miss rate * active expert bytes / disk speed
    prefill = per ubatch: weights * tokens / the device's rate, at least the time to read the weights once; for experts
              in RAM beside a GPU: max(the GPU's time, used experts copied over PCIe); + attention; of the last layer's
              FFN only the last token; + what a layer does with each token's activations beside
    load    = bytes / speed of the file, and of repacking

Everything but the misses is a sum over layers: `Costs` computes the share of each kind of layer once, for every device
it could be on, and the planner's search and `predict` add them up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import ne
from typing import Literal, NamedTuple

from moelocal.machine.defaults import default_speeds
from moelocal.machine.hardware import Device, Machine
from moelocal.machine.speeds import DeviceSpeeds, TypeSpeed
from moelocal.model.facts import LayerFacts, ModelFacts
from moelocal.model.ggml_types import GGML_TYPES
from moelocal.model.header import TensorInfo
from moelocal.model.kv import KVType
from moelocal.plan.llama_flags import offload_min_batch
from moelocal.plan.memory import CPU, MemoryUse, Sizes, cache_bytes, placed, ram_left, tally

LoadMode = Literal["mmap", "none"]
_LEAST_HEAD_MACS = 256  # one query against one position takes as long with heads of 64 values as with 128
_PAGEABLE_SHARE = 0.7  # of the PCIe speed, when the source is mapped and not pinned: 36 to 56 % are reported
_BY_NAME = {kind.name: kind for kind in GGML_TYPES.values()}


@dataclass(frozen=True, slots=True)
class Placement:
    """Where each layer lives, by device name (`CPU`, `CUDA0`, `RPC0`): its always-active weights and KV cache in
    `layers`, its routed experts in `experts` (the same as `layers` for a dense layer); the output head in `output`.

    `parts` are exceptions: single expert tensors, as (tensor name, device), of a layer whose others are in `experts`.
    """

    layers: tuple[str, ...]
    experts: tuple[str, ...]
    output: str
    parts: tuple[tuple[str, str], ...] = ()

    def moved(self) -> dict[int, dict[str, str]]:
        """`parts` by layer."""
        layers: dict[int, dict[str, str]] = {}
        for tensor, device in self.parts:
            layers.setdefault(int(tensor.split(".", 2)[1]), {})[tensor] = device
        return layers


@dataclass(frozen=True, slots=True)
class Setting:
    """Everything that the planner chooses together."""

    placement: Placement
    n_ctx: int
    kv_type: KVType
    n_ubatch: int
    threads: int
    repack: bool
    load_mode: LoadMode


class Prediction(NamedTuple):
    """Speeds in tokens per second; seconds to the first token of `n_prompt` tokens; seconds to load."""

    decode_per_s: float
    prefill_per_s: float
    first_token_s: float
    load_s: float


class Correction(NamedTuple):
    """How many times the computed seconds decode and prefill really take; see `calibration.py`."""

    decode: float = 1.0
    prefill: float = 1.0


class Seconds(NamedTuple):
    """Seconds of one token's decode, of the whole prompt, and of the load."""

    decode: float
    prefill: float
    load: float

    def plus(self, other: Seconds) -> Seconds:
        """The sum."""
        return Seconds(self.decode + other.decode, self.prefill + other.prefill, self.load + other.load)

    def corrected(self, by: Correction) -> Seconds:
        """What these seconds turn out to be. The load as decode: on a busy computer it takes longer too, and what was
        measured once must not change what is worth loading for."""
        return Seconds(self.decode * by.decode, self.prefill * by.prefill, self.load * by.decode)


ZERO = Seconds(0.0, 0.0, 0.0)
UNCORRECTED = Correction()
_Share = tuple[tuple[int, str, tuple[str, ...]], int]  # kind of layer, its home, a device per expert tensor; layers


class Work(NamedTuple):
    """How the model runs, beside its placement, and what it is to do: a prompt of `n_prompt` tokens, then decode with
    `n_depth` tokens in the cache."""

    kv_type: KVType
    n_ubatch: int
    threads: int
    repack: bool
    load_mode: LoadMode
    n_prompt: int = 512
    n_depth: int = 0


def predict(
    facts: ModelFacts,
    machine: Machine,
    setting: Setting,
    n_prompt: int = 512,
    n_depth: int = 0,
    correction: Correction = UNCORRECTED,
) -> Prediction:
    """What this setting would give: decode with `n_depth` tokens in the cache, prefill of `n_prompt` tokens.

    RAM that is missing is read from disk: what the model's expert profile says of a cache of that size is missed;
    without a profile experts are drawn uniformly.
    """
    work = Work(
        setting.kv_type, setting.n_ubatch, setting.threads, setting.repack, setting.load_mode, n_prompt, n_depth
    )
    sizes = Sizes.of(facts, setting.n_ctx, setting.kv_type, setting.n_ubatch)
    return prediction(Costs(facts, machine, work).total(setting.placement, sizes).corrected(correction), n_prompt)


def prediction(seconds: Seconds, n_prompt: int) -> Prediction:
    """Seconds as speeds."""
    return Prediction(1 / seconds.decode, n_prompt / seconds.prefill, seconds.prefill, seconds.load)


class Costs:
    """Seconds of every layer on every device, for one way to run. Made once, added up for many placements.

    `correct` says how far the totals are off; the layers' shares are as computed.
    """

    def __init__(
        self,
        facts: ModelFacts,
        machine: Machine,
        work: Work,
        correct: Callable[[Work, Placement], Correction] | None = None,
    ) -> None:
        self.facts, self.machine, self.work = facts, machine, work
        self._correct = correct
        self._n_batches = -(-work.n_prompt // work.n_ubatch)
        self._n_at_once = max(1, work.n_prompt // self._n_batches)
        self._last = facts.layers[-1] if facts.layers else None
        self._devices = {device.name: device for device in machine.devices}
        self._speeds = {name: device_speeds(machine, device) for name, device in self._devices.items()}
        self._disk = machine.disk.read_bytes_per_s or machine.speeds.disk_bytes_per_s
        self._min_batch = offload_min_batch(facts) or 32
        self._dense: dict[tuple[str, int], Seconds] = {}
        self._expert: dict[tuple[str, str, str], Seconds] = {}
        self._output: dict[str, Seconds] = {}
        self._layer: dict[tuple[int, str, tuple[str, ...]], Seconds] = {}
        self.hop = Seconds(machine.speeds.hop_s, machine.speeds.hop_s * self._n_batches, 0.0)

    def dense(self, name: str, layer: LayerFacts) -> Seconds:
        """What every token uses of a layer, and its KV cache, on a device."""
        key = name, layer.index
        if key not in self._dense:
            types = layer.dense_types or (("F16", layer.always_active_bytes),)
            weights = self._weights(name, types)
            if layer is self._last:
                whole = layer.attention_bytes / max(1, layer.always_active_bytes)
                prefill = whole * weights.prefill + (1 - whole) * weights.decode
                weights = weights._replace(prefill=prefill)
            speeds = self._speeds[name]
            values_per_s = speeds.prefill_values_per_s * self._share_of_cores(name)
            values_s = self.work.n_prompt * self.facts.graph.n_embd / values_per_s
            beside = Seconds(speeds.layer_s, speeds.layer_s * self._n_batches + values_s, 0.0)
            self._dense[key] = weights.plus(beside).plus(self._attention(name, layer))
        return self._dense[key]

    def _attention(self, name: str, layer: LayerFacts) -> Seconds:
        """Queries against the cache: read once per token of decode, multiplied with every query in a prompt, which is
        the newest part of the `n_depth` tokens."""
        speeds, work = self._speeds[name], self.work
        held = cache_bytes(layer, work.n_depth, work.kv_type)
        macs = self.facts.attention_macs(layer.index)
        pairs = work.n_prompt * (max(0, work.n_depth - work.n_prompt) + work.n_prompt / 2)
        if layer.kv_window:
            pairs = min(pairs, work.n_prompt * float(layer.kv_window))
        share = self._share_of_cores(name)
        seen = min(work.n_depth, layer.kv_window or work.n_depth)
        decode_macs = self.facts.attention_macs(layer.index, _LEAST_HEAD_MACS)
        by_head = held / speeds.cache_bytes_per_s + decode_macs * seen / speeds.decode_macs_per_s
        decode = max(held / speeds.bandwidth_bytes_per_s, by_head / share)
        return Seconds(decode, macs * pairs / (speeds.prefill_macs_per_s * share), 0.0)

    def output(self, name: str) -> Seconds:
        """The output head and what else a token costs, on a device: computed for one row of a prompt only."""
        if name in self._output:
            return self._output[name]
        types = self.facts.output_types or (("F16", self.facts.output_bytes + self.facts.other_bytes),)
        read = self._weights(name, types)
        token_s = self._speeds[name].token_s
        self._output[name] = Seconds(read.decode + token_s, read.decode + token_s * self._n_batches, read.load)
        return self._output[name]

    def expert(self, home: str, where: str, layer: LayerFacts, tensor: TensorInfo) -> Seconds:
        """One tensor of routed experts in `where`, its layer on `home`, hops not included."""
        key = home, where, tensor.name
        if key not in self._expert:
            share = min(layer.n_experts_used, tensor.shape[-1]) / tensor.shape[-1]
            used = 1 - (1 - share) ** self._n_at_once  # experts that some token of a batch chose, by uniform routing
            kind = GGML_TYPES[tensor.ggml_type].name
            rate = self._rate(where, kind, is_expert=True)
            weights = tensor.n_bytes * share * _per_byte(kind)
            once = weights * self._n_at_once / rate.prefill_weights_per_s
            touched = tensor.n_bytes * used
            once = max(once + touched / rate.batch_bytes_per_s, touched / rate.decode_bytes_per_s)
            if self._is_copied(home, where):
                fast = self._rate(home, kind, is_expert=True)
                copy = tensor.n_bytes * used / self._copy_bytes_per_s()
                once = max(weights * self._n_at_once / fast.prefill_weights_per_s, copy)
            decode = tensor.n_bytes * share / rate.decode_bytes_per_s
            if layer is self._last:  # of a prompt, only the last token's result is wanted
                once = decode / self._n_batches
            self._expert[key] = Seconds(decode, once * self._n_batches, self._load_s(where, kind, tensor.n_bytes))
        return self._expert[key]

    def saved_per_byte(self, name: str, layer: LayerFacts) -> float:
        """Seconds per token that a layer's experts save on a device, per byte, against RAM without repacking."""
        saved = 0.0
        for tensor in layer.expert_tensors:
            kind = GGML_TYPES[tensor.ggml_type].name
            slow = self._rate(CPU, kind, is_expert=True, is_plain=True).decode_bytes_per_s
            fast = self._rate(name, kind, is_expert=True).decode_bytes_per_s
            saved += tensor.n_bytes * (1 / slow - 1 / fast)
        return saved / layer.routed_expert_bytes * layer.n_experts_used / layer.n_experts

    def total(self, placement: Placement, sizes: Sizes, uses: dict[str, MemoryUse] | None = None) -> Seconds:
        """All of it: layers, output, hops, and what has to come from disk again and again. `uses`: the memory that the
        placement takes, if it is known."""
        decode, prefill, load = self.output(placement.output)
        shares = self._shares(placement, sizes)
        for (kind, home, targets), n in shares:
            seconds = self._layer_seconds(kind, home, targets)
            decode, prefill, load = decode + n * seconds[0], prefill + n * seconds[1], load + n * seconds[2]
        # a token comes from the embedding, in RAM
        hops = sum(map(ne, (CPU, *placement.layers), (*placement.layers, placement.output)))
        total = Seconds(decode + self.hop.decode * hops, prefill + self.hop.prefill * hops, load)
        uses = uses or placed(self.facts, self.machine, placement, sizes)
        total = total.plus(self._misses(placement, uses, shares))
        return total if self._correct is None else total.corrected(self._correct(self.work, placement))

    def _shares(self, placement: Placement, sizes: Sizes) -> list[_Share]:
        """Kinds of layers by home and by the device of each expert tensor, and how many layers are so."""
        counts, moved = tally(placement, sizes.kinds), placement.moved()
        shares: list[_Share] = []
        for index, parts in moved.items():
            kind, home, where = sizes.kinds[index], placement.layers[index], placement.experts[index]
            counts[kind, home, where] -= 1
            names = (tensor.name for tensor in self.facts.layers[index].expert_tensors)
            shares.append(((kind, home, tuple(parts.get(name, where) for name in names)), 1))
        for (kind, home, where), n in counts.items():
            shares.append(((kind, home, (where,) * len(self.facts.layers[kind].expert_tensors)), n))
        return shares

    def _layer_seconds(self, kind: int, home: str, targets: tuple[str, ...]) -> Seconds:
        """A layer with its experts, and the two hops when some of them are elsewhere."""
        key = kind, home, targets
        if key not in self._layer:
            layer = self.facts.layers[kind]
            total = self.dense(home, layer)
            for tensor, target in zip(layer.expert_tensors, targets, strict=True):
                total = total.plus(self.expert(home, target, layer, tensor))
            self._layer[key] = total.plus(self.hop).plus(self.hop) if set(targets) - {home} else total
        return self._layer[key]

    def _misses(self, placement: Placement, uses: dict[str, MemoryUse], shares: list[_Share]) -> Seconds:
        left, weights = ram_left(self.machine, uses), uses[CPU].weights_bytes
        if weights <= left:
            return ZERO
        dense = active = union = experts = 0.0
        for (kind, home, targets), n in shares:
            layer = self.facts.layers[kind]
            dense += n * layer.always_active_bytes if home == CPU else 0
            for tensor, target in zip(layer.expert_tensors, targets, strict=True):
                if target == CPU:
                    share = min(layer.n_experts_used, tensor.shape[-1]) / tensor.shape[-1]
                    experts += n * tensor.n_bytes
                    active += n * tensor.n_bytes * share
                    union += n * tensor.n_bytes * (1 - (1 - share) ** self._n_at_once)
        dense += self.facts.output_bytes if placement.output == CPU else 0
        missing_dense = max(0.0, min(dense, dense - left))
        held = min(1.0, max(0.0, left - dense) / experts) if experts else 1.0
        miss_rate = 1 - hit_rate(self.facts, held)
        once = (missing_dense + (1 - held) * union) / self._disk
        decode = (missing_dense + miss_rate * active) / self._disk
        return Seconds(decode, once * self._n_batches, (weights - max(0, left)) / self._disk)

    def _weights(self, name: str, types: tuple[tuple[str, int], ...]) -> Seconds:
        decode = prefill = load = 0.0
        for kind, n_bytes in types:
            rate = self._rate(name, kind, is_expert=False)
            read = n_bytes / rate.decode_bytes_per_s
            once = n_bytes * _per_byte(kind) * self._n_at_once / rate.prefill_weights_per_s
            once += n_bytes / rate.batch_bytes_per_s
            decode += read
            prefill += max(once, read) * self._n_batches
            load += self._load_s(name, kind, n_bytes)
        return Seconds(decode, prefill, load)

    def _rate(self, name: str, kind: str, is_expert: bool, is_plain: bool = False) -> TypeSpeed:
        speeds = self._speeds[name]
        table = speeds.expert if is_expert else speeds.dense
        repacked = self.work.repack and name == CPU and not is_plain
        found = table.get((kind, repacked)) or table.get((kind, False)) or table.get((kind, True)) or _typical(table)
        share = self._share_of_cores(name)
        return TypeSpeed(*(amount * share for amount in found)) if share < 1 else found

    def _share_of_cores(self, name: str) -> float:
        return min(1.0, self.work.threads / self.machine.cpu.cores) if name == CPU else 1.0

    def _is_copied(self, home: str, where: str) -> bool:
        """Whether llama.cpp computes these experts on the GPU, by copying them there for each batch."""
        is_gpu = where == CPU and self._devices[home].kind == "gpu"
        return is_gpu and not self.work.repack and self._n_at_once >= self._min_batch

    def _copy_bytes_per_s(self) -> float:
        share = 1.0 if self.work.load_mode == "none" else _PAGEABLE_SHARE
        return self.machine.speeds.copy_bytes_per_s * share

    def _load_s(self, name: str, kind: str, n_bytes: float) -> float:
        speeds = self.machine.speeds
        if name != CPU:
            return n_bytes / min(speeds.load_bytes_per_s, speeds.copy_bytes_per_s)
        if self.work.repack and (kind, True) in self._speeds[name].dense:
            return n_bytes / speeds.repack_bytes_per_s
        return n_bytes / speeds.load_bytes_per_s * (2 if self.work.load_mode == "none" else 1)


def hit_rate(facts: ModelFacts, held: float) -> float:
    """Share of the chosen experts that are in RAM when it holds this share of all of them."""
    rates = facts.hit_rates
    if not rates:
        return held
    place = held * (len(rates) - 1)
    below = min(int(place), len(rates) - 2)
    return rates[below] + (place - below) * (rates[below + 1] - rates[below])


def device_speeds(machine: Machine, device: Device) -> DeviceSpeeds:
    """What was measured on a device; else what its kind usually does."""
    return machine.speeds.devices.get(device.name) or default_speeds(device, machine.cpu)


def _per_byte(kind: str) -> float:
    """Weights that one byte of a type holds."""
    return _BY_NAME[kind].block_size / _BY_NAME[kind].type_bytes


def _typical(table: dict[tuple[str, bool], TypeSpeed]) -> TypeSpeed:
    """For a type that nobody measured on a device: the slower half's best."""
    return sorted(table.values(), key=lambda rate: rate.decode_bytes_per_s)[(len(table) - 1) // 2]
