"""`moelocal prune` as people use it: the real command in a process of its own, good input and bad."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moelocal.model.header import read_header
from tests.cli.test_quantize import wait_for
from tests.cli.test_run import QUICK, refused, run

STORY = "Once upon a time there was a little wolf named Mia. The capital of France is Paris. The sum of 3 and 4 is 7.\n"


def text_file(folder: Path) -> str:
    (folder / "text.txt").write_text(STORY * 60)
    return str(folder / "text.txt")


def test_the_result_is_usable_by_its_name(tmp_path: Path, home: Path) -> None:
    done = run("prune", "demo", "--keep", "75%", "--text", text_file(tmp_path), "--eval", text_file(tmp_path), *QUICK)
    made = Path(done.stdout.strip().splitlines()[-1])
    assert done.returncode == 0 and made.parent == home / "models"
    for told in ("12 of 16 experts", "Chosen by impact on", "KL"):
        assert told in done.stdout + done.stderr
    assert read_header(made).metadata["llama.expert_count"] == 12
    assert run("run", made.name.removesuffix(".gguf"), "Hello", "--max-tokens", "3", *QUICK).returncode == 0
    refused(
        run("prune", "demo", "--keep", "75%", "--text", text_file(tmp_path), *QUICK), 2, "exists already", "--force"
    )


def test_json_and_dry_run(tmp_path: Path, home: Path) -> None:
    done = run("prune", "demo", "--size", "10MiB", "--text", text_file(tmp_path), "--dry-run", "--json", *QUICK)
    document = json.loads(done.stdout)
    assert document["bytes_out"] <= 10 << 20 < document["bytes_in"]
    assert not (home / "models").exists()


def test_fit_keeps_as_many_as_the_memory_holds(tmp_path: Path, home: Path) -> None:
    small, text = ("--ctx", "256", "--ram", "270MiB"), ("--text", text_file(tmp_path))
    made = json.loads(run("prune", "demo", "--fit", *small, *text, "--json", *QUICK).stdout)
    assert 2 < made["n_kept"] < 15
    more = run("prune", "demo", str(tmp_path / "more.gguf"), "--keep", str(made["n_kept"] + 1), *text, *QUICK)
    assert more.returncode == 0
    for model, fits in ((made["output"], True), (str(tmp_path / "more.gguf"), False), ("demo", False)):
        assert (json.loads(run("plan", model, *small, "--json").stdout)["disk_bytes"] == 0) == fits
    refused(
        run("prune", "demo", "--fit", *text, "--ctx", "256", "--ram", "261MiB", *QUICK),
        1,
        "Even with 2 experts in each layer the file has 3.0 MiB",
        "261 MiB of RAM cannot hold that",
        "quantize",
    )


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a place without room that is always there")
def test_a_place_without_room_is_told_before_the_run(home: Path) -> None:
    """Else a calibration of hours would be lost."""
    done = run("prune", "demo", "/proc/small.gguf", "--keep", "75%", *QUICK)
    refused(done, 1, "small.gguf")
    assert "experts stay" not in done.stderr


def test_too_short_a_text_for_eval_is_told_before_the_run(tmp_path: Path, home: Path) -> None:
    (tmp_path / "short.txt").write_text(STORY)
    done = run("prune", "demo", "--keep", "75%", "--eval", str(tmp_path / "short.txt"), *QUICK)
    refused(done, 2, "The text of --eval has 3", "1,024 are the least")
    assert not (home / "models").exists()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_an_end_while_it_writes_leaves_nothing(tmp_path: Path, signum: signal.Signals) -> None:
    """A pipe stands for the file half written: writing waits until somebody reads it."""
    text, folder = text_file(tmp_path), tmp_path / "out"
    folder.mkdir()
    program = (
        "import os; from moelocal.build import output\n"
        "plain = output._beside\n"
        "def beside(path, suffix): os.mkfifo(plain(path, suffix)); return plain(path, suffix)\n"
        "output._beside = beside\n"
        "from moelocal.cli.app import main; main()\n"
    )
    words = ["prune", "demo", str(folder / "p.gguf"), "--keep", "75%", "--text", text, *QUICK]
    pipe = subprocess.PIPE
    child = subprocess.Popen([sys.executable, "-c", program, *words], stdout=pipe, stderr=pipe, start_new_session=True)
    wait_for(lambda: bool(list(folder.iterdir())))
    time.sleep(0.3)  # until it waits
    os.killpg(child.pid, signum)
    child.communicate(timeout=20)
    assert child.returncode == (130 if signum == signal.SIGINT else 128 + signum)
    assert not list(folder.iterdir())


def test_in_a_folder_it_has_the_usual_name(tmp_path: Path) -> None:
    dry = ("--text", text_file(tmp_path), "--dry-run", "--json")
    done = run("prune", "demo", str(tmp_path), "--keep", "75%", *dry, *QUICK)
    assert json.loads(done.stdout)["output"] == str(tmp_path / "demo-e12-Q8_0.gguf")


def test_too_little_text_is_told(tmp_path: Path, home: Path) -> None:
    (tmp_path / "short.txt").write_text(STORY * 10)
    short = run("prune", "demo", "--keep", "75%", "--text", str(tmp_path / "short.txt"), "--dry-run", *QUICK)
    assert short.returncode == 0 and "partly chance" in short.stderr and "800 tokens or more" in short.stderr
    enough = run("prune", "demo", "--keep", "75%", "--text", text_file(tmp_path), "--dry-run", *QUICK)
    assert "partly chance" not in enough.stderr and "built-in" not in enough.stderr
    none = run("prune", "demo", "--keep", "75%", "--dry-run", *QUICK)
    assert none.returncode == 0 and "built-in passages" in none.stderr and "--text FILE" in none.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--keep", "5%"), "needs 2"),
        (("--keep", "100%"), "drop nothing"),
        (("--keep", "0"), "--keep"),
        (("--keep", "many"), "--keep"),
        (("--size", "1MiB"), "MiB"),
        (("--keep", "75%", "--size", "10MiB"), "--size"),
        ((), "--keep"),
    ],
)
def test_bad_input(arguments: tuple[str, ...], told: str, tmp_path: Path) -> None:
    done = run("prune", "demo", "--text", text_file(tmp_path), *arguments, *QUICK)
    refused(done, done.returncode, told)
    assert done.returncode in (1, 2)
