"""Takes the README's pictures: runs the real program in a terminal of its own and saves the screen as SVG.

usage: python scripts/make_screens.py [OUT_DIR] [--only NAME ...]     (default: all of them, to docs/screens)
"""

from __future__ import annotations

import argparse
import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import pyte
from rich.console import Console
from rich.style import Style
from rich.text import Text

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.model.architectures import write_gguf
from tests.model.real_numbers import REAL


@dataclass(frozen=True, slots=True)
class Scene:
    """One picture: the command as a reader would type it, and what to type into it once it waits for `prompt`."""

    name: str
    command: str
    keys: Sequence[str] = ()
    prompt: str = "> "
    columns: int = 92
    rows: int = 40


SCENES = (
    Scene("run", 'moelocal run demo "What is a mixture of experts?"'),
    Scene(
        "chat",
        "moelocal chat demo",
        ("What is expert offloading?", "Write a Python function that sums a list of prices.", "/stats"),
    ),
    Scene(
        "plan",
        "moelocal plan Qwen3-30B-A3B-Q4_K_M.gguf "
        '--machine "gpu=RTX 4070:12GiB:504GB/s;ram=32GiB:60GB/s;disk=3GB/s;cores=8"',
        columns=100,
    ),
    Scene("doctor", "moelocal doctor"),
    Scene(
        "list",
        'moelocal list --all --machine "gpu=RTX 4070:12GiB:504GB/s;ram=64GiB:60GB/s;disk=3GB/s;cores=8"',
        columns=110,
        rows=52,
    ),
    Scene("bench", "moelocal bench demo --depth 0,1024 --threads 1,2", columns=104),
    Scene("experts", "moelocal experts demo", columns=100, rows=48),
    Scene("eval", "moelocal eval demo --kv-type q4_0 --reference demo", columns=100),
    Scene("imatrix", "moelocal imatrix demo", columns=100),
    Scene("quantize", "moelocal quantize demo --size 8MiB --requantize --dry-run", columns=100),
    Scene("prune", "moelocal prune demo --keep 75% --dry-run", columns=100),
    Scene("errors", 'moelocal run demo "Who are you?" --max-tokens 0; moelocal run qwen.gguf hello'),
)


def play(scene: Scene, folder: Path) -> pyte.Screen:
    """Runs a scene to its end in a folder and returns the screen."""
    screen = pyte.HistoryScreen(scene.columns, scene.rows, history=1000)
    stream = pyte.ByteStream(screen)
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", scene.rows, scene.columns, 0, 0))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {
        **os.environ,
        "TERM": "xterm-256color",
        "COLORTERM": "truecolor",
        "PATH": path,
        "MOELOCAL_HOME": "moelocal",  # in `folder`: the pictures show no path of this machine
    }
    stream.feed(b"\x1b[1;32m$\x1b[0m " + scene.command.encode() + b"\r\n")
    process = subprocess.Popen(
        ["sh", "-c", scene.command],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=env,
        cwd=folder,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(slave)
    keys = [*scene.keys, "\x04"] if scene.keys else []
    quiet_since = time.monotonic()
    while process.poll() is None or select.select([master], [], [], 0.1)[0]:
        if select.select([master], [], [], 0.1)[0]:
            try:
                data = os.read(master, 65536)
            except OSError:
                break
            if b"\x1b[6n" in data:  # the program asks where the cursor is
                os.write(master, f"\x1b[{screen.cursor.y + 1};{screen.cursor.x + 1}R".encode())
            stream.feed(data)
            quiet_since = time.monotonic()
        elif keys and time.monotonic() - quiet_since > 1.0:
            key = keys.pop(0)
            os.write(master, key.encode() if key == "\x04" else key.encode() + b"\r")
            quiet_since = time.monotonic()
    os.close(master)
    return screen


def as_svg(screen: pyte.Screen, title: str) -> str:
    """The screen's used rows as a picture."""
    rows = []
    for y in range(screen.lines):
        cells = [screen.buffer[y][x] for x in range(screen.columns)]
        runs = [("".join(cell.data for cell in run), style) for style, run in groupby(cells, key=_style)]
        text = Text.assemble(*runs)
        text.rstrip()
        rows.append(text)
    while rows and not rows[-1].plain:
        rows.pop()
    with open(os.devnull, "w") as nowhere:
        console = Console(
            record=True, width=screen.columns, file=nowhere, color_system="truecolor", force_terminal=True
        )
        console.print(Text("\n").join(rows), soft_wrap=True)
        return console.export_svg(title=title)


def _style(cell: pyte.screens.Char) -> Style:
    name = cell.fg.replace("brown", "yellow")
    if name.startswith("bright"):
        name = "bright_" + name.removeprefix("bright")
    color = None if name == "default" else name if name.removeprefix("bright_") in _NAMES else f"#{name}"
    return Style(color=color, bold=cell.bold, italic=cell.italics, underline=cell.underscore)


_NAMES = {"black", "red", "green", "yellow", "blue", "magenta", "cyan", "white"}


def main() -> None:
    """Takes every picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, default=ROOT / "docs" / "screens")
    parser.add_argument("--only", nargs="+", choices=[scene.name for scene in SCENES], default=None)
    args = parser.parse_args()
    out = args.out
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        model = REAL["qwen3-30b-a3b"]()  # its header only: no weights are needed to plan
        write_gguf(Path(folder) / "Qwen3-30B-A3B-Q4_K_M.gguf", model.arch, model.keys, model.header.tensors)
        for scene in [scene for scene in SCENES if args.only is None or scene.name in args.only]:
            (out / f"{scene.name}.svg").write_text(as_svg(play(scene, Path(folder)), "moelocal"))
            print(out / f"{scene.name}.svg")


if __name__ == "__main__":
    main()
