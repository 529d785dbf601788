"""What `convert` does, step by step: the cheap checks first, then what is fetched, then the work."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from moelocal.cli.screen import is_dumb
from moelocal.errors import BadRequest, MoelocalError
from moelocal.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from moelocal.build.checkpoint import Checkpoint
    from moelocal.build.convert import ConvertJob, Watch
    from moelocal.build.converter import Converter
    from moelocal.build.remote import Remote
    from moelocal.cli.convert import Conversion
    from moelocal.cli.render_convert import Bar

_LINE_S = 15.0  # between lines where no bar can be shown
_LEAST_SPLIT_BYTES = 1 << 20


class Made(NamedTuple):
    """What was made of what."""

    source: str
    architecture: str
    type_name: str
    outputs: tuple[Path, ...]
    bytes_in: int
    bytes_out: int
    bits_per_weight: float
    types: dict[str, int]
    seconds: float
    converter: Converter


class _Task(NamedTuple):
    """What was typed; `repo`: the repository that SOURCE is, '' for a folder."""

    source: str
    repo: str
    out: str | None
    conversion: Conversion
    split_bytes: int | None
    python: str


def carry_out(source: str, out: str | None, conversion: Conversion, verbose: bool) -> Made:
    """From the command line to the finished file.

    Raises:
        MoelocalError: at whatever step; nothing is left of the output then.
    """
    from moelocal.build.checkpoint import check_architecture, open_checkpoint, remark_on
    from moelocal.build.convert import check_output, check_python
    from moelocal.cli.making import end_tidily
    from moelocal.cli.messages import note

    split_bytes = _check(conversion)
    end_tidily()
    checkpoint, remote = _look(source, conversion)
    task = _Task(source, remote.repo if remote else "", out, conversion, split_bytes, _python(conversion.python))
    check_python(task.python)
    with _Shown(verbose) as shown:
        converter = _converter(conversion, shown)
        check_architecture(checkpoint.architecture, converter.architectures())
        if remark := remark_on(checkpoint.config):
            note(remark)
        job = _job(task, checkpoint, converter)
        check_output(job)
        if remote is not None:
            _rehearse(remote, job, shown)
            job = _job(task, open_checkpoint(_fetched(remote, job)), converter)
        return _work(source, job, conversion.quantize, shown)


def _check(conversion: Conversion) -> int | None:
    """Looks at the options alone; gives the size of shards.

    Raises:
        BadRequest: they make no sense.
    """
    if conversion.quantize is not None:
        from moelocal.build.types import COPY, quant_type

        if quant_type(conversion.quantize).name == COPY:
            raise BadRequest("COPY is no quantization.", "Leave --quantize out.")
        if conversion.split is not None:
            raise BadRequest("--split and --quantize exclude each other.", "Quantized models are made as one file.")
    if conversion.name is not None and not re.fullmatch(r"[^\x00-\x1f/\\:]{1,200}", conversion.name):
        raise BadRequest(f"{conversion.name!r:.80} cannot be a model's name.", "Use letters, digits, dots and dashes.")
    if conversion.split is None:
        return None
    n_bytes = parse_bytes(conversion.split)
    if n_bytes < _LEAST_SPLIT_BYTES:
        raise BadRequest(f"Files of {format_bytes(n_bytes)} are too small.", "Such as: --split 4GB")
    return n_bytes


def _python(typed: str | None) -> str:
    """The interpreter that runs the converter."""
    import shutil

    from moelocal.paths import user_path

    if typed is None:
        return sys.executable
    path = user_path(typed)
    if path.is_dir():
        path = path / "bin" / "python"
    return shutil.which(str(path)) or str(path)


def _look(source: str, conversion: Conversion) -> tuple[Checkpoint, Remote | None]:
    """What SOURCE is: a whole checkpoint, or what the hub tells of one; what llama.cpp does not support ends here.

    Raises:
        MoelocalError: no checkpoint.
    """
    from moelocal.build.checkpoint import CONFIG, architecture_of, check_architecture, open_checkpoint, read_config
    from moelocal.build.families import check_router
    from moelocal.build.remote import look
    from moelocal.paths import user_path

    path = user_path(source)
    if path.exists() and not path.is_dir():
        raise _a_file(path)
    remote = None if path.is_dir() else look(_repo(source), conversion.trust_code)
    config = remote.head.config if remote else read_config(path / CONFIG)
    architecture = architecture_of(config)
    check_architecture(architecture, [architecture])
    check_router(architecture, config, source)
    return (remote.head, remote) if remote else (open_checkpoint(path.resolve()), None)


def _a_file(path: Path) -> BadRequest:
    if path.suffix == ".gguf":
        return BadRequest(
            f"{path} is a GGUF file: there is nothing to convert.", f"moelocal quantize {path} --type Q4_K_M"
        )
    return BadRequest(
        f"{path} is a file.", f"Name the folder with the whole checkpoint: moelocal convert {path.parent}"
    )


def _repo(source: str) -> str:
    """The repository that SOURCE names.

    Raises:
        BadRequest: none.
    """
    from moelocal.model.reference import parse_reference, shortened
    from moelocal.model.store import resolve

    shown = shortened(source)
    asked = None if os.path.isabs(source) or source.startswith((".", "~")) else parse_reference(source)
    if asked is None or not asked.repo:
        here = None
        with contextlib.suppress(MoelocalError):
            here = resolve(source)
        if here is not None:
            raise _a_file(here)
        raise BadRequest(
            f"There is no folder {shown}, and it is no owner/repo.",
            "Name a checkpoint's folder, or owner/repo on the hub.",
        )
    if asked.entry is not None:
        raise BadRequest(
            f"{shown} is a model of the catalog, which is GGUF already.",
            f"moelocal pull {source}, or owner/repo of a checkpoint",
        )
    if asked.quant or asked.file:
        raise BadRequest(f"{shown} names a part of a repository.", f"Name the whole one: moelocal convert {asked.repo}")
    return asked.repo


def _converter(conversion: Conversion, shown: _Shown) -> Converter:
    """The converter, with what is good to know about it."""
    from moelocal.build.converter import engine_version, find_converter, is_here
    from moelocal.cli.messages import note
    from moelocal.paths import user_path

    given = None if conversion.converter is None else user_path(conversion.converter)
    if given is None and not is_here():
        note(f"Fetching llama.cpp's converter, once: the source of llama-cpp-python {engine_version()}.")
    converter = find_converter(given, lambda done, total: shown.bytes("Fetching the converter", done, total))
    shown.clear()
    if given is not None and converter.version not in ("unknown", engine_version()):
        note(f"This is the converter of {converter.version}; the engine is {engine_version()}.")
    if given is None and not converter.is_checked:
        note(f"The converter is from {converter.origin}: no index tells its checksum, so it could not be verified.")
    return converter


def _rehearse(remote: Remote, job: ConvertJob, shown: _Shown) -> None:
    """Before the weights come: whether the converter can read the tokenizer.

    Raises:
        MoelocalError: it cannot.
    """
    from moelocal.build.convert import rehearse
    from moelocal.build.remote import copy_head, missing

    if not missing(remote):
        return
    shown.share("Reading the tokenizer", None, "")
    with tempfile.TemporaryDirectory(prefix="moelocal-") as scratch:
        copy_head(remote, Path(scratch))
        rehearse(replace(job, checkpoint=replace(remote.head, folder=Path(scratch))), remote.repo)
    shown.clear()


def _fetched(remote: Remote, job: ConvertJob) -> Path:
    """The folder of a repository's checkpoint, after its download.

    Raises:
        MoelocalError: no room for it, or for what will be made of it; the hub refuses.
    """
    from moelocal.build.remote import check_download, fetch
    from moelocal.cli.messages import note
    from moelocal.cli.pull import DownloadView

    if remote.contents is None:
        note(f"The hub cannot be asked: {remote.repo} is taken as it is here.")
    check_download(remote, job.output, job.checkpoint.output_bytes(job.type_name))
    view = DownloadView()
    try:
        return fetch(remote, view.update)
    except KeyboardInterrupt:
        view.close()
        note("Stopped. The same command goes on from here.")
        raise
    finally:
        view.close()


def _job(task: _Task, checkpoint: Checkpoint, converter: Converter) -> ConvertJob:
    from moelocal.build.convert import ConvertJob
    from moelocal.build.types import quant_type
    from moelocal.cli.making import destination

    conversion = task.conversion
    type_name = checkpoint.best_type if conversion.type == "auto" else conversion.type
    given = conversion.name or task.repo.rpartition("/")[2] or None
    last = quant_type(conversion.quantize).name if conversion.quantize else type_name.upper()
    return ConvertJob(
        checkpoint,
        converter,
        destination(task.out, f"{given or checkpoint.folder.name}-{last}"),
        type_name,
        split_bytes=task.split_bytes,
        name=given,
        python=task.python,
        trust_code=conversion.trust_code,
        replace=conversion.force,
    )


def _work(source: str, job: ConvertJob, quant: str | None, shown: _Shown) -> Made:
    """Converts, and quantizes if that is wanted."""
    from moelocal.build.convert import Progress, Watch, convert
    from moelocal.cli.messages import note

    def update(progress: Progress) -> None:
        label = f"Writing {job.type_name.upper()}" if progress.n_done and progress.n_bytes else "Reading the checkpoint"
        shown.bytes(label, progress.n_done, progress.n_bytes)

    watch = Watch(update, lambda text: note(f"The converter: {text:.300}"), shown.is_verbose)
    start = time.monotonic()
    checkpoint = job.checkpoint
    if quant is not None:
        return _quantized(source, job, quant, watch, shown)
    made = convert(job, watch)
    shown.clear()
    figures = (made.bytes_out, made.bits_per_weight, made.types, time.monotonic() - start)
    return Made(
        source,
        checkpoint.architecture,
        job.type_name.upper(),
        made.outputs,
        checkpoint.n_bytes,
        *figures,
        job.converter,
    )


def _quantized(source: str, job: ConvertJob, quant: str, watch: Watch, shown: _Shown) -> Made:
    """Converts to a hidden file, and quantizes that."""
    from moelocal.build.convert import check_output, make
    from moelocal.build.output import workspace
    from moelocal.build.quantize import QuantizeJob, quantize
    from moelocal.build.types import quant_type

    start, kind, checkpoint = time.monotonic(), quant_type(quant), job.checkpoint
    check_output(job)
    between = checkpoint.output_bytes(job.type_name)
    need = between + int(checkpoint.output_bytes("f16") * kind.bits / 16)
    with workspace(job.output, need) as folder:
        made, _ = make(job, folder, watch)
        order = QuantizeJob(
            made[0],
            job.output,
            kind.name,
            replace=job.replace,
            requantize=job.type_name == "q8_0",
            called=job.output.stem,
        )
        result = quantize(
            order,
            lambda p: shown.share(f"Quantizing {p.number}/{p.n_tensors} {p.change.name}", p.fraction),
            on_log=(lambda line: print(line, file=sys.stderr)) if shown.is_verbose else None,
        )
    shown.clear()
    planned = result.preview
    figures = (result.bytes_out, planned.bits_per_weight, planned.types, time.monotonic() - start)
    return Made(source, checkpoint.architecture, kind.name, result.outputs, checkpoint.n_bytes, *figures, job.converter)


class _Shown:
    """Progress on stderr: a bar on a terminal, else a line now and then; none beside the converter's own log."""

    def __init__(self, is_verbose: bool) -> None:
        self.is_verbose = is_verbose
        self._bar: Bar | None = None
        self._next_line = time.monotonic() + _LINE_S

    def __enter__(self) -> _Shown:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def bytes(self, label: str, n_done: int, n_bytes: int) -> None:
        """A step whose work is bytes; `n_bytes` 0: it is not known how many."""
        share = n_done / n_bytes if n_bytes else None
        self.share(label, share, f"{format_bytes(n_done)} of {format_bytes(n_bytes)}" if n_bytes and n_done else "")

    def share(self, label: str, share: float | None, text: str | None = None) -> None:
        """A step of which a share is done."""
        from moelocal.cli.messages import dim

        if self.is_verbose:
            return
        text = f"{share or 0:.0%}" if text is None else text
        if sys.stderr.isatty() and not is_dumb():
            from moelocal.cli.render_convert import Bar

            if self._bar is None:
                self._bar = Bar()
            self._bar.show(label, share, text)
        elif time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + _LINE_S
            dim(f"{label} {text}".strip())

    def clear(self) -> None:
        """Takes the bar off the screen."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
