"""`.ci/run` with a pip and a scripts/test that only tell how they were called."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
FAKES = {"bin/c++": "", "bin/python3": "", "bin/apt-get": "exit 1", "scripts/test": "echo test $*"}


@pytest.mark.parametrize("refused", ["none", "torch", "transformers"])
def test_tests_run_with_and_without_torch(tmp_path: Path, refused: str) -> None:
    fakes = FAKES | {".venv/bin/python": f'echo "$*" | sed "s/.*-check //"; case "$*" in *{refused}*) exit 1; esac'}
    for name, body in fakes.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    shutil.copy(ROOT / "scripts/setup.sh", tmp_path / "scripts")
    checksum = subprocess.run(["cksum"], input=b"[project]\n", capture_output=True, check=True).stdout.decode().strip()
    (tmp_path / ".venv/.stamp[dev]").write_text(f"{tmp_path} {checksum} -DGGML_RPC=on")  # all is set up
    env = {key: value for key, value in os.environ.items() if key != "CMAKE_ARGS"}
    env["PATH"] = f"{tmp_path / 'bin'}{os.pathsep}{env['PATH']}"
    done = subprocess.run([tmp_path / ".ci/run"], capture_output=True, text=True, env=env, timeout=30)
    wanted = ["torch==2.13.0", "transformers>=5.0 safetensors>=0.5 sentencepiece>=0.2", "test --all"]
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [line for line in wanted if refused != "torch" or "transformers" not in line]
    assert ("will be skipped" in done.stderr) == (refused != "none")
