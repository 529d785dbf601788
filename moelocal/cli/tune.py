"""`moelocal tune`: the fastest settings for a model on this machine, found by measuring, kept for all later runs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moelocal.cli import options as opt
from moelocal.cli.screen import is_dumb
from moelocal.errors import BadRequest

if TYPE_CHECKING:
    from moelocal.cli.bench import Subject
    from moelocal.machine.hardware import Machine
    from moelocal.measure.others import OtherWork
    from moelocal.measure.tune import Step, Tuner

Minutes = Annotated[float, opt.option("--minutes", "Stop after so long, with the best so far. [5]", "N")]
Forget = Annotated[bool, opt.option("--forget", "Remove what was kept for this model.")]


@dataclass(frozen=True, slots=True)
class Alone(opt.Placement):
    """The settings that are not tuned. `--rpc` is refused, and so not shown."""

    rpc: Annotated[list[str] | None, typer.Option("--rpc", hidden=True)] = None


def tune(
    model: opt.Model,
    placement: Alone,
    minutes: Minutes = 5.0,
    forget: Forget = False,
    as_json: opt.Json = False,
    verbose: opt.Verbose = False,
) -> None:
    """Find a model's fastest settings here by measuring, and keep them: run, chat and plan then use them."""
    from moelocal.cli.bench import subject_of
    from moelocal.cli.guard import guard
    from moelocal.cli.messages import note
    from moelocal.cli.opening import find_machine
    from moelocal.engine import llama
    from moelocal.measure.others import OtherWork
    from moelocal.measure.tune import Tuner
    from moelocal.measure.tuned import forget_tuned
    from moelocal.paths import check_home

    if not 0.1 <= minutes <= 1440:
        raise BadRequest("--minutes takes 0.1 to 1440.", f"moelocal tune {model} --minutes 5")
    if placement.rpc:
        raise BadRequest("tune measures this machine alone.", "Leave --rpc out.")
    if not forget:
        check_home("What tune finds")
        guard()
    subject = subject_of(model)
    if forget:
        there = forget_tuned(subject.path)
        note(f"{'Forgotten' if there else 'Nothing was kept'}: settings of {model}.")
        return
    llama.LOG.verbose = verbose
    machine = find_machine(())
    live = _Live(minutes * 60, silent=verbose)
    tuner = Tuner(subject.facts, machine, placement.request(), _loader(subject, live, verbose), minutes * 60)
    tuner.tell = live.show
    view, others = _View(subject, tuner, live, as_json), OtherWork()
    try:
        for step in tuner.run():
            view.show(step)
    except KeyboardInterrupt:
        note("Stopped: only what was found so far counts.")
        view.end(_keep(subject, machine, tuner, others))
        raise
    finally:
        live.clear()
        tuner.close()
    view.end(_keep(subject, machine, tuner, others))


class _Live:
    """What is being measured, and the time left: a line on a terminal that changes and leaves no trace."""

    def __init__(self, seconds: float, silent: bool) -> None:
        self._silent = silent or not sys.stderr.isatty() or is_dumb()
        self._seconds, self._start = seconds, time.monotonic()
        self._line: Callable[[str | None], None] | None = None

    def show(self, change: dict[str, Any], n_done: int) -> None:
        """Before each measurement."""
        if self._silent:
            return
        if self._line is None:
            from moelocal.cli.render import status_line

            self._line = status_line()
        left = max(0, round(self._seconds - (time.monotonic() - self._start)))
        what = _words(change) if change else "the best against the planner's choice"
        self._line(f"  {left // 60}:{left % 60:02d} left at most; measuring {what}, pair {n_done // 2 + 1}")

    def clear(self) -> None:
        """Takes the line off the screen, for others to write there."""
        if self._line is not None:
            self._line(None)


def _loader(subject: Subject, live: _Live, verbose: bool) -> Any:
    from moelocal.cli.opening import LoadingBar
    from moelocal.engine import llama
    from moelocal.engine.session import load
    from moelocal.plan.llama_flags import offload_min_batch

    paths = [Path(shard) for shard in subject.header.shards] or [subject.path]

    def open_as(plan: Any) -> Any:
        llama.offload_prompts_from(offload_min_batch(subject.facts))
        live.clear()
        with LoadingBar(f"Loading {subject.reference}", silent=verbose) as bar:
            return load(paths, subject.header, plan, bar.update)

    return open_as


