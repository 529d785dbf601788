"""`moelocal prune`: a MoE model without the experts that matter least for a text."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moelocal.build.saliency import Criterion
from moelocal.cli import options as opt
from moelocal.errors import BadRequest, MoelocalError

if TYPE_CHECKING:
    from moelocal.build.prune import Cut
    from moelocal.cli.pruning import Source, Task
    from moelocal.measure.evaluate import Result

Out = Annotated[
    str | None,
    typer.Argument(metavar="[OUT]", help="A path, or a name among the models made here. [the model's name with -eN]"),
]


@dataclass(frozen=True, slots=True)
class Pruning:
    """How much stays, and how it is decided what."""

    keep: Annotated[
        str | None, opt.option("--keep", "Keep this share of each layer's experts, or this many.", "75%|N")
    ] = None
    size: Annotated[str | None, opt.option("--size", "Keep as many as a file of this size holds.", "SIZE")] = None
    fit: Annotated[bool, opt.option("--fit", "Keep as many as this machine's memory holds.")] = False
    criterion: Annotated[
        Criterion,
        opt.option(
            "--criterion",
            "impact: root of router weight times norm of the expert's output, summed over the text; reap: mean of that "
            "product over the expert's own tokens; frequency: how often it is chosen. [impact]",
        ),
    ] = "impact"
    text: Annotated[
        str | None,
        opt.option(
            "--text", "What the model shall stay good at, UTF-8; - or a pipe: standard input. [passages]", "FILE"
        ),
    ] = None
    parse_special: Annotated[
        bool, opt.option("--parse-special", "The text has the model's control tokens, such as <|im_end|>.")
    ] = False
    eval: Annotated[str | None, opt.option("--eval", "Then compare the result with MODEL on this text.", "FILE")] = None
    force: Annotated[bool, opt.option("--force", "Replace OUT if it exists.")] = False
    dry_run: Annotated[bool, opt.option("--dry-run", "Only show what would be dropped.")] = False

    def __post_init__(self) -> None:
        n_given = (self.keep is not None) + (self.size is not None) + self.fit
        if n_given != 1:
            what = (
                "There is no --keep, --size or --fit."
                if not n_given
                else "--keep, --size and --fit exclude each other."
            )
            raise BadRequest(what, "Such as: moelocal prune demo --keep 75%")
        if self.dry_run and self.eval is not None:
            raise BadRequest("--dry-run makes nothing that --eval could compare.", "Give one of them.")


def prune(
    model: opt.Model,
    pruning: Pruning,
    placement: opt.Placement,
    out: Out = None,
    as_json: opt.Json = False,
    verbose: opt.Verbose = False,
) -> None:
    """Drop the experts that matter least for a text, as many in each layer. The rest stays as it is, bit for bit.

    The text decides: what it does not need is lost. Without --text, short passages of six domains are run, enough for a
    first look only. For a chat model give conversations in its own format, with --parse-special.
    """
    begin = time.perf_counter()
    from moelocal.cli.guard import guard
    from moelocal.cli.making import destination
    from moelocal.cli.pruning import Task, decide, file_bytes, find, keep_count

    text = None if pruning.eval is None else _eval_text(pruning.eval)
    placement.request()  # bad values are told now, not after the run
    source = find(model)
    guard()
    n_keep = keep_count(source, pruning, placement)
    task = Task(source, pruning, placement, n_keep, text, verbose)
    output = destination(out, f"{source.base}-e{n_keep}{source.quant_suffix}")
    if not pruning.dry_run:
        _check_output(output, source, pruning.force, file_bytes(source, n_keep))
    decision = decide(task)
    cut = decision.cut
    if not as_json:
        from moelocal.cli.render_prune import show

        show(sys.stdout if pruning.dry_run else sys.stderr, decision)
    if not pruning.dry_run:
        _write(cut, output, pruning.force)
    seconds = time.perf_counter() - begin
    result = None if text is None else _evaluate(task, output, text)
    if as_json:
        print(json.dumps(_document(decision, output, result, None if pruning.dry_run else seconds)))
    else:
        _tell(cut, output, result, seconds, pruning.dry_run)


def _check_output(output: Path, source: Source, force: bool, need_bytes: int) -> None:
    """Before the run what would be refused after it.

    Raises:
        BadRequest: the output is there already, or is the model.
        MoelocalError: nothing can be written there, or there is no room.
    """
    from moelocal.build.output import check_free, check_room

    if output.exists() and any(output.samefile(path) for path in source.paths):
        raise BadRequest(f"{output} is the model itself.", "Name another file.")
    check_free(output, force)
    check_room(output, need_bytes)


def _eval_text(name: str) -> str:
    from moelocal.cli.opening import read_text
    from moelocal.paths import user_path

    return read_text(user_path(name), "text", 1 << 30)


def _write(cut: Cut, output: Path, force: bool) -> None:
    from moelocal.build.prune import write
    from moelocal.cli.making import end_tidily
    from moelocal.cli.opening import LoadingBar

    end_tidily()
    with LoadingBar(f"Writing {output.name}") as bar:
        write(cut, output, bar.update, force)


def _evaluate(task: Task, output: Path, text: str) -> Result:
    """The result compared with the model; when that fails or is interrupted, the result is there all the same."""
    from moelocal.cli.messages import note
    from moelocal.cli.pruning import compare

    try:
        return compare(task, output, text)
    except (KeyboardInterrupt, MoelocalError):
        note(f"{output} is made; only its comparison with the model is missing.")
        raise


def _document(decision: Any, output: Path, result: Result | None, seconds: float | None) -> dict[str, Any]:
    """For --json; `seconds` None: of a dry run."""
    from collections import Counter

    from moelocal.model.ggml_types import GGML_TYPES

    cut = decision.cut
    tensors = cut.tensors
    n_values = sum(t.n_bytes * GGML_TYPES[t.ggml_type].block_size / GGML_TYPES[t.ggml_type][2] for t in tensors)
    return {
        "output": str(output),
        "bytes_in": cut.header.file_bytes,
        "bytes_out": cut.file_bytes,
        "bits_per_weight": round(8 * sum(t.n_bytes for t in tensors) / n_values, 4),
        "types": dict(Counter(GGML_TYPES[t.ggml_type].name for t in tensors)),
        "seconds": None if seconds is None else round(seconds, 3),
        "source": str(cut.paths[0]),
        "criterion": cut.record.criterion,
        "text_sha256": cut.record.text_sha256,
        "n_tokens": cut.record.n_tokens,
        "n_experts": cut.experts.n_experts,
        "n_kept": cut.n_keep,
        "n_experts_used": cut.experts.n_used,
        "layers": [
            {
                "layer": row.layer,
                "kept": list(cut.kept[row.layer]),
                "dropped": list(row.dropped),
                "dropped_choices": None if row.choices is None else round(row.choices, 5),
                "dropped_mass": None if row.mass is None else round(row.mass, 5),
            }
            for row in decision.rows
        ],
        "eval": None if result is None else result.as_json(),
        "dry_run": seconds is None,
    }


def _tell(cut: Cut, output: Path, result: Result | None, seconds: float, is_dry: bool) -> None:
    """The end: what it cost, where the model is, how to run it."""
    from moelocal.cli.making import usable_as
    from moelocal.cli.messages import note
    from moelocal.units import format_bytes, format_seconds

    sizes = (
        f"{format_bytes(cut.file_bytes)}, {cut.file_bytes / cut.header.file_bytes:.0%} of "
        f"{format_bytes(cut.header.file_bytes)}"
    )
    if is_dry:
        note(f"This would be {output}: {sizes}.")
        return
    if result is not None:
        from moelocal.cli.evaluate import meaning, report

        for line in [*report(result, "the model before"), meaning(result, output.name)]:
            note(line)
    print(output, flush=True)
    note(f"{sizes}, in {format_seconds(seconds)}.")
    note(f'Run it: moelocal run {usable_as(output)} "Who are you?"')
