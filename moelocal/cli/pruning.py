"""What `prune` does with a model: found, run over a text, cut, compared with what it was."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from moelocal.errors import BadRequest, MoelocalError
from moelocal.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from moelocal.build.prune import Cut, Experts
    from moelocal.build.saliency import Saliency
    from moelocal.cli.options import Placement
    from moelocal.cli.prune import Pruning
    from moelocal.measure.evaluate import Result
    from moelocal.measure.routing import Passage
    from moelocal.model.facts import ModelFacts
    from moelocal.model.header import GGUFHeader

_N_CTX = 2048  # tokens of a chunk of the text


@dataclass(frozen=True, slots=True)
class Source:
    """The model to prune, as typed and as found; `base` is its name without a quantization."""

    reference: str
    base: str
    header: GGUFHeader
    facts: ModelFacts
    experts: Experts

    @property
    def paths(self) -> list[Path]:
        """Its files."""
        return [Path(shard) for shard in self.header.shards]

    @property
    def quant_suffix(self) -> str:
        """Its quantization, as the end of a file's name."""
        return "" if self.facts.quant in ("", "unknown") else f"-{self.facts.quant}"


@dataclass(frozen=True, slots=True)
class Task:
    """What to do: `n_keep` experts of each layer shall stay; on `eval_text`, if given, the result is compared."""

    source: Source
    pruning: Pruning
    placement: Placement
    n_keep: int
    eval_text: str | None
    verbose: bool


class Row(NamedTuple):
    """One layer: the experts that go, and which shares of the choices and of the router's weights they had; None: the
    text did not come through this layer."""

    layer: int
    dropped: tuple[int, ...]
    choices: float | None
    mass: float | None


class Decision(NamedTuple):
    """What stays and what goes, and what that was decided on."""

    cut: Cut
    rows: list[Row]
    text: str


def find(reference: str) -> Source:
    """Looks at a model.

    Raises:
        MoelocalError: it is not there, is damaged, or cannot be pruned.
    """
    from moelocal.build.prune import look
    from moelocal.cli.making import base_name
    from moelocal.cli.messages import note
    from moelocal.model.facts import read_facts
    from moelocal.model.header import read_header
    from moelocal.model.store import resolve

    path = resolve(reference, note)
    header = read_header(path)
    return Source(reference, base_name(reference, path), header, read_facts(header), look(header))


def keep_count(source: Source, pruning: Pruning, placement: Placement) -> int:
    """How many experts of each layer stay.

    Raises:
        BadRequest: impossible, or nothing would be dropped.
    """
    experts = source.experts
    if pruning.keep is not None:
        n_keep = _typed_count(pruning.keep, experts)
    elif pruning.size is not None:
        n_keep = _by_size(source, parse_bytes(pruning.size))
    else:
        n_keep = _by_memory(source, placement)
    if n_keep >= experts.n_experts:
        if pruning.keep is not None:
            raise BadRequest(
                f"To keep {pruning.keep} would drop nothing: the model has {experts.n_experts} experts.",
                f"Keep {_range(experts)}",
            )
        raise MoelocalError(
            f"The whole model fits ({format_bytes(source.header.file_bytes)}), so no expert has to go.",
            "To drop some all the same: --keep 75%",
        )
    return n_keep


def _range(experts: Experts) -> str:
    last = experts.n_experts - experts.n_groups
    step = f", in steps of {experts.n_groups}" if experts.n_groups > 1 else ""
    return f"{experts.least} to {last} of them{step}: --keep {last}"


