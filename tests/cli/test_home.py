"""A folder of the user's own that cannot be written: told before long work, or no failure at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.test_run import refused, run


@pytest.fixture(autouse=True)
def no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In the place of its parent there is a file: nobody can write there, not even an administrator."""
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "home"
    monkeypatch.setenv("MOELOCAL_HOME", str(folder))
    return folder


@pytest.mark.parametrize(
    "command",
    [
        ("tune", "demo"),
        ("eval", "demo"),
        ("imatrix", "demo"),
        ("imatrix", "demo", "--output", "here.gguf"),
        ("quantize", "demo", "--type", "Q4_K_M", "--requantize"),
        ("quantize", "demo", "--size", "9MiB", "--requantize"),
        ("prune", "demo", "--keep", "75%"),
    ],
)
def test_what_needs_it_is_refused_at_once(command: tuple[str, ...], no_home: Path, tmp_path: Path) -> None:
    done = run(*command, cwd=tmp_path)
    words = str(no_home), "export MOELOCAL_HOME=FOLDER"
    text = "\n".join(line for line in done.stderr.splitlines() if not line.startswith("No --text"))
    refused(type(done)(done.args, done.returncode, done.stdout, text), 1, *words)
    assert "chunk 1" not in done.stderr and len(text.splitlines()) == 2


@pytest.mark.parametrize(
    "command",
    [
        ("bench", "demo", "-p", "32", "-n", "0", "-r", "1", "--compare"),
        ("experts", "demo", "--ctx", "512"),
        ("run", "demo", "Hello", "--max-tokens", "2"),
        ("quantize", "demo", "--type", "Q4_K_M", "--requantize", "--dry-run"),
    ],
)
def test_what_only_remembers_works(command: tuple[str, ...]) -> None:
    done = run(*command)
    assert done.returncode == 0 and done.stdout and "Error" not in done.stderr, done.stderr
