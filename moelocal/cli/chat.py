"""`moelocal chat`: a conversation in the terminal, or line by line through a pipe."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from moelocal.cli import options as opt
from moelocal.cli.messages import dim, error, note, stats_line
from moelocal.errors import BadRequest, ContextFull, MoelocalError

if TYPE_CHECKING:
    from moelocal.cli.chat_commands import Outcome
    from moelocal.cli.chat_state import Answered, Chat
    from moelocal.engine.prompt import Kind

Read = Callable[[str], str]

ChatModel = Annotated[
    str | None,
    typer.Argument(metavar="[MODEL]", help="demo, or the path of a .gguf file. [default: the last one, at first demo]"),
]


def chat(
    generation: opt.Generation,
    placement: opt.Running,
    model: ChatModel = None,
    hide_reasoning: opt.HideReasoning = False,
    verbose: opt.Verbose = False,
) -> None:
    """Talk to a model. /help lists what else it can do."""
    from moelocal.cli.guard import guard
    from moelocal.cli.opening import make_sampling, open_model

    make_sampling(generation, {})  # bad values are told now, not after the load
    guard("The conversation is kept: in the next chat, /load previous")
    from moelocal.cli.chat_file import remember_model
    from moelocal.cli.chat_state import Chat

    reference = model or _last_model()
    opened = open_model(reference, placement, verbose, generation.raw)
    with opened.session as session:
        sampling = make_sampling(generation, session.header.metadata, session)
        if model is not None:
            remember_model(reference)
        chat_loop(
            Chat(session, opened.prompter, reference, sampling, generation.system, hide_reasoning, meter=opened.meter)
        )


def _last_model() -> str:
    """The model of the last chat; the bundled one where there was none, or where its file is gone."""
    from moelocal.cli.chat_file import last_model
    from moelocal.model.store import resolve

    reference = last_model()
    try:
        resolve(reference)
    except MoelocalError:
        note(f"The last model used, {reference}, is gone: this is the demo. Another one: moelocal chat FILE.gguf")
        return "demo"
    if reference != "demo":
        dim(f"Model: {reference}, the last one used.")
    return reference


def chat_loop(chat: Chat) -> None:
    """Reads messages and answers them until the input ends; the conversation is on disk after every turn.

    Raises:
        MoelocalError: what failed, when the input is a pipe; at a terminal it is shown and the chat goes on.
    """
    at_terminal = sys.stdin is not None and sys.stdin.isatty()
    read = _reader(at_terminal)
    if at_terminal:
        dim(f"{chat.model}, {chat.session.n_ctx:,} tokens of context. /help lists the commands, Ctrl-D leaves.")
        if not chat.prompter.has_template and not chat.prompter.raw:
            note("This model has no chat template: it continues your text instead of answering it.")
    draft, kept = "", True
    with _ended_by_signals():
        while True:
            try:
                line, draft = read(draft), ""
                if not line.strip():
                    if chat.cancel_edit():
                        dim("The conversation stays as it was.")
                    continue
                outcome = _handle(chat, line)
                if outcome.then == "exit":
                    return
                draft = outcome.draft
                if outcome.then == "answer":
                    try:
                        _answer(chat, at_terminal)
                    finally:
                        with _uninterrupted():
                            draft = chat.settle()
                            kept = _autosave(chat, complain=kept)
            except EOFError:
                return
            except KeyboardInterrupt:
                if not at_terminal:
                    raise
                with _uninterrupted():
                    draft = chat.settle() or draft
            except MoelocalError as failure:
                if not at_terminal:
                    raise
                with _uninterrupted():
                    error(failure)
                    if draft and chat.attached and isinstance(failure, ContextFull):
                        chat.attached = []
                        note("Your message is back in the prompt without its files: /read them again.")


def _handle(chat: Chat, line: str) -> Outcome:
    """Runs a command, or adds a message to be answered."""
    from moelocal.cli.chat_commands import Outcome, is_command, run_command

    if not is_command(line):
        chat.ask(line.strip("\r\n"))
        return Outcome(then="answer")
    chat.cancel_edit()
    outcome = run_command(chat, line)
    if outcome.say:
        dim(outcome.say)
    if outcome.then == "show":
        _show_last(chat)
    return outcome


def _answer(chat: Chat, at_terminal: bool) -> None:
    """Streams one answer.

    Raises:
        MoelocalError: see `Chat.answer`.
        KeyboardInterrupt: a second Ctrl-C, or any when the input is a pipe.
    """
    from moelocal.cli.opening import LoadingBar
    from moelocal.cli.render import answer_view
    from moelocal.cli.screen import quiet_keys

    if at_terminal:
        print()
    view = answer_view(chat.hide_reasoning)
    with quiet_keys(), LoadingBar("Reading the prompt") as bar:

        def show(kind: Kind, text: str) -> None:
            bar.close()
            view.feed(kind, text)

        try:
            answered = chat.answer(show, lambda done, all: bar.update(done / all))
        except (MoelocalError, KeyboardInterrupt):
            view.finish()
            raise
        view.finish()
    _comment(chat, answered)
    if chat.meter is not None:
        chat.meter.keep()
    if not at_terminal and answered.finish_reason is None:
        raise KeyboardInterrupt
    if answered.empty:
        stays = chat.messages[-1].role == "assistant"
        what = "the one before it stays." if stays else "your message is back in the prompt."
        dim(f"Interrupted before the answer began; {what}")
    elif at_terminal:
        print()


def _comment(chat: Chat, answered: Answered) -> None:
    """What there is to say about an answer: why it ended, how fast it was, what it could not see."""

    if answered.finish_reason == "length":
        full = chat.sampling.max_tokens is None or len(chat.session.cached) + 1 >= chat.session.n_ctx
        dim("(the context is full)" if full else f"(ended at max_tokens, {chat.sampling.max_tokens})")
    if answered.timings is not None:
        dim(stats_line(answered.timings))
    elif not answered.empty:
        dim("(interrupted)")
    if answered.n_left_out:
        turns = "turn is" if answered.n_left_out == 1 else f"{answered.n_left_out} turns are"
        note(
            f"The context of {chat.session.n_ctx:,} tokens is full: the oldest {turns} no longer seen by the model. "
            "/clear begins anew, --ctx gives a longer one."
        )


def _show_last(chat: Chat) -> None:
    """The last turn of a loaded conversation, to find back into it."""
    from moelocal.cli.render import answer_view

    turn = chat.messages[-2:]
    for message in turn:
        if message.role == "user":
            dim(f"> {_gist(message.content)}")
        else:
            view = answer_view()
            view.feed("answer", message.content)
            view.finish()


def _gist(text: str) -> str:
    """The beginning of a message, to recognize it by."""
    first, *more = text.strip().split("\n")
    return f"{first[:200]}{' …' if more or len(first) > 200 else ''}"


def _reader(at_terminal: bool) -> Read:
    """How messages come in: a full prompt on a terminal, plain lines elsewhere."""
    from moelocal.cli.screen import is_dumb

    if at_terminal and sys.stdout.isatty() and not is_dumb():
        from moelocal.cli.chat_input import open_prompt
        from moelocal.paths import user_home

        return open_prompt(user_home() / "history")
    return _read_typed if at_terminal else _read_piped


def _read_typed(draft: str) -> str:
    """A line from a terminal that cannot be edited on; an empty one sends the draft, Ctrl-C drops it."""
    from moelocal.cli.chat_commands import LEAVE_HINT

    if draft:
        dim(f"(Enter sends again: {_gist(draft)})")
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        try:
            return _read_piped(draft).strip() or draft
        except EOFError:
            print(file=sys.stderr)
            raise
        except KeyboardInterrupt:
            print(file=sys.stderr) if draft else print(f"\n{LEAVE_HINT}", file=sys.stderr)
            if draft:
                return ""


def _read_piped(draft: str) -> str:
    """One line of standard input.

    Raises:
        EOFError: there is no more.
        BadRequest: not UTF-8 text.
    """
    try:
        line = sys.stdin.readline() if sys.stdin is not None else ""
    except UnicodeDecodeError as error:
        raise BadRequest("Standard input is not UTF-8 text.", "Pipe in text, one message a line.") from error
    if not line:
        raise EOFError
    return line


def _autosave(chat: Chat, complain: bool) -> bool:
    """Writes the conversation where /load previous of a later chat finds it. Returns whether that worked."""
    from moelocal.cli.chat_commands import snapshot
    from moelocal.cli.chat_file import new_unsaved_path, write_chat

    if not chat.messages:
        return True
    try:
        chat.kept_in = chat.kept_in or new_unsaved_path()
        write_chat(snapshot(chat), chat.kept_in)
    except MoelocalError as failure:
        if complain:
            error(failure)
        return False
    return True


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C does nothing: a key held down must not cut short what keeps the conversation whole."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """A terminal that vanishes, or a request to end, unwinds the chat like an exit: what was said is kept."""

    def end(signum: int, _: FrameType | None) -> None:
        signal.signal(signum, signal.SIG_IGN)
        raise SystemExit(128 + signum)

    before = {signum: signal.signal(signum, end) for signum in _END_SIGNALS}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


_END_SIGNALS = (signal.SIGTERM,) if sys.platform == "win32" else (signal.SIGTERM, signal.SIGHUP)
