"""A model that is streamed from its file answers as one in RAM does, whatever is missing; and reads little to load."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from moelocal.engine import llama, mapped
from moelocal.engine.libc import libc
from moelocal.engine.readahead import ReadAhead
from moelocal.engine.residency import Residency
from moelocal.engine.sampling import Sampling
from moelocal.engine.session import Session, load
from moelocal.engine.warm import cached_share
from moelocal.model.header import read_header
from moelocal.model.slices import expert_stacks
from moelocal.model.usage import ExpertUsage, LayerUsage, identity, save_usage
from moelocal.plan.llama_flags import flags_of_plan
from moelocal.plan.planner import Plan

Tiny = Callable[[str], Path]
IN_RAM = Plan(
    n_ctx=256, kv_type="f16", n_ubatch=64, threads=1, n_gpu_layers=0, repack=False, load_mode="mmap",
)  # fmt: skip
STREAMED = replace(IN_RAM, disk_bytes=1)
pytestmark = pytest.mark.skipif(not ReadAhead.is_possible(), reason="this system cannot be asked to read ahead")


def answer(session: Session, n_prompt: int = 100) -> list[int]:
    noise = random.Random(0)
    prompt = [noise.randrange(3, 500) for _ in range(n_prompt)]
    return [
        chunk.token
        for chunk in session.stream(prompt, Sampling(max_tokens=24, temperature=0.0, ignore_eos=True))
        if chunk.token is not None
    ]


def opened(path: Path, plan: Plan) -> Session:
    return load([path], read_header(path), plan)


@pytest.mark.parametrize("geometry", ["tiny-qwen3moe", "tiny-gptoss", "tiny-deepseek2-groups", "tiny-llama4"])
@pytest.mark.parametrize("room", [0, 2, 1 << 62], ids=["no room", "two experts", "room for all"])
def test_the_same_tokens_as_in_ram(geometry: str, room: int, tiny: Tiny) -> None:
    path = tiny(geometry)
    with opened(path, IN_RAM) as session:
        assert session.residency is None and session.watch is None
        expected = answer(session)
    with opened(path, STREAMED) as session:
        residency = session.residency
        assert isinstance(residency, Residency)
        residency._most_bytes = max(1, min(room * max(residency._bytes.values()), 1 << 62))
        residency._limit()
        assert answer(session) == expected == answer(session)
        residency.commit()  # raises if the nodes could not be read
        stats = residency.stats
    n_layers = len(expert_stacks(read_header(path)))
    n_used = session.header.metadata[f"{session.header.metadata['general.architecture']}.expert_used_count"]
    n_choices = stats.n_hits + stats.n_misses
    n_of_prompts = 4 * n_used  # their last layers: of one token only
    assert stats.n_tokens >= 2 * 23 and n_choices <= stats.n_tokens * n_layers * n_used + n_of_prompts
    if room > 100:
        assert stats.hit_rate > 0.9
    if room == 0:
        assert stats.n_misses > stats.n_hits and stats.bytes_per_token > 0


@pytest.mark.parametrize("geometry", ["tiny-qwen3moe", "tiny-gptoss", "tiny-deepseek2"])
def test_replacing_missing_experts_reads_less_and_is_not_done_unasked(geometry: str, tiny: Tiny) -> None:
    read, tokens = [], []
    for lossy_misses in (0, 2):
        with opened(tiny(geometry), replace(STREAMED, lossy_misses=lossy_misses)) as session:
            residency = session.residency
            assert residency is not None
            residency._most_bytes = 12 * max(residency._bytes.values())  # of 4 layers with 8 and more each
            residency._limit()
            tokens.append(answer(session))
            residency.commit()  # raises if the nodes could not be read
            read.append(residency.stats)
    exact, lossy = read
    assert exact.n_replaced == 0 < lossy.n_replaced
    assert lossy.n_misses < exact.n_misses and tokens[0] != tokens[1]


def dropped(path: Path) -> None:
    """Takes a file out of the page cache, where the file system has one of its own."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached_share(path) > 0.5:
        pytest.skip("this file system keeps the file in memory")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere llama.cpp does not read at once")
def test_the_load_reads_nothing_and_the_next_one_is_as_before(tmp_path: Path) -> None:
    from scripts import make_synthetic

    path = tmp_path / "model.gguf"
    make_synthetic.write_model("qwen3moe-250m", path, n_layer=1)
    flags = flags_of_plan(IN_RAM, read_header(path))
    library = llama.api()._lib._name
    free = llama.api().llama_model_free
    dropped(path)
    with mapped.lazily(library) as is_lazy:
        model = llama.open_model([path], IN_RAM, flags)
    assert is_lazy
    assert cached_share(path) < 0.5
    pieces = mapped.mappings(path)
    header = read_header(path)
    tensor = header.tensors[-1]
    address = mapped.within(pieces, tensor.offset, tensor.n_bytes)
    assert address is not None
    import ctypes

    with path.open("rb") as file:
        file.seek(tensor.offset)
        assert ctypes.string_at(address, 1000) == file.read(1000)
    free(model)
    dropped(path)
    free(llama.open_model([path], IN_RAM, flags))
    assert cached_share(path) > 0.9


def test_what_is_given_back_leaves_memory_and_comes_again(tmp_path: Path) -> None:
    from scripts import make_synthetic

    path = tmp_path / "model.gguf"
    make_synthetic.write_model("qwen3moe-250m", path, n_layer=2)
    dropped(path)
    with opened(path, STREAMED) as session:
        residency = session.residency
        assert residency is not None
        expected = answer(session)
        if not residency._pages.is_mapped:
            pytest.skip("this system does not say where the file is mapped")
        everything = [(layer, index) for layer in residency._order for index in range(32)]
        for layer, index in everything:
            residency._cache.forget(layer, index)
        residency._give_back(everything)
        assert not any(residency._is_cached(layer, index) for layer, index in everything)
        assert answer(session) == expected


def test_a_profile_says_what_is_read_first(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOELOCAL_HOME", str(tmp_path))
    path = tiny("tiny-qwen3moe")
    header = read_header(path)
    liked = tuple(range(10))  # the last expert the most
    layers = tuple(LayerUsage(layer, liked, (), (0,) * 10 + (45,), (0,) * 10 + (45,)) for layer in range(4))
    assert save_usage(identity(header, [path]), ExpertUsage("m", "t", 10, 2, layers))
    with load([path], header, STREAMED) as session:
        residency = session.residency
        assert residency is not None
        residency._jobs.put(None)
        residency._thread.join()
        in_order = [index for layer, index in residency._cache._held if layer == 0]
        assert in_order == sorted(in_order, reverse=True) and in_order[0] == 9


def test_a_file_that_goes_away_while_it_runs_is_still_read(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(tiny("tiny-qwen3moe").read_bytes())
    with opened(path, STREAMED) as session:
        expected = answer(session)
        path.unlink()
        assert answer(session, 60)
        session.rewind(0)  # batches cut as before
        assert answer(session) == expected


def test_without_the_right_to_lock_memory_it_still_runs(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libc(), "mlock", lambda *_: -1)
    with opened(tiny("tiny-qwen3moe"), STREAMED) as session:
        assert session.residency is not None and session.residency._locked_bytes == 0
        assert answer(session)


def test_a_system_that_cannot_read_ahead_maps_plainly(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ReadAhead, "is_possible", staticmethod(lambda: False))
    with opened(tiny("tiny-qwen3moe"), STREAMED) as session:
        assert session.residency is None and answer(session)
