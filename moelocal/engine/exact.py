"""What a plan will take beside the weights, asked of llama.cpp itself: no weights are read, nothing is allocated.

    exact_memory([path], plan)["CPU"].compute_bytes

llama.cpp sizes its KV caches, recurrent states and compute buffers for a model whose tensors have no data (`no_alloc`)
and says so in its log. It takes under half a second, in a child process: a file or a setting that llama.cpp does not
like may abort it. Weights are not asked for: they are the sums of the tensor table (`plan/memory.py`).

Source: llama.cpp 0c1e57098, src/llama-context.cpp (sched_reserve), src/llama-kv-cache.cpp (no_alloc).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from moelocal.engine import llama, rpc
from moelocal.engine.allocation import per_device, read_buffers
from moelocal.errors import LoadFailed
from moelocal.model.facts import ModelFacts, read_facts
from moelocal.model.header import read_header
from moelocal.plan.cost import Placement
from moelocal.plan.llama_flags import flags_of_plan
from moelocal.plan.planner import Plan

_TIMEOUT_S = 60
_MIB = 1 << 20
_ROUNDING_BYTES = 64 << 10  # of a few figures in the log
# of all layers' caches or states: `llama_kv_cache: size =  384.00 MiB (  4096 cells,  48 layers, ...`; of DeepSeek-V4's
# compressors: `layers = 20, size = 0.03 MiB`
_CACHE = re.compile(r"(?:\bsize =\s+(?=[\d.]+ MiB \()|layers = \d+, size =\s+)([\d.]+) MiB")
# what sizes depend on
_KEPT = ("n_ctx", "kv_type", "n_ubatch", "threads", "n_gpu_layers", "repack", "no_host", "n_outputs")


@dataclass(frozen=True, slots=True)
class ContextMemory:
    """Bytes on one device: KV caches with recurrent states, and compute buffers with the logits' row."""

    kv_bytes: int
    compute_bytes: int


def exact_memory(paths: Sequence[Path], plan: Plan, workers: Sequence[str] = ()) -> dict[str, ContextMemory]:
    """What llama.cpp would allocate beside the weights, by device name, to its log's last digit (10 KiB).

    Args:
        paths: the checkpoint's file, or all its shards in order; they may be sparse.
        workers: addresses of RPC workers whose devices the plan uses.

    Raises:
        LoadFailed: llama.cpp refuses the file or the setting, with its last words.
    """
    placement = None if plan.placement is None else asdict(plan.placement)
    wanted = {name: getattr(plan, name) for name in _KEPT}
    job = {"paths": [str(path) for path in paths], "plan": wanted, "placement": placement, "workers": list(workers)}
    command = [sys.executable, "-m", __name__]
    try:
        done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise LoadFailed(f"llama.cpp did not size {paths[0].name} within {_TIMEOUT_S} s.") from error
    if done.returncode:
        details = tuple(line for line in done.stderr.splitlines() if line.strip())[-6:]
        raise LoadFailed(f"llama.cpp cannot size {paths[0].name} for this plan.", "", details)
    answer = json.loads(done.stdout.splitlines()[-1])
    return {name: ContextMemory(kv, compute) for name, (kv, compute) in answer.items()}


def _measure(paths: Sequence[Path], plan: Plan) -> dict[str, tuple[int, int]]:
    """(KV bytes, compute bytes) by device; in the child."""
    header = read_header(paths[0])
    model = llama.open_model(paths, plan, flags_of_plan(plan, header), is_dry=True)
    llama.open_context(model, plan, plan.n_ctx, None)
    lines = [line for _, line in llama.LOG.lines]
    uses = per_device(read_buffers(lines), llama.devices(), llama.buffer_names(), 0)
    logged = sum(round(float(size) * _MIB) for size in _CACHE.findall("\n".join(lines)))
    kv = _shares(read_facts(header), plan, logged)
    compute = {use.name: use.compute_bytes for use in uses}
    return {name: (kv.get(name, 0), compute.get(name, 0)) for name in {**compute, **kv}}


def _shares(facts: ModelFacts, plan: Plan, logged_bytes: int) -> dict[str, int]:
    """Caches and states by device. Without weights llama.cpp names only their sum: each layer's share goes to its
    device, and should our sum differ from the log's, in proportion."""
    homes = plan.placement.layers if plan.placement else ("CPU",) * len(facts.layers)
    n_ubatch = min(plan.n_ubatch, plan.n_ctx)
    shares: dict[str, int] = {}
    for layer, home in zip(facts.layers, homes, strict=True):
        shares[home] = shares.get(home, 0) + layer.kv_bytes(plan.n_ctx, plan.kv_type, n_ubatch)
    for cache in facts.extra_caches:  # of layers behind the last one
        shares[homes[-1]] += cache.n_bytes(plan.n_ctx, plan.kv_type, n_ubatch)
    total = sum(shares.values())
    if not total or abs(total - logged_bytes) <= _ROUNDING_BYTES:
        return shares
    return {name: share * logged_bytes // total for name, share in shares.items()}


def _main() -> None:
    job = json.load(sys.stdin)
    rpc.add_workers(job["workers"])
    placement = None
    if job["placement"] is not None:
        fields = job["placement"]
        parts = tuple((tensor, device) for tensor, device in fields["parts"])
        placement = Placement(tuple(fields["layers"]), tuple(fields["experts"]), fields["output"], parts)
    plan = Plan(**job["plan"], load_mode="none", placement=placement)
    print(json.dumps(_measure([Path(path) for path in job["paths"]], plan)))


if __name__ == "__main__":
    _main()
