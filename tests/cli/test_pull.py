"""`moelocal pull`, and `plan` of what is not here yet, against a local hub: what is printed, chosen and refused."""

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

from tests.conftest import ROOT
from tests.hub_server import HubServer

REPO = "owner/Tiny-GGUF"
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[[str], Path]) -> Iterator[HubServer]:
    data = tiny("tiny-qwen3moe").read_bytes()
    with HubServer() as server:
        for i, quant in enumerate(("Q2_K", "Q4_K_M", "Q8_0")):
            server.add(REPO, f"tiny-{quant}.gguf", data + bytes(1000 * i))
        server.add("owner/Tiny", "model.safetensors", b"weights")
        yield server


@pytest.fixture
def env(hub: HubServer, tmp_path: Path) -> dict[str, str]:
    return {**os.environ, **hub.env(tmp_path / "hf"), "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}


@pytest.fixture
def run(env: dict[str, str]) -> Run:
    def run_(*args: str, **more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "moelocal", *args]
        return subprocess.run(command, env=env | more, capture_output=True, text=True, stdin=subprocess.DEVNULL)

    return run_


def test_a_named_quantization_then_it_is_here(run: Run, tmp_path: Path) -> None:
    done = run("pull", f"{REPO}:Q4_K_M")
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.strip())
    assert path.is_relative_to(tmp_path / "hf") and path.name == "tiny-Q4_K_M.gguf" and path.is_file()
    assert "checked" in done.stderr and f"run {REPO}:Q4_K_M" in done.stderr
    again = run("pull", f"{REPO}:Q4_K_M")
    assert again.returncode == 0 and "here already" in again.stderr and again.stdout == done.stdout
    offline = run("pull", f"{REPO}:Q4_K_M", HF_ENDPOINT="http://127.0.0.1:9")
    assert offline.returncode == 0 and "the hub was not asked" in offline.stderr and offline.stdout == done.stdout
    planned = run("plan", f"{REPO}:Q4_K_M", "--json", "--machine", "ram=16GiB")
    assert planned.returncode == 0 and "Not on this disk" not in planned.stderr


