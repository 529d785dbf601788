"""Where everything goes and how it runs. Facts about the model and the machine come in, a `Plan` comes out; pure.

    plan = make_plan(facts, machine, PlanRequest(objective="chat"))

Placement (`search.py`), KV type, ubatch, repacking and load mode are chosen together: every combination that fits the
budgets (`request.py`) gets its seconds for a typical turn (`cost.py`), and the fastest is the plan. The context starts
from what the objective needs and grows where that moves nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from moelocal.errors import BadRequest, OutOfMemory
from moelocal.machine.hardware import Device, Machine
from moelocal.model.compute import Where
from moelocal.model.compute import Work as GraphWork
from moelocal.model.facts import ModelFacts
from moelocal.model.kv import KVType
from moelocal.plan.cost import Costs, LoadMode, Placement, Prediction, Seconds, Setting, Work, prediction
from moelocal.plan.llama_flags import flags_of, llama_args
from moelocal.plan.memory import CPU, PROGRAM_BYTES, MemoryUse, Sizes, graph_bytes, placed, ram_left
from moelocal.plan.refusals import check_gpu_budgets, check_ram_for_always_used, too_little
from moelocal.plan.request import N_UBATCH, PlanRequest, Turn, bounded, turn_of
from moelocal.plan.search import BETTER, Room, Search

if TYPE_CHECKING:
    from moelocal.plan.calibration import Calibration

__all__ = ["MemoryUse", "Plan", "PlanRequest", "make_plan"]

_LEAST_N_CTX = 512
_GROWTH = 4  # a context that was not asked for grows up to so many times where there is room
_N_UBATCHES = (512, 1024, 2048)
_KV_PENALTY = {"f16": 1.0, "q8_0": 1.1, "q4_0": 1.3}  # a coarser cache must make the turn so much shorter
_CPU_MODES: tuple[tuple[bool, LoadMode], ...] = ((True, "mmap"), (False, "mmap"))
_GPU_MODES: tuple[tuple[bool, LoadMode], ...] = ((False, "mmap"), (False, "none"), (True, "mmap"))


class Alternative(NamedTuple):
    """What one step away from the plan would give: tokens per second, and bytes in all."""

    change: str
    decode_per_s: float
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """How to load and run one model. `n_ctx` tokens of context, grown for a longer prompt when `n_ctx_chosen`.

    `placement` says where everything lives; without one, `n_gpu_layers` go to llama.cpp's own choice of devices.
    `no_host`: weights in RAM do not use a GPU's pinned memory (so they can be repacked). `disk_bytes` of weights are
    more than RAM holds. `overrides` are tensor patterns and their devices; `workers` the machine's devices elsewhere,
    and their buffers' names with the address. `threads_batch` and `flash_attn` as in the request.
    """

    n_ctx: int
    kv_type: KVType
    n_ubatch: int
    threads: int
    n_gpu_layers: int
    repack: bool
    load_mode: LoadMode
    per_device: tuple[MemoryUse, ...] = ()
    n_ctx_chosen: bool = False
    placement: Placement | None = None
    no_host: bool = False
    reasons: tuple[str, ...] = ()
    disk_bytes: int = 0
    predicted: Prediction | None = None
    measured: Prediction | None = None
    alternatives: tuple[Alternative, ...] = ()
    n_outputs: int = 1  # tokens of a batch whose logits are kept
    experts_used: int | None = None  # per token, instead of the model's own number
    overrides: tuple[tuple[str, str], ...] = ()
    workers: tuple[tuple[str, str], ...] = ()
    threads_batch: int | None = None
    flash_attn: bool | None = None
    lossy_misses: int = 0  # of a token and layer, experts on the disk for which others in RAM may stand in

    @property
    def fits(self) -> bool:
        """Whether all weights stay in memory."""
        return self.disk_bytes == 0 and all(use.total_bytes <= use.budget_bytes for use in self.per_device)

    @property
    def total_bytes(self) -> int:
        """Bytes on all devices, and those that stay on the disk."""
        return self.disk_bytes + sum(use.total_bytes for use in self.per_device)

    @property
    def ram_bytes(self) -> int | None:
        """How much RAM it may use; None if it was not planned."""
        return next((use.budget_bytes for use in self.per_device if use.name == CPU), None)

    @property
    def weights(self) -> tuple[Any, ...]:
        """Equal for plans that load the weights alike, into the same places."""
        return self.placement, self.n_gpu_layers, self.repack, self.load_mode, self.no_host

    @property
    def context(self) -> tuple[Any, ...]:
        """Equal for plans of one way to load whose contexts are alike, whatever their threads."""
        return self.weights, self.n_ctx, self.kv_type, self.n_ubatch, self.flash_attn, self.n_outputs

    @property
    def setting(self) -> Setting | None:
        """What the cost model and llama.cpp's flags need of it."""
        if self.placement is None:
            return None
        return Setting(
            self.placement, self.n_ctx, self.kv_type, self.n_ubatch, self.threads, self.repack, self.load_mode
        )

    def _tuned_args(self) -> list[str]:
        """llama.cpp's flags for what only measuring tells."""
        args = ["-tb", str(self.threads_batch)] if self.threads_batch else []
        return args if self.flash_attn is None else [*args, "-fa", "on" if self.flash_attn else "off"]

    def expert_layers(self, facts: ModelFacts) -> dict[str, list[int]]:
        """Layers with routed experts, by the device that holds them; a layer in parts counts where most of it is."""
        held: dict[str, list[int]] = {use.name: [] for use in self.per_device}
        if self.placement is not None:
            for layer, name in zip(facts.layers, self.placement.experts, strict=True):
                if layer.expert_tensors:
                    held.setdefault(name, []).append(layer.index)
        return held

    def as_json(self, facts: ModelFacts) -> dict[str, Any]:
        """The plan as `plan --json` and `run --json` print it."""
        setting = self.setting
        return {
            "model": {
                "name": facts.name,
                "arch": facts.arch,
                "file_bytes": facts.file_bytes,
                "n_layers": len(facts.layers),
                "n_experts": facts.n_experts,
                "n_experts_used": facts.n_experts_used,
                "total_params": facts.total_params,
                "active_params": facts.active_params,
            },
            "fits": self.fits,
            "n_ctx": self.n_ctx,
            "kv_type": self.kv_type,
            "n_ubatch": self.n_ubatch,
            "threads": self.threads,
            "repack": self.repack,
            "load_mode": self.load_mode,
            "devices": [
                {
                    "name": use.name,
                    "kind": use.kind,
                    "weights_bytes": use.weights_bytes,
                    "kv_bytes": use.kv_bytes,
                    "compute_bytes": use.compute_bytes,
                    "total_bytes": use.total_bytes,
                    "budget_bytes": use.budget_bytes,
                }
                for use in self.per_device
            ],
            "disk_bytes": self.disk_bytes,
            "expert_layers": self.expert_layers(facts),
            "overrides": [{"pattern": pattern, "device": name} for pattern, name in self.overrides],
            "llama_args": [] if setting is None else [*llama_args(setting, dict(self.workers)), *self._tuned_args()],
            "predicted": _speeds_json(self.predicted),
            "measured": _speeds_json(self.measured),
            "reasons": list(self.reasons),
            "alternatives": [
                {"change": one.change, "decode_per_s": one.decode_per_s, "total_bytes": one.total_bytes}
                for one in self.alternatives
            ],
        }


