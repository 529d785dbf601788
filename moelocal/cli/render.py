"""What rich draws: Markdown as rows, and progress. The only importer of rich; slow to import, so done when needed.

Answers go to stdout, progress to stderr. NO_COLOR and TERM=dumb are respected.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, TextIO

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich import markdown
from rich.cells import cell_len
from rich.console import COLOR_SYSTEMS, Console, ConsoleOptions, RenderableType, RenderResult
from rich.rule import Rule
from rich.segment import Segment
from rich.syntax import Syntax
from rich.text import Text
from rich.theme import Theme

from moelocal.cli.console import Plain
from moelocal.cli.screen import BLANK, Row, Screen, harmless

if TYPE_CHECKING:
    from moelocal.cli.answer import AnswerView

# Colours of the terminal's own palette, and no background: readable on light and dark, and copied without padding.
_THEME = Theme({"markdown.code": "cyan", "markdown.code_block": "none", "markdown.link_url": "underline blue"})
_CODE_THEME = "ansi_dark"
_RULE = "─"


def console(out: TextIO | None = None) -> Console:
    """A rich console on `out`, default stderr."""
    return Plain(out, theme=_THEME, soft_wrap=True)


def progress_bar(label: str) -> Callable[[float | None], None]:
    """A transient bar on stderr. Call the result with 0.0 to 1.0, as often as you like, and with None to remove it."""
    from rich.progress import BarColumn, Progress, TextColumn

    painter = Painter(sys.stderr)
    screen = Screen(sys.stderr, painter.cells)
    columns = TextColumn("{task.description}"), BarColumn(30), TextColumn("{task.percentage:.0f}%")
    bar = Progress(*columns, auto_refresh=False)
    task = bar.add_task(harmless(label), total=1.0)
    next_draw = 0.0

    def update(fraction: float | None) -> None:
        nonlocal next_draw
        now = time.monotonic()
        if fraction is None:
            screen.refit()
            screen.draw([])
        elif now >= next_draw:
            next_draw = now + 0.1
            screen.refit()
            bar.update(task, completed=fraction)
            screen.draw([], painter.rows(bar.get_renderable(), screen.width)[:1])

    return update


def status_line() -> Callable[[str | None], None]:
    """A transient line on stderr that changes: call the result with its text, and with None to remove it."""
    painter = Painter(sys.stderr)
    screen = Screen(sys.stderr, painter.cells)

    def show(text: str | None) -> None:
        screen.refit()
        screen.draw([], painter.plain(harmless(text), screen.width, "dim")[:1] if text else [])

    return show


def answer_view(hide_reasoning: bool = False) -> AnswerView:
    """Where an answer is shown: feed(kind, text) its pieces, then finish(). Raw text when stdout is not a terminal."""
    from moelocal.cli.answer import open_view

    return open_view(sys.stdout.isatty(), hide_reasoning)


class _CodeBlock(markdown.CodeBlock):
    """Code between two dim rules, the upper one naming the language; the lines themselves are bare, to be copied."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        title = Text(self.lexer_name, style="dim") if self.lexer_name != "text" else ""
        code = str(self.text).rstrip()
        yield Rule(title, characters=_RULE, style="dim", align="left")
        yield Syntax(code, self.lexer_name, theme=self.theme, background_color="default", word_wrap=True)
        yield Rule(characters=_RULE, style="dim")


class _Heading(markdown.Heading):
    """Headings at the left: centred ones would jump while they are written."""

    LEVEL_ALIGN: ClassVar = dict.fromkeys(("h1", "h2", "h3", "h4", "h5", "h6"), "left")


class _ListItem(markdown.ListItem):
    """Numbers take the same room in a short and in a long list, so that growing does not shift what is printed."""

    def render_number(self, console: Console, options: ConsoleOptions, number: int, last_number: int) -> RenderResult:
        numeral = f"{number}.".rjust(3) + " "
        inner = options.update(width=max(1, options.max_width - len(numeral)))
        style = console.get_style("markdown.item.number", default="none")
        for i, line in enumerate(console.render_lines(self.elements, inner, style=self.style)):
            yield Segment(numeral if i == 0 else " " * len(numeral), style)
            yield from line
            yield Segment.line()


