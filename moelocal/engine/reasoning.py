"""Reasoning told apart from the answer, in text that arrives piece by piece.

Models that think mark it in their text. Each way to do so is a row of `FORMATS`: markers, and the state each leads to.
A `Splitter` walks those states; it holds back only what may still turn out to be a marker.

There are two kinds of rows. Tags, `<think>...</think>` and its relatives, come first in a reply or not at all: once the
answer has begun, a tag in it is prose. Channels, `<|channel|>final<|message|>` and its relatives, may change at any
time: their markers are control tokens, which no prose contains.

Source: the templates and parsers of llama.cpp (models/templates, common/parsers) and the model cards.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

Kind = Literal["answer", "reasoning"]

# lead       nothing but white space so far; text begins the answer
# opened     the same, but text begins the reasoning, because the prompt has opened it
# reasoning  text goes out as such
# answer     text goes out as such; wrapped: the same, up to a closing marker
# header     text names the channel that follows, and is dropped
# body       (as a target only) reasoning or answer, by the words of the header
State = Literal["lead", "opened", "reasoning", "answer", "wrapped", "header", "body"]

_BEGINS: Mapping[State, State] = {"lead": "answer", "opened": "reasoning"}
_STATES: tuple[State, ...] = ("lead", "opened", "reasoning", "answer", "wrapped", "header")
_NO_MARKS: Mapping[State, Mapping[str, State]] = {state: {} for state in _STATES}
_MAX_HEADER_CHARS = 200  # longer, and it is the answer of a model that ignores its format


class Format(NamedTuple):
    """One way to mark reasoning.

    `signs`: any of these in the source of a chat template chooses this format. `start`: the state a reply begins in,
    unless the prompt ends with a marker. `marks`: for each state, what is looked for, and the state after it.
    `tokens`: texts of the control tokens among the markers. `header_words`: the first that occurs in a header decides
    what its body is; without any, it is the answer.
    """

    name: str
    signs: tuple[str, ...]
    start: State
    marks: Mapping[State, Mapping[str, State]]
    tokens: tuple[str, ...]
    header_words: tuple[tuple[str, Kind], ...] = ()

    def state_after(self, prompt: str) -> State:
        """The state a reply to `prompt` begins in: templates may leave the reasoning open, or have closed it."""
        end = prompt.rstrip()
        targets = {marker: target for marks in self.marks.values() for marker, target in marks.items()}
        for marker in sorted(targets, key=len, reverse=True):
            if end.endswith(marker):
                return "opened" if targets[marker] == "reasoning" else "lead"
        return self.start


def _tags(name: str, opening: str, closing: str, *signs: str, answer: Mapping[str, str] | None = None) -> Format:
    """Tags around the reasoning, and perhaps others around the `answer`: opening to closing."""
    wraps = answer or {}
    marks = dict(_NO_MARKS)
    marks["lead"] = {opening: "reasoning", **dict.fromkeys(wraps, "wrapped")}
    marks["opened"] = {opening: "reasoning", closing: "lead"}
    marks["reasoning"] = {closing: "lead"}
    marks["wrapped"] = dict.fromkeys(wraps.values(), "answer")
    tokens = (opening, closing, *wraps.keys(), *wraps.values())
    return Format(name, signs or (opening, closing), "lead", marks, tokens)


def _channels(
    name: str,
    sign: str,
    marks: Mapping[str, State],
    start: State = "lead",
    tokens: tuple[str, ...] = (),
    header_words: tuple[tuple[str, Kind], ...] = (),
) -> Format:
    """Markers that mean the same wherever they occur."""
    return Format(name, (sign,), start, dict.fromkeys(_STATES, marks), tokens or tuple(marks), header_words)


THINK = _tags("think", "<think>", "</think>")

# The first row with a sign in the template is its format. Templates without any sign get the last row: many models
# think although their template does not mention it, and hardly an answer begins with <think> otherwise.
FORMATS: tuple[Format, ...] = (
    _channels(  # Gemma 4; an empty <|channel> may precede the thought
        "gemma",
        "<|channel>",
        {"<|channel>thought": "reasoning", "<|channel>": "lead", "<channel|>": "lead"},
        tokens=("<|channel>", "<channel|>"),
    ),
    _channels(  # gpt-oss; its tool calls (to=...) are no answer, its other commentary is
        "harmony",
        "<|channel|>",
        {
            "<|channel|>": "header",
            "<|start|>": "header",
            "<|constrain|>": "header",
            "<|message|>": "body",
            "<|end|>": "header",
        },
        header_words=(
            ("to=functions", "reasoning"),
            ("analysis", "reasoning"),
            ("final", "answer"),
            ("to=", "reasoning"),
        ),
    ),
    _channels(  # messages to=self and to=user
        "recipients",
        "to=self<|message|>",
        {"<|start|>": "header", "<|message|>": "body", "<|eom|>": "header"},
        start="header",
        header_words=(("to=self", "reasoning"), ("to=user", "answer"), ("to=", "reasoning")),
    ),
    _channels(  # Solar Open
        "solar",
        "assistant<|think|>",
        {"<|begin|>": "header", "<|think|>": "reasoning", "<|content|>": "answer", "<|end|>": "header"},
    ),
    _channels(  # Kimi K3
        "sections",
        "<|open|>",
        {
            "<|open|>think<|sep|>": "reasoning",
            "<|close|>think<|sep|>": "lead",
            "<|open|>response<|sep|>": "lead",
            "<|close|>response<|sep|>": "answer",
            "<|close|>message<|sep|>": "answer",
        },
        tokens=("<|open|>", "<|close|>", "<|sep|>"),
    ),
    _tags(  # Command R7B, Command A
        "cohere",
        "<|START_THINKING|>",
        "<|END_THINKING|>",
        answer={"<|START_RESPONSE|>": "<|END_RESPONSE|>", "<|START_TEXT|>": "<|END_TEXT|>"},
    ),
    _tags("apertus", "<|inner_prefix|>", "<|inner_suffix|>"),
    _tags("mistral", "[THINK]", "[/THINK]"),
    _tags("seed", "<seed:think>", "</seed:think>"),
    _tags("minimax-m3", "<mm:think>", "</mm:think>"),
    _tags("hunyuan-3", "<think:opensource>", "</think:opensource>", "'<think{}>'"),
    _tags("hunyuan", "<think>", "</think>", "<answer>", answer={"<answer>": "</answer>"}),
    _tags(  # Granite 3.3, ERNIE 4.5; elsewhere <response> wraps what a tool returned
        "response",
        "<think>",
        "</think>",
        "<response></response>",
        "</think>\\n<response>",
        "</think>\\n\\n<response>",
        answer={"<response>": "</response>"},
    ),
    _tags("granite-3.2", "Here is my thought process:", "Here is my response:"),
    _tags("kimi-vl", "◁think▷", "◁/think▷"),
    Format(  # Apriel thinks first, always; its prompt or its reply begins with the sentence
        "apriel",
        ("[BEGIN FINAL RESPONSE]",),
        "opened",
        {
            **_NO_MARKS,
            "opened": {"Here are my reasoning steps:": "reasoning", "[BEGIN FINAL RESPONSE]": "wrapped"},
            "reasoning": {"[BEGIN FINAL RESPONSE]": "wrapped"},
            "wrapped": {"[END FINAL RESPONSE]": "answer"},
        },
        ("[BEGIN FINAL RESPONSE]", "[END FINAL RESPONSE]"),
    ),
    Format(  # Functionary 3.2 names the recipient first
        "functionary", (">>>all",), "lead", {**_NO_MARKS, "lead": {"all\n": "answer"}}, ()
    ),
    _tags("reka", "<reasoning>", "</reasoning>"),
    _tags("exaone-deep", "<thought>", "</thought>"),
    _tags("thinking", "<thinking>", "</thinking>"),
    THINK,  # Qwen3, DeepSeek, GLM, MiniMax, Kimi K2, Nemotron, SmolLM3, LFM2.5, Step, Ling, Hermes, and most others
)


def format_of(source: str) -> Format:
    """The format that a chat template's source speaks of."""
    return next((row for row in FORMATS if any(sign in source for sign in row.signs)), THINK)


