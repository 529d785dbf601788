"""The converter in its process: what it is told, how far it is, how it fails, and that nothing is left then."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moelocal.build import output
from moelocal.build.checkpoint import open_checkpoint
from moelocal.build.convert import ConvertJob, Progress, Watch, check_python, convert
from moelocal.build.converter import find_converter
from moelocal.errors import BadRequest, MoelocalError, OutOfMemory
from tests.build.checkpoints import GGUF, write_checkpoint, write_converter, write_python
from tests.conftest import ROOT


@pytest.fixture
def job(tmp_path: Path) -> ConvertJob:
    converter = find_converter(write_converter(tmp_path / "converter"))
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "my {ftype} model"))
    python = str(write_python(tmp_path / "python"))
    return ConvertJob(checkpoint, converter, tmp_path / "out" / "m-{x}.gguf", "bf16", python=python)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def changed(job: ConvertJob, **changes: object) -> ConvertJob:
    from dataclasses import replace

    return replace(job, **changes)  # type: ignore[arg-type]


def test_a_file_is_made(job: ConvertJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_TOLD", str(tmp_path / "told.json"))
    monkeypatch.setenv("FAKE_CONVERTER", "slow")
    seen: list[Progress] = []
    said: list[str] = []
    result = convert(changed(job, name="Mine"), Watch(seen.append, said.append))
    assert result.outputs == (job.output,) and job.output.read_bytes() == GGUF
    assert names(job.output.parent) == [job.output.name]
    assert result.bytes_out == len(GGUF) and result.types == {"F16": 1} and result.bits_per_weight == 16
    assert said == ["said once"]
    assert seen[0] == Progress(0, 0) and any(0 < p.n_done < p.n_bytes == len(GGUF) for p in seen)
    told = json.loads((tmp_path / "told.json").read_text())
    assert Path(told["gguf"]).is_relative_to(job.converter.library) and told["offline"] == "1"
    assert told["args"]["outtype"] == "bf16" and told["args"]["model_name"] == "Mine"
    assert told["args"]["model"] == str(job.checkpoint.folder)


def test_packages_of_pythonpath_are_found(job: ConvertJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where `check_python` finds torch the converter must: some computing centres have it there."""
    library = write_python(tmp_path / "there").parent / "lib"
    monkeypatch.setenv("PYTHONPATH", str(library))
    check_python(sys.executable)
    convert(changed(job, python=sys.executable))


def test_shards_appear_together_and_are_not_overwritten(job: ConvertJob) -> None:
    job = changed(job, split_bytes=1 << 20)
    result = convert(job)
    wanted = [job.output.with_name(f"{job.output.stem}-0000{i}-of-00002.gguf") for i in (1, 2)]
    assert list(result.outputs) == wanted and names(job.output.parent) == [path.name for path in wanted]
    with pytest.raises(BadRequest, match="exists already"):
        convert(job)
    convert(changed(job, replace=True))


FAILURES = {
    "NotImplementedError('BPE pre-tokenizer was not recognized - update get_vocab_base_pre()')": "know the tokenizer",
    "ValueError(\"Can not map tensor 'model.x.weight'\")": r"does not know the tensor model\.x\.weight",
    "NotImplementedError(\"Quant method is not yet supported: 'awq'\")": "weights quantized by awq",
    "FileNotFoundError(2, 'No such file or directory', '/m/vocab.json')": r"lacks vocab\.json",
    "FileNotFoundError('File not found: /m/tokenizer.model')": r"lacks tokenizer\.model",
    "KeyError(\"could not find any of: ['n_layers', 'n_layer']\")": "lacks what the converter needs",
    "ModuleNotFoundError(\"No module named 'mistral_common'\")": "needs the Python package mistral_common",
    "OSError(\"Can't load tokenizer for '/m'\")": "tokenizer .* cannot be loaded",
    "MemoryError()": "Memory ran out",
    "RuntimeError('DefaultCPUAllocator: can\\'t allocate memory')": "Memory ran out",
    "OSError('1048576 requested and 0 written')": "The disk is full",
    "OSError(28, 'No space left on device')": "The disk is full",
    "KeyError('n_group')": r"cannot convert .*: it looked for 'n_group', which is not there \(KeyError at ",
    "ValueError('x' * 9000)": "cannot convert",
    "ValueError()": "cannot convert .*: ValueError",
}