def _typed_count(text: str, experts: Experts) -> int:
    """`75%` or a number.

    Raises:
        BadRequest: neither, or too few.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%?)\s*", text)
    if match is None or (not match[2] and "." in match[1]):
        raise BadRequest(f"--keep {text} is neither a share nor a number of experts.", "Such as: --keep 75%")
    n_asked = float(match[1]) * (experts.n_experts / 100 if match[2] else 1)
    if n_asked > experts.n_experts:
        raise BadRequest(
            f"To keep {text} is more than the {experts.n_experts} experts that the model has.",
            f"For a share, write: --keep {match[1]}%"
            if not match[2] and float(match[1]) < 100
            else "Such as: --keep 75%",
        )
    n_keep = int(n_asked / experts.n_groups + 0.5) * experts.n_groups
    if n_keep < experts.least:
        why = f"it uses {experts.n_used} per token"
        if experts.n_groups > 1:
            why += f", from {experts.n_groups} groups"
        raise BadRequest(
            f"To keep {text} is {n_keep} of {experts.n_experts} experts, and this model needs {experts.least}: {why}.",
            f"Keep {_range(experts)}",
        )
    return n_keep


def file_bytes(source: Source, n_keep: int) -> int:
    """What a file with so many experts in each layer takes at most."""
    from moelocal.build.prune import Cut, Record

    if n_keep == source.experts.n_experts:
        return source.header.file_bytes
    kept = {layer: range(n_keep) for layer in source.experts.layers}
    record = Record("frequency", source.paths[0].name, "0" * 64, 0)  # as long as the longest
    return Cut(source.header, source.experts, kept, record).file_bytes


def _by_size(source: Source, limit_bytes: int) -> int:
    from moelocal.build.prune import largest

    n_keep = largest(lambda n: file_bytes(source, n) <= limit_bytes, source.experts)
    if n_keep is None:
        least = source.experts.least
        raise BadRequest(
            f"Even with {least} experts in each layer the file has {format_bytes(file_bytes(source, least))}, more "
            f"than {format_bytes(limit_bytes)}; fewer cannot be, as it uses {source.experts.n_used} per token.",
            "Quantize it first (moelocal quantize), or allow more.",
        )
    return n_keep


def _by_memory(source: Source, placement: Placement) -> int:
    """The most experts with which the planner leaves nothing on the disk."""
    from moelocal.build.prune import largest, smaller
    from moelocal.cli.opening import find_machine
    from moelocal.errors import OutOfMemory
    from moelocal.model.facts import read_facts
    from moelocal.plan.planner import make_plan
    from moelocal.plan.refusals import memory_of

    machine, request, n_all = find_machine(placement.rpc or ()), placement.request(), source.experts.n_experts

    def fits(n: int) -> bool:
        facts = source.facts if n == n_all else read_facts(smaller(source.header, n_all, n))
        try:
            return make_plan(facts, machine, request).fits
        except OutOfMemory:
            return False

    n_keep = largest(fits, source.experts)
    if n_keep is None:
        least = source.experts.least
        raise OutOfMemory(
            f"Even with {least} experts in each layer the file has {format_bytes(file_bytes(source, least))}, and with "
            f"its context and what computing takes {memory_of(machine, request)} cannot hold that.",
            "Free memory, quantize it first (moelocal quantize), or give it a shorter context: --ctx",
        )
    return n_keep


def decide(task: Task) -> Decision:
    """Runs the text, unless what is kept with the model says enough, and chooses what stays.

    Raises:
        KeyboardInterrupt: Ctrl-C.
        MoelocalError: the text is too short, the model does not load.
    """
    from moelocal.build.prune import Cut, Record, original_ids
    from moelocal.build.saliency import keep_best
    from moelocal.cli.messages import note

    source, pruning = task.source, task.pruning
    seen, text, sha256 = _kept_profile(task) or _run(task)
    none = [0.0] * source.experts.n_experts
    kept = {
        layer: keep_best(
            seen[layer].scores(pruning.criterion) if layer in seen else none, task.n_keep, source.experts.n_groups
        )
        for layer in source.experts.layers
    }
    if unseen := [layer for layer in kept if layer not in seen]:
        note(f"llama.cpp does not run layers {', '.join(map(str, unseen))}: their first experts stay.")
    n_tokens = max(one.n_tokens for one in seen.values())
    record = Record(pruning.criterion, source.paths[0].name, sha256, n_tokens)
    cut = Cut(source.header, source.experts, kept, record)
    if list(original_ids(source.header, source.paths[0], source.experts.layers[0], source.experts)) != list(
        range(source.experts.n_experts)
    ):
        note("This model was pruned before; the file will say which of its first experts are left.")
    return Decision(cut, [_row(layer, kept[layer], seen, source.experts.n_experts) for layer in kept], text)


def _row(layer: int, kept: Sequence[int], seen: Mapping[int, Saliency], n_experts: int) -> Row:
    dropped = tuple(sorted(set(range(n_experts)).difference(kept)))
    if layer not in seen:
        return Row(layer, dropped, None, None)
    one = seen[layer]
    shares = [
        sum(values[expert] for expert in dropped) / sum(values) if sum(values) else 0.0
        for values in (one.counts, one.mass)
    ]
    return Row(layer, dropped, *shares)


def _kept_profile(task: Task) -> tuple[dict[int, Saliency], str, str] | None:
    """What `moelocal experts` saw, if that is enough: for plain frequency, without a text of one's own."""
    import sys

    from moelocal.build.saliency import Saliency
    from moelocal.model.usage import identity, load_usage

    is_piped = sys.stdin is not None and not sys.stdin.isatty()
    if task.pruning.criterion != "frequency" or task.pruning.text is not None or is_piped:
        return None
    usage = load_usage(identity(task.source.header, task.source.paths))
    if usage is None or any(len(layer.counts) != task.source.experts.n_experts for layer in usage.layers):
        return None
    seen = {}
    for layer in usage.layers:
        one = seen[layer.layer] = Saliency(task.source.experts.n_experts)
        one.n_tokens, one.counts, one.mass = usage.n_tokens, list(layer.counts), list(layer.mass)
    return seen, f"the profile kept by moelocal experts ({usage.text})", ""


