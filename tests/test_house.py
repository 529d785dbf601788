"""The rules of the house, read from the imports: see CONTRIBUTING.md."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "moelocal"
BASE = {"errors", "units", "paths"}
ROOMS = {  # each room and the rooms that it may import, besides itself and the base
    "model": set(),
    "machine": set(),
    "plan": {"model", "machine"},
    "engine": {"model", "machine", "plan"},
    "measure": {"model", "machine", "plan", "engine"},
    "build": {"model", "machine", "plan", "engine"},
    "serve": {"model", "machine", "plan", "engine"},
    "cli": {"model", "machine", "plan", "engine", "measure", "build", "serve"},
}
ONLY_IN = {
    "llama_cpp": {"engine/llama.py", "engine/abi.py"},
    "rich": {
        "cli/console.py",
        "cli/render_bench.py",
        "cli/render_experts.py",
        "cli/render.py",
        "cli/render_plan.py",
        "cli/render_doctor.py",
        "cli/render_models.py",
        "cli/render_pull.py",
        "cli/render_eval.py",
        "cli/render_convert.py",
        "cli/render_quantize.py",
    },
    "prompt_toolkit": {"cli/chat_input.py"},
    "jinja2": {"engine/template.py", "engine/sandbox.py"},
}
PURE = [
    "model/header.py",
    "model/facts.py",
    "model/slices.py",
    "model/graph.py",
    "model/arena.py",
    "model/steps.py",
    "model/rescale.py",
    "model/compute.py",
    "plan/planner.py",
    "plan/cost.py",
    "plan/calibration.py",
    "plan/choose.py",
    "plan/verdict.py",
    "plan/outcome.py",
    "plan/search.py",
    "plan/fit.py",
    "plan/memory.py",
    "plan/request.py",
    "plan/reasons.py",
    "plan/alternatives.py",
    "engine/expert_cache.py",
    "measure/experts.py",
    "machine/described.py",
    "machine/defaults.py",
    "machine/cards.py",
]
IMPURE = {"time", "datetime", "socket", "subprocess", "urllib", "requests", "httpx", "psutil", "random", "os"}
HEAVY = {"llama_cpp", "rich", "prompt_toolkit", "jinja2", "huggingface_hub", "numpy", "gguf", "psutil", "torch"}
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Full names of the modules that a file imports; those under TYPE_CHECKING do not count."""
    tree = ast.parse(path.read_text())
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        todo.extend(ast.iter_child_nodes(node))


def room_of(name: str) -> str | None:
    parts = name.split(".")
    return parts[1] if parts[0] == "moelocal" and len(parts) > 1 else None


@pytest.mark.parametrize("module", MODULES)
def test_a_room_imports_only_rooms_to_its_left(module: str) -> None:
    room = module.split("/")[0] if "/" in module else ""
    for name in imports(PACKAGE / module):
        other = room_of(name)
        if other is None or other in BASE or other == room:
            continue
        if module == "__main__.py":
            assert other == "cli"
        elif module.removesuffix(".py") in BASE:
            assert other == "errors" and module != "errors.py", f"{module} imports {name}"
        elif other in ROOMS:
            assert other in ROOMS[room], f"{module} imports {name}"


@pytest.mark.parametrize("module", MODULES)
def test_libraries_stay_where_they_belong(module: str) -> None:
    for name in imports(PACKAGE / module):
        top = name.split(".")[0]
        assert module in ONLY_IN.get(top, {module}), f"{module} imports {name}"
        assert top not in ("click", "ctypes.util")


@pytest.mark.parametrize("module", [module for module in PURE if module in MODULES])
def test_pure_modules_read_no_clock_and_no_network(module: str) -> None:
    assert not {name.split(".")[0] for name in imports(PACKAGE / module)} & IMPURE


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom moelocal.cli.app import command_line\n"
        "assert CliRunner().invoke(command_line(), ['run', '--help']).exit_code == 0\n"
        f"print(*{HEAVY!r}.intersection(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_no_room_is_empty() -> None:
    for folder in PACKAGE.iterdir():
        if folder.is_dir() and folder.name != "__pycache__":
            assert folder.name in ROOMS
            assert len(list(folder.glob("*.py"))) > 1
