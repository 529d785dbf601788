"""`moelocal imatrix`: which inputs of a model's weights are large: quantizing then spares those weights."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from moelocal.cli import options as opt
from moelocal.errors import BadRequest, MoelocalError

if TYPE_CHECKING:
    from moelocal.build.imatrix import Layout, Step, Unfinished
    from moelocal.build.imatrix_file import Imatrix
    from moelocal.engine.activations import Activations
    from moelocal.engine.session import Session
    from moelocal.measure.routing import Passage

_N_CTX = 512  # llama-imatrix's own
_LEAST_CTX = 16  # tokens in a chunk: fewer say little
_FEW_CHUNKS = 50
_SHOWN_LAYERS = 4
_UNQUANTIZED = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class Calibration:
    """What is run, and where the matrix goes."""

    text: opt.Text = None
    chunks: Annotated[int | None, opt.option("--chunks", "Use only the first N chunks. [all]", "N", min=1)] = None
    output: Annotated[
        str | None, opt.option("--output", "Where the matrix goes. [where quantize finds it]", "FILE")
    ] = None
    with_output: Annotated[bool, opt.option("--with-output", "Collect for the output matrix too.")] = False
    force: Annotated[bool, opt.option("--force", "Replace the matrix if it exists.")] = False


@dataclass(frozen=True, slots=True)
class Chunked(opt.Placement):
    """How the model runs, a chunk of the text at a time."""

    ctx: Annotated[int | None, opt.option("--ctx", "Tokens of a chunk of the text. [512]", "N", min=_LEAST_CTX)] = None


def imatrix(
    model: opt.Model,
    calibration: Calibration,
    placement: Chunked,
    as_json: opt.Json = False,
    verbose: opt.Verbose = False,
) -> None:
    """Make an importance matrix from a text: quantize then spares the weights that matter.

    An interrupted run goes on when it is started again. The matrix of the F16 or Q8_0 file serves all quantizations of
    a model.
    """
    from moelocal.build.imatrix import default_output, matrix, most_bytes
    from moelocal.build.output import check_free, check_room
    from moelocal.cli.guard import guard
    from moelocal.cli.texts import passages
    from moelocal.model.header import read_header
    from moelocal.model.store import resolve
    from moelocal.paths import user_path

    texts = passages(calibration.text)
    placement.request()  # bad values are told now, not after the load
    path = resolve(model)
    output = user_path(calibration.output) if calibration.output else default_output(path)
    check_free(output, calibration.force)
    check_room(output, most_bytes(read_header(path)))
    guard()
    start = time.monotonic()
    n_ctx = placement.ctx or _N_CTX
    with _opened(model, replace(placement, ctx=n_ctx), calibration.with_output, verbose) as (session, activations):
        layout = _layout(session, texts, n_ctx, calibration.chunks)
        unfinished = _unfinished(path, texts, layout, calibration)
        check_free(unfinished.path, replace=True)
        step = _run(session, activations, layout, unfinished, verbose)
    made = matrix(activations, layout, step.n_done, calibration.text or "moelocal's built-in passages")
    _write(output, made, unfinished, calibration.force)
    if as_json:
        print(json.dumps(_document(model, output, made, step, time.monotonic() - start), ensure_ascii=False))
    else:
        print(output, flush=True)
        _tell(model, path, made, step)


@contextmanager
def _opened(
    model: str, placement: opt.Placement, with_output: bool, verbose: bool
) -> Iterator[tuple[Session, Activations]]:
    """The model, watched."""
    from moelocal.cli.opening import open_model
    from moelocal.cli.screen import quiet_keys
    from moelocal.engine.activations import Activations

    activations = Activations(with_output)
    opened = open_model(model, placement, verbose, raw=True, one_shot=True, watch=activations)
    with opened.session as session, quiet_keys():
        yield session, activations


def _layout(session: Session, texts: list[Passage], n_ctx: int, n_chunks: int | None) -> Layout:
    """The text as tokens, in chunks.

    Raises:
        BadRequest: it is too short.
    """
    from moelocal.build.imatrix import Layout

    tokens = session.tokenize("\n".join(text.text for text in texts), special=False, add_bos=True)
    n_whole = len(tokens) // n_ctx
    if not n_whole:
        shorter = f", or shorter chunks: --ctx {len(tokens) // 2}" if len(tokens) >= 2 * _LEAST_CTX else ""
        raise BadRequest(
            f"The text has {len(tokens):,} tokens, less than one chunk of {n_ctx:,}.",
            f"Give a longer text with --text FILE{shorter}.",
        )
    return Layout(tokens, n_ctx, min(n_chunks or n_whole, n_whole))


def _unfinished(path: Path, texts: list[Passage], layout: Layout, calibration: Calibration) -> Unfinished:
    """The place for what an interrupted run leaves: its name stands for all that the result depends on."""
    import hashlib

    from moelocal.build.imatrix import Unfinished

    stat = path.stat()
    facts = [str(path.resolve()), stat.st_size, stat.st_mtime_ns, layout.n_ctx, calibration.with_output]
    digest = hashlib.sha256(repr(facts).encode())
    for text in texts:
        digest.update(text.text.encode(errors="surrogatepass"))
    return Unfinished(digest.hexdigest()[:24])


def _run(session: Session, activations: Activations, layout: Layout, unfinished: Unfinished, verbose: bool) -> Step:
    """Runs the text, with progress on stderr.

    Raises:
        KeyboardInterrupt: Ctrl-C; what was saved is kept, and said.
    """
    from moelocal.build.imatrix import collect
    from moelocal.cli.messages import note

    steps = collect(session, activations, layout, unfinished)
    step = next(steps)
    if step.n_done:
        note(f"Going on after chunk {step.n_done:,} of {layout.n_chunks:,}, where it was interrupted.")
    with _progress(layout.n_chunks, step.n_done, verbose) as show:
        try:
            for step in steps:
                show(step)
        except KeyboardInterrupt:
            if unfinished.path.exists():
                note("What was saved last is kept: the same command goes on from there.")
            raise
    return step


@contextmanager
def _progress(n_chunks: int, n_done: int, verbose: bool) -> Iterator[Any]:
    """A bar on a terminal; elsewhere a line for each tenth."""
    from moelocal.cli.screen import is_dumb

    if sys.stderr.isatty() and not verbose and not is_dumb():
        from moelocal.cli.render_eval import Bar

        bar = Bar("Running the text", n_chunks, n_done)
        try:
            yield lambda step: bar.update(step.n_done, _so_far(step))
        finally:
            bar.close()
        return

    def tell(step: Step) -> None:
        if step.n_done == n_chunks or step.n_done % max(1, n_chunks // 10) == 0:
            print(f"chunk {step.n_done:,} of {n_chunks:,}: {_so_far(step)}", file=sys.stderr, flush=True)

    yield tell


def _write(output: Path, made: Imatrix, unfinished: Unfinished, force: bool) -> None:
    """Writes the file. What hours collected is not lost where it cannot be written.

    Raises:
        MoelocalError: no room, or no right to write.
    """
    from moelocal.build import imatrix_file
    from moelocal.build.output import writing

    try:
        with writing(output, replace=force) as part:
            imatrix_file.write(part, made)
    except MoelocalError as error:
        with suppress(MoelocalError):
            unfinished.save(made)
            error.hint = f"What was collected is kept: the same command then only writes it. {error.hint}"
        raise
    unfinished.remove()


def _so_far(step: Step) -> str:
    seen = f", {step.seen_share:.0%} of the experts seen" if step.seen_share < 1 else ""
    change = f"means changed by {step.change:.1%}" if step.n_done > 1 else "begun"
    return f"{change}{seen}"


def _tell(model: str, path: Path, made: Imatrix, step: Step) -> None:
    """What was made, how good it is, and what to do with it."""
    from moelocal.build.imatrix import unseen
    from moelocal.cli.messages import dim, note, program
    from moelocal.model.facts import read_facts
    from moelocal.model.header import read_header

    last = f"; the last one changed the means by {step.change:.1%}" if made.n_chunks > 1 else ""
    dim(f"{len(made.entries):,} tensors, {made.n_chunks:,} chunks of {made.chunk_size:,} tokens{last}.")
    if missing := unseen(made.entries):
        n = sum(map(len, missing.values()))
        shown = "; ".join(f"layer {layer}: {_listed(ids)}" for layer, ids in list(missing.items())[:_SHOWN_LAYERS])
        more = f" and {len(missing) - _SHOWN_LAYERS} more layers" if len(missing) > _SHOWN_LAYERS else ""
        one = "expert was never chosen ({}); all of its" if n == 1 else "experts were never chosen ({}); all of their"
        note(f"{n:,} {one.format(shown + more)} weights will count alike.")
    if made.n_chunks < _FEW_CHUNKS:
        note("That is a short text: 100 chunks and more, of what the model is used for, make a better matrix.")
    again = "" if read_facts(read_header(path)).quant in _UNQUANTIZED else " --requantize"
    dim(f"Use it: {program()} quantize {shlex.quote(model)} --type Q4_K_M{again}")


def _listed(ids: list[int]) -> str:
    return ", ".join(map(str, ids[:8])) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")


def _document(model: str, output: Path, made: Imatrix, step: Step, seconds: float) -> dict[str, Any]:
    from moelocal.build.imatrix import unseen

    return {
        "model": model,
        "output": str(output),
        "entries": len(made.entries),
        "n_chunks": made.n_chunks,
        "chunk_size": made.chunk_size,
        "n_tokens": made.n_chunks * made.chunk_size,
        "last_change": round(step.change, 6),
        "seen_share": round(step.seen_share, 6),
        "unseen": [{"layer": layer, "experts": ids} for layer, ids in unseen(made.entries).items()],
        "seconds": round(seconds, 3),
    }
