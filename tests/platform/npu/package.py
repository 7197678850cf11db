"""The real torch_npu on a machine without a card: its wheel in a folder of its own, CANN's libraries as stubs."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

VERSION = "2.13.0"
"""What imports beside torch 2.13. Users run 2.10.0.post4, which needs another torch."""
CACHE = Path.home() / ".cache" / "qerl_rl" / f"torch_npu-{VERSION}-torch-{torch.__version__}"
OPENED_AT_RUN_TIME = ("libruntime.so", "libopapi.so")
"""Libraries that torch_npu opens by name instead of being linked with."""
REPOSITORY = Path(__file__).parents[3]
ACL = REPOSITORY / "tests" / "npu_sim" / "acl.c"


def installed() -> Path:
    """A folder with `site` (torch_npu), `symbols.txt` and `libraries.txt` (what it expects CANN to define and to be
    called), made at the first call on this machine.

    Raises: RuntimeError when the wheel can't be had.
    """
    if not CACHE.exists():
        CACHE.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE.parent) as temporary:
            folder = Path(temporary) / "made"
            _download(folder / "site")
            libraries = list((folder / "site").rglob("*.so*"))
            symbols = sorted({*_undefined_symbols(libraries), *_names_looked_up(folder / "site")})
            (folder / "symbols.txt").write_text("\n".join(symbols))
            names = [*_missing_libraries(libraries), *OPENED_AT_RUN_TIME]
            (folder / "libraries.txt").write_text("\n".join(names))
            _move(folder, CACHE)
    return CACHE


def _download(site: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    with tempfile.TemporaryDirectory() as wheels:
        found = subprocess.run(
            [*pip, "download", "--no-deps", f"torch-npu=={VERSION}", "--dest", wheels], capture_output=True, text=True
        )
        if found.returncode:
            raise RuntimeError(
                f"torch-npu=={VERSION} can't be downloaded: {found.stderr.strip()}\n  fix: let pip reach an index that "
                f"has it, once; it is then kept in {CACHE}"
            )
        [wheel] = Path(wheels).glob("*.whl")
        shutil.unpack_archive(wheel, site, "zip")


def _undefined_symbols(libraries: list[Path]) -> list[str]:
    """What the libraries use and neither they, torch nor (versioned, so with an @) the C library define."""
    of_torch = Path(importlib.util.find_spec("torch").origin).parent / "lib"  # type: ignore[union-attr, arg-type]
    defined = {name for library in [*libraries, *of_torch.glob("*.so*")] for name, _ in _symbols(library, "defined")}
    used = {name for library in libraries for name, kind in _symbols(library, "undefined") if kind == "U"}
    return sorted(name for name in used - defined if "@" not in name and not name.startswith(("Py", "_Py")))


def _names_looked_up(site: Path) -> set[str]:
    """Functions of the runtime library that torch_npu asks the loader for by name; kernels (aclnn...) are not there."""
    content = (site / "torch_npu" / "lib" / "libtorch_npu.so").read_bytes()
    return {name.decode() for name in re.findall(rb"\0(acl(?!nn)[a-z]*[A-Z]\w+)(?=\0)", content)}


def _symbols(library: Path, which: str) -> list[tuple[str, str]]:
    """(name, letter of nm) of the dynamic symbols."""
    listed = subprocess.run(
        ["nm", "-D", f"--{which}-only", str(library)], capture_output=True, text=True, check=True
    ).stdout
    return [(words[-1], words[-2]) for words in map(str.split, listed.splitlines())]


def _missing_libraries(libraries: list[Path]) -> list[str]:
    """The libraries that those need and that are neither among them, nor torch's, nor the system's."""
    needed = set()
    for library in libraries:
        shown = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True).stdout
        needed |= {line.split("[")[1].rstrip("]") for line in shown.splitlines() if "(NEEDED)" in line}
    known = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, check=True).stdout.split()
    of_torch = Path(importlib.util.find_spec("torch").origin).parent / "lib"  # type: ignore[union-attr, arg-type]
    there = {library.name for library in [*libraries, *of_torch.glob("*.so*")]}
    return sorted(needed - there - set(known))


def stubs() -> Path:
    """A folder of libraries with CANN's names, built at the first call on this machine: a function does what acl.c
    says, or else nothing, and returns 0."""
    recipe = ACL.read_bytes() + Path(__file__).read_bytes()
    folder = installed() / f"stubs-{hashlib.sha256(recipe).hexdigest()[:12]}"
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
            _build_stubs(Path(temporary) / "made")
            _move(Path(temporary) / "made", folder)
    return folder


def _build_stubs(folder: Path) -> None:
    lines = []
    for name in (installed() / "symbols.txt").read_text().split():
        # Tables and type information of C++ classes are data.
        is_data = name.startswith(("_ZTV", "_ZTI", "_ZTS"))
        definition = f"char {name}[256];" if is_data else f"long {name}(void) {{ return 0; }}"
        # What acl.c defines takes its place.
        lines.append(f"__attribute__((weak)) {definition}")
    folder.mkdir()
    source, library = folder / "stubs.c", folder / "libcann_stub.so"
    source.write_text("\n".join(lines))
    # -w: gcc would like other types for what it knows as its own.
    flags = ["-O1", "-fPIC", "-shared", "-w", "-fno-builtin"]
    subprocess.run(["gcc", *flags, "-o", library, source, ACL, "-lpthread"], check=True)
    for name in (installed() / "libraries.txt").read_text().split():
        # One file under many names is loaded once.
        (folder / name).symlink_to(library.name)


def _move(made: Path, folder: Path) -> None:
    try:
        made.rename(folder)
    except OSError:
        # Another process was faster, with the same result.
        if not folder.exists():
            raise


def environment() -> dict[str, str]:
    """What a process must be started with to `import torch_npu` (after torch)."""
    return {
        "LD_LIBRARY_PATH": str(stubs()),
        "PYTHONPATH": f"{installed() / 'site'}:{REPOSITORY}",
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "OMP_NUM_THREADS": "1",
    }


def run_program(module: str) -> Any:
    """What `python -m module` printed last, as JSON, in a process with that `environment`.

    Raises: RuntimeError with what it wrote when it fails.
    """
    program = [sys.executable, "-m", module]
    done = subprocess.run(
        program, env=os.environ | environment(), cwd=REPOSITORY, capture_output=True, text=True, timeout=300
    )
    if done.returncode:
        raise RuntimeError(f"{module} ended with {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])
