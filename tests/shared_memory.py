"""What one process has in /dev/shm, whatever the other processes of the machine have there."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

from transfer_dock.arena import SHARED_MEMORY


def dock_files(pid: int) -> list[str]:
    """Arenas and journals of the docks that process `pid` of this machine created, whether anybody uses them or not."""
    return sorted(name for name in os.listdir(SHARED_MEMORY) if name.startswith(f"transfer-dock-{pid}-"))


def held() -> tuple[list[str], list[str]]:
    """Of the files in shared memory that this process has mapped or open: those with a name, which a crash would leave
    behind, and those without, which the kernel frees with their last process.

    The semaphores of Python's own process pools are left out.
    """
    places = re.findall(rf"{SHARED_MEMORY}/.*", Path("/proc/self/maps").read_text())
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # The descriptor that listed the folder.
            places.append(os.readlink(f"/proc/self/fd/{number}"))
    found = sorted({place for place in places if place.startswith(f"{SHARED_MEMORY}/") and "/sem." not in place})
    gone = [place for place in found if place.endswith(" (deleted)")]
    return [place for place in found if place not in gone], gone
