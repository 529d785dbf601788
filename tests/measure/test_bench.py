"""`bench`: what counts as an outlier, how rows are kept and compared, and the command on the demo."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from moelocal.machine.described import parse_machine
from moelocal.measure.bench import BenchTest, Samples, is_falling, outliers
from moelocal.measure.bench_rows import Earlier, Kept, Row, Setting, compare
from moelocal.paths import user_home
from tests.conftest import DEMO, ROOT

SETTING = Setting(2, 2, 512, True, "f16", {"CPU": [0, 1]})
FILE = (1000, "m.gguf")
PP512 = BenchTest(512, 0)


def row(*per_s: float, test: BenchTest = PP512, setting: Setting = SETTING) -> Row:
    return Row("m", test, setting, Samples(per_s, 10**9, 0), 90.0, 200.0)


@pytest.mark.parametrize(
    ("test", "name"),
    [
        (BenchTest(512, 0), "pp512"),
        (BenchTest(0, 128), "tg128"),
        (BenchTest(0, 128, 4096), "tg128 @ d4096"),
        (BenchTest(512, 128), "pp512+tg128"),
    ],
)
def test_names_are_llama_benchs(test: BenchTest, name: str) -> None:
    assert test.name == name


@pytest.mark.parametrize(
    ("per_s", "found"),
    [
        ((100, 101, 99, 100, 60), (4,)),
        ((100, 100, 100, 100, 104), ()),  # less than 5 %
        ((100, 80, 120, 95, 105), ()),  # all of it is noise
        ((100, 50), ()),
        ((150, 100, 101, 99), (0,)),
    ],
)
def test_outliers(per_s: tuple[float, ...], found: tuple[int, ...]) -> None:
    assert outliers(per_s) == found


def test_what_heat_does() -> None:
    assert is_falling((100, 97, 94, 90))
    assert not is_falling((100, 97, 98, 90)) and not is_falling((100, 99, 98, 97)) and not is_falling((100, 80))


def test_notes_say_what_was_odd() -> None:
    odd = Samples((100, 101, 99, 100, 60), 1, 12, 0.5, ("GPU 0",))
    text = " ".join(odd.notes)
    for part in ("50% of the processor", "1 of 5 runs off, by up to 40% slower", "GPU 0", "12 pages"):
        assert part in text
    assert not Samples((100, 101, 99, 100, 100), 1, 0, 0.01).notes


@pytest.mark.parametrize(
    ("now", "before", "verdict"),
    [
        ((100, 101, 99), (100, 100, 100), "same"),
        ((90, 91, 89), (100, 100, 100), "slower"),
        ((90, 70, 110), (100, 100, 100), "same"),  # too noisy to tell
        ((110, 111, 109), (100, 101, 99), "faster"),
        ((99, 99, 99), (100, 100, 100), "same"),
    ],
)
def test_a_change_beyond_the_noise(now: tuple[float, ...], before: tuple[float, ...], verdict: str) -> None:
    assert compare(now, Earlier("", "", before)).verdict == verdict


def test_rows_are_kept_for_the_same_test_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOELOCAL_HOME", str(tmp_path))
    kept = Kept("machine", "1.0")
    kept.keep([(row(100.0, 101.0), FILE)], "then")
    kept.keep([(row(110.0), FILE)], "now")
    with (user_home() / "bench.jsonl").open("ab") as file:
        file.write(b'{"version": 1, "half a line\n[1]\n{"version":1}\n')
    found = kept.latest(row(1.0), FILE)
    assert found == Earlier("now", "1.0", (110.0,))
    assert Kept("machine", "2.0").latest(row(1.0), FILE) == found  # another llama.cpp is what one wants to compare
    assert Kept("other", "1.0").latest(row(1.0), FILE) is None
    assert kept.latest(row(1.0), (1001, "m.gguf")) is None
    assert kept.latest(row(1.0, test=BenchTest(0, 128)), FILE) is None
    other = Setting(4, 4, 512, True, "f16", {"CPU": [0, 1]})
    assert kept.latest(row(1.0, setting=other), FILE) is None


def test_kept_rows_do_not_grow_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOELOCAL_HOME", str(tmp_path))
    monkeypatch.setattr("moelocal.measure.bench_rows._HALF_BYTES", 2000)
    kept = Kept("machine", "1.0")
    for i in range(30):
        kept.keep([(row(100.0 + i), FILE)], str(i))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 8000
    found = kept.latest(row(1.0), FILE)
    assert found is not None and found.when == "29"


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    return {**os.environ, "MOELOCAL_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT), "COLUMNS": "110"}


@pytest.fixture
def run(env: dict[str, str]) -> Run:
    def run_(*args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "moelocal", "bench", *args]
        return subprocess.run(command, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120)

    return run_


SHORT = ("demo", "-p", "32", "-n", "8", "-r", "2")


def test_every_combination_is_a_row(run: Run) -> None:
    done = run(*SHORT, "-d", "0,64", "--threads", "1,2", "--repack", "on,off", "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [one["test"] for one in rows[:4]] == ["pp32", "pp32 @ d64", "tg8", "tg8 @ d64"]
    seen = {(one["test"], one["threads"], one["repack"]) for one in rows}
    assert len(seen) == len(rows) == 16
    for one in rows:
        speeds = one["tokens_per_s"]
        assert len(speeds["samples"]) == 2 and 0 < speeds["min"] <= speeds["median"] <= speeds["max"]
        assert one["predicted_per_s"] > 0 and one["roofline_per_s"] > 0 and one["peak_ram_bytes"] > 14e6
        assert one["expert_layers"] == {"CPU": [0, 1, 2, 3]} and one["kv_type"] == "f16"


def test_the_formats(run: Run, tmp_path: Path) -> None:
    table = run(*SHORT)
    assert table.returncode == 0, table.stderr
    assert "pp32" in table.stdout and "█" in table.stdout and "predicted" in table.stdout
    again = run(*SHORT, "--compare")
    assert "noise" in again.stdout
    rows = list(csv.DictReader(io.StringIO(run(*SHORT, "--csv").stdout)))
    assert [one["test"] for one in rows] == ["pp32", "tg8"] and float(rows[0]["median"]) > 0
    text = run(*SHORT, "--markdown").stdout.splitlines()
    assert "llama-cpp-python" in text[0] and "; demo: llama" in text[0]  # machine, build and model on one line
    assert any("| pp32 |" in line for line in text)
    picture = tmp_path / "chart.svg"
    assert run(*SHORT, "--svg", str(picture)).returncode == 0
    words = "".join(ET.parse(picture).getroot().itertext())
    assert "demo, tg8" in words and "llama-cpp-python" in words


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("demo", "-p", "x"), "whole numbers"),
        (("demo", "-p", "0", "-n", "0"), "nothing to measure"),
        (("demo", "--threads", "0"), "whole numbers"),
        (("demo", "--kv-type", "q3"), "does not know"),
        (("demo", "--repack", "maybe"), "does not know"),
        (("demo", "--json", "--csv"), "exclude each other"),
        (("demo", "no-such-model"), "no-such-model"),
        (("demo", "--ram", "1MiB"), "RAM"),
        (("demo", "--svg", "/no/such/folder/a.svg"), "cannot be written"),
        (("demo", "--prompt", "99999999"), "1,048,576"),
    ],
)
def test_refusals(run: Run, args: tuple[str, ...], text: str) -> None:
    done = run(*args)
    assert done.returncode in (1, 2) and text in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) <= 4


def test_the_picture_comes_last(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured is seen, even if the picture cannot be kept in the end."""
    from moelocal.cli import render_bench
    from moelocal.cli.bench import Output
    from moelocal.errors import MoelocalError

    shown: list[str] = []
    monkeypatch.setattr(render_bench, "_print_table", lambda *_: shown.append("table"))
    output = Output(svg=tmp_path / "a.svg")

    def full(*_: object) -> None:
        raise MoelocalError("full", "make room")

    monkeypatch.setattr(render_bench, "chart", full)
    with pytest.raises(MoelocalError):
        render_bench.show([], parse_machine("ram=8GiB"), output, as_json=False)
    assert shown == ["table"]


