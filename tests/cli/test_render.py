"""Answers on a terminal: streamed in any pieces, the screen and scrollback end as one rendering of the whole text."""

from __future__ import annotations

import io
import itertools
import random
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from moelocal.cli import answer, render
from moelocal.cli.answer import PlainView, TerminalView
from moelocal.cli.messages import stats_line
from moelocal.cli.screen import Screen, harmless
from moelocal.engine.timings import Timings
from tests.cli.terminal import Terminal

HEADINGS = """# Mixtures of experts

A *router* picks a **few experts** for each token, so that `n_experts_used` of `n_experts` are computed.

## Why

Because ~~compute~~ bandwidth is what is scarce. See [the paper](https://example.org/paper) or <https://example.org>.

---

Setext heading
==============

> Quoted text that is long enough to be wrapped at nearly every width that people use.
>
> - with a list
> - in it
"""
LISTS = """Steps:

1. Measure the machine, which takes a moment.
2. Decide:
   - attention first
     - then norms
   - then experts
3. Run.

   ```python
   for token in session.stream(tokens, sampling):
       print(token)
   ```
4. Four
5. Five
6. Six
7. Seven
8. Eight
9. Nine
10. Ten, which makes the list wider
11. Eleven

* loose

* items
"""
CODE = (
    "Before:\n\n```python\ndef f(x):\n    '''Long\n    doc'''\n"
    + "".join(f"    x += {i}  # line {i} {'with a long comment ' * (i % 7 == 3) * 5}\n" for i in range(40))
    + "\n\n    return x\n```\n\nAfter, and unlabelled:\n\n~~~\n| not | a table |\n# not a heading\n~~~\n"
)
TABLE = (
    "A table:\n\n| Model | Experts | Tokens/s |\n|:--|:-:|--:|\n"
    + "".join(f"| model-{i} | {i * 8} of {i * 32} | {'fast ' * (i % 5)}{i}.5 |\n" for i in range(30))
    + "\nDone."
)
WIDE = """専門家の混合モデルは、入力トークンごとに少数の専門家だけを使うので、メモリが足りなくても速く動きます。

- 箇条書き 🎉 emoji
- 한국어 문장도 있습니다 그리고 조금 더 깁니다

| 名前 | 値 |
|---|---|
| 混合 | 速い |

averyveryveryverylongwordwithoutanyspacesthatmustbebrokensomewhereandthengoesonandon/and/on/and/on/until/it/ends
"""
HTML = "Use <b>bold</b> or a <br> tag.\n\n<details>\n<summary>More</summary>\n\ninside\n\n</details>\n\na<br>b\n"
PARAGRAPH = " ".join(f"word{i}" + "x" * (i % 13) for i in range(400)) + "\n\nEnd."
DOCUMENTS = {
    "headings": HEADINGS, "lists": LISTS, "code": CODE, "table": TABLE, "wide": WIDE, "html": HTML,
    "paragraph": PARAGRAPH, "all": "\n\n".join([HEADINGS, LISTS, CODE, WIDE, TABLE, HTML]),
}  # fmt: skip
SINGLE = [name for name in DOCUMENTS if name != "all"]
SIZES = [(80, 24), (30, 8), (120, 50), (17, 5)]


def view_on(terminal: Terminal, hide_reasoning: bool = False) -> TerminalView:
    painter = render.Painter(terminal)
    return TerminalView(Screen(terminal, painter.cells), painter, hide_reasoning)


@pytest.fixture(autouse=True)
def _every_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws at every piece, so that no state of the screen stays unseen."""
    monkeypatch.setattr(answer, "_FRAME_S", 0.0)
    monkeypatch.setattr(answer, "_MAX_SHARE", float("inf"))


def pieces(text: str, seed: int, longest: int = 12) -> list[str]:
    choose = random.Random(seed)
    out = []
    while text:
        n = choose.randint(1, longest)
        out.append(text[:n])
        text = text[n:]
    return out


def at_once(text: str, width: int) -> list[str]:
    """The whole text rendered in one go; rich's own document rendering says the same but for its runs of blank rows."""
    rows = [row.text for row in render.Painter(io.StringIO()).markdown(render.parse(text, {}), width)]
    out = io.StringIO()
    Console(file=out, width=width).print(render.Answer(render.parse(text, {})))
    assert [row for row in rows if row] == [row.rstrip() for row in out.getvalue().split("\n") if row.strip()]
    return rows


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", DOCUMENTS)
def test_streamed_equals_rendered_at_once(name: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch, *size)
    view = view_on(terminal)
    for piece in pieces(DOCUMENTS[name], seed=len(name) + size[0], longest=40):
        view.feed("answer", piece)
    view.finish()
    assert terminal.rows() == at_once(DOCUMENTS[name], size[0])


