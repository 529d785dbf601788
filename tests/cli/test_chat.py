"""The chat: commands, files, the loop over a pipe, the prompt. The model is scripted; the engine has its own tests."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from moelocal.cli import chat as chat_module
from moelocal.cli import chat_file, chat_state
from moelocal.cli.answer import PlainView
from moelocal.cli.chat import chat_loop
from moelocal.cli.chat_commands import COMMANDS, is_command, run_command, setting_names, snapshot
from moelocal.cli.chat_input import Words, open_prompt
from moelocal.cli.chat_state import Answered, Chat
from moelocal.cli.opening import LoadingBar
from moelocal.engine.prompt import Message
from moelocal.engine.sampling import Sampling
from moelocal.errors import BadRequest, ContextFull, MoelocalError, OutOfMemory
from moelocal.paths import user_home, user_path
from tests.cli.fakes import Script, make_chat


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    monkeypatch.setenv("MOELOCAL_HOME", str(folder))
    return folder


def turn(chat: Chat, text: str) -> Answered:
    chat.ask(text)
    return chat.answer(lambda kind, piece: None)


def contents(chat: Chat) -> list[str]:
    return [message.content for message in chat.messages]


# -- the conversation


def test_messages_and_reasoning_are_kept() -> None:
    chat, session = make_chat(["<think>", "hm", "</think>", "Yes", "."], ["No."], system="Be brief.")
    shown: list[tuple[str, str]] = []
    chat.ask("Really?")
    answered = chat.answer(lambda kind, text: shown.append((kind, text)))
    assert [pair for pair in shown if pair[1]] == [("reasoning", "hm"), ("answer", "Yes"), ("answer", ".")]
    assert chat.messages == [Message("user", "Really?"), Message("assistant", "Yes.", "hm")]
    assert answered.finish_reason == "stop" and not answered.empty
    turn(chat, "Sure?")
    assert session.prompts[1] == "system: Be brief. user: Really? assistant: Yes. user: Sure?"
    assert (chat.totals.generated, chat.totals.decodes, chat.totals.generate_s) == (6, 4, 1.0)


def test_an_interrupted_answer_stays_and_the_chat_goes_on() -> None:
    chat, _ = make_chat(["Half", " an", KeyboardInterrupt()], ["Whole."])
    answered = turn(chat, "Tell me")
    assert (answered.timings, answered.finish_reason, answered.empty) == (None, None, False)
    assert contents(chat) == ["Tell me", "Half an"] and chat.interrupted == {1}
    turn(chat, "Go on")
    assert contents(chat)[-1] == "Whole." and chat.interrupted == {1}
    chat.clear()
    assert chat.interrupted == set()


def test_an_answer_interrupted_before_it_began_gives_the_message_back() -> None:
    chat, _ = make_chat([KeyboardInterrupt()])
    chat.attached = ["a file"]
    assert turn(chat, "Tell me").empty
    assert chat.settle() == "Tell me"
    assert (chat.messages, chat.attached) == ([], ["a file"])
    assert chat.settle() == ""


def test_what_was_said_survives_any_error() -> None:
    chat, _ = make_chat(["Half", OSError(errno.EIO, "gone")])
    with pytest.raises(OSError):
        turn(chat, "Tell me")
    assert contents(chat) == ["Tell me", "Half"] and chat.interrupted == {1}


def test_a_second_ctrl_c_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    chat, _ = make_chat(["Half", " an", KeyboardInterrupt()])
    chat.ask("Tell me")
    made: list[Any] = []

    def interrupted_once(*args: Any) -> Message:
        made.append(args)
        if len(made) == 1:
            raise KeyboardInterrupt
        return Message(*args)

    monkeypatch.setattr(chat_state, "Message", interrupted_once)
    with pytest.raises(KeyboardInterrupt):
        chat.answer(lambda kind, text: None)
    assert contents(chat) == ["Tell me"]
    assert chat.settle() == ""
    assert contents(chat) == ["Tell me", "Half an"] and chat.interrupted == {1}


def test_oldest_turns_are_left_out_and_counted() -> None:
    chat, session = make_chat(*[["ok " * 20]] * 12, n_ctx=100)
    left_out = [turn(chat, f"question{n} " + "word " * 10).n_left_out for n in range(12)]
    assert left_out[0] == 0 and sum(left_out) == chat.n_left_out > 5
    assert "question0" not in session.prompts[-1] and "question11" in session.prompts[-1]
    chat.clear()
    assert chat.n_left_out == 0


def test_regen_answers_again_with_another_seed() -> None:
    chat, session = make_chat(["one"], ["two"], ["three"], ["four"], sampling=Sampling(seed=7))
    turn(chat, "Say")
    for _ in range(2):
        assert run_command(chat, "/regen").then == "answer"
        chat.answer(lambda kind, text: None)
    assert contents(chat) == ["Say", "three"]
    turn(chat, "More")
    assert [sampling.seed for sampling in session.samplings] == [7, 8, 9, 7]


def test_regen_keeps_the_old_answer_until_the_new_one_has_begun() -> None:
    chat, session = make_chat(["old", KeyboardInterrupt()], [KeyboardInterrupt()], ["new", "er"])
    turn(chat, "Say")
    run_command(chat, "/regen")
    assert chat.answer(lambda kind, text: None).empty
    assert chat.settle() == "" and contents(chat) == ["Say", "old"] and chat.interrupted == {1}
    run_command(chat, "/regen")
    seen: list[list[str]] = []
    chat.answer(lambda kind, text: seen.append(contents(chat)))
    assert session.prompts[1:] == ["user: Say", "user: Say"]
    assert seen[0] == ["Say", "old"] and contents(chat) == ["Say", "newer"] and chat.interrupted == set()


def test_a_message_that_was_not_typed_just_now_comes_back_as_it_is() -> None:
    chat, _ = make_chat(["one"], [KeyboardInterrupt()])
    turn(chat, "first")
    turn(chat, "second")
    assert chat.settle() == "second"
    chat.messages = [Message("user", "of a file")]
    assert chat.settle() == "of a file" and chat.messages == []


# -- commands


def test_edit_replaces_the_last_turn_by_the_next_message() -> None:
    chat, session = make_chat(["one"], ["two"], ["three"], ["four"])
    turn(chat, "first")
    turn(chat, "second\nline")
    outcome = run_command(chat, "/edit")
    assert (outcome.then, outcome.draft) == ("prompt", "second\nline")
    assert contents(chat) == ["first", "one", "second\nline", "two"]
    turn(chat, "other")
    assert contents(chat) == ["first", "one", "other", "three"]
    assert session.prompts[-1] == "user: first assistant: one user: other"
    turn(chat, "more")
    assert contents(chat)[-3:] == ["three", "more", "four"]


def test_an_edit_without_an_answer_changes_nothing() -> None:
    chat, _ = make_chat(["one"], ["Half", KeyboardInterrupt()], [KeyboardInterrupt()], ["three"])
    turn(chat, "first")
    turn(chat, "second")
    before = snapshot(chat)
    run_command(chat, "/edit")
    assert turn(chat, "other").empty
    assert chat.settle() == "other" and snapshot(chat) == before and chat.interrupted == {3}
    turn(chat, "another")
    assert contents(chat) == ["first", "one", "another", "three"] and chat.interrupted == set()


@pytest.mark.parametrize("keys", ["\x03", "/stats\n"])
def test_an_edit_given_up_leaves_the_conversation_as_it_was(keys: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chat, _ = make_chat(["one"], ["two"])
    lines = iter(["first", "/edit", "" if keys == "\x03" else "/stats", "second"])

    def read(draft: str) -> str:
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr(chat_module, "_reader", lambda at_terminal: read)
    chat_loop(chat)
    assert contents(chat) == ["first", "one", "second", "two"]


@pytest.mark.parametrize("command", ["/regen", "/edit"])
def test_nothing_to_do_again(command: str) -> None:
    with pytest.raises(BadRequest, match="no message"):
        run_command(make_chat()[0], command)


def test_system_message_is_set_shown_and_removed() -> None:
    chat, session = make_chat(["ok"])
    assert "no system message" in run_command(chat, "/system").say
    run_command(chat, "/system Answer\nin verse.")
    assert chat.system == "Answer\nin verse."
    assert "in verse" in run_command(chat, "/system").say
    turn(chat, "Hi")
    assert session.prompts[0].startswith("system: Answer in verse. user: Hi")
    run_command(chat, "/system off")
    assert chat.system is None


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("/set temperature 0.2", "temperature", 0.2),
        ("/set temp 0", "temperature", 0.0),
        ("/set top-k 7", "top_k", 7),
        ("/set seed 42", "seed", 42),
        ("/set seed none", "seed", None),
        ("/set max_tokens = 9", "max_tokens", 9),
        ("/set max_tokens off", "max_tokens", None),
        (r"/set stop \nUser:", "stop", ("\nUser:",)),
        ("/set stop off", "stop", ()),
        ("/set repeat_penalty 1.1", "repeat_penalty", 1.1),
        ("/set min_p 1", "min_p", 1.0),
        ("/set ignore_eos on", "ignore_eos", True),
    ],
)
def test_set(line: str, name: str, value: Any) -> None:
    chat, _ = make_chat()
    assert run_command(chat, line).say.startswith(name)
    assert getattr(chat.sampling, name) == value and type(getattr(chat.sampling, name)) is type(value)


def test_set_goes_back_to_how_the_chat_began() -> None:
    chat, _ = make_chat(sampling=Sampling(temperature=0.3))
    run_command(chat, "/set temperature 2")
    run_command(chat, "/set temperature default")
    assert chat.sampling.temperature == 0.3


def test_set_shows_everything_and_hides_reasoning() -> None:
    chat, _ = make_chat()
    run_command(chat, "/set hide_reasoning on")
    assert chat.hide_reasoning
    said = run_command(chat, "/set").say
    assert [line.split()[0] for line in said.split("\n")] == setting_names()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/set temperature hot", "temperature takes a number, not 'hot'."),
        ("/set top_k 1.5", "top_k takes a whole number, not '1.5'."),
        ("/set top_p 2", "top-p must be between 0 and 1, not 2."),
        ("/set temperature nan", "temperature must be between 0 and 100, not nan."),
        ("/set top 3", "top could be several settings."),
        ("/set colour red", "There is no setting colour."),
        ("/set hide_reasoning maybe", "hide_reasoning is on or off, not 'maybe'."),
        ("/set grammar missing.gbnf", "missing.gbnf cannot be read: No such file or directory."),
        ("/sett", "There is no command /sett."),
        ("/exit now", "/exit takes nothing after it."),
        ("/read", "Which file?"),
        ("/read ~nosuchuser/x", "'~nosuchuser/x' cannot be a path: the home folder ~nosuchuser is unknown."),
        ("/save ~nosuchuser/x", "'~nosuchuser/x' cannot be a path: the home folder ~nosuchuser is unknown."),
        ("/load ~nosuchuser/x", "'~nosuchuser/x' cannot be a path: the home folder ~nosuchuser is unknown."),
        ("/set grammar ~nosuchuser/x", "'~nosuchuser/x' cannot be a path: the home folder ~nosuchuser is unknown."),
        ("/read a\0b", r"'a\x00b' cannot be a path: it contains a NUL character."),
        ("/set grammar a\0b", r"'a\x00b' cannot be a path: it contains a NUL character."),
        ("/save previous", "previous is what an earlier chat is called."),
        ("/save Previous-3!", "Previous-3 is what an earlier chat is called."),
    ],
)
def test_mistakes_are_told_and_change_nothing(line: str, message: str) -> None:
    chat, _ = make_chat()
    with pytest.raises(BadRequest) as caught:
        run_command(chat, line)
    assert caught.value.message == message and caught.value.hint
    assert chat.sampling == Sampling()


def test_a_grammar_that_cannot_be_parsed_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "g").write_text("bad")
    chat, _ = make_chat()
    with pytest.raises(BadRequest, match="cannot be parsed"):
        run_command(chat, f"/set grammar {tmp_path}/g")
    assert chat.sampling.grammar == ""


def test_messages_that_only_look_like_commands() -> None:
    assert is_command("/help") and is_command("/nonsense") and is_command("/set temp 1")
    assert not any(is_command(text) for text in ["/usr/bin/env fails", " /help", "a /help", "/* comment */", "//"])


def test_help_names_every_command() -> None:
    said = run_command(make_chat()[0], "/help").say
    assert all(name in said for name in COMMANDS)


def test_stats() -> None:
    chat, session = make_chat(["one", "two"], n_ctx=1000)
    assert "context  0 of 1,000 tokens (0%)" in run_command(chat, "/stats").say
    turn(chat, "three words here")
    said = run_command(chat, "/stats").say
    assert f"context  {len(session.cached)} of 1,000" in said
    assert "decode   2 tokens, 2.0/s" in said and "prefill  4 tokens, 40.0/s" in said


def test_read_puts_a_file_into_the_next_message(tmp_path: Path) -> None:
    file = tmp_path / "some code.py"
    file.write_text("print('```')\n")
    chat, _ = make_chat(["ok"], ["ok"])
    assert "some code.py (" in run_command(chat, f"/read '{file}'").say
    turn(chat, "Review it")
    assert chat.messages[0].content == "some code.py:\n````py\nprint('```')\n````\n\nReview it"
    turn(chat, "Thanks")
    assert chat.messages[2].content == "Thanks"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"GGUF\0\0", "is not a text file"),
        (b"caf\xe9", "is not UTF-8 text (byte 3)"),
        (b" \n", "is empty"),
        (b"x " * 2000, "has 2,0"),
        (b"x" * (5 << 20), "is larger than 4.0 MiB"),
        (None, "cannot be read: Is a directory"),
    ],
)
def test_read_refuses_what_is_not_text(data: bytes | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.mkdir() if data is None else file.write_bytes(data)
    chat, _ = make_chat()
    with pytest.raises(BadRequest, match="file") as caught:
        run_command(chat, f"/read {file}")
    assert message in caught.value.message and chat.attached == []


# -- files


def test_saved_and_loaded_again(home: Path) -> None:
    chat, session = make_chat(["<think>", "hm", "</think>", "Käse \ud800"], ["Half", KeyboardInterrupt()], system="S")
    turn(chat, "one\ntwo")
    turn(chat, "more")
    run_command(chat, "/set seed 5")
    said = run_command(chat, "/save trip").say
    assert str(home / "chats/trip.json") in said and "KV cache" in said

    other, other_session = make_chat()
    other.system = "other"
    outcome = run_command(other, "/load trip")
    assert outcome.then == "show" and outcome.say.startswith("Loaded trip: 2 turns,")
    assert contents(other) == ["one\ntwo", "Käse ?", "more", "Half"]
    assert other.messages[1].reasoning == "hm" and other.interrupted == {3}
    assert (other.system, other.sampling.seed) == ("S", 5)
    assert other_session.cached == session.cached
    listed = run_command(other, "/load").say.split("\n")
    assert listed[0] == "Saved:" and re.fullmatch(r"  trip +\d{4}-\d\d-\d\d \d\d:\d\d   2 turns  one two", listed[1])
    (home / "chats/bad.json").write_text("{")
    assert "  bad           cannot be loaded: /load bad tells why" in run_command(other, "/load").say.split("\n")


def test_a_path_is_taken_as_such(tmp_path: Path) -> None:
    chat, _ = make_chat(["ok"])
    turn(chat, "hi")
    run_command(chat, f"/save {tmp_path}/deep/notes")
    assert json.loads((tmp_path / "deep/notes.json").read_text())["version"] == 1
    assert run_command(chat, f"/load {tmp_path}/deep/notes.json").then == "show"


def test_save_does_not_replace_another_conversation(home: Path) -> None:
    chat, _ = make_chat(["one"], ["two"])
    turn(chat, "first")
    run_command(chat, "/save trip")
    turn(chat, "more")
    run_command(chat, "/save trip.json")
    assert len(chat_file.read_chat(home / "chats/trip.json").messages) == 4

    other, _ = make_chat(["three"], ["four"])
    turn(other, "other")
    with pytest.raises(BadRequest, match=r"trip\.json is there already") as caught:
        run_command(other, "/save trip")
    assert "/save trip!" in caught.value.hint
    run_command(other, "/load trip")
    run_command(other, "/save trip")
    os.utime(home / "chats/trip.json", (1, 1))  # as if written by a third chat
    with pytest.raises(BadRequest):
        run_command(other, "/save trip")
    run_command(other, "/save trip!")
    run_command(other, "/clear")
    turn(other, "anew")
    with pytest.raises(BadRequest):
        run_command(other, "/save trip")
    run_command(other, "/save trip!")
    assert len(chat_file.read_chat(home / "chats/trip.json").messages) == 2


@pytest.mark.parametrize("name", ["..", "a\x1bb", "a\0b", " . "])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(MoelocalError, match="not a usable name"):
        chat_file.chat_path(name)
    for folder in ("/", "trip/", "../.."):
        with pytest.raises(MoelocalError, match=f"'{folder}' is a folder"):
            chat_file.chat_path(folder)


@pytest.mark.skipif(os.name == "nt", reason="no permission bits here")
def test_saved_files_are_for_this_user_only(home: Path) -> None:
    chat, _ = make_chat(["ok"])
    turn(chat, "hi")
    before = os.umask(0o022)
    try:
        run_command(chat, "/save x")
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (home / "chats").iterdir()}
    assert modes == {"x.json": 0o600, "x.kv": 0o600}


@pytest.mark.parametrize("failure", [OutOfMemory("No room."), KeyboardInterrupt()])
def test_a_load_that_fails_changes_nothing(failure: BaseException, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chat, _ = make_chat(["ok"])
    turn(chat, "hi")
    run_command(chat, "/save x")
    other, session = make_chat(["fine"], system="S")
    turn(other, "mine")
    other.attached = ["a file"]
    before = snapshot(other)

    def fail(path: Path) -> int:
        raise failure

    monkeypatch.setattr(session, "load_state", fail)
    with pytest.raises(type(failure)):
        run_command(other, "/load x")
    assert snapshot(other) == before and other.attached == ["a file"]


def test_a_loaded_message_without_an_answer_goes_into_the_prompt(tmp_path: Path) -> None:
    turns = [("user", "a"), ("assistant", "b"), ("user", "c")]
    messages = [{"role": role, "content": content} for role, content in turns]
    (tmp_path / "x.json").write_text(json.dumps(GOOD | {"messages": messages}))
    chat, _ = make_chat()
    outcome = run_command(chat, f"/load {tmp_path}/x")
    assert (outcome.draft, contents(chat)) == ("c", ["a", "b"])


@pytest.mark.parametrize("damage", ["missing", "corrupt"])
def test_a_useless_kv_cache_is_ignored(damage: str, home: Path) -> None:
    chat, _ = make_chat(["ok"])
    turn(chat, "hi")
    run_command(chat, "/save x")
    cache = home / "chats/x.kv"
    cache.unlink() if damage == "missing" else cache.write_text("not it")
    other, session = make_chat()
    assert run_command(other, "/load x").say == "Loaded x: 1 turn."
    assert contents(other) == ["hi", "ok"] and session.cached == []


def test_another_model_is_mentioned(home: Path) -> None:
    chat, _ = make_chat(["ok"])
    turn(chat, "hi")
    run_command(chat, "/save x")
    other, _ = make_chat()
    other.model = "another"
    assert "begun with fake" in run_command(other, "/load x").say


GOOD = {"format": "moelocal-chat", "version": 1, "model": "m", "system": None, "messages": [], "sampling": {}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", '"format"'),
        ({"version": 2}, "version 2"),
        ({"system": 3}, '"system"'),
        ({"messages": {}}, '"messages" is not a list'),
        ({"messages": ["x"]}, "messages[0] is not an object"),
        ({"messages": [{"role": "boss", "content": "x"}]}, "messages[0].role is 'boss'"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "reasoning": 1}]}, "messages[0].reasoning"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages[0] is not the user's"),
        ({"sampling": {"temperature": "hot"}}, "sampling.temperature is 'hot'"),
        ({"sampling": {"temperature": -1}}, "sampling: --temperature must be"),
        ({"sampling": {"stop": "x"}}, "sampling.stop"),
        ({"sampling": {"top_k": True}}, "sampling.top_k is True"),
        ({"sampling": []}, '"sampling"'),
    ],
)
def test_bad_files_are_told_where_and_change_nothing(
    change: str | dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "bad.json"
    file.write_text(change if isinstance(change, str) else json.dumps(GOOD | change))
    chat, _ = make_chat(["ok"])
    turn(chat, "hi")
    before = snapshot(chat)
    with pytest.raises(MoelocalError) as caught:
        run_command(chat, f"/load {file}")
    assert message in caught.value.message and snapshot(chat) == before


def test_settings_of_a_later_version_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "new.json"
    file.write_text(json.dumps(GOOD | {"sampling": {"top_k": 3, "mirostat": 2}}))
    assert chat_file.read_chat(file).sampling == Sampling(top_k=3)


def test_a_file_that_is_not_there_names_those_that_are() -> None:
    chat, _ = make_chat(["ok"])
    turn(chat, "hi")
    run_command(chat, "/save holiday")
    with pytest.raises(MoelocalError) as caught:
        run_command(chat, "/load holidays")
    assert "holiday" in caught.value.hint


def test_a_failed_save_leaves_the_old_file(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chat, _ = make_chat(["ok"], ["ok"])
    turn(chat, "hi")
    run_command(chat, "/save x")
    old = (home / "chats/x.json").read_bytes()
    turn(chat, "more")

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MoelocalError, match="No space left"):
        run_command(chat, "/save x")
    assert (home / "chats/x.json").read_bytes() == old
    assert sorted(path.name for path in (home / "chats").iterdir()) == ["x.json", "x.kv"]


def test_the_last_model_is_remembered(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chat_file.last_model() == "demo"
    (tmp_path / "some.gguf").touch()
    monkeypatch.chdir(tmp_path)
    chat_file.remember_model("some.gguf")
    assert chat_file.last_model() == str(tmp_path / "some.gguf")
    chat_file.remember_model("demo")
    assert chat_file.last_model() == "demo"
    (home / "last-model").write_bytes(b"\0\0")
    assert chat_file.last_model() == "demo"


def test_the_last_model_is_told(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (chat_module._last_model(), capsys.readouterr().err) == ("demo", "")
    (tmp_path / "some.gguf").touch()
    chat_file.remember_model(str(tmp_path / "some.gguf"))
    assert chat_module._last_model() == str(tmp_path / "some.gguf")
    assert capsys.readouterr().err == f"Model: {tmp_path}/some.gguf, the last one used.\n"
    (tmp_path / "some.gguf").unlink()
    assert chat_module._last_model() == "demo"
    assert f"{tmp_path}/some.gguf, is gone" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="file names are text here")
def test_a_model_whose_name_is_not_utf8_is_remembered(home: Path, tmp_path: Path) -> None:
    file = os.fsencode(tmp_path) + b"/caf\xe9.gguf"
    open(file, "w").close()
    chat_file.remember_model(os.fsdecode(file))
    assert chat_file.last_model() == os.fsdecode(file)


def test_user_home(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    assert user_home() == home
    monkeypatch.delenv("MOELOCAL_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    monkeypatch.setattr("sys.platform", "linux")
    assert user_home() == Path("/data/moelocal")


def test_user_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/h")
    assert [str(user_path(text)) for text in ("~/x", "a/~", "/b")] == ["/h/x", "a/~", "/b"]
    with pytest.raises(BadRequest, match="home folder ~nosuchuser is unknown"):
        user_path("~nosuchuser/x")
    with pytest.raises(BadRequest, match=r"'~a\\x00b' cannot be a path: it contains a NUL"):
        user_path("~a\0b")


# -- the loop, line by line


def piped(monkeypatch: pytest.MonkeyPatch, text: str, *scripts: Script, **settings: Any) -> Chat:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    chat, _ = make_chat(*scripts, **settings)
    chat_loop(chat)
    return chat


def on_terminal(monkeypatch: pytest.MonkeyPatch, chat: Chat, keys: str) -> None:
    """The loop with a real terminal as its input; the output is not one."""
    pty = pytest.importorskip("pty")
    keyboard, terminal = pty.openpty()
    with open(keyboard, "wb", buffering=0) as keyboard_file, open(terminal) as terminal_file:
        monkeypatch.setattr("sys.stdin", terminal_file)
        keyboard_file.write(keys.encode())
        chat_loop(chat)


def test_each_line_is_a_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], home: Path
) -> None:
    piped(monkeypatch, "one\n\n/set seed 1\ntwo\n/exit\nthree\n", ["**A**"], ["<think>", "hm", "</think>", "B"])
    out, err = capsys.readouterr()
    assert out == "**A**\nB\n"
    assert err.split("\n")[:4] == [
        "prefill 2 tokens 20.0/s, decode 1 token, first token 0.2 s",
        "seed 1",
        "hm",
        "prefill 3 tokens (3 cached) 30.0/s, decode 4 tokens 6.0/s, first token 0.2 s",
    ]
    assert kept(home) == [["one", "**A**", "two", "B"]]
    assert not list((home / "chats").rglob("*.kv"))


def test_why_an_answer_ended_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    piped(monkeypatch, "hi\n", ["a", "b"], sampling=Sampling(max_tokens=2))
    assert "(ended at max_tokens, 2)" in capsys.readouterr().err


def test_left_out_turns_are_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    piped(monkeypatch, ("word " * 30 + "\n") * 3, *[["ok " * 20]] * 3, n_ctx=100)
    assert "The context of 100 tokens is full: the oldest" in capsys.readouterr().err


def test_a_failure_ends_a_piped_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ContextFull):
        piped(monkeypatch, "word " * 300 + "\nnext\n", n_ctx=100)
    with pytest.raises(BadRequest, match="no command"):
        piped(monkeypatch, "/nonsense\n")


def test_a_message_too_long_does_not_stay_in_the_conversation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], home: Path
) -> None:
    chat, _ = make_chat(["ok"], n_ctx=100)
    on_terminal(monkeypatch, chat, "word " * 300 + "\nshort\n\x04")
    assert contents(chat) == ["short", "ok"]
    err = capsys.readouterr().err
    assert "Error: The prompt has 301 tokens.\nUse --ctx.\n(Enter sends again: word word" in err


def test_a_message_whose_file_is_too_long_comes_back_without_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat, session = make_chat(["ok"], n_ctx=100)
    chat.attached = ["word " * 300]
    on_terminal(monkeypatch, chat, "Sum it up\n\n\x04")
    assert contents(chat) == ["Sum it up", "ok"] and session.prompts == ["user: Sum it up"]
    assert "without its files: /read them again" in capsys.readouterr().err


def test_a_failure_of_another_kind_keeps_the_message_and_its_files(monkeypatch: pytest.MonkeyPatch) -> None:
    chat, _ = make_chat([MoelocalError("llama.cpp failed.")], ["ok"])
    chat.attached = ["a file"]
    on_terminal(monkeypatch, chat, "Sum it up\n\n\x04")
    assert contents(chat) == ["a file\n\nSum it up", "ok"]


@pytest.mark.parametrize(
    ("owner", "name"),
    [(PlainView, "finish"), (LoadingBar, "close"), (chat_module, "_comment")],
    ids=["view", "bar", "figures"],
)
def test_ctrl_c_twice_before_the_answer_gives_the_message_back(
    owner: Any, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], home: Path
) -> None:
    original, calls = getattr(owner, name), []

    def interrupted_once(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(owner, name, interrupted_once)
    chat, session = make_chat([KeyboardInterrupt()], ["ok"])
    on_terminal(monkeypatch, chat, "Really?\n\n\x04")
    assert contents(chat) == ["Really?", "ok"] and session.prompts == ["user: Really?"] * 2
    assert "(Enter sends again: Really?)\n> " in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_regen_interrupted_keeps_the_old_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], home: Path
) -> None:
    chat, _ = make_chat(["old"], [KeyboardInterrupt()])
    on_terminal(monkeypatch, chat, "Say\n/regen\n\x04")
    assert contents(chat) == ["Say", "old"]
    assert "Interrupted before the answer began; the one before it stays." in capsys.readouterr().err
    assert kept(home) == [["Say", "old"]]


def test_a_terminal_without_cursor_keys(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    chat, _ = make_chat([KeyboardInterrupt()])
    on_terminal(monkeypatch, chat, "Really?\n/nonsense\n\n\x04")
    assert contents(chat) == []
    out, err = capsys.readouterr()
    assert "(Enter sends again: Really?)\n> " in err and "Error: There is no command /nonsense.\n" in err
    assert "\x1b" not in out


def test_ctrl_c_drops_the_draft_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    keys: list[Any] = [KeyboardInterrupt(), KeyboardInterrupt(), "next\n"]

    def read(draft: str) -> str:
        key = keys.pop(0)
        if isinstance(key, BaseException):
            raise key
        return str(key)

    monkeypatch.setattr(chat_module, "_read_piped", read)
    assert chat_module._read_typed("a draft") == ""
    assert chat_module._read_typed("") == "next" and "Ctrl-D leaves" in capsys.readouterr().err


def test_input_that_is_not_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\n"), "utf-8"))
    with pytest.raises(BadRequest, match="UTF-8"):
        chat_loop(make_chat()[0])


def test_ctrl_c_ends_a_piped_chat_with_the_partial_answer_kept(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        piped(monkeypatch, "hi\nmore\n", ["Half", KeyboardInterrupt()])
    [file] = chat_file.unsaved_chats().values()
    assert chat_file.read_chat(file).interrupted == {1}


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP here")
def test_a_vanished_terminal_keeps_the_conversation(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    before = signal.getsignal(signal.SIGHUP)
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
    chat, session = make_chat(["Half"])
    stream = session.stream

    def hung_up(*args: Any) -> Any:
        yield from list(stream(*args))[:1]
        os.kill(os.getpid(), signal.SIGHUP)
        yield from ()

    monkeypatch.setattr(session, "stream", hung_up)
    with pytest.raises(SystemExit) as ended:
        chat_loop(chat)
    assert ended.value.code == 128 + signal.SIGHUP
    assert kept(home) == [["hi", "Half"]]
    assert signal.getsignal(signal.SIGHUP) is before


def test_a_failed_first_message_does_not_overwrite_the_last_chat(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    piped(monkeypatch, "hi\n", ["ok"])
    with pytest.raises(ContextFull):
        piped(monkeypatch, "word " * 300 + "\n", n_ctx=100)
    piped(monkeypatch, "/exit\n")
    assert kept(home) == [["hi", "ok"]]


def kept(home: Path) -> list[list[str]]:
    """The conversations that have no name, newest first."""
    files = chat_file.unsaved_chats().values()
    assert all(file.parent == home / "chats/unsaved" for file in files)
    return [[message.content for message in chat_file.read_chat(file).messages] for file in files]


def test_the_chats_before_this_one_are_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], home: Path
) -> None:
    for n in range(12):
        piped(monkeypatch, f"number {n}\n", ["ok"])
        os.utime(next(iter(chat_file.unsaved_chats().values())), (n, n))
    chat = piped(monkeypatch, "mine\n/load\n/load previous-2\n", ["ok"])
    assert contents(chat) == ["number 10", "ok"] and chat.saved_as is None
    assert [messages[0] for messages in kept(home)] == ["mine", *(f"number {n}" for n in range(11, 1, -1))]
    said = capsys.readouterr().err.split("\n")
    at = said.index("Not saved, of earlier chats:")
    assert said[at + 1].startswith("  previous      ") and said[at + 1].endswith("   1 turn  number 11")
    assert said[at + 10].startswith("  previous-10   ")
    assert "Loaded previous-2: 1 turn." in said
    assert "previous is the chat before this one" in run_command(chat, "/help").say
    completed = Words().get_completions(Document("/load previous-1"), CompleteEvent())
    assert [one.text for one in completed] == ["previous-10", "previous-11"]


def test_two_chats_at_once_keep_their_turns(home: Path) -> None:
    one, _ = make_chat(["A"], ["B"])
    two, _ = make_chat(["C"])
    for chat, text in ((one, "first"), (two, "other"), (one, "second")):
        turn(chat, text)
        chat_module._autosave(chat, complain=True)
    assert sorted(kept(home)) == [["first", "A", "second", "B"], ["other", "C"]]


def test_a_conversation_left_for_another_is_kept_until_it_has_a_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], home: Path
) -> None:
    piped(monkeypatch, "one\n/clear\ntwo\n", ["A"], ["B"])
    assert sorted(kept(home)) == [["one", "A"], ["two", "B"]]
    assert "/load previous brings the conversation back" in capsys.readouterr().err
    chat = piped(monkeypatch, "three\n/save trip\n", ["C"])
    assert len(kept(home)) == 2 and contents(chat) == ["three", "C"]
    piped(monkeypatch, "/load trip\nfour\n", ["D"])
    assert ["three", "C", "four", "D"] in kept(home)
    assert len(chat_file.read_chat(home / "chats/trip.json").messages) == 2


def test_an_autosave_that_fails_is_told_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], home: Path
) -> None:
    home.write_text("a file where the folder should be")
    chat = piped(monkeypatch, "one\ntwo\n", ["A"], ["B"])
    assert contents(chat) == ["one", "A", "two", "B"]
    assert capsys.readouterr().err.count("could not be saved") == 1


# -- the prompt


def typed(keys: str, history: Path, draft: str = "") -> str:
    with create_pipe_input() as source:
        source.send_text(keys)
        return open_prompt(history, source, DummyOutput())(draft)


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ("hello\r", "hello"),
        ("one\x1b\rtwo\r", "one\ntwo"),
        ("\x1b[200~first\r\n  second\rthird\x1b[201~\r", "first\n  second\nthird"),
        ("mistake\x03", ""),
        ("\x03still here\r", "still here"),
        ("/sta\t\r", "/stats"),
        ("/set temp\t 1\r", "/set temperature 1"),
        ("typed ahead\n", "typed ahead"),
    ],
)
def test_keys(keys: str, text: str, home: Path) -> None:
    assert typed(keys, home / "history").rstrip() == text


def test_a_draft_can_be_edited(home: Path) -> None:
    assert typed(" and more\r", home / "history", "a draft") == "a draft and more"


def test_ctrl_d_leaves(home: Path) -> None:
    with pytest.raises(EOFError):
        typed("\x04", home / "history")


def test_history_is_kept_for_this_user_only(home: Path) -> None:
    typed("first\r", home / "history")
    assert typed("\x1b[A\r", home / "history") == "first"
    assert (home / "history").stat().st_mode & 0o077 == 0


def test_completion_of_files_and_names(tmp_path: Path, home: Path) -> None:
    (tmp_path / "notes.txt").touch()
    chat, _ = make_chat(["ok"])
    turn(chat, "hi")
    run_command(chat, "/save trip")

    def candidates(text: str) -> list[str]:
        return [one.text for one in Words().get_completions(Document(text), CompleteEvent())]

    assert candidates(f"/read {tmp_path}/no") == ["tes.txt"]
    assert candidates("/load t") == ["trip"]
    assert candidates("/se") == ["/set"]
    assert candidates("se") == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_costs_the_history_only() -> None:
    from moelocal.cli.chat_input import _History

    history = _History("/dev/full")
    history.append_string("What is GGUF?")
    assert history.get_strings() == ["What is GGUF?"]
