"""From a MODEL reference and options to an open session: what `run` and `chat` share."""

from __future__ import annotations

import gc
import importlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from moelocal.cli.screen import is_dumb
from moelocal.errors import BadRequest, MoelocalError, OutOfMemory
from moelocal.paths import runs_file, tuned_file

if TYPE_CHECKING:
    from moelocal.cli.options import Generation, Placement
    from moelocal.engine.meter import Meter
    from moelocal.engine.nodes import NodeReader
    from moelocal.engine.prompt import Prompter
    from moelocal.engine.sampling import Sampling
    from moelocal.engine.session import Session
    from moelocal.machine.hardware import Machine
    from moelocal.model.facts import ModelFacts
    from moelocal.model.header import GGUFHeader
    from moelocal.plan.calibration import Calibration
    from moelocal.plan.planner import Plan, PlanRequest

_SWITCH_S = sys.getswitchinterval()
_SWITCH_LOADING_S = 1e-4  # llama.cpp reports progress after every tensor, and shall not wait for an import


class Opened(NamedTuple):
    """A model ready to answer, and what is known about it."""

    reference: str
    facts: ModelFacts
    machine: Machine
    request: PlanRequest
    plan: Plan
    session: Session
    prompter: Prompter
    meter: Meter
    history: Calibration | None

    def for_prompt(self, n_tokens: int, n_answer: int) -> Plan:
        """The plan with a context for this prompt and answer, unless the user gave one; the session takes it over.

        What does not fit the memory is not tried: then the context stays as planned.
        """
        from moelocal.plan.planner import make_plan

        if not self.plan.n_ctx_chosen:
            return self.plan
        n_ctx = min(self.facts.n_ctx_train or n_tokens + n_answer, n_tokens + n_answer)
        try:
            plan = make_plan(self.facts, self.machine, replace(self.request, n_ctx=n_ctx), self.history)
        except OutOfMemory:
            return self.plan
        if plan.setting == replace(self.plan, n_ctx=plan.n_ctx).setting:  # so what it allocates is held against this
            self.session.plan = plan
        self.session.reserve(plan.n_ctx)
        return plan


def open_model(
    reference: str,
    placement: Placement,
    verbose: bool = False,
    raw: bool = False,
    one_shot: bool = False,
    watch: NodeReader | None = None,
) -> Opened:
    """Reads, plans and loads a model, with a progress bar when that takes a while.

    Python modules that are needed only afterwards are imported meanwhile: llama.cpp does not hold the interpreter.
    `one_shot`: one answer only, so the time to load counts in full, and nothing is kept to go back to. `watch`: sees
    which experts are chosen.

    Raises:
        MoelocalError: the model is not there, is damaged, does not fit, or llama.cpp refuses it.
    """
    from moelocal.cli.messages import note
    from moelocal.engine import llama
    from moelocal.model.facts import read_facts
    from moelocal.model.header import read_header
    from moelocal.model.store import resolve
    from moelocal.plan.llama_flags import offload_min_batch
    from moelocal.plan.planner import make_plan

    request = placement.request(one_shot)
    llama.LOG.verbose = verbose
    path = resolve(reference, note)
    header = read_header(path)
    facts = read_facts(header)
    llama.offload_prompts_from(offload_min_batch(facts))
    machine = find_machine(placement.rpc or ())
    facts = informed(facts, header, path, machine)
    request = tuned(request, path, machine)
    if watch is not None:
        request = replace(request, n_outputs=watch.n_batch)
    meanwhile = threading.Thread(target=_import_what_follows, args=(raw,))
    with LoadingBar(f"Loading {facts.name or path.name}", silent=verbose) as bar:
        loader = _Loader(path, header, bar, one_shot, meanwhile, watch)
        history = known(path, facts, machine)
        session = loader.load(machine, lambda less: make_plan(facts, less, request, history))
    drop_silent_workers(placement.rpc or ())
    meanwhile.join()
    sys.setswitchinterval(_SWITCH_S)
    gc.freeze()  # what starting made stays; collections look only at what comes now
    gc.enable()
    if facts.n_ctx_train and (placement.ctx or 0) > facts.n_ctx_train:
        note(f"The model was trained for {facts.n_ctx_train:,} tokens: beyond them its answers get worse.")
    from moelocal.engine.meter import Meter
    from moelocal.engine.prompt import make_prompter

    prompter = make_prompter(header.metadata, raw, session.token_text)
    meter = Meter(path, machine, session)
    return Opened(reference, facts, machine, request, session.plan, session, prompter, meter, history)