BLOCKS = st.sampled_from(
    """para *one*|a~b  ~c|- x~- y **b**|1. x~~   y~2. z|```sh~ls; wc~~```|---|# H|> q~> r|    indented|***|- [ ] t
`x|**y |* a~  * b~    1. c|t~---||```~open|1986. A year|\\* &amp; &#27;[31m|<div>|a ¦ b
¦ a ¦ b ¦~¦---¦---¦~¦ `c` ¦ d ¦""".replace("\n", "|")
    .replace("~", "\n")
    .split("|")
).map(lambda block: block.replace("¦", "|") + "\n")


@given(
    blocks=st.lists(BLOCKS, max_size=12),
    seed=st.integers(0, 2**32),
    width=st.integers(12, 90),
    height=st.integers(3, 30),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_mixture_of_blocks(blocks: list[str], seed: int, width: int, height: int) -> None:
    text = "\n".join(blocks) if seed % 2 else "".join(blocks)
    with pytest.MonkeyPatch.context() as monkeypatch:
        terminal = Terminal(monkeypatch, width, height)
        view = view_on(terminal)
        for piece in pieces(text, seed):
            view.feed("answer", piece)
        view.finish()
    assert terminal.rows() == at_once(text, width)


def test_finished_blocks_are_never_rewritten(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch, 60, 20)
    view = view_on(terminal)
    view.feed("answer", "First paragraph.\n\nSecond paragraph.\n\nThird")
    terminal.written.clear()
    for piece in pieces(" goes on and on" * 20, seed=1):
        view.feed("answer", piece)
    view.finish()
    assert not any("First" in text or "Second" in text for text in terminal.written)


def test_only_changed_rows_are_rewritten(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch, 20, 20)
    view = view_on(terminal)
    view.feed("answer", "one two three four five six seven eight")
    terminal.written.clear()
    view.feed("answer", " nine")
    assert "one" not in "".join(terminal.written) and "nine" in "".join(terminal.written)


def test_an_answer_under_other_output_leaves_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch, 40, 10)
    terminal.write("> question\r\n\r\n")
    view = view_on(terminal)
    for piece in pieces(CODE, seed=3):
        view.feed("answer", piece)
    view.finish()
    terminal.write("prefill 3 tokens")
    assert terminal.rows() == ["> question", "", *at_once(CODE, 40), "prefill 3 tokens"]


@pytest.mark.parametrize("name", SINGLE)
def test_a_window_that_changes_its_height(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch, 50, 20)
    view = view_on(terminal)
    heights = itertools.cycle([20, 20, 6, 6, 25, 12])
    for i, piece in enumerate(pieces(DOCUMENTS[name], seed=5, longest=19)):
        if i % 10 == 9:
            terminal.resize(50, next(heights))
        view.feed("answer", piece)
    view.finish()
    shown, expected = terminal.rows(), at_once(DOCUMENTS[name], 50)
    if name in ("table", "paragraph"):  # rows of an unfinished table that went out of reach stay as they were
        assert shown[-5:] == expected[-5:]
    else:
        assert shown == expected


@pytest.mark.parametrize("name", SINGLE)
def test_a_window_that_changes_its_width_loses_no_words(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch, 100, 30)
    view = view_on(terminal)
    widths = itertools.cycle([60, 110, 45, 120])
    for i, piece in enumerate(pieces(DOCUMENTS[name], seed=6, longest=19)):
        if i % 25 == 24:
            terminal.resize(next(widths), 30)
        view.feed("answer", piece)
    view.finish()
    last = [row for row in terminal.rows() if row][-1]
    expected = [row for row in at_once(DOCUMENTS[name], terminal.width) if row]
    assert last == expected[-1]
    if name == "code":
        numbers = [int(n) for n in re.findall(r"# line (\d+)", "\n".join(terminal.rows()))]
        assert numbers == sorted(numbers) and set(numbers) == set(range(40))
        assert len(numbers) <= 40 + 4


