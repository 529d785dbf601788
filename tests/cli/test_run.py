"""`moelocal run` as people use it: the real command in a process of its own, good input and bad."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import DEMO
from tests.gguf_bytes import write_shards

Tiny = Callable[[str], Path]
QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."
# one thread: the tests must not depend on how busy the other cores are
QUICK = ["--threads", "1"]


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "moelocal", *args]


def run(*args: str, stdin: str | bytes = "", **options: Any) -> subprocess.CompletedProcess[str]:
    data = stdin.encode() if isinstance(stdin, str) else stdin
    done = subprocess.run(command(*args), input=data, capture_output=True, timeout=120, **options)
    out, err = done.stdout.decode(), done.stderr.decode()
    assert "Traceback" not in err, err
    return subprocess.CompletedProcess(done.args, done.returncode, out, err)


def refused(done: subprocess.CompletedProcess[str], status: int, *words: str) -> None:
    """One clear sentence and the next step, on stderr."""
    assert (done.returncode, done.stdout) == (status, ""), done
    for word in words:
        assert word in done.stderr, done.stderr
    assert done.stderr.startswith(("Error: ", "Usage: "))


def test_the_answer_is_on_stdout_and_the_figures_on_stderr() -> None:
    done = run("run", "demo", QUESTION, *QUICK)
    assert (done.returncode, done.stdout) == (0, ANSWER + "\n")
    assert done.stderr.startswith("prefill 19 tokens ") and "decode 9 tokens" in done.stderr
    assert "first token" in done.stderr and "\x1b" not in done.stdout + done.stderr


def test_json() -> None:
    done = run("run", "demo", QUESTION, "--json", *QUICK)
    document = json.loads(done.stdout)
    assert (document["model"], document["text"], document["reasoning"]) == ("demo", ANSWER, "")
    assert document["finish_reason"] == "stop" and len(document["tokens"]) == 8
    assert set(document["timings"]) == {
        "load_s", "prompt_tokens", "cached_tokens", "prompt_s", "prompt_per_s",
        "generated_tokens", "generate_s", "generate_per_s", "first_token_s",
    }  # fmt: skip
    assert document["timings"]["prompt_tokens"] == 19 and document["plan"]["model"]["n_experts"] == 16


def test_prompt_from_a_pipe_and_from_both() -> None:
    assert run("run", "demo", *QUICK, stdin=QUESTION).stdout == ANSWER + "\n"
    both = run(
        "run", "demo", "How do you say", "--raw", "--json", "--max-tokens", "1", *QUICK, stdin="tree in Spanish?"
    )
    assert json.loads(both.stdout)["timings"]["prompt_tokens"] > 6


def test_generation_options() -> None:
    done = run("run", "demo", QUESTION, "--max-tokens", "3", "--json", *QUICK)
    assert json.loads(done.stdout)["finish_reason"] == "length" and len(json.loads(done.stdout)["tokens"]) == 3
    assert run("run", "demo", QUESTION, "--stop", "Paris", *QUICK).stdout == "The capital of France is \n"
    hot = ["--temperature", "1.5", "--top-k", "0", "--top-p", "1", "--min-p", "0", "--max-tokens", "30", *QUICK]
    texts = [run("run", "demo", "Tell me a story.", "--seed", seed, *hot).stdout for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


def test_grammar_and_schema(tmp_path: Path) -> None:
    grammar, schema = tmp_path / "g.gbnf", tmp_path / "s.json"
    grammar.write_text('root ::= "yes" | "no"')
    schema.write_text('{"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}')
    assert run("run", "demo", "Is it?", "--grammar", str(grammar), *QUICK).stdout.strip() in ("yes", "no")
    text = run("run", "demo", "What is 2 + 3?", "--json-schema", str(schema), "--max-tokens", "60", *QUICK).stdout
    assert isinstance(json.loads(text)["n"], int)


@pytest.mark.parametrize("geometry", ["tiny-qwen3moe", "tiny-gptoss", "tiny-dense"])
def test_any_gguf(geometry: str, tiny: Tiny) -> None:
    done = run("run", str(tiny(geometry)), "hello", "--max-tokens", "4", "--json", *QUICK)
    assert done.returncode == 0 and len(json.loads(done.stdout)["tokens"]) <= 4


def test_a_split_model_runs_as_one(tiny: Tiny, tmp_path: Path) -> None:
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    reader = GGUFReader(tiny("tiny-qwen3moe"))
    writer = GGUFWriter(tmp_path / "split.gguf", "qwen3moe", split_max_tensors=12)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            sub_type = field.types[-1] if field.types[0] is GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    shards = sorted(tmp_path.glob("*.gguf"))
    assert len(shards) > 2
    options = ["hello", "--max-tokens", "8", "--temperature", "0", "--json", *QUICK]
    whole = json.loads(run("run", str(tiny("tiny-qwen3moe")), *options).stdout)
    split = json.loads(run("run", str(shards[0]), *options).stdout)
    assert split["tokens"] == whole["tokens"] and split["plan"]["model"] | {"file_bytes": 0} == whole["plan"][
        "model"
    ] | {"file_bytes": 0}


def test_verbose_shows_llama_cpps_log() -> None:
    done = run("run", "demo", QUESTION, "-v", *QUICK)
    assert "llama_model_loader" in done.stderr and done.stdout == ANSWER + "\n"
    assert "assigned to device" not in done.stderr, "debug lines are too many"


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["--max-tokens", "0"], "--max-tokens"),
        (["--max-tokens=-3"], "--max-tokens"),
        (["--temperature=-1"], "--temperature"),
        (["--top-p", "2"], "--top-p"),
        (["--stop", ""], "--stop"),
        (["--ctx", "3"], "--ctx"),
        (["--kv-type", "q2"], "--kv-type"),
        (["--ram", "lots"], "lots"),
        (["--raw", "--system", "x"], "--system"),
        (["--grammar", "a", "--json-schema", "b"], "exclude"),
        (["--grammar", "/nonexistent"], "/nonexistent"),
        (["--wings"], "--wings"),
    ],
)
def test_wrong_usage(args: list[str], word: str) -> None:
    refused(run("run", "demo", QUESTION, *args), 2, word)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--temp", "--temperature"),
        ("--temprature", "--temperature"),
        ("--tokens", "--max-tokens"),
        ("--ctx-size", "--ctx"),
        ("--top_k", "--top-k"),
        ("--top", "--top-k or --top-p"),
        ("-t", "--temperature or --top-k or --top-p"),
    ],
)
def test_a_wrong_option_gets_the_right_one(typed: str, meant: str) -> None:
    error = run("run", "demo", QUESTION, typed, "1").stderr.splitlines()[-1]
    assert error == f"Error: No such option: {typed}. Did you mean {meant}?"


def test_a_prompt_without_quotes_is_told_to_have_them() -> None:
    refused(run("run", "demo", "What", "is", "it"), 2, "(is it)", "quotes: python", 'run MODEL "several words"')


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
def test_hints_name_the_program_as_it_was_called(tmp_path: Path) -> None:
    def said(env: dict[str, str], *program: str) -> str:
        quiet: dict[str, Any] = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL}
        done = subprocess.run([*program, "run", "demo"], env=os.environ | env, **quiet)
        return str(done.stderr.splitlines()[-1])

    (tmp_path / "moelocal").write_text(f"#!{sys.executable}\nfrom moelocal.__main__ import main\nmain()\n")
    (tmp_path / "moelocal").chmod(0o755)
    assert said({}, str(tmp_path / "moelocal")).startswith(f"Give one: {tmp_path}/moelocal run demo")
    assert said({"PATH": f"{tmp_path}:/bin"}, str(tmp_path / "moelocal")).startswith("Give one: moelocal run demo")
    assert said({"MOELOCAL_COMMAND": "scripts/moelocal"}, *command()).startswith("Give one: scripts/moelocal run demo")
    assert "-m moelocal run demo" in said({}, *command())


def test_a_context_beyond_the_training_is_told() -> None:
    assert "trained for 2,048 tokens" in run("run", "demo", QUESTION, "--ctx", "2049", *QUICK).stderr
    assert "trained" not in run("run", "demo", QUESTION, "--ctx", "2048", *QUICK).stderr


def test_no_prompt() -> None:
    refused(run("run", "demo"), 2, "empty", "moelocal run demo")
    refused(run("run", "demo", "  \n"), 2, "empty")
    refused(run("run", "demo", stdin=b"\xff\xfe\x00"), 2, "UTF-8", "byte 0")


def test_a_prompt_longer_than_the_context() -> None:
    refused(run("run", "demo", "word " * 300, "--ctx", "128", *QUICK), 1, "128", "--ctx")
    refused(run("run", "demo", "word " * 3000, *QUICK), 1, "2,048")


def test_models_that_are_not_there(tmp_path: Path) -> None:
    refused(run("run", "dmeo", "hi"), 1, "dmeo", "Did you mean demo?")
    refused(run("run", str(tmp_path / "x.gguf"), "hi"), 1, "x.gguf")
    refused(run("run", str(tmp_path), "hi"), 1, "folder")
    link = tmp_path / "dangling.gguf"
    link.symlink_to(tmp_path / "nothing")
    refused(run("run", str(link), "hi"), 1, "dangling.gguf")


def test_a_typo_gets_the_closest_name(tmp_path: Path) -> None:
    (tmp_path / "qwen3-30b.gguf").touch()
    (tmp_path / "a.gguf").touch()
    refused(run("run", str(tmp_path / "qwen3-30.gguf"), "hi"), 1, "Did you mean", "qwen3-30b.gguf")
    refused(run("run", "demmo", "hi"), 1, "Did you mean demo?")
    refused(run("run", " ", "hi"), 1, "empty")


def test_a_grammar_that_cannot_be_parsed_says_why_and_nothing_else(tmp_path: Path) -> None:
    grammar = tmp_path / "g.gbnf"
    grammar.write_text("What is the capital of France?\n")
    done = run("run", "demo", "hi", "--grammar", str(grammar), *QUICK)
    refused(done, 2, f"{grammar}: The grammar cannot be parsed", "::=")
    assert done.stderr.count("\n") == 2, done.stderr
    schema = tmp_path / "s.json"
    schema.write_text('{"type": "thing"}')
    refused(run("run", "demo", "hi", "--json-schema", str(schema), *QUICK), 2, f"{schema}: The JSON schema cannot")


def test_an_answer_that_was_cut_says_so() -> None:
    assert "(Ended at --max-tokens 3.)" in run("run", "demo", QUESTION, "--max-tokens", "3", *QUICK).stderr
    full = run("run", "demo", "Tell me a story about a fox.", "--ctx", "64", *QUICK)
    assert "(The context is full" in full.stderr


def test_names_that_no_file_can_have() -> None:
    refused(run("run", "x" * 300, "hi"), 1, "xxx...")
    refused(run("run", "~nosuchuser/x.gguf", "hi"), 2, "~nosuchuser")


def test_files_that_are_no_model(tmp_path: Path) -> None:
    data = DEMO.read_bytes()
    bad = tmp_path / "bad.gguf"
    for content in (b"", b"hello world, this is text", b"\x80" * 4096, data[:1000], data[:200_000], data[:-1]):
        bad.write_bytes(content)
        refused(run("run", str(bad), "hi"), 1, "byte")


def test_a_missing_shard(tmp_path: Path) -> None:
    tensors = [[(f"blk.{n}.attn_q.weight", (32,), 0)] for n in range(3)]
    paths = write_shards(tmp_path, "model", {"general.architecture": "llama"}, tensors)
    paths[1].unlink()
    refused(run("run", str(paths[0]), "hi"), 1, paths[1].name)


def test_an_architecture_that_llama_cpp_does_not_know(tmp_path: Path) -> None:
    data = DEMO.read_bytes().replace(b"llama.", b"lxama.")
    at = data.index(b"general.architecture") + len("general.architecture") + 12
    odd = tmp_path / "odd.gguf"
    odd.write_bytes(data[:at] + b"lxama" + data[at + 5 :])
    refused(run("run", str(odd), "hi"), 1, "lxama", "pip install --upgrade")


def test_a_broken_template(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(DEMO.read_bytes().replace(b"{% for m in messages %}", b"{% fxr m in messages %}"))
    refused(run("run", str(broken), "hi"), 1, "template", "--raw")
    assert run("run", str(broken), "What is", "--raw", "--max-tokens", "3", *QUICK).returncode == 0


def test_no_permission(tmp_path: Path) -> None:
    file = tmp_path / "secret.gguf"
    file.write_bytes(DEMO.read_bytes())
    file.chmod(0)
    if os.access(file, os.R_OK):
        pytest.skip("this user may read everything")
    refused(run("run", str(file), "hi"), 1, "ermission")


def test_too_little_memory() -> None:
    refused(run("run", "demo", "hi", "--ram", "64MiB"), 1, "RAM")
    refused(run("run", "demo", "hi", "--ctx", "100000000"), 1, "RAM", "--ctx")


@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space are Linux's")
def test_memory_that_the_system_denies() -> None:
    def limit() -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (700 << 20, 700 << 20))

    done = run("run", "demo", "hi", "--ctx", "1000000", *QUICK, preexec_fn=limit)
    done.stderr = done.stderr.partition("\n")[2]  # after the note on what the model was trained for
    refused(done, 1, "memory")


# -- ends of all kinds -------------------------------------------------------------------------------------------------


def test_output_that_cannot_be_written() -> None:
    line = " ".join(command("run", "demo", "Hi", *QUICK))
    quiet: dict[str, Any] = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL}
    full = subprocess.run(["bash", "-c", f"{line} > /dev/full"], **quiet)
    assert full.returncode == 1 and "full" in full.stderr and "Traceback" not in full.stderr
    closed = subprocess.run(["bash", "-c", f"{line} >&-"], **quiet)
    assert closed.returncode == 1 and closed.stderr.startswith("Error: Standard output is closed"), closed.stderr


def test_a_context_follows_the_prompt_and_the_answer() -> None:
    short = json.loads(run("run", "demo", QUESTION, "--max-tokens", "20", "--json", *QUICK).stdout)["plan"]
    assert short["n_ctx"] == 39 and short["devices"][0]["kv_bytes"] < 2**20
    given = json.loads(run("run", "demo", QUESTION, "--ctx", "777", "--json", *QUICK).stdout)["plan"]
    assert given["n_ctx"] == 777 and {"disk_bytes", "expert_layers", "llama_args", "alternatives"} <= set(given)


def test_a_reader_that_leaves() -> None:
    line = " ".join(command("run", "demo", '"Write a Python function that sums a list of values."', *QUICK))
    done = subprocess.run(["bash", "-o", "pipefail", "-c", f"{line} | head -n 1"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "def total(values):\n") and "Traceback" not in done.stderr


ENDLESS = ["run", "demo", "Tell me a story", "--raw", "--temperature", "1", "--ctx", "2048", *QUICK]


def start_endless() -> subprocess.Popen[bytes]:
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command(*ENDLESS), stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, start_new_session=True
    )


def test_ctrl_c() -> None:
    process = start_endless()
    assert process.stdout is not None
    assert process.stdout.read(1)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and b"Traceback" not in err
    note, figures = err.decode().splitlines()
    assert note == "(interrupted)" and figures.startswith("prefill ") and "decode " in figures


@pytest.mark.parametrize("delay", [0.02, 0.08, 0.15, 0.25, 0.4])
def test_ctrl_c_at_any_moment(delay: float) -> None:
    process = start_endless()
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    python_was_starting = b"Fatal Python error" in err or (b"Traceback" in err and b"in main" not in err)
    assert python_was_starting or (process.returncode in (130, -signal.SIGINT, 0) and b"Traceback" not in err), err


def test_a_terminal_that_vanishes() -> None:
    master, slave = pty.openpty()
    process = subprocess.Popen(
        command(*ENDLESS), stdin=slave, stdout=slave, stderr=subprocess.PIPE, start_new_session=True
    )
    os.close(slave)
    assert select.select([master], [], [], 60)[0]
    os.close(master)
    _, err = process.communicate(timeout=60)
    assert b"Traceback" not in err
