"""The engine on real models: the demo, and tiny random ones whose memory works differently (window, recurrent, MLA)."""

from __future__ import annotations

import os
import signal
import statistics
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moelocal.engine.sampling import Sampling
from moelocal.engine.session import Session
from moelocal.engine.timings import Chunk
from moelocal.errors import BadRequest, ContextFull, LoadFailed
from moelocal.model.header import read_header
from tests.conftest import DEMO

Open = Callable[..., Session]
Tiny = Callable[[str], Path]
GREEDY = Sampling(temperature=0.0, max_tokens=24, ignore_eos=True)
GEOMETRIES = ["tiny-qwen3moe", "tiny-gptoss", "tiny-lfm2moe", "tiny-deepseek2", "tiny-dense"]
ASK = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def answer(session: Session, tokens: list[int], sampling: Sampling = GREEDY) -> tuple[list[int], Chunk]:
    chunks = list(session.stream(tokens, sampling))
    return [chunk.token for chunk in chunks if chunk.token is not None], chunks[-1]


def logits(session: Session, prompt: list[int]) -> list[float]:
    """What the model thinks after the prompt. Compared instead of tokens where random weights make near ties."""
    answer(session, prompt, Sampling(temperature=0.0, max_tokens=1))
    low = session._low
    return list(low.llama_get_logits_ith(session._context, -1)[: low.llama_vocab_n_tokens(session._vocab)])


def close(a: list[float], b: list[float]) -> bool:
    """Alike but for rounding: other batch sizes add in another order, and a random router may then choose otherwise."""
    return statistics.correlation(a, b) > 0.9


def ask(session: Session, question: str, **sampling: Any) -> str:
    chunks = session.stream(session.tokenize(ASK.format(question)), Sampling(temperature=0.0, **sampling))
    return "".join(chunk.text for chunk in chunks)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("checkpoints", [False, True])
def test_a_rewound_cache_answers_as_a_fresh_one(
    geometry: str, checkpoints: bool, tiny: Tiny, open_session: Open
) -> None:
    """Long enough that a sliding window (256 cells here) moved on: what was cut off must be computed again."""
    path = tiny(geometry)
    session = open_session(path, checkpoints)
    text = session.tokenize("The quick brown fox jumps over the lazy dog and runs on. " * 60)[:900]
    prompts = [text[:700], text[:700] + text[20:60], text[:300], text[:650] + text[60:90], text[:350], text[5:100]]
    for prompt in prompts:
        expected = logits(open_session(path), prompt)
        assert close(logits(session, prompt), expected)
        answer(session, prompt)
        assert session.cached[: len(prompt)] == prompt


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_conversation_goes_on_from_the_cache(geometry: str, tiny: Tiny, open_session: Open) -> None:
    session = open_session(tiny(geometry), checkpoints=True)
    prompt = session.tokenize("Once upon a time there was a small model. " * 6)
    tokens, _ = answer(session, prompt)
    _, last = answer(session, prompt + tokens + prompt[:20])
    assert last.timings is not None
    assert last.timings.cached_tokens >= len(prompt) + len(tokens) - 1


@pytest.mark.parametrize("geometry", ["tiny-gptoss", "tiny-lfm2moe"])
def test_a_changed_answer_rewinds_to_the_checkpoint(geometry: str, tiny: Tiny, open_session: Open) -> None:
    """As when a template drops the reasoning of earlier turns: the prompt before it is not computed again."""
    session = open_session(tiny(geometry), checkpoints=True)
    prompt = session.tokenize("Once upon a time there was a small model. " * 12)
    answer(session, prompt, Sampling(temperature=0.0, max_tokens=300, ignore_eos=True))
    changed = prompt + session.tokenize("Something else entirely.")
    done: list[int] = []
    for _ in session.stream(changed, GREEDY, on_prefill=lambda n, total: done.append(total)):
        pass
    assert done[-1] <= len(changed) - (len(prompt) - 16)
    answer(session, prompt, Sampling(temperature=0.0, max_tokens=300, ignore_eos=True))
    assert close(logits(session, changed), logits(open_session(tiny(geometry)), changed))


def test_text_is_that_of_the_tokens(open_session: Open) -> None:
    session = open_session(DEMO)
    chunks = list(
        session.stream(session.tokenize(ASK.format("How do you say tree in Spanish?")), Sampling(temperature=0.0))
    )
    assert "".join(chunk.text for chunk in chunks) == "In Spanish, tree is árbol."
    assert chunks[-1].finish_reason == "stop"


