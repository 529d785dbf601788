"""`moelocal quantize`: a GGUF file in smaller types."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moelocal.cli import options as opt
from moelocal.cli.budgeting import Budget
from moelocal.errors import BadRequest, MoelocalError

if TYPE_CHECKING:
    from moelocal.build.quantize import Preview, Progress, QuantizeJob, QuantizeResult

_NO_IMATRIX = "none"
_NO_BUDGET = Budget()
_ANY = "Q4_K_M"  # until a budget has chosen
_LINE_S = 15.0  # between lines where no bar can be shown

Source = Annotated[
    str | None,
    typer.Argument(metavar="SOURCE", help="The model, best its F16 or BF16 file: a path, or a name of moelocal list."),
]
Out = Annotated[
    str | None,
    typer.Argument(
        metavar="[OUT]", help="A path, or a name among the models made here. [the source's name with the type]"
    ),
]
Last = Annotated[str | None, typer.Argument(metavar="[TYPE]", help="The type, as with --type.")]


@dataclass(frozen=True, slots=True)
class Quantization:
    """Which types, and how they are made."""

    type: Annotated[str | None, opt.option("--type", "The quantization, such as Q4_K_M: see --list-types.", "TYPE")] = (
        None
    )
    tensor_type: Annotated[
        list[str] | None,
        opt.option("--tensor-type", "Tensors whose name matches get this type; may be repeated.", "PATTERN=TYPE"),
    ] = None
    output_type: Annotated[str | None, opt.option("--output-type", "Type of the output's weights.", "TYPE")] = None
    token_embedding_type: Annotated[
        str | None, opt.option("--token-embedding-type", "Type of the token embeddings.", "TYPE")
    ] = None
    imatrix: Annotated[
        str | None,
        opt.option("--imatrix", "Importance matrix; none: without. [what moelocal imatrix made of SOURCE]", "FILE"),
    ] = None
    requantize: Annotated[
        bool, opt.option("--requantize", "Quantize what is quantized already, with a loss each time.")
    ] = False
    keep_split: Annotated[bool, opt.option("--keep-split", "As many files as SOURCE has. [one file]")] = False
    threads: Annotated[int | None, opt.option("--threads", "CPU threads. [all cores]", "N", min=1, max=512)] = None
    force: Annotated[bool, opt.option("--force", "Replace OUT if it exists.")] = False
    dry_run: Annotated[bool, opt.option("--dry-run", "Only show what would be made.")] = False


ListTypes = Annotated[bool, opt.option("--list-types", "Show all types, and what SOURCE would take in each.")]


def quantize(
    source: Source = None,
    out: Out = None,
    last: Last = None,
    quantization: Quantization = Quantization(),
    budget: Budget = _NO_BUDGET,
    list_types: ListTypes = False,
    as_json: opt.Json = False,
    verbose: opt.Verbose = False,
) -> None:
    """Make a model smaller: its weights in types of fewer bits, by llama.cpp's own quantizer.

    Without OUT the result goes to the models made here, and can be used by its name at once.
    """
    if list_types:
        _list_types(source, as_json)
        return
    if source is None:
        raise BadRequest("There is no SOURCE.", "Such as: moelocal quantize model-F16.gguf --type Q4_K_M")
    job = _job(source, out, last, quantization, budget)
    on_log = _to_stderr if verbose else None
    from moelocal.build.quantize import preview, quantize

    if budget.is_set:
        from moelocal.cli.budgeting import budgeted

        job = budgeted(job, budget, is_dry=quantization.dry_run, silent=verbose)

    if quantization.dry_run:
        planned = preview(job, on_log)
        if as_json:
            print(json.dumps(_document(job, planned, None)))
        else:
            _remarks(job, planned)
            _show_preview(job, planned)
        return
    with _progress(silent=verbose) as shown:
        result = quantize(job, shown, lambda planned: _remarks(job, planned), on_log)
    if as_json:
        print(json.dumps(_document(job, result.preview, result)))
    else:
        _tell(result)


def _job(source: str, out: str | None, last: str | None, quantization: Quantization, budget: Budget) -> QuantizeJob:
    """What was asked for; with a budget the types are still to be chosen.

    Raises:
        MoelocalError: the source is not there, or there is no such type.
    """
    from moelocal.build.quantize import QuantizeJob
    from moelocal.build.types import COPY, quant_type
    from moelocal.cli.making import base_name, destination
    from moelocal.cli.messages import note
    from moelocal.model.store import resolve

    out, typed = _sort_words(out, last, quantization.type, budget)
    kind = quant_type(typed)
    path = resolve(source, note)
    base = base_name(source, path)
    name = f"{base}-{budget.label or kind.name}" if kind.name != COPY else f"{base}-joined"
    return QuantizeJob(
        source=path,
        output=destination(out, name),
        type_name=kind.name,
        patterns=tuple(map(_pattern, quantization.tensor_type or ())),
        output_type=quantization.output_type,
        embedding_type=quantization.token_embedding_type,
        imatrix=_imatrix(quantization.imatrix, path, base, kind.imatrix != "no"),
        threads=quantization.threads,
        requantize=quantization.requantize,
        keep_split=quantization.keep_split,
        replace=quantization.force,
        called=source,
    )


def _sort_words(out: str | None, last: str | None, typed: str | None, budget: Budget) -> tuple[str | None, str]:
    """OUT and the type: `SOURCE Q4_K_M`, and both words in either order, are understood too.

    Raises:
        BadRequest: there is no type, or there are two, or one and a budget.
    """
    from moelocal.build.types import find_type, quant_type

    if out is not None and typed is None and find_type(out) and not (last and find_type(last)):
        out, last = last, out
    if last is not None and typed is not None:
        raise BadRequest(f"There are two types, {last} and {typed}.", "Give one of them.")
    if budget.is_set and (last or typed):
        raise BadRequest(f"{typed or last} and {budget.option} exclude each other.", "Give a type or a budget.")
    if budget.is_set:
        return out, _ANY
    if last is None and typed is None:
        if out is not None and "/" not in out and not out.endswith(".gguf"):
            quant_type(out)  # a type with a typo, rather than a name without a type
        raise BadRequest(
            "There is no type to quantize to.",
            "Such as: --type Q4_K_M, or --size 4GiB; all types: moelocal quantize --list-types",
        )
    return out, typed or last or ""


def _pattern(text: str) -> tuple[str, str]:
    """PATTERN=TYPE.

    Raises:
        BadRequest: it is not.
    """
    pattern, equals, name = text.rpartition("=")
    if not (pattern and equals and name):
        raise BadRequest(f"{text!r} is not PATTERN=TYPE.", "Such as: --tensor-type 'ffn_down_exps=Q6_K'")
    return pattern, name


def _imatrix(typed: str | None, path: Path, base: str, is_wanted: bool) -> Path | None:
    """The importance matrix: the one named, else one that was made here of this model, if the type has use for it.

    Raises:
        MoelocalError: there is no such file.
    """
    from moelocal.cli.messages import note
    from moelocal.model.store import made_folder
    from moelocal.model.stored import stem_of
    from moelocal.paths import user_path

    if typed is None:
        places = [made_folder() / f"{stem}.imatrix.gguf" for stem in (stem_of(path.name), base)]
        found = next((place for place in places if place.is_file()), None)
        if not is_wanted or found is None:
            return None
        note(f"The importance matrix {found} is used; without: --imatrix none")
        return found
    if typed == _NO_IMATRIX:
        return None
    named = user_path(typed)
    if not named.is_file():
        raise MoelocalError(
            f"There is no importance matrix {named}.", "Make one with moelocal imatrix, or leave --imatrix out."
        )
    return named


def _remarks(job: QuantizeJob, planned: Preview) -> None:
    """What is good to know before the work."""
    from moelocal.cli.messages import note
    from moelocal.model.ggml_types import GGML_TYPES

    if all(change.before == change.after for change in planned.changes) and job.kind.main:
        note(f"All tensors have the types of {job.kind.name} already: they are only copied.")
    if planned.fallbacks:
        first, n = planned.fallbacks[0], len(planned.fallbacks)
        wanted = GGML_TYPES[first.wanted or 0]
        note(
            f"{n:,} of {len(planned.changes):,} tensors get a larger type than {wanted.name}, such as {first.name} "
            f"{GGML_TYPES[first.after].name}: their rows ({first.shape[0]:,} values) are no multiple of "
            f"{wanted.block_size}."
        )
    if job.requantize and any(GGML_TYPES[c.before].block_size > 1 and c.before != c.after for c in planned.changes):
        note("Weights that are quantized already are quantized again: what they lost is not regained.")
    if job.imatrix is None and job.kind.imatrix == "advised":
        note(f"{job.kind.name} gets better with an importance matrix: moelocal imatrix makes one.")


def _show_preview(job: QuantizeJob, planned: Preview) -> None:
    """The table of `--dry-run`, and where the output would go."""
    from moelocal.cli.messages import note
    from moelocal.cli.render_quantize import show_preview
    from moelocal.model.download import free_bytes
    from moelocal.units import format_bytes

    show_preview(planned, sys.stdout)
    free = free_bytes(job.output.parent)
    room = "" if free is None else f"; its disk has {format_bytes(free)} free"
    note(f"This would be {job.output}{room}.")
    if planned.refusal is not None:
        note(f"But it will be refused: {planned.refusal.message}")
        note(planned.refusal.hint)


def _document(job: QuantizeJob, planned: Preview, result: QuantizeResult | None) -> dict[str, Any]:
    """For --json; `result` None: of a dry run."""
    return {
        "output": str(result.outputs[0] if result else job.output),
        "bytes_in": planned.bytes_in,
        "bytes_out": result.bytes_out if result else planned.file_bytes,
        "bits_per_weight": round(planned.bits_per_weight, 4),
        "types": planned.types,
        "seconds": round(result.seconds, 3) if result else None,
        "source": str(job.source),
        "type": job.kind.name,
        "files": [str(path) for path in result.outputs] if result else [],
        "fallbacks": [change.name for change in planned.fallbacks],
        "imatrix": None if job.imatrix is None else str(job.imatrix),
        "dry_run": result is None,
    }


def _tell(result: QuantizeResult) -> None:
    """The end: where the model is, and how to run it."""
    from moelocal.cli.making import usable_as
    from moelocal.cli.messages import note
    from moelocal.units import format_bytes, format_seconds

    print(result.outputs[0], flush=True)
    share = result.bytes_out / result.bytes_in
    note(
        f"{format_bytes(result.bytes_out)}, {share:.0%} of {format_bytes(result.bytes_in)}, "
        f"{result.preview.bits_per_weight:.2f} bits per weight, in {format_seconds(result.seconds)}."
    )
    note(f'Run it: moelocal run {usable_as(result.outputs[0])} "Who are you?"')


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


@contextmanager
def _progress(silent: bool) -> Iterator[Any]:
    """Progress on stderr: a bar on a terminal, else a line now and then."""
    from moelocal.cli.messages import dim
    from moelocal.cli.screen import is_dumb

    bar: Any = None
    is_live = sys.stderr.isatty() and not is_dumb()
    next_line = time.monotonic() + _LINE_S

    def update(progress: Progress) -> None:
        nonlocal bar, next_line
        if silent:
            return
        if is_live:
            if bar is None:
                from moelocal.cli.render_quantize import Bar

                bar = Bar(progress.n_tensors)
            bar.update(progress)
        elif time.monotonic() >= next_line:
            next_line = time.monotonic() + _LINE_S
            dim(f"{progress.fraction:.0%}: {progress.change.name}, {progress.number} of {progress.n_tensors}")

    try:
        yield update
    finally:
        if bar is not None:
            bar.close()


def _list_types(source: str | None, as_json: bool) -> None:
    """All types; with a model the sizes that it would have, about."""
    from moelocal.build.types import TYPES

    rows = [kind for kind in TYPES.values() if kind.main]
    n_values: int | None = None
    if source is not None:
        from moelocal.cli.messages import note
        from moelocal.model.header import read_header
        from moelocal.model.store import resolve

        n_values = sum(prod(tensor.shape) for tensor in read_header(resolve(source, note)).tensors)
    if as_json:
        sizes = [None if n_values is None else int(n_values * kind.bits / 8) for kind in rows]
        print(json.dumps([{**kind._asdict(), "bytes": size} for kind, size in zip(rows, sizes, strict=True)]))
        return
    from moelocal.cli.render_quantize import show_types

    show_types(rows, n_values, sys.stdout)
