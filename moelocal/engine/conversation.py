"""A conversation with a loaded model: messages in, reasoning and answer streamed out, and the oldest turns left out
when the context is full."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from moelocal.engine.prompt import Kind, Message, Prompter
from moelocal.engine.sampling import Sampling
from moelocal.engine.session import Session
from moelocal.engine.timings import FinishReason, Timings


class Delta(NamedTuple):
    """A piece of an answer. The last one has timings and finish_reason, and whatever text was left."""

    kind: Kind
    text: str
    token: int | None = None
    timings: Timings | None = None
    finish_reason: FinishReason | None = None


def prompt_tokens(session: Session, prompter: Prompter, messages: Sequence[Message]) -> tuple[str, list[int]]:
    """The rendered prompt and its token ids; the begin token once, whoever puts it there.

    Raises:
        BadTemplate: see `Prompter.render`.
    """
    text = prompter.render(messages)
    return text, session.tokenize(text, add_bos=prompter.add_bos(text))


def fit(
    session: Session, prompter: Prompter, messages: Sequence[Message], n_reserve: int = 256, n_skip: int = 0
) -> tuple[str, list[int], int]:
    """The prompt for `messages` without the oldest turns that the context has no room for.

    A turn is a user message and what follows it; the system message always stays. When turns must go, a quarter of the
    context is freed at once, so that the cache stays useful for the turns to come.

    Args:
        n_reserve: tokens kept free for the answer.
        n_skip: turns that earlier calls already left out.

    Returns:
        The rendered text, its token ids, and how many turns are left out in all. The last turn always stays, even if it
        is too long: `Session.stream` then raises ContextFull.
    """
    system = [message for message in messages[:1] if message.role == "system"]
    starts = [at for at, message in enumerate(messages) if message.role == "user"]
    room = session.n_ctx - min(n_reserve, session.n_ctx // 4)
    skip = min(n_skip, max(0, len(starts) - 1))
    while True:
        kept = list(messages) if skip == 0 else system + list(messages[starts[skip] :])
        text, tokens = prompt_tokens(session, prompter, kept)
        if len(tokens) <= room or skip >= len(starts) - 1:
            return text, tokens, skip
        room = min(room, session.n_ctx * 3 // 4)
        skip += 1


def reply(
    session: Session,
    prompter: Prompter,
    prompt: tuple[str, Sequence[int]],
    sampling: Sampling,
    on_prefill: Callable[[int, int], None] | None = None,
) -> Iterator[Delta]:
    """Streams the answer to a prompt, given as its text and token ids.

    Raises:
        KeyboardInterrupt: Ctrl-C; the session stays usable.
        ContextFull, BadRequest, MoelocalError: see `Session.stream`.
    """
    text, tokens = prompt
    splitter = prompter.splitter(text)
    visible = frozenset(id for marker in prompter.markers if (id := session.control_token(marker)) is not None)
    stop_tokens = frozenset(session.leading_control(prompter.turn_end)) - visible
    for chunk in session.stream(tokens, sampling, visible, on_prefill, stop_tokens):
        pieces = splitter.feed(chunk.text)
        if chunk.finish_reason is not None:
            pieces += splitter.flush()
        token = chunk.token
        for kind, piece in pieces:
            yield Delta(kind, piece, token)
            token = None
        if chunk.finish_reason is not None:
            yield Delta("answer", "", token, chunk.timings, chunk.finish_reason)
        elif not pieces:
            yield Delta("answer", "", token)
