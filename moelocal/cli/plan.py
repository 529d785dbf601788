"""`moelocal plan`: where everything would go, before anything is loaded."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from moelocal.cli import options as opt
from moelocal.errors import BadRequest, ModelNotFound, MoelocalError

if TYPE_CHECKING:
    from pathlib import Path

    from moelocal.machine.hardware import Machine
    from moelocal.model.facts import ModelFacts
    from moelocal.model.header import GGUFHeader

_ANSWER_S = 2.5


def plan(
    model: opt.Model,
    placement: opt.Running,
    machine: opt.Described = None,
    as_json: opt.Json = False,
    verbose: opt.Verbose = False,
) -> None:
    """Show where a model would go: memory per device, predicted speed, why, and what else there is."""
    from moelocal.cli.opening import informed, known, tuned
    from moelocal.model.facts import read_facts
    from moelocal.plan.alternatives import with_alternatives
    from moelocal.plan.planner import make_plan

    if placement.rpc:
        from moelocal.cli.guard import guard

        guard()  # llama.cpp ends the process when a worker vanishes
    request = placement.request()
    header, path = header_of(model)
    facts = read_facts(header)
    if machine is not None and placement.rpc:
        raise BadRequest("--machine and --rpc exclude each other.", "Describe the other machine's memory with gpu=.")
    here = _described(machine) if machine is not None else present(facts, placement, verbose)
    if path is not None:
        facts = informed(facts, header, path, here)
    history = None
    if machine is None and path is not None:
        history, request = known(path, facts, here), tuned(request, path, here)
    chosen = with_alternatives(facts, here, request, make_plan(facts, here, request, history), history)
    if as_json:
        print(json.dumps(chosen.as_json(facts), ensure_ascii=False))
        return
    from moelocal.cli.render_plan import show_plan

    show_plan(chosen, facts, here, sys.stdout)


def header_of(reference: str) -> tuple[GGUFHeader, Path | None]:
    """The header of a model, and its file; without a file when it is still on the hub.

    Raises:
        MoelocalError: there is no such model, neither here nor there, or no way to look.
    """
    from moelocal.cli.messages import note
    from moelocal.model.header import read_header
    from moelocal.model.reference import parse_reference
    from moelocal.model.store import resolve

    try:
        path = resolve(reference, note)
    except ModelNotFound:
        parsed = parse_reference(reference)
        if parsed is None or not parsed.repo or (parsed.repo.lower().endswith(".gguf") and not parsed.file):
            raise
    else:
        return read_header(path), path
    from moelocal.model.client import HubError
    from moelocal.model.remote import open_header

    try:
        header, found = open_header(reference)
    except HubError as error:
        if error.status or parsed.entry is None or parsed.file:
            raise
        from moelocal.model import catalog

        quant = parsed.quant or parsed.entry.quant
        sketch = catalog.header_of(parsed.entry, quant)
        note(f"{error.message} Planned from what the catalog knows of {parsed.entry.name}:{quant}.")
        return sketch, None
    note(f"Not on this disk yet: planned from the hub, {found}. To get it: moelocal pull {shlex.quote(reference)}")
    return header, None


def _described(text: str) -> Machine:
    from moelocal.machine.described import parse_machine

    return parse_machine(text)


@contextmanager
def _answering(workers: Sequence[str]) -> Iterator[None]:
    """Ends the process when workers say hello and nothing more: llama.cpp would wait for them without a limit."""
    import os
    import threading

    from moelocal.cli.messages import error

    def give_up() -> None:
        names = ", ".join(workers)
        error(MoelocalError(f"The worker at {names} does not answer any more.", "Start it again: moelocal worker"))
        sys.stderr.flush()
        os._exit(1)

    limit = threading.Timer(_ANSWER_S, give_up)
    limit.daemon = True
    if workers:
        limit.start()
    try:
        yield
    finally:
        limit.cancel()


def present(facts: ModelFacts, placement: opt.Placement, verbose: bool) -> Machine:
    """This machine, with workers, measured if it never was."""
    from moelocal.cli.measuring import measure_first
    from moelocal.engine import llama, rpc
    from moelocal.machine.hardware import detect
    from moelocal.plan.llama_flags import offload_min_batch

    llama.LOG.verbose = verbose
    llama.offload_prompts_from(offload_min_batch(facts))
    with _answering(placement.rpc or ()):
        rpc.add_workers(placement.rpc or ())
        machine = detect(llama.devices(), llama.version())
    return detect(llama.devices(), llama.version()) if measure_first(machine, llama.version()) else machine
