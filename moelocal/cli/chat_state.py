"""A chat: its messages, its settings, its figures. Knows the engine, nothing of terminals and files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from moelocal.engine.conversation import Delta, fit, reply
from moelocal.engine.meter import Meter
from moelocal.engine.prompt import Kind, Message, Prompter
from moelocal.engine.sampling import Sampling
from moelocal.engine.session import Session
from moelocal.engine.timings import FinishReason, Timings

_N_RESERVE = 256  # tokens of the context kept free for an answer
_MAX_SEED = 2**32 - 2


@dataclass(frozen=True, slots=True)
class Answered:
    """How an answer ended. `timings` and `finish_reason` are None when it was interrupted.

    `empty`: it was interrupted before it began, so the conversation is as before. `n_left_out`: turns that newly had to
    be left out of the prompt.
    """

    timings: Timings | None
    finish_reason: FinishReason | None
    empty: bool
    n_left_out: int


@dataclass(slots=True)
class Totals:
    """What this run of the program computed so far; seconds and tokens."""

    computed: int = 0
    cached: int = 0
    prompt_s: float = 0.0
    generated: int = 0
    decodes: int = 0
    generate_s: float = 0.0

    def add(self, timings: Timings) -> None:
        """Counts one answer."""
        self.computed += timings.prompt_tokens - timings.cached_tokens
        self.cached += timings.cached_tokens
        self.prompt_s += timings.prompt_s
        self.generated += timings.generated_tokens
        self.decodes += max(0, timings.generated_tokens - 1)
        self.generate_s += timings.generate_s


@dataclass(slots=True)
class _Growing:
    """An answer that is being made; `at` is its place in the conversation."""

    at: int
    answer: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    complete: bool = False

    def begun(self) -> bool:
        return self.complete or any(self.answer) or any(self.reasoning)


Turns = tuple[list[Message], set[int]]  # messages, and the indices of interrupted ones in the whole conversation


@dataclass(slots=True)
class Chat:
    """One conversation with one open model. `interrupted` holds the indices of answers that Ctrl-C cut short."""

    session: Session
    prompter: Prompter
    model: str
    sampling: Sampling
    system: str | None = None
    hide_reasoning: bool = False
    messages: list[Message] = field(default_factory=list)
    interrupted: set[int] = field(default_factory=set)
    attached: list[str] = field(default_factory=list)
    n_left_out: int = 0
    totals: Totals = field(default_factory=Totals)
    meter: Meter | None = None
    saved_as: tuple[Path, int] | None = None  # the file that has this conversation under a name, and when written
    kept_in: Path | None = None  # the file that has what is not under a name yet
    initial: Sampling = field(init=False)
    _typed: str | None = None  # the last message without its files, until it or any other is removed
    _sent: list[str] = field(default_factory=list)  # its files
    _editing: bool = False  # the next message replaces the last turn
    _replaced: Turns | None = None  # that turn, until the new one has an answer
    _growing: _Growing | None = None
    _n_regens: int = 0

    def __post_init__(self) -> None:
        self.initial = self.sampling

    def ask(self, text: str) -> None:
        """Adds a message of the user, after the files attached to it. After `edit` it replaces the last turn."""
        self._replaced, self._editing = self._drop_turn() if self._editing else None, False
        self._typed, self._sent, self.attached = text, self.attached, []
        self.messages.append(Message("user", "\n\n".join([*self._sent, text])))
        self._n_regens = 0

    def answer(
        self, show: Callable[[Kind, str], None], on_prefill: Callable[[int, int], None] | None = None
    ) -> Answered:
        """Lets the model answer the last message of the user; an answer that it has already is replaced as soon as the
        new one has begun. What was generated stays in the conversation, however it ended.

        Raises:
            MoelocalError: see `reply`.
            KeyboardInterrupt: a second Ctrl-C; one alone ends the answer. After either, call `settle`.
        """
        at = len(self.messages) - (self.messages[-1].role == "assistant")
        self._growing = growing = _Growing(at)
        parts: dict[Kind, list[str]] = {"answer": growing.answer, "reasoning": growing.reasoning}
        last: Delta | None = None
        before = self.n_left_out
        try:
            text, tokens, self.n_left_out = fit(
                self.session, self.prompter, self._with_system(at), _N_RESERVE, self.n_left_out
            )
            deltas = reply(self.session, self.prompter, (text, tokens), self._sampling_now(), on_prefill)
            for last in deltas if self.meter is None else self.meter.watch(deltas):
                parts[last.kind].append(last.text)
                growing.complete = last.finish_reason is not None
                show(last.kind, last.text)
        except KeyboardInterrupt:
            pass
        finally:
            self._keep()
        timings = last.timings if last is not None else None
        if timings is not None:
            self.totals.add(timings)
        finish_reason = last.finish_reason if last is not None else None
        return Answered(timings, finish_reason, not growing.begun(), self.n_left_out - before)

    def settle(self) -> str:
        """Makes the conversation whole, wherever Ctrl-C or an error struck: what was generated is in it, a message
        without any answer is not, the turn that it was to replace is. Returns that message as it was typed; its files
        wait for the next one."""
        self._keep()
        if not self.messages or self.messages[-1].role != "user":
            return ""
        content, typed, sent = self.messages[-1].content, self._typed, self._sent
        self._truncate(len(self.messages) - 1)
        if self._replaced is not None:
            self.messages += self._replaced[0]
            self.interrupted |= self._replaced[1]
            self._replaced, self._editing = None, True
        if typed is None:
            return content
        self.attached = [*sent, *self.attached]
        return typed

    def again(self) -> bool:
        """Makes `answer` give another answer to the last message. False when there is nothing to answer."""
        self._n_regens += 1
        return bool(self.messages)

    def edit(self) -> str | None:
        """The last message, which the next one replaces together with its answer; None when there is none."""
        self._editing = bool(self.messages)
        return self.messages[self._last_question()].content if self.messages else None

    def cancel_edit(self) -> bool:
        """The next message replaces nothing. False when it would not have."""
        was, self._editing = self._editing, False
        return was

    def clear(self) -> None:
        """Begins anew; system message and settings stay."""
        self._truncate(0)
        self.attached = []
        self.saved_as = self.kept_in = None
        self._editing = False

    def n_turns(self) -> int:
        """Messages of the user."""
        return sum(message.role == "user" for message in self.messages)

    def _keep(self) -> None:
        """Puts the answer as far as it came into the conversation. Interrupted itself, it can be called again."""
        growing = self._growing
        if growing is not None and growing.begun():
            at = growing.at
            message = Message("assistant", "".join(growing.answer), "".join(growing.reasoning))
            self.interrupted = {one for one in self.interrupted if one < at} | (set() if growing.complete else {at})
            self.messages[at:] = [message]
            self._replaced = None
        self._growing = None

    def _last_question(self) -> int:
        return max(at for at, message in enumerate(self.messages) if message.role == "user")

    def _drop_turn(self) -> Turns:
        at = self._last_question()
        turn = self.messages[at:], {one for one in self.interrupted if one >= at}
        self._truncate(at)
        return turn

    def _truncate(self, n: int) -> None:
        self._typed, self._sent = None, []
        del self.messages[n:]
        self.interrupted = {at for at in self.interrupted if at < n}
        self.n_left_out = min(self.n_left_out, max(0, self.n_turns() - 1))

    def _with_system(self, n: int) -> list[Message]:
        return [*([] if self.system is None else [Message("system", self.system)]), *self.messages[:n]]

    def _sampling_now(self) -> Sampling:
        """A fixed seed moves on with each repetition of an answer, else it would come out the same."""
        if self.sampling.seed is None or not self._n_regens:
            return self.sampling
        return replace(self.sampling, seed=(self.sampling.seed + self._n_regens) % (_MAX_SEED + 1))