def test_open_emphasis_shows_as_emphasis_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch, 40, 10)
    view = view_on(terminal)
    for piece, shown in [
        ("A **bold", "A bold"),
        (" word*", "A bold word"),
        ("* and `co", "A bold word and co"),
        ("de` *it", "A bold word and code it"),
        ("*\n\n#", "A bold word and code it"),
    ]:
        view.feed("answer", piece)
        assert terminal.rows() == [shown]
    view.feed("answer", "## T")
    assert terminal.rows()[-1] == "T"


def test_a_table_appears_as_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch, 40, 20)
    view = view_on(terminal)
    for piece in pieces("| aa | bb |\n|----|----|\n| 1 | 2 |\n| 3", seed=2, longest=3):
        view.feed("answer", piece)
        assert "|" not in "".join(terminal.rows())
    assert [row.split() for row in terminal.rows() if row][-1] == ["1", "2"]


# -- reasoning


def test_reasoning_comes_before_the_answer_dimmed_and_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch, 20, 6)
    view = view_on(terminal)
    view.feed("answer", "")  # a token without text
    for piece in pieces("\nThe user wants **something** of me.\n\nSo I think about it.\n\n", seed=4, longest=5):
        view.feed("reasoning", piece)
    for piece in pieces("\n\nThe *answer*.", seed=4, longest=5):
        view.feed("answer", piece)
    view.finish()
    expected = ["The user wants", "**something** of me.", "", "So I think about it.", "", "The answer."]
    assert terminal.rows() == expected
    assert "\x1b[2mThe user wants" in "".join(terminal.written)


@pytest.mark.parametrize("width", [10, 23, 80])
def test_reasoning_in_pieces_wraps_as_at_once(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    text = PARAGRAPH[:900] + "\n  indented 専門家の混合モデル line\n\n" + "y" * 103 + " end"
    shown = []
    for longest in (7, 10_000):
        terminal = Terminal(monkeypatch, width, 9)
        view = view_on(terminal)
        for piece in pieces(text, seed=8, longest=longest):
            view.feed("reasoning", piece)
        view.finish()
        shown.append(terminal.rows())
    assert shown[0] == shown[1]
    assert "".join("".join(shown[0]).split()) == "".join(text.split())


def test_hidden_reasoning_is_counted_and_then_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch, 40, 6)
    view = view_on(terminal, hide_reasoning=True)
    view.feed("reasoning", "One")
    assert terminal.rows() == ["thinking… 1 token"]
    view.feed("reasoning", " two")
    assert terminal.rows() == ["thinking… 2 tokens"]
    view.feed("answer", "Yes.")
    view.finish()
    assert terminal.rows() == ["Yes."]


# -- what a model must not be able to do

HOSTILE = (
    "\x1b]0;owned\x07 \x1b[2J\x1b[31mred\x9b31m \x7f\x08\x08 \rover &#13;x &#x1b;[5m &#155;31m \x00 \u2028 \ud800 end"
)
HOSTILE_BLOCKS = [
    "{}",
    "```{}\n{}\n```",
    "- {}",
    "| {} | b |\n|---|---|\n| {} | d |",
    "# {}",
    "[{}]({})",
    "![{}]({})",
    "`{}`",
]
OURS = re.compile(r"\x1b\[[0-9;]*m|\x1b\[\d*[AKJ]|\x1b\[\?(?:2026|7)[hl]|\r\n|\r")


@pytest.mark.parametrize("block", HOSTILE_BLOCKS)
def test_control_characters_of_the_model_never_reach_the_terminal(block: str, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch, 60, 20)
    view = view_on(terminal)
    text = block.format(HOSTILE, HOSTILE) + "\n\nafter"
    for piece in pieces(text, seed=9):
        view.feed("reasoning", piece)
    for piece in pieces(text, seed=9):
        view.feed("answer", piece)
    view.finish()
    # our own frames hold colours and cursor moves, nothing else; an SGR of the model's would be split by its \u241b
    rest = OURS.sub("", "".join(terminal.written))
    assert not [c for c in rest if (ord(c) < 0x20 and c != "\n") or 0x7F <= ord(c) < 0xA0]
    assert "\x1b[31mred" not in "".join(terminal.written)
    assert "".join(terminal.written).encode() and terminal.screen.title == ""


