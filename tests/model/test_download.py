"""Downloads through the real client from a real server: killed, damaged, slow, refused, full, two at once."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from moelocal.errors import ModelNotFound, MoelocalError
from moelocal.model import catalog
from moelocal.model.client import HubError
from moelocal.model.download import Progress, check_room, download, targets_of
from moelocal.model.hub import list_models, pick
from moelocal.model.store import resolve
from moelocal.model.transfer import bytes_here
from tests.conftest import ROOT
from tests.gguf_bytes import gguf_bytes, write_shards
from tests.hub_server import COMMIT, HubServer

REPO = "owner/Model-GGUF"
CHILD = f"""
from moelocal.model.download import download
from moelocal.model.hub import list_models, pick
listing = list_models({REPO!r})
print(*download(listing, pick(listing, "Q4_0"), lambda progress: None))
"""


def weights(n_mib: int, seed: int = 0) -> bytes:
    """A GGUF file of random bytes."""
    data = gguf_bytes({"general.architecture": "llama"}, [("output.weight", (1024, n_mib * 512), 1)])
    noise = hashlib.shake_256(bytes([seed])).digest(1 << 20)
    head = len(data) - (n_mib << 20)
    return data[:head] + noise * n_mib


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moelocal.model.transfer._PIECE_BYTES", 4 << 20)


@pytest.fixture
def watched() -> tuple[list[Progress], Callable[[Progress], None]]:
    seen: list[Progress] = []
    return seen, seen.append


def pull(watch: Callable[[Progress], None] = lambda progress: None, quant: str = "Q4_0") -> tuple[Path, ...]:
    listing = list_models(REPO)
    return download(listing, pick(listing, quant), watch)


def test_a_file_lands_in_the_cache_of_the_hub(
    hub: HubServer, tmp_path: Path, watched: tuple[list[Progress], Callable[[Progress], None]]
) -> None:
    from huggingface_hub import scan_cache_dir, try_to_load_from_cache

    data = weights(12)
    stored = hub.add(REPO, "sub/m-Q4_0.gguf", data)
    seen, watch = watched
    (path,) = pull(watch)
    assert path.read_bytes() == data and path.resolve().name == stored.digest
    assert try_to_load_from_cache(REPO, "sub/m-Q4_0.gguf") == str(path)
    assert (tmp_path / "hub" / "models--owner--Model-GGUF" / "refs" / "main").read_text() == COMMIT
    assert scan_cache_dir(tmp_path / "hub").size_on_disk == len(data)
    assert seen[-1].n_done == seen[-1].n_bytes == len(data)
    assert hub.wire["sub/m-Q4_0.gguf"] <= len(data) + 1
    asked = len(hub.requests)
    assert pull() == (path,) and len(hub.requests) == asked + 1


def test_shards_are_named_only_when_all_are_here(hub: HubServer, tmp_path: Path) -> None:
    metadata = {"general.architecture": "llama", "general.alignment": 32}
    tensors = [[(f"blk.{i}.weight", (1024, 1024), 1)] for i in range(3)]
    for shard in write_shards(tmp_path, "m-Q4_0", metadata, tensors):
        hub.add(REPO, shard.name, shard)
    hub.faults.status = [(404, {})]  # for the second shard
    with pytest.raises(HubError):
        hub.repos[REPO]["m-Q4_0-00002-of-00003.gguf"].digest = "0" * 64
        hub.faults.status = []
        pull()
    assert not (tmp_path / "hub" / "models--owner--Model-GGUF" / "snapshots").exists()
    for shard in tmp_path.glob("m-Q4_0-*.gguf"):
        hub.add(REPO, shard.name, shard)
    sent = sum(hub.wire.values())
    paths = pull()
    assert [path.name for path in paths] == [f"m-Q4_0-{i:05d}-of-00003.gguf" for i in (1, 2, 3)]
    assert sum(hub.wire.values()) - sent < 2.2 * (2 << 20), "the first shard is not fetched again"


def test_a_cut_file_is_joined(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    data = weights(10)
    for i, (start, end) in enumerate(((0, 5_000_001), (5_000_001, 9_000_000), (9_000_000, len(data)))):
        hub.add(REPO, f"m-Q4_0.gguf-split-{'abc'[i]}", data[start:end])
    (path,) = pull()
    assert path.read_bytes() == data and resolve(f"{REPO}:Q4_0") == resolve(REPO) == path
    toy = replace(catalog.entries()[0], name="toy", repo=REPO)
    monkeypatch.setattr(catalog, "entries", lambda: (toy,))
    assert resolve("toy") == resolve("toy:Q4_0") == path
    with pytest.raises(ModelNotFound):
        resolve("toy:Q8_0")


def test_a_line_that_stalls_is_opened_again(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moelocal.model.ranges._TIMEOUT_S", 0.4)
    data = weights(3)
    hub.add(REPO, "m-Q4_0.gguf", data)
    hub.faults.bytes_per_s = 30e3  # seconds between its pieces
    healed = threading.Timer(1.5, lambda: setattr(hub.faults, "bytes_per_s", None))
    healed.start()
    (path,) = pull()
    healed.join()
    assert path.read_bytes() == data and hub.n_requests("m-Q4_0.gguf") > 2


def child(hub: HubServer, folder: Path) -> subprocess.Popen[str]:
    env = {**os.environ, **hub.env(folder), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", CHILD], env=env, stdout=subprocess.PIPE, text=True)


def wait_for(condition: Callable[[], bool], limit_s: float = 20.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_killed_in_the_middle_and_resumed(hub: HubServer, tmp_path: Path) -> None:
    data = weights(96)
    hub.add(REPO, "m-Q4_0.gguf", data)
    hub.faults.bytes_per_s = 12e6  # each line
    for share in (0.2, 0.5, 0.8):
        process = child(hub, tmp_path)

        def has_come(enough: float = share * len(data)) -> bool:
            return hub.wire["m-Q4_0.gguf"] > enough

        wait_for(has_come)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
    hub.faults.bytes_per_s = None
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        env={**os.environ, **hub.env(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).read_bytes() == data
    again = hub.wire["m-Q4_0.gguf"] - len(data)
    print(f"{again:,} bytes fetched twice")
    assert again <= 3 * 0.01 * len(data), f"{again:,} bytes fetched twice in three kills"


def test_two_processes_at_once(hub: HubServer, tmp_path: Path) -> None:
    data = weights(24)
    hub.add(REPO, "m-Q4_0.gguf", data)
    hub.faults.bytes_per_s = 8e6
    processes = [child(hub, tmp_path) for _ in range(2)]
    paths = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert paths[0] == paths[1] and Path(paths[0]).read_bytes() == data
    assert hub.wire["m-Q4_0.gguf"] < len(data) * 1.01


def test_corruption_in_transit(hub: HubServer, tmp_path: Path) -> None:
    data = weights(12)
    hub.add(REPO, "m-Q4_0.gguf", data)
    hub.faults.flip_at = 7_000_000
    hub.faults.bytes_per_s = 1e9
    with pytest.raises(HubError, match="came damaged"):
        pull()
    assert not list((tmp_path / "hub" / "models--owner--Model-GGUF" / "blobs").iterdir())
    hub.faults.flip_at = None
    assert pull()[0].read_bytes() == data


def test_what_is_no_gguf_is_not_kept(hub: HubServer, tmp_path: Path) -> None:
    hub.add(REPO, "m-Q4_0.gguf", b"<html>" + b" " * 100_000)
    with pytest.raises(MoelocalError, match="a web page"):
        pull()
    assert not list((tmp_path / "hub" / "models--owner--Model-GGUF" / "blobs").iterdir())


def test_a_bad_line_and_a_busy_server(hub: HubServer) -> None:
    data = weights(12)
    hub.add(REPO, "m-Q4_0.gguf", data)
    hub.faults.status = [(503, {}), (429, {"Retry-After": "0"}), (500, {}), (0, {}), (403, {})]
    hub.faults.drop_after = [1, 100_000, 3_000_000, 5]
    assert pull()[0].read_bytes() == data
    assert hub.wire["m-Q4_0.gguf"] <= len(data) + 1 and not hub.leaked


@pytest.mark.parametrize(
    ("fault", "value", "text"),
    [
        ("status", [(500, {})] * 60, "answers 500"),
        ("status", [(429, {"Retry-After": "0"})] * 60, "too many requests"),
        ("status", [(404, {})] * 60, "does not have that file"),
        ("ignores_ranges", True, "whole files only"),
        ("wrong_range", True, "other bytes"),
        ("drop_after", [0] * 200, "cannot be reached|ended at byte"),
        ("size_told", 77, "has 77 bytes by its server"),
        ("gzip", True, "packed"),
        ("redirect", "/owner/Model-GGUF/resolve/x/m-Q4_0.gguf", "without an end"),
    ],
)
def test_servers_that_will_not(hub: HubServer, fault: str, value: object, text: str) -> None:
    hub.add(REPO, "m-Q4_0.gguf", weights(12))
    setattr(hub.faults, fault, value)
    with pytest.raises(HubError, match=text) as caught:
        pull()
    assert caught.value.hint


def test_a_slow_server_is_waited_for(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is for a line without a byte, not for all of it."""
    monkeypatch.setattr("moelocal.model.ranges._TIMEOUT_S", 1.0)
    data = weights(1)
    hub.add(REPO, "m-Q4_0.gguf", data)
    hub.faults.bytes_per_s = 300e3
    assert pull()[0].read_bytes() == data


