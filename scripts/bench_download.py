"""Measures `moelocal pull` against `hf download` of the same file from the same local server, and prints the ratio.

Both are whole processes, from start to exit, in turn (and in turn at going first), each into an empty cache; what
counts is the median of the pairs' ratios of throughput. moelocal also computes the SHA-256 of what came, and hf does
not. The server is a process of its own on the loopback interface, which sends files without touching them (sendfile).

usage: python scripts/bench_download.py [--gb 2] [--pairs 5] [--folder DIR] [--line-mb-per-s N] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

REPO, QUANT = "owner/Model-GGUF", "F16"
BOUND = 0.95  # what counts as good enough: throughput, ours / theirs
_SERVE = """
import sys
from pathlib import Path
from tests.hub_server import HubServer
hub = HubServer()
path = Path(sys.argv[1])
hub.add(sys.argv[2], path.name, path)
hub.faults.bytes_per_s = float(sys.argv[3]) or None
print(hub.endpoint, flush=True)
sys.stdin.read()
"""


def make_file(folder: Path, n_bytes: int) -> Path:
    """A GGUF file of that size, sparse: what it holds is nothing to a download."""
    from tests.gguf_bytes import write_sparse

    tensors = [("output.weight", (1 << 20, n_bytes >> 21), 1)]
    return write_sparse(folder / f"model-{QUANT}.gguf", {"general.architecture": "llama"}, tensors)


def seconds(command: list[str], env: dict[str, str], cache: Path, n_bytes: int) -> float:
    """Of one download into an empty cache."""
    shutil.rmtree(cache, ignore_errors=True)
    start = time.monotonic()
    subprocess.run(command, env=env | {"HF_HOME": str(cache)}, check=True, capture_output=True)
    taken = time.monotonic() - start
    found = [path.stat().st_size for path in cache.rglob("blobs/*")]
    assert found == [n_bytes], f"{command[0]} left files of {found} bytes"
    return taken


def measure(folder: Path, n_bytes: int, pairs: int, line_mb_per_s: float) -> list[tuple[float, float]]:
    """Seconds of moelocal and of hf, in pairs."""
    file = make_file(folder, n_bytes)
    server = subprocess.Popen(
        [sys.executable, "-c", _SERVE, str(file), REPO, str(line_mb_per_s * 1e6)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdin is not None and server.stdout is not None
    endpoint = server.stdout.readline().strip()
    more = {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    env = {**os.environ, **more, "MOELOCAL_HOME": str(folder / "home"), "PYTHONPATH": str(ROOT)}
    ours = [sys.executable, "-m", "moelocal", "pull", f"{REPO}:{QUANT}"]
    theirs = [str(Path(sys.executable).with_name("hf")), "download", REPO, file.name]
    size, found = file.stat().st_size, []
    try:
        for command in (ours, theirs):  # so that neither is the first to read files from disk
            seconds(command, env, folder / "cache", size)
        for pair in range(pairs):
            order = (ours, theirs) if pair % 2 == 0 else (theirs, ours)
            taken = {command[-2]: seconds(command, env, folder / "cache", size) for command in order}
            found.append((taken[ours[-2]], taken[theirs[-2]]))
            mine, other = found[-1]
            print(
                f"moelocal {size / mine / 1e6:6.0f} MB/s   hf {size / other / 1e6:6.0f} MB/s   {other / mine:.2f}",
                flush=True,
            )
    finally:
        server.stdin.close()
        server.wait()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=2.0, help="size of the file")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where files go: a disk, or memory (/dev/shm)")
    parser.add_argument("--line-mb-per-s", type=float, default=0.0, help="what the server sends on each connection")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        found = measure(Path(folder), int(args.gb * 1e9), args.pairs, args.line_mb_per_s)
    ratios = [theirs / ours for ours, theirs in found]
    ratio = statistics.median(ratios)
    result = {
        "ratio": round(ratio, 3),
        "least": round(min(ratios), 3),
        "most": round(max(ratios), 3),
        "moelocal_mb_per_s": round(args.gb * 1e3 / statistics.median(ours for ours, _ in found)),
        "hf_mb_per_s": round(args.gb * 1e3 / statistics.median(theirs for _, theirs in found)),
        "bound": BOUND,
    }
    if args.json:
        print(json.dumps(result))
    else:
        print(f"median {ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f}), wanted {BOUND}")


if __name__ == "__main__":
    main()