def _speeds_json(speeds: Prediction | None) -> dict[str, float] | None:
    if speeds is None:
        return None
    return {
        "decode_per_s": round(speeds.decode_per_s, 2),
        "prefill_per_s": round(speeds.prefill_per_s, 2),
        "first_token_s": round(speeds.first_token_s, 4),
    }


class Trial(NamedTuple):
    """One complete setting that fits, the memory it takes, and its seconds."""

    setting: Setting
    uses: dict[str, MemoryUse]
    seconds: Seconds
    turn_s: float


def make_plan(facts: ModelFacts, machine: Machine, request: PlanRequest, history: Calibration | None = None) -> Plan:
    """Chooses how to run a model on a machine. `history`: what was measured when it ran there.

    Raises:
        BadRequest: a setting that this model cannot have, or a device that is not there.
        OutOfMemory: a budget is below the minimum; the hint names what fits.
    """
    from moelocal.plan.reasons import explain

    if request.kv_type and not facts.fits_kv_type(request.kv_type):
        raise BadRequest(f"{facts.name} cannot keep its KV cache as {request.kv_type}.", "Leave --kv-type out.")
    here, turn = bounded(machine, request), turn_of(request)
    if request.n_outputs > 1:  # llama.cpp keeps their logits in RAM, beside what it computes with
        logits_bytes = 4 * request.n_outputs * facts.n_vocab
        here = replace(here, ram_free_bytes=max(0, here.ram_free_bytes - logits_bytes))
    try:
        best = _grown(facts, here, request, turn, _chosen(facts, here, request, turn, history))
    except OutOfMemory:
        if not request.tuned:
            raise
        return make_plan(facts, machine, request.untuned(), history)  # there was more memory when it was tuned
    setting, left = best.setting, ram_left(here, best.uses)
    kept = min(best.uses[CPU].weights_bytes, max(0, left))
    disk_bytes = best.uses[CPU].weights_bytes - kept
    if disk_bytes:
        check_ram_for_always_used(facts, setting.placement, left)
    uses = best.uses | {CPU: replace(best.uses[CPU], weights_bytes=kept)}
    uses = _sharpened(facts, setting, uses, request.n_outputs)
    flags = flags_of(setting.placement)
    reasons = [*explain(facts, here, request, setting, uses, disk_bytes)]
    if history:
        reasons += history.sentences(setting, turn.n_prompt, min(turn.n_depth, setting.n_ctx))
    return Plan(
        n_ctx=setting.n_ctx,
        kv_type=setting.kv_type,
        n_ubatch=setting.n_ubatch,
        threads=setting.threads,
        n_gpu_layers=flags.n_gpu_layers,
        repack=setting.repack,
        load_mode=setting.load_mode,
        per_device=tuple(sorted(uses.values(), key=lambda use: use.name == CPU)),
        n_ctx_chosen=request.n_ctx is None,
        placement=setting.placement,
        no_host=setting.repack and bool(flags.devices),
        reasons=tuple(reasons),
        disk_bytes=disk_bytes,
        n_outputs=request.n_outputs,
        experts_used=request.experts_used,
        predicted=prediction(best.seconds, turn.n_prompt),
        measured=history.measured(setting) if history else None,
        overrides=flags.overrides,
        threads_batch=request.threads_batch,
        flash_attn=request.flash_attn,
        lossy_misses=request.lossy_misses if disk_bytes else 0,
        workers=tuple((device.name, device.buffer_name) for device in here.devices if device.kind == "rpc"),
    )


