"""Families that vLLM runs in part are refused before an engine is built, with a fix."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from qerl_rl.config.errors import ConfigError
from qerl_rl.rollout.families import check_family


def test_families_that_no_engine_runs_are_refused(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    check_family(tiny_checkpoint("mixtral", layers=2))
    published = tiny_checkpoint("phimoe", layers=2)
    check_family(published)
    with pytest.raises(ConfigError, match="can't sample from MiniCPM-MoE") as caught:
        check_family(tiny_checkpoint("minicpm", layers=2))
    assert "algorithm.name=dpo" in caught.value.fix
    config = json.loads((published / "config.json").read_text())
    for change, problem in (
        ({"architectures": ["PhimoeForCausalLM"]}, "makes vLLM take transformers' class"),
        ({"router_jitter_noise": 0.1}, "router_jitter_noise=0.1"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ConfigError, match=problem):
            check_family(tmp_path)


def test_vllm_still_weighs_by_the_published_jitter_and_has_no_formats_for_minicpm() -> None:
    """What the refusals rest on, read from vLLM's source without importing it."""
    import ast
    import importlib.util

    folder = Path(importlib.util.find_spec("vllm").origin).parent / "model_executor" / "models"  # type: ignore[union-attr, arg-type]
    functions = {
        name: node
        for file in ("phimoe.py", "minicpm.py")
        for node in ast.walk(ast.parse((folder / file).read_text()))
        for name in [getattr(node, "name", "")]
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    mixer, routing = functions["sparsemixer"], functions["phimoe_routing_function"]
    assert ast.unparse(mixer.args) == "scores, jitter_eps=0.01"
    assert "sparsemixer(gating_output)" in ast.unparse(routing)
    experts = ast.unparse(functions["MiniCPMMoE"])
    assert "quant_config" not in experts
    assert "fused_experts(" in experts
