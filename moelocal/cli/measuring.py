"""Measuring this machine, when asked to and when it is first needed."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from moelocal.errors import MoelocalError

if TYPE_CHECKING:
    from moelocal.machine.hardware import Machine


def measure(machine: Machine, version: str) -> None:
    """Measures the machine, with a progress bar, and keeps what it found: unless others kept it busy, and a quieter
    measurement is there.

    Raises:
        KeyboardInterrupt: Ctrl-C.
        MoelocalError: no room for the probe's files or for what it found.
    """
    from moelocal.cli import messages
    from moelocal.cli.opening import LoadingBar
    from moelocal.machine.hardware import identity
    from moelocal.machine.speeds import load_speeds, speeds_file, store_speeds
    from moelocal.measure import probe
    from moelocal.measure.others import BUSY_SHARE, OtherWork

    notes: list[str] = []
    others, name = OtherWork(), identity(machine.cpu, machine.devices, version)
    with LoadingBar("Measuring this machine") as bar:
        speeds = probe.probe(machine, bar.update, notes.append)
    is_busy = others.share() > BUSY_SHARE
    is_kept = not is_busy or load_speeds(name) is None
    if is_busy:
        kept = "These speeds are too low" if is_kept else "The earlier, better speeds were kept"
        notes.append(
            f"Other programs used {others.share():.0%} of the processor meanwhile. {kept}: measure again when it is "
            "quiet, with: moelocal doctor --probe"
        )
    for sentence in notes:
        messages.note(sentence)
    if not is_kept:
        return
    try:
        store_speeds(name, speeds)
    except OSError as error:
        raise MoelocalError(
            f"The speeds cannot be kept in {speeds_file()}: {error.strerror}.",
            "Make room there, or choose another folder with MOELOCAL_HOME.",
        ) from error


def measure_first(machine: Machine, version: str) -> bool:
    """Measures a machine that never was, if a person is there to see why it takes a while. Ctrl-C skips it, for good.

    Returns whether there are new speeds.
    """
    from moelocal.cli import messages
    from moelocal.machine.hardware import identity
    from moelocal.machine.speeds import is_known, skip_speeds

    name = identity(machine.cpu, machine.devices, version)
    if not _is_watched() or is_known(name):
        return False
    messages.note("Predictions need this machine's speeds: measuring them once, for less than a minute (Ctrl-C skips).")
    try:
        measure(machine, version)
    except KeyboardInterrupt:
        skip_speeds(name)
        messages.note("Skipped: speeds are estimates until you run: moelocal doctor --probe")
    except MoelocalError as error:
        messages.note(f"{error.message} Speeds are estimates.")
    else:
        return True
    return False


def _is_watched() -> bool:
    return sys.stdout.isatty() and sys.stderr.isatty()
