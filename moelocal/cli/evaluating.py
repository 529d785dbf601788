"""What `eval` does with its models: planned together, run beside each other or one after the other, text read, progress
shown."""

from __future__ import annotations

import hashlib
import shlex
import sys
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from moelocal.cli.screen import is_dumb, quiet_keys
from moelocal.errors import BadRequest, MoelocalError, OutOfMemory
from moelocal.units import format_bytes

if TYPE_CHECKING:
    from moelocal.cli.options import Placement
    from moelocal.engine.session import Session
    from moelocal.machine.hardware import Machine
    from moelocal.measure.checkpoint import State
    from moelocal.measure.evaluate import Reference, Result, Text
    from moelocal.measure.logits_file import LogitsWriter, SavedLogits
    from moelocal.measure.perplexity import Layout
    from moelocal.model.facts import ModelFacts
    from moelocal.model.header import GGUFHeader
    from moelocal.plan.planner import Plan, PlanRequest

_N_CTX, _N_UBATCH = 512, 512  # llama-perplexity's own
_ROOM_BYTES = 64 << 20  # left free on a disk


class Side(NamedTuple):
    """One model of an evaluation, as typed and as found, and how it shall run."""

    reference: str
    path: Path
    header: GGUFHeader
    facts: ModelFacts
    request: PlanRequest

    def plan(self, machine: Machine) -> Plan:
        """Where it goes on a machine."""
        from moelocal.plan.planner import make_plan

        return make_plan(self.facts, machine, self.request)

    def open(self, machine: Machine, verbose: bool) -> Session:
        """Loads it."""
        from moelocal.cli.opening import load_planned

        return load_planned(self.path, self.header, machine, self.plan, verbose)


@dataclass(frozen=True, slots=True)
class Task:
    """What to evaluate: `text` None: the tokens of the saved logits. `n_chunks` None: all."""

    model: Side
    machine: Machine
    text: str | None
    n_chunks: int | None = None
    reference: Side | None = None
    saved: SavedLogits | None = None
    save_to: Path | None = None
    verbose: bool = False


