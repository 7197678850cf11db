"""All that the rollout engine takes from vLLM and vllm-ascend is there, in both versions that it speaks to."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.util
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qerl_rl.config.ascend_schema import VARIABLE_KEYS, AscendConfig
from qerl_rl.config.bounds import CHOICES
from qerl_rl.config.schema import RolloutConfig
from qerl_rl.quant.modelslim import CACHE_C8, CACHE_KEY
from qerl_rl.rollout import ascend_options, vllm_objects
from qerl_rl.rollout.ascend.layouts import LAYOUTS
from qerl_rl.rollout.ascend.reliances import RELIANCES
from tests.rollout.ascend import sources
from tests.rollout.ascend.packages import Packages
from tests.rollout.ascend.reliances import CPU, NPU, Checker, named_variables, scopes
from tests.rollout.ascend.wheel import wheel

CODE = Path(vllm_objects.__file__).parents[1]
ROLLOUT = CODE / "rollout"


def installed() -> Path:
    return Path(importlib.util.find_spec("vllm").origin).parents[1]  # type: ignore[union-attr, arg-type]


@functools.cache
def packages(engine: str) -> Packages:
    return Packages(installed()) if engine == CPU else Packages(sources.vllm_ascend(), sources.vllm())


def faults(checker: Checker, engine: str, folder: Path = ROLLOUT, **options: Any) -> list[str]:
    return [fault for scope in scopes(folder, **options) if engine in scope.runs_on for fault in checker.faults(scope)]


@pytest.mark.parametrize("engine", [CPU, NPU])
def test_names_attributes_and_arguments_of_the_code_are_those_of_the_engine(engine: str) -> None:
    checker = Checker(packages(engine), engine)
    assert faults(checker, engine) == []
    # What no import shows was followed as well.
    assert {"engine.add_request", "worker.model_runner", "sample.token_ids", "wrapper.worker"} <= checker.looked_up


def test_nothing_else_of_this_repository_imports_the_engine() -> None:
    folders = [CODE, *(CODE.parent / name for name in ("trainer", "workers", "transfer_dock"))]
    found = {scope.place for folder in folders for scope in scopes(folder, {}) if scope.imports}
    assert {place for place in found if not place.startswith("rollout/")} == set()


def test_the_table_names_what_the_code_has() -> None:
    for place, names in vllm_objects.NAMES.items():
        file = place.partition(":")[0]
        written = {ast.unparse(node) for node in ast.walk(ast.parse((ROLLOUT / file).read_text())) if _is_name(node)}
        assert names.keys() <= written, place
    for place in (*vllm_objects.ON_CPU, *vllm_objects.NAMES):
        file, _, name = place.partition(":")
        defined = {getattr(node, "name", "") for node in ast.parse((ROLLOUT / file).read_text()).body}
        assert not name or name in defined, place


@pytest.mark.parametrize("reliance", RELIANCES)
def test_what_is_listed_by_hand_is_there(reliance: str) -> None:
    assert listed_fault(reliance) is None
    # A letter more, and it is not there; with an argument more, it can't be called so.
    name, _, arguments = reliance.partition("(")
    assert listed_fault(f"{name}s{'(' if arguments else ''}{arguments}") is not None
    assert not arguments or listed_fault(f"{name}(further={',' if arguments != ')' else ''}{arguments}") is not None


def listed_fault(reliance: str) -> str | None:
    """What is wrong with module:Class.attribute(2, keyword=), of which the arguments may be missing."""
    path, _, arguments = reliance.partition("(")
    module, _, names = path.partition(":")
    known, first, *rest = packages(NPU), *names.split(".")
    found = known.find(module, first)
    for name in rest:
        found = found and known.member(found, name)
    if found is None:
        return f"{module} has no {names}"
    given = [part.strip() for part in arguments.rstrip(")").split(",") if part.strip()]
    positional = sum(int(part) for part in given if part.isdigit())
    keywords = [part.rstrip("=") for part in given if part.endswith("=")]
    return known.refusal(found, positional, keywords) if "(" in reliance else None


def _is_name(node: ast.AST) -> bool:
    return isinstance(node, ast.Name | ast.Attribute | ast.arg)


# Lines that could be written by mistake, and what is said of each.
MISTAKES = {
    "from vllm import LLMMachine": "vllm has no LLMMachine",
    "from vllm_ascend.utils import get_device_kind": "vllm_ascend.utils has no get_device_kind",
    "from vllm.model_executor.model_loader.reload import layerwise as l\n    l.reload()": "has no reload",
    "from vllm import SamplingParams\n    SamplingParams(temprature=1.0)": "has no argument temprature",
    "from vllm import EngineArgs\n    EngineArgs(enable_sleeping=True)": "has no argument enable_sleeping",
    "from vllm import TokensPrompt\n    TokensPrompt(tokens=[1])": "has no argument tokens",
    "engine.stride()": "LLMEngine has no stride",
    "engine.add_request('0:1')": "needs prompt, params",
    "engine.step(1)": "takes 0 arguments by position, not 1",
    "engine.model_executor.driver_worker.worker.runner": "NPUWorker has no runner",
    "engine.engine_core.engine_core.scheduler.slots": "Scheduler has no slots",
    "engine.model_executor.driver_worker.worker.sleep(depth=1)": "has no argument depth",
}


@pytest.mark.parametrize(("line", "said"), MISTAKES.items(), ids=range(len(MISTAKES)))
def test_a_mistake_is_found(line: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "new.py").write_text(f"def use(engine):\n    {line}\n")
    found = faults(Checker(packages(NPU), NPU), NPU, tmp_path, names={"new.py": {"engine": "engine"}})
    assert len(found) == 1
    assert said in found[0]


@pytest.mark.parametrize(
    ("package", "file", "old", "new", "said"),
    [
        ("vllm", "v1/engine/llm_engine.py", "def step(self", "def stride(self", "LLMEngine has no step"),
        ("vllm", "engine/arg_utils.py", "    block_size: int", "    page_size: int", "no argument block_size"),
        ("vllm", "sampling_params.py", "FINAL_ONLY = ", "AT_THE_END = ", "has no FINAL_ONLY"),
        ("vllm_ascend", "ascend_config.py", "self.weight_nz_mode", "self.nz_mode", "has no weight_nz_mode"),
        ("vllm_ascend", "utils.py", "def get_ascend_device_type", "def get_card", "has no get_ascend_device_type"),
    ],
)
def test_a_version_that_renames_is_found(
    package: str, file: str, old: str, new: str, said: str, tmp_path: Path
) -> None:
    source = (sources.vllm() if package == "vllm" else sources.vllm_ascend()) / package / file
    changed = tmp_path / package / file
    changed.parent.mkdir(parents=True)
    text = source.read_text()
    assert old in text
    changed.write_text(text.replace(old, new))
    newer = Packages(tmp_path, sources.vllm_ascend(), sources.vllm())
    assert any(said in fault for fault in faults(Checker(newer, NPU), NPU))


def _texts(root: Path, *files: str) -> set[str]:
    """All strings in these files."""
    trees = [ast.parse((root / file).read_text()) for file in files]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def test_environment_variables_are_read_by_the_engine() -> None:
    named = {*VARIABLE_KEYS, *named_variables(ROLLOUT, ("VLLM_", "DYNAMIC_"))}
    of_ascend = _texts(sources.vllm_ascend(), "vllm_ascend/envs.py")
    assert named <= _texts(sources.vllm(), "vllm/envs.py") | of_ascend
    assert named <= _texts(installed(), "vllm/envs.py") | {*VARIABLE_KEYS} & of_ascend


EVERY_KEY = AscendConfig(
    graph_mode="full_decode_only",
    capture_sizes=[8, 1],
    weight_nz_mode=2,
    batch_invariant=True,
    matmul_all_reduce=True,
    flash_comm=True,
    fused_mc2=2,
    hierarchical_mc2=True,
    overlap_shared_experts=True,
    bind_cpus=True,
    dynamic_eplb=True,
    eplb_collection_steps=7,
    eplb_algorithm_steps=8,
    eplb_redundant_experts=9,
    eplb_policy=3,
    eplb_stage="decode",
)


def test_nothing_is_handed_over_that_the_engine_would_ignore() -> None:
    known = _texts(sources.vllm_ascend(), "vllm_ascend/ascend_config.py")
    config = ascend_options.additional_config(EVERY_KEY)
    assert {*config, *config["eplb_config"]} <= known
    # What is handed over otherwise, and what no engine hears of.
    elsewhere = {"card", "sleep_mode", "graph_mode", "capture_sizes", "max_capture_size", "batch_invariant"}
    elsewhere |= {"fused_int4_decode"}
    counted = len(config) - 1 + len(config["eplb_config"]) + len(("expert_map_path", "eplb_record_path"))
    assert counted == len(dataclasses.fields(AscendConfig)) - len(elsewhere)


def _read_by_the_wheel(ascend: AscendConfig, monkeypatch: pytest.MonkeyPatch) -> Any:
    """vllm-ascend's own AscendConfig of what an engine is made with."""
    for name, value in ascend.variables.items():
        monkeypatch.setenv(name, value)
    nothing = SimpleNamespace(
        additional_config=ascend_options.additional_config(ascend),
        kv_transfer_config=None,
        model_config=None,
        parallel_config=SimpleNamespace(
            enable_expert_parallel=True,
            tensor_parallel_size=2,
            pipeline_parallel_size=1,
            prefill_context_parallel_size=1,
        ),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=4096),
    )
    given = {
        "vllm.envs": {"VLLM_BATCH_INVARIANT": False},
        "vllm.logger": {"logger": SimpleNamespace(**dict.fromkeys(("info", "info_once", "warning"), print))},
        "vllm_ascend.utils": {
            "is_310p": lambda: False,
            "enable_sp": lambda **options: False,
            "model_uses_sfa_sparse": lambda model: False,
            "get_flashcomm2_config_and_validate": lambda config, engine: 0,
        },
    }
    with wheel("vllm_ascend.ascend_config", "vllm_ascend.envs", given=given) as load:
        return load("vllm_ascend.ascend_config").AscendConfig(nothing)


