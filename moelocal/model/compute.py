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
from typing import NamedTuple

from moelocal.model.arena import F16, F32, Replay, Tensor
from moelocal.model.facts import DEFAULT_N_UBATCH, NO_FLASH_ATTENTION, LayerFacts, ModelFacts
from moelocal.model.kv import KVType
from moelocal.model.steps import Route, Style, add, add_up, ask_router, attend, experts, feed_forward, recur

CPU = "CPU"
_INDEX_BYTES = 32  # per token: its number, position, and places in the cache


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
    stream = replay.new(CPU, graph.n_embd)
    signs, seen, index = inputs.signs(), dict[object, int](), 0
    while index < len(graph.layers):
        since = seen.setdefault((stream, replay.state, len(inputs.here)), index)
        index += _repeated(signs, index, index - since)
        stream = _layer(inputs, stream, index)
        index += 1
    stream = replay.move(stream, where.output)
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
    inputs.copy_all(device, _masks_from(index, facts, where))
    style = inputs.style(facts.layers[index])
    if layer.attention:
        result = attend(replay, layer.attention, device, style, stream)
    elif layer.recurrent:
        result = recur(replay, layer.recurrent, device, stream)
    else:
        result = replay.like(stream)
    router = ask_router(replay, layer, device) if layer.before_output == "router" else None
    routed = None
    if layer.before_output == "experts":
        given = experts(replay, layer, home, replay.like(stream), ask_router(replay, layer, device))
        routed = add_up(replay, layer, device, given)
    if layer.attention and not layer.attention.latent and style.is_quantized:
        result = replay.replace(result)  # rotated back
    out = replay.like(stream)
    replay.free(result)
    stream = add(replay, stream, out, layer.adds_to_input[0])
    if index == len(layers) - 1:  # only the tokens whose logits are asked for go on
        replay.n_tokens = min(inputs.work.n_outputs, replay.n_tokens)
    after = inputs.after(index)
    finish = after if device == CPU else device
    route = Route(home, finish, partial(inputs.copy_all, finish, _masks_from(index + 1, facts, where)))
    stream = feed_forward(replay, layer, route, stream, router)
    if routed:
        replay.free(stream)
        stream = routed
    return stream


def _masks_from(start: int, facts: ModelFacts, where: Where) -> list[int | None]:
    """Windows of the masks that a device gets together: for its layers from this one on, until another device computes
    something in between."""
    windows: list[int | None] = []
    for index in range(start, len(facts.layers)):
        if where.layers[index] != where.layers[start]:
            break
        windows += [cache.window for cache in facts.layers[index].caches[:1]]
        if facts.layers[index].n_experts and where.experts[index] != where.layers[index]:
            break
    return windows


class _Inputs:
    """The graph's inputs: tokens, positions, cache indices, and one mask of attention for each window."""

    def __init__(self, replay: Replay, facts: ModelFacts, work: Work, where: Where) -> None:
        graph = facts.graph
        self.replay, self.facts, self.work, self.where = replay, facts, work, where
        self.is_flash = graph.arch not in NO_FLASH_ATTENTION
        self.is_quantized = work.kv_type != "f16"
        caches = {cache.window: cache for layer in facts.layers for cache in layer.caches[:1]}
        self.cells = {window: cache.cells(work.n_ctx, work.n_ubatch) for window, cache in caches.items()}
        layers = zip(facts.layers, where.layers, strict=True)
        self.last = {layer.caches[0].window: device for layer, device in layers if layer.caches}
        self.here = {(CPU, window): replay.take(CPU, self._n_bytes(window)) for window in self.cells}
        replay.new(CPU, graph.n_embd)  # the input for tokens that come as embeddings
        replay.take(CPU, replay.n_tokens * _INDEX_BYTES)
        if not self.is_flash:  # values are stored transposed: an index for each
            v = max((layer.attention.v for layer in graph.layers if layer.attention), default=0)
            replay.take(CPU, v * replay.n_tokens * 8)

    def after(self, index: int) -> str:
        """The device that goes on after a layer."""
        return self.where.layers[index + 1] if index + 1 < len(self.where.layers) else self.where.output

    def signs(self) -> list[object]:
        """For each layer what its steps depend on: equal ones do the same."""
        layers = zip(self.facts.layers, self.facts.graph.layers, self.where.layers, self.where.experts, strict=True)
        signs: list[object] = []
        for index, (layer, graph, device, home) in enumerate(layers):
            is_last = index == len(self.where.layers) - 1
            signs.append((graph, layer.caches[:1], bool(layer.n_experts), device, home, self.after(index), is_last))
        return signs

    def _n_bytes(self, window: int | None) -> int:
        return self.cells[window] * self.replay.n_tokens * (F16 if self.is_flash else F32)

    def copy_to(self, device: str, window: int | None) -> None:
        """Makes sure that the device has the mask; the last device that needs it frees the CPU's."""
        if window in self.cells and (device, window) not in self.here:
            self.here[device, window] = self.replay.take(device, self._n_bytes(window))
            if device == self.last[window]:
                self.replay.free(self.here[CPU, window])

    def copy_all(self, device: str, windows: Iterable[int | None]) -> None:
        """The same for several masks."""
        for window in windows:
            self.copy_to(device, window)

    def style(self, layer: LayerFacts) -> Style:
        """How a layer attends."""
        n_kv = self.cells[layer.caches[0].window] if layer.caches else 0
        return Style(n_kv, self.is_flash, self.is_quantized)
