"""`moelocal experts` as people use it: the real command in a process of its own, good input and bad."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

from moelocal.model.header import read_header
from moelocal.model.usage import identity, load_usage, profile_file
from tests.cli.test_run import QUICK, command, refused, run
from tests.conftest import DEMO

Tiny = Callable[[str], Path]
CODE = "def add(a, b):\n    return a + b\n\nfor i in range(10):\n    print(add(i, i))\n" * 6
STORY = "Once upon a time there was a little wolf named Mia. One day Mia walked to the old bridge. " * 6


def files(folder: Path) -> tuple[str, str]:
    (folder / "story.txt").write_text(STORY)
    (folder / "code.py").write_text(CODE)
    return str(folder / "story.txt"), str(folder / "code.py")


def test_the_built_in_passages(home: Path) -> None:
    done = run("experts", "demo", *QUICK)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and "Kept as the profile" in done.stderr
    assert str(profile_file(identity(read_header(DEMO), [DEMO]))) in done.stderr
    assert "4 MoE layers, 16 experts each, 2 per token" in lines[0] and "prose" in lines[1]
    assert max(map(len, lines)) <= 80 and "\x1b" not in done.stdout
    for text in ("LRU", "times the mean", "How far apart", "mathematics", "German"):
        assert text in done.stdout
    usage = load_usage(identity(read_header(DEMO), [DEMO]))
    assert usage is not None and usage.model == "demo" and len(usage.layers) == 4
    assert all(sum(layer.counts) == 2 * usage.n_tokens == sum(layer.reuse) for layer in usage.layers)
    assert all(sum(layer.mass) == pytest.approx(usage.n_tokens, rel=1e-3) for layer in usage.layers)


def test_json(tmp_path: Path) -> None:
    story, _ = files(tmp_path)
    done = run("experts", "demo", "--text", story, "--json", *QUICK)
    document = json.loads(done.stdout)
    assert (document["model"], document["n_layers"], document["n_experts"], document["n_experts_used"]) == (
        "demo",
        4,
        16,
        2,
    )
    assert [len(row) for row in document["counts"]] == [16] * 4
    assert all(sum(row) == 2 * document["n_tokens"] for row in document["counts"])
    for layer, row in zip(document["layers"], document["counts"], strict=True):
        assert {"layer", "entropy", "max_share", "unused", "top_half_share"} <= set(layer)
        assert layer["max_share"] == pytest.approx(max(row) / sum(row), abs=1e-4)
        assert layer["unused"] == [i for i, n in enumerate(row) if n == 0]
        assert layer["top_half_share"] == pytest.approx(sum(sorted(row)[8:]) / sum(row), abs=1e-4)
    assert list(document["lru_hits"].values()) == sorted(document["lru_hits"].values())
    assert document["interrupted"] is False and document["differences"] == []


def test_a_text_from_a_pipe_is_the_same_in_chunks(tmp_path: Path) -> None:
    whole = json.loads(run("experts", "demo", "--json", *QUICK, stdin=STORY).stdout)
    parts = json.loads(run("experts", "demo", "--text", "-", "--json", "--ctx", "64", *QUICK, stdin=STORY).stdout)
    assert whole["texts"][0]["name"] == "standard input"
    n_chunks = -(-whole["n_tokens"] // 64)
    assert whole["n_tokens"] <= parts["n_tokens"] <= whole["n_tokens"] + n_chunks + 1  # each may have a begin token


def test_two_texts_compared(tmp_path: Path) -> None:
    both = files(tmp_path)
    page = run("experts", "demo", "--compare", *both, *QUICK).stdout
    assert "Difference of the two texts" in page and "story.txt" in page and "chance" in page
    assert "Kept as the profile" in run("experts", "demo", "--compare", *both, *QUICK).stderr
    [pair] = json.loads(run("experts", "demo", "--compare", *both, "--json", *QUICK).stdout)["differences"]
    assert (pair["a"], pair["b"], len(pair["layers"])) == ("story.txt", "code.py", 4)
    assert 0.05 < pair["mean_bits"] <= 1 and pair["chance_bits"] < pair["mean_bits"]


def test_a_short_text_replaces_no_profile(home: Path) -> None:
    done = run("experts", "demo", *QUICK, stdin=STORY[:300])
    assert done.returncode == 0 and "Not kept" in done.stderr and "times the mean" in done.stdout
    assert not (home / "profiles").exists()


def test_the_picture(tmp_path: Path) -> None:
    picture = tmp_path / "experts.svg"
    done = run("experts", "demo", "--svg", str(picture), *QUICK)
    assert done.returncode == 0 and str(picture) in done.stderr
    boxes = [one for one in ElementTree.parse(picture).iter() if one.tag.endswith("rect")]
    assert len(boxes) >= 4 * 16


@pytest.mark.parametrize("width", [30, 40, 60, 80, 200])
def test_the_page_fits_the_window(width: int, tiny: Tiny) -> None:
    env = {**os.environ, "COLUMNS": str(width)}
    for model in ("demo", str(tiny("tiny-deepseek2-groups"))):
        done = run("experts", model, *QUICK, env=env)
        assert done.returncode == 0 and max(map(len, done.stdout.splitlines())) <= max(40, width)


def test_an_encoding_without_blocks() -> None:
    done = run("experts", "demo", *QUICK, env={**os.environ, "PYTHONIOENCODING": "ascii:replace", "PYTHONUTF8": "0"})
    assert done.returncode == 0 and "?" not in done.stdout


def test_bad_texts(tmp_path: Path) -> None:
    for name, data, words in (
        ("empty", b"  \n", "empty"),
        ("binary", bytes(range(256)) * 9, "not UTF-8"),
        ("nul", b"a\0b" * 99, "binary data"),
        ("short", b"Hello there.", "32 are the least"),
    ):
        (tmp_path / name).write_bytes(data)
        status = 2
        refused(run("experts", "demo", "--text", str(tmp_path / name), *QUICK), status, words)
    refused(run("experts", "demo", "--text", str(tmp_path / "none"), *QUICK), 2, "cannot be read")
    refused(run("experts", "demo", "--text", "-", *QUICK, stdin=""), 2, "empty")
    refused(run("experts", "demo", *QUICK, stdin=b"\xff\xfe\x00" * 50), 2, "UTF-8")


def test_bad_usage(tmp_path: Path, tiny: Tiny) -> None:
    story, code = files(tmp_path)
    refused(run("experts", "demo", "--text", story, "--compare", story, code), 2, "exclude each other")
    refused(run("experts", "demo", "--compare", story, story), 2, "twice")
    refused(run("experts", "demo", "--svg", str(tmp_path / "no/x.svg")), 2, "folder that exists")
    refused(run("experts", str(tiny("tiny-dense"))), 2, "dense model", "moelocal list")
    refused(run("experts", str(tmp_path / "none.gguf")), 1, "none.gguf")


def test_a_home_that_cannot_be_written(home: Path) -> None:
    (home / "profiles").write_text("in the way")
    done = run("experts", "demo", *QUICK)
    assert done.returncode == 0 and "could not be kept" in done.stderr and "4 MoE layers" in done.stdout


def test_ctrl_c_shows_what_was_seen(tmp_path: Path, home: Path) -> None:
    (tmp_path / "long.txt").write_text(STORY * 2000)
    process = subprocess.Popen(
        command("experts", "demo", "--text", str(tmp_path / "long.txt"), *QUICK),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    time.sleep(4)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert "times the mean" in out and "Interrupted" in err and "Traceback" not in err
    assert not (home / "profiles").exists()


def test_more_experts_than_columns() -> None:
    from moelocal.cli.render_experts import cells

    assert cells([1] * 16, 54) == [1.0] * 16
    assert len(cells([1] * 128, 54)) == 43 and len(cells([1] * 512, 54)) == 52
    assert cells([4, 0, 0, 0], 2) == [2.0, 0.0] and cells([0, 0], 2) == [0.0, 0.0]
