"""The code against the real torch_npu, without a card: operators, arguments, shapes, types, gradients.

Not proven here: what the kernels compute, memory formats, limits of kernels, speed.
"""

from __future__ import annotations

import ast
from typing import Any

import pytest

from qerl_rl.platform.simulated_npu import package
from tests.platform.npu.program import REPOSITORY, run_program

pytestmark = pytest.mark.ascend

SOURCES = ("qerl_rl", "trainer", "workers", "transfer_dock")


@pytest.fixture(scope="session")
def checked() -> dict[str, Any]:
    """What `calls.py` found."""
    return run_program("tests.platform.npu.calls")


def test_every_case_gives_the_references_shapes_types_and_gradients(checked: dict[str, Any]) -> None:
    different = {name: found for name, found in checked["cases"].items() if found["npu"] != found["cpu"]}
    assert different == {}
    assert "none" not in {output for found in checked["cases"].values() for output in found["npu"]}


def _calls(source: str) -> list[tuple[int, str]]:
    """(line, name) of calls of torch.ops.npu.NAME and torch_npu.NAME, and of modules of torch_npu that are named."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = ast.unparse(node.func.value)
            if owner == "torch.ops.npu" or owner.split(".")[0] == "torch_npu":
                found.append((node.lineno, node.func.attr))
        elif isinstance(node, ast.Import | ast.ImportFrom) and "torch_npu" in ast.unparse(node):
            found.append((node.lineno, ast.unparse(node)))
        elif isinstance(node, ast.Constant) and str(node.value).startswith("torch_npu."):
            found.append((node.lineno, str(node.value)))
    return found


IMPORTED = ("torch_npu.contrib.transfer_to_npu", "torch_npu.profiler")
"""The modules that the checking processes import by these names (the second: test_profiler.py)."""


def test_no_call_of_torch_npu_is_left_unchecked(checked: dict[str, Any]) -> None:
    made = {(path, line, name) for path, line, name in checked["calls"]}
    in_code = {
        (str(path.relative_to(REPOSITORY)), line, name)
        for folder in SOURCES
        for path in (REPOSITORY / folder).rglob("*.py")
        for line, name in _calls(path.read_text())
    }
    assert {call for call in in_code if call[2] not in IMPORTED} - made == set()
    assert "npu_rms_norm" in {name for *_, name in in_code}


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("y = torch.ops.npu.npu_swiglu(x)", "npu_swiglu"),
        ("[y] = torch_npu.npu_grouped_matmul([x], [w])", "npu_grouped_matmul"),
        ("torch_npu.npu.set_device(0)", "set_device"),
        ("import torch_npu", "import torch_npu"),
        ("importlib.import_module('torch_npu.profiler')", "torch_npu.profiler"),
    ],
)
def test_search_for_calls_finds_each_way_of_writing_one(line: str, name: str) -> None:
    assert _calls(f"def function(x):\n    {line}\n") == [(2, name)]


def test_device_finds_its_cards_and_counts_their_memory(checked: dict[str, Any]) -> None:
    found = checked["device"]
    assert found["available"]
    assert found["devices"] == ["npu:0", "npu:1"]
    # The allocator rounds up to blocks of 512 bytes and pads by 32.
    assert 1 << 20 <= found["allocated"] <= (1 << 20) + 1024
    assert found["peak"] >= found["allocated"]


def test_package_and_stubs_are_kept_for_the_next_run(checked: dict[str, Any]) -> None:
    files = package.installed() / "symbols.txt", package.stubs() / "libcann_stub.so"
    before = [file.stat().st_mtime_ns for file in files]
    package.installed(), package.stubs()
    assert [file.stat().st_mtime_ns for file in files] == before
