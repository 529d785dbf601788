from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from moelocal.build.output import made_here, writing
from moelocal.errors import BadRequest, MoelocalError
from moelocal.model.store import resolve


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_finished_file_is_there_and_nothing_else(tmp_path: Path) -> None:
    with writing(tmp_path / "new" / "a.gguf") as part:
        part.write_bytes(b"whole")
        assert not (tmp_path / "new" / "a.gguf").exists()
    assert (tmp_path / "new" / "a.gguf").read_bytes() == b"whole"
    assert names(tmp_path / "new") == ["a.gguf"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("bad"), BadRequest("no", "")])
def test_after_a_failure_nothing_is_left_and_an_older_file_stays(tmp_path: Path, error: BaseException) -> None:
    old = tmp_path / "a.gguf"
    old.write_bytes(b"old")
    with pytest.raises(type(error)), writing(old, replace=True) as part:
        part.write_bytes(b"half")
        raise error
    assert old.read_bytes() == b"old"
    assert names(tmp_path) == ["a.gguf"]


def test_what_a_killed_process_left_is_removed_and_that_of_a_living_one_stays(tmp_path: Path) -> None:
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom moelocal.build.output import writing\n"
        "with writing(Path(sys.argv[1])) as part:\n    part.write_bytes(b'half')\n    os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.gguf")], check=False)
    assert done.returncode == -9
    assert len(names(tmp_path)) == 1 and "a.gguf" not in names(tmp_path)
    with writing(tmp_path / "a.gguf") as mine:
        mine.write_bytes(b"first")
        with writing(tmp_path / "a.gguf2") as other:
            other.write_bytes(b"second")
        assert mine.exists()
    assert names(tmp_path) == ["a.gguf", "a.gguf2"]


def test_refusals(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"old")
    with pytest.raises(BadRequest, match="exists already"), writing(tmp_path / "a.gguf"):
        pass
    with pytest.raises(BadRequest, match="is a folder"), writing(tmp_path):
        pass
    with pytest.raises(MoelocalError, match="has room for"), writing(tmp_path / "b.gguf", need_bytes=1 << 60):
        pass
    with pytest.raises(MoelocalError, match=r"a\.gguf.*cannot be written"), writing(tmp_path / "a.gguf" / "b.gguf"):
        pass
    with pytest.raises(MoelocalError, match="The disk is full"), writing(tmp_path / "b.gguf"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert names(tmp_path) == ["a.gguf"]


def test_what_is_made_here_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOELOCAL_HOME", str(tmp_path))
    with writing(made_here("mine-Q4_K_M")) as part:
        part.write_bytes(b"GGUF")
    assert resolve("mine-Q4_K_M") == tmp_path / "models" / "mine-Q4_K_M.gguf"