def test_a_single_model_is_planned_too(run: Run, hub: HubServer) -> None:
    hub.add("owner/One-GGUF", "one-Q4_K_M.gguf", hub.repos[REPO]["tiny-Q4_K_M.gguf"].data)
    small = run("pull", "owner/One-GGUF", "--yes", "--ram", "1MiB", "--cpu-only")
    assert (
        small.returncode == 1 and "fits this machine" in small.stderr and "pull owner/One-GGUF:Q4_K_M" in small.stderr
    )
    done = run("pull", "owner/One-GGUF", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["choices"][0]["decode_per_s"] > 0


@pytest.mark.parametrize("command", ["run", "chat", "plan", "show", "rm", "pull"])
def test_a_mistyped_repository_gets_the_closest_names(run: Run, command: str) -> None:
    done = run(command, "unslth/Qwen3-30B-A3B-GGUF", *(["hi"] if command == "run" else []))
    assert done.returncode == 1 and "Did you mean qwen3-30b-a3b" in done.stderr


def test_show_reads_the_header_on_the_hub(run: Run, hub: HubServer) -> None:
    hub.add("unsloth/Qwen3-30B-A3B-GGUF", "q-UD-Q4_K_XL.gguf", hub.repos[REPO]["tiny-Q4_K_M.gguf"].data)
    done = run("show", "qwen3-30b-a3b:UD-Q4_K_XL", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["arch"] == "qwen3moe"
    assert "Template" in run("show", "qwen3-30b-a3b:UD-Q4_K_XL").stdout
    assert "Template" in run("show", "qwen3-30b-a3b:UD-Q4_K_XL", HF_HUB_OFFLINE="1").stdout
    assert "Template" not in run("show", "olmoe-1b-7b", HF_HUB_OFFLINE="1").stdout


def test_what_was_looked_at_before_is_planned_offline(run: Run) -> None:
    seen = run("plan", f"{REPO}:Q2_K", "--json", "--machine", "ram=16GiB")
    offline = run("plan", f"{REPO}:Q2_K", "--json", "--machine", "ram=16GiB", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    assert offline.stdout == seen.stdout
    assert run("plan", "owner/One-More-GGUF", HF_HUB_OFFLINE="1").returncode == 1


def test_the_token_of_the_usual_file(run: Run, hub: HubServer, env: dict[str, str]) -> None:
    hub.token = "hf_right"
    try:
        denied = run("pull", f"{REPO}:Q2_K")
        assert denied.returncode == 1 and "hf auth login" in denied.stderr
        home = Path(env["HF_HOME"])
        home.mkdir(parents=True, exist_ok=True)
        (home / "token").write_text("hf_right\n")
        assert run("pull", f"{REPO}:Q2_K").returncode == 0
    finally:
        hub.token = None


def test_through_a_proxy(run: Run, hub: HubServer) -> None:
    proxy = {"HTTP_PROXY": hub.endpoint, "http_proxy": hub.endpoint, "NO_PROXY": "", "no_proxy": ""}
    done = run("pull", f"{REPO}:Q2_K", HF_ENDPOINT="http://hub.invalid", **proxy)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).stat().st_size > 1 << 20
    assert run("pull", f"{REPO}:Q4_K_M", HF_ENDPOINT="http://hub.invalid").returncode == 1


def test_half_of_a_joined_model_is_told_and_removed(run: Run, env: dict[str, str]) -> None:
    begun = Path(env["MOELOCAL_HOME"]) / "models" / "owner" / "Cut-GGUF-Q4_K_M.gguf.moelocal.incomplete"
    begun.parent.mkdir(parents=True)
    begun.write_bytes(b"x" * (1 << 20))
    assert "owner/Cut-GGUF is downloaded in part (1.0 MiB)" in run("list").stderr
    assert "1.0 MiB are free" in run("rm", "owner/Cut-GGUF", "--unfinished", "--yes").stdout
    assert not begun.exists() and "in part" not in run("list").stderr


def test_the_best_one_is_chosen(run: Run) -> None:
    done = run("pull", REPO, "--yes", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["quant"] == "Q8_0" and document["model"] == f"{REPO}:Q8_0" and document["reason"]
    assert [choice["quant"] for choice in document["choices"]] == ["Q2_K", "Q4_K_M", "Q8_0"]
    assert all(choice["fits"] and choice["decode_per_s"] for choice in document["choices"])
    assert Path(document["path"]).stat().st_size == document["bytes"]


def test_without_a_terminal_a_choice_needs_yes(run: Run) -> None:
    done = run("pull", REPO)
    assert done.returncode == 2 and not done.stdout
    assert "holds 3 models" in done.stderr and "Q8_0" in done.stderr and f"pull {REPO} --yes" in done.stderr


def test_what_does_not_fit_is_not_chosen(run: Run) -> None:
    done = run("pull", REPO, "--yes", "--ram", "1MiB", "--cpu-only")
    assert done.returncode == 1 and not done.stdout and "--all" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("args", "texts"),
    [
        (("owner/Tiny",), ("no GGUF", "convert owner/Tiny")),
        (("owner/nothing",), ("no repository owner/nothing",)),
        ((f"{REPO}:Q5_K_M",), ("holds no 'Q5_K_M'", "Q2_K, Q4_K_M, Q8_0")),
        ((f"{REPO}/other.gguf",), ("no model file", "Q2_K")),
        ((f"{REPO}/../../x.gguf",), ("leads out of",)),
        (("qwen3-30b-a3",), ("no model", "qwen3-30b-a3b")),
        (("demo",), ("part of the program",)),
        (("",), ("no model",)),
        (("a b c",), ("no model",)),
    ],
)
def test_refusals(run: Run, args: tuple[str, ...], texts: tuple[str, ...]) -> None:
    done = run("pull", *args)
    assert done.returncode in (1, 2) and not done.stdout and "Traceback" not in done.stderr
    for text in texts:
        assert text in done.stderr


def test_no_way_to_the_hub(run: Run) -> None:
    for command in ("pull", "plan"):
        done = run(command, f"{REPO}:Q4_K_M", HF_ENDPOINT="http://127.0.0.1:9")
        assert done.returncode == 1 and "cannot be reached" in done.stderr and "Traceback" not in done.stderr
        done = run(command, f"{REPO}:Q4_K_M", HF_HUB_OFFLINE="1")
        assert done.returncode == 1 and "HF_HUB_OFFLINE" in done.stderr and "Traceback" not in done.stderr


def test_offline_the_catalog_is_planned_from_what_it_knows(run: Run) -> None:
    for more in ({"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}):
        done = run("plan", "qwen3-30b-a3b:Q6_K", "--json", "--machine", "ram=64GiB", **more)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["model"]["n_experts"] == 128 and "catalog knows" in done.stderr


def test_plan_before_download(run: Run) -> None:
    done = run("plan", f"{REPO}:Q4_K_M", "--json", "--machine", "ram=16GiB")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["fits"] and "Not on this disk yet" in done.stderr and "moelocal pull" in done.stderr


def test_the_table_is_answered(env: dict[str, str], hub: HubServer) -> None:
    ours, theirs = pty.openpty()
    env |= {"TERM": "xterm-256color", "COLUMNS": "120"}
    command = [sys.executable, "-m", "moelocal", "pull", REPO]
    process = subprocess.Popen(command, env=env, stdin=theirs, stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    os.write(ours, b"q\n")  # typed before it asks
    shown = ""

    def until(text: str) -> None:
        nonlocal shown
        while text not in shown:
            shown += os.read(ours, 65536).decode()

    until("Take Q8_0?")
    assert shown.index("Q8_0") < shown.index("Q4_K_M") < shown.index("Q2_K")
    os.write(ours, b"nonsense\n")
    until("There is no 'nonsense'")
    os.write(ours, b"3\n")
    until(f"run {REPO}:Q2_K")
    assert process.wait(20) == 0
    os.close(ours)
    assert process.stdout is not None
    with process.stdout as out:
        assert out.read().decode().strip().endswith("tiny-Q2_K.gguf")


def test_ctrl_c_stops_at_once_and_the_same_command_goes_on(env: dict[str, str], tiny: Callable[[str], Path]) -> None:
    data = tiny("tiny-qwen3moe").read_bytes() + bytes(12 << 20)
    with HubServer() as slow:
        slow.add("owner/Slow-GGUF", "slow-Q8_0.gguf", data)
        slow.faults.bytes_per_s = 4e6
        env |= {"HF_ENDPOINT": slow.endpoint}
        command = [sys.executable, "-m", "moelocal", "pull", "owner/Slow-GGUF:Q8_0"]
        process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while slow.wire["slow-Q8_0.gguf"] < 2_000_000:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=10)
        assert process.returncode == 130 and "goes on from here" in err and not out and "Traceback" not in err
        slow.faults.bytes_per_s = None
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0 and slow.wire["slow-Q8_0.gguf"] < len(data) + 1_000_000


def test_a_narrow_window_shortens_the_name_not_the_figures(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from moelocal.cli.render_pull import Bars
    from moelocal.model.download import Progress

    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("FORCE_COLOR", "1")
    bars = Bars()
    bars.update(Progress((("a-model-with-quite-a-long-file-name-Q4_K_M.gguf", 100 << 20, 400 << 20),)))
    bars._progress.refresh()
    bars.close()
    shown = capsys.readouterr().err
    assert "a-mod…4_K_M.gguf" in shown and "100.0/400.0 MiB" in shown


def test_bars_for_many_files(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from moelocal.cli.render_pull import Bars
    from moelocal.model.download import Progress

    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("FORCE_COLOR", "1")
    bars = Bars()
    size = 4 << 30
    for done in (0, 5 * size + 12345, 20 * size):
        files = [
            (f"a-\x1b[31mlong-name-{i:05d}-of-00020.gguf", min(size, max(0, done - i * size)), size) for i in range(20)
        ]
        bars.update(Progress(tuple(files)))
        bars._progress.refresh()
    bars.close()
    shown = capsys.readouterr().err
    assert "all\u00a020\u00a0files" in shown and "80.0/80.0 GiB" in shown and "long-name-00005" in shown
    assert "\x1b[31mlong" not in shown


def test_a_login_page_is_like_no_way_to_the_hub(run: Run, hub: HubServer) -> None:
    assert run("pull", f"{REPO}:Q2_K").returncode == 0
    hub.faults.api_answer = b"<html>Welcome to our hotel"
    try:
        here = run("pull", f"{REPO}:Q2_K")
        assert here.returncode == 0 and "the hub was not asked" in here.stderr
        planned = run("plan", "qwen3-30b-a3b", "--json", "--machine", "ram=64GiB")
        assert planned.returncode == 0 and "catalog knows" in planned.stderr
        assert run("show", "qwen3-30b-a3b").returncode == 0
        done = run("pull", f"{REPO}:Q8_0")
        assert done.returncode == 1 and "does not answer like" in done.stderr and "Traceback" not in done.stderr
    finally:
        hub.faults.api_answer = None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ALL_PROXY", "socks5://127.0.0.1:9"),
        ("HTTP_PROXY", "socks5://127.0.0.1:9"),
        ("HTTP_PROXY", "ftp://x:1"),
        ("HTTP_PROXY", "http://[::1"),
        ("HF_TOKEN", "hf_äöü"),
        ("HF_ENDPOINT", "http://127.0.0.1:99999"),
        ("HF_ENDPOINT", "http://127.0.0.1:abc"),
        ("HF_ENDPOINT", "http://[::1"),
        ("HF_ENDPOINT", "127.0.0.1:9"),
    ],
)
def test_a_setting_that_cannot_be_is_named(run: Run, name: str, value: str) -> None:
    done = run("pull", f"{REPO}:Q8_0", "--json", **{name: value})
    assert done.returncode == 1 and not done.stdout and "Traceback" not in done.stderr
    assert name in done.stderr.splitlines()[0]
    planned = run("plan", "qwen3-30b-a3b:Q6_K", "--json", "--machine", "ram=64GiB", **{name: value})
    assert json.loads(planned.stdout)["model"]["n_experts"] == 128 and name in planned.stderr


def test_a_setting_that_is_empty_is_not_set(env: dict[str, str], tmp_path: Path) -> None:
    code = "from moelocal.model.client import endpoint\nfrom moelocal.model.download import cache_folder\n"
    code += "from moelocal.paths import hub_folder\nprint(endpoint(), cache_folder('o/r').parent == hub_folder())"
    empty = dict.fromkeys(("HF_ENDPOINT", "HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"), "")
    done = subprocess.run([sys.executable, "-c", code], env=env | empty, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "https://huggingface.co True\n", done.stderr


def test_commands_can_be_copied(run: Run, hub: HubServer) -> None:
    odd = "a b;$(id)\u202egpj.gguf"
    data = hub.repos[REPO]["tiny-Q4_K_M.gguf"].data
    for name in (odd, "c d-Q2_K.gguf", "e f-Q2_K.gguf"):
        hub.add("owner/Odd-GGUF", name, data)
    asked = run("pull", "owner/Odd-GGUF")
    assert asked.returncode == 2 and "pull 'owner/Odd-GGUF/" in asked.stderr
    done = run("pull", f"owner/Odd-GGUF/{odd}")
    assert f"run 'owner/Odd-GGUF/{odd}' \"Who".replace("\u202e", "\ufffd") in done.stderr
    assert "pull 'owner/Odd-GGUF/c d-Q2_K.gguf'" in run("show", "owner/Odd-GGUF/c d-Q2_K.gguf").stderr
    assert "'owner/Odd-GGUF/c d-Q2_K.gguf', 'owner" in run("pull", "owner/Odd-GGUF:Q2_K").stderr
    assert "rm 'owner/Odd-GGUF/" in run("rm", f"owner/Odd-GGUF/{odd}").stderr


def test_offline_it_is_told_which_ones_are_here(run: Run) -> None:
    for quant in ("Q2_K", "Q8_0"):
        assert run("pull", f"{REPO}:{quant}").returncode == 0
    done = run("pull", REPO, HF_HUB_OFFLINE="1")
    assert done.returncode == 2 and f"Say which: {REPO}:Q2_K, {REPO}:Q8_0" in done.stderr
    done = run("pull", f"{REPO}:Q4_K_M", HF_HUB_OFFLINE="1")
    assert done.returncode == 1 and f"there is {REPO}:Q2_K, {REPO}:Q8_0" in done.stderr
    assert "Unset HF_HUB_OFFLINE" in done.stderr and "is not on this disk, and" not in done.stderr


def test_a_full_disk_is_no_matter_of_memory(hub: HubServer, env: dict[str, str]) -> None:
    code = "import moelocal.model.download as d\nd.free_bytes = lambda folder: 5\n"
    code += "from moelocal.cli.app import main\nimport sys\nsys.argv[1:1] = ['pull', '--yes']\nmain()"
    done = subprocess.run([sys.executable, "-c", code, REPO], env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "room for 5 B" in done.stderr and "moelocal rm" in done.stderr
    assert "one all the same" not in done.stderr
