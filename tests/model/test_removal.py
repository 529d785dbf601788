from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from moelocal.errors import BadRequest, MoelocalError
from moelocal.model.cache import shelf_of, unfinished
from moelocal.model.removal import Removal, plan_leftovers, plan_removal, remove
from moelocal.model.store import models_here
from tests.model.stores import Places, places, shards, tiny_model

__all__ = ["places"]


def removal_of(name: str) -> Removal:
    return plan_removal(next(model for model in models_here() if model.name == name))


def blocks(folder: Path) -> int:
    """Bytes that files take below a folder, each once; names of versions do not count."""
    held = {}
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and path.parent.name != "refs":
            status = path.stat()
            held[status.st_ino] = min(status.st_size, status.st_blocks * 512)
    return sum(held.values())


def names() -> set[str]:
    return {model.name for model in models_here()}


def test_what_is_said_to_be_freed_is_freed(places: Places) -> None:
    places.cached("o/r", "a-Q4_K_M.gguf", tiny_model(seed=1))
    stays = places.cached("o/r", "b-Q8_0.gguf", tiny_model(seed=2))
    places.cached("o/r", "README.md", b"about it")
    removal = removal_of("o/r:Q4_K_M")
    before = blocks(places.folder)
    remove(removal)
    assert before - blocks(places.folder) == removal.freed_bytes > 0
    assert names() == {"o/r:Q8_0"} and stays.read_bytes() == tiny_model(seed=2)


def test_the_last_model_takes_its_repository_along(places: Places) -> None:
    places.cached("o/r", "sub/a-Q4_K_M.gguf", tiny_model())
    remove(removal_of("o/r:Q4_K_M"))
    assert list(places.hub.iterdir()) == []


def test_a_running_download_is_left_alone(places: Places) -> None:
    places.cached("o/r", "a-Q4_K_M.gguf", tiny_model())
    half = places.hub / "models--o--r" / "blobs" / ("b" * 64 + ".incomplete")
    half.write_bytes(b"GGUF")
    remove(removal_of("o/r:Q4_K_M"))
    assert half.exists() and names() == set()


def test_versions_that_share_a_blob_go_together(places: Places) -> None:
    places.cached("o/r", "a-Q4_K_M.gguf", tiny_model(), commit="old", main=False)
    places.cached("o/r", "a-Q4_K_M.gguf", tiny_model(), commit="new")
    places.cached("o/r", "config.json", b"{}", commit="old", main=False)
    removal = removal_of("o/r:Q4_K_M")
    assert removal.freed_bytes == len(tiny_model()) and len(removal.entries) == 2
    remove(removal)
    assert names() == set()
    assert [path.name for path in (places.hub / "models--o--r" / "snapshots").rglob("*.*")] == ["config.json"]
    assert not (places.hub / "models--o--r" / "refs" / "main").exists()  # it named a version that is gone


def test_a_blob_under_another_name_stays(places: Places) -> None:
    places.cached("o/r", "a-Q4_K_M.gguf", tiny_model())
    other = places.cached("o/r", "copy-Q5_K_M.gguf", tiny_model())
    removal = plan_removal(next(iter(models_here())))
    assert removal.freed_bytes == 0 and removal.shared_bytes == len(tiny_model())
    remove(removal)
    assert other.read_bytes() == tiny_model() and names() == {"o/r:Q5_K_M"}


def test_hard_links_elsewhere_keep_the_bytes(places: Places) -> None:
    link = places.cached("o/r", "a-Q4_K_M.gguf", tiny_model())
    os.link(link.resolve(), places.folder / "mine.gguf")
    removal = removal_of("o/r:Q4_K_M")
    assert (removal.freed_bytes, removal.shared_bytes) == (0, len(tiny_model()))
    remove(removal)
    assert (places.folder / "mine.gguf").read_bytes() == tiny_model()


def test_a_link_out_of_the_cache_is_removed_and_not_its_target(places: Places) -> None:
    target = places.folder / "elsewhere.gguf"
    target.write_bytes(tiny_model())
    link = places.cached("o/r", "b-Q8_0.gguf", tiny_model(seed=1)).with_name("a-Q4_K_M.gguf")
    link.symlink_to(target)
    removal = removal_of("o/r:Q4_K_M")
    assert removal.freed_bytes == 0
    remove(removal)
    assert target.exists() and not link.is_symlink()


