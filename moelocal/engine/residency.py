"""Models larger than RAM: the weights stay in the file and the system's page cache holds experts; what a layer needs is
asked for all at once when its router has chosen, not page by page when it is touched.

    with mapped.lazily(library):                    # the model is mapped, and not read
        model = llama.open_model(...)
    residency = streaming(paths, header, plan)      # reads what every token uses, then experts as long as nobody asks
    llama.open_context(..., residency.callback)

- One token: the missing ones of the chosen experts are requested at the router's node, all in flight together. Those
  that were not used for longest are given back by us, a whole expert at once: cheaper than the kernel's search page by
  page, and exact.
- A prompt: its tokens use almost every expert of a layer once, and such a scan larger than the cache evicts all before
  it comes again. So the next layer's missing experts are read while this one computes, and given back when it is done,
  but for those that RAM has room for, the prompt's favourites first. What was there stays: only what is missing is
  read.

Source: llama.cpp 0c1e57098, src/llama-graph.cpp `build_moe_ffn` (the node's name). Giving back: madvise(2),
MADV_DONTNEED takes pages out of the mapping, posix_fadvise(2), POSIX_FADV_DONTNEED out of the page cache.
"""

from __future__ import annotations

import ctypes
import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from moelocal.engine.expert_cache import Expert, ExpertCache, ResidencyStats, replaced
from moelocal.engine.nodes import I32, NAME_AT, NodeReader, Tensor
from moelocal.engine.pages import Pages, joined
from moelocal.engine.readahead import Piece, ReadAhead, fetch
from moelocal.errors import MoelocalError
from moelocal.machine.memory import read_ram
from moelocal.machine.system import System
from moelocal.model.facts import read_facts
from moelocal.model.header import GGUFHeader
from moelocal.model.slices import Range, always_used, expert_stacks
from moelocal.model.usage import identity, load_usage

if TYPE_CHECKING:
    from moelocal.plan.planner import Plan

_CHOICE = b"ffn_moe_topk-"
_SCAN_COVERAGE = 0.75  # of a layer's experts that a batch should need, from which all are read before it chooses
_LOOK_EVERY = 32  # tokens, then the free memory is looked at again
_LEAST_SPARE_BYTES = 64 << 20  # of free memory, left for what comes and goes
_SPARE_CHOICES = 2  # of a token in one layer, likewise: what is requested comes before what leaves is gone
_WARM_SHARE = 0.9  # of the room that is filled before anything is asked: the context is still being made
_FORGET = 0.8  # of what the system took, as often
_AUTOMATIC = 0.9  # a budget of at least so much of the free memory is the free memory, not a wish


