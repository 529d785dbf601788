"""A session and a prompter without a model: answers are scripted, tokens are words."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from moelocal.cli.chat_state import Chat
from moelocal.engine.prompt import Kind, Message
from moelocal.engine.sampling import Sampling
from moelocal.engine.timings import Chunk, Timings
from moelocal.errors import BadRequest, ContextFull

Script = Sequence[str | BaseException]


class FakeSession:
    """Answers with the next script: its texts are tokens, an exception in it is raised there."""

    load_s = 0.5
    residency = None

    def __init__(self, *scripts: Script, n_ctx: int = 1000) -> None:
        self.scripts = list(scripts)
        self.n_ctx = n_ctx
        self.cached: list[int] = []
        self.prompts: list[str] = []
        self.samplings: list[Sampling] = []
        self._words: list[str] = []

    def tokenize(self, text: str, special: bool = True, add_bos: bool = False) -> list[int]:
        tokens = []
        for word in text.split():
            if word not in self._words:
                self._words.append(word)
            tokens.append(self._words.index(word))
        return tokens

    def check(self, sampling: Sampling) -> None:
        if sampling.grammar == "bad":
            raise BadRequest("The grammar cannot be parsed.", "Write it otherwise.")

    def leading_control(self, text: str) -> list[int]:
        return []

    def control_token(self, text: str) -> int | None:
        return None

    def stream(
        self,
        tokens: Sequence[int],
        sampling: Sampling,
        visible: frozenset[int] = frozenset(),
        on_prefill: Callable[[int, int], None] | None = None,
        stop_tokens: frozenset[int] = frozenset(),
    ) -> Iterator[Chunk]:
        if len(tokens) >= self.n_ctx:
            raise ContextFull(f"The prompt has {len(tokens)} tokens.", len(tokens), self.n_ctx, "Use --ctx.")
        self.prompts.append(" ".join(self._words[token] for token in tokens))
        self.samplings.append(sampling)
        n_cached = min(len(self.cached), len(tokens) - 1)
        self.cached = list(tokens)
        if on_prefill is not None:
            on_prefill(len(tokens), len(tokens))
        script = self.scripts.pop(0)
        for n, piece in enumerate(script):
            if isinstance(piece, BaseException):
                raise piece
            self.cached.append(n)
            yield Chunk(piece, n)
        timings = Timings(self.load_s, len(tokens), n_cached, 0.1, 0.2, len(script), 0.5)
        yield Chunk("", None, timings, "stop" if len(script) != sampling.max_tokens else "length")

    def save_state(self, path: Path) -> int:
        path.write_text(json.dumps(self.cached))
        return path.stat().st_size

    def load_state(self, path: Path) -> int:
        try:
            self.cached = json.loads(path.read_text())
        except ValueError:
            self.cached = []
        return len(self.cached)


class FakeSplitter:
    """Text after <think> is reasoning, after </think> the answer."""

    def __init__(self) -> None:
        self._kind: Kind = "answer"

    def feed(self, text: str) -> list[tuple[Kind, str]]:
        if text in ("<think>", "</think>"):
            self._kind = "reasoning" if text == "<think>" else "answer"
            return []
        return [(self._kind, text)]

    def flush(self) -> list[tuple[Kind, str]]:
        return []


class FakePrompter:
    """`role: content`, one message a line."""

    markers = ()
    has_template = True
    raw = False

    def render(self, messages: Sequence[Message]) -> str:
        return "\n".join(f"{message.role}: {message.content}" for message in messages)

    def turn_end(self) -> str:
        return ""

    def add_bos(self, text: str) -> bool:
        return False

    def splitter(self, prompt: str) -> FakeSplitter:
        return FakeSplitter()


def make_chat(*scripts: Script, n_ctx: int = 1000, **settings: Any) -> tuple[Chat, FakeSession]:
    """A chat whose answers are scripted, and its session."""
    session = FakeSession(*scripts, n_ctx=n_ctx)
    sampling = settings.pop("sampling", Sampling())
    return Chat(cast(Any, session), cast(Any, FakePrompter()), "fake", sampling, **settings), session