def test_bytes_of_one_character_arrive_together(tiny: Tiny, open_session: Open) -> None:
    """A byte-level vocabulary with a grammar that demands emoji: no chunk may hold half a character."""
    session = open_session(tiny("tiny-qwen3moe"))
    sampling = Sampling(temperature=0.0, max_tokens=40, grammar='root ::= "🦊日本é"')
    texts = [chunk.text for chunk in session.stream(session.tokenize("x"), sampling)]
    assert "".join(texts) == "🦊日本é"
    assert len([text for text in texts if text]) > 1


@pytest.mark.parametrize("stop", ["router picks", "s", "A mixture", "every token. Only"])
def test_stop_strings_may_span_tokens(stop: str, open_session: Open) -> None:
    session = open_session(DEMO)
    whole = ask(session, "What is a mixture of experts?")
    assert ask(session, "What is a mixture of experts?", stop=(stop, "zzz")) == whole[: whole.index(stop)]


def test_limits(open_session: Open) -> None:
    session = open_session(DEMO, n_ctx=256)
    tokens = session.tokenize(ASK.format("Tell me a story about a fox."))
    few, last = answer(session, tokens, Sampling(temperature=0.0, max_tokens=5))
    assert len(few) == 5 and last.finish_reason == "length"
    all_of_it, last = answer(session, tokens, Sampling(temperature=0.0, ignore_eos=True))
    assert last.finish_reason == "length" and len(tokens) + len(all_of_it) == session.n_ctx + 1
    with pytest.raises(ContextFull, match="256") as caught:
        list(session.stream(tokens * 20, GREEDY))
    assert caught.value.n_tokens == 20 * len(tokens) and "--ctx" in caught.value.hint
    with pytest.raises(BadRequest):
        list(session.stream([], GREEDY))
    assert answer(session, tokens, Sampling(temperature=0.0, max_tokens=5))[0] == few


