"""The probe on models small enough for a test: what it says is plausible, and it leaves nothing behind."""

from __future__ import annotations

import errno
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from moelocal.engine import llama
from moelocal.errors import MoelocalError
from moelocal.machine.hardware import Machine, detect
from moelocal.machine.speeds import load_speeds, store_speeds
from moelocal.measure import others
from moelocal.measure import probe as probing
from moelocal.measure.disk import random_read_bytes_per_s, writable_parent
from moelocal.measure.probe_model import MAPPED_BYTES, base_model, probe_model, random_blocks, write_probe_model
from moelocal.model.facts import read_facts
from moelocal.model.header import read_header

SMALL = 4 << 20


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go, and the models' disk is."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("HF_HUB_CACHE", str(folder))
    monkeypatch.setenv("MOELOCAL_HOME", str(tmp_path / "home"))
    return folder


@pytest.fixture
def machine() -> Machine:
    here = detect(llama.devices())
    return replace(here, cpu=here.cpu._replace(cores=1))  # two threads would wait for each other on a busy machine


def test_speeds_are_plausible_and_kept(scratch: Path, machine: Machine) -> None:
    fractions: list[float] = []
    speeds = probing.probe(machine, fractions.append, None, 600.0, ("Q4_0", "Q6_K"), SMALL)
    assert not list(scratch.iterdir())
    assert fractions and all(0 <= fraction <= 1 for fraction in fractions)
    cpu = speeds.devices["CPU"]
    assert cpu.measured
    for table in (cpu.dense, cpu.expert):
        assert {("Q4_0", False), ("Q6_K", False), ("Q4_K", False)} <= table.keys()
        for speed in table.values():
            assert 0 < speed.decode_bytes_per_s < math.inf and 0 < speed.prefill_weights_per_s < math.inf
    assert cpu.layer_s >= 0 and cpu.token_s >= 0
    for amount in (speeds.disk_bytes_per_s, speeds.load_bytes_per_s, speeds.repack_bytes_per_s, speeds.hop_s):
        assert 0 < amount < math.inf
    store_speeds("here", speeds)
    assert load_speeds("here") == speeds


def test_time_up_keeps_the_usual_speeds_and_says_so(scratch: Path, machine: Machine) -> None:
    told: list[str] = []
    speeds = probing.probe(machine, None, told.append, 0.0, ("Q4_0",), SMALL)
    assert not speeds.devices["CPU"].measured and speeds.devices["CPU"].dense
    assert any("Q4_0" in sentence for sentence in told)


def test_interruption_leaves_nothing(scratch: Path, machine: Machine) -> None:
    def stop(fraction: float) -> None:
        assert list(scratch.iterdir())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        probing.probe(machine, stop, types=("Q4_0",), file_bytes=SMALL)
    assert not list(scratch.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_ends_doctor_and_leaves_nothing(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    own = {**os.environ, "TMPDIR": str(scratch), "MOELOCAL_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "moelocal", "doctor", "--probe"]
    process = subprocess.Popen(
        command, env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 30
    while not list(scratch.glob("*/*.gguf")) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in stderr
    assert not list(scratch.iterdir()) and not (tmp_path / "home").exists()


def test_no_room_is_one_sentence(scratch: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    with pytest.raises(MoelocalError, match="Measuring needs") as caught:
        probing.probe(machine)
    assert "TMPDIR" in caught.value.hint


def test_a_disk_that_fills_up_is_one_sentence(scratch: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(probing, "write_probe_model", full)
    with pytest.raises(MoelocalError, match="Measuring needs"):
        probing.probe(machine)
    assert not list(scratch.iterdir())


@pytest.mark.parametrize("by_expert", [True, False])
def test_a_probe_model_is_what_it_says(tmp_path: Path, by_expert: bool) -> None:
    model, path = probe_model("Q4_K", by_expert, SMALL), tmp_path / "a.gguf"
    write_probe_model(model, path)
    facts = read_facts(read_header(path))
    assert len(facts.layers) == model.n_layers
    assert facts.n_experts == (model.n_experts if by_expert else 0)
    if by_expert:
        assert sum(layer.routed_expert_bytes for layer in facts.layers) == model.held_bytes
        assert model.active_bytes == model.held_bytes * model.n_used / model.n_experts


@pytest.mark.skipif(os.name != "posix", reason="holes in files")
def test_experts_take_no_room_on_the_disk(tmp_path: Path) -> None:
    model, path = probe_model("Q4_K", True), tmp_path / "a.gguf"
    write_probe_model(model, path)
    assert path.stat().st_blocks * 512 < model.held_bytes / 5 < path.stat().st_size


def test_models_stay_small() -> None:
    for kind in probing.TYPES:
        for by_expert in (True, False):
            assert probe_model(kind, by_expert).held_bytes < probing._SPACE_BYTES
            assert probe_model(kind, by_expert, MAPPED_BYTES).held_bytes < 1.1 * MAPPED_BYTES
    assert base_model(True, 8).held_bytes < 60e6


@pytest.mark.parametrize("kind", probing.TYPES)
def test_random_blocks_are_finite(kind: str) -> None:
    np = pytest.importorskip("numpy")
    gguf = pytest.importorskip("gguf")
    data = np.frombuffer(random_blocks(kind, 64 << 10), np.uint8)
    number = gguf.GGMLQuantizationType[kind]
    values = gguf.quants.dequantize(data.view(np.float16) if kind == "F16" else data.reshape(1, -1), number)
    assert np.isfinite(values).all() and 0 < np.abs(values.astype(np.float32)).max() < 100


def test_the_disk_is_read_and_nothing_stays(tmp_path: Path) -> None:
    speed = random_read_bytes_per_s(tmp_path, 8 << 20)
    assert speed is None or 0 < speed < math.inf
    assert not list(tmp_path.iterdir())
    assert writable_parent(tmp_path / "not" / "there") == tmp_path


def test_what_others_take_is_neither_ours_nor_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([(10.0, 5.0, 40.0), (12.0, 6.0, 44.0), (14.0, 7.0, 43.0)])
    monkeypatch.setattr(others, "_seconds", lambda: next(readings))
    work = others.OtherWork()
    assert work.share() == pytest.approx(0.25)  # of 4 s, 2 were idle and 1 ours
    assert work.share() == 0.0


def test_other_work_is_read_from_this_system() -> None:
    work = others.OtherWork()
    sum(range(3_000_000))
    assert 0.0 <= work.share() <= 1.0
