from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moelocal.errors import BadRequest, ModelNotFound
from moelocal.model.header import read_header
from moelocal.model.store import DEMO, models_here, resolve
from tests.model.stores import Places, places, shards, tiny_model

__all__ = ["places"]

QWEN = "unsloth/Qwen3-30B-A3B-GGUF"
FILE = "Qwen3-30B-A3B-Q4_K_M.gguf"


def names() -> list[str]:
    return sorted(model.name for model in models_here())


def refusal(reference: str) -> ModelNotFound:
    with pytest.raises(ModelNotFound) as caught:
        resolve(reference)
    return caught.value


def test_the_demo_and_paths(places: Places) -> None:
    assert resolve("demo") == DEMO
    shutil.copy(DEMO, "a.gguf")
    assert resolve("a.gguf") == Path("a.gguf")
    assert resolve("./a.gguf") == Path("a.gguf")


@pytest.mark.parametrize(
    "reference",
    [
        "qwen3-30b-a3b",
        "qwen3-30b-a3b:Q4_K_M",
        "QWEN3-30B-A3B:q4_k_m",
        QWEN,
        QWEN.lower(),
        f"{QWEN}:Q4_K_M",
        f"{QWEN}/{FILE}",
        f"https://huggingface.co/{QWEN}/blob/main/{FILE}",
    ],
)
def test_ways_to_name_a_model_of_the_cache(places: Places, reference: str) -> None:
    link = places.cached(QWEN, FILE, tiny_model())
    assert resolve(reference) == link
    assert names() == ["qwen3-30b-a3b:Q4_K_M"]


def test_every_listed_name_leads_to_its_file(places: Places, tmp_path: Path) -> None:
    places.cached(QWEN, FILE, tiny_model(seed=1))
    places.cached("o/many", "m-Q8_0.gguf", tiny_model(seed=2))
    places.cached("o/many", "m-Q4_K_M.gguf", tiny_model(seed=3))
    places.cached("o/many", "other-Q4_K_M.gguf", tiny_model(seed=4))
    places.cached("o/plain", "model.gguf", tiny_model(seed=5))
    for file, data in shards(tmp_path, "big").items():
        places.cached("o/split", f"Q3_K_M/{file}", data)
    places.in_lmstudio("lmstudio-community/X-GGUF", "X-Q6_K.gguf", tiny_model(seed=6))
    places.in_ollama("registry.ollama.ai/library/qwen3/30b", tiny_model(seed=7))
    places.in_ollama("registry.ollama.ai/someone/tiny/latest", tiny_model(seed=8))
    places.in_ollama("hf.co/o/Remote-GGUF/Q4_K_M", tiny_model(seed=9))
    places.made("mine-Q3_K_M.gguf", tiny_model(seed=10))
    assert names() == [
        "hf.co/o/Remote-GGUF:Q4_K_M",
        "lmstudio-community/X-GGUF:Q6_K",
        "mine-Q3_K_M",
        "o/many/m-Q4_K_M.gguf",
        "o/many/other-Q4_K_M.gguf",
        "o/many:Q8_0",
        "o/plain/model.gguf",
        "o/split:Q3_K_M",
        "qwen3-30b-a3b:Q4_K_M",
        "qwen3:30b",
        "someone/tiny:latest",
    ]
    for model in models_here():
        assert resolve(model.name).samefile(model.path), model.name
        assert read_header(model.path).file_bytes == sum(file.stat().st_size for file in model.files)
    assert resolve("someone/tiny").samefile(resolve("someone/tiny:latest"))
    assert resolve("o/Remote-GGUF:Q4_K_M").name.startswith("sha256-")
    assert resolve("mine-Q3_K_M.gguf").name == "mine-Q3_K_M.gguf"


def test_half_downloads_are_no_models(places: Places, tmp_path: Path) -> None:
    parts = shards(tmp_path, "big-Q4_K_M")
    for file in list(parts)[:2]:
        places.cached("o/half", file, parts[file])
    blobs = places.hub / "models--o--half" / "blobs"
    (blobs / ("a" * 64 + ".incomplete")).write_bytes(b"GGUF")
    snapshot = places.hub / "models--o--dangling" / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (snapshot / "x-Q4_K_M.gguf").symlink_to("../../blobs/nothing")
    assert names() == []
    error = refusal("o/half:Q4_K_M")
    assert "only in part" in error.message and "lacks 1" in error.message and "pull o/half:Q4_K_M" in error.hint
    assert "pull o/dangling" in refusal("o/dangling").hint


