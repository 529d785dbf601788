"""A Hugging Face checkpoint to GGUF, by llama.cpp's own converter in a process of its own.

    job = ConvertJob(checkpoint, converter, made_here("model-BF16"), "bf16")
    result = convert(job)

The output is there afterwards, whole, or not at all.

Source: llama.cpp 0c1e57098, convert_hf_to_gguf.py (parse_args, main).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any, NamedTuple

from moelocal.build.checkpoint import Checkpoint
from moelocal.build.child import running
from moelocal.build.converter import Converter
from moelocal.build.failures import explain
from moelocal.build.output import check_free, publish, workspace
from moelocal.errors import BadGGUF, BadRequest, MoelocalError
from moelocal.model.ggml_types import GGML_TYPES
from moelocal.model.header import GGUFHeader, read_header

_MODULES = ("torch", "transformers", "numpy", "safetensors", "yaml", "tqdm")
_LOOK = "import importlib.util as u, json, sys; print(json.dumps([m for m in sys.argv[1:] if not u.find_spec(m)]))"
_LOOK_TIMEOUT_S = 60
_UNTELLING = re.compile(
    r"^[*\s]*$|Failed to load model config|Trying to load config\.json|duplicate merges|RoPE type: default"
)


@dataclass(frozen=True, slots=True)
class ConvertJob:
    """What to make of which checkpoint. `output` is the file, or what shards of at most `split_bytes` are named after;
    `name` the model's own, for its metadata; `python` the interpreter that has torch; `trust_code`: Python files of
    the checkpoint may run; `replace`: the output may exist."""

    checkpoint: Checkpoint
    converter: Converter
    output: Path
    type_name: str
    split_bytes: int | None = None
    name: str | None = None
    python: str = sys.executable
    trust_code: bool = False
    replace: bool = False


@dataclass(frozen=True, slots=True)
class ConvertResult:
    """What was made: the file, or all shards. `bits_per_weight`: of the tensors alone; `types`: how many tensors have
    each."""

    outputs: tuple[Path, ...]
    bytes_out: int
    bits_per_weight: float
    types: dict[str, int]
    seconds: float


class Progress(NamedTuple):
    """How far it is: bytes written, of how many. `n_bytes` 0: nothing is written yet."""

    n_done: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Watch:
    """Who is told what meanwhile: progress, the converter's warnings. `is_verbose`: its log goes to stderr."""

    progress: Callable[[Progress], None] = lambda _: None
    warn: Callable[[str], None] = lambda _: None
    is_verbose: bool = False


def check_python(python: str) -> None:
    """Looks whether an interpreter has what the converter imports.

    Raises:
        BadRequest: it is none.
        MoelocalError: with the command that installs what is missing.
    """
    try:
        done = subprocess.run(
            [python, "-c", _LOOK, *_MODULES], capture_output=True, text=True, timeout=_LOOK_TIMEOUT_S, check=True
        )
        missing = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise BadRequest(
            f"{python} is no Python that can be started.", "Name one that has torch and transformers: --python PATH"
        ) from error
    if missing:
        names = " and ".join([", ".join(missing[:-1]), missing[-1]]) if len(missing) > 1 else missing[0]
        raise MoelocalError(
            f"The converter needs {names}, which {'are' if len(missing) > 1 else 'is'} not installed.",
            f"{python} -m pip install 'moelocal[convert]', or name another Python that has it: --python PATH",
        )


def check_output(job: ConvertJob) -> None:
    """Looks whether the output may be made.

    Raises:
        BadRequest: it exists.
    """
    check_free(job.output, job.replace)
    if job.split_bytes is not None and not job.replace:
        for shard in job.output.parent.glob(f"{_escaped(job.output.stem)}-00001-of-*.gguf"):
            check_free(shard, False)


def _escaped(name: str) -> str:
    import glob

    return glob.escape(name)


def convert(job: ConvertJob, watch: Watch = Watch()) -> ConvertResult:
    """Does the job.

    Raises:
        MoelocalError: it cannot be done, or failed.
        KeyboardInterrupt: Ctrl-C; nothing is left.
    """
    start = time.monotonic()
    check_output(job)
    with workspace(job.output, job.checkpoint.output_bytes(job.type_name)) as folder:
        made, header = make(job, folder, watch)
        outputs = tuple(publish(made, job.output.parent))
    return _result(outputs, header, start)


