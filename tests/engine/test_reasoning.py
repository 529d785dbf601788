"""Reasoning told apart from the answer, for every format and however the text is cut."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moelocal.engine.reasoning import FORMATS, THINK, Format, Splitter, format_of

ROWS = {row.name: row for row in FORMATS}
HARMONY = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes"


def split(row: Format | None, pieces: list[str], prompt: str = "") -> tuple[str, str]:
    """Reasoning and answer of a whole stream."""
    splitter = Splitter(row, prompt)
    texts = {"reasoning": "", "answer": ""}
    for piece in pieces:
        for kind, text in splitter.feed(piece):
            texts[kind] += text
    for kind, text in splitter.flush():
        texts[kind] += text
    return texts["reasoning"], texts["answer"]


@pytest.mark.parametrize(
    "name, prompt, text, reasoning, answer",
    [
        ("think", "", "<think>\nHm.\n</think>\n\nYes", "Hm.\n", "Yes"),
        ("think", "", "\n\n<think>\n\n</think>\n\nYes", "", "Yes"),
        ("think", "", "Yes", "", "Yes"),
        ("think", "", "<think>Hm.", "Hm.", ""),
        ("think", "...<think>\n", "Hm.\n</think>\n\nYes", "Hm.\n", "Yes"),
        ("think", "...<think>\n", "<think>\nHm.</think>Yes", "Hm.", "Yes"),
        ("think", "...<think></think>", "Yes", "", "Yes"),
        ("think", "...<think>\n\n</think>\n\n", "\n\nYes", "", "Yes"),
        ("think", "", "The tag <think> opens, </think> closes.", "", "The tag <think> opens, </think> closes."),
        ("think", "", "<think>a</think>b <think>c</think>", "a", "b <think>c</think>"),
        ("think", "", "<think>a <think> b</think>c", "a <think> b", "c"),
        ("think", "", "a < b", "", "a < b"),
        ("think", "", "<thin", "", "<thin"),
        ("think", "...<think>", "a </thin", "a </thin", ""),
        ("harmony", "<|start|>assistant", HARMONY, "Hm.", "Yes"),
        ("harmony", "", "<|channel|>final<|message|>Yes", "", "Yes"),
        (
            "harmony",
            "",
            "<|channel|>commentary<|message|>So:<|end|><|start|>assistant<|channel|>commentary to=functions.f "
            "<|constrain|>json<|message|>{}",
            "{}",
            "So:",
        ),
        ("harmony", "", "<|channel|>commentary to=assistant<|channel|>final<|message|>Yes", "", "Yes"),
        ("harmony", "", "<|channel|>analysis<|message|>Hm.<|end|><|start|>assis", "Hm.", ""),
        ("harmony", "", "No channels at all", "", "No channels at all"),
        ("gemma", "<|turn>model\n", "<|channel>thought\nHm.<channel|>Yes", "Hm.", "Yes"),
        ("gemma", "<|channel>thought\n<channel|>", "Yes", "", "Yes"),
        ("gemma", "", "<|channel><|channel>thought\nHm.\n<channel|>Yes", "Hm.\n", "Yes"),
        (
            "recipients",
            "<|start|>assistant",
            " to=self<|message|>Hm.<|eom|><|start|>assistant to=user<|message|>Yes",
            "Hm.",
            "Yes",
        ),
        ("recipients", "<|start|>assistant", "Yes", "", "Yes"),
        ("recipients", "<|start|>assistant", "x" * 300, "", "x" * 300),
        ("solar", "", "<|think|>Hm.<|end|><|begin|>assistant<|content|>Yes", "Hm.", "Yes"),
        (
            "sections",
            '<|open|>message role="assistant"<|sep|><|open|>think<|sep|>',
            "Hm.<|close|>think<|sep|><|open|>response<|sep|>Yes<|close|>response<|sep|><|close|>message<|sep|>",
            "Hm.",
            "Yes",
        ),
        ("sections", "<|open|>response<|sep|>", "Yes<|close|>response<|sep|>", "", "Yes"),
        ("cohere", "<|START_THINKING|>", "Hm.<|END_THINKING|><|START_RESPONSE|>Yes<|END_RESPONSE|>", "Hm.", "Yes"),
        ("cohere", "<|START_THINKING|><|END_THINKING|>", "<|START_TEXT|>Yes<|END_TEXT|>", "", "Yes"),
        ("apertus", "", "<|inner_prefix|>Hm.<|inner_suffix|>Yes", "Hm.", "Yes"),
        ("mistral", "[/INST]", "[THINK]Hm.[/THINK]Yes", "Hm.", "Yes"),
        ("seed", "", "<seed:think>Hm.</seed:think>Yes", "Hm.", "Yes"),
        ("minimax-m3", "", "<mm:think>Hm.</mm:think>Yes", "Hm.", "Yes"),
        ("hunyuan-3", "<think:opensource>", "Hm.</think:opensource>Yes", "Hm.", "Yes"),
        ("hunyuan", "", "<think>\nHm.\n</think>\n<answer>\nYes\n</answer>", "Hm.\n", "Yes\n"),
        ("response", "", "<think>Hm.</think><response>Yes</response>", "Hm.", "Yes"),
        ("response", "", "Yes, in a <response>.", "", "Yes, in a <response>."),
        ("granite-3.2", "", "Here is my thought process: Hm. Here is my response: Yes", " Hm. ", " Yes"),
        ("kimi-vl", "", "◁think▷Hm.◁/think▷Yes", "Hm.", "Yes"),
        ("apriel", "Here are my reasoning steps:\n", "Hm.\n[BEGIN FINAL RESPONSE]\nYes", "Hm.\n", "Yes"),
        (
            "apriel",
            "",
            "Here are my reasoning steps:\nHm.\n[BEGIN FINAL RESPONSE]\nYes\n[END FINAL RESPONSE]",
            "Hm.\n",
            "Yes\n",
        ),
        ("functionary", ">>>", "all\nYes", "", "Yes"),
        ("reka", "", "<reasoning>Hm.</reasoning>Yes", "Hm.", "Yes"),
        ("exaone-deep", "<thought>\n", "Hm.</thought>Yes", "Hm.", "Yes"),
        ("thinking", "", "<thinking>Hm.</thinking>Yes", "Hm.", "Yes"),
    ],
)
def test_formats(name: str, prompt: str, text: str, reasoning: str, answer: str) -> None:
    assert split(ROWS[name], [text], prompt) == (reasoning, answer)
    assert split(ROWS[name], list(text), prompt) == (reasoning, answer)


def test_every_format_has_a_case() -> None:
    (mark,) = vars(test_formats)["pytestmark"]
    assert {case[0] for case in mark.args[1]} == set(ROWS)


@pytest.mark.parametrize(
    "source, name",
    [
        ("<|im_start|>assistant\n<think>\n", "think"),
        ("{% set content = content.split('</think>')[-1] %}", "think"),
        ("nothing about it", "think"),
        ("<|start|>assistant<|channel|>final<|message|>", "harmony"),
        ("<|channel>thought\n<channel|> and <|think|>", "gemma"),
        ("[INST] [THINK] ... <think>", "mistral"),
        ("<think> with <response> of a tool", "think"),
        ("between <think></think> and between <response></response>", "response"),
    ],
)
def test_the_template_decides(source: str, name: str) -> None:
    assert format_of(source).name == name


def test_first_signs_first() -> None:
    for row in FORMATS:
        assert format_of(row.signs[0]).name == ("think" if row.signs[0] == "<think>" else row.name)


def test_only_what_may_be_a_marker_is_held_back() -> None:
    splitter = Splitter(THINK)
    assert splitter.feed("<thi") == []
    assert splitter.feed("nk>\n\nLet me") == [("reasoning", "Let me")]
    assert splitter.feed(" see </") == [("reasoning", " see ")]
    assert splitter.feed("b> ") == [("reasoning", "</b> ")]
    assert splitter.feed("</think>") == []
    assert splitter.feed("\n") == []
    assert splitter.feed("Yes <") == [("answer", "Yes <")]
    assert splitter.flush() == []


def test_without_a_format_everything_is_answer() -> None:
    splitter = Splitter(None, "<think>")
    assert splitter.feed("\n<think>x</think>") == [("answer", "\n<think>x</think>")]
    assert splitter.feed("") == splitter.flush() == []


@st.composite
def streams(draw: st.DrawFn) -> tuple[Format, str, str, list[int]]:
    row = draw(st.sampled_from(FORMATS))
    markers = sorted({marker for marks in row.marks.values() for marker in marks})
    part = st.one_of(
        st.sampled_from(markers), st.sampled_from(markers).map(lambda m: m[:-1]), st.text("<ab|> \n", max_size=6)
    )
    words = [word for word, _ in row.header_words]
    part = st.one_of(part, st.sampled_from(words)) if words else part
    text = "".join(draw(st.lists(part, max_size=12)))
    prompt = draw(st.sampled_from(["", *markers]))
    return row, prompt, text, draw(st.lists(st.integers(0, len(text)), max_size=10))


@given(streams())
def test_cutting_the_text_differently_changes_nothing(stream: tuple[Format, str, str, list[int]]) -> None:
    row, prompt, text, cuts = stream
    edges = [0, *sorted(cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(edges)]
    whole = split(row, [text], prompt)
    assert split(row, pieces, prompt) == whole
    assert split(row, list(text), prompt) == whole


@given(st.text("abc<>/ \n"), st.text("abc<>/ \n"), st.sampled_from(["<think>", ""]))
def test_nothing_is_lost_but_the_markers_and_leading_newlines(thought: str, answer: str, opened: str) -> None:
    text = ("" if opened else "<think>") + thought + "</think>" + answer
    got_thought, got_answer = split(THINK, list(text), opened)
    assert got_thought == thought.lstrip("\n") or thought.isspace()
    assert got_answer == answer.lstrip("\n") or answer.isspace()


@given(st.text("ab<>/|thinkchanel ", max_size=40).filter(lambda text: re.match(r"\s*<", text) is None))
def test_an_answer_without_markers_is_kept_whole(text: str) -> None:
    assert split(THINK, list(text)) == ("", text)