def test_what_is_not_here_can_be_got(places: Places) -> None:
    for reference in ("gpt-oss-20b", "gpt-oss-20b:Q8_0", "someone/model-GGUF", "someone/model-GGUF:Q4_K_M"):
        error = refusal(reference)
        assert "not on this disk" in error.message and f"moelocal pull {reference}" in error.hint
    places.cached("o/r", "m-Q4_K_M.gguf", tiny_model())
    error = refusal("o/r:Q8_0")
    assert "o/r:Q4_K_M" in error.message and "moelocal pull o/r:Q8_0" in error.hint


def test_a_typo_gets_the_closest_names(places: Places) -> None:
    places.in_ollama("registry.ollama.ai/library/mymodel/30b", tiny_model())
    assert "qwen3-30b-a3b" in refusal("qwen3-30b-a3").hint
    assert "qwen3-30b-a3b:Q4_K_M" in refusal("qwen3-30ba3b:Q4_K_M").hint
    assert "mymodel:30b" in refusal("mymodl:30b").hint
    assert "moelocal list --all" in refusal("zzzzzzzz").hint


def test_several_that_could_be_meant(places: Places) -> None:
    places.cached("o/r", "m-Q8_0.gguf", tiny_model(seed=1))
    places.cached("o/r", "m-Q6_K.gguf", tiny_model(seed=2))
    with pytest.raises(BadRequest, match="more than once") as caught:
        resolve("o/r")
    assert "o/r:Q6_K" in caught.value.hint and "o/r:Q8_0" in caught.value.hint
    link = places.cached("o/r", "m-Q4_K_M.gguf", tiny_model(seed=3))
    assert resolve("o/r") == link


def test_unsloths_dynamic_types_answer_to_the_plain_name_too(places: Places) -> None:
    link = places.cached("o/r", "m-UD-Q4_K_XL.gguf", tiny_model())
    assert resolve("o/r:Q4_K_XL") == link == resolve("o/r:UD-Q4_K_XL")


def test_a_file_wins_over_a_repository_of_that_name(places: Places) -> None:
    places.cached("o/r", "m-Q4_K_M.gguf", tiny_model())
    notes: list[str] = []
    Path("o").mkdir()
    shutil.copy(DEMO, "o/r")
    assert resolve("o/r", notes.append) == Path("o/r")
    assert len(notes) == 1 and "taken as the file" in notes[0]
    shutil.copy(DEMO, "gpt-oss-20b")
    assert resolve("gpt-oss-20b", notes.append) == Path("gpt-oss-20b")
    assert len(notes) == 2 and "ggml-org/gpt-oss-20b-GGUF" in notes[1]
    assert resolve("./gpt-oss-20b", notes.append) == Path("gpt-oss-20b") and len(notes) == 2


def test_a_folder_does_not_hide_a_repository(places: Places) -> None:
    link = places.cached("o/r", "m-Q4_K_M.gguf", tiny_model())
    Path("o/r").mkdir(parents=True)
    assert resolve("o/r") == link
    assert "is a folder" in refusal("o").message


def test_a_path_is_taken_without_a_look_at_the_catalog_or_a_cache(places: Places) -> None:
    code = (
        "import os, sys\nfrom moelocal.model.store import resolve\n"
        "os.scandir = os.listdir = None\nprint(resolve('a.gguf'), resolve('x/y/a.gguf'), resolve('demo').name)\n"
        "print('moelocal.model.catalog' in sys.modules)"
    )
    Path("x/y").mkdir(parents=True)
    for name in ("a.gguf", "x/y/a.gguf"):
        shutil.copy(DEMO, name)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["a.gguf", "x/y/a.gguf", "demo.gguf", "False"]


def test_nothing_outside_of_the_store(places: Places) -> None:
    places.cached("o/r", "m-Q4_K_M.gguf", tiny_model())
    with pytest.raises(BadRequest, match="leads out"):
        resolve("o/r/../../../secret.gguf")


@pytest.mark.parametrize(
    "name", ["x" * 5000, "a/" + "b" * 5000, "a:" + "b" * 300, "\x1b[31m", "o/r:\n", "::", "a\\b", "ü/ö"]
)
def test_odd_names_are_told_plainly(places: Places, name: str) -> None:
    error = refusal(name)
    assert error.hint and len(error.message) < 300


