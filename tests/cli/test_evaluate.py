"""`moelocal eval` as people use it, against figures of llama-perplexity itself, interrupted, and with bad input."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moelocal.errors import MoelocalError
from moelocal.measure.checkpoint import Checkpoint
from tests.cli.test_run import command, refused, run
from tests.conftest import DEMO, ROOT

Tiny = Callable[[str], Path]
TEXT = DEMO.with_name("demo.txt")
NATIVE = json.loads((ROOT / "tests/data/eval_native.json").read_text())["figures"]
QUICK = ["--ctx", "64", "--chunks", "3", "--threads", "1"]
_TIMES = ("seconds", "arithmetic_share")


def evaluate(*args: str | Path, **options: Any) -> dict[str, Any]:
    done = run("eval", *map(str, args), "--json", **options)
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def native(perplexity: float) -> dict[str, Any]:
    """What llama-perplexity printed with the kernels nearest to this processor's, going by the demo's perplexity."""
    figures: dict[str, Any] = min(NATIVE, key=lambda one: abs(one["demo"]["perplexity"] - perplexity))
    return figures


def result(document: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in document.items() if name not in _TIMES}


@pytest.fixture(scope="session")
def q4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo quantized again by llama.cpp, as tests/data/eval_native.json tells."""
    from moelocal.engine import llama

    path, low = tmp_path_factory.mktemp("q4") / "q4.gguf", llama.api()
    params = low.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize = 15, True  # LLAMA_FTYPE_MOSTLY_Q4_K_M
    assert low.llama_model_quantize(os.fsencode(DEMO), os.fsencode(path), ctypes.byref(params)) == 0
    return path


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's saved logits: three chunks of 64."""
    path = tmp_path_factory.mktemp("saved") / "demo.logits"
    done = subprocess.run(command("eval", "demo", "--text", str(TEXT), *QUICK, "--save-logits", str(path)))
    assert done.returncode == 0
    return path


def test_perplexity_is_llama_perplexitys() -> None:
    done = run("eval", "demo", "--json")
    found = json.loads(done.stdout)
    theirs = native(found["perplexity"])
    assert found["perplexity"] == pytest.approx(theirs["demo"]["perplexity"], rel=2e-3)
    assert found["perplexity_stderr"] == pytest.approx(theirs["demo"]["perplexity_stderr"], rel=1e-2)
    assert (found["n_tokens"], found["n_chunks"], found["n_ctx"]) == (21 * 255, 21, 512)
    assert found["reference"] is found["kl_mean"] is found["kl_p99"] is found["top1_agreement"] is None
    running = dict(part[1:].split("]") for part in done.stderr.split("\n")[-2].split(",") if part)
    for chunk, value in theirs["demo_after"].items():
        assert float(running[chunk]) == pytest.approx(value, rel=5e-3)


def test_divergence_is_llama_perplexitys(q4: Path) -> None:
    found = evaluate(q4, "--reference", "demo", "--text", TEXT)
    theirs = native(found["reference_perplexity"])
    assert found["perplexity"] == pytest.approx(theirs["q4"]["perplexity"], rel=2e-3)
    assert found["top1_agreement"] == pytest.approx(theirs["q4"]["top1_agreement"], rel=2e-3)
    for name, value in theirs["q4"].items():
        assert found[name] == pytest.approx(value, rel=2e-2, abs=2e-6), name
    assert found["reference"] == "demo"
    assert found["reference_perplexity"] == pytest.approx(theirs["demo"]["perplexity"], rel=2e-3)


def test_a_model_its_saved_logits_and_one_after_the_other_give_the_same(q4: Path, saved: Path) -> None:
    beside = result(evaluate(q4, "--reference", "demo", "--text", TEXT, *QUICK))
    from_file = result(evaluate(q4, "--reference", saved, "--threads", "1"))
    assert {**from_file, "reference": "demo"} == beside
    small = "276MiB"  # with the program, one of them
    done = run("eval", str(q4), "--reference", "demo", "--text", str(TEXT), *QUICK, "--ram", small, "--json")
    assert "the reference runs first" in done.stderr
    after = json.loads(done.stdout)
    for name in ("perplexity", "reference_perplexity", "kl_mean", "kl_p99", "top1_agreement"):
        assert after[name] == pytest.approx(beside[name], rel=0.05), name  # weights mapped: other kernels
    assert list(Path(os.environ["MOELOCAL_HOME"], "eval").iterdir()) == []


