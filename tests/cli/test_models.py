"""`list`, `show` and `rm` as people use them: the real command in a process of its own."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len

from moelocal.cli.listing import _offers
from moelocal.cli.render_models import show_offers
from moelocal.machine.described import parse_machine
from moelocal.model.catalog import entries, facts_of
from moelocal.model.client import hub_utils
from moelocal.plan.outcome import outcome, sentence
from moelocal.plan.planner import make_plan
from moelocal.plan.request import PlanRequest
from tests.conftest import DEMO
from tests.hub_server import HubServer
from tests.model.stores import Places, places, shards, tiny_model

__all__ = ["places"]


def run(*args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "moelocal", *args],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=60,
        **options,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def refused(done: subprocess.CompletedProcess[str], status: int, *words: str) -> None:
    assert (done.returncode, done.stdout) == (status, ""), done
    for word in words:
        assert word in done.stderr, done.stderr


def listed() -> list[dict[str, Any]]:
    done = run("list", "--json")
    assert done.returncode == 0
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_list_json(places: Places, tmp_path: Path) -> None:
    link = places.cached("o/r", "m-Q4_K_M.gguf", tiny_model())
    for file, data in shards(tmp_path, "big").items():
        places.cached("o/split", file, data)
    rows = listed()
    assert [row["name"] for row in rows] == ["demo", "o/r:Q4_K_M", "o/split/big-00001-of-00003.gguf"]
    assert rows[0]["path"] == str(DEMO) and rows[0]["moe"]
    assert rows[1] == {
        "name": "o/r:Q4_K_M",
        "path": str(link),
        "bytes": len(tiny_model()),
        "quant": "Q4_K_M",
        "arch": "qwen3moe",
        "moe": True,
    }
    assert rows[2]["bytes"] == sum(file.stat().st_size for file in (tmp_path).glob("big-*"))


def test_list_tells_what_it_leaves_out(places: Places) -> None:
    places.cached("o/cut", "m-Q4_K_M.gguf", tiny_model()[:-10])
    places.cached("o/web", "m-Q4_K_M.gguf", b"<!doctype html>")
    places.cached("o/half", "m-Q4_K_M.gguf", tiny_model(seed=1))
    (places.hub / "models--o--half" / "blobs" / ("a" * 64 + ".incomplete")).write_bytes(b"x" * (3 << 20))
    begun = places.hub / "models--o--begun-GGUF" / "blobs"
    begun.mkdir(parents=True)
    (begun / ("a" * 64 + ".incomplete")).write_bytes(b"x" * (1 << 20))
    places.cached("o/vision", "mmproj-F16.gguf", tiny_model(seed=2))
    done = run("list")
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["Model", "demo", "o/half:Q4_K_M"]
    assert "web page" in done.stderr and "ends before" in done.stderr
    assert "o/half is downloaded in part (3.0 MiB)" in done.stderr and "mmproj" not in done.stderr
    assert "o/begun-GGUF is downloaded in part" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not allow such names")
def test_odd_file_names(places: Places) -> None:
    odd = [b"\xff-Q4_K_M", "ü 日本".encode(), b"esc\x1b[31m", b"new\nline", b"a:b", b"it's"]
    for seed, name in enumerate(odd):
        places.made(os.fsdecode(name) + ".gguf", tiny_model(seed=seed))
    rows = listed()
    assert sorted(os.fsencode(row["name"]) for row in rows) == sorted([b"demo", *odd])
    done = run("list")
    assert "\x1b" not in done.stdout and len(done.stdout.splitlines()) == 8
    for name in odd:
        assert run("show", os.fsdecode(name)).returncode == 0
    assert run("rm", "it's", "--yes").returncode == 0


def test_an_empty_disk_says_where_to_look(places: Places) -> None:
    done = run("list")
    assert done.stdout.splitlines()[1].startswith("demo") and "moelocal list --all" in done.stderr


def test_the_demo_by_its_place_in_a_cache_runs(places: Places) -> None:
    places.cached("o/demo-GGUF", "demo-Q8_0.gguf", DEMO.read_bytes())
    places.in_ollama("registry.ollama.ai/library/toy/latest", DEMO.read_bytes())
    for name in ("o/demo-GGUF", "toy"):
        done = run("run", name, "What is the capital of France?", "--threads", "1")
        assert done.stdout == "The capital of France is Paris.\n", done.stderr


def test_a_file_of_the_same_name_is_told(places: Places) -> None:
    places.cached("o/r", "m-Q8_0.gguf", DEMO.read_bytes())
    Path("o").mkdir()
    shutil.copy(DEMO, "o/r")
    done = run("plan", "o/r", "--machine", "ram=8GiB", "--json")
    assert done.returncode == 0 and "taken as the file of that name" in done.stderr


def test_list_all_json(places: Places) -> None:
    places.cached("ggml-org/gpt-oss-20b-GGUF", "gpt-oss-20b-mxfp4.gguf", tiny_model())
    done = run("list", "--all", "--json")
    rows = json.loads(done.stdout)
    assert [row["name"] for row in rows] == [entry.name for entry in entries()]
    assert [row["name"] for row in rows if row["downloaded"]] == ["gpt-oss-20b"]
    kinds = {"fits the GPU", "experts in RAM", "in RAM", "needs disk", "too large"}
    assert all(row["here"] in kinds and row["bytes"] > 0 for row in rows)


def test_list_all_for_a_machine_that_is_not_here(places: Places) -> None:
    done = run("list", "--all", "--machine", "gpu=RTX 4090:24GiB:1000GB/s;ram=64GiB:80GB/s", "--json")
    kinds = {row["name"]: row["here"] for row in json.loads(done.stdout)}
    assert kinds["qwen3-30b-a3b"] == "fits the GPU" and kinds["gpt-oss-120b"] == "experts in RAM"
    refused(run("list", "--all", "--machine", "ram=lots"), 2, "ram=lots")
    refused(run("list", "--machine", "ram=8GiB"), 2, "--all")


@pytest.mark.parametrize("width", [60, 80, 120, 180])
def test_the_catalog_fits_the_terminal(places: Places, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = parse_machine("gpu=RTX 4070:12GiB:504GB/s;ram=32GiB:60GB/s;disk=3GB/s;cores=8")
    out = io.StringIO()
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(out, "isatty", lambda: True)
    show_offers(list(islice(_offers(machine), 12)), out)
    lines = re.sub(r"\x1b\[\d*m", "", out.getvalue()).splitlines()
    assert all(cell_len(line) <= width for line in lines), lines
    assert "granite-3.1-1b-a400m" in lines[1] and "fits the GPU" in lines[1]
    assert ("Good at" in lines[0]) == (width >= 120)
    assert ("128k  Apache-2.0" in lines[1] and "granitemoe" in lines[1]) == (width == 180)


def test_what_models_do_on_a_desktop() -> None:
    machine = parse_machine("gpu=RTX 4070:12GiB:504GB/s;ram=32GiB:60GB/s;disk=3GB/s;cores=8")
    found = {entry.name: outcome(facts_of(entry, entry.quant), machine) for entry in entries()}
    kinds = {name: one.kind for name, one in found.items()}
    assert kinds["olmoe-1b-7b"] == "fits the GPU"
    assert kinds["qwen3-30b-a3b"] == "experts in RAM"
    assert kinds["qwen3-next-80b-a3b"] == "needs disk"
    assert found["qwen3-30b-a3b"].decode_per_s == pytest.approx(50, rel=0.35)
    assert found["qwen3-next-80b-a3b"].disk_bytes > 5 << 30
    tiny = parse_machine("ram=4GiB:20GB/s;disk=100MB/s;cores=2")
    assert outcome(facts_of(entries()[-1]), tiny).kind == "too large"


def test_the_quick_look_agrees_with_the_plan() -> None:
    machines = ("gpu=RTX 4070:12GiB:504GB/s;ram=64GiB:60GB/s;disk=3GB/s;cores=8", "ram=32GiB:40GB/s;disk=2GB/s;cores=4")
    for text in machines:
        machine = parse_machine(text)
        for entry in entries()[::7]:
            facts = facts_of(entry, entry.quant)
            plan = make_plan(facts, machine, PlanRequest())
            quick = outcome(facts, machine)
            assert plan.predicted is not None and quick.decode_per_s is not None
            assert quick.decode_per_s == pytest.approx(plan.predicted.decode_per_s, rel=0.15), entry.name
            assert sentence(plan, facts).endswith("tokens/s.")


def test_show(places: Places) -> None:
    link = places.cached("o/r", "m-Q4_K_M.gguf", tiny_model())
    done = run("show", "o/r")
    assert done.returncode == 0, done.stderr
    for words in ("qwen3moe, 1 layers", "4 a layer, 2 used", "apache-2.0", "yes, with reasoning and tools", str(link)):
        assert words in done.stdout
    assert "routed experts" in done.stdout and "Here" in done.stdout
    document = json.loads(run("show", "o/r", "--json").stdout)
    assert document["template"] == {"reasoning": True, "tools": True}
    weights = {row["role"]: row for row in document["weights"]}
    assert weights["routed experts"] == {
        "role": "routed experts", "bytes": 98304, "bits_per_weight": 32.0, "types": {"F32": 98304}
    }  # fmt: skip
    assert sum(row["bytes"] for row in document["weights"]) <= document["bytes"]
    assert document["here"]["verdict"].endswith("tokens/s.")


def test_show_of_the_catalog_is_offline(places: Places) -> None:
    done = run("show", "qwen3-30b-a3b", env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0 and "moelocal pull qwen3-30b-a3b" in done.stdout
    refused(run("show", "qwen3-30b-a3b:Q9_X"), 2, "Q4_K_M")
    refused(run("show", "qwen3-30b-a3"), 1, "Did you mean qwen3-30b-a3b")


def test_show_of_a_file_says_nothing_of_the_catalogs_model(places: Places) -> None:
    Path("qwen3-30b-a3b").write_bytes(tiny_model())
    done = run("show", "qwen3-30b-a3b")
    assert done.returncode == 0 and "Good at" not in done.stdout and "Repository" not in done.stdout


def test_rm(places: Places) -> None:
    places.cached("o/r", "m-Q4_K_M.gguf", tiny_model(seed=1))
    places.cached("o/r", "m-Q8_0.gguf", tiny_model(seed=2))
    refused(run("rm", "o/r:Q4_K_M"), 2, "--yes")
    assert len(listed()) == 3
    done = run("rm", "o/r:Q4_K_M", "--yes", "--json")
    assert json.loads(done.stdout)["freed_bytes"] == len(tiny_model())
    assert [row["name"] for row in listed()] == ["demo", "o/r:Q8_0"]
    places.cached("o/r", "m-Q6_K.gguf", tiny_model(seed=3))
    refused(run("rm", "o/r", "--yes"), 2, "Say which: o/r:Q6_K, o/r:Q8_0")
    run("rm", "o/r:Q6_K", "--yes")
    assert "are free" in run("rm", "o/r", "--yes").stdout
    refused(run("rm", "o/r", "--yes"), 1, "not on this disk")


def test_rm_of_a_download_that_never_ended(places: Places, tmp_path: Path) -> None:
    parts = shards(tmp_path, "big-Q4_K_M")
    for file in list(parts)[:2]:
        places.cached("o/half", file, parts[file])
    blobs = places.hub / "models--o--begun-GGUF" / "blobs"
    blobs.mkdir(parents=True)
    with (blobs / ("a" * 64 + ".moelocal.incomplete")).open("wb") as file_:
        file_.write(b"x" * (1 << 20))
        file_.truncate(1 << 40)  # as long as it will be; only its beginning is here
    said = run("list").stderr
    assert "moelocal rm o/half" in said and "(1.0 MiB)" in said
    refused(run("rm", "o/half"), 2, "moelocal rm o/half --yes")
    freed = sum(len(parts[file]) for file in list(parts)[:2])
    assert json.loads(run("rm", "o/half", "--yes", "--json").stdout)["freed_bytes"] == freed
    assert json.loads(run("rm", "o/begun-GGUF", "--yes", "--json").stdout)["freed_bytes"] == 1 << 20
    assert list(places.hub.iterdir()) == [] and "Left out" not in run("list").stderr


def test_rm_of_what_a_download_left_beside_whole_models(places: Places) -> None:
    for i, quant in enumerate(("Q2_K", "Q4_K_M")):
        places.cached("o/r", f"m-{quant}.gguf", tiny_model(seed=i))
    begun = places.hub / "models--o--r" / "blobs" / ("a" * 64 + ".moelocal.incomplete")
    begun.write_bytes(b"x" * (1 << 20))
    assert "moelocal rm o/r --unfinished" in run("list").stderr
    refused(run("rm", "o/r", "--yes"), 2, "Say which: o/r:Q2_K, o/r:Q4_K_M")
    refused(run("rm", "o/r:Q8_0", "--yes"), 1, "not")
    assert begun.exists() and len(listed()) == 3
    locks = places.hub / ".locks" / "models--o--r"
    locks.mkdir(parents=True)
    with hub_utils().WeakFileLock(locks / ("a" * 64 + ".lock")):
        refused(run("rm", "o/r", "--unfinished", "--yes"), 2, "being downloaded")
    assert "1.0 MiB are free" in run("rm", "o/r", "--unfinished", "--yes").stdout
    assert not begun.exists() and len(listed()) == 3
    refused(run("rm", "o/r", "--unfinished", "--yes"), 1, "Nothing is here in part")


def test_rm_leaves_alone_what_is_not_the_stores(places: Places) -> None:
    shutil.copy(DEMO, "mine.gguf")
    blob = places.in_ollama("registry.ollama.ai/library/toy/latest", tiny_model())
    refused(run("rm", "demo", "--yes"), 2, "part of moelocal")
    refused(run("rm", "mine.gguf", "--yes"), 2, "rm mine.gguf")
    refused(run("rm", "toy", "--yes"), 2, "ollama rm toy:latest")
    refused(run("rm", str(blob), "--yes"), 2, "ollama rm toy:latest")
    refused(run("rm", "nothing.gguf", "--yes"), 1, "nothing.gguf")
    assert Path("mine.gguf").exists() and blob.exists() and DEMO.exists()


def test_rm_takes_the_model_that_was_named(places: Places) -> None:
    link = places.cached("o/r", "m-Q4_K_M.gguf", tiny_model())
    other = places.lmstudio / "o" / "copy" / "m-Q4_K_M.gguf"
    other.parent.mkdir(parents=True)
    other.symlink_to(link.resolve())
    refused(run("rm", "o/copy", "--yes"), 2, "LM Studio")
    Path("mine.gguf").symlink_to(link)
    os.link(link.resolve(), "also-mine.gguf")
    refused(run("rm", "mine.gguf", "--yes"), 2, "a file of yours")
    refused(run("rm", "also-mine.gguf", "--yes"), 2, "a file of yours")
    assert link.exists()
    assert run("rm", str(link.resolve()), "--yes").returncode == 0 and not link.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize(("answer", "status"), [("y\n", 0), ("\n", 1), ("n\n", 1)])
def test_rm_asks(places: Places, answer: str, status: int) -> None:
    link = places.cached("o/r", "m-Q4_K_M.gguf", tiny_model())
    master, slave = pty.openpty()
    os.write(master, answer.encode())
    done = subprocess.run(
        [sys.executable, "-m", "moelocal", "rm", "o/r"], stdin=slave, stdout=slave, stderr=slave, timeout=60
    )
    said = os.read(master, 1 << 16).decode()
    os.close(master)
    os.close(slave)
    assert done.returncode == status and "[y/N]" in said
    assert link.exists() == bool(status)


def test_the_life_of_a_model(places: Places) -> None:
    with HubServer() as hub:
        hub.add("o/r-GGUF", "m-Q4_K_M.gguf", DEMO.read_bytes())
        env = {**os.environ, **hub.env(places.folder / "hf")}
        shown = run("show", "o/r-GGUF:Q4_K_M", "--json", env=env)
        assert shown.returncode == 0 and "Not on this disk" in shown.stderr
        assert json.loads(shown.stdout)["path"] is None and json.loads(shown.stdout)["n_experts"] == 16
        path = run("pull", "o/r-GGUF:Q4_K_M", env=env).stdout.strip()
        assert [row["path"] for row in json.loads(run("list", "--json", env=env).stdout)] == [str(DEMO), path]
        assert json.loads(run("show", "o/r-GGUF", "--json", env=env).stdout)["path"] == path
        done = run("rm", "o/r-GGUF", "--yes", "--json", env=env)
        assert json.loads(done.stdout)["freed_bytes"] == DEMO.stat().st_size
        assert len(json.loads(run("list", "--json", env=env).stdout)) == 1


def test_what_lm_studio_has_is_not_downloaded_again(places: Places) -> None:
    with HubServer() as hub:
        hub.add("pub/rep", "m-Q4_K_M.gguf", tiny_model())
        env = {**os.environ, **hub.env(places.folder / "hf")}
        theirs = places.in_lmstudio("pub/rep", "m-Q4_K_M.gguf", tiny_model())
        done = run("pull", "pub/rep:Q4_K_M", env=env)
        assert done.stdout == f"{theirs}\n" and "LM Studio has pub/rep:Q4_K_M already" in done.stderr
        assert not hub.wire and "moelocal pull pub/rep/m-Q4_K_M.gguf" in done.stderr
        theirs.write_bytes(tiny_model() + bytes(1000))
        done = run("pull", "pub/rep:Q4_K_M", env=env)
        assert done.stdout != f"{theirs}\n" and "in another version" in done.stderr
        run("rm", "pub/rep:Q4_K_M", "--yes", env=env)
        theirs.write_bytes(tiny_model())
        done = run("pull", "pub/rep/m-Q4_K_M.gguf", env=env)
        assert done.returncode == 0 and "models--pub--rep" in done.stdout
        assert run("pull", "PUB/Rep/m-Q4_K_M.gguf", env=env).stdout == done.stdout
        assert [path.name for path in places.hub.glob("models--*")] == ["models--pub--rep"]
