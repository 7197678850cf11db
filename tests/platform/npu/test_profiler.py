"""Profiling on an NPU through the real torch_npu: what it is asked for, and where it puts what it records.

Not proven here: what is recorded, for which the driver's own libraries are needed.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from qerl_rl.platform.profilers import AIC_METRICS, EXPORTS, LEVELS
from tests.platform.npu.program import run_program

pytestmark = pytest.mark.ascend


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return run_program("tests.platform.npu.profiles")


def test_every_value_of_a_key_is_one_of_torch_npus_and_every_one_of_those_has_a_value(found: dict[str, Any]) -> None:
    levels, counters, exports = (dict(zip(keys, column, strict=True)) for keys, column in _by_key(found["settings"]))
    assert [sorted(set(values.values())) for values in (levels, counters, exports)] == found["known"]
    for names, keys in ((levels, LEVELS), (counters, AIC_METRICS), (exports, EXPORTS)):
        assert len(set(names.values())) == len(keys)


def _by_key(settings: list[list[str]]) -> list[tuple[list[str], list[str]]]:
    """(values of the key, what they become) of level, aic_metrics and export, each with the others as they may be."""
    asked = list(itertools.product(LEVELS, AIC_METRICS, EXPORTS))
    # Counters are read from level1 on.
    counted = [index for index, (level, *_) in enumerate(asked) if level in ("level1", "level2")]
    for index in set(range(len(asked))) - set(counted):
        assert settings[index][1] == "ACL_AICORE_NONE"
    chosen = [range(len(asked)), counted, range(len(asked))]
    return [
        ([asked[index][column] for index in indices], [settings[index][column] for index in indices])
        for column, indices in enumerate(chosen)
    ]


def test_a_profile_is_asked_for_as_the_keys_say_and_lies_in_a_folder_of_its_own(found: dict[str, Any]) -> None:
    asked = found["recorded"]
    by_default, everything, kernels = asked["as by default"], asked["everything"], asked["kernels only"]
    for recorded in asked.values():
        assert recorded["folder"].startswith("step_1_update_rank_0_")
        assert recorded["folder"].endswith("_ascend_pt")
        assert recorded["common_config"]["activities"] == ["ProfilerActivity.CPU", "ProfilerActivity.NPU"]
    switches = ("record_shapes", "profile_memory", "with_stack")
    assert [by_default["common_config"][switch] for switch in switches] == [False] * 3
    assert [everything["common_config"][switch] for switch in switches] == [True] * 3
    keys = ("_profiler_level", "_aic_metrics", "_export_type")
    assert [by_default["experimental_config"][key] for key in keys] == [
        *("Level1", "ACL_AICORE_PIPE_UTILIZATION", ["text"])
    ]
    assert [everything["experimental_config"][key] for key in keys] == ["Level2", "ACL_AICORE_MEMORY_UB", ["db"]]
    assert [kernels["experimental_config"][key] for key in keys] == ["Level0", "ACL_AICORE_NONE", ["text"]]


def test_a_chrome_trace_on_an_npu_is_torch_npus_and_has_its_kernels(found: dict[str, Any]) -> None:
    assert found["torch"] == [["ProfilerActivity.CPU", "ProfilerActivity.NPU"]]