def _keep(subject: Subject, machine: Machine, tuner: Tuner, others: OtherWork) -> bool:
    """Keeps the outcome, unless other programs kept the processor busy meanwhile: then it says so. Returns whether.

    Raises:
        MoelocalError: it cannot be written.
    """
    from datetime import datetime, timezone

    from moelocal.cli.messages import note
    from moelocal.engine import llama
    from moelocal.machine.hardware import identity
    from moelocal.measure.others import BUSY_SHARE
    from moelocal.measure.tuned import forget_tuned, keep_tuned
    from moelocal.paths import cannot_keep

    outcome, share = tuner.outcome(), others.share()
    if share > BUSY_SHARE:
        note(
            f"Other programs used {share:.0%} of the processor meanwhile, so nothing was kept. Close them, then: "
            f"moelocal tune {subject.reference}"
        )
        return False
    if not outcome.fields:
        forget_tuned(subject.path)
        return False
    name = identity(machine.cpu, machine.devices, llama.version())
    when = datetime.now(timezone.utc).isoformat(timespec="seconds")
    try:
        keep_tuned(subject.path, name, outcome.fields, outcome.gain, when)
    except OSError as error:
        told = f"{_words(outcome.fields)}: {_compared(outcome.gain)} than as planned"
        raise cannot_keep(f"What was found ({told})", error) from error
    return True


class _View:
    """What is tried, a line each, and the end."""

    def __init__(self, subject: Subject, tuner: Tuner, live: _Live, as_json: bool) -> None:
        from moelocal.cli.messages import dim

        self._subject, self._tuner, self._live, self._as_json = subject, tuner, live, as_json
        self._steps: list[Step] = []
        plan = tuner.plan({})
        dim(f"The planner's choice: {_words({**_of(plan), 'kv_type': plan.kv_type})}. What is faster?")

    def show(self, step: Step) -> None:
        """One step."""
        from moelocal.cli.messages import dim, note

        self._steps.append(step)
        self._live.clear()
        if step.ratio is None:
            dim(f"  {_words(step.change)}: does not load")
            return
        pairs = f"{step.ratio.n_pairs} {'pair' if step.ratio.n_pairs == 1 else 'pairs'}"
        told = f"{_compared(1 / step.ratio.value)} ({pairs})"
        if step.is_taken:
            note(f"> {_words(step.change)}: {told}")
        else:
            dim(f"  {_words(step.change)}: {told}")

    def end(self, is_kept: bool) -> None:
        """What came of it."""
        from moelocal.cli.messages import note

        outcome = self._tuner.outcome()
        if self._as_json:
            print(json.dumps(self._document(is_kept), ensure_ascii=False))
            return
        if not outcome.fields:
            note("The planner's choice is the fastest that was found: nothing to keep.")
        else:
            told = f"{_words(outcome.fields)}: {_compared(outcome.gain)} than as planned"
            if is_kept:
                print(f"{told}.", flush=True)
                note(f"Kept: run, chat and plan use it for {self._subject.reference} from now on.")
            else:
                note(f"What was seen meanwhile is not to be trusted: {told}.")
        if not outcome.is_complete:
            note("Not everything was tried: give it more --minutes.")

    def _document(self, is_kept: bool) -> dict[str, Any]:
        outcome = self._tuner.outcome()
        return {
            "model": self._subject.reference,
            "settings": outcome.fields,
            "gain": round(outcome.gain, 4),
            "complete": outcome.is_complete,
            "kept": is_kept,
            "steps": [
                {
                    "change": step.change,
                    "speed_ratio": None if step.ratio is None else round(1 / step.ratio.value, 4),
                    "pairs": 0 if step.ratio is None else step.ratio.n_pairs,
                    "taken": step.is_taken,
                }
                for step in self._steps
            ],
        }


def _of(plan: Any) -> dict[str, Any]:
    return {"repack": plan.repack, "threads": plan.threads, "n_ubatch": plan.n_ubatch}


def _compared(speed: float) -> str:
    """A ratio of speeds: `12.3% faster`, `3.1 times faster`."""
    more, way = (speed, "faster") if speed >= 1 else (1 / speed, "slower")
    return f"{more:.1f} times {way}" if more >= 2 else f"{abs(speed - 1):.1%} {way}"


_WORDS: dict[str, Callable[[Any], str]] = {
    "repack": lambda on: "weights repacked" if on else "weights as in the file",
    "experts_on_cpu": lambda n: f"experts of {n} layers in RAM",
    "threads": lambda n: f"{n} {'thread' if n == 1 else 'threads'}",
    "threads_batch": lambda n: f"{n} {'thread' if n == 1 else 'threads'} for prompts",
    "n_ubatch": lambda n: f"prompts in batches of {n:,}",
    "flash_attn": lambda on: f"flash attention {'on' if on else 'off'}",
    "kv_type": lambda kind: f"KV cache as {kind}",
}


def _words(fields: dict[str, Any]) -> str:
    """Settings in words."""
    return ", ".join(_WORDS[name](value) for name, value in fields.items())
