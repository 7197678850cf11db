"""The real torch_npu on a machine without a card: its wheel in a folder of its own, CANN's libraries as stubs."""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from qerl_rl.config.errors import ConfigError

VERSION = "2.13.0"
"""What imports beside torch 2.13. Users with cards run 2.10.0.post4, which needs another torch."""
CACHE = Path.home() / ".cache" / "qerl_rl" / f"torch_npu-{VERSION}-torch-{torch.__version__}"
OPENED_AT_RUN_TIME = ("libruntime.so", "libopapi.so")
"""Libraries that torch_npu opens by name instead of being linked with."""
ACL = Path(__file__).with_name("acl.c")
_STUB = "libcann_stub.so"
_TOOLS = ("gcc", "nm", "readelf")


def is_prepared() -> bool:
    """Whether everything is there already, so that `prepare` neither downloads nor builds."""
    return CACHE.exists() and _stub_folder().exists()


def prepare() -> None:
    """Download the wheel and build the stubs, unless an earlier call on this machine has.

    Raises: ConfigError when this is another torch than the wheel's, or the wheel or a tool can't be had.
    """
    if torch.__version__.split("+")[0] != VERSION:
        raise ConfigError(
            f"train.device=npu-sim runs torch-npu {VERSION}, which imports beside torch {VERSION} only; this is "
            f"{torch.__version__}.",
            fix=f"pip install torch=={VERSION}, or set train.device to npu (on a card) or cpu",
        )
    if is_prepared():
        return
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        raise ConfigError(
            f"train.device=npu-sim builds stand-ins for CANN's libraries, and there is no {', '.join(missing)} here.",
            fix="install gcc and binutils (apt-get install gcc binutils), or set train.device to cpu",
        )
    installed()
    stubs()


def load() -> None:
    """Import torch_npu into this process, over the stubs, which come into memory first: a library of that name is
    then no longer looked for. Its site folder goes last in sys.path.

    Raises: as `prepare`; ConfigError when torch_npu was imported from elsewhere.
    """
    prepare()
    site = str(installed() / "site")
    if site in sys.path:
        return
    if "torch_npu" in sys.modules:
        raise ConfigError(
            f"train.device=npu-sim brings torch-npu {VERSION} along, and another torch_npu is imported here already.",
            fix="set train.device to npu, or uninstall torch-npu",
        )
    folder = stubs()
    for name in (_STUB, *_library_names()):
        ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)
    sys.path.append(site)
    importlib.import_module("torch_npu")


def installed() -> Path:
    """A folder with `site` (torch_npu), `symbols.txt` and `libraries.txt` (what it expects CANN to define and to be
    called), made at the first call on this machine.

    Raises: ConfigError when the wheel can't be had.
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
            reason = (found.stderr.strip().splitlines() or ["pip says nothing"])[-1]
            raise ConfigError(
                f"train.device=npu-sim needs torch-npu=={VERSION}, which can't be downloaded: {reason}",
                fix=f"let pip reach an index that has it (once: it is kept in {CACHE}), or set train.device to cpu",
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
    known = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True, check=True).stdout.split()
    of_torch = Path(importlib.util.find_spec("torch").origin).parent / "lib"  # type: ignore[union-attr, arg-type]
    there = {library.name for library in [*libraries, *of_torch.glob("*.so*")]}
    return sorted(needed - there - set(known))


def stubs() -> Path:
    """A folder of libraries with CANN's names, built at the first call on this machine: a function does what acl.c
    says, or else nothing, and returns 0."""
    folder = _stub_folder()
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=installed()) as temporary:
            _build_stubs(Path(temporary) / "made")
            _move(Path(temporary) / "made", folder)
    return folder


def _stub_folder() -> Path:
    recipe = ACL.read_bytes() + Path(__file__).read_bytes()
    return CACHE / f"stubs-{hashlib.sha256(recipe).hexdigest()[:12]}"


def _library_names() -> list[str]:
    return (installed() / "libraries.txt").read_text().split()


def _build_stubs(folder: Path) -> None:
    lines = []
    for name in (installed() / "symbols.txt").read_text().split():
        # Tables and type information of C++ classes are data.
        is_data = name.startswith(("_ZTV", "_ZTI", "_ZTS"))
        definition = f"char {name}[256];" if is_data else f"long {name}(void) {{ return 0; }}"
        # What acl.c defines takes its place.
        lines.append(f"__attribute__((weak)) {definition}")
    folder.mkdir()
    (folder / "stubs.c").write_text("\n".join(lines))
    # -w: gcc would like other types for what it knows as its own.
    _compile(folder, _STUB, ["-O1", "-w", "-fno-builtin", "stubs.c", str(ACL), "-lpthread"])
    for name in _library_names():
        # Empty, under the name that torch_npu asks for; looked into by that name, it has what the one above has.
        _compile(folder, name, ["-Wl,--no-as-needed", _STUB])


def _compile(folder: Path, name: str, arguments: Sequence[str]) -> None:
    command = ["gcc", "-fPIC", "-shared", f"-Wl,-soname,{name}", "-o", name, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(
            f"train.device=npu-sim builds {name} with gcc, which failed: {done.stderr.strip().splitlines()[-1:]}",
            fix=f"see to it that this works: cd {folder}; {' '.join(command)}",
        )


def _move(made: Path, folder: Path) -> None:
    try:
        made.rename(folder)
    except OSError:
        # Another process was faster, with the same result.
        if not folder.exists():
            raise