def test_the_page_ends_with_what_it_means(q4: Path, saved: Path) -> None:
    done = run("eval", str(q4), "--reference", str(saved))
    assert done.stdout.splitlines()[0] == "Text           3 chunks of 64 tokens, 93 scored"
    assert "of the reference's first choices" in done.stdout.splitlines()[-1]
    alone = run("eval", "demo", *QUICK).stdout.splitlines()
    assert alone[1].startswith("Perplexity ") and "as unsure of each next token" in alone[-1]


def test_fewer_experts_and_a_coarser_cache(saved: Path) -> None:
    base = ["--reference", str(saved), "--threads", "1"]
    same, fewer, coarse = (
        evaluate("demo", *base, *more) for more in ([], ["--experts-used", "1"], ["--kv-type", "q4_0"])
    )
    assert same["kl_mean"] == pytest.approx(0, abs=1e-4) and same["top1_agreement"] == 1
    assert same["perplexity_ratio"] == pytest.approx(1, abs=1e-6)
    assert fewer["kl_mean"] > 0.1 and fewer["experts_used"] == 1
    assert 0.001 < coarse["kl_mean"] < fewer["kl_mean"] and coarse["kv_type"] == "q4_0"


@pytest.mark.parametrize("geometry", ["tiny-qwen3moe", "tiny-gptoss", "tiny-dense"])
def test_other_models_and_small_batches(geometry: str, tiny: Tiny) -> None:
    model = tiny(geometry)
    options = ["--text", str(TEXT), *QUICK]
    whole, small = evaluate(model, *options), evaluate(model, *options, "--ubatch", "20")
    assert whole["n_tokens"] == small["n_tokens"] == 93
    # random weights: the least difference sends tokens to other experts, in llama-perplexity alike
    assert small["perplexity"] == pytest.approx(whole["perplexity"], rel=0.1)
    alike = evaluate(model, "--reference", model, *options, "--ubatch", "20")
    assert alike["top1_agreement"] == 1 and abs(alike["kl_mean"]) < 1e-4


def start(home: Path, *args: str | Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command("eval", *map(str, args)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
    )


def wait_for_chunks(home: Path, n: int) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        for path in (home / "eval").glob("*.json"):
            if json.loads(path.read_text())["n_done"] >= n:
                return
        time.sleep(0.002)
    raise AssertionError("no chunk was done")


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("eval", "Tokens of a chunk of the text. [512"),
        ("imatrix", "Tokens of a chunk of the text. [512]"),
        ("experts", "Tokens read at once"),
    ],
)
def test_ctx_is_explained_as_the_chunk_it_is(command: str, told: str) -> None:
    assert told in " ".join(run(command, "--help").stdout.split())