def test_equal_settings_are_measured_once(run: Run) -> None:
    done = run(*SHORT, "--experts-on-cpu", "0,2,99", "--json")
    assert len(json.loads(done.stdout)) == 2 and "measured once" in done.stderr
    assert len(json.loads(run("demo", *SHORT, "--json").stdout)) == 2


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_table_fits_the_window(width: int, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Settings that differ, and speeds, are always told; bars and predictions where there is room."""
    from rich.console import Console

    from moelocal.cli import render_bench
    from moelocal.cli.bench import Result, subject_of

    monkeypatch.setattr(Console, "is_terminal", property(lambda _: True))
    monkeypatch.setenv("COLUMNS", str(width))
    slow = Setting(1, 1, 512, True, "f16", {"CPU": [0, 1]})
    earlier = compare([100.0] * 3, Earlier("2026-01-01", "0.3", (200.0,) * 3))
    deep = BenchTest(512, 0, 4096)
    demo = subject_of("demo")
    results = [Result(row(80.0, 100.0, 120.0, test=deep, setting=its), demo, earlier) for its in (slow, SETTING)]
    render_bench._print_table(results, compares=True)
    page = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    assert max(map(len, page.splitlines())) <= width
    for text in ("1 thread", "pp512 @ d4096", "100.0", "SLOWER"):
        assert text in page
    assert ("predicted" in page) == (width > 80) and ("█" in page) == (width > 80)
    plain = [result._replace(change=None) for result in results[:1]]
    render_bench._print_table(plain, compares=False)
    page = capsys.readouterr().out
    assert "of the limit" in page and "█" in page and ("predicted" in page) == (width >= 80)


def test_bars_tell_what_they_are(tmp_path: Path) -> None:
    """Whatever differs is in a bar's label; a picture for sharing shows no folders, and what it was measured with."""
    from moelocal.cli import render_bench
    from moelocal.cli.bench import Result, subject_of

    subject = subject_of("demo")
    path = f"{tmp_path}/{'a-model-with-a-long-name-' * 3}Q4_K_M.gguf"
    rows = [
        replace(row(80.0, setting=replace(SETTING, kv_type=kind, n_ubatch=n_ubatch)), model=model)
        for model in ("demo", path)
        for kind in ("f16", "q8_0")
        for n_ubatch in (512, 2048)
    ]
    rows[-1] = replace(rows[-1], setting=replace(rows[-1].setting, expert_layers={"CPU": [0]}))
    picture = str(render_bench.chart([Result(one, subject, None) for one in rows], parse_machine("ram=8GiB")))
    words = re.findall(r'font-size="12"[^>]*text-anchor="end"[^>]*>([^<]*)<', picture)
    assert len(set(words)) == len(rows) and str(tmp_path) not in picture
    assert "roofline" not in re.sub("<title>.*?</title>", "", picture)  # it is beyond what is drawn
    assert "demo: llama 13.9M" in picture and "2 threads" in picture
    same = [
        replace(one, setting=replace(one.setting, expert_layers={"CPU": list(range(n))}))
        for n, one in (
            (4, rows[0]),
            (4, rows[1]),
            (6, rows[4]),
            (6, rows[5]),
        )
    ]
    results = [Result(one, subject, None) for one in same]
    assert "in RAM" not in render_bench._settings(results[0], results)  # each model has its own number of layers


def test_a_benchmark_corrects_later_predictions(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the planner's own setting it counts as an answer does; what other programs slowed down does not."""
    from moelocal.cli import bench
    from moelocal.engine.history import read_runs
    from moelocal.machine.hardware import Device, detect
    from moelocal.plan.planner import PlanRequest, make_plan

    subject = bench.subject_of(str(DEMO))
    here = detect((Device("CPU", "chip", "cpu", 8 << 30, 8 << 30),), "1.0")
    plan = make_plan(subject.facts, here, PlanRequest(n_ctx=1024))
    session = SimpleNamespace(plan=plan, n_ctx=1024, load_s=0.5, allocated=plan.per_device, close=lambda: None)
    work = bench._Bench(here, [BenchTest(512, 0, 256), PP512, BenchTest(0, 128)], 2, (), verbose=True)
    monkeypatch.setattr(work, "_load", lambda *_: session)
    share = 0.9
    monkeypatch.setattr(
        work, "_row", lambda s, p, x, test, _: Row("m", test, SETTING, Samples((64.0,) * 2, 1, 0, share), 1.0, 1.0)
    )
    list(work.rows(subject, [plan], teaches=True))
    assert not read_runs(subject.path, here)
    share = 0.0
    list(work.rows(subject, [plan], teaches=False))
    assert not read_runs(subject.path, here)
    within = make_plan(subject.facts, here, PlanRequest(n_ctx=1024, ram_bytes=266 << 20))
    assert within.disk_bytes  # as planned; in truth free memory holds it, so this is not the disk's speed
    session.plan = within
    list(work.rows(subject, [within], teaches=True))
    assert not read_runs(subject.path, here)
    session.plan = plan
    list(work.rows(subject, [plan], teaches=True))
    [run] = read_runs(subject.path, here)
    assert (run.n_prompt, run.prompt_s, run.n_decoded, run.decode_s, run.n_depth) == (512, 8.0, 128, 2.0, 64)
    assert run.setting == plan.setting and run.is_whole


def test_it_predicts_what_a_plan_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the same counts of tokens, with what earlier runs taught, and within the RAM that was asked for."""
    from moelocal.cli import bench
    from moelocal.machine.hardware import Device, detect
    from moelocal.plan.calibration import Calibration, Run
    from moelocal.plan.planner import PlanRequest, make_plan
    from moelocal.plan.request import turn_of

    subject = bench.subject_of(str(DEMO))
    here = detect((Device("CPU", "chip", "cpu", 8 << 30, 8 << 30),), "1.0")
    request = PlanRequest(n_ctx=4096)
    setting, turn = make_plan(subject.facts, here, request).setting, turn_of(request)
    assert setting is not None
    runs = [Run(setting, 8 << 30, 512, 20.0, 20.0, 600, 128, 32.0, 1.0)]  # 25.6 and 4 tokens/s
    subject = subject._replace(history=Calibration(subject.facts, here, runs))
    monkeypatch.setattr("moelocal.measure.bench.measure", lambda *_: Samples((1.0,), 1, 0))
    for ram_bytes in (8 << 30, 280 << 20):
        plan = make_plan(subject.facts, here, replace(request, ram_bytes=ram_bytes), subject.history)
        assert plan.predicted is not None and plan.predicted.decode_per_s < 10
        assert bool(plan.disk_bytes) == (ram_bytes < 1 << 30)
        tests = [BenchTest(turn.n_prompt, 0, turn.n_depth - turn.n_prompt), BenchTest(0, 128, turn.n_depth - 64)]
        work = bench._Bench(here, tests, 1, (), verbose=True)
        rows = [work._row(subject, plan, cast(Any, None), test, print) for test in tests]  # `measure` has no use for it
        assert rows[0].predicted_per_s == pytest.approx(plan.predicted.prefill_per_s)
        assert rows[1].predicted_per_s == pytest.approx(plan.predicted.decode_per_s)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_keeps_what_was_measured(env: dict[str, str]) -> None:
    command = [sys.executable, "-m", "moelocal", "bench", "demo", "-p", "32", "-n", "20000", "-r", "9", "--json"]
    for delay_s in (3, 6, 12, 24):  # a busy computer may not be ready sooner
        process = subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        time.sleep(delay_s)
        os.killpg(process.pid, signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
        assert process.returncode == 130 and "Traceback" not in stderr
        if stdout:
            break
    assert [one["test"] for one in json.loads(stdout)] == ["pp32"]
