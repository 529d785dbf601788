"""`moelocal convert`: folders and repositories, what is printed, what is refused before anything is fetched."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.build.checkpoints import checkpoint_files, write_checkpoint, write_converter, write_python
from tests.conftest import DEMO, ROOT
from tests.hub_server import HubServer

REPO = "owner/Tiny-MoE"
WEIGHTS = "model-00002-of-00002.safetensors"
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        for name, data in checkpoint_files().items():
            server.add(REPO, name, data)
        server.add(REPO, "original/consolidated.00.pth", b"x" * 1000)
        server.add(REPO, "tokenization_own.py", b"raise SystemExit")
        for name, data in checkpoint_files("Qwen3MoEForCausalLM").items():
            server.add("owner/Unknown", name, data)
        server.add("owner/Tiny-GGUF", "tiny-Q4_K_M.gguf", b"GGUF")
        yield server


@pytest.fixture
def env(tmp_path: Path, home: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", "HF_ENDPOINT": "http://127.0.0.1:9"}


@pytest.fixture
def tools(tmp_path: Path) -> list[str]:
    """Options that name the converter and the Python that stand in."""
    converter = write_converter(tmp_path / "converter", DEMO.read_bytes())
    return ["--converter", str(converter), "--python", str(write_python(tmp_path / "python"))]


@pytest.fixture
def run(env: dict[str, str]) -> Run:
    def run_(*args: str, **more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "moelocal", *args]
        return subprocess.run(command, env=env | more, capture_output=True, text=True, stdin=subprocess.DEVNULL)

    return run_


def made(home: Path) -> list[str]:
    return sorted(path.name for path in (home / "models").iterdir()) if (home / "models").exists() else []


def test_a_folder_becomes_a_model_that_runs_by_name(run: Run, tools: list[str], tmp_path: Path, home: Path) -> None:
    folder = write_checkpoint(tmp_path / "My-MoE")
    done = run("convert", str(folder), *tools)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{home}/models/My-MoE-BF16.gguf\n"
    assert 'run My-MoE-BF16 "Who are you?"' in done.stderr and "quantize My-MoE-BF16 --type Q4_K_M" in done.stderr
    assert run("run", "My-MoE-BF16", "Who are you?", "--max-tokens", "3").returncode == 0
    again = run("convert", str(folder), *tools)
    assert again.returncode == 2 and "exists already" in again.stderr and "--force" in again.stderr
    told = run(
        "convert", str(folder), str(tmp_path / "out") + "/", *tools, "--name", "Other", "--type", "f16", "--json"
    )
    document = json.loads(told.stdout)
    assert document["output"] == str(tmp_path / "out" / "Other-F16.gguf") and document["type"] == "F16"
    assert document["bytes_out"] == DEMO.stat().st_size and document["types"]["Q8_0"] > 0
    assert document["converter"] == {"version": "unknown", "checked": False}


def test_quantized_in_one_go(run: Run, tools: list[str], tmp_path: Path, home: Path) -> None:
    folder = write_checkpoint(tmp_path / "My-MoE")
    done = run("convert", str(folder), *tools, "--type", "q8_0", "--quantize", "q4_k_m", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["type"] == "Q4_K_M" and document["types"]["Q4_K"] > 0
    assert made(home) == ["My-MoE-Q4_K_M.gguf"]


def test_a_repository_is_fetched_without_what_is_not_needed(
    run: Run, tools: list[str], hub: HubServer, tmp_path: Path, home: Path
) -> None:
    env = hub.env(tmp_path / "hf")
    done = run("convert", REPO, *tools, **env)
    assert done.returncode == 0, done.stderr
    assert made(home) == ["Tiny-MoE-BF16.gguf"]
    assert hub.wire[WEIGHTS] and not hub.wire["consolidated.00.pth"] and not hub.wire["tokenization_own.py"]
    before = sum(hub.wire.values())
    again = run("convert", REPO, *tools, "--force", **env)
    assert again.returncode == 0 and sum(hub.wire.values()) == before
    offline = run("convert", REPO, *tools, "--force", **{**env, "HF_ENDPOINT": "http://127.0.0.1:9"})
    assert offline.returncode == 0 and "taken as it is here" in offline.stderr
    trusted = run("convert", REPO, *tools, "--force", "--trust-code", **env)
    assert trusted.returncode == 0 and hub.wire["tokenization_own.py"]


def test_an_unknown_architecture_ends_before_the_weights(
    run: Run, tools: list[str], hub: HubServer, tmp_path: Path
) -> None:
    done = run("convert", "owner/Unknown", *tools, **hub.env(tmp_path / "hf"))
    assert done.returncode == 2 and "Qwen3MoeForCausalLM" in done.stderr
    assert hub.wire["config.json"] and not hub.wire[WEIGHTS]


@pytest.mark.parametrize(
    ("architecture", "says"),
    [
        ("MiniMaxForCausalLM", "under the names of MiniMaxAI/MiniMax-Text-01"),
        ("JetMoeForCausalLM", "its attention heads are experts too"),
        ("Dots1ForCausalLM", "calls its router's scores 'noaux_tc'"),
    ],
)
def test_what_llama_cpp_cannot_run_is_told_from_the_configuration_alone(
    run: Run, tmp_path: Path, home: Path, architecture: str, says: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture], "scoring_func": "noaux_tc"}))
    done = run("convert", str(tmp_path))
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr
    assert made(home) == [] and "fetch" not in done.stderr.lower()


def test_a_tokenizer_that_cannot_be_read_ends_before_the_weights(
    run: Run, tools: list[str], hub: HubServer, tmp_path: Path, home: Path
) -> None:
    done = run("convert", REPO, *tools, **hub.env(tmp_path / "hf"), FAKE_CONVERTER="tokenizer")
    assert done.returncode == 1 and f"The tokenizer of {REPO} cannot be read" in done.stderr
    assert hub.wire["tokenizer.json"] and not hub.wire[WEIGHTS] and made(home) == []


def test_a_repository_that_lacks_a_shard_ends_before_the_weights(
    run: Run, tools: list[str], hub: HubServer, tmp_path: Path
) -> None:
    del hub.repos[REPO]["model-00001-of-00002.safetensors"]
    done = run("convert", REPO, *tools, **hub.env(tmp_path / "hf"))
    assert done.returncode == 2 and "lacks 1 of 2 files with weights" in done.stderr and not hub.wire[WEIGHTS]


def test_other_repositories(run: Run, tools: list[str], hub: HubServer, tmp_path: Path) -> None:
    env = hub.env(tmp_path / "hf")
    gguf = run("convert", "owner/Tiny-GGUF", *tools, **env)
    assert gguf.returncode == 1 and "pull owner/Tiny-GGUF" in gguf.stderr
    missing = run("convert", "owner/None", *tools, **env)
    assert missing.returncode == 1 and "no repository owner/None" in missing.stderr


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["nowhere"], "no folder nowhere"),
        (["./owner/repo"], "no folder ./owner/repo"),
        ([str(DEMO)], "is a GGUF file"),
        (["demo"], "is a GGUF file"),
        (["owner/repo:Q4_K_M"], "names a part of a repository"),
        (["qwen3-30b-a3b"], "is a model of the catalog"),
        (["owner/repo", "--quantize", "Q4"], "There is no quantization 'Q4'"),
        (["owner/repo", "--split", "4"], "too small"),
        (["owner/repo", "--split", "4GB", "--quantize", "Q4_K_M"], "exclude each other"),
        (["owner/repo", "--name", "a/b"], "cannot be a model's name"),
        (["owner/repo", "--type", "q4_0"], "q4_0"),
    ],
)
def test_wrong_usage(run: Run, arguments: list[str], message: str) -> None:
    done = run("convert", *arguments)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_without_torch_the_command_is_told_before_anything_is_fetched(run: Run, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m")
    python = write_python(tmp_path / "bare", ["yaml"])
    done = run("convert", str(folder), "--python", str(python))
    assert done.returncode == 1 and "pip install 'moelocal[convert]'" in done.stderr


@pytest.mark.parametrize("signum,status", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_terminal_sees_a_bar_and_an_end_in_the_middle_leaves_nothing(
    env: dict[str, str], tools: list[str], tmp_path: Path, home: Path, signum: int, status: int
) -> None:
    folder = write_checkpoint(tmp_path / "My-MoE")
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "moelocal", "convert", str(folder), *tools]
    more = {"FAKE_CONVERTER": "slow", "TERM": "xterm-256color", "COLUMNS": "60"}
    process = subprocess.Popen(command, env=env | more, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
    os.close(slave)
    seen = b""
    end = time.monotonic() + 30
    while b"Writing BF16" not in seen:
        assert time.monotonic() < end, seen
        seen += os.read(master, 4096)
    process.send_signal(signum)
    while True:
        try:
            seen += os.read(master, 4096)
        except OSError:
            break
    assert process.wait(20) == status and b"Traceback" not in seen
    assert made(home) == []