@pytest.mark.parametrize("how", FAILURES)
def test_failures_in_plain_words(job: ConvertJob, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setenv("FAKE_CONVERTER", f"raise {how}")
    with pytest.raises(MoelocalError, match=FAILURES[how]) as caught:
        convert(job)
    assert caught.value.hint and "\n" not in caught.value.message and len(caught.value.message) < 900
    assert names(job.output.parent) == []


@pytest.mark.parametrize(
    "how,message",
    [
        ("exit", "architecture Abc"),
        ("tokenizer", "tokenizer of .* cannot be read: could not"),
        ("nothing", "wrote nothing"),
        ("half", "no usable GGUF"),
        ("kill", "Memory ran out"),
    ],
)
def test_other_ends(job: ConvertJob, monkeypatch: pytest.MonkeyPatch, how: str, message: str) -> None:
    monkeypatch.setenv("FAKE_CONVERTER", how)
    with pytest.raises(OutOfMemory if how == "kill" else MoelocalError, match=message):
        convert(job)
    assert names(job.output.parent) == []


def test_code_of_the_checkpoint_runs_only_when_trusted(job: ConvertJob) -> None:
    (job.checkpoint.folder / "tokenization_own.py").touch()
    with pytest.raises(MoelocalError, match="is a program of the publisher's") as caught:
        convert(job)
    assert "--trust-code" in caught.value.hint
    convert(changed(job, trust_code=True))


def test_no_room(job: ConvertJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "free_bytes", lambda _: 1 << 20)
    with pytest.raises(MoelocalError, match=r"takes 8\.0 MiB, and the disk .* has room for 1\.0 MiB"):
        convert(job)
    assert names(job.output.parent) == []


def test_missing_packages_are_named(tmp_path: Path) -> None:
    check_python(str(write_python(tmp_path / "whole")))
    bare = write_python(tmp_path / "bare", ["transformers", "yaml"])
    with pytest.raises(MoelocalError, match="needs torch and safetensors, which are not installed") as caught:
        check_python(str(bare))
    assert f"{bare} -m pip install 'moelocal[convert]'" in caught.value.hint
    with pytest.raises(BadRequest, match="is no Python that can be started"):
        check_python(str(tmp_path / "nothing"))


_PROGRAM = """
import sys
from pathlib import Path
from moelocal.build.checkpoint import open_checkpoint
from moelocal.build.convert import ConvertJob, convert
from moelocal.build.converter import find_converter
checkpoint, converter, python, output = sys.argv[1:]
found = open_checkpoint(Path(checkpoint)), find_converter(Path(converter))
convert(ConvertJob(*found, Path(output), "f16", python=python))
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL])
def test_an_end_in_the_middle(job: ConvertJob, monkeypatch: pytest.MonkeyPatch, signum: signal.Signals) -> None:
    """Ctrl-C leaves nothing; what a killed process left is removed by the next one; the converter ends in any case."""
    monkeypatch.setenv("FAKE_CONVERTER", "slow")
    args = [job.checkpoint.folder, job.converter.folder, job.python, job.output]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", _PROGRAM, *map(str, args)], env=env, stderr=subprocess.DEVNULL)
    wait_for(lambda: list(job.output.parent.glob(".*/*.gguf")))
    process.send_signal(signum)
    process.wait()
    if signum == signal.SIGINT:
        assert names(job.output.parent) == []
    assert not job.output.exists()
    wait_for(lambda: not converters(job))
    monkeypatch.delenv("FAKE_CONVERTER")
    convert(job)
    assert names(job.output.parent) == [job.output.name]


def converters(job: ConvertJob) -> list[int]:
    """Processes that run in the converter's folder."""
    import psutil

    found = []
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()) == job.converter.folder and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except (psutil.Error, OSError):
            continue
    return found


def wait_for(condition: object) -> None:
    assert callable(condition)
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