class Splitter:
    """Tells reasoning from answer in streamed text. feed() returns the pieces that are certain; flush() the rest.

    Markers are dropped, and so are the newlines that follow one or begin the reply. Pieces joined by kind do not depend
    on how the text was cut. With no format, everything is answer, and nothing is dropped.
    """

    def __init__(self, row: Format | None, prompt: str = "") -> None:
        self._row = row
        self._state: State = row.state_after(prompt) if row else "answer"
        self._held = ""
        self._header = ""
        self._marked = False  # a marker has been seen
        self._fresh = row is not None  # newlines are dropped until other text comes

    def feed(self, text: str) -> list[tuple[Kind, str]]:
        """Takes the next piece of the text."""
        self._held += text
        return self._walk(final=False)

    def flush(self) -> list[tuple[Kind, str]]:
        """The text has ended: what was held back is no marker."""
        pieces = self._walk(final=True)
        if self._state == "header" and not self._marked and self._header:
            pieces.append(("answer", self._header))  # a model that ignores its format
        self._header = ""
        return pieces

    def _walk(self, final: bool) -> list[tuple[Kind, str]]:
        pieces: list[tuple[Kind, str]] = []
        while self._held:
            marks = self._row.marks[self._state] if self._row else {}
            if self._state in _BEGINS:
                text = self._held.lstrip()
                index, marker = _find(text, marks, final)
                if index > 0 or (final and marker is None):
                    self._state = _BEGINS[self._state]
                    continue
            else:
                text = self._held
                index, marker = _find(text, marks, final)
                self._emit(text[:index], pieces)
                self._held = text[index:]
            if marker is None:
                break
            self._held = text[index + len(marker) :]
            self._enter(marks[marker])
        return pieces

    def _enter(self, state: State) -> None:
        self._marked = True
        if state == "body":
            words = self._row.header_words if self._row else ()
            state = next((kind for word, kind in words if word in self._header), "answer")
        if state != "header" or self._state != "header":
            self._header = ""
        self._state = state
        self._fresh = True

    def _emit(self, text: str, pieces: list[tuple[Kind, str]]) -> None:
        if self._state == "header":
            self._header += text
            if len(self._header) <= _MAX_HEADER_CHARS:
                return
            text, self._header, self._state = self._header, "", "answer"
        if self._fresh:
            text = text.lstrip("\r\n")
        if text:
            self._fresh = False
            pieces.append(("reasoning" if self._state == "reasoning" else "answer", text))


def _find(text: str, marks: Mapping[str, State], final: bool) -> tuple[int, str | None]:
    """Where the first marker begins, or (None) what may become one unless the text is final; or the end of the text."""
    longest = max(map(len, marks), default=0)
    for index in range(len(text)) if marks else ():
        rest = text[index : index + longest]
        if not final and any(marker.startswith(rest) and marker != rest for marker in marks):
            return index, None
        found = max((marker for marker in marks if rest.startswith(marker)), key=len, default=None)
        if found is not None:
            return index, found
    return len(text), None
