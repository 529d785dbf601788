"""Headers read over HTTP: what is fetched, what is kept, and servers that do not do as they say."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from pathlib import Path

import pytest

from moelocal.errors import BadGGUF, BadRequest, ModelNotFound, MoelocalError
from moelocal.machine.described import parse_machine
from moelocal.model.client import HubError
from moelocal.model.facts import read_facts
from moelocal.model.header import ValueType, read_header
from moelocal.model.remote import open_header
from moelocal.plan.planner import PlanRequest, make_plan
from tests.gguf_bytes import TypedArray, gguf_bytes, write_shards
from tests.hub_server import HubServer
from tests.model.geometries import qwen3_30b_a3b

REPO = "owner/Model-GGUF"
N_VOCAB = 151_936


def small(n_bytes: int = 0) -> bytes:
    metadata = {"general.architecture": "llama", "general.name": "x" * n_bytes}
    return gguf_bytes(metadata, [("output.weight", (256, 64), 8)])


def add_split(hub: HubServer, folder: Path, n_shards: int, times: int) -> tuple[Path, int]:
    """A sparse split model with a real vocabulary; its first shard, and the bytes of all."""
    header = qwen3_30b_a3b().header
    tokens = [f"token-{i:06d}" for i in range(N_VOCAB)]
    vocabulary = {
        "tokenizer.ggml.tokens": TypedArray(ValueType.STRING, tokens),
        "tokenizer.ggml.merges": TypedArray(ValueType.STRING, [f"{one} {one}" for one in tokens]),
    }
    wide = [(t.name, (*t.shape[:-1], t.shape[-1] * times) if "_exps" in t.name else t.shape, t.ggml_type)
            for t in header.tensors]  # fmt: skip
    metadata = {
        **header.metadata,
        **vocabulary,
        "qwen3moe.expert_count": header.metadata["qwen3moe.expert_count"] * times,
    }
    step = -(-len(wide) // n_shards)
    paths = write_shards(folder, "big-Q4_K_M", metadata, [wide[i * step : (i + 1) * step] for i in range(n_shards)])
    for path in paths:
        hub.add(REPO, path.name, path, hashlib.sha256(path.name.encode()).hexdigest())
    return paths[0], sum(path.stat().st_size for path in paths)


def test_a_split_model_of_100_gb(hub: HubServer, tmp_path: Path) -> None:
    first, n_bytes = add_split(hub, tmp_path, 12, 6)
    assert n_bytes > 100e9
    header, text = open_header(f"{REPO}:Q4_K_M")
    fetched = sum(hub.wire.values())
    assert fetched <= 32_000_000 and fetched < n_bytes / 100
    for i in range(2, 13):
        name = f"big-Q4_K_M-{i:05d}-of-00012.gguf"
        assert sum(method == "GET" and path.endswith(name) for method, path, _ in hub.requests) <= 2
    local = read_header(first)
    assert replace(header, shards=()) == replace(local, shards=())
    assert [Path(shard).name for shard in local.shards] == list(header.shards)
    assert "12 files" in text and REPO in text
    machine = parse_machine("gpu=RTX 4090:24GiB:1008GB/s;ram=192GiB:80GB/s;disk=3GB/s;cores=16")
    request = PlanRequest(n_ctx=8192)
    assert make_plan(read_facts(header), machine, request) == make_plan(read_facts(local), machine, request)

    asked = len(hub.requests)
    assert open_header(f"{REPO}:Q4_K_M")[0] == header
    assert len(hub.requests) == asked + 1, "only the listing is asked for again"


def test_a_header_longer_than_the_first_piece_and_one_of_a_cut_file(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moelocal.model.remote._FIRST_BYTES", 1000)
    whole = small(20_000)
    hub.add(REPO, "m-Q4_0.gguf", whole)
    hub.add(REPO, "m-Q8_0.gguf.part1of2", whole[:30_000])
    hub.add(REPO, "m-Q8_0.gguf.part2of2", whole[30_000:])
    for quant in ("Q4_0", "Q8_0"):
        header, _ = open_header(f"{REPO}:{quant}")
        assert header.file_bytes == len(whole) and len(header.metadata["general.name"]) == 20_000
    assert open_header(REPO)[0].file_bytes == len(whole)
    assert open_header(f"{REPO}/m-Q4_0.gguf")[0].file_bytes == len(whole)


def test_a_server_that_sends_whole_files(hub: HubServer) -> None:
    data = small() + b"\0" * (64 << 20)
    hub.add(REPO, "m-Q4_0.gguf", data)
    hub.faults.ignores_ranges = True
    hub.faults.bytes_per_s = 400e6
    assert open_header(REPO)[0].file_bytes == len(data)
    assert hub.wire["m-Q4_0.gguf"] < 24 << 20


def test_a_line_that_drops(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    data = small(200_000)
    hub.add(REPO, "m-Q4_0.gguf", data)
    hub.faults.drop_after = [70_000, 1000, 10]
    hub.faults.status = [(503, {}), (429, {"Retry-After": "0"})]
    assert open_header(REPO)[0].metadata["general.name"] == "x" * 200_000
    assert hub.wire["m-Q4_0.gguf"] == len(data)
    assert not hub.leaked


@pytest.mark.parametrize(
    ("fault", "value", "text"),
    [
        ("wrong_range", True, "other bytes than those asked for"),
        ("size_told", 77, "has 77 bytes by its server"),
        ("gzip", True, "packed"),
        ("drop_after", [0] * 20, "cannot be reached|ended at byte"),
        ("status", [(500, {})] * 20, "answers 500"),
        ("status", [(403, {})] * 20, "not let everybody"),
        ("status", [(404, {})] * 20, "does not have that file"),
        ("redirect", "file:///etc/passwd", "cannot be"),
        ("redirect", "/owner/Model-GGUF/resolve/x/m-Q4_0.gguf", "without an end"),
    ],
)
def test_servers_that_do_not_do_as_they_say(hub: HubServer, fault: str, value: object, text: str) -> None:
    hub.add(REPO, "m-Q4_0.gguf", small(5000))
    setattr(hub.faults, fault, value)
    with pytest.raises(HubError, match=text) as caught:
        open_header(REPO)
    assert caught.value.hint


def test_the_token_stays_with_the_hub(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(REPO, "m-Q4_0.gguf", small())
    hub.token = "hf_secret"
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert open_header(REPO) and not hub.leaked
    hub.gated.add(REPO)
    hub.repos[REPO]["m-Q4_0.gguf"].digest = "1" * 64
    with pytest.raises(HubError, match="gated") as caught:
        open_header(REPO)
    assert f"{hub.endpoint}/{REPO}" in caught.value.hint


def test_what_is_no_gguf(hub: HubServer) -> None:
    hub.add(REPO, "m-Q4_0.gguf", b"<!doctype html>" + b" " * 5000)
    with pytest.raises(BadGGUF, match="a web page"):
        open_header(REPO)
    hub.add(REPO, "m-Q4_0.gguf", small(5000)[:4000])
    with pytest.raises(BadGGUF):
        open_header(REPO)


@pytest.mark.parametrize("reference", ["", "x y", "owner/repo/../../m.gguf", "a/b/c/d.bin", "nosuchname"])
def test_references_that_are_none(hub: HubServer, reference: str) -> None:
    with pytest.raises((BadRequest, ModelNotFound)) as caught:
        open_header(reference)
    assert isinstance(caught.value, MoelocalError) and caught.value.hint


def test_a_damaged_or_unwritable_cache_is_no_error(hub: HubServer, home: Path) -> None:
    hub.add(REPO, "m-Q4_0.gguf", small(5000))
    header, _ = open_header(REPO)
    (kept,) = (home / "headers").iterdir()
    assert re.fullmatch(r"[0-9a-f]{64}\.gguf-header", kept.name)
    kept.write_bytes(b"GGUF")
    assert open_header(REPO)[0] == header
    kept.unlink()
    kept.parent.rmdir()
    kept.parent.write_text("in the way")
    assert open_header(REPO)[0] == header


def test_old_headers_make_room(hub: HubServer, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moelocal.model.remote._KEPT_BYTES", 25_000)
    for i in range(4):
        hub.add(f"owner/repo{i}", "m-Q4_0.gguf", small(10_000 + i))
        open_header(f"owner/repo{i}")
    assert len(list((home / "headers").iterdir())) == 2
