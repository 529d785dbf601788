"""How much memory llama.cpp's compute graph needs on each device, from a header alone: an estimate. Pure.

The graph of one ubatch is replayed: each step takes and frees what the same step of llama.cpp's graph does, in the same
order (`steps.py`), through the same allocator (`arena.py`). So where the steps are an architecture's own, the figure is
llama.cpp's; estimated are steps that differ from those here, and devices that keep temporaries of their own.

    compute_bytes(facts, Work(n_ctx=16384), Where.all_on("CPU", len(facts.layers)))  ->  {"CPU": 96_480_256}

Source: llama.cpp 0c1e57098, src/llama-context.cpp (sched_reserve), src/llama-graph.cpp (inputs and masks),
ggml/src/ggml-backend.cpp (ggml_backend_sched_split_graph: what is copied between devices).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Literal, NamedTuple

from moelocal.model.arena import F16, F32, Replay, Tensor
from moelocal.model.facts import DEFAULT_N_UBATCH, NO_FLASH_ATTENTION, LayerFacts, ModelFacts
from moelocal.model.graph import LayerGraph, RecurrentGraph
from moelocal.model.kv import KVType
from moelocal.model.steps import Route, Style, add, add_up, ask_router, attend, experts, feed_forward, recall, recur

CPU = "CPU"
_INDEX_BYTES, _PLACE_BYTES = 4, 8  # a token's number or position; its place in a cache
_ROTATED = 64  # values of a quantized cache at once; of keys, more
# whose last layer computes all tokens; in others only those go through its FFN whose logits are asked for
_ALL_TO_THE_END = ("bailingmoe3", "cohere2moe", "gemma4", "gpt-oss", "hy_v3", "qwen35moe", "qwen3next", "step35")


class Work(NamedTuple):
    """One context: its length, its cache's type, tokens computed at once, tokens whose logits are kept."""

    n_ctx: int
    kv_type: KVType = "f16"
    n_ubatch: int = DEFAULT_N_UBATCH
    n_outputs: int = 1


class Where(NamedTuple):
    """Device names: of each layer, of its routed experts, of the output."""

    layers: tuple[str, ...]
    experts: tuple[str, ...]
    output: str

    @classmethod
    def all_on(cls, device: str, n_layers: int) -> Where:
        """Everything on one device."""
        return cls((device,) * n_layers, (device,) * n_layers, device)


def compute_bytes(facts: ModelFacts, work: Work, where: Where) -> dict[str, int]:
    """Bytes of llama.cpp's compute buffers, by device name; the CPU's is there even when it computes nothing.

    For `n_seq_max=1`, `swa_full=False`, flash attention where llama.cpp can, no pipeline of several GPUs. Not in it:
    copies of experts that a GPU makes to compute long prompts (`op_offload`).
    """
    graph = facts.graph
    replay = Replay(min(work.n_ubatch, work.n_ctx))
    inputs = _Inputs(replay, facts, work, where)
    stream, signs, seen, index = inputs.stream, inputs.signs(), dict[object, int](), 0
    while index < len(graph.layers):
        since = seen.setdefault((stream, inputs.past, replay.state, len(inputs.here)), index)
        index += _repeated(signs, index, index - since)
        stream = _layer(inputs, stream, index)
        index += 1
    stream = replay.move(stream, where.output)
    replay.n_tokens = min(work.n_outputs, replay.n_tokens)
    replay.new(where.output, graph.n_vocab)
    return {device: arena.peak_bytes for device, arena in replay.arenas.items()}


