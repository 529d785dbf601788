"""Runs models in less RAM than they need: as moelocal does, and as llama.cpp's plain memory mapping does, not repacked.

Each run is a process in a memory control group, whose limit is a share of the file's size, with the file's page cache
dropped before and read-ahead of 128 KiB, a laptop's default. Runs go in pairs, ours and plain in turns. Each pair
begins with the disk's own speed (random reads of 1 MiB past the page cache, 1 to 16 in flight, the fastest counts)
and ends with a run in RAM, without a limit: the ratio if nothing had to be read at all. Tokens are random (the same
for all), so routers choose as the file's weights have it: `make_synthetic.py --skew 0` for the worst case, `--skew 1`
for choices that repeat as those of trained models do.

A run computes a prompt, while hardly any expert is in RAM, then single tokens of which the first do not count, then
another prompt of the same length, which finds in RAM what stayed there. `bytes` are what the process had read from the
disk. The bound is the disk's: bytes per token of our run / the disk's fastest speed. The last column says whether
all computed the same logits in the end.

With `--soak MINUTES`, instead: prompts and tokens in turns for so long, ours only, and what the control group counted.

usage: sudo python scripts/bench_residency.py FILE.gguf ... [--limits 50,65,80] [--pairs 5] [--prompt 512] [--tokens 60]
       sudo python scripts/bench_residency.py FILE.gguf --soak 30 --limits 50
"""

from __future__ import annotations

import argparse
import hashlib
import json
import mmap
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

OURS, PLAIN, IN_RAM, SOAK = "ours", "plain", "in RAM", "soak"
GROUPS = Path("/sys/fs/cgroup")
READ_BYTES = 1 << 20
IN_FLIGHT = (1, 2, 4, 8, 16)
COLUMNS = (
    "limit", "held", "decode: plain", "ours", "ratio", "in RAM", "MB per token: plain", "ours",
    "of the disk's bound", "prompt ratio", "in RAM", "next prompt ratio", "in RAM", "first token ratio", "same logits",
)  # fmt: skip


class Sizes(NamedTuple):
    """Tokens of the prompt, of decode before it counts, and of decode that counts."""

    n_prompt: int
    n_warm: int
    n_tokens: int


def read_bytes() -> int:
    """Bytes that this process has had read from disks."""
    rows = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(rows["read_bytes"])


def child(path: Path, how: str, sizes: Sizes, started: float) -> dict[str, Any]:
    """One run, in this process."""
    from moelocal.engine import llama, session
    from moelocal.machine.hardware import detect
    from moelocal.model.facts import read_facts
    from moelocal.model.header import read_header
    from moelocal.plan.planner import make_plan
    from moelocal.plan.request import PlanRequest

    header = read_header(path)
    machine = detect(llama.devices(), llama.version())
    request = PlanRequest(n_ctx=min(sum(sizes), 2048) + 64, n_ubatch=512, repack=False)
    plan = make_plan(read_facts(header), machine, request)
    if how in (PLAIN, IN_RAM):
        plan = replace(plan, disk_bytes=0)
        if how == PLAIN:
            vars(session)["warm"] = lambda *_: None  # llama.cpp itself reads the file as it maps it
    elif not plan.disk_bytes:
        raise SystemExit("the limit is not below what the model needs")
    noise = random.Random(1)
    n_vocab = len(header.metadata["tokenizer.ggml.tokens"])
    tokens = [noise.randrange(n_vocab) for _ in range(sum(sizes))]
    with session.load([path], header, plan) as open_session:
        if how == SOAK:
            return soak(open_session, tokens, started + sizes.n_tokens)
        loaded, loaded_bytes = time.monotonic(), read_bytes()
        open_session.evaluate(tokens[: sizes.n_prompt])
        prompted, prompted_bytes = time.monotonic(), read_bytes()
        open_session.evaluate(tokens[sizes.n_prompt : -sizes.n_tokens], one_by_one=True)
        before, start = read_bytes(), time.monotonic()
        open_session.evaluate(tokens[-sizes.n_tokens :], one_by_one=True)
        seconds, n_bytes = time.monotonic() - start, read_bytes() - before
        logits = llama.api().llama_get_logits_ith(open_session._context, -1)[:n_vocab]
        open_session.rewind(0)
        noise.shuffle(tokens)
        again, again_bytes = time.monotonic(), read_bytes()
        open_session.evaluate(tokens[: sizes.n_prompt])
        again, again_bytes = time.monotonic() - again, read_bytes() - again_bytes
        logits += llama.api().llama_get_logits_ith(open_session._context, -1)[:n_vocab]
        residency = open_session.residency
        return {
            "decode_per_s": sizes.n_tokens / seconds,
            "bytes_per_token": n_bytes / sizes.n_tokens,
            "prefill_s": prompted - loaded,
            "prefill_bytes": prompted_bytes - loaded_bytes,
            "next_prefill_s": again,
            "next_prefill_bytes": again_bytes,
            "first_token_s": prompted - started,
            "held_bytes": residency.held_bytes if residency else 0,
            "logits": hashlib.sha256(repr(logits).encode()).hexdigest(),
        }


