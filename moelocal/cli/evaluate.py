"""`moelocal eval`: perplexity, and what a quantization, a KV type or fewer experts cost against a reference."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from moelocal.cli import options as opt
from moelocal.errors import BadRequest

if TYPE_CHECKING:
    from moelocal.measure.evaluate import Result
    from moelocal.measure.logits_file import SavedLogits

_MOST_TEXT_BYTES = 1 << 30
_CLIPPED_SHARE = 0.001
_MANY_TIMES = 1.5
_WIKITEXT = "wikitext-2-raw-v1.zip of ggml-org/ci on huggingface.co has wiki.test.raw, which published figures use"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What is evaluated, and against what."""

    text: Annotated[str | None, opt.option("--text", "The text, UTF-8; - or a pipe: standard input.", "FILE")] = None
    reference: Annotated[
        str | None,
        opt.option(
            "--reference", "Compare with this model, or with saved logits (llama-perplexity's too).", "MODEL|FILE"
        ),
    ] = None
    save_logits: Annotated[
        Path | None, opt.option("--save-logits", "Keep the log-probabilities, to compare others with.", "FILE")
    ] = None
    chunks: Annotated[int | None, opt.option("--chunks", "Evaluate the first N chunks. [all]", "N", min=1)] = None
    experts_used: Annotated[
        int | None, opt.option("--experts-used", "Experts per token. [the model's own number]", "N", min=1)
    ] = None


@dataclass(frozen=True, slots=True)
class Chunked(opt.Placement):
    """How the models run, a chunk of the text at a time."""

    ctx: Annotated[
        int | None, opt.option("--ctx", "Tokens of a chunk of the text. [512, or the saved logits' own]", "N", min=16)
    ] = None


def evaluate(
    model: opt.Model,
    evaluation: Evaluation,
    placement: Chunked,
    as_json: opt.Json = False,
    verbose: opt.Verbose = False,
) -> None:
    """Measure perplexity on a text, as llama-perplexity does, in chunks of --ctx tokens [512].

    With --reference also what was lost against it: KL divergence, and how often the first choice is the same. After an
    interruption the same command goes on where it was.
    """
    from moelocal.cli.guard import guard
    from moelocal.cli.messages import dim, note, wrapped

    with_file = evaluation.reference is not None and _is_saved(evaluation.reference)
    text = _text(evaluation.text, model, may_lack=with_file)
    _check_place(evaluation.save_logits)
    placement.request()  # bad values are told now, not after the load
    guard()
    from moelocal.cli.evaluating import Task, carry_out, chunk_tokens, find_side
    from moelocal.cli.opening import find_machine
    from moelocal.engine import llama
    from moelocal.plan.llama_flags import offload_min_batch

    llama.LOG.verbose = verbose
    saved: SavedLogits | None = None
    if with_file:
        saved = _open_saved(str(evaluation.reference))
    n_ctx = chunk_tokens(placement, saved)
    side = find_side(model, placement, n_ctx, evaluation.experts_used)
    other = None
    if evaluation.reference is not None and saved is None:
        plain = _with_f16_cache(placement)
        other = find_side(evaluation.reference, plain, n_ctx)
    _warn(side.facts.n_ctx_train, n_ctx)
    llama.offload_prompts_from(offload_min_batch(side.facts))
    machine = find_machine(placement.rpc or ())
    task = Task(side, machine, text, evaluation.chunks, other, saved, evaluation.save_logits, verbose)
    if text is not None and evaluation.text is None and text is _demo_text():
        note("No --text was given: the demo's own text is used, of the kind that it learned.")
    try:
        result = carry_out(task)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        dim("(interrupted: the same command goes on after the last complete chunk)")
        raise SystemExit(130) from None
    changes = {"kv_type": side.request.kv_type, "experts_used": side.facts.n_experts_used or None}
    if as_json:
        print(json.dumps({"model": model, **result.as_json(), "reference": evaluation.reference, **changes}))
        return
    name = _name(model, evaluation, placement)
    for line in report(result, evaluation.reference):
        print(line)
    print()
    print(wrapped(meaning(result, name)) if sys.stdout.isatty() else meaning(result, name))
    if verbose:
        share = result.arithmetic_s / max(result.seconds, 1e-9)
        dim(f"{result.seconds:.1f} s, of which {share:.1%} arithmetic outside llama.cpp")


def _with_f16_cache(placement: opt.Placement) -> opt.Placement:
    """The reference's settings: what is asked about the KV cache is asked about the model, not about its reference."""
    from dataclasses import replace

    return replace(placement, kv_type=None)


def _is_saved(reference: str) -> bool:
    from moelocal.measure.logits_file import is_logits_file
    from moelocal.paths import user_path

    return is_logits_file(user_path(reference))


