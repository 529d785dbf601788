"""Models for tests: the bundled demo, and tiny random ones of several architectures, written once per run."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import settings

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "moelocal/model/demo/demo.gguf"

# The same examples in every run; `MOELOCAL_EXAMPLES=20 scripts/test tests/plan` looks at other ones, and at more.
settings.register_profile("same", derandomize="MOELOCAL_EXAMPLES" not in os.environ)
settings.load_profile("same")


def script(name: str) -> ModuleType:
    """A module of scripts/, imported by its path."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder of the test's own: what ran before must not change what is planned."""
    folder = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("MOELOCAL_HOME", str(folder))
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the path of a tiny model by its geometry's name, such as `tiny-gptoss`."""
    folder = tmp_path_factory.mktemp("models")
    make = script("make_synthetic")

    def path(geometry: str) -> Path:
        file = folder / f"{geometry}.gguf"
        if not file.exists():
            make.write_model(geometry, file)
        return file

    return path


@pytest.fixture
def open_session() -> Iterator[Callable[..., Any]]:
    """Opens sessions on a file with plain CPU settings, and closes them after the test."""
    from moelocal.engine.session import Session, load
    from moelocal.model.header import read_header
    from moelocal.plan.planner import Plan

    opened: list[Session] = []

    def open_(path: Path, checkpoints: bool = False, n_ctx: int = 1024, n_ubatch: int = 64) -> Session:
        plan = Plan(
            n_ctx=n_ctx, kv_type="f16", n_ubatch=n_ubatch, threads=1, n_gpu_layers=0, repack=True, load_mode="mmap"
        )
        session = load([path], read_header(path), plan, one_shot=not checkpoints)
        opened.append(session)
        return session

    yield open_
    for session in opened:
        session.close()
