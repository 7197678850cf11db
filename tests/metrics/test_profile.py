"""Which stages a worker records, and what lies in the folder afterwards."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch

from qerl_rl.config.errors import ConfigError
from qerl_rl.config.profiler_schema import ALL, STAGES, ProfilerConfig
from qerl_rl.config.schema import Config, RunConfig, TrainConfig
from qerl_rl.metrics.profile import StageProfiler, stage


class Worker:
    """Two stages, one of them a method."""

    def __init__(self, folder: Path, rank: int = 0, **profiler: object) -> None:
        config = Config(
            run=RunConfig(output_dir=str(folder)),
            train=TrainConfig(device="cpu"),
            profiler=ProfilerConfig(**profiler),  # type: ignore[arg-type]
        )
        self.profiler = StageProfiler(config, rank)

    @stage("update")
    def update(self, size: int, *, times: int = 1) -> float:
        """Says what it computes."""
        return float(times * (torch.ones(size, size) @ torch.ones(size, size)).sum())

    def work(self) -> None:
        for self.profiler.step in (1, 2, 3):
            with self.profiler.stage("rollout"):
                torch.ones(3) + 1
            self.update(4)


def labels(path: Path) -> list[str]:
    events = json.loads(path.read_text())["traceEvents"]
    return [event["name"] for event in events if event.get("cat") == "user_annotation"]


@pytest.mark.parametrize("stages", [["update"], ["rollout", "update"], [ALL], []])
def test_the_stages_asked_for_are_recorded_and_no_other(tmp_path: Path, stages: list[str]) -> None:
    Worker(tmp_path, rank=1, steps=[1, 3], stages=stages, ranks=[1, 2]).work()
    Worker(tmp_path, rank=0, steps=[1, 3], stages=stages, ranks=[1, 2]).work()
    recorded = {"rollout", "update"} if ALL in stages else set(stages)
    expected = {
        f"step_{step:08d}_{name}_rank_00001.json": f"{name} of step {step}" for step in (1, 3) for name in recorded
    }
    assert {path.name: labels(path) for path in tmp_path.glob("profile/*")} == {
        name: [label] for name, label in expected.items()
    }


def test_a_stage_that_comes_again_in_a_step_gets_a_trace_of_its_own(tmp_path: Path) -> None:
    worker = Worker(tmp_path, steps=[2])
    worker.profiler.step = 2
    assert [worker.update(2), worker.update(2, times=3), worker.update(4)] == [8.0, 24.0, 64.0]
    names = sorted(path.name for path in tmp_path.glob("profile/*"))
    assert names == [f"step_00000002_update_rank_00000{end}.json" for end in ("", "_2", "_3")]


def test_a_stage_in_a_thread_is_recorded_while_the_main_thread_works(tmp_path: Path) -> None:
    worker = Worker(tmp_path, steps=[1])
    worker.profiler.step = 1
    thread = threading.Thread(target=worker.update, args=(8,))
    thread.start()
    torch.zeros(5).cos()
    thread.join()
    [path] = tmp_path.glob("profile/*")
    events = json.loads(path.read_text())["traceEvents"]
    assert "aten::mm" in {event["name"] for event in events}


@pytest.mark.parametrize("shapes", [False, True])
def test_shapes_memory_and_sources_are_recorded_where_asked_for(tmp_path: Path, shapes: bool) -> None:
    Worker(tmp_path, steps=[1], shapes=shapes, memory=shapes, stacks=shapes).work()
    [path] = tmp_path.glob("profile/*")
    trace = json.loads(path.read_text())["traceEvents"]
    [product] = [event for event in trace if event["name"] == "aten::mm"]
    assert (product["args"].get("Input Dims", [])[:2] == [[4, 4], [4, 4]]) == shapes
    assert any(event["name"] == "[memory]" for event in trace) == shapes
    assert any("test_profile.py" in event["name"] for event in trace) == shapes


def test_what_fails_in_a_stage_fails(tmp_path: Path) -> None:
    worker = Worker(tmp_path, steps=[0])
    with pytest.raises(RuntimeError, match="the stage's own"), worker.profiler.stage("update"):
        raise RuntimeError("the stage's own")
    # The profiler is free for the next one.
    assert worker.update(2) == 8.0


def test_the_profiler_of_ascend_needs_an_npu(tmp_path: Path) -> None:
    worker = Worker(tmp_path, steps=[0], kind="msprof")
    with pytest.raises(ConfigError, match="this process computes on cpu") as caught:
        worker.update(2)
    assert caught.value.fix == "set profiler.kind to torch"


def test_a_stage_keeps_the_name_and_words_of_its_method() -> None:
    assert (Worker.update.__name__, Worker.update.__doc__) == ("update", "Says what it computes.")
    assert set(STAGES) > {"update"}