def _chosen(facts: ModelFacts, here: Machine, request: PlanRequest, turn: Turn, history: Calibration | None) -> Trial:
    """The fastest setting at the context asked for; else at the objective's, or the longest shorter one that fits."""
    n_ctx = request.n_ctx or max(1, min(turn.n_ctx, facts.n_ctx_train or turn.n_ctx))
    wanted = n_ctx
    check_gpu_budgets(facts, here, request, n_ctx)
    while True:
        trials = list(_trials(facts, here, request, turn, n_ctx, history))
        if trials:
            return min(trials, key=lambda trial: trial.turn_s * _KV_PENALTY[trial.setting.kv_type])
        if request.n_ctx is not None or n_ctx // 2 < _LEAST_N_CTX:
            raise too_little(facts, here, request, wanted)
        n_ctx //= 2


def _trials(
    facts: ModelFacts, here: Machine, request: PlanRequest, turn: Turn, n_ctx: int, history: Calibration | None
) -> Iterator[Trial]:
    """Settings that fit. Where the GPUs hold everything, there is nothing to weigh."""
    correct = history.correction if history else None
    kv_types: tuple[KVType, ...] = (request.kv_type or "f16",)
    if request.kv_type is None and here.gpus and facts.fits_kv_type("q8_0"):
        kv_types = ("f16", "q8_0")
    is_copied = bool(here.gpus) or facts.file_bytes > here.ram_free_bytes  # experts, once for each batch of a prompt
    n_ubatches = (request.n_ubatch,) if request.n_ubatch else _N_UBATCHES if is_copied else (N_UBATCH,)
    for kv_type in kv_types:
        for n_ubatch in n_ubatches:
            n_ubatch = min(n_ubatch, n_ctx)
            sizes = Sizes.of(facts, n_ctx, kv_type, n_ubatch, request.n_outputs)
            searches: list[Search] = []
            found: list[Trial] = []
            for repack, load_mode in _GPU_MODES if here.gpus else _CPU_MODES:
                if request.repack not in (None, repack):
                    continue
                threads = request.threads or here.cpu.cores
                work = Work(kv_type, n_ubatch, threads, repack, load_mode, turn.n_prompt, min(turn.n_depth, n_ctx))
                n_away = request.experts_on_cpu if here.gpus else None
                costs = Costs(facts, here, work, correct)
                searches.append(Search(costs, sizes, _rooms(here, sizes), turn.seconds, n_away))
                trial = _best(searches[-1], searches[-1].candidates(), turn, n_ctx)
                if trial is None:
                    continue
                found.append(trial)
                yield trial
                if not ({*trial.setting.placement.layers, *trial.setting.placement.experts} & {CPU}):
                    return
            # what is best when weights are copied may be better mapped, and the other way round
            placements = tuple(dict.fromkeys(trial.setting.placement for trial in found))
            for search in searches if len(placements) > 1 else ():
                yield from filter(None, [_best(search, placements, turn, n_ctx)])