def test_every_key_arrives_where_the_engine_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for ascend in (AscendConfig(), EVERY_KEY):
        read = _read_by_the_wheel(ascend, monkeypatch)
        balancing = read.eplb_config
        assert {
            "weight_nz_mode": read.weight_nz_mode,
            "matmul_all_reduce": read.enable_matmul_allreduce,
            "flash_comm": read.enable_flashcomm1,
            "fused_mc2": read.enable_fused_mc2,
            "hierarchical_mc2": read.enable_mc2_hierarchy_comm,
            "overlap_shared_experts": read.multistream_overlap_shared_expert,
            "bind_cpus": read.enable_cpu_binding,
            "dynamic_eplb": balancing.dynamic_eplb,
            "eplb_collection_steps": balancing.expert_heat_collection_interval,
            "eplb_algorithm_steps": balancing.algorithm_execution_interval,
            "eplb_redundant_experts": balancing.num_redundant_experts,
            "eplb_policy": balancing.eplb_policy_type,
            "eplb_stage": balancing.eplb_heat_collection_stage,
        }.items() <= dataclasses.asdict(ascend).items()
        # The process groups that it would end are the trainer's as well.
        assert read.enable_sleep_mode_extra_cleanup is False


def test_paths_of_expert_maps_arrive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "map.json").write_text("{}")
    paths = {"expert_map_path": f"{tmp_path}/map.json", "eplb_record_path": f"{tmp_path}/record.json"}
    read = _read_by_the_wheel(AscendConfig(dynamic_eplb=True, **paths), monkeypatch).eplb_config
    assert (read.expert_map_path, read.expert_map_record_path) == (paths["expert_map_path"], paths["eplb_record_path"])


