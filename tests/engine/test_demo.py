"""The bundled demo answers what it was trained on. A wrong tokenizer, rope or expert order shows here at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moelocal.engine.conversation import prompt_tokens, reply
from moelocal.engine.prompt import Message, make_prompter
from moelocal.engine.sampling import with_advice
from scripts.demo_questions import closed_questions
from tests.conftest import DEMO


def test_forty_questions_in_one_session(open_session: Callable[..., Any]) -> None:
    session = open_session(DEMO)
    prompter = make_prompter(session.header.metadata, False, session.token_text)
    sampling = with_advice({}, session.header.metadata)
    assert sampling.temperature == 0.0, "the demo asks to be sampled greedily"
    wrong = []
    for question, expected in closed_questions(40):
        prompt = prompt_tokens(session, prompter, [Message("user", question)])
        got = "".join(delta.text for delta in reply(session, prompter, prompt, sampling))
        if got != expected:
            wrong.append((question, got))
    assert len(wrong) <= 2, wrong


def test_it_says_that_it_is_a_toy(open_session: Callable[..., Any]) -> None:
    metadata = open_session(DEMO).header.metadata
    assert "toy" in metadata["general.name"] and "toy" in metadata["general.description"]
    assert DEMO.stat().st_size <= 16 << 20
