"""`moelocal bench`: prompt and generation speed of models, settings and placements."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from moelocal.cli import options as opt
from moelocal.errors import BadRequest
from moelocal.units import parse_bytes

if TYPE_CHECKING:
    from moelocal.engine.session import Session
    from moelocal.machine.hardware import Machine
    from moelocal.measure.bench import BenchTest
    from moelocal.measure.bench_rows import Change, Row
    from moelocal.model.facts import ModelFacts
    from moelocal.model.header import GGUFHeader
    from moelocal.plan.calibration import Calibration
    from moelocal.plan.planner import Plan
    from moelocal.plan.request import PlanRequest

_KV_TYPES = ("f16", "q8_0", "q4_0")
_SWITCH = {"on": True, "off": False}
_MOST_TOKENS = 1 << 20

Models = Annotated[list[str], typer.Argument(metavar="MODEL...", help="One or more models.")]


@dataclass(frozen=True, slots=True)
class Tests:
    """What is timed; lists are separated by commas, and every combination is measured."""

    prompt: Annotated[str, opt.option("--prompt -p", "Tokens of the prompt; 0: none. [512]", "N,...")] = "512"
    gen: Annotated[str, opt.option("--gen -n", "Tokens generated; 0: none. [128]", "N,...")] = "128"
    depth: Annotated[str, opt.option("--depth -d", "Tokens in the context before. [0]", "N,...")] = "0"
    repetitions: Annotated[int, opt.option("--repetitions -r", "Runs of each test. [5]", "N", min=1, max=1000)] = 5

    def all(self) -> list[BenchTest]:
        """The tests, prompts first.

        Raises:
            BadRequest: not numbers, or nothing to time.
        """
        from moelocal.measure.bench import BenchTest

        prompts, gens = _counts("--prompt", self.prompt, 0), _counts("--gen", self.gen, 0)
        depths = _counts("--depth", self.depth, 0)
        tests = [BenchTest(n, 0, depth) for n in prompts if n for depth in depths]
        tests += [BenchTest(0, n, depth) for n in gens if n for depth in depths]
        if not tests:
            raise BadRequest("There is nothing to measure.", "Give --prompt 512, --gen 128, or both.")
        return tests


@dataclass(frozen=True, slots=True)
class Settings:
    """How models run; lists are separated by commas, and every combination is measured."""

    threads: Annotated[str | None, opt.option("--threads -t", "CPU threads. [chosen]", "N,...")] = None
    ubatch: Annotated[str | None, opt.option("--ubatch", "Prompt tokens computed at once. [chosen]", "N,...")] = None
    kv_type: Annotated[
        str | None, opt.option("--kv-type", "Type of the KV cache: f16, q8_0, q4_0. [chosen]", "TYPE,...")
    ] = None
    repack: Annotated[
        str | None, opt.option("--repack", "Weights rearranged for the CPU: on, off. [chosen]", "on,off")
    ] = None
    experts_on_cpu: Annotated[
        str | None, opt.option("--experts-on-cpu", "Keep the experts of N layers in RAM. [chosen]", "N,...")
    ] = None
    ram: Annotated[str | None, opt.option("--ram", "Use at most this much RAM, e.g. 12GiB.", "SIZE")] = None
    gpu_memory: Annotated[
        list[str] | None,
        opt.option("--gpu-memory", "Use at most this much of a GPU's memory; may be repeated.", "[DEVICE=]SIZE"),
    ] = None
    cpu_only: Annotated[bool, opt.option("--cpu-only", "Do not use a GPU.")] = False
    rpc: Annotated[
        list[str] | None,
        opt.option("--rpc", "Use another machine too, where moelocal worker runs; may be repeated.", "HOST:PORT"),
    ] = None

    @property
    def is_open(self) -> bool:
        """Whether all is left to the planner, as in answers."""
        return (self.threads, self.ubatch, self.kv_type, self.repack, self.experts_on_cpu) == (None,) * 5

    def requests(self) -> list[PlanRequest]:
        """Every combination; those that share weights in the same places are neighbours.

        Raises:
            BadRequest: values that cannot be.
        """
        from moelocal.plan.request import PlanRequest, parse_gpu_memory

        base = PlanRequest(
            cpu_only=self.cpu_only,
            ram_bytes=None if self.ram is None else parse_bytes(self.ram),
            gpu_bytes=parse_gpu_memory(self.gpu_memory or ()),
        )
        lists: dict[str, Sequence[Any]] = {
            "experts_on_cpu": _counts("--experts-on-cpu", self.experts_on_cpu, 0),
            "repack": [_SWITCH[word] for word in _words("--repack", self.repack, tuple(_SWITCH))],
            "kv_type": _words("--kv-type", self.kv_type, _KV_TYPES),
            "n_ubatch": _counts("--ubatch", self.ubatch, 1),
            "threads": _counts("--threads", self.threads, 1),
        }
        given = {name: values for name, values in lists.items() if values}
        return [replace(base, **dict(zip(given, values, strict=True))) for values in itertools.product(*given.values())]


@dataclass(frozen=True, slots=True)
class Output:
    """How results are shown."""

    compare: Annotated[bool, opt.option("--compare", "Beside the last results of the same tests here.")] = False
    csv: Annotated[bool, opt.option("--csv", "Comma-separated values on stdout.")] = False
    markdown: Annotated[bool, opt.option("--markdown", "A table to paste into a forum.")] = False
    svg: Annotated[Path | None, opt.option("--svg", "Draw a chart into this file.", "FILE")] = None

    def __post_init__(self) -> None:
        if self.svg is not None and (self.svg.is_dir() or not self.svg.absolute().parent.is_dir()):
            raise BadRequest(f"The chart cannot be written to {self.svg}.", "Give a file in a folder that exists.")


class Subject(NamedTuple):
    """A model to be measured. `history`: what was measured before, when it ran here."""

    reference: str
    path: Path
    header: GGUFHeader
    facts: ModelFacts
    history: Calibration | None = None

    @property
    def file(self) -> tuple[int, str]:
        """What it is known by among earlier results."""
        return self.facts.file_bytes, self.path.name


class Result(NamedTuple):
    """A row, what it is about, and how it differs from the last time."""

    row: Row
    subject: Subject
    change: Change | None


def bench(
    models: Models,
    tests: Tests,
    settings: Settings,
    output: Output,
    as_json: opt.Json = False,
    verbose: opt.Verbose = False,
) -> None:
    """Measure tokens per second: prompts (pp) and generation (tg), as llama-bench defines them."""
    from moelocal.cli.guard import guard
    from moelocal.cli.messages import note
    from moelocal.cli.opening import find_machine, known
    from moelocal.cli.render_bench import show
    from moelocal.engine import llama

    wanted, requests = tests.all(), settings.requests()
    if sum((as_json, output.csv, output.markdown)) > 1:
        raise BadRequest("--json, --csv and --markdown exclude each other.", "Give one of them.")
    guard()
    subjects = [subject_of(model) for model in dict.fromkeys(models)]
    llama.LOG.verbose = verbose
    machine = find_machine(settings.rpc or ())
    if not any(speeds.measured for speeds in machine.speeds.devices.values()):
        note("Predicted speeds and rooflines are estimates until this machine is measured: moelocal doctor --probe")
    subjects = [one._replace(history=known(one.path, one.facts, machine)) for one in subjects]
    plans = [(subject, _plans(subject, machine, requests, wanted)) for subject in subjects]
    results: list[Result] = []
    work = _Bench(machine, wanted, tests.repetitions, settings.rpc or (), verbose)
    try:
        for subject, its in plans:
            for row in work.rows(subject, its, settings.is_open):
                results.append(Result(row, subject, work.change(row, subject) if output.compare else None))
    except KeyboardInterrupt:
        if not results:
            raise
        note("Stopped: what was measured so far follows.")
        show(results, machine, output, as_json)
        raise
    finally:
        work.keep(results)
    show(results, machine, output, as_json)


def subject_of(reference: str) -> Subject:
    """A model that is here.

    Raises:
        MoelocalError: it is not, or is damaged.
    """
    from moelocal.cli.messages import note
    from moelocal.model.facts import read_facts
    from moelocal.model.header import read_header
    from moelocal.model.store import resolve

    path = resolve(reference, note)
    header = read_header(path)
    return Subject(reference, path, header, read_facts(header))


def _plans(
    subject: Subject, machine: Machine, requests: Sequence[PlanRequest], tests: Sequence[BenchTest]
) -> list[Plan]:
    """A plan for each request, with a context for the longest test; requests that come to one plan have one.

    Raises:
        OutOfMemory: it would not fit.
    """
    from moelocal.cli.messages import note
    from moelocal.cli.opening import tuned
    from moelocal.plan.planner import make_plan

    n_ctx = max(test.n_depth + test.n_tokens for test in tests)
    n_ctx = max(512, -(-n_ctx // 256) * 256)
    best = (tuned(request, subject.path, machine) for request in requests)
    plans = [make_plan(subject.facts, machine, replace(request, n_ctx=n_ctx), subject.history) for request in best]
    distinct = {(plan.context, plan.threads, plan.threads_batch): plan for plan in plans}
    if len(distinct) < len(plans):
        note(f"Some of these settings are the same for {subject.reference} on this machine: each is measured once.")
    return list(distinct.values())


class _Bench:
    """Measures models one after another, and keeps what was found."""

    def __init__(
        self, machine: Machine, tests: Sequence[BenchTest], repetitions: int, workers: Sequence[str], verbose: bool
    ) -> None:
        from moelocal.engine import llama
        from moelocal.machine.hardware import identity
        from moelocal.measure.bench_rows import Kept

        self._machine, self._tests, self._repetitions = machine, tests, repetitions
        self._workers, self._verbose = workers, verbose
        self._kept = Kept(identity(machine.cpu, machine.devices, ""), llama.version())

    def rows(self, subject: Subject, plans: Sequence[Plan], teaches: bool) -> Iterator[Row]:
        """The rows of one model, each as soon as it is measured. `teaches`: later predictions are corrected by them."""
        session: Session | None = None
        try:
            for i, plan in enumerate(plans):
                if session is not None and session.plan.weights == plan.weights:
                    session.run_as(plan)
                else:
                    if session is not None:
                        session.close()
                    session = self._load(subject, plan)
                rows: list[Row] = []
                for j, test in enumerate(self._tests):
                    label = f"{subject.reference} {test.name}"
                    done, n = i * len(self._tests) + j, len(plans) * len(self._tests)
                    with self._progress(label, done, n) as on_run:
                        rows.append(self._row(subject, plan, session, test, on_run))
                    yield rows[-1]
                if teaches:
                    self._teach(subject, session, rows)
        finally:
            if session is not None:
                session.close()

    def _load(self, subject: Subject, plan: Plan) -> Session:
        from moelocal.cli.messages import note
        from moelocal.cli.opening import LoadingBar, drop_silent_workers
        from moelocal.engine import llama
        from moelocal.engine.session import load
        from moelocal.plan.llama_flags import offload_min_batch
        from moelocal.units import format_bytes

        if plan.disk_bytes:
            is_asked = plan.ram_bytes is not None and plan.ram_bytes < self._machine.ram_free_bytes
            told = "are beyond --ram, but free memory may hold them: with so little RAM it would be slower."
            size = f"{format_bytes(plan.disk_bytes)} of {subject.reference}"
            note(f"{size} {told if is_asked else 'do not fit into RAM: the disk is measured too.'}")
        llama.offload_prompts_from(offload_min_batch(subject.facts))
        paths = [Path(shard) for shard in subject.header.shards] or [subject.path]
        with LoadingBar(f"Loading {subject.reference}", silent=self._verbose) as bar:
            session = load(paths, subject.header, plan, bar.update)
        drop_silent_workers(self._workers)
        return session

    @contextmanager
    def _progress(self, label: str, done: int, n: int) -> Iterator[Callable[[int], None]]:
        from moelocal.cli.opening import LoadingBar
        from moelocal.cli.screen import quiet_keys

        with quiet_keys(), LoadingBar(label, silent=self._verbose) as bar:
            yield lambda i: bar.update((done + i / (self._repetitions + 1)) / n)

    def _row(
        self, subject: Subject, plan: Plan, session: Session, test: BenchTest, on_run: Callable[[int], None]
    ) -> Row:
        from moelocal.measure.bench import measure
        from moelocal.measure.bench_rows import Row, Setting
        from moelocal.plan.calibration import Calibration
        from moelocal.plan.roofline import decode_roofline_per_s, prefill_roofline_per_s

        has_nvidia = any(device.backend == "CUDA" for device in self._machine.devices)
        samples = measure(session, test, self._repetitions, on_run, has_nvidia)
        setting = plan.setting
        assert setting is not None and plan.ram_bytes is not None  # made by make_plan
        n_depth = test.n_depth + (test.n_prompt or test.n_gen // 2)
        history = subject.history or Calibration(subject.facts, self._machine, ())
        told = history.predict(setting, plan.ram_bytes, test.n_prompt or 512, n_depth)
        if test.n_prompt:
            predicted, limit = told.prefill_per_s, prefill_roofline_per_s(subject.facts, self._machine, setting)
        else:
            predicted = told.decode_per_s
            limit = decode_roofline_per_s(subject.facts, self._machine, setting, n_depth)
        how = Setting(
            plan.threads,
            plan.threads_batch or plan.threads,
            plan.n_ubatch,
            plan.repack,
            plan.kv_type,
            plan.expert_layers(subject.facts),
        )
        return Row(subject.reference, test, how, samples, predicted, limit)

    def _teach(self, subject: Subject, session: Session, rows: Sequence[Row]) -> None:
        """Keeps one prompt and one generation where answers keep theirs: later plans are corrected by them. Not what
        other programs slowed down."""
        from moelocal.engine.history import Timed, remember_speeds
        from moelocal.measure.others import BUSY_SHARE

        def timed(row: Row | None) -> Timed:
            if row is None:
                return Timed()
            test = row.test
            return Timed(test.n_tokens, test.n_tokens / row.samples.median, test.n_depth + test.n_gen // 2)

        calm = [row for row in rows if row.samples.others_share <= BUSY_SHARE]
        prompt = next((row for row in calm if row.test.n_prompt and not row.test.n_depth), None)
        answer = next((row for row in calm if row.test.n_gen), None)
        remember_speeds(subject.path, self._machine, session, timed(prompt), timed(answer))

    def change(self, row: Row, subject: Subject) -> Change | None:
        """Against the last time, if there was one."""
        from moelocal.measure.bench_rows import compare

        earlier = self._kept.latest(row, subject.file)
        return compare(row.samples.per_s, earlier) if earlier else None

    def keep(self, results: Sequence[Result]) -> None:
        """For the next comparison."""
        from datetime import datetime, timezone

        when = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._kept.keep(((result.row, result.subject.file) for result in results), when)


def _words(name: str, text: str | None, allowed: Sequence[str]) -> list[str]:
    """A list as typed.

    Raises:
        BadRequest: a word that is not allowed.
    """
    words = [word.strip() for word in text.split(",")] if text is not None else []
    for word in words:
        if word not in allowed:
            raise BadRequest(f"{name} does not know {word!r:.40}.", f"It takes {', '.join(allowed)}.")
    return list(dict.fromkeys(words))


def _counts(name: str, text: str | None, least: int) -> list[int]:
    """A list of whole numbers as typed.

    Raises:
        BadRequest: not numbers, or impossible ones.
    """
    words = [word.strip() for word in text.split(",")] if text is not None else []
    for word in words:
        if word.isascii() and word.isdigit() and len(word.lstrip("0")) > len(str(_MOST_TOKENS)):
            raise BadRequest(f"{name} {word:.20} is too much.", f"At most {_MOST_TOKENS:,} can be measured.")
        if not word.isascii() or not word.isdigit() or not least <= int(word) <= _MOST_TOKENS:
            raise BadRequest(
                f"{name} {text!r:.60} is no list of whole numbers from {least} up.", f"Write it like: {name} 2,4"
            )
    return list(dict.fromkeys(map(int, words)))