def test_a_terminal_does_not_echo_into_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ^C of a terminal pushed a full line up, where it stayed."""
    from contextlib import contextmanager

    from moelocal.cli import evaluating, render_eval
    from moelocal.measure.checkpoint import State
    from moelocal.measure.perplexity import Layout

    events: list[str] = []

    @contextmanager
    def quiet() -> Iterator[None]:
        events.append("quiet")
        yield
        events.append("loud")

    bar = SimpleNamespace(close=lambda: events.append("closed"))
    monkeypatch.setattr(evaluating, "quiet_keys", quiet)
    monkeypatch.setattr(evaluating, "is_dumb", lambda: False)
    monkeypatch.setattr(render_eval, "Bar", lambda *_: bar)
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda: True))
    with evaluating._progress(Layout(512, 3), State(), verbose=False):
        pass
    assert events == ["quiet", "closed", "loud"]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_interrupted_it_goes_on_and_gives_the_same(how: signal.Signals, q4: Path, home: Path, tmp_path: Path) -> None:
    options: list[str | Path] = [q4, "--reference", "demo", "--text", TEXT, "--ctx", "256", "--threads", "1"]
    first = tmp_path / "first.logits"
    whole = evaluate(*options, "--save-logits", first)
    second = tmp_path / "second.logits"
    options += ["--save-logits", second]
    process = start(home, *options)
    wait_for_chunks(home, 5)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in [*map(int, children)][:1] or [process.pid]:  # the one that computes
        os.kill(pid, how)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (130 if how == signal.SIGINT else 1) and b"Traceback" not in err, err
    done = run("eval", *map(str, options), "--json")
    assert "Going on after chunk" in done.stderr
    assert result(json.loads(done.stdout)) == result(whole)
    assert second.read_bytes() == first.read_bytes()
    assert list((home / "eval").iterdir()) == []


def test_the_same_evaluation_twice_at_once(home: Path) -> None:
    process = start(home, "demo", "--text", TEXT, "--ctx", "256", "--threads", "1")
    wait_for_chunks(home, 1)
    done = run("eval", "demo", "--text", str(TEXT), "--ctx", "256", "--threads", "1")
    process.communicate(timeout=60)
    refused(done, 1, "already running")


def test_a_full_disk_is_told_with_its_folder(home: Path) -> None:
    """Python writes what is left when a file is closed: that must not hide what was told before."""
    folder = home / "eval"
    folder.mkdir()
    os.utime("/dev/full")  # a file that nobody touched for weeks would be removed
    (folder / "key.tokens").symlink_to("/dev/full")
    with pytest.raises(MoelocalError) as caught, Checkpoint("key", compares=False) as checkpoint:
        checkpoint.state.tally.add(np.ones(8))
        checkpoint.keep(np.ones(8), None)
    assert str(home) in caught.value.message and "MOELOCAL_HOME" in caught.value.hint


def test_a_text_that_is_none(tmp_path: Path) -> None:
    short, junk, nul = tmp_path / "short", tmp_path / "junk", tmp_path / "nul"
    short.write_text("Once upon a time there was a little fox. " * 20)
    junk.write_bytes(bytes(range(256)) * 50)
    nul.write_bytes(b"words\0words" * 500)
    refused(run("eval", "demo", "--text", str(short)), 2, "1,024 are the least", "--ctx 64")
    tiny_text = run("eval", "demo", "--text", "-", stdin="Hi you.")
    refused(tiny_text, 2, "moelocal eval demo --text FILE")
    assert "--ctx" not in tiny_text.stderr
    refused(run("eval", "demo", "--text", str(junk)), 2, "not UTF-8")
    refused(run("eval", "demo", "--text", str(nul)), 2, "binary")
    refused(run("eval", "demo", "--text", str(tmp_path / "none")), 2, "cannot be read")
    refused(run("eval", str(DEMO)), 2, "no text", "wiki.test.raw")
    refused(run("eval", "demo", "--text", "-", stdin=bytes([0xFF, 0xFE])), 2, "not UTF-8")
    assert run("eval", "demo", *QUICK, stdin=TEXT.read_text()).stdout == run("eval", "demo", *QUICK).stdout


def test_a_reference_that_is_none(tiny: Tiny, saved: Path, tmp_path: Path) -> None:
    other = str(tiny("tiny-qwen3moe"))
    refused(run("eval", other, "--reference", "demo", "--text", str(TEXT)), 2, "another vocabulary")
    refused(run("eval", other, "--reference", str(saved)), 2, "another vocabulary")
    text = tmp_path / "other.txt"
    text.write_text("The capital of France is Paris. " * 100)
    refused(run("eval", "demo", "--reference", str(saved), "--text", str(text)), 2, "another text")
    refused(run("eval", "demo", "--reference", str(saved), "--ctx", "128"), 2, "chunks of 64 tokens")
    part = tmp_path / "part.logits"
    part.write_bytes(saved.read_bytes()[:200_000])
    refused(run("eval", "demo", "--reference", str(part)), 1, "cut off", "--chunks 1")
    assert run("eval", "demo", "--reference", str(part), "--chunks", "1").returncode == 0
    refused(run("eval", "demo", "--reference", str(tmp_path / "none.gguf")), 1, "none.gguf")


@pytest.mark.parametrize("filler", [0, 0x41])
def test_saved_logits_with_a_hole(filler: int, saved: Path, tmp_path: Path) -> None:
    """A page that never reached the disk, inside of a row: its numbers look possible one by one."""
    data, broken = bytearray(saved.read_bytes()), tmp_path / "hole.logits"
    data[-16384:-8192] = bytes([filler]) * 8192
    broken.write_bytes(data)
    done = run("eval", "demo", "--reference", str(broken))
    assert done.returncode == 1 and not done.stdout
    for word in ("damaged", "chunk 3", "--save-logits"):
        assert word in done.stderr.split("Error: ")[1]


def test_settings_that_cannot_be(tiny: Tiny, tmp_path: Path) -> None:
    refused(run("eval", "demo", "--experts-used", "17"), 2, "16 experts")
    refused(run("eval", str(tiny("tiny-dense")), "--text", str(TEXT), "--experts-used", "2"), 2, "not a Mixture")
    place = tmp_path / "no" / "file"
    refused(run("eval", "demo", "--text", str(TEXT), *QUICK, "--save-logits", str(place)), 2, "cannot be written")
    refused(run("eval", "demo", "--save-logits", str(tmp_path)), 2, "it is a folder")


def test_rounding_makes_no_divergence_negative() -> None:
    from moelocal.cli.evaluating import nats

    assert (nats(-3e-8), nats(0.25), nats(-0.02, 5)) == ("0.000000", "0.250000", "-0.02000")