def test_a_split_model_and_files_without_links(places: Places, tmp_path: Path) -> None:
    for file, data in shards(tmp_path, "big").items():
        places.cached("o/split", f"Q3_K_M/{file}", data)
    plain = places.hub / "models--o--plain" / "snapshots" / "c0ffee" / "a-Q4_K_M.gguf"  # as on Windows
    plain.parent.mkdir(parents=True)
    plain.write_bytes(tiny_model())
    for name in ("o/split:Q3_K_M", "o/plain:Q4_K_M"):
        removal = removal_of(name)
        before = blocks(places.hub)
        remove(removal)
        assert before - blocks(places.hub) == removal.freed_bytes > 0
    assert names() == set() and list(places.hub.iterdir()) == []


def test_models_made_here(places: Places) -> None:
    path = places.made("sub/mine-Q3_K_M.gguf", tiny_model())
    removal = removal_of("sub/mine-Q3_K_M")
    assert removal.freed_bytes == len(tiny_model())
    remove(removal)
    assert not path.parent.exists() and path.parent.parent.exists()


def test_other_tools_models_stay(places: Places) -> None:
    blob = places.in_ollama("registry.ollama.ai/library/qwen3/30b", tiny_model(seed=1))
    file = places.in_lmstudio("o/r", "a-Q4_K_M.gguf", tiny_model(seed=2))
    with pytest.raises(BadRequest) as caught:
        removal_of("qwen3:30b")
    assert caught.value.hint.endswith("ollama rm qwen3:30b")
    with pytest.raises(BadRequest, match="LM Studio"):
        removal_of("o/r:Q4_K_M")
    assert blob.exists() and file.exists()


@pytest.mark.skipif(sys.platform == "win32" or os.getuid() == 0, reason="root may write anywhere")
def test_a_read_only_cache(places: Places) -> None:
    link = places.cached("o/r", "a-Q4_K_M.gguf", tiny_model())
    link.parent.chmod(0o555)
    try:
        with pytest.raises(MoelocalError, match="cannot be removed"):
            remove(removal_of("o/r:Q4_K_M"))
        assert names() == {"o/r:Q4_K_M"}
    finally:
        link.parent.chmod(0o755)


def test_a_disk_that_refuses_is_told(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    places.cached("o/r", "a-Q4_K_M.gguf", tiny_model())

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(MoelocalError, match="Permission denied"):
        remove(removal_of("o/r:Q4_K_M"))


def test_links_of_any_depth_and_hidden_ones_are_users_of_a_blob(places: Places) -> None:
    places.cached("o/ot-GGUF", "m-Q4_0.gguf", tiny_model())
    kept = [
        places.cached("o/ot-GGUF", ".eval_results/res.yaml", b"1"),
        places.cached("o/ot-GGUF", "a/b/c/d/e/notes.bin", b"22"),
        places.cached("o/ot-GGUF", ".backup/m-copy.txt", tiny_model()),
    ]
    shelf = shelf_of("o/ot-GGUF")
    assert shelf is not None and unfinished(shelf.folder) == 0 and plan_leftovers(shelf) is None
    remove(removal_of("o/ot-GGUF:Q4_0"))
    assert [path.stat().st_size for path in kept] == [1, 2, len(tiny_model())]


def test_a_shard_without_the_others_keeps_a_blob_that_something_names(places: Places, tmp_path: Path) -> None:
    file, data = next(iter(shards(tmp_path, "big-Q4_K_M").items()))
    places.cached("o/half", file, data)
    copy = places.cached("o/half", ".backup/copy.txt", data)
    shelf = shelf_of("o/half")
    assert shelf is not None
    removal = plan_leftovers(shelf)
    assert removal is not None and removal.freed_bytes == 0
    remove(removal)
    assert copy.read_bytes() == data


def test_a_link_among_the_models_made_here_frees_nothing(places: Places) -> None:
    target = places.folder / "elsewhere.gguf"
    target.write_bytes(tiny_model())
    link = places.made("other-Q8_0.gguf", tiny_model(seed=1)).with_name("mine-Q4_0.gguf")
    link.symlink_to(target)
    removal = removal_of("mine-Q4_0")
    assert removal.freed_bytes == 0
    remove(removal)
    assert target.exists() and not link.is_symlink()