def tuned(request: PlanRequest, path: Path, machine: Machine) -> PlanRequest:
    """The request with what `moelocal tune` found for this model here, where nothing else is asked for."""
    try:
        if not tuned_file(path).exists():
            return request
    except BadRequest:
        return request
    from moelocal.engine import llama
    from moelocal.machine.hardware import identity
    from moelocal.measure.tuned import with_tuned

    return with_tuned(request, path, identity(machine.cpu, machine.devices, llama.version()))


def informed(facts: ModelFacts, header: GGUFHeader, path: Path, machine: Machine) -> ModelFacts:
    """The facts with what the model's expert profile says, where RAM may be too small for the model."""
    if not facts.is_moe or facts.file_bytes < machine.ram_free_bytes:
        return facts
    from moelocal.model import usage

    return usage.informed(facts, header, [Path(shard) for shard in header.shards] or [path])


def find_machine(workers: Sequence[str]) -> Machine:
    """This machine as llama.cpp sees it, with workers (HOST:PORT each).

    Raises:
        KeyboardInterrupt: Ctrl-C.
        MoelocalError: a worker does not answer.
    """
    from moelocal.engine import llama
    from moelocal.engine.interrupt import Interrupt
    from moelocal.machine.hardware import detect

    if workers:
        from moelocal.engine import rpc

        rpc.add_workers(workers)
    with Interrupt() as interrupt:  # Ctrl-C in a callback from C would be lost
        machine = detect(llama.devices(), llama.version())
    interrupt.close()
    if interrupt.is_set():
        raise KeyboardInterrupt
    return machine


def drop_silent_workers(workers: Sequence[str]) -> None:
    """After a load: a worker that no longer answers ends the program instead of stopping it for ever."""
    if workers:
        from moelocal.engine import rpc

        rpc.drop_when_silent()


def load_planned(
    path: Path, header: GGUFHeader, machine: Machine, plan_for: Callable[[Machine], Plan], verbose: bool
) -> Session:
    """Loads a model that only computes: no prompts, no history. `plan_for`: its plan on a machine.

    Raises:
        MoelocalError: it does not fit, or llama.cpp refuses it.
    """
    meanwhile = threading.Thread(target=importlib.import_module, args=("numpy",))
    with LoadingBar(f"Loading {path.name}", silent=verbose) as bar:
        session = _Loader(path, header, bar, True, meanwhile).load(machine, plan_for)
    meanwhile.join()
    sys.setswitchinterval(_SWITCH_S)
    return session


def known(path: Path, facts: ModelFacts, machine: Machine) -> Calibration | None:
    """What was measured when this model ran here; None if it never did."""
    try:
        if not runs_file(path).exists():
            return None
    except BadRequest:
        return None
    from moelocal.engine.history import read_runs
    from moelocal.plan.calibration import Calibration

    return Calibration(facts, machine, read_runs(path, machine))


