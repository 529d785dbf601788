"""`moelocal run`: one answer, streamed."""

from __future__ import annotations

import json
import select
import sys
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from moelocal.cli import options as opt
from moelocal.cli.messages import as_typed
from moelocal.errors import BadRequest

if TYPE_CHECKING:
    from moelocal.cli.answer import AnswerView
    from moelocal.cli.opening import Opened
    from moelocal.engine.conversation import Delta
    from moelocal.engine.prompt import Kind, Message
    from moelocal.engine.sampling import Sampling
    from moelocal.plan.planner import Plan

_STDIN_MAX_BYTES = 64 << 20
_N_ANSWER = 4096  # tokens of answer that a context chosen for a prompt has room for

Prompt = Annotated[
    str | None,
    typer.Argument(metavar="[PROMPT]", help=as_typed('From a pipe too: git diff | moelocal run demo "review this".')),
]


def run(
    model: opt.Model,
    generation: opt.Generation,
    placement: opt.Running,
    prompt: Prompt = None,
    hide_reasoning: opt.HideReasoning = False,
    as_json: opt.Json = False,
    verbose: opt.Verbose = False,
) -> None:
    """Answer one prompt. The answer goes to stdout, statistics to stderr."""
    from moelocal.cli.answer import open_view
    from moelocal.cli.guard import guard
    from moelocal.cli.messages import dim, note, stats_line
    from moelocal.cli.opening import make_sampling, open_model

    make_sampling(generation, {})  # bad values are told now, not after the load
    text = _prompt(prompt)
    guard()
    opened = open_model(model, placement, verbose, generation.raw, one_shot=True)
    from moelocal.engine.prompt import Message

    messages = [Message("system", generation.system)] if generation.system else []
    messages.append(Message("user", text))
    with opened.session as session:
        sampling = make_sampling(generation, session.header.metadata, session)
        if not generation.raw and not opened.prompter.has_template:
            note("This model has no chat template: it continues your text instead of answering it.")
        collected = _Collected()
        view: AnswerView = collected if as_json else open_view(sys.stdout.isatty(), hide_reasoning)
        try:
            ended = _answer(opened, messages, sampling, view)
        except KeyboardInterrupt:
            view.finish()
            if session.timings is None:
                raise
            dim("(interrupted)")
            dim(stats_line(session.timings))
            opened.meter.keep()
            raise SystemExit(130) from None
        last = ended.last
        view.finish()
        assert last.timings is not None
        if as_json:
            document = {
                "model": model,
                "text": collected.text("answer"),
                "reasoning": collected.text("reasoning"),
                "finish_reason": last.finish_reason,
                "tokens": ended.tokens,
                "timings": last.timings.as_json(),
                "plan": ended.plan.as_json(opened.facts),
            }
            print(json.dumps(document))
        if last.finish_reason == "length":
            limit = sampling.max_tokens
            full = limit is None or len(ended.tokens) < limit
            note("(The context is full; --ctx gives a longer one.)" if full else f"(Ended at --max-tokens {limit}.)")
        dim(stats_line(last.timings))
        opened.meter.keep()


class Ended(NamedTuple):
    """How an answer ended: its last piece, its token ids, and the plan it ran with."""

    last: Delta
    tokens: list[int]
    plan: Plan


class _Collected:
    """The view of `--json`: keeps the text."""

    def __init__(self) -> None:
        self._pieces: dict[Kind, list[str]] = {"answer": [], "reasoning": []}

    def feed(self, kind: Kind, text: str) -> None:
        self._pieces[kind].append(text)

    def finish(self) -> None:
        pass

    def text(self, kind: Kind) -> str:
        return "".join(self._pieces[kind])


def _answer(opened: Opened, messages: list[Message], sampling: Sampling, view: AnswerView) -> Ended:
    """Streams the answer into the view."""
    from moelocal.cli.opening import LoadingBar
    from moelocal.cli.screen import quiet_keys
    from moelocal.engine.conversation import prompt_tokens, reply

    session = opened.session
    prompt = prompt_tokens(session, opened.prompter, messages)
    plan = opened.for_prompt(len(prompt[1]), sampling.max_tokens or _N_ANSWER)
    tokens = []
    with quiet_keys(), LoadingBar("Reading the prompt") as bar:
        deltas = reply(session, opened.prompter, prompt, sampling, lambda done, all: bar.update(done / all))
        for delta in opened.meter.watch(deltas):
            bar.close()
            view.feed(delta.kind, delta.text)
            if delta.token is not None:
                tokens.append(delta.token)
    return Ended(delta, tokens, plan)


def _prompt(argument: str | None) -> str:
    """The prompt from the argument, from a pipe, or both: the piped text comes after the request.

    Raises:
        BadRequest: empty, or the pipe carries no text.
    """
    piped = "" if sys.stdin is None or sys.stdin.isatty() else _read_stdin()
    text = "\n\n".join(part for part in (argument or "", piped) if part.strip())
    if not text.strip():
        raise BadRequest("The prompt is empty.", 'Give one: moelocal run demo "What is a mixture of experts?"')
    return text


def _read_stdin() -> str:
    if sys.stderr.isatty() and sys.platform != "win32" and not select.select([sys.stdin], [], [], 1.0)[0]:
        print("Reading the rest of the prompt from standard input (close it, or add < /dev/null) ...", file=sys.stderr)
    try:
        data = sys.stdin.buffer.read(_STDIN_MAX_BYTES + 1)
    except OSError as error:
        raise BadRequest(
            f"Standard input cannot be read: {error.strerror}.", "Give the prompt as an argument."
        ) from error
    if len(data) > _STDIN_MAX_BYTES:
        raise BadRequest(f"Standard input is longer than {_STDIN_MAX_BYTES >> 20} MiB.", "Give a shorter text.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadRequest(
            f"Standard input is not UTF-8 text (byte {error.start}).", "Pipe in text, not binary data."
        ) from error