def test_harmless_keeps_text_and_shows_the_rest() -> None:
    assert harmless("a\tb\r\nc") == "a\tb\nc"
    assert harmless("\x1b[0m\x00\x7f\x9b") == "\u241b[0m\u2400\u2421\ufffd"


# -- other places than a terminal


def test_a_pipe_gets_the_text_as_it_is() -> None:
    out, aside = io.StringIO(), io.StringIO()
    view = PlainView(out, aside)
    view.feed("reasoning", "Hm \x1b[1m")
    for piece in pieces(HEADINGS + "\x1b[31m `x`", seed=1):
        view.feed("answer", piece)
    view.finish()
    assert out.getvalue() == HEADINGS + "\x1b[31m `x`\n"
    assert aside.getvalue() == "Hm \u241b[1m\n"


def test_a_pipe_hides_reasoning() -> None:
    out, aside = io.StringIO(), io.StringIO()
    view = PlainView(out, aside, hide_reasoning=True)
    view.feed("reasoning", "Hm")
    view.feed("answer", "Yes\n")
    view.finish()
    assert (out.getvalue(), aside.getvalue()) == ("Yes\n", "")


def test_a_dumb_terminal_gets_plain_text(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch, 40, 10)
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr("sys.stdout", terminal)
    view = render.answer_view()
    view.feed("answer", "**bold** \x1b[2J")
    view.finish()
    assert "".join(terminal.written) == "**bold** \u241b[2J\n"


def test_no_color_means_no_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch, 60, 20)
    coloured = re.compile(r"\x1b\[(?:\d+;)*(?:3\d|4\d|9\d|10\d)")
    text = "# Head\n\n1. one `two`\n\n```python\nimport os  # x\n```\n"
    monkeypatch.setattr("sys.stdout", terminal)
    for no_color in (False, True):
        if no_color:
            monkeypatch.setenv("NO_COLOR", "1")
        terminal.written.clear()
        view = render.answer_view()
        view.feed("answer", text)
        view.finish()
        assert bool(coloured.search("".join(terminal.written))) is not no_color


# -- statistics


@pytest.mark.parametrize(
    ("timings", "line"),
    [
        (
            Timings(1.0, 512, 0, 512 / 205.3, 2.6, 88, 87 / 43.8),
            "prefill 512 tokens 205.3/s, decode 88 tokens 43.8/s, first token 2.6 s",
        ),
        (
            Timings(1.0, 512, 492, 0.1, 0.11, 2, 0.02),
            "prefill 20 tokens (492 cached) 200.0/s, decode 2 tokens 50.0/s, first token 0.1 s",
        ),
        (Timings(1.0, 5, 0, 0.5, 0.05, 1, 0.0), "prefill 5 tokens 10.0/s, decode 1 token, first token 50 ms"),
        (Timings(1.0, 5, 0, 0.5, 0.0, 0, 0.0), "prefill 5 tokens 10.0/s, decode 0 tokens"),
    ],
)
def test_stats_line(timings: Timings, line: str) -> None:
    assert stats_line(timings) == line


@pytest.mark.parametrize(("width", "height"), [(30, 24), (80, 3), (20, 5), (120, 40)])
def test_a_progress_bar_leaves_no_trace_in_a_resized_window(
    monkeypatch: pytest.MonkeyPatch, width: int, height: int
) -> None:
    terminal = Terminal(monkeypatch, 60, 24)
    terminal.write("before\r\n")
    monkeypatch.setattr("sys.stderr", terminal)
    clock = itertools.count()
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    update = render.progress_bar("Loading a model")
    update(0.2)
    assert "Loading a model" in terminal.rows()[1] and "20%" in terminal.rows()[1]
    terminal.resize(width, height)
    update(0.4)
    assert len(terminal.rows()) == 2
    terminal.resize(60, 24)
    update(None)
    assert terminal.rows() == ["before"]
