"""The Triton kernels through the compilers for cards: to machine code for CUDA, to Linalg by triton-ascend.

Not proven here: CANN's own compiler, which takes Linalg to a card's machine code and comes with CANN only; limits of
vector memory; speed; results on cards.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.platform.triton_kernels.compiled import GATHERED, VARIANTS

PACKAGES = ("triton-ascend==3.2.0", "pybind11==3.1.0")
"""The newest triton-ascend that every index has, and what it imports (users run 3.2.2)."""
CACHE = Path.home() / ".cache" / "qerl_rl" / "triton-ascend-3.2.0"
PROGRAM = Path(__file__).with_name("compiled.py")


def _triton_ascend() -> Path:
    """A folder with triton-ascend, made at the first call on this machine.

    Raises: RuntimeError when it can't be had.
    """
    if not CACHE.exists():
        CACHE.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE.parent) as temporary:
            made = Path(temporary) / "made"
            pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--no-deps"]
            found = subprocess.run([*pip, "--target", str(made), *PACKAGES], capture_output=True, text=True)
            if found.returncode:
                raise RuntimeError(
                    f"{PACKAGES[0]} can't be downloaded: {found.stderr.strip()}\n  fix: let pip reach an index that "
                    f"has it, once; it is then kept in {CACHE}"
                )
            try:
                made.rename(CACHE)
            except OSError:
                # Another process was faster, with the same result.
                if not CACHE.exists():
                    raise
    return CACHE


def _failures(cache: Path, *arguments: str) -> dict[str, str]:
    # A path of tests would let the other Triton find the installed one's modules.
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    program = [sys.executable, str(PROGRAM), *arguments]
    done = subprocess.run(
        program, env=environment | {"TRITON_CACHE_DIR": str(cache)}, capture_output=True, text=True, timeout=300
    )
    shutil.rmtree(cache, ignore_errors=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """By compiler, which variants of the kernels it refuses, and what it says."""
    folder = tmp_path_factory.mktemp("triton")
    return {"cuda": _failures(folder / "cuda"), "ascend": _failures(folder / "ascend", str(_triton_ascend()))}


@pytest.mark.parametrize("compiler", ["cuda", "ascend"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_kernel_compiles(failures: dict[str, dict[str, str]], compiler: str, variant: str) -> None:
    assert variant not in failures[compiler], failures[compiler][variant]


def test_loads_of_single_numbers_would_be_found(failures: dict[str, dict[str, str]]) -> None:
    assert "number by number" in failures["ascend"][GATHERED]
    assert GATHERED not in failures["cuda"]