def _repeated(signs: list[object], index: int, period: int) -> int:
    """How many layers from this one on only repeat what the `period` layers before it did: they began in the same state
    as this one, so those that are like them end in it again. The last such period is left, to be replayed."""
    end = index
    while period and end < len(signs) and signs[end] == signs[end - period]:
        end += 1
    return max(0, (end - index) // period - 1) * period if period else 0


def _layer(inputs: _Inputs, stream: Tensor, index: int) -> Tensor:
    """One layer; what it hands on."""
    replay, facts, where = inputs.replay, inputs.facts, inputs.where
    layers = facts.graph.layers
    layer, device, home = layers[index], where.layers[index], where.experts[index]
    stream = replay.move(stream, device)
    inputs.copy_from(index, device)
    if not index:
        inputs.recall(index)
    style = inputs.style(facts.layers[index])
    if layer.attention:
        result = attend(replay, layer.attention, device, style, stream)
    elif layer.recurrent:
        result = recur(replay, layer.recurrent, device, stream, inputs.past)
    else:
        result = replay.like(stream)
    inputs.release(index)
    if not layer.n_experts:
        inputs.recall(index + 1)
    router = ask_router(replay, layer, stream) if layer.before_output == "router" else None
    routed = None
    if layer.before_output == "experts":
        given = experts(replay, layer, home, replay.like(stream), ask_router(replay, layer, stream))
        routed = add_up(replay, layer, given.move(replay, device))
    if layer.attention and not layer.attention.latent and style.is_quantized:
        result = replay.replace(result)  # rotated back
    out = replay.like(stream)
    replay.free(result)
    if index == len(layers) - 1 and facts.graph.arch not in _ALL_TO_THE_END:
        replay.n_tokens = min(inputs.work.n_outputs, replay.n_tokens)
        out, stream = inputs.narrow(out), inputs.narrow(stream)
    stream = add(replay, stream, out, layer.adds_to_input[0])
    stream = feed_forward(replay, layer, inputs.route(index), stream, router)
    if routed:
        replay.free(stream)
        stream = routed
    return stream


_Kind = Literal["states", "positions", "scales", "rotation", "keys", "values", "mask", "outputs"]


class _Input(NamedTuple):
    """An input of the graph; each window's cache has its own."""

    kind: _Kind
    window: int | None = None
    length: int = 0  # of a row of the keys' rotation


def _needs(layer: LayerFacts, steps: LayerGraph, is_quantized: bool) -> list[_Input]:
    """A layer's inputs, in the order in which it asks for them."""
    attention = steps.attention
    if not attention:
        return [_Input("states")] if steps.recurrent else []
    names = [_Input("positions")] if attention.has_rope else []
    if attention.is_scaled:
        names = [_Input("scales")]
    for cache in layer.caches[:1]:
        head = attention.out // max(1, attention.n_head)
        if is_quantized and not attention.latent and head % _ROTATED == 0:
            greatest = head & -head  # power of two in it: keys are rotated by that
            names += [_Input("rotation", cache.window, length) for length in (greatest, 0)]
        kinds: tuple[_Kind, ...] = ("keys", "values", "mask")
        if attention.latent:  # keys hold the values
            kinds = ("keys", "mask")
        names += [_Input(kind, cache.window) for kind in kinds]
    return names


class _Inputs:
    """The graph's inputs: tokens, places of states, positions, and for each window places in the cache and a mask."""

    def __init__(self, replay: Replay, facts: ModelFacts, work: Work, where: Where) -> None:
        graph = facts.graph
        self.replay, self.facts, self.work, self.where = replay, facts, work, where
        self.is_flash = graph.arch not in NO_FLASH_ATTENTION
        self.is_quantized = work.kv_type != "f16"
        self.v = max((layer.attention.v for layer in graph.layers if layer.attention), default=0)
        caches = {cache.window: cache for layer in facts.layers for cache in layer.caches[:1]}
        self.cells = {window: cache.cells(work.n_ctx, work.n_ubatch) for window, cache in caches.items()}
        self.devices = (*where.layers, where.output)
        homes = zip(facts.layers, where.layers, where.experts, strict=True)
        self.homes = [home if layer.n_experts else device for layer, device, home in homes] + [where.output]
        layers = zip(facts.layers, graph.layers, strict=True)
        self.needs = [_needs(layer, steps, self.is_quantized) for layer, steps in layers]
        self.needs.append([])
        self.needs[max(0, len(self.where.layers) - (graph.arch not in _ALL_TO_THE_END))].append(_Input("outputs"))
        places = list(enumerate(zip(self.devices, self.needs, strict=True)))
        self.last = {(device, name): index for index, (device, needs) in places for name in needs}
        self.waiting: dict[_Input, set[str]] = {}  # devices that have yet to get an input, or to use the CPU's
        for device, name in self.last:
            self.waiting.setdefault(name, set()).add(device)
        self.past: Tensor | None = None  # of the next layer's convolution
        tokens = replay.take(CPU, replay.n_tokens * _INDEX_BYTES)
        replay.new(CPU, graph.n_embd)  # the input for tokens that come as embeddings
        self.here = {(CPU, name): replay.take(CPU, self._n_bytes(name)) for name in self.waiting}
        self.stream = replay.new(CPU, graph.n_embd)
        replay.free(tokens)

    def after(self, index: int) -> str:
        """The device that goes on after a layer."""
        return self.devices[index + 1]

    def route(self, index: int) -> Route:
        """Where a layer's experts are, and where it ends."""
        device, scales = self.devices[index], self.facts.graph.layers[index].has_output_scale
        finish = self.after(index) if device == CPU and not scales else device
        gather, is_pulled = partial(self.recall, index + 1), self.ahead(index + 1) is not None
        return Route(self.where.experts[index], finish, partial(self.arrive, index + 1, finish), gather, is_pulled)

    def signs(self) -> list[object]:
        """For each layer what its steps depend on: equal ones do the same."""
        layers = zip(self.facts.layers, self.facts.graph.layers, self.where.layers, self.where.experts, strict=True)
        signs: list[object] = []
        for index, (layer, graph, device, home) in enumerate(layers):
            is_last = index == len(self.where.layers) - 1
            follows = self.after(index), self.ahead(index + 1), tuple(self._ends(index))
            signs.append((graph, layer.caches[:1], bool(layer.n_experts), device, home, follows, is_last))
        return signs

    def _n_bytes(self, name: _Input) -> int:
        n_tokens = self.replay.n_tokens
        if name.kind == "mask":
            return self.cells[name.window] * n_tokens * (F16 if self.is_flash else F32)
        if name.kind == "rotation":
            return (name.length or _ROTATED) ** 2 * F32
        if name.kind in ("states", "outputs"):
            return _INDEX_BYTES * (1 if name.kind == "states" else self.work.n_outputs)
        if name.kind in ("positions", "scales"):
            return n_tokens * _INDEX_BYTES
        is_transposed = name.kind == "values" and not self.is_flash  # an index for each value
        return n_tokens * _PLACE_BYTES * (self.v if is_transposed else 1)

    def copy(self, device: str, names: Iterable[_Input]) -> None:
        """Makes sure that the device has these inputs."""
        for name in names:
            if (device, name) not in self.here:
                self.here[device, name] = self.replay.take(device, self._n_bytes(name))
                self._leave(name, device)

    def release(self, index: int) -> None:
        """Frees what no later layer on a layer's device needs."""
        for name in self._ends(index):
            if self.devices[index] == CPU:
                self._leave(name, CPU)
            else:
                self.replay.free(self.here[self.devices[index], name])

    def _ends(self, index: int) -> list[_Input]:
        return [name for name in self.needs[index] if self.last[self.devices[index], name] == index]

    def _leave(self, name: _Input, device: str) -> None:
        self.waiting[name].discard(device)
        if not self.waiting[name]:
            self.replay.free(self.here[CPU, name])

    def copy_from(self, start: int, device: str) -> None:
        """What a device gets together: for its layers from this one on, until another one computes in between."""
        for index in range(start, len(self.needs)):
            if self.devices[index] != device:
                break
            self.copy(device, self.needs[index])
            if self.homes[index] != device:
                break

    def ahead(self, index: int) -> RecurrentGraph | None:
        """A layer's recurrence, if its past is gathered before its input is finished."""
        steps = self.facts.graph.layers[index].recurrent if index < len(self.where.layers) else None
        return steps if steps and steps.is_ahead else None

    def arrive(self, index: int, device: str, is_end: bool) -> None:
        """What a device gets where a layer ends; before that, only what gathering its successor's past needs."""
        if is_end:
            self.copy_from(index, device)
        elif self.ahead(index):
            self.copy(self.devices[index], self.needs[index])

    def recall(self, index: int) -> None:
        """Gathers what a layer's convolution remembers, if that is done ahead."""
        steps, self.past = self.ahead(index), None
        if steps:
            self.copy(self.devices[index], self.needs[index])
            self.past = recall(self.replay, steps, self.devices[index])

    def narrow(self, tensor: Tensor) -> Tensor:
        """Of a tensor only the tokens that go on."""
        narrowed = self.replay.new(tensor.device, self.facts.graph.n_embd)
        self.replay.free(tensor)
        return narrowed

    def style(self, layer: LayerFacts) -> Style:
        """How a layer attends."""
        n_kv = self.cells[layer.caches[0].window] if layer.caches else 0
        return Style(n_kv, self.is_flash, self.is_quantized, any(self.cells))