class Residency(NodeReader):
    """Keeps the experts of one model coming. Close it with the model."""

    what = "The choices of the experts"

    def __init__(self, paths: Sequence[Path], header: GGUFHeader, plan: Plan) -> None:
        super().__init__()
        self.stats = ResidencyStats()
        self._plan = plan
        self._ahead = ReadAhead(paths)
        self._pages = Pages(paths, self._ahead)
        self._always = [one for ranges in _layers_first(always_used(header)) for one in ranges]
        stacks = {layer: found for layer, found in expert_stacks(header).items() if _is_in_ram(plan, layer)}
        self._order = list(stacks)
        self._ranges: dict[int, list[list[Range]]] = {
            layer: [[stack.expert(index) for stack in found] for index in range(found[0].n_experts)]
            for layer, found in stacks.items()
        }
        self._bytes = {layer: sum(stack.expert_bytes for stack in found) for layer, found in stacks.items()}
        self._pieces: dict[int, list[list[tuple[Piece, ...]]]] = {
            layer: [[self._ahead.pieces(*one) for one in ranges] for ranges in experts]
            for layer, experts in self._ranges.items()
        }
        n_used = max((one.n_experts_used for one in read_facts(header).layers), default=0)
        chosen_bytes = n_used * max(self._bytes.values(), default=0)
        self._spare_bytes = max(_LEAST_SPARE_BYTES, _SPARE_CHOICES * chosen_bytes)
        self._cache = ExpertCache(self._bytes)
        self._lock = threading.Lock()  # of the cache and of `_passing`
        self._passing: dict[int, list[int]] = {}  # by layer, experts read for the batch that runs
        self._blind: dict[int, list[int]] = {}  # by layer, experts that were read for no other reason than free memory
        self._coming: dict[int, threading.Event] = {}  # layers of it that are read before they chose; set: are there
        self._most_bytes, self._locked_bytes = 0, 0
        self._taken_bytes = 0  # by the system, of late: it holds other things dearer than ours
        self._ram = next((use for use in plan.per_device if use.kind == "cpu"), None)
        self._to_come_bytes = self._ram.kv_bytes + self._ram.compute_bytes if self._ram else 0  # of the context
        self._middles: dict[int, list[int | None]] = {}  # a page inside of each expert's last tensor
        self._is_asked = False
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="residency", daemon=True)

    # -- life -------------------------------------------------------------------------------------------------------

    def start(self, hottest: Callable[[int], Sequence[int]] | None = None) -> None:
        """After the load: reads what every token uses, and locks it as far as the system allows; from then on experts
        until the first batch comes. `hottest`: a layer's experts, the most used first, if that is known."""
        for layer, experts in self._ranges.items():
            self._middles[layer] = [self._pages.address(ranges[-1], 0.5) for ranges in experts]
        if self._pages.is_mapped:  # what is not mapped any more went to a GPU
            self._always = [one for one in self._always if self._pages.address(one) is not None]
        for one in self._always:
            fetch(self._ahead.pieces(*one))
        for one in self._always:
            if not self._pages.lock(one):
                break  # what is not locked stays by being used for every token
            self._locked_bytes += one.n_bytes
        self._limit()
        self._pages.use_blocks(run for experts in self._ranges.values() for run in joined(chain(*experts)))
        self._thread.start()
        self._jobs.put(lambda: self._warm(hottest))

    def close(self) -> None:
        """Ends the thread, closes the files."""
        self._is_asked = True
        if self._thread.is_alive():
            self._jobs.put(None)
            self._thread.join()
        self._pages.close()
        self._ahead.close()

    def _limit(self) -> None:
        """How many bytes of experts RAM may hold now: what is free, and no more than the plan's budget."""
        free = read_ram(System()).free_bytes
        always = sum(one.n_bytes for one in self._always)
        if not self._most_bytes:
            wished = self._ram is not None and self._ram.budget_bytes < _AUTOMATIC * free
            self._most_bytes = max(1, self._ram.weights_bytes - always) if self._ram and wished else 1 << 62
        spare = self._spare_bytes + self._to_come_bytes + self._taken_bytes + always - self._locked_bytes
        self._taken_bytes = int(self._taken_bytes * _FORGET)
        self._cache.room_bytes = min(self._most_bytes, max(0, free - spare))

    def _warm(self, hottest: Callable[[int], Sequence[int]] | None) -> None:
        """Fills the room, every layer alike."""
        total = sum(size * len(self._ranges[layer]) for layer, size in self._bytes.items())
        share = min(1.0, _WARM_SHARE * self._cache.room_bytes / max(1, total))
        for layer in self._order:
            n = int(share * len(self._ranges[layer]))
            for index in list(hottest(layer) if hottest else range(n))[:n]:
                if self._is_asked:
                    return
                fetch(piece for pieces in self._pieces[layer][index] for piece in pieces)
                last = self._ranges[layer][index][-1]
                self._ahead.wait(last.shard, last.offset + last.n_bytes - 1)  # a prompt waits for one expert only
                with self._lock:
                    self._cache.admit(layer, (index,))
                    if hottest is None:
                        self._blind.setdefault(layer, []).append(index)

    @property
    def held_bytes(self) -> int:
        """Experts in RAM, as far as is known."""
        return self._cache.held_bytes

    # -- llama.cpp's nodes ------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Nothing is collected."""

    def _wants(self, pointer: int) -> bool:
        return ctypes.string_at(pointer + NAME_AT, len(_CHOICE)) == _CHOICE

    def _take(self, pointer: int) -> None:
        layer = int(ctypes.string_at(pointer + NAME_AT + len(_CHOICE)))
        experts = self._pieces.get(layer)
        if experts is None:
            return
        self._is_asked = True
        tensor = Tensor.from_address(pointer)
        n_used, n_tokens, stride = tensor.ne[0], tensor.ne[1], tensor.nb[1] // 4
        if tensor.type != I32:
            raise TypeError("the choice of experts is no int32")
        if self._plan.lossy_misses and n_tokens == 1 and stride == len(experts):
            self._replace(layer, tensor)
        ids = memoryview(self._read(pointer)).cast("B").cast("i")
        chosen = Counter(index for at in range(0, n_tokens * stride, stride) for index in ids[at : at + n_used])
        if 1 - (1 - n_used / len(experts)) ** n_tokens >= _SCAN_COVERAGE:
            self._scan(layer, chosen, n_tokens)
        else:
            self._step(layer, chosen, n_tokens)

    def _replace(self, layer: int, tensor: Tensor) -> None:
        """LOSSY, if asked for: lets experts in RAM stand in for missing ones, in the node itself: the first part of
        the row of all experts as the router sorted them."""
        if self._plan.placement is not None and self._plan.placement.layers[layer] != "CPU":
            return  # the node is in a GPU's memory
        order = (ctypes.c_int32 * len(self._ranges[layer])).from_address(tensor.data)
        with self._lock:
            missing = frozenset(self._missing(layer, order[: 2 * tensor.ne[0]]))
        instead = replaced(order[:], tensor.ne[0], missing, self._plan.lossy_misses)
        n_new = len(set(instead) - set(order[: tensor.ne[0]]))
        for place, index in enumerate(instead):
            order[place] = index
        self.stats = self.stats._replace(n_replaced=self.stats.n_replaced + n_new)

    def _step(self, layer: int, chosen: Counter[int], n_tokens: int) -> None:
        """One token, or a few: what is missing is requested now."""
        with self._lock:
            self._cache.now += n_tokens if layer == self._order[0] else 0
            missing = self._missing(layer, sorted(chosen))
            self._cache.use(layer, chosen, n_tokens)
        self._request(layer, missing)
        with self._lock:
            self._cache.admit(layer, missing)
            gone = self._cache.overflow({(layer, index) for index in chosen})
        if gone:
            self._jobs.put(lambda: self._give_back(gone))
        if self._passing:
            self._jobs.put(self._end_scan)
        one = self.stats
        n_done = one.n_tokens + (n_tokens if layer == self._order[0] else 0)
        if layer == self._order[0] and n_done % _LOOK_EVERY == 0:
            self._limit()
        self.stats = one._replace(
            n_tokens=n_done,
            n_hits=one.n_hits + len(chosen) - len(missing),
            n_misses=one.n_misses + len(missing),
            n_bytes=one.n_bytes + len(missing) * self._bytes[layer],
        )

    def _scan(self, layer: int, chosen: Counter[int], n_tokens: int) -> None:
        """A prompt's batch has come to this layer."""
        at = self._order.index(layer)
        if at == 0:
            left_over = list(self._passing)  # of a prompt that was stopped
            self._cache.now += n_tokens
            self._coming.clear()
            self._jobs.put(lambda: self._begin_scan(left_over))
        coming = self._coming.pop(layer, None)
        if coming is None:
            self._request(layer, self._pass(layer, chosen))
        before, after = self._order[max(0, at - 1) : at], self._order[at + 1 : at + 2]
        if self._plan.n_outputs == 1 and after == self._order[-1:]:
            after = []  # the last layer computes the last token only, and asks for its experts itself

        def next_one() -> None:
            self._keep(layer, chosen, n_tokens)
            for done in before:
                self._let_pass(done)
            for ahead, is_there in expected.items():
                self._read_runs(ahead, self._pass(ahead, range(len(self._pieces[ahead]))))
                is_there.set()

        expected = {ahead: threading.Event() for ahead in after}
        self._coming.update(expected)
        self._jobs.put(next_one)
        while coming is not None and self._pages.in_blocks and self._thread.is_alive() and not coming.wait(0.1):
            pass  # what is touched before its block has come is read page by page

    def _missing(self, layer: int, experts: Iterable[int]) -> list[int]:
        """Those that are not held. What the system took away meanwhile is one of them, and tells that there is less
        room than there seemed."""
        missing = []
        for index in experts:
            if (layer, index) not in self._cache:
                missing.append(index)
            elif not self._is_cached(layer, index):
                missing.append(index)
                self._cache.forget(layer, index)
                self._cache.room_bytes -= self._bytes[layer]
                self._taken_bytes += self._bytes[layer]
        return missing

    def _request(self, layer: int, experts: Iterable[int]) -> None:
        """Has experts read, in the order in which llama.cpp multiplies them."""
        pieces = self._pieces[layer]
        experts = tuple(experts)
        for which in range(len(pieces[0])):
            for index in experts:
                fetch(pieces[index][which])

    # -- the thread beside ------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception as error:  # the model is then mapped plainly
                self._failure = error
                self._pages.close()
                return

    def _pass(self, layer: int, experts: Iterable[int]) -> list[int]:
        """What is missing for the batch that runs, to be read now."""
        with self._lock:
            missing = self._missing(layer, sorted(experts))
            self._passing[layer] = missing
        return missing

    def _read_runs(self, layer: int, experts: Sequence[int]) -> None:
        """Reads experts in the order in which llama.cpp multiplies them, neighbours together."""
        ranges = self._ranges[layer]
        for which in range(len(ranges[0])):
            for run in joined(ranges[index][which] for index in experts):
                self._pages.read(run)

    def _keep(self, layer: int, chosen: Counter[int], n_tokens: int) -> None:
        """Lets experts that were read for this batch stay as far as there is room, the most chosen first; what is left
        of the room is shared with the layers to come."""
        with self._lock:
            to_come = self._order[self._order.index(layer) :]
            self._cache.use(layer, chosen, n_tokens)
            total = sum(self._bytes[one] * len(self._ranges[one]) for one in to_come)
            n = int(self._cache.free_bytes * len(self._ranges[layer]) / total) if self._cache.free_bytes > 0 else 0
            blind = [index for index in self._blind.pop(layer, ()) if (layer, index) in self._cache]
            for index in blind:
                self._cache.forget(layer, index)
            here = sorted({*blind, *self._passing.get(layer, ())}, key=lambda index: -chosen[index])
            n += len(blind)
            self._cache.admit(layer, here[:n])
            self._passing[layer] = here[n:]

    def _let_pass(self, layer: int) -> None:
        with self._lock:
            passed = self._passing.pop(layer, [])
        self._give_back([(layer, index) for index in passed])

    def _begin_scan(self, left_over: Sequence[int]) -> None:
        """Makes room for what passes through: of two layers the part that does not stay."""
        for layer in left_over:
            if layer != self._order[0]:  # whose experts are being requested anew
                self._let_pass(layer)
        if self._ram is not None and self._to_come_bytes > self._ram.compute_bytes:  # the first: the KV cache is there
            self._to_come_bytes = self._ram.compute_bytes
        self._limit()
        whole = {layer: size * len(self._ranges[layer]) for layer, size in self._bytes.items()}
        with self._lock:
            share = max(0.0, 1 - self._cache.room_bytes / max(1, sum(whole.values())))
            self._cache.room_bytes -= int(2 * max(whole.values()) * share)
            gone = self._cache.overflow()
        self._give_back(gone)

    def _end_scan(self) -> None:
        for layer in list(self._passing):
            self._let_pass(layer)
        self._to_come_bytes = 0
        self._limit()

    def _give_back(self, experts: Iterable[Expert]) -> None:
        """Frees the memory of experts that are not held any more."""
        gone = [one for one in experts if one not in self._cache]  # others are wanted again since
        for run in joined(part for layer, index in gone for part in self._ranges[layer][index]):
            self._pages.free(run)

    def _is_cached(self, layer: int, index: int) -> bool:
        """Whether an expert's last tensor is still in memory, by its middle."""
        middle = self._middles[layer][index]
        return middle is None or self._pages.is_cached(middle)


