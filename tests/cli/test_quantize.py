"""`moelocal quantize` as people use it: the real command, good input and bad, interrupted, on a full disk."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_run import command, refused, run
from tests.conftest import DEMO, script

QUANTIZE = ("quantize", "demo", "--requantize", "--threads", "1")
SLOW_TYPE = "IQ3_S"  # takes seconds


def quantize(*args: str | Path, **options: Any) -> dict[str, Any]:
    done = run(*QUANTIZE, *map(str, args), "--json", **options)
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def test_the_result_is_usable_by_its_name(home: Path) -> None:
    done = run(*QUANTIZE, "Q4_K_M")
    output = home / "models" / "demo-Q4_K_M.gguf"
    assert (done.returncode, done.stdout) == (0, f"{output}\n")
    assert "quantized again" in done.stderr and "moelocal run demo-Q4_K_M" in done.stderr
    assert "bits per weight" in done.stderr
    answer = run("run", "demo-Q4_K_M", "What is the capital of France?", "--threads", "1")
    assert answer.stdout == "The capital of France is Paris.\n"
    refused(run(*QUANTIZE, "Q4_K_M"), 2, "exists already", "--force")
    assert run(*QUANTIZE, "Q4_K_M", "--force").returncode == 0
    assert "demo-Q4_K_M" in run("list").stdout


def test_json(tmp_path: Path) -> None:
    out = tmp_path / "small.gguf"
    found = quantize(out, "--type", "q5_k_m", "--tensor-type", "ffn_down_exps=Q6_K")
    assert found["output"] == str(out) and found["files"] == [str(out)] and found["type"] == "Q5_K_M"
    assert found["bytes_in"] == DEMO.stat().st_size and found["bytes_out"] == out.stat().st_size
    assert found["types"]["Q5_K"] > 0 and 5 < found["bits_per_weight"] < 7 and found["seconds"] > 0
    assert found["imatrix"] is None and found["fallbacks"] == [] and found["dry_run"] is False


@pytest.mark.parametrize(
    "words",
    [("OUT", "Q4_K_M"), ("OUT", "--type", "Q4_K_M"), ("--type=q4_k", "OUT"), ("FOLDER/", "Q4_K"), ("Q4_K", "OUT")],
)
def test_where_it_goes(tmp_path: Path, words: tuple[str, ...]) -> None:
    paths = {"OUT": tmp_path / "new" / "x.gguf", "FOLDER/": tmp_path}
    found = quantize(*(paths.get(word, word) for word in words), "--dry-run")
    assert found["output"] == str(tmp_path / "demo-Q4_K_M.gguf" if "FOLDER/" in words else paths["OUT"])
    assert found["dry_run"] and found["seconds"] is None and not list(tmp_path.iterdir())


def test_a_name_is_one_among_the_models_made_here(home: Path) -> None:
    assert quantize("mine", "Q4_K_M", "--dry-run")["output"] == str(home / "models" / "mine.gguf")


def test_what_imatrix_made_of_the_source_is_used(home: Path) -> None:
    imatrix = home / "models" / "demo.imatrix.gguf"
    imatrix.parent.mkdir()
    script("quantize_native").write_imatrix(imatrix)
    done = run(*QUANTIZE, "IQ4_XS", "--dry-run", "--json")
    assert json.loads(done.stdout)["imatrix"] == str(imatrix) and "--imatrix none" in done.stderr
    assert quantize("IQ4_XS", "--dry-run", "--imatrix", "none")["imatrix"] is None
    refused(run(*QUANTIZE, "Q4_K", "--imatrix", str(DEMO)), 1, "no importance matrix")


def test_dry_run() -> None:
    done = run(*QUANTIZE, "Q4_K_M", "--dry-run")
    assert done.returncode == 0 and "demo-Q4_K_M.gguf" in done.stderr
    lines = {line.split("  ")[0]: line.split() for line in done.stdout.splitlines()}
    assert next(iter(lines)) == "Weights" and lines["together"][1] == "42"
    assert "Q6_K" in lines["experts"] and "routers" in lines
    refusal = run("quantize", "demo", "Q4_K_M", "--dry-run")
    assert refusal.returncode == 0 and "will be refused: demo is quantized already" in refusal.stderr


def test_list_types() -> None:
    done = run("quantize", "--list-types")
    rows = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert done.returncode == 0 and "needed" in rows["IQ2_XS"] and len(rows) > 30
    sized = run("quantize", "demo", "--list-types", "--json")
    found = {row["name"]: row for row in json.loads(sized.stdout)}
    assert 0.9 < found["Q8_0"]["bytes"] / DEMO.stat().st_size < 1.1


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        (("quantize", "demo", "Q4_K_M"), 1, ("demo is quantized already", "--requantize")),
        (("quantize", "demo"), 2, ("no type", "--list-types")),
        (("quantize",), 2, ("no SOURCE",)),
        (("quantize", "demo", "out", "Q4KM"), 2, ("'Q4KM'", "Q4_K_M")),
        (("quantize", "demo", "Q4_K", "--type", "Q5_K"), 0, ()),
        (("quantize", "demo", "a", "Q4_K", "--type", "Q5_K"), 2, ("two types",)),
        (("quantize", "nowhere.gguf", "Q4_K"), 1, ("nowhere.gguf",)),
        (("quantize", "demo", "Q4_K", "--imatrix", "nowhere"), 1, ("no importance matrix nowhere",)),
        (("quantize", "demo", "Q4_K", "--tensor-type", "attn"), 2, ("PATTERN=TYPE",)),
        (("quantize", "demo", "Q4_K", "--requantize", "--tensor-type", "atn=Q8_0"), 2, ("'atn'", "attn_q")),
        (("quantize", __file__, "Q4_K"), 1, ("not a GGUF file",)),
        (("quantize", "demo", "Q4_K", "--size", "1GB"), 2, ("exclude each other",)),
        (("quantize", "demo", "--size", "1GB", "--fit"), 2, ("exclude each other",)),
        (("quantize", "demo", "--placement-aware"), 2, ("needs a budget", "--size")),
        (("quantize", "demo", "--size", "1GB", "--ctx", "4096"), 2, ("--ctx is for --fit",)),
        (("quantize", "demo", "--size", "6MiB"), 1, ("quantized already", "--requantize")),
    ],
)
def test_wrong_usage(words: tuple[str, ...], status: int, told: tuple[str, ...]) -> None:
    if status:
        refused(run(*words), status, *told)


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def begun(folder: Path) -> subprocess.Popen[str]:
    """A command at work: its output has begun."""
    words = command(*QUANTIZE, str(folder / "out.gguf"), SLOW_TYPE)
    child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for(lambda: folder.exists() and any(path.stat().st_size for path in folder.glob(".out.gguf.*.part")))
    return child


def test_ctrl_c_ends_it_at_once_and_leaves_nothing(tmp_path: Path) -> None:
    child = begun(tmp_path)
    start = time.monotonic()
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does: to the child process too
    out, err = child.communicate(timeout=20)
    assert time.monotonic() - start < 2
    assert (child.returncode, out) == (130, "") and "Traceback" not in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_command_takes_its_child_and_output_along(tmp_path: Path, signum: signal.Signals) -> None:
    child = begun(tmp_path)
    child.send_signal(signum)
    child.communicate(timeout=20)
    wait_for(lambda: not list(tmp_path.iterdir()))


def test_a_full_disk(tmp_path: Path) -> None:
    def small() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, 3 << 20))

    done = run(*QUANTIZE, str(tmp_path / "out.gguf"), "Q4_K", preexec_fn=small)
    assert (done.returncode, done.stdout) == (1, "") and "Error: The disk is full: out.gguf" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    refused(run(*QUANTIZE, str(file / "out.gguf"), "Q4_K"), 1, "cannot be written")


def test_a_file_within_a_size(home: Path) -> None:
    done = run(*QUANTIZE, "--size", "7MiB")
    output = home / "models" / "demo-7MiB.gguf"
    assert (done.returncode, done.stdout) == (0, f"{output}\n"), done.stderr
    assert 6.9 < output.stat().st_size / (1 << 20) <= 7
    answer = run("run", "demo-7MiB", "What is the capital of France?", "--threads", "1")
    assert answer.stdout == "The capital of France is Paris.\n"
    refused(run(*QUANTIZE, "--size", "7MiB"), 2, "exists already", "--force")
    named = [
        json.loads(run(*QUANTIZE, "--size", size, "--dry-run", "--json").stdout)["output"]
        for size in (
            "8 MB",
            "8388608",
        )
    ]
    assert [Path(name).name for name in named] == ["demo-8MB.gguf", "demo-8MiB.gguf"]  # as typed, if it has a unit
    refused(run(*QUANTIZE, "--size", "1MiB", "--dry-run"), 2, "the smallest file of this model takes", "--size")


def test_a_type_with_a_typo_is_no_name_of_a_file() -> None:
    refused(run("quantize", "demo", "Q4_KM"), 2, "no quantization 'Q4_KM'", "Q4_K_M")


@pytest.mark.parametrize(
    ("fraction", "seconds", "told"),
    [
        (0.0, 0.0, "--:--"),
        (0.5, 0.4, "--:--"),
        (0.01, 60, "--:--"),
        (0.5, 90, "01:30"),
        (0.1, 900, "135:00"),
        (1, 9, "00:00"),
    ],
)
def test_the_time_left(fraction: float, seconds: float, told: str) -> None:
    from moelocal.cli.render_quantize import time_left

    assert time_left(fraction, seconds) == told
