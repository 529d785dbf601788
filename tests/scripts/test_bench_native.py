"""The arithmetic of the comparison, and the measuring of a process, on processes whose cost is known."""

import resource
import sys

import pytest

from scripts import bench_native as bench


def test_a_row_compares_medians_and_shows_the_spread_of_pairs() -> None:
    row = bench.Row("decode", "tok/s", [10.0, 12.0, 30.0], [10.0, 10.0, 15.0], "more")
    assert row.value == 1.2
    assert row.spread == (1.0, 2.0)
    assert row.ok


def test_less_is_better_and_differences() -> None:
    row = bench.Row("memory", "MB", [200.0, 210.0], [100.0, 120.0], "less", "difference")
    assert row.value == 95.0
    assert row.spread == (90.0, 100.0)
    assert not row.ok
    alone = bench.Row("help", "CPU s", [0.1, 0.2], [], "less", "absolute")
    assert alone.value == pytest.approx(0.15)
    assert not alone.ok
    assert "NOT OK" in bench.table([row, alone])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_tree_is_measured_as_a_whole() -> None:
    grandchild = "import time; data = bytearray(60_000_000); data[::4096] = b'x' * len(data[::4096]); time.sleep(0.3)"
    program = f"""
import subprocess, sys, time
time.sleep(0.2)
print("x", flush=True)
data = bytearray(40_000_000)
data[::4096] = b'x' * len(data[::4096])
subprocess.run([sys.executable, "-c", {grandchild!r}], check=True)
"""
    ran = bench.run([sys.executable, "-c", program], poll_memory=True)
    assert ran.stdout == "x\n"
    assert ran.first_byte_s >= 0.2
    inherited = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # a child's peak begins at its parent's
    assert 100e6 < ran.peak_bytes < 200e6 + inherited


def test_a_failing_command_tells_why() -> None:
    with pytest.raises(RuntimeError, match="ended with 3:\nbecause"):
        bench.run([sys.executable, "-c", "import sys; sys.stderr.write('because'); sys.exit(3)"])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_pairs_take_turns_and_disturbed_ones_are_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "watched", lambda measure, i: (measure(i), 0.9 if i == 0 else 0.0))
    setup = bench.Setup(
        *(bench.ROOT,) * 2, pairs=3, reps=1, threads=1, repack=True, n_ctx=512, temperature=0.0, n_answer=64
    )
    calls: list[str] = []

    def ours(i: int) -> float:
        calls.append(f"ours {i}")
        return float(i)

    def native(i: int) -> float:
        calls.append(f"native {i}")
        return float(10 * i)

    assert bench.paired(setup, "decode", ours, native) == ([1.0, 2.0, 3.0], [10.0, 20.0, 30.0], 0.0)
    assert calls[:4] == ["ours 0", "native 0", "native 1", "ours 1"]