class Answer(markdown.Markdown):
    """An answer as rich renders it, from parsed blocks. HTML is shown, not dropped; links show where they lead."""

    elements: ClassVar = {
        **markdown.Markdown.elements,
        "fence": _CodeBlock,
        "code_block": _CodeBlock,
        "heading_open": _Heading,
        "list_item_open": _ListItem,
    }

    def __init__(self, tokens: list[Token]) -> None:
        super().__init__("", code_theme=_CODE_THEME, hyperlinks=False)
        self.parsed = tokens


@lru_cache(maxsize=1)
def _parser() -> MarkdownIt:
    # without "newline", lines stay lines and keep their indentation: people do not write HTML paragraphs to a model
    return MarkdownIt().enable("strikethrough").enable("table").disable(["html_block", "newline"])


def parse(source: str, env: dict[str, Any]) -> list[Token]:
    """Markdown blocks of `source`. `env` carries link definitions from earlier text and is not changed."""
    tokens = _parser().parse(source, copy.deepcopy(env))
    for token in tokens:
        if token.type == "inline" and token.children:
            token.children = [shown for child in token.children if (shown := _as_shown(child))]
    return tokens


def definitions(source: str, env: dict[str, Any]) -> None:
    """Adds the link definitions in `source` to `env`."""
    _parser().parse(source, env)


def _as_shown(token: Token) -> Token | None:
    """An inline token; HTML becomes visible text, and a bare link is only its address."""
    if token.type == "html_inline":
        is_break = token.content.strip("</> ").lower() == "br"
        return Token("hardbreak", "br", 0) if is_break else Token("text", "", 0, content=token.content)
    return None if token.markup == "autolink" else token


class Painter:
    """Turns blocks and text into rows of a given width, coloured for the terminal that `out` is."""

    def __init__(self, out: TextIO) -> None:
        self._console = console(out)
        self.cells: Callable[[str], int] = cell_len

    def markdown(self, tokens: list[Token], width: int) -> list[Row]:
        """Rows of top-level blocks as rich renders them, without trailing spaces, one blank row between blocks."""
        options = self._console.options.update(width=width, height=None)
        rows: list[Row] = []
        start = 0
        for end, token in enumerate(tokens, 1):
            if token.level == 0 and token.nesting <= 0:
                lines = self._console.render_lines(Answer(tokens[start:end]), options, pad=False)
                block = _trimmed([self._row(line) for line in lines])
                rows += [BLANK, *block] if rows and block else block
                start = end
        return rows

    def plain(self, text: str, width: int, style: str) -> list[Row]:
        """Rows of one line of text, wrapped between words."""
        if not text.strip():
            return [BLANK]
        paragraph = Text(text, style=self._console.get_style(style))
        paragraph.expand_tabs(8)
        return self.rows(paragraph, width)

    def rows(self, what: RenderableType, width: int) -> list[Row]:
        """Rows of anything that rich renders."""
        options = self._console.options.update(width=width, height=None)
        return [self._row(line) for line in self._console.render_lines(what, options, pad=False)]

    def _row(self, line: list[Segment]) -> Row:
        segments = [segment for segment in line if segment.text and not segment.control]
        if self._console.no_color:
            segments = list(Segment.remove_color(segments))
        while segments and not segments[-1].text.strip():
            segments.pop()
        if not segments:
            return BLANK
        last = segments[-1]
        segments[-1] = last._replace(text=last.text.rstrip())
        texts = [harmless(segment.text).replace("\t", " ") for segment in segments]
        system = COLOR_SYSTEMS[self._console.color_system] if self._console.color_system else None
        ansi = [
            segment.style.render(text, color_system=system) if segment.style else text
            for segment, text in zip(segments, texts, strict=True)
        ]
        return Row("".join(texts), "".join(ansi))


def _trimmed(rows: list[Row]) -> list[Row]:
    """`rows` without blank ones at either end."""
    while rows and rows[-1] == BLANK:
        rows.pop()
    first = next((i for i, row in enumerate(rows) if row != BLANK), 0)
    return rows[first:]