def test_seed_and_penalties(open_session: Open) -> None:
    session = open_session(DEMO)
    hot: dict[str, Any] = {"temperature": 1.5, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "max_tokens": 40}
    tokens = session.tokenize(ASK.format("Tell me a story about a fox."))
    runs = [answer(session, tokens, Sampling(seed=seed, **hot))[0] for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    plain = answer(session, tokens, GREEDY)[0]
    assert (
        answer(session, tokens, Sampling(temperature=0.0, max_tokens=24, ignore_eos=True, repeat_penalty=3.0))[0]
        != plain
    )


def test_a_grammar_is_obeyed_and_a_bad_one_refused(open_session: Open) -> None:
    session = open_session(DEMO)
    for temperature in (0.0, 2.0):
        chunks = session.stream(
            session.tokenize(ASK.format("Who are you?")),
            Sampling(temperature=temperature, seed=3, grammar='root ::= "yes" [0-9]{3} | "no"'),
        )
        assert "".join(chunk.text for chunk in chunks)[:3].rstrip("s") in ("ye", "no")
    with pytest.raises(BadRequest, match="grammar"):
        list(session.stream([1], Sampling(grammar="root ::= (((")))
    assert ask(session, "What is the capital of France?") == "The capital of France is Paris."


@pytest.mark.parametrize("geometry", ["demo", "tiny-gptoss", "tiny-lfm2moe"])
def test_ctrl_c_in_prefill_and_decode_leaves_the_session_usable(geometry: str, tiny: Tiny, open_session: Open) -> None:
    path = DEMO if geometry == "demo" else tiny(geometry)
    session = open_session(path, n_ctx=2048, n_ubatch=32)
    prompt = session.tokenize("What is the capital of France? " * 40)[:1200]
    expected = logits(open_session(path, n_ctx=2048, n_ubatch=32), prompt)
    seen = []

    def stop_early(done: int, total: int) -> None:
        seen.append(done)
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        list(session.stream(prompt, GREEDY, on_prefill=stop_early))
    assert len(seen) <= 4 and len(session.cached) <= 32 * 5
    timings = session.timings
    assert timings is not None and (timings.prompt_tokens, timings.generated_tokens) == (len(session.cached), 0)
    assert timings.prompt_s > 0 and timings.generate_s == 0
    with pytest.raises(KeyboardInterrupt):
        for n, _ in enumerate(session.stream(prompt, Sampling(temperature=0.0, ignore_eos=True))):
            if n == 10:
                os.kill(os.getpid(), signal.SIGINT)
    timings = session.timings
    assert timings is not None and (timings.prompt_tokens, timings.generated_tokens) == (len(prompt), 11)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert close(logits(session, prompt), expected)


def test_ctrl_c_reaches_a_batch_that_is_running(tiny: Tiny, open_session: Open) -> None:
    """One batch of 4,096 tokens takes long; the signal comes from outside while native code runs."""
    session = open_session(tiny("tiny-qwen3moe"), n_ctx=8192, n_ubatch=4096)
    prompt = (session.tokenize("The quick brown fox jumps over the lazy dog. ") * 600)[:4096]
    session.open()
    timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        list(session.stream(prompt, GREEDY))
    timer.join()
    assert len(session.cached) < 4096


@pytest.mark.parametrize("geometry", ["demo", *GEOMETRIES])
def test_a_saved_cache_goes_on_where_it_was(geometry: str, tiny: Tiny, open_session: Open, tmp_path: Path) -> None:
    path = DEMO if geometry == "demo" else tiny(geometry)
    session = open_session(path)
    prompt = session.tokenize("Tell me a story about a fox. " * 20)[:160]
    tokens, _ = answer(session, prompt)
    file = tmp_path / "chat.kv"
    assert session.save_state(file) == file.stat().st_size
    more = session.cached + prompt[:9]
    expected = logits(session, more)
    again = open_session(path)
    assert again.load_state(file) == len(prompt) + len(tokens) - 1
    done: list[int] = []
    list(again.stream(more, GREEDY, on_prefill=lambda n, total: done.append(total)))
    assert done[-1] == 9
    assert again.load_state(file) and close(logits(again, more), expected)


def test_a_bad_cache_file_is_no_cache(tiny: Tiny, open_session: Open, tmp_path: Path) -> None:
    session = open_session(DEMO)
    prompt = session.tokenize(ASK.format("What is GGUF?"))
    expected, _ = answer(session, prompt)
    file = tmp_path / "chat.kv"
    session.save_state(file)
    data = file.read_bytes()
    for bad in (b"", data[:7], data[:200], data[:-1], data[:50] + b"\xff" + data[51:], b"\0" * 500, data + b"x"):
        file.write_bytes(bad)
        assert session.load_state(file) == 0
        assert answer(session, prompt)[0] == expected
    file.write_bytes(data)
    assert open_session(tiny("tiny-qwen3moe")).load_state(file) == 0
    assert open_session(DEMO, n_ctx=32).load_state(file) == 0
    assert session.load_state(tmp_path / "none.kv") == 0


def test_weights_that_changed_make_a_cache_stale(open_session: Open, tmp_path: Path) -> None:
    """Another checkpoint of the same training has the same names, shapes and size."""
    data = bytearray(DEMO.read_bytes())
    tensor = read_header(DEMO).tensors[0]
    data[tensor.offset + 40] ^= 1
    other = tmp_path / "other.gguf"
    other.write_bytes(data)
    session = open_session(DEMO)
    answer(session, session.tokenize("What is GGUF?"))
    session.save_state(tmp_path / "chat.kv")
    assert open_session(other).load_state(tmp_path / "chat.kv") == 0


def test_token_ids_that_there_are_not_have_no_text(open_session: Open) -> None:
    """Files exist whose padding token is 4294967295; llama.cpp aborts when asked for its text."""
    session = open_session(DEMO)
    assert [session.token_text(token) for token in (-1, 2048, 2**32 - 1)] == ["", "", ""]


def test_penalties_count_the_prompt_too(open_session: Open) -> None:
    session = open_session(DEMO)
    prompt = session.tokenize(ASK.format("What is the capital of France?"))
    first = answer(session, prompt, Sampling(temperature=0.0, max_tokens=1))[0]
    pushed = prompt[:1] + first * 3 + prompt[1:]
    plain = logits(session, pushed)
    free, _ = answer(session, pushed, Sampling(temperature=0.0, max_tokens=1))
    held, _ = answer(session, pushed, Sampling(temperature=0.0, max_tokens=1, presence_penalty=90.0))
    assert free[0] == plain.index(max(plain))
    assert held[0] not in pushed[-64:]


def test_reserve_makes_room(open_session: Open) -> None:
    session = open_session(DEMO, n_ctx=64)
    tokens = session.tokenize(ASK.format("Tell me a story about a fox."))
    answer(session, tokens)
    session.reserve(512)
    assert session.n_ctx == 512 and len(answer(session, tokens, Sampling(temperature=0.0, ignore_eos=True))[0]) > 400


def test_a_file_that_llama_cpp_refuses_says_why(tmp_path: Path, open_session: Open) -> None:
    data = DEMO.read_bytes()
    file = tmp_path / "odd.gguf"
    at = data.index(b"general.architecture") + len("general.architecture") + 4 + 8
    file.write_bytes(data[:at] + b"lxama" + data[at + 5 :])
    with pytest.raises(LoadFailed, match="lxama") as caught:
        open_session(file)
    assert caught.value.details