def soak(session: Any, tokens: list[int], end: float) -> dict[str, Any]:
    """Until that time: a prompt of 512 and 256 tokens after it, again and again."""
    n_done = 0
    while time.monotonic() < end:
        session.rewind(0)
        session.evaluate(tokens[:512])
        for at in range(512, 768):
            session.evaluate(tokens[at : at + 1], one_by_one=True)
        n_done += 1
        noise = random.Random(n_done)
        noise.shuffle(tokens)
    folder = next(GROUPS.glob(f"**/moelocal-{os.getppid()}"))
    counts = {}
    for name in ("memory.peak", "memory.max_usage_in_bytes", "memory.events", "memory.oom_control"):
        with suppress(OSError):
            counts[name] = (folder / name).read_text().split()
    held = session.residency.held_bytes
    return {"prompts": n_done, "tokens": 256 * n_done, "hits": session.residency.stats.hit_rate, "held": held, **counts}


@contextmanager
def memory_limit(n_bytes: int) -> Iterator[Path]:
    """A control group with this limit; gives the file to which a process writes itself."""
    is_new = (GROUPS / "cgroup.controllers").exists()
    folder = (GROUPS if is_new else GROUPS / "memory") / f"moelocal-{os.getpid()}"
    if is_new:
        (GROUPS / "cgroup.subtree_control").write_text("+memory")
    folder.mkdir()
    try:
        (folder / ("memory.max" if is_new else "memory.limit_in_bytes")).write_text(str(n_bytes))
        yield folder / "cgroup.procs"
    finally:
        for _ in range(50):  # until its last process is gone
            with suppress(OSError):
                folder.rmdir()
                break
            time.sleep(0.1)