def _check_place(path: Path | None) -> None:
    """Raises BadRequest for a place where no file can be: after hours of work it would be too late."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        reason = "it is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise BadRequest(f"The logits cannot be written to {path}: {reason}.", "Name a file in a folder that exists.")


def _open_saved(reference: str) -> SavedLogits:
    from moelocal.measure.logits_file import SavedLogits
    from moelocal.paths import user_path

    return SavedLogits(user_path(reference))


def _warn(n_ctx_train: int, n_ctx: int) -> None:
    from moelocal.cli.messages import note

    if n_ctx_train and n_ctx > n_ctx_train:
        note(f"The model was trained for {n_ctx_train:,} tokens, so chunks of {n_ctx:,} make it look worse than it is.")


def _text(option: str | None, model: str, may_lack: bool) -> str | None:
    """The text to evaluate: of the option, of a pipe, or for the demo its own. None: saved logits bring theirs.

    Raises:
        BadRequest: there is none, or it is no text.
    """
    from moelocal.cli.opening import read_text
    from moelocal.paths import user_path

    text = ""
    if option is not None and option != "-":
        text = read_text(user_path(option), "text", _MOST_TEXT_BYTES)
    elif option == "-" or (not may_lack and sys.stdin is not None and not sys.stdin.isatty()):
        text = _read_stdin()
    if "\0" in text:
        raise BadRequest("The text holds NUL characters, so it is binary data.", "Give a text in UTF-8.")
    if text.strip():
        return text
    if may_lack:
        return None
    if model == "demo" and option is None:
        return _demo_text()
    raise BadRequest("There is no text to evaluate on.", f"Give one with --text FILE: {_WIKITEXT}.")


@lru_cache(maxsize=1)
def _demo_text() -> str:
    from moelocal.cli.opening import read_text
    from moelocal.model.store import DEMO

    return read_text(DEMO.with_name("demo.txt"), "text")


def _read_stdin() -> str:
    try:
        return sys.stdin.buffer.read(_MOST_TEXT_BYTES).decode("utf-8-sig")
    except OSError as error:
        raise BadRequest(f"Standard input cannot be read: {error.strerror}.", "Give a file: --text FILE") from error
    except UnicodeDecodeError as error:
        raise BadRequest(
            f"Standard input is not UTF-8 text (byte {error.start}).", "Pipe in text, not binary data."
        ) from error


def _name(model: str, evaluation: Evaluation, placement: opt.Placement) -> str:
    """The model with what was changed about it."""
    parts = []
    if evaluation.experts_used is not None:
        parts.append(f"{evaluation.experts_used} expert{'s' * (evaluation.experts_used > 1)} per token")
    if placement.kv_type is not None:
        parts.append(f"a KV cache of {placement.kv_type}")
    name = Path(model).name if model.endswith(".gguf") else model
    return f"{name} with {' and '.join(parts)}" if parts else name


def report(result: Result, reference: str | None) -> list[str]:
    """The figures, a row each."""
    from moelocal.cli.evaluating import nats

    layout, tally = result.layout, result.tally
    chunks = "1 chunk" if layout.n_chunks == 1 else f"{layout.n_chunks:,} chunks"
    rows = [
        ("Text", f"{chunks} of {layout.n_ctx:,} tokens, {tally.count:,} scored"),
        ("Perplexity", f"{tally.perplexity:.4f} ± {tally.stderr:.4f}"),
    ]
    if (distance := result.distance) is not None:
        base, base_error = distance.base_perplexity
        ratio, ratio_error = result.ratio
        kl, kl_error = distance.kl_mean
        share, share_error = distance.agreement
        tail = result.quantiles
        rows += [
            ("Reference", f"{base:.4f} ± {base_error:.4f}  {reference}"),
            ("Ratio", f"{ratio:.5f} ± {ratio_error:.5f}"),
            ("KL divergence", f"{nats(kl)} ± {nats(kl_error)} nats per token"),
            ("  median", nats(tail["kl_median"])),
            ("  99 %", nats(tail["kl_p99"])),
            ("  99.9 %", nats(tail["kl_p999"])),
            ("  largest", nats(tail["kl_max"])),
            ("Same choice", f"{share:.3%} ± {share_error:.3%}"),
        ]
    return [f"{name:<14} {value}" for name, value in rows]


def meaning(result: Result, name: str) -> str:
    """What the figures say, in one sentence."""
    if result.distance is None:
        return (
            f"On this text {name} is as unsure of each next token as of a fair choice among "
            f"{result.tally.perplexity:.3g}; lower is better, and only figures on the same text compare."
        )
    share = result.distance.agreement[0]
    if result.distance.n_clipped > _CLIPPED_SHARE * result.distance.count:
        clipped = result.distance.n_clipped / result.distance.count
        return (
            f"{name} keeps {share:.1%} of the reference's first choices. Its perplexity does not compare: to the "
            f"reference {clipped:.1%} of the tokens are less likely than this file can say; give the model itself."
        )
    ratio, error = result.ratio
    change = f"{abs(ratio - 1):.2%} {'higher' if ratio > 1 else 'lower'}"
    if ratio > _MANY_TIMES:
        change = f"{ratio:.3g} times the reference's"
    if abs(ratio - 1) <= 2 * error:
        change = f"the same within the error ({ratio - 1:+.2%} ± {error:.2%})"
    return f"{name} keeps {share:.1%} of the reference's first choices; its perplexity is {change}."
