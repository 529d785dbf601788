"""The disk that models are kept on: which folder, how much is free, what kind of disk it is."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Literal, NamedTuple

from moelocal.machine.system import System

DiskKind = Literal["local", "spinning", "network", "windows"]
_NETWORK = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "sshfs", "fuse.sshfs", "ceph", "glusterfs", "afs", "fuse.rclone"}


class Space(NamedTuple):
    """The folder of the models, which need not exist yet, and the bytes free where it would be; None: not known."""

    folder: Path
    free_bytes: int | None


def read_space(folder: Path) -> Space:
    """How much room there is where `folder` is, or would be made."""
    for place in (folder, *folder.absolute().parents):
        try:
            return Space(folder, shutil.disk_usage(place).free)
        except OSError:
            continue
    return Space(folder, None)


def disk_kind(here: System, folder: Path) -> DiskKind:
    """Whether the folder is on a local disk that does not spin, as far as Linux tells; `windows`: seen through WSL."""
    device, kind = _mount(here, folder)
    if kind in _NETWORK:
        return "network"
    if kind in ("9p", "drvfs") and "microsoft" in here.read("proc/version").lower():
        return "windows"
    for queue in ("queue", "../queue"):  # a partition has none of its own
        if (turns := here.number(f"sys/dev/block/{device}/{queue}/rotational")) is not None:
            return "spinning" if turns and not _is_virtual(here, device) else "local"
    return "local"


def _is_virtual(here: System, device: str) -> bool:
    """Virtual disks call themselves spinning unless the host says otherwise."""
    target = os.path.realpath(here.root / "sys/dev/block" / device)
    return "/virtual/" in target or "/virtio" in target or "/vbd-" in target


def _mount(here: System, folder: Path) -> tuple[str, str]:
    """(major:minor, file system) of the mount that holds the folder.

    Source: proc(5), /proc/pid/mountinfo: `36 35 98:0 /root /mount/point options - ext4 /dev/sda1 rw`.
    """
    wanted, best, found = str(folder.absolute()), "", ("", "")
    for line in here.read("proc/self/mountinfo").splitlines():
        fields = line.split()
        if len(fields) < 8 or "-" not in fields[:-1]:
            continue
        point = fields[4].replace("\\040", " ")
        below = wanted == point or wanted.startswith(point.rstrip("/") + "/")
        if below and len(point) >= len(best):
            best, found = point, (fields[2], fields[fields.index("-") + 1])
    return found