@contextmanager
def read_ahead(path: Path, kib: int) -> Iterator[None]:
    """The disk's read-ahead set to this, and back afterwards."""
    device = os.stat(path).st_dev
    folder = Path(os.path.realpath(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}"))
    knob = next(place / "queue/read_ahead_kb" for place in (folder, folder.parent) if (place / "queue").is_dir())
    before = knob.read_text()
    knob.write_text(str(kib))
    try:
        yield
    finally:
        knob.write_text(before)


def disk_bytes_per_s(path: Path, seconds: float = 1.0) -> float:
    """The fastest of several numbers of random reads in flight."""
    file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    n_places = os.fstat(file).st_size // READ_BYTES

    def read(seed: int, end: float, done: list[int]) -> None:
        buffer, noise = mmap.mmap(-1, READ_BYTES), random.Random(seed)
        while time.monotonic() < end:
            done.append(os.preadv(file, [buffer], noise.randrange(n_places) * READ_BYTES))

    best = 0.0
    for n in IN_FLIGHT:
        start, done = time.monotonic(), list[int]()
        threads = [threading.Thread(target=read, args=(seed, start + seconds, done)) for seed in range(n)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        best = max(best, sum(done) / (time.monotonic() - start))
    os.close(file)
    return best


def fits(path: Path) -> bool:
    """Whether free memory holds the file."""
    rows = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return path.stat().st_size + (2 << 30) < 1024 * int(rows["MemAvailable"].split()[0])


def run(path: Path, how: str, sizes: Sizes, limit_bytes: int) -> dict[str, Any]:
    """One run in a process of its own, in a control group of its own."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with memory_limit(limit_bytes) as members:
        command = [sys.executable, __file__, "--child", how, *map(str, sizes), repr(time.monotonic()), str(path)]
        done = subprocess.run(
            command, capture_output=True, text=True, preexec_fn=lambda: members.write_text(str(os.getpid()))
        )
    if done.returncode:
        raise SystemExit(f"{how} ended with status {done.returncode}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def compare(path: Path, share: int, sizes: Sizes, n_pairs: int) -> str:
    """A row of the table: medians of the pairs."""
    limit_bytes = path.stat().st_size * share // 100
    pairs = []
    for i in range(n_pairs):
        disk = disk_bytes_per_s(path)
        order = (OURS, PLAIN) if i % 2 else (PLAIN, OURS)
        found = {how: run(path, how, sizes, limit_bytes) for how in order}
        found[IN_RAM] = run(path, IN_RAM, sizes, 1 << 50) if fits(path) else {}
        pairs.append((found, disk))
        print(
            f"{path.stem}, {share} %, pair {i + 1}: {json.dumps(found)}, disk {disk:.4g}", file=sys.stderr, flush=True
        )

    def middle(how: str, key: str, form: str = "{:.2f}", unit: float = 1.0) -> str:
        return form.format(statistics.median(found[how][key] / unit for found, _ in pairs))

    def ratio(how: str, key: str, power: int = 1) -> str:
        values = [(found[how][key] / found[PLAIN][key]) ** power for found, _ in pairs if found[how]]
        return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})" if values else "-"

    bound = [100 * found[OURS]["decode_per_s"] * found[OURS]["bytes_per_token"] / disk for found, disk in pairs]
    cells = (
        f"{share} %",
        middle(OURS, "held_bytes", "{:.0f} %", path.stat().st_size / 100),
        middle(PLAIN, "decode_per_s"),
        middle(OURS, "decode_per_s"),
        ratio(OURS, "decode_per_s"),
        ratio(IN_RAM, "decode_per_s"),
        middle(PLAIN, "bytes_per_token", "{:.1f}", 1e6),
        middle(OURS, "bytes_per_token", "{:.1f}", 1e6),
        f"{statistics.median(bound):.0f} %",
        ratio(OURS, "prefill_s", -1),
        ratio(IN_RAM, "prefill_s", -1),
        ratio(OURS, "next_prefill_s", -1),
        ratio(IN_RAM, "next_prefill_s", -1),
        ratio(OURS, "first_token_s", -1),
        "yes" if all(len({run["logits"] for run in found.values() if run}) == 1 for found, _ in pairs) else "NO",
    )
    return f"| {path.stem} | {' | '.join(cells)} |"


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        how, n_prompt, n_warm, n_tokens, started, name = sys.argv[2:]
        print(json.dumps(child(Path(name), how, Sizes(int(n_prompt), int(n_warm), int(n_tokens)), float(started))))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.gguf")
    parser.add_argument("--limits", default="65", help="limits of memory in percent of the file, such as 50,65,80")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--warm", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--soak", type=int, metavar="MINUTES")
    parser.add_argument("--read-ahead", type=int, default=128, metavar="KIB")
    args = parser.parse_args()
    if os.geteuid():
        parser.error("this needs root: for the control group, and for the disk's read-ahead")
    sizes = Sizes(args.prompt, args.warm, args.tokens)
    if args.soak:
        for path in args.files:
            for share in args.limits.split(","):
                limit_bytes = path.stat().st_size * int(share) // 100
                with read_ahead(path, args.read_ahead):
                    counted = run(path, SOAK, Sizes(512, 256, 60 * args.soak), limit_bytes)
                print(f"{path.stem}, limit {limit_bytes:,} bytes, {args.soak} minutes: {json.dumps(counted)}")
        return 0
    rows = []
    for path in args.files:
        with read_ahead(path, args.read_ahead):
            rows += [compare(path, int(share), sizes, args.pairs) for share in args.limits.split(",")]
    print(f"| file | {' | '.join(COLUMNS)} |\n|---|{'---:|' * len(COLUMNS)}", *rows, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