def make(job: ConvertJob, folder: Path, watch: Watch) -> tuple[list[Path], GGUFHeader]:
    """Lets the converter write into an empty folder; gives the file, or all shards in order, and their head.

    Raises:
        MoelocalError: it failed.
        OSError: the disk did.
    """
    target = folder / "model.gguf"  # the converter fills in names with braces
    if (failure := _run(job, target, watch)) is not None:
        raise explain(str(job.checkpoint.folder), *failure)
    made = [
        part.replace(folder / part.name.replace(target.stem, job.output.stem, 1))
        for part in sorted(folder.glob("*.gguf"))
    ]
    try:
        if not made:
            raise MoelocalError("The converter ended without a word, and wrote nothing.", "Run again with -v.")
        return made, read_header(made[0])
    except BadGGUF as error:
        raise MoelocalError(
            f"What the converter wrote is no usable GGUF file: {error.message}.",
            "Run again with -v; if it happens twice, this disk may be at fault.",
        ) from error


def rehearse(job: ConvertJob, called: str) -> None:
    """Lets the converter read the tokenizer, from a folder that has everything but the weights: before these are
    downloaded. What else fails is left to the real run.

    Args:
        called: the checkpoint's name, for messages.

    Raises:
        MoelocalError: it cannot read the tokenizer.
    """
    with tempfile.TemporaryDirectory(prefix="moelocal-") as scratch:
        failure = _run(job, Path(scratch) / "vocabulary.gguf", Watch(), ["--vocab-only"])
    if failure is not None and "set_vocab" in failure.last.get("functions", ()):
        raise explain(called, *failure)


class _Failure(NamedTuple):
    """How the converter ended: what it told last, its exit status, the end of its stderr."""

    last: dict[str, Any]
    status: int
    printed: str


def _run(job: ConvertJob, target: Path, watch: Watch, more: Sequence[str] = ()) -> _Failure | None:
    """Runs the converter to its end; None: all went well."""
    order = {"arguments": [*_arguments(job, target), *more], "output": str(target), "trust": job.trust_code}
    child = Path(__file__).with_name("convert_child.py").read_text(encoding="utf-8")
    paths = os.pathsep.join(filter(None, [str(job.converter.library), os.environ.get("PYTHONPATH")]))
    more_env = {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    with contextlib.ExitStack() as stack:
        errors: IO[bytes] | None = None if watch.is_verbose else stack.enter_context(tempfile.TemporaryFile())
        process = stack.enter_context(
            running(
                [job.python, "-c", child],
                job.converter.folder,
                more_env,
                sys.stderr.fileno() if errors is None else errors,
            )
        )
        last = _listen(process, json.dumps(order), watch)
        last["text"] = str(last.get("text", "")).replace(f"{job.checkpoint.folder.resolve()}{os.sep}", "")
        return None if "finished" in last else _Failure(last, process.wait(), _tail(errors))


def _listen(process: subprocess.Popen[str], order: str, watch: Watch) -> dict[str, Any]:
    """Reads what the child tells; gives its last message, {} when it died without one. The last error that it logged
    is in `logged`."""
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(BrokenPipeError):  # it died; reading tells why
        process.stdin.write(order + "\n")
        process.stdin.flush()
    watch.progress(Progress(0, 0))
    total, logged, said = 0, "", set()
    for line in process.stdout:
        try:
            message = json.loads(line)
        except ValueError:
            continue
        if "total" in message:
            total = message["total"]
        elif "done" in message:
            watch.progress(Progress(message["done"], total))
        elif "warning" in message:
            text = message["warning"].strip()
            logged = text if message["level"] in ("ERROR", "CRITICAL") else logged
            if not _UNTELLING.search(text) and not text.startswith("**") and text not in said:
                said.add(text)
                watch.warn(text)
        else:
            return {**message, "logged": logged}  # an error, or the end
    return {"logged": logged}


def _tail(errors: IO[bytes] | None) -> str:
    if errors is None:
        return ""
    errors.seek(0)
    return errors.read()[-20_000:].decode(errors="replace")


def _arguments(job: ConvertJob, target: Path) -> list[str]:
    """What the converter is called with."""
    arguments = [str(job.checkpoint.folder.resolve()), "--outfile", str(target), "--outtype", job.type_name]
    if job.split_bytes is not None:
        arguments += ["--split-max-size", str(job.split_bytes)]
    if job.name is not None:
        arguments += ["--model-name", job.name]
    if job.checkpoint.lacks_prediction:
        arguments.append("--no-nextn")  # else the converter waits for layers that are not there
    return arguments


def _result(outputs: tuple[Path, ...], header: GGUFHeader, start: float) -> ConvertResult:
    n_values = sum(prod(tensor.shape) for tensor in header.tensors)
    n_bytes = sum(tensor.n_bytes for tensor in header.tensors)
    types = Counter(GGML_TYPES[tensor.ggml_type].name for tensor in header.tensors)
    bytes_out = sum(path.stat().st_size for path in outputs)
    return ConvertResult(
        outputs, bytes_out, 8 * n_bytes / n_values, dict(types.most_common()), time.monotonic() - start
    )