def test_options_of_an_engine_on_npus_are_those_of_its_vllm() -> None:
    eager, graphs = (RolloutConfig(ascend=EVERY_KEY, enforce_eager=eager) for eager in (True, False))
    assert {"compilation_config", "cudagraph_capture_sizes"} & ascend_options.ascend_arguments(eager).keys() == set()
    given = ascend_options.ascend_arguments(graphs) | ascend_options.ascend_arguments(
        RolloutConfig(ascend=AscendConfig(max_capture_size=64), enforce_eager=False)
    )
    for engine in (CPU, NPU):
        arguments = packages(engine).find("vllm", "EngineArgs")
        assert arguments is not None
        assert packages(engine).refusal(arguments, 0, [*given]) is None
        assert "no argument" in (packages(engine).refusal(arguments, 0, [*given, "rl_config"]) or "")
    assert ascend_options.ascend_arguments(graphs)["cudagraph_capture_sizes"] == [1, 8]
    modes = packages(NPU).find("vllm.config", "CUDAGraphMode")
    assert modes is not None
    for mode in {*CHOICES["rollout.ascend.graph_mode"]} - {"auto"}:
        assert packages(NPU).member(modes, str(mode).upper()) is not None


def test_names_that_are_compared_with_the_engines_are_its_own() -> None:
    ascend = sources.vllm_ascend() / "vllm_ascend"
    files = [*(ascend / "quantization").rglob("*.py"), *(ascend / "ops").rglob("*.py")]
    classes = {
        node.name for file in files for node in ast.parse(file.read_text()).body if isinstance(node, ast.ClassDef)
    }
    linears = packages(NPU).find("vllm.model_executor.layers.linear", "UnquantizedLinearMethod")
    assert {*LAYOUTS} - classes == {"UnquantizedLinearMethod"}
    assert linears is not None
    assert {CACHE_KEY, CACHE_C8} <= _texts(ascend, "quantization/modelslim_config.py")


def test_the_sources_are_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(sources.vllm_ascend() / "vllm_ascend" / "lora", tmp_path / "vllm-ascend-0.23.0-sources")
    monkeypatch.setattr(sources, "CACHE", tmp_path)
    monkeypatch.setattr(sources, "_downloaded", lambda *given: pytest.fail("downloaded again"))
    assert sources.vllm_ascend().parent == tmp_path