def _run(task: Task) -> tuple[dict[int, Saliency], str, str]:
    """The model run over the text, routers and experts' outputs watched; also names and hash of the text."""
    from moelocal.build.saliency import calibrate
    from moelocal.cli.evaluating import text_tokens
    from moelocal.cli.opening import LoadingBar, open_model
    from moelocal.cli.screen import quiet_keys
    from moelocal.cli.texts import passages
    from moelocal.engine.watch import Watch

    texts = passages(task.pruning.text)
    sha256 = hashlib.sha256("\n".join(one.text for one in texts).encode()).hexdigest()
    n_ctx = min(_N_CTX, task.placement.ctx or _N_CTX, task.source.facts.n_ctx_train or _N_CTX)
    watch = Watch(outputs=True)
    n_experts = dict.fromkeys(task.source.experts.layers, task.source.experts.n_experts)
    opened = open_model(
        task.source.reference, replace(task.placement, ctx=n_ctx), task.verbose, raw=True, one_shot=True, watch=watch
    )
    with opened.session as session, quiet_keys(), LoadingBar("Running the text", silent=task.verbose) as bar:
        if task.eval_text is not None:
            _check_eval_text(len(text_tokens(session, task.eval_text)), _chunk_tokens(task.placement))
        tokens = [session.tokenize(one.text, special=task.pruning.parse_special) for one in texts]
        seen = calibrate(session, watch, tokens, n_experts, bar.update)
    _tell_doubts(texts, seen, task.source.experts)
    names = ", ".join(one.name for one in texts)
    return seen, f"{max(one.n_tokens for one in seen.values()):,} tokens of {names}", sha256


def _tell_doubts(texts: Sequence[Passage], seen: Mapping[int, Saliency], experts: Experts) -> None:
    """Says when what stays was decided on too little."""
    from moelocal.build.saliency import ENOUGH_CHOICES
    from moelocal.cli.messages import note
    from moelocal.measure.routing import built_in

    if texts == built_in():
        note(
            "Decided on the built-in passages, which are short and know nothing of what you use the model for. Better: "
            "--text FILE, for a chat model with conversations in its own format and --parse-special."
        )
        return
    n_tokens = max(one.n_tokens for one in seen.values())
    n_choices = n_tokens * experts.n_used / experts.n_experts
    if n_choices < ENOUGH_CHOICES:
        n_enough = math.ceil(ENOUGH_CHOICES * experts.n_experts / experts.n_used)
        note(
            f"The text has {n_tokens:,} tokens, {n_choices:.0f} choices of each expert on average: what stays is "
            f"partly chance. Better: {n_enough:,} tokens or more."
        )


def _chunk_tokens(placement: Placement) -> int:
    """Of the comparison; `--ctx` is for the text that decides."""
    from moelocal.cli.evaluating import chunk_tokens

    return chunk_tokens(replace(placement, ctx=None), None)


def _check_eval_text(n_tokens: int, n_ctx: int) -> None:
    """Before the run what the comparison would refuse after it.

    Raises:
        BadRequest: the text is too short.
    """
    if n_tokens < 2 * n_ctx:
        raise BadRequest(
            f"The text of --eval has {n_tokens:,} tokens, and {2 * n_ctx:,} are the least.",
            "Give a longer one, of some hundred words at least.",
        )


def compare(task: Task, output: Path, text: str) -> Result:
    """The pruned model beside the one before, on a text."""
    from moelocal.cli.evaluating import Task as Evaluation
    from moelocal.cli.evaluating import carry_out, find_side
    from moelocal.cli.opening import find_machine

    placement = replace(task.placement, ctx=None)
    n_ctx = _chunk_tokens(placement)
    ours, before = (find_side(str(path), placement, n_ctx) for path in (output, task.source.paths[0]))
    machine = find_machine(placement.rpc or ())
    return carry_out(Evaluation(ours, machine, text, None, before, verbose=task.verbose))