class _Loader(NamedTuple):
    """Loads one file as planned, or with less when memory turns out to be too small."""

    path: Path
    header: GGUFHeader
    bar: LoadingBar
    one_shot: bool
    meanwhile: threading.Thread  # started when the interpreter has nothing else to do
    watch: NodeReader | None = None

    def load(self, machine: Machine, plan_for: Callable[[Machine], Plan]) -> Session:
        """Loads, steps down once if needed, and remembers what worked."""
        from moelocal.cli import guard
        from moelocal.engine import recover

        before = recover.remembered_steps(self.path, machine)
        stairs = recover.Stairs(machine, plan_for, before)
        plan = stairs.plan
        if guard.attempt() and (less := stairs.below(plan, "ram")):
            self._tell(f"Memory ran out while the model was loaded. {recover.describe_step(plan, less)}")
            plan = less
        guard.repeatable(True)
        session, plan = recover.load_or_step_down(plan, self._open, stairs.below, self._tell)
        guard.repeatable(False)
        if len(stairs.taken) > len(before):
            recover.remember_steps(self.path, machine, stairs.taken, plan)
        return session

    def _open(self, plan: Plan) -> Session:
        from moelocal.engine.session import load

        paths = [Path(shard) for shard in self.header.shards] or [self.path]
        if self.meanwhile.ident is None:
            sys.setswitchinterval(_SWITCH_LOADING_S)
            self.meanwhile.start()
        session = load(paths, self.header, plan, self.bar.update, self.one_shot, self.watch)
        if plan.disk_bytes and plan.load_mode == "mmap" and session.watch is None:
            self._tell("This system cannot be asked to read ahead: weights are read when they are touched, slower.")
        if any(use.kind != "cpu" for use in plan.per_device):  # a GPU's memory is taken now or never
            try:
                session.open()
            except MoelocalError:
                session.close()
                raise
        return session

    def _tell(self, message: str) -> None:
        from moelocal.cli.messages import note

        self.bar.close()
        note(message)


def _import_what_follows(raw: bool) -> None:
    importlib.import_module("moelocal.engine.conversation")
    importlib.import_module("moelocal.engine.meter")
    if not raw:
        importlib.import_module("moelocal.engine.template")
    if sys.stdout.isatty() and not is_dumb():
        importlib.import_module("moelocal.cli.render")


class LoadingBar:
    """A progress bar on stderr that appears only when the work takes longer than half a second, and leaves no trace."""

    def __init__(self, label: str, silent: bool = False) -> None:
        self._label = label
        self._silent = silent or not sys.stderr.isatty() or is_dumb()
        self._start = time.monotonic()
        self._bar: Any = None

    def update(self, fraction: float) -> None:
        """Shows how far it is: 0.0 to 1.0."""
        if self._silent or (self._bar is None and time.monotonic() - self._start < 0.5):
            return
        if self._bar is None:
            from moelocal.cli.render import progress_bar

            self._bar = progress_bar(self._label)
        self._bar(fraction)

    def close(self) -> None:
        """Takes the bar off the screen; it does not come back."""
        self._silent = True
        if self._bar is not None:
            self._bar(None)
            self._bar = None

    def __enter__(self) -> LoadingBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def make_sampling(generation: Generation, metadata: Mapping[str, Any], session: Session | None = None) -> Sampling:
    """Sampling from a command's options, the model's advice and the defaults. With a session, a grammar is parsed.

    Raises:
        BadRequest: impossible values, or a grammar or schema file that cannot be used.
    """
    from moelocal.engine.sampling import Sampling, with_advice

    grammar = None
    if generation.grammar is not None:
        grammar = read_text(generation.grammar, "grammar")
    elif generation.json_schema is not None:
        from moelocal.engine.llama import schema_to_grammar

        schema = read_text(generation.json_schema, "JSON schema")
        with _naming(generation.json_schema):
            grammar = schema_to_grammar(schema)
    names = {field.name for field in fields(Sampling)}
    given = {name: value for name, value in asdict(generation).items() if name in names}
    sampling = with_advice({**given, "grammar": grammar, "stop": tuple(generation.stop or ())}, metadata)
    file = generation.grammar or generation.json_schema
    if session is not None and file is not None:
        with _naming(file):
            session.check(sampling)
    return sampling


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Puts the name of the file before what is wrong with it."""
    try:
        yield
    except BadRequest as error:
        raise BadRequest(f"{file}: {error.message}", error.hint) from error


def read_text(path: Path, what: str, max_bytes: int = 8 << 20) -> str:
    """The text of a small file.

    Raises:
        BadRequest: missing, unreadable, too large, empty, or not UTF-8.
    """
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise BadRequest(f"The {what} {path} cannot be read: {error.strerror}.", "Check the path.") from error
    except UnicodeDecodeError as error:
        raise BadRequest(f"The {what} {path} is not UTF-8 text (byte {error.start}).", "Give a text file.") from error
    if len(data) > max_bytes:
        raise BadRequest(f"The {what} {path} is larger than {max_bytes >> 20} MiB.", "Give a shorter one.")
    if not text.strip():
        raise BadRequest(f"The {what} {path} is empty.", "Give one with content.")
    return text
