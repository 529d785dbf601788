"""`moelocal list`: the models on this disk; with `--all` the catalog, and what each model would do here."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from moelocal.cli import options as opt
from moelocal.errors import BadRequest, MoelocalError

if TYPE_CHECKING:
    from pathlib import Path

    from moelocal.machine.hardware import Machine
    from moelocal.model.cache import Shelf
    from moelocal.model.catalog import Entry
    from moelocal.model.facts import ModelFacts
    from moelocal.plan.outcome import Outcome

Everything = Annotated[bool, opt.option("--all", "The catalog, and what each model would do on this machine.")]
_NO_MODELS = ("imatrix", "mmproj", "adapter", "projector")  # as general.type


class Row(NamedTuple):
    """One model on this disk."""

    name: str
    path: Path
    n_bytes: int
    quant: str
    arch: str
    is_moe: bool
    owner: str


class Offer(NamedTuple):
    """One model of the catalog: in the quantization to get, what it would do here, and whether it is here."""

    entry: Entry
    facts: ModelFacts
    outcome: Outcome
    is_here: bool


def listing(everything: Everything = False, machine: opt.Described = None, as_json: opt.Json = False) -> None:
    """List the models on this disk, or with --all those to get."""
    if everything:
        _list_catalog(machine, as_json)
        return
    if machine is not None:
        raise BadRequest("--machine is for the catalog.", 'moelocal list --all --machine "ram=32GiB"')
    broken: list[str] = []
    rows = list(_rows(broken))
    if as_json:
        print(json.dumps([_as_document(row) for row in rows]))
    else:
        from moelocal.cli.render_models import show_rows

        show_rows(rows, sys.stdout)
    _tell(rows, broken, as_json)


def _rows(broken: list[str]) -> Iterator[Row]:
    """The demo, then what is here, by name. Files that are no usable models go to `broken`."""
    from moelocal.model.header import read_header
    from moelocal.model.quants import quant_label
    from moelocal.model.roles import tensor_role
    from moelocal.model.store import DEMO, models_here
    from moelocal.model.stored import OWNERS, Stored

    demo = Stored("demo", (DEMO,), "moelocal")
    for model in (demo, *sorted(models_here(), key=lambda model: model.name.lower())):
        try:
            header = read_header(model.path)
        except MoelocalError as error:
            is_ours = model.owner not in ("ollama", "lmstudio")
            broken.append(
                error.message + (f". To free the space: moelocal rm {shlex.quote(model.name)}" if is_ours else "")
            )
            continue
        arch = str(header.metadata.get("general.architecture", "unknown"))
        if arch == "clip" or str(header.metadata.get("general.type")) in _NO_MODELS:
            continue
        is_moe = any(tensor_role(tensor.name)[1] == "routed_expert" for tensor in header.tensors)
        quant = model.quant or quant_label(header)
        yield Row(model.name, model.path, header.file_bytes, quant, arch, is_moe, OWNERS[model.owner])


def _as_document(row: Row) -> dict[str, Any]:
    return {
        "name": row.name,
        "path": str(row.path),
        "bytes": row.n_bytes,
        "quant": row.quant,
        "arch": row.arch,
        "moe": row.is_moe,
    }


def _tell(rows: list[Row], broken: list[str], as_json: bool) -> None:
    """What is here only in part, or damaged; and where there is more."""
    from moelocal.cli.messages import as_typed, dim, note
    from moelocal.model.cache import PARTIAL, allocated, shelves, unfinished
    from moelocal.model.store import begun_here, made_folder
    from moelocal.units import format_bytes

    for what in broken:
        note(f"Left out: {what}")
    for shelf in shelves({}):
        if n_bytes := unfinished(shelf.folder):
            note(f"Left out: {shelf.repo} is downloaded in part ({format_bytes(n_bytes)}).{_what_next(shelf)}")
        elif shelf.halves:
            half = shelf.halves[0]
            note(f"Left out: {shelf.repo} lacks {len(half.missing)} files of {half.file}.{_what_next(shelf)}")
    for path in begun_here():
        size = format_bytes(allocated(path.stat()))
        repo = path.relative_to(made_folder()).as_posix().removesuffix(PARTIAL).rpartition("-")[0]
        typed = shlex.quote(repo)
        note(
            f"Left out: {repo} is downloaded in part ({size}). To go on: moelocal pull {typed}, to free the "
            f"space: moelocal rm {typed} --unfinished"
        )
    if not as_json and len(rows) == 1:
        dim(as_typed("Nothing else is here yet. What would run well on this machine: moelocal list --all"))


def _what_next(shelf: Shelf) -> str:
    """How to get the rest of a model, and how to be rid of it."""
    only = " --unfinished" if shelf.models else ""
    return f" To go on: moelocal pull {shelf.repo}, to free the space: moelocal rm {shelf.repo}{only}"


def _list_catalog(described: str | None, as_json: bool) -> None:
    from moelocal.cli.messages import as_typed, dim
    from moelocal.machine.described import parse_machine
    from moelocal.plan.cost import device_speeds

    machine = here() if described is None else parse_machine(described)
    offers = _offers(machine)
    if as_json:
        print(json.dumps([_offer_document(offer) for offer in offers]))
        return
    from moelocal.cli.render_models import show_offers

    show_offers(offers, sys.stdout)
    if described is None:
        guessed = not all(device_speeds(machine, device).measured for device in machine.devices)
        speeds = "defaults; moelocal doctor --probe measures them" if guessed else "those measured here"
        dim(as_typed(f"Predicted for the memory that is free now, from speeds that are {speeds}."))
    told = "At 4 bits: Q4_K_M; gpt-oss MXFP4. To get one: moelocal pull NAME. All about one: moelocal show NAME"
    dim(as_typed(told))


def here() -> Machine:
    """This machine, with the speeds that were measured on it."""
    from moelocal.engine import llama
    from moelocal.machine.hardware import detect

    return detect(llama.devices(), llama.version())


def _offers(machine: Machine) -> Iterator[Offer]:
    """The catalog, smallest first, each model when it has been weighed."""
    from moelocal.model.catalog import entries, facts_of
    from moelocal.model.store import models_here
    from moelocal.plan.outcome import outcome

    held = {model.repo.lower() for model in models_here()}
    for entry in entries():
        facts = facts_of(entry, entry.quant)
        yield Offer(entry, facts, outcome(facts, machine), entry.repo.lower() in held)


def _offer_document(offer: Offer) -> dict[str, Any]:
    entry, found = offer.entry, offer.outcome
    return {
        "name": entry.name,
        "repo": entry.repo,
        "arch": entry.arch,
        "total_params": entry.total_params,
        "active_params": entry.active_params,
        "licence": entry.licence,
        "n_ctx": entry.n_ctx,
        "good_at": entry.good_at,
        "quant": entry.quant,
        "bytes": offer.facts.total_bytes,
        "here": found.kind,
        "decode_per_s": None if found.decode_per_s is None else round(found.decode_per_s, 2),
        "disk_bytes": found.disk_bytes,
        "downloaded": offer.is_here,
    }