def test_a_refusal_leaves_nothing_behind(hub: HubServer, tmp_path: Path) -> None:
    hub.add(REPO, "m-Q4_0.gguf", weights(1))
    hub.faults.ignores_ranges = True
    with pytest.raises(HubError):
        pull()
    assert not list(tmp_path.rglob("*.incomplete"))


def test_a_joined_file_goes_where_another_setting_says(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moelocal.model.download.free_bytes", lambda folder: 5)
    data = weights(1)
    hub.add(REPO, "m-Q6_K.gguf.part1of2", data[:1000])
    hub.add(REPO, "m-Q6_K.gguf.part2of2", data[1000:])
    with pytest.raises(MoelocalError, match="5 B") as caught:
        pull(quant="Q6_K")
    assert "MOELOCAL_HOME" in caught.value.hint


def test_slow_lines_get_company(hub: HubServer) -> None:
    data = weights(24)
    hub.add(REPO, "m-Q4_0.gguf", data)
    hub.faults.bytes_per_s = 5e6
    assert pull()[0].read_bytes() == data
    assert hub.most_lines >= 3


def test_stopped_by_ctrl_c_and_resumed(hub: HubServer) -> None:
    data = weights(24)
    hub.add(REPO, "m-Q4_0.gguf", data)
    hub.faults.bytes_per_s = 10e6

    def stop(progress: Progress) -> None:
        if progress.n_done > 8e6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull(stop)
    wait_for(lambda: threading.active_count() < 12)
    listing = list_models(REPO)
    assert 8e6 < bytes_here(targets_of(listing, listing.models[0])[0]) < len(data)
    hub.faults.bytes_per_s = None
    assert pull()[0].read_bytes() == data


def test_a_partial_file_that_is_not_ours_or_damaged(hub: HubServer, tmp_path: Path) -> None:
    data = weights(12)
    stored = hub.add(REPO, "m-Q4_0.gguf", data)
    blobs = tmp_path / "hub" / "models--owner--Model-GGUF" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{stored.digest}.moelocal.incomplete").write_bytes(b"something else")
    (blobs / f"{stored.digest}.incomplete").write_bytes(b"another tool's")
    (blobs / stored.digest).write_bytes(data[:1000])  # cut short by another tool
    assert pull()[0].read_bytes() == data


def test_the_disk_has_no_room(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(REPO, "m-Q4_0.gguf", weights(12))
    listing = list_models(REPO)
    monkeypatch.setattr("moelocal.model.download.free_bytes", lambda folder: 5 << 20)
    with pytest.raises(MoelocalError, match=r"room for 5.0 MiB, and 12.0 MiB are still to come"):
        check_room(targets_of(listing, listing.models[0]))
    with pytest.raises(MoelocalError, match="still to come"):
        pull()
    assert not hub.wire


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no right to mount a small disk here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=False)


def test_a_disk_that_fills_up(hub: HubServer, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(small_disk / "hub"))
    monkeypatch.setattr("moelocal.model.download.free_bytes", lambda folder: None)  # another program is faster
    data = weights(12)
    hub.add(REPO, "m-Q4_0.gguf", data)
    with pytest.raises(MoelocalError, match="The disk is full") as caught:
        pull()
    assert "goes on where it stopped" in caught.value.hint
    subprocess.run(["mount", "-o", "remount,size=32m", str(small_disk)], check=True)
    sent = hub.wire["m-Q4_0.gguf"]
    assert pull()[0].read_bytes() == data
    assert sent > 0 and hub.wire["m-Q4_0.gguf"] - sent < 0.6 * len(data)  # 8 of 12 MB were here


def test_a_cache_that_cannot_be_written(hub: HubServer, tmp_path: Path) -> None:
    hub.add(REPO, "m-Q4_0.gguf", weights(1))
    (tmp_path / "hub").write_text("a file where the folder would be")
    with pytest.raises(MoelocalError, match="cannot be written") as caught:
        pull()
    assert "HF_HOME" in caught.value.hint


def test_shards_that_are_no_model_together_are_not_kept(hub: HubServer, tmp_path: Path) -> None:
    for i in (1, 2):
        hub.add(REPO, f"m-Q4_0-0000{i}-of-00002.gguf", weights(1, seed=i))
    with pytest.raises(MoelocalError, match=r"2 files .* no model together: .*They were removed"):
        pull()
    folder = tmp_path / "hub" / "models--owner--Model-GGUF"
    assert not (folder / "snapshots").exists() and not list((folder / "blobs").iterdir())


def test_a_lone_shard_is_not_kept(hub: HubServer, tmp_path: Path) -> None:
    metadata = {"general.architecture": "llama", "general.alignment": 32}
    first, _ = write_shards(tmp_path, "s", metadata, [[(f"{i}.weight", (1024, 512), 1)] for i in range(2)])
    hub.add(REPO, "m-Q4_0.gguf", first)
    with pytest.raises(MoelocalError, match=r"split\.count is 2.* It was removed"):
        pull()
    assert not list((tmp_path / "hub" / "models--owner--Model-GGUF" / "blobs").iterdir())
