"""What `quantize` refuses before a byte is written, each with the reason and the next step."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moelocal.build.types import BLIND, STARVING, quant_type, tensor_type
from moelocal.errors import BadRequest, MoelocalError
from moelocal.model.header import GGML_TYPES
from moelocal.model.keys import read_keys

if TYPE_CHECKING:
    from moelocal.build.imatrix_file import Imatrix
    from moelocal.build.quantize import QuantizeJob, TensorChange
    from moelocal.model.header import GGUFHeader

_UNWEIGHTED = {"token_embd.weight", "per_layer_token_embd.weight", "output.weight"}  # llama.cpp excuses these
_SHARED_BY_HALF = 0.5
_Q2_K = next(number for number, kind in GGML_TYPES.items() if kind.name == "Q2_K")


def check_job(job: QuantizeJob, header: GGUFHeader) -> None:
    """Looks at the job alone, with the source's head.

    Raises:
        BadRequest: it makes no sense.
        BadGGUF: the source names no architecture.
    """
    read_keys(header)
    for path in map(Path, header.shards):
        if job.output.exists() and job.output.samefile(path):
            raise BadRequest(f"{job.output} is the source itself.", "Name another file for the output.")
    patterns = [*job.patterns, *job.tensor_types.items()]
    if (patterns or job.output_type or job.embedding_type) and not _is_quantized_type(job.kind.main):
        raise BadRequest(
            f"Types of single tensors go with a quantized --type, not with {job.kind.name}.",
            "Name the type of most tensors, such as --type Q8_0.",
        )
    names = [tensor.name for tensor in header.tensors]
    for pattern, of in job.patterns:
        tensor_type(of)
        _check_pattern(pattern, names)
    for option, typed, name in (
        ("--output-type", job.output_type, "output.weight"),
        ("--token-embedding-type", job.embedding_type, "token_embd.weight"),
    ):
        tensor = next((tensor for tensor in header.tensors if tensor.name == name), None)
        block = GGML_TYPES[tensor_type(typed)].block_size if typed is not None else 1
        if typed is not None and tensor is not None and tensor.shape[0] % block:
            raise BadRequest(
                f"{option} {typed.upper()} needs rows of a multiple of {block} values; those of {name} have "
                f"{tensor.shape[0]:,}.",
                "Q8_0 takes rows of any multiple of 32, F16 any.",
            )


def _is_quantized_type(name: str) -> bool:
    return any(kind.name == name and kind.block_size > 1 for kind in GGML_TYPES.values())


def _check_pattern(pattern: str, names: Sequence[str]) -> None:
    try:
        found = re.compile(pattern)
    except re.error as error:
        raise BadRequest(
            f"{pattern!r} is no regular expression: {error}.", "Such as: --tensor-type 'ffn_down_exps=Q6_K'"
        ) from error
    if not any(found.search(name) for name in names):
        stems = sorted({re.sub(r"^blk\.\d+\.", "", name).removesuffix(".weight") for name in names if "blk." in name})
        raise BadRequest(f"No tensor's name contains {pattern!r}.", f"There are: {', '.join(stems)}")


def of_changes(job: QuantizeJob, changes: Sequence[TensorChange], imatrix: Imatrix | None) -> MoelocalError | None:
    """Why the job is not done, now that it is known which type each tensor would get; None: it is."""
    try:
        _check_requantizing(job, changes)
        _check_importance(job, changes, imatrix)
    except MoelocalError as refusal:
        return refusal
    return None


def _check_requantizing(job: QuantizeJob, changes: Sequence[TensorChange]) -> None:
    """Quantized weights lose twice when they are quantized again.

    Raises:
        MoelocalError: some would be, and that was not asked for.
    """
    again = [change for change in changes if change.before != change.after and _is_quantized(change.before)]
    if job.requantize or not again:
        return
    held = Counter(GGML_TYPES[change.before].name for change in again)
    (name, _), *_ = held.most_common()
    hint = "Quantized twice it would lose twice. Take the F16 or BF16 file of the model"
    if len(held) == 1 and all("_exps" in change.name for change in again):
        hint += f"; or leave its experts as they are: --tensor-type _exps={name}"
    raise MoelocalError(
        f"{job.shown} is quantized already: {len(again):,} of its {len(changes):,} tensors are {_listed(held)}.",
        f"{hint}; or accept the loss: --requantize",
    )


def _is_quantized(ggml_type: int) -> bool:
    return GGML_TYPES[ggml_type].block_size > 1


def _listed(held: Counter[str]) -> str:
    names = [name for name, _ in held.most_common(3)]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _check_importance(job: QuantizeJob, changes: Sequence[TensorChange], imatrix: Imatrix | None) -> None:
    """Whether the importance matrix is this model's, and there is one where it must be.

    Raises:
        BadRequest: it is of another model.
        MoelocalError: types want importances that are not there.
    """
    if imatrix is not None and job.imatrix is not None:
        _check_belongs(job.imatrix, changes, imatrix)
    needed = STARVING | ({_Q2_K} if job.kind == quant_type("Q2_K_S") else frozenset())
    for change in changes:
        must = BLIND if change.name in _UNWEIGHTED else needed
        if change.before == change.after or change.after not in must:
            continue
        what = f"{GGML_TYPES[change.after].name} of {change.name}"
        if imatrix is None:
            make = f"moelocal imatrix {shlex.quote(job.shown)}"
            raise MoelocalError(
                f"{job.kind.name} needs an importance matrix: {what} would be garbage without.",
                f"Make one, which is found by itself then: {make}. Q3_K_M and larger do without.",
            )
        if change.name not in imatrix.entries:
            raise MoelocalError(
                f"{job.imatrix} says nothing of {change.name}, and {what} would be garbage without.",
                f"Give this tensor another type: --tensor-type '{re.escape(change.name)}=Q4_K'",
            )


def _check_belongs(path: Path, changes: Sequence[TensorChange], imatrix: Imatrix) -> None:
    made = [change for change in changes if change.name in imatrix.entries]
    if len(made) < _SHARED_BY_HALF * len(imatrix.entries):
        strange = next((name for name in imatrix.entries if name not in {change.name for change in changes}), "nothing")
        raise BadRequest(
            f"{path} is of another model: of its {len(imatrix.entries):,} tensors this one has {len(made):,}, and not "
            f"{strange}.",
            "Give the importance matrix of this very model, or none: --imatrix none",
        )
    for change in made:
        n_matrices = change.shape[2] if len(change.shape) > 2 else 1
        found, wanted = imatrix.entries[change.name].sums.size, change.shape[0] * n_matrices
        if found != wanted and change.name not in _UNWEIGHTED:
            raise BadRequest(
                f"{path} is of another model: for {change.name} it has {found:,} values, not {wanted:,}.",
                "Give the importance matrix of this very model, or none: --imatrix none",
            )