def find_side(reference: str, placement: Placement, n_ctx: int, experts_used: int | None = None) -> Side:
    """Looks at a model, without loading it.

    Raises:
        MoelocalError: it is not there, is damaged, or cannot use that many experts.
    """
    from moelocal.cli.messages import note
    from moelocal.model.facts import read_facts
    from moelocal.model.header import read_header
    from moelocal.model.store import resolve

    path = resolve(reference, note)
    header = read_header(path)
    facts = read_facts(header)
    if experts_used is not None:
        if not facts.is_moe:
            raise BadRequest(f"{reference} is not a Mixture-of-Experts model.", "Leave --experts-used out.")
        if experts_used > facts.n_experts:
            raise BadRequest(
                f"{reference} has {facts.n_experts} experts, so {experts_used} cannot be used.",
                f"It uses {facts.n_experts_used} per token by itself.",
            )
        key = f"{facts.arch}.expert_used_count"
        header = replace(header, metadata={**header.metadata, key: experts_used})
        facts = read_facts(header)
    n_ubatch = min(placement.ubatch or _N_UBATCH, n_ctx)
    request = replace(
        placement.request(one_shot=True),
        n_ctx=n_ctx,
        n_ubatch=n_ubatch,
        kv_type=placement.kv_type or "f16",  # not the planner's choice: it changes the result
        objective="long-prompt" if placement.objective == "chat" else placement.objective,
        n_outputs=min(n_ubatch, n_ctx - 1 - n_ctx // 2),
        experts_used=experts_used,
    )
    return Side(reference, path, header, facts, request)


def chunk_tokens(placement: Placement, saved: SavedLogits | None) -> int:
    """Tokens of a chunk: as asked, else the saved logits' own, else llama-perplexity's.

    Raises:
        BadRequest: another length than that of the saved logits.
    """
    if saved is None:
        return placement.ctx or _N_CTX
    n_ctx = saved.shape.layout.n_ctx
    if placement.ctx not in (None, n_ctx):
        raise BadRequest(
            f"{saved.path} holds chunks of {n_ctx:,} tokens, not of {placement.ctx:,}.", "Leave --ctx out."
        )
    return n_ctx


def carry_out(task: Task) -> Result:
    """Runs an evaluation, with progress on stderr.

    Raises:
        KeyboardInterrupt: Ctrl-C; the same task goes on where it was.
        MoelocalError: what it needs is not there, or does not fit.
    """
    from moelocal.measure.evaluate import LiveReference

    with ExitStack() as stack:
        if task.reference is None:
            session = stack.enter_context(task.model.open(task.machine, task.verbose))
            text = _text_of(task, session)
            return _run(task, session, text, task.saved)
        _same_size(task.model, task.reference)
        rest = _beside(task)
        if rest is not None:
            other = stack.enter_context(task.reference.open(rest, task.verbose))
            session = stack.enter_context(task.model.open(task.machine, task.verbose))
            text = _text_of(task, session)
            _same_text(text.tokens, _text_of(task, other).tokens, task.reference.reference)
            return _run(task, session, text, LiveReference(other, text))
        with _one_after_the_other(task) as saved:
            session = stack.enter_context(task.model.open(task.machine, task.verbose))
            text = _text_of(task, session)
            _same_text(text.tokens, saved.tokens, task.reference.reference)
            return _run(task, session, text, saved)


def _beside(task: Task) -> Machine | None:
    """What of the machine is left for the reference beside the model; None: they do not fit together, or the reference
    would have to run elsewhere than alone."""
    from moelocal.plan.request import bounded, margin_bytes

    assert task.reference is not None
    mine, budget = task.model.plan(task.machine), bounded(task.machine, task.model.request)
    used = {use.name: use.total_bytes for use in mine.per_device}
    free = {device.name: device.free_bytes + margin_bytes(device) for device in budget.gpus}  # which it takes off again
    devices = tuple(
        replace(device, free_bytes=max(0, free.get(device.name, device.free_bytes) - used.get(device.name, 0)))
        for device in task.machine.devices
    )
    shared = sum(used.get(device.name, 0) for device in budget.gpus if device.shares_ram)
    left = max(0, budget.ram_free_bytes - used.get("CPU", 0) - shared)
    rest = replace(task.machine, devices=devices, ram_free_bytes=left)
    try:
        alone, beside = task.reference.plan(task.machine), task.reference.plan(rest)
    except OutOfMemory:
        return None
    return rest if mine.fits and beside.fits and beside.placement == alone.placement else None


@contextmanager
def _one_after_the_other(task: Task) -> Iterator[SavedLogits]:
    """The reference's logits in a file for as long as they are needed; kept when that is interrupted."""
    from moelocal.cli.messages import note
    from moelocal.measure.checkpoint import eval_folder
    from moelocal.measure.logits_file import SavedLogits

    assert task.reference is not None and task.text is not None
    side = task.reference
    key = _key(side, side.plan(task.machine), hashlib.sha256(task.text.encode()).digest(), task.n_chunks)
    file = eval_folder() / f"{key}.logits"
    if not file.exists():
        note("Both models do not fit into memory at once: the reference runs first, its logits go to a file meanwhile.")
        with side.open(task.machine, task.verbose) as session:
            first = replace(task, model=side, reference=None, save_to=file)
            _run(first, session, _text_of(first, session), None)
    with SavedLogits(file) as saved:
        yield saved
    with suppress(OSError):
        file.unlink()


def _run(task: Task, session: Session, text: Text, reference: Reference | None) -> Result:
    """Scores the text with one model, from where an earlier process stopped."""
    from moelocal.measure.checkpoint import Checkpoint
    from moelocal.measure.evaluate import run
    from moelocal.measure.logits_file import LogitsWriter, Shape, chunks_there

    shape = Shape(text.layout, session.n_vocab)
    if task.saved is not None and task.saved.shape.n_vocab != shape.n_vocab:
        raise _other_vocabulary(task.saved.path.name, task.saved.shape.n_vocab, task.model.reference, shape.n_vocab)
    other = _identity(task.saved.path if task.saved else task.reference.path if task.reference else None)
    extra = [other, task.reference.request if task.reference else None]
    key = _key(task.model, session.plan, text.tokens.tobytes(), text.layout.n_chunks, extra)
    with ExitStack() as stack:
        checkpoint = stack.enter_context(Checkpoint(key, reference is not None))
        writer: LogitsWriter | None = None
        if task.save_to is not None:
            if chunks_there(task.save_to, shape, text.tokens) < checkpoint.state.n_done:
                checkpoint.restart()
            n_done = checkpoint.state.n_done
            _check_room(task.save_to, shape.n_bytes - n_done * shape.chunk_bytes, shape)
            writer = stack.enter_context(LogitsWriter(task.save_to, shape, text.tokens, n_done))
        shown = stack.enter_context(_progress(text.layout, checkpoint.state, task.verbose))
        result = run(session, text, checkpoint, reference, writer, shown)
        if writer is not None:
            writer.finish(checkpoint.tokens()[:, 0])
        checkpoint.remove()
    return result


def _key(side: Side, plan: Plan, text: bytes, n_chunks: int | None, *extra: object) -> str:
    """A name for all that a result depends on."""
    from moelocal.engine import llama
    from moelocal.measure.checkpoint import file_identity, key_of

    files = [file_identity(Path(shard)) for shard in side.header.shards] or [file_identity(side.path)]
    how = (plan.n_ctx, plan.kv_type, plan.n_ubatch, plan.threads, plan.repack, plan.experts_used, plan.placement)
    facts = {"files": files, "how": how, "text": hashlib.sha256(text).hexdigest(), "n_chunks": n_chunks}
    return key_of({**facts, "engine": llama.version(), "extra": extra})


def _identity(path: Path | None) -> list[object] | None:
    from moelocal.measure.checkpoint import file_identity

    return None if path is None else file_identity(path)


def text_tokens(session: Session, text: str) -> list[int]:
    """As llama-perplexity: one line feed at the end does not count, control tokens are plain text."""
    return session.tokenize(text.removesuffix("\n"), special=False, add_bos=True)


def _text_of(task: Task, session: Session) -> Text:
    """The text as this model's tokens, and how it is cut.

    Raises:
        BadRequest: too short; or another text than that of the saved logits.
    """
    from moelocal.measure.evaluate import Text
    from moelocal.measure.perplexity import Layout

    n_ctx = session.plan.n_ctx
    if task.saved is not None and task.text is None:
        tokens = task.saved.tokens
        n_most = task.saved.n_whole
    else:
        assert task.text is not None
        tokens = array("i", text_tokens(session, task.text))
        n_most = len(tokens) // n_ctx
        if len(tokens) < 2 * n_ctx:
            shorter = 1 << max(4, (len(tokens) // 2).bit_length() - 1)
            command = f"moelocal eval {shlex.quote(task.model.reference)} --text FILE"
            is_enough = 2 * shorter <= len(tokens)
            hint = f"Give a longer text, or shorter chunks: {command} --ctx {shorter}"
            raise BadRequest(
                f"The text is too short for chunks of {n_ctx:,} tokens: it has {len(tokens):,}, "
                f"and {2 * n_ctx:,} are the least.",
                hint if is_enough else f"Give a longer text, of some hundred words at least: {command}",
            )
        if task.saved is not None:
            _same_text(tokens, task.saved.tokens, task.saved.path.name)
    n_chunks = min(task.n_chunks or n_most, n_most)
    if task.saved is not None:
        n_chunks = _saved_chunks(task.saved, task.n_chunks)
    return Text(tokens, Layout(n_ctx, n_chunks))


def _saved_chunks(saved: SavedLogits, wanted: int | None) -> int:
    """Chunks to compare with saved logits."""
    n_claimed = saved.shape.layout.n_chunks
    n_chunks = min(wanted or n_claimed, n_claimed)
    if n_chunks > saved.n_whole:
        raise MoelocalError(
            f"{saved.path} is cut off: it holds {saved.n_whole:,} of {n_claimed:,} chunks.",
            f"Make it again, or compare with what is there: --chunks {saved.n_whole}",
        )
    return n_chunks


def _same_size(model: Side, reference: Side) -> None:
    if model.facts.n_vocab != reference.facts.n_vocab:
        raise _other_vocabulary(reference.reference, reference.facts.n_vocab, model.reference, model.facts.n_vocab)


def _other_vocabulary(reference: str, n_reference: int, model: str, n_model: int) -> BadRequest:
    return BadRequest(
        f"{reference} has another vocabulary ({n_reference:,} tokens) than {model} ({n_model:,}).",
        "A reference must be the same model in another form: less quantized, or with all its experts.",
    )


def _same_text(tokens: array[int], theirs: array[int], reference: str) -> None:
    """Raises BadRequest unless what both hold of the text is the same."""
    n = min(len(tokens), len(theirs))
    if tokens[:n] != theirs[:n]:
        at = next(i for i in range(n) if tokens[i] != theirs[i])
        raise BadRequest(
            f"{reference} has other tokens for this text (from token {at:,} on): another text or another vocabulary.",
            "A reference must be the same model in another form, on the same text.",
        )


def _check_room(path: Path, n_bytes: int, shape: Any) -> None:
    """Raises MoelocalError when the disk has too little room for saved logits."""
    from moelocal.machine.disk import read_space

    free = read_space(path.parent).free_bytes
    if free is None or free >= n_bytes + _ROOM_BYTES:
        return
    n_chunks = (free - _ROOM_BYTES) // (shape.chunk_bytes + 4 * shape.layout.n_ctx)
    hint = f"Make room, or evaluate less: --chunks {n_chunks}" if n_chunks > 0 else "Make room there."
    raise MoelocalError(
        f"The logits take {format_bytes(n_bytes)}, and {path.parent} has {format_bytes(free)} free.", hint
    )


@contextmanager
def _progress(layout: Layout, state: State, verbose: bool) -> Iterator[Callable[[State], None]]:
    """Shows the estimates so far: a bar on a terminal, else llama-perplexity's `[1]4.3324,[2]5.0121,`."""
    if state.n_done:
        from moelocal.cli.messages import note

        note(f"Going on after chunk {state.n_done:,} of {layout.n_chunks:,}, where it was interrupted.")
    if sys.stderr.isatty() and not verbose and not is_dumb():
        from moelocal.cli.render_eval import Bar

        with quiet_keys():  # the ^C of a terminal would push a full line up, out of the bar's reach
            bar = Bar("Evaluating", layout.n_chunks, state.n_done)
            try:
                yield lambda now: bar.update(now.n_done, _estimate(now))
            finally:
                bar.close()
        return

    is_begun = False

    def tell(now: State) -> None:
        nonlocal is_begun
        is_begun = True
        print(f"[{now.n_done}]{now.tally.perplexity:.4f},", end="", file=sys.stderr, flush=True)

    try:
        yield tell
    finally:
        if is_begun:
            print(file=sys.stderr)


def _estimate(state: State) -> str:
    text = f"perplexity {state.tally.perplexity:.4f}"
    return f"{text}, KL {nats(state.distance.kl_mean[0], 5)}" if state.distance else text


def nats(value: float, digits: int = 6) -> str:
    """A divergence; one that rounding has made negative is none."""
    return f"{round(value, digits) + 0.0:.{digits}f}"
