"""When this machine is measured without being asked, and which measurement is kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from moelocal.cli import measuring
from moelocal.cli.measuring import measure, measure_first
from moelocal.engine import llama
from moelocal.errors import MoelocalError
from moelocal.machine.hardware import Machine, detect, identity
from moelocal.machine.speeds import Speeds, is_known, load_speeds, store_speeds
from moelocal.measure import others, probe

ENGINE = "1.0"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setenv("MOELOCAL_HOME", str(tmp_path))
    monkeypatch.setattr(probe, "probe", lambda *_: Speeds(hop_s=1.0))
    monkeypatch.setattr(others.OtherWork, "share", lambda _: 0.0)
    return detect(llama.devices())


@pytest.fixture
def person(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "_is_watched", lambda: True)


def kept(machine: Machine) -> Speeds | None:
    return load_speeds(identity(machine.cpu, machine.devices, ENGINE))


def test_a_script_waits_for_nothing(machine: Machine) -> None:
    assert not measure_first(machine, ENGINE) and kept(machine) is None


def test_a_person_waits_once(machine: Machine, person: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert measure_first(machine, ENGINE) and kept(machine) == Speeds(hop_s=1.0)
    assert "Ctrl-C skips" in " ".join(capsys.readouterr().err.split())
    assert not measure_first(machine, ENGINE) and not capsys.readouterr().err


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), MoelocalError("No room.", "")])
def test_what_keeps_it_from_measuring_keeps_nobody_from_planning(
    machine: Machine,
    person: None,
    failure: BaseException,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object) -> Speeds:
        raise failure

    monkeypatch.setattr(probe, "probe", fail)
    assert not measure_first(machine, ENGINE) and kept(machine) is None
    assert "estimates" in capsys.readouterr().err
    assert is_known(identity(machine.cpu, machine.devices, ENGINE)) == isinstance(failure, KeyboardInterrupt)


def test_on_a_busy_machine_nothing_is_kept(
    machine: Machine, person: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(others.OtherWork, "share", lambda _: 0.5)
    assert not measure_first(machine, ENGINE) and kept(machine) is None
    assert "50%" in capsys.readouterr().err
    quiet = replace(Speeds(), hop_s=2.0)
    store_speeds(identity(machine.cpu, machine.devices, ENGINE), quiet)
    assert not measure(machine, ENGINE) and kept(machine) == quiet
