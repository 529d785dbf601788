"""A picture made of boxes and words, as an SVG file that looks the same in a forum, a README and a browser."""

from __future__ import annotations

import os
from html import escape
from pathlib import Path
from typing import Literal

from moelocal.cli.screen import harmless
from moelocal.errors import MoelocalError

INK, FAINT, PAPER = "#1c1c1c", "#767676", "#ffffff"
BLUE, ORANGE, RED = "#2a6fb0", "#d9822b", "#b03030"
_FONT = "ui-monospace,SFMono-Regular,Menlo,Consolas,monospace"


class Svg:
    """A picture of `width` x `height` px with a white ground; boxes and words are drawn in the order of the calls."""

    def __init__(self, width: float, height: float, title: str) -> None:
        size = f'width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}"'
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="{_FONT}" role="img">',
            f"<title>{_safe(title)}</title>",
            f'<rect width="{width:g}" height="{height:g}" fill="{PAPER}"/>',
        ]

    def box(self, x: float, y: float, width: float, height: float, fill: str, tip: str = "") -> None:
        """A filled rectangle; `tip` is shown when the mouse rests on it."""
        head = f'<rect x="{x:g}" y="{y:g}" width="{max(0.0, width):g}" height="{height:g}" fill="{fill}"'
        self._parts.append(f"{head}><title>{_safe(tip)}</title></rect>" if tip else f"{head}/>")

    def words(
        self,
        x: float,
        y: float,
        text: str,
        size: float = 13,
        fill: str = INK,
        anchor: Literal["start", "middle", "end"] = "start",
    ) -> None:
        """One line of text; `y` is its base line."""
        place = f'x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{fill}" text-anchor="{anchor}"'
        self._parts.append(f'<text {place} xml:space="preserve">{_safe(text)}</text>')

    def __str__(self) -> str:
        return "\n".join([*self._parts, "</svg>\n"])

    def write(self, path: Path) -> None:
        """Writes the file, whole or not at all.

        Raises:
            MoelocalError: it cannot be written.
        """
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            beside.write_text(str(self), encoding="utf-8")
            os.replace(beside, path)
        except OSError as error:
            beside.unlink(missing_ok=True)
            raise MoelocalError(
                f"{path} cannot be written: {error.strerror}.", "Choose another place for the picture."
            ) from error


def _safe(text: str) -> str:
    return escape(harmless(text).replace("\n", " "))