def streaming(paths: Sequence[Path], header: GGUFHeader, plan: Plan) -> Residency | None:
    """The residency of a model that was just loaded, at work; None where the system cannot be asked to read ahead."""
    if not ReadAhead.is_possible():
        return None
    residency = Residency(paths, header, plan)
    residency.start(_hottest_first(header, paths))
    return residency


def _hottest_first(header: GGUFHeader, paths: Sequence[Path]) -> Callable[[int], Sequence[int]] | None:
    """A layer's experts, the most used first, as `moelocal experts` saw them; None if it never looked."""
    try:
        usage = load_usage(identity(header, paths))
    except MoelocalError:
        return None
    if usage is None:
        return None
    ranked = {one.layer: sorted(range(len(one.counts)), key=lambda index: -one.counts[index]) for one in usage.layers}
    return lambda layer: ranked.get(layer, ())


def _layers_first(always: dict[int | None, tuple[Range, ...]]) -> list[tuple[Range, ...]]:
    """In the order in which a batch needs them: the output comes last."""
    return [always[layer] for layer in sorted(always, key=lambda layer: 1 << 30 if layer is None else layer)]


def _is_in_ram(plan: Plan, layer: int) -> bool:
    """Whether a layer's experts are the CPU's."""
    return plan.placement is None or (layer < len(plan.placement.experts) and plan.placement.experts[layer] == "CPU")
