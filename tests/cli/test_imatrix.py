"""`moelocal imatrix` as people use it: the real command in a process of its own, good input and bad."""

from __future__ import annotations

import errno
import json
import os
import resource
from pathlib import Path

import numpy as np
import pytest

from moelocal.build import imatrix_file
from moelocal.build.imatrix import Unfinished, most_bytes
from moelocal.build.imatrix_file import Imatrix, Importance, read
from moelocal.cli import imatrix as cli
from moelocal.errors import MoelocalError
from moelocal.model.header import read_header
from tests.cli.test_run import QUICK, refused, run
from tests.conftest import DEMO


def text_file(folder: Path) -> str:
    (folder / "text.txt").write_text(
        "Once upon a time there was a little wolf named Mia. The sum of 3 and 4 is 7.\n" * 30
    )
    return str(folder / "text.txt")


def test_a_matrix_is_made_and_found_by_quantize(tmp_path: Path, home: Path) -> None:
    done = run("imatrix", "demo", "--text", text_file(tmp_path), "--ctx", "128", *QUICK)
    made = home / "models" / "demo.imatrix.gguf"
    assert done.returncode == 0 and done.stdout.strip() == str(made)
    for told in ("32 tensors", "never chosen", "short text", "quantize"):
        assert told in done.stderr
    assert "blk.0.ffn_down_exps.weight" in read(made).entries
    assert 0.5 < made.stat().st_size / most_bytes(read_header(DEMO)) <= 1
    refused(run("imatrix", "demo", "--text", text_file(tmp_path)), 2, "exists already", "--force")
    for command in (
        ("quantize", str(made), "Q2_K"),
        ("prune", str(made), "--keep", "50%"),
        ("run", str(made), "Hello"),
    ):
        refused(run(*command), 2, "an importance matrix, not a model", "--imatrix")
    small = run("quantize", "demo", "Q2_K", "--requantize")
    assert small.returncode == 0 and "demo.imatrix.gguf is used" in small.stderr


def test_json(tmp_path: Path) -> None:
    output = tmp_path / "m.gguf"
    sizes = ["--ctx", "128", "--chunks", "3"]
    done = run("imatrix", "demo", "--text", text_file(tmp_path), *sizes, "--output", str(output), "--json", *QUICK)
    document = json.loads(done.stdout)
    assert (document["n_chunks"], document["chunk_size"], document["n_tokens"]) == (3, 128, 384)
    assert document["output"] == str(output) and document["entries"] == 32
    assert 0 < document["last_change"] < 1 and 0 < document["seen_share"] < 1
    assert sum(len(layer["experts"]) for layer in document["unseen"]) == round((1 - document["seen_share"]) * 64)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--text", "missing.txt"), "missing.txt"),
        (("--text", "short"), "less than one chunk"),
        (("--text", "binary"), "not UTF-8"),
        (("--output", "."), "is a folder"),
    ],
)
def test_bad_input(arguments: tuple[str, str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short").write_text("Hello.")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x01")
    done = run("imatrix", "demo", *arguments)
    refused(done, 2, told)
    assert "--ctx" not in done.stderr  # of so short a text no chunk can be made


def test_a_full_disk(tmp_path: Path) -> None:
    def small() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))

    words = ("--text", text_file(tmp_path), "--ctx", "128", "--output", str(tmp_path / "m.gguf"), *QUICK)
    done = run("imatrix", "demo", *words, preexec_fn=small)
    assert (done.returncode, done.stdout) == (1, "") and "Error: The disk is full: m.gguf" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a place without room that is always there")
def test_a_place_without_room_is_told_before_the_run() -> None:
    done = run("imatrix", "demo", "--output", "/proc/small.gguf", *QUICK)
    refused(done, 1, "small.gguf")
    assert "chunk" not in done.stderr


def test_what_cannot_be_written_is_kept(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk filled up while the text ran: the next run has nothing left to compute."""
    made = Imatrix({"w": Importance(np.ones((1, 8), np.float32), np.ones(1, np.float32))}, ("text",), 5, 64)
    unfinished, written = Unfinished("key"), imatrix_file.write

    def full(path: Path, imatrix: Imatrix) -> None:
        if path.parent == tmp_path:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written(path, imatrix)

    monkeypatch.setattr(imatrix_file, "write", full)
    monkeypatch.setattr("moelocal.build.imatrix.write", full)
    with pytest.raises(MoelocalError, match="disk is full") as caught:
        cli._write(tmp_path / "m.gguf", made, unfinished, force=False)
    assert caught.value.hint.startswith("What was collected is kept: the same command") and not list(tmp_path.iterdir())
    kept = unfinished.load()
    assert kept is not None and kept.n_chunks == 5
    monkeypatch.undo()
    monkeypatch.setenv("MOELOCAL_HOME", str(home))
    cli._write(tmp_path / "m.gguf", made, unfinished, force=False)
    assert imatrix_file.read(tmp_path / "m.gguf").n_chunks == 5 and unfinished.load() is None
