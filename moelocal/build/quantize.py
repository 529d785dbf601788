"""A GGUF file in smaller types, by llama.cpp's own quantizer.

    job = QuantizeJob(Path("model-F16.gguf"), made_here("model-Q4_K_M"), "Q4_K_M")
    result = quantize(job)

llama.cpp runs in a child process: it may abort, and Ctrl-C shall end it at once. Before a byte is written it says which
type every tensor would get, so that what cannot be is refused first.

Source: llama.cpp 0c1e57098, src/llama-quant.cpp (llama_model_quantize_impl: the log's lines).
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from moelocal.build import refusals
from moelocal.build.output import check_free, publish, workspace, writing
from moelocal.build.quantizer import Quantizer
from moelocal.build.types import COPY, QuantType, file_type, quant_type, tensor_type
from moelocal.errors import BadGGUF, MoelocalError
from moelocal.model.header import GGML_TYPES, GGUFHeader, TensorInfo, parse_header, read_header

if TYPE_CHECKING:
    from moelocal.build.imatrix_file import Imatrix

# `[   1/  99] blk.0.attn_k.weight  - [  256,   128,     1,     1], type =    f16, size = 0.06 MiB -> 0.02 MiB (q4_K)`
_ROW = re.compile(r"\[\s*\d+/\s*\d+\] (?P<name>.*?)\s+- \[.*\], type =\s*\S+, size =[^(]*(?:\((?P<after>\w+)\))?")
_BEGUN = re.compile(r"\[\s*(?P<number>\d+)/\s*\d+\] ")
_FALLBACK = re.compile(
    r"warning: (?P<name>\S+)\s+- ncols\s+\d+ not divisible by\s+\d+ \(required for type\s+(?P<type>\w+)"
)
_ADDED_BYTES = 4096  # at most, of metadata: file type, version, where the importance matrix is from
_ALIGNMENT = 32  # GGUF_DEFAULT_ALIGNMENT, which llama.cpp's quantizer always uses
_SYNC_S = 0.5
_COPY_COST = 0.1  # of quantizing as many values


@dataclass(frozen=True, slots=True)
class QuantizeJob:
    """What to make of which file. `source` is the file or the first shard, `output` the file (with `keep_split` what
    the shards are named after). `type_name` is llama.cpp's mixture (`Q4_K_M`); types of single tensors, by names as in
    `GGML_TYPES`: `patterns` (regular expression, type) go before `tensor_types` (tensor's full name -> type).
    `threads` None: all cores. `replace`: the output may exist. `called`: the source's name in messages."""

    source: Path
    output: Path
    type_name: str
    tensor_types: Mapping[str, str] = field(default_factory=dict)
    patterns: tuple[tuple[str, str], ...] = ()
    output_type: str | None = None
    embedding_type: str | None = None
    imatrix: Path | None = None
    threads: int | None = None
    requantize: bool = False
    keep_split: bool = False
    replace: bool = False
    called: str = ""

    @property
    def kind(self) -> QuantType:
        """The mixture."""
        return quant_type(self.type_name)

    @property
    def shown(self) -> str:
        """The source, as commands name it."""
        return self.called or str(self.source)


@dataclass(frozen=True, slots=True)
class TensorChange:
    """One tensor and its types before and after, as ids of `GGML_TYPES`. `wanted`: the type that its shape did not
    allow, so that llama.cpp took `after` instead."""

    name: str
    shape: tuple[int, ...]
    before: int
    after: int
    bytes_before: int
    bytes_after: int
    wanted: int | None = None

    @property
    def n_values(self) -> int:
        """Weights in it."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class Preview:
    """What a job would make, tensors in the order of the work. `file_bytes`: what the output takes at most, which is at
    most 8 KiB too much. `refusal`: why it will not be made."""

    changes: tuple[TensorChange, ...]
    bytes_in: int
    file_bytes: int
    refusal: MoelocalError | None = None

    @property
    def bits_per_weight(self) -> float:
        """Of the tensors alone."""
        return 8 * sum(change.bytes_after for change in self.changes) / sum(change.n_values for change in self.changes)

    @property
    def types(self) -> dict[str, int]:
        """How many tensors get each type."""
        return dict(Counter(GGML_TYPES[change.after].name for change in self.changes).most_common())

    @property
    def fallbacks(self) -> tuple[TensorChange, ...]:
        """Tensors whose shape does not allow the wanted type."""
        return tuple(change for change in self.changes if change.wanted is not None)


@dataclass(frozen=True, slots=True)
class QuantizeResult:
    """What a job made. `outputs` are the file, or all shards; `bytes_in` and `bytes_out` sizes of files."""

    outputs: tuple[Path, ...]
    preview: Preview
    bytes_in: int
    bytes_out: int
    seconds: float


class Progress(NamedTuple):
    """How far it is: `fraction` of the work, 0 to 1, and the tensor that is under way."""

    fraction: float
    number: int
    n_tensors: int
    change: TensorChange


Tell = Callable[[Progress], None]


def preview(job: QuantizeJob, on_log: Callable[[str], None] | None = None) -> Preview:
    """Which type each tensor would get, and what the output would take. Writes nothing.

    Raises:
        MoelocalError: the job makes no sense, or llama.cpp cannot read the source.
    """
    with _rehearsed(job, on_log) as (_, _, planned):
        return planned


def quantize(
    job: QuantizeJob,
    on_progress: Tell = lambda _: None,
    on_preview: Callable[[Preview], None] = lambda _: None,
    on_log: Callable[[str], None] | None = None,
) -> QuantizeResult:
    """Does the job; the output is there afterwards, whole, or not at all.

    Args:
        on_preview: told once what will be made, before it is.
        on_log: gets llama.cpp's own log, by lines.

    Raises:
        BadRequest: the job makes no sense, or may not overwrite what is there.
        MoelocalError: it cannot be done, or failed.
        KeyboardInterrupt: Ctrl-C; nothing is left.
    """
    start = time.monotonic()
    with _rehearsed(job, on_log) as (header, quantizer, planned):
        if planned.refusal is not None:
            raise planned.refusal
        outputs = _outputs(job, header)
        with _place(job, outputs, planned.file_bytes) as (target, files):
            on_preview(planned)
            _work(quantizer, target, files, planned, on_progress)
            _check_made(files, planned)
    bytes_out = sum(path.stat().st_size for path in outputs)
    return QuantizeResult(outputs, planned, planned.bytes_in, bytes_out, time.monotonic() - start)


@contextlib.contextmanager
def _rehearsed(
    job: QuantizeJob, on_log: Callable[[str], None] | None
) -> Iterator[tuple[GGUFHeader, Quantizer, Preview]]:
    """A quantizer that has said what it would do, and may do it."""
    with Quantizer(job.source.name, on_log) as quantizer:  # which takes a while to start
        header = read_header(job.source)
        refusals.check_job(job, header)
        imatrix = None
        if job.imatrix is not None:
            from moelocal.build import imatrix_file

            imatrix = imatrix_file.read(job.imatrix)
        order = {
            "source": header.shards[0],
            "settings": _settings(job, header, imatrix),
            "imatrix": None if job.imatrix is None else str(job.imatrix),
        }
        changes = _changes(header, quantizer.rehearse(order))
        refusal = refusals.of_changes(job, changes, imatrix)
        yield header, quantizer, Preview(changes, header.file_bytes, _file_bytes(header, changes), refusal)


def _settings(job: QuantizeJob, header: GGUFHeader, imatrix: Imatrix | None) -> dict[str, object]:
    """`engine.quantizing.Settings` without the importances, which the child reads itself."""
    kind = job.kind
    metadata: dict[str, int | str] = {}
    if imatrix is not None and job.imatrix is not None:
        metadata["quantize.imatrix.file"] = job.imatrix.name
        if imatrix.datasets:
            metadata["quantize.imatrix.dataset"] = imatrix.datasets[0]
        metadata["quantize.imatrix.entries_count"] = len(imatrix.entries)
        if imatrix.n_chunks > 0:
            metadata["quantize.imatrix.chunks_count"] = imatrix.n_chunks
    return {
        "file_type": file_type(kind),
        "threads": job.threads or 0,
        "overrides": [(pattern, tensor_type(of)) for pattern, of in (*job.patterns, *_exactly(job.tensor_types))],
        "output_type": None if job.output_type is None else tensor_type(job.output_type),
        "embedding_type": None if job.embedding_type is None else tensor_type(job.embedding_type),
        "only_copy": kind.name == COPY,
        "requantize": job.requantize,
        "keep_split": _is_split(job, header),
        "metadata": metadata,
    }


def _exactly(tensor_types: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Patterns for tensors by name, a few only: llama.cpp tries each one on each tensor, twice."""
    layers: dict[tuple[str, str], list[str]] = {}
    for name, of in tensor_types.items():
        if match := re.fullmatch(r"blk\.(\d+)\.(.+)", name):
            layers.setdefault((match[2], of), []).append(match[1])
        else:
            yield f"^{re.escape(name)}$", of
    for (rest, of), numbers in layers.items():
        yield rf"^blk\.(?:{'|'.join(numbers)})\.{re.escape(rest)}$", of


def _changes(header: GGUFHeader, lines: Sequence[str]) -> tuple[TensorChange, ...]:
    """What a rehearsal's log says of each tensor."""
    known = {tensor.name: tensor for tensor in header.tensors}
    ids = {kind.name: number for number, kind in GGML_TYPES.items()}
    wanted = {match["name"]: ids[match["type"].upper()] for line in lines if (match := _FALLBACK.match(line))}
    changes = []
    for line in lines:
        if match := _ROW.match(line):
            tensor = known.pop(match["name"])
            after = ids[match["after"].upper()] if match["after"] else tensor.ggml_type
            changes.append(_change(tensor, after, wanted.get(tensor.name)))
    if known:
        raise MoelocalError(
            f"llama.cpp says nothing of {len(known):,} tensors, such as {next(iter(known))}.",
            "This moelocal knows llama-cpp-python 0.3.36: pip install llama-cpp-python==0.3.36",
        )
    return tuple(changes)


def _change(tensor: TensorInfo, after: int, wanted: int | None) -> TensorChange:
    kind = GGML_TYPES[after]
    n_bytes = prod(tensor.shape) // kind.block_size * kind.type_bytes
    return TensorChange(tensor.name, tensor.shape, tensor.ggml_type, after, tensor.n_bytes, n_bytes, wanted)


def _file_bytes(header: GGUFHeader, changes: Sequence[TensorChange]) -> int:
    """What the output takes at most: the first shard's head, rows of the table of the others' tensors, all data."""
    rows = sum(
        8 + len(tensor.name.encode()) + 4 + 8 * len(tensor.shape) + 12 for tensor in header.tensors if tensor.shard
    )
    data = sum(-(-change.bytes_after // _ALIGNMENT) * _ALIGNMENT for change in changes)
    return header.data_offset + rows + data + _ADDED_BYTES


def _is_split(job: QuantizeJob, header: GGUFHeader) -> bool:
    return job.keep_split and len(header.shards) > 1


def _outputs(job: QuantizeJob, header: GGUFHeader) -> tuple[Path, ...]:
    """The file to make, or all shards."""
    if not _is_split(job, header):
        return (job.output,)
    count, stem = len(header.shards), job.output.name.removesuffix(".gguf")
    return tuple(job.output.with_name(f"{stem}-{i + 1:05d}-of-{count:05d}.gguf") for i in range(count))


@contextlib.contextmanager
def _place(job: QuantizeJob, outputs: Sequence[Path], need_bytes: int) -> Iterator[tuple[Path, Sequence[Path]]]:
    """What to tell llama.cpp to write, and the files that it then writes; they become the outputs at the end."""
    if len(outputs) == 1:
        with writing(job.output, need_bytes, job.replace) as part:
            yield part, [part]
        return
    for path in outputs:
        check_free(path, job.replace)
    with workspace(outputs[0], need_bytes) as folder:
        files = [folder / path.name for path in outputs]
        yield folder / job.output.name.removesuffix(".gguf"), files  # it numbers them itself
        publish(files, outputs[0].parent)


def _work(quantizer: Quantizer, target: Path, files: Sequence[Path], planned: Preview, on_progress: Tell) -> None:
    """Lets the quantizer write the files."""
    costs = [change.n_values * (1 if change.after != change.before else _COPY_COST) for change in planned.changes]
    total, done, number = sum(costs), 0.0, 0
    on_progress(Progress(0.0, 1, len(costs), planned.changes[0]))
    with quantizer, _to_the_disk(files):  # the quantizer ends before what it writes is moved, or removed
        for line in quantizer.work(target, files):
            if match := _BEGUN.match(line):
                done, number = done + costs[number], int(match["number"])
                following = planned.changes[min(number, len(costs) - 1)]
                on_progress(Progress(done / total, min(number + 1, len(costs)), len(costs), following))


@contextlib.contextmanager
def _to_the_disk(files: Sequence[Path]) -> Iterator[None]:
    """Lets the disk write while llama.cpp computes: else all of it would be waited for at the end."""
    is_over = threading.Event()

    def sync() -> None:
        while not is_over.wait(_SYNC_S):
            for file in files:
                with contextlib.suppress(OSError):  # not begun; Windows syncs only what may be written to
                    handle = os.open(file, os.O_RDONLY)
                    try:
                        os.fsync(handle)
                    finally:
                        os.close(handle)

    thread = threading.Thread(target=sync, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
    thread.join()  # after Ctrl-C nobody waits for the disk


def _check_made(files: Sequence[Path], planned: Preview) -> None:
    """Reads the output's head: llama.cpp does not notice every write that failed.

    Raises:
        OSError: a file is not whole.
    """
    made: dict[str, int] = {}
    try:
        for file in files:
            with file.open("rb") as stream:
                made |= {tensor.name: tensor.ggml_type for tensor in parse_header(stream).tensors}
    except BadGGUF as error:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
    assert made == {change.name: change.after for change in planned.changes}