def _best(search: Search, placements: Iterable[Placement], turn: Turn, n_ctx: int) -> Trial | None:
    """The fastest of these placements that fits."""
    here, work = search.costs.machine, search.costs.work
    best: Trial | None = None
    for placement in placements:
        if search.n_away is not None and not set(placement.layers) - {CPU}:
            continue
        uses, seconds = search.weighed(placement)
        if not _fits(here, uses, copied=work.repack or work.load_mode == "none"):
            continue
        if best is None or turn.seconds(seconds) < best.turn_s * BETTER:
            setting = Setting(placement, n_ctx, work.kv_type, work.n_ubatch, work.threads, work.repack, work.load_mode)
            best = Trial(setting, uses, seconds, turn.seconds(seconds))
    return best


def _rooms(here: Machine, sizes: Sizes) -> tuple[Room, ...]:
    def room(device: Device) -> int:
        free = device.free_bytes
        if device.shares_ram:
            free = min(free, here.ram_free_bytes - sizes.ram_compute - PROGRAM_BYTES)
        return free - sizes.compute

    return tuple(
        Room(device.name, room(device), sizes.stage if device.kind == "gpu" else 0)
        for device in here.gpus
        if room(device) > 0
    )


def _fits(here: Machine, uses: dict[str, MemoryUse], copied: bool) -> bool:
    """Whether every device holds its share. Mapped weights may stay on disk, copies may not."""
    left = ram_left(here, uses)
    in_ram = uses[CPU].weights_bytes <= left if copied else left >= 0
    return in_ram and all(use.total_bytes <= use.budget_bytes for name, use in uses.items() if name != CPU)


def _grown(facts: ModelFacts, here: Machine, request: PlanRequest, turn: Turn, best: Trial) -> Trial:
    """The same with a longer context, where that moves nothing. RAM alone grows when a prompt needs it."""
    setting = best.setting
    most = min(facts.n_ctx_train or setting.n_ctx, _GROWTH * turn.n_ctx)
    if request.n_ctx is not None or not set(setting.placement.layers) - {CPU}:
        return best
    copied = setting.repack or setting.load_mode == "none"
    n_ctx = setting.n_ctx
    while (n_ctx := min(most, n_ctx * 2)) > setting.n_ctx:
        sizes = Sizes.of(facts, n_ctx, setting.kv_type, setting.n_ubatch, request.n_outputs)
        uses = placed(facts, here, setting.placement, sizes)
        if not _fits(here, uses, copied) or _on_disk(here, uses) > _on_disk(here, best.uses):
            break
        setting = replace(setting, n_ctx=n_ctx)
        best = best._replace(setting=setting, uses=uses)
    return best


def _sharpened(facts: ModelFacts, setting: Setting, uses: dict[str, MemoryUse], n_outputs: int) -> dict[str, MemoryUse]:
    """Memory with the compute buffers of this very placement, in place of the most that any placement needs."""
    placement = setting.placement
    where = Where(placement.layers, placement.experts, placement.output)
    sharp = graph_bytes(facts, GraphWork(setting.n_ctx, setting.kv_type, setting.n_ubatch, n_outputs), where)
    sizes = Sizes.of(facts, setting.n_ctx, setting.kv_type, setting.n_ubatch, n_outputs)

    def use_of(use: MemoryUse) -> MemoryUse:
        most = sizes.ram_compute if use.name == CPU else sizes.compute
        return replace(use, compute_bytes=use.compute_bytes - max(0, most - sharp.get(use.name, 0)))

    return {name: use_of(use) for name, use in uses.items()}


def _on_disk(here: Machine, uses: dict[str, MemoryUse]) -> int:
    return max(0, uses[CPU].weights_bytes - max(0, ram_left(here, uses)))