def test_the_version_of_main_comes_first(places: Places) -> None:
    places.cached("o/r", "m-Q4_K_M.gguf", tiny_model(seed=1), commit="old", main=False)
    places.cached("o/r", "gone-Q8_0.gguf", tiny_model(seed=2), commit="old", main=False)
    new = places.cached("o/r", "m-Q4_K_M.gguf", tiny_model(seed=3), commit="new")
    os.utime(new.parent, (1, 1))
    assert resolve("o/r:Q4_K_M") == new
    assert names() == ["o/r:Q4_K_M", "o/r:Q8_0"]


def test_one_file_in_two_places_is_listed_once(places: Places) -> None:
    link = places.cached("o/r", "m-Q4_K_M.gguf", tiny_model())
    other = places.lmstudio / "o" / "copy" / "m-Q4_K_M.gguf"
    other.parent.mkdir(parents=True)
    other.symlink_to(link.resolve())
    assert names() == ["o/r:Q4_K_M"]
    assert resolve("o/copy:Q4_K_M") == other


def test_ollamas_half_and_odd_manifests(places: Places) -> None:
    whole = places.in_ollama("registry.ollama.ai/library/a/latest", tiny_model(seed=1))
    cut = places.in_ollama("registry.ollama.ai/library/b/latest", tiny_model(seed=2))
    cut.write_bytes(cut.read_bytes()[:-100])
    places.in_ollama("registry.ollama.ai/library/c/latest", b"x", media="application/vnd.ollama.image.projector")
    manifests = places.ollama / "manifests/registry.ollama.ai/library"
    for number, text in enumerate(["", "{", "[]", '{"layers": 3}', '{"layers": [null]}', "[" * 100_000]):
        (manifests / "d").mkdir(exist_ok=True)
        (manifests / "d" / str(number)).write_text(text)
    layer = {"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:../../../etc/passwd"}
    (manifests / "d" / "escape").write_text(json.dumps({"layers": [layer]}))
    assert names() == ["a:latest"]
    assert resolve("a") == whole


def test_lm_studios_folder_by_its_settings(places: Places, tmp_path: Path) -> None:
    elsewhere = tmp_path / "disk" / "o" / "r"
    elsewhere.mkdir(parents=True)
    (elsewhere / "m-Q4_K_M.gguf").write_bytes(tiny_model())
    (elsewhere / "mmproj-F16.gguf").write_bytes(tiny_model())
    home = tmp_path / "moved"
    home.mkdir()
    (home / "settings.json").write_text(json.dumps({"downloadsFolder": str(tmp_path / "disk")}))
    (tmp_path / "home" / ".lmstudio-home-pointer").write_text(str(home) + "\n")
    assert resolve("o/r:Q4_K_M") == elsewhere / "m-Q4_K_M.gguf"
    assert names() == ["o/r:Q4_K_M"]
    for broken in ("{", "[]", '{"downloadsFolder": 3}', "\0"):
        (home / "settings.json").write_text(broken)
        assert names() == []


def test_places_that_are_not_there_or_not_readable(places: Places) -> None:
    assert names() == []
    places.hub.parent.mkdir(parents=True)
    places.hub.write_text("not a folder")
    places.ollama.write_text("neither")
    assert names() == []


def test_a_cache_of_another_user(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    places.cached("o/r", "m-Q4_K_M.gguf", tiny_model())
    real = os.stat

    def denied(path: Any, *args: Any, **more: Any) -> os.stat_result:
        if "models--" in str(path):
            raise PermissionError(13, "Permission denied")
        return real(path, *args, **more)

    def closed(path: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "stat", denied)
    monkeypatch.setattr(os, "scandir", closed)
    monkeypatch.setattr(os, "listdir", closed)
    assert "moelocal pull o/r" in refusal("o/r").hint


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")
def test_links_in_a_circle_end(places: Places) -> None:
    snapshot = places.cached("o/r", "m-Q4_K_M.gguf", tiny_model()).parent
    (snapshot / "loop").symlink_to(snapshot)
    assert [model.file for model in models_here()] == ["m-Q4_K_M.gguf"]


@pytest.mark.parametrize("file", ["a/b/c/d/m-Q4_0.gguf", "a/b/c/d/e/f/m-Q4_0.gguf", ".hidden/m-Q4_0.gguf"])
def test_models_of_the_cache_in_any_folder(places: Places, file: str) -> None:
    link = places.cached("o/deep-GGUF", file, tiny_model())
    assert names() == ["o/deep-GGUF:Q4_0"]
    for reference in ("o/deep-GGUF", "o/deep-GGUF:Q4_0", f"o/deep-GGUF/{file}"):
        assert resolve(reference) == link
