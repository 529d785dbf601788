"""Measuring this machine, when asked to and when it is first needed."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from moelocal.errors import MoelocalError

if TYPE_CHECKING:
    from moelocal.machine.hardware import Machine


def measure(machine: Machine, version: str) -> bool:
    """Measures the machine, with a progress bar, and keeps what it found; unless other programs kept it busy: then it
    says so. Returns whether it was kept.

    Raises:
        KeyboardInterrupt: Ctrl-C.
        MoelocalError: no room for the probe's files or for what it found.
    """
    from moelocal.cli import messages
    from moelocal.cli.opening import LoadingBar
    from moelocal.machine.hardware import identity
    from moelocal.machine.speeds import store_speeds
    from moelocal.measure import probe
    from moelocal.measure.others import BUSY_SHARE, OtherWork
    from moelocal.paths import cannot_keep

    notes: list[str] = []
    others = OtherWork()
    with LoadingBar("Measuring this machine") as bar:
        speeds = probe.probe(machine, bar.update, notes.append)
    share = others.share()
    if share > BUSY_SHARE:
        messages.note(
            f"Other programs used {share:.0%} of the processor meanwhile, so nothing was kept. Close them, then "
            "measure again: moelocal doctor --probe"
        )
        return False
    for sentence in notes:
        messages.note(sentence)
    try:
        store_speeds(identity(machine.cpu, machine.devices, version), speeds)
    except OSError as error:
        raise cannot_keep("The speeds", error) from error
    return True


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
        return measure(machine, version)
    except KeyboardInterrupt:
        skip_speeds(name)
        messages.note("Skipped: speeds are estimates until you run: moelocal doctor --probe")
    except MoelocalError as error:
        messages.note(f"{error.message} Speeds are estimates.")
    return False


def _is_watched() -> bool:
    return sys.stdout.isatty() and sys.stderr.isatty()
