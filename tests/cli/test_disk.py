"""The program with less RAM than the model needs: the same answer; with too little, the figure."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from moelocal.engine.readahead import ReadAhead

CALM = ("--temperature", "0", "--ctx", "256", "--seed", "1")


def moelocal(*args: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "moelocal", *args], input=stdin, capture_output=True, text=True, timeout=120
    )


def test_less_ram_than_the_model_gives_the_same_answer() -> None:
    plan = json.loads(moelocal("plan", "demo", "--ram", "270MiB", "--ctx", "256", "--json").stdout)
    assert plan["disk_bytes"] > 0 and not plan["repack"]
    asked = "run", "demo", "What is the capital of France?", *CALM
    plain, streamed = moelocal(*asked), moelocal(*asked, "--ram", "270MiB")
    assert plain.returncode == streamed.returncode == 0, streamed.stderr
    assert plain.stdout and streamed.stdout == plain.stdout


@pytest.mark.skipif(not ReadAhead.is_possible(), reason="this system cannot be asked to read ahead")
def test_stats_tells_what_came_from_the_disk() -> None:
    chat = moelocal("chat", "demo", *CALM, "--ram", "270MiB", stdin="/stats\nHello\n/stats\n")
    assert chat.returncode == 0, chat.stderr
    assert "experts  streamed from the disk; nothing generated yet" in chat.stdout + chat.stderr
    assert "were in RAM when chosen" in chat.stdout + chat.stderr


@pytest.mark.skipif(not ReadAhead.is_possible(), reason="this system cannot be asked to read ahead")
def test_replacing_misses_is_named_lossy_and_told_when_it_does_nothing() -> None:
    chat = moelocal("chat", "demo", *CALM, "--ram", "270MiB", "--lossy-misses", "1", stdin="Hello\n/stats\n")
    assert chat.returncode == 0 and "choices were replaced (lossy)" in chat.stdout + chat.stderr
    for ram, told in (("270MiB", "LOSSY, as asked: up to 1 of a token's"), ("8GiB", "--lossy-misses changes nothing")):
        plan = moelocal("plan", "demo", "--json", "--ram", ram, "--lossy-misses", "1")
        assert any(reason.startswith(told) for reason in json.loads(plan.stdout)["reasons"]), plan.stdout


def test_a_system_that_cannot_read_ahead_says_so_and_answers() -> None:
    program = (
        "from moelocal.engine.readahead import ReadAhead; ReadAhead.is_possible = staticmethod(lambda: False);"
        "from moelocal.__main__ import main; main()"
    )
    asked = "run", "demo", "What is the capital of France?", *CALM
    answers = [
        subprocess.run([sys.executable, "-c", program, *asked, *less], capture_output=True, text=True, timeout=120)
        for less in ((), ("--ram", "270MiB"))
    ]
    assert answers[0].stdout == answers[1].stdout != ""
    assert ["cannot be asked to read ahead" in answer.stderr for answer in answers] == [False, True]


def test_too_little_for_what_every_token_uses() -> None:
    run = moelocal("run", "demo", "Hello", "--ram", "260MiB", "--ctx", "256")
    assert run.returncode == 1 and run.stdout == ""
    assert "Every token uses" in run.stderr and "--ram" in run.stderr and "Traceback" not in run.stderr
