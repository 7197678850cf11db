"""A trainer that reads its frozen experts in another engine's memory computes the same bits and stores none of them."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch

from qerl_rl.layout.stored_experts import StoredExperts
from qerl_rl.platform.state_store import SpillFile
from qerl_rl.quant.checkpoint import CheckpointReader
from qerl_rl.train.engine import TrainEngine
from tests.train.models import make_config, make_samples, policy_gradient, share, start_engine

EXPERTS, LAYERS = 8, 2
LAYOUTS = {
    "one rank's all": {},
    "a part of the experts": {"expert_parallel": 2},
    "a part of the layers": {"pipeline_parallel": 2},
    "a part of each expert": {"tensor_parallel": 2, "expert_tensor_parallel": 2},
}


def stored(path: str, experts: range = range(EXPERTS), part: tuple[int, int] = (0, 1)) -> list[StoredExperts]:
    """What an engine holds that keeps the formats of the checkpoint: these experts, this part of their width."""
    found = []
    with CheckpointReader(path) as reader:
        for layer in range(LAYERS):
            for name, projections in (("w13", ("gate_proj", "up_proj")), ("w2", ("down_proj",))):
                weights = [
                    [f"model.layers.{layer}.mlp.experts.{e}.{kind}.weight" for kind in projections] for e in experts
                ]
                format = reader.format_of(weights[0][0])
                assert format is not None
                tensors = tuple(
                    torch.stack(
                        [
                            torch.cat([_part(reader.parts(w)[piece.suffix], name, piece.columns, part) for w in row])
                            for row in weights
                        ]
                    )
                    for piece in format.parts
                )
                found.append(StoredExperts(f"model.layers.{layer}.mlp.experts.{name}", experts, part, format, tensors))
    return found


def _part(tensor: torch.Tensor, name: str, columns: int, part: tuple[int, int]) -> torch.Tensor:
    """The rows (w13) or columns (w2) of a part; scales of whole rows have no columns to cut."""
    which, ways = part
    if name == "w2" and not columns:
        return tensor
    return tensor.chunk(ways, 0 if name == "w13" else 1)[which]


def owned(engine: TrainEngine) -> list[torch.Tensor]:
    """The experts' quantized weights that the model stores itself."""
    return [buffer for name, buffer in engine.model.named_buffers() if ".experts.w" in name]


def compute(engine: TrainEngine) -> dict[str, Any]:
    """Updates with the state leaving memory in between, log-probs with adapters and without, and the export."""
    from qerl_rl.model.weight_map import export_hf

    own = share(make_samples(), engine.data_parallel_rank, engine.data_parallel_size)
    updates = []
    for _ in range(2):
        updates.append(engine.update(own, policy_gradient))
        engine.offload()
        engine.onload()
    scores, reference = engine.log_probs(own), engine.log_probs(own, reference=True)
    merged = export_hf(engine.model, engine.architecture, merge_adapters=True)
    return {
        "updates": updates,
        "log_probs": scores and np.concatenate(scores.log_probs),
        "reference": reference and np.concatenate(reference.log_probs),
        "exported": {name: tensor.numpy().copy() for name, tensor in merged},
        "state": {name: tensor.numpy().copy() for name, tensor in engine.snapshot().tensors.items()},
    }


def adopt_and_compute(
    paths: dict[str, str], folder: str, quant: str, settings: dict[str, int], workers: int
) -> dict[str, Any]:
    import torch.distributed as dist

    config = make_config(paths, quant=quant, workers=workers, **settings)
    alone = compute(start_engine(config, store=SpillFile(folder)))
    engine = start_engine(config, store=SpillFile(folder))
    before, buffers = engine.held_bytes(), owned(engine)
    nbytes = sum(buffer.nbytes for buffer in buffers)
    # A critic's start sends the policy away before anything is lent.
    engine.offload()
    engine.onload()
    part = (dist.get_rank(), 2) if "expert_tensor_parallel" in settings else (0, 1)
    offered = stored(paths[quant], part=part)
    dead = [weakref.ref(buffer.untyped_storage()) for buffer in buffers]
    del buffers
    adoption = engine.adopt_experts(offered)
    gc.collect()
    return {
        "same": _same(alone, compute(engine)),
        "adoption": adoption,
        "own": nbytes,
        "before": before,
        "after": engine.held_bytes(),
        "left": len(owned(engine)) + sum(storage() is not None for storage in dead),
    }


def _same(left: Any, right: Any) -> bool:
    """Whether nested results are the same bits."""
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    return np.array_equal(left, right) if isinstance(left, np.ndarray) else left == right


@pytest.mark.parametrize(("layout", "quant"), [*((layout, "w8a8") for layout in LAYOUTS), ("one rank's all", "nvfp4")])
def test_the_same_bits_come_of_adopted_experts_in_any_layout(one_rank, two_ranks, checkpoints, tmp_path, layout, quant):
    settings = LAYOUTS[layout]
    pool, workers = (two_ranks, 2) if settings else (one_rank, 1)
    for found in pool(adopt_and_compute, checkpoints, str(tmp_path), quant, settings, workers):
        assert found["same"]
        assert sum(found["adoption"].bytes.values()) == found["own"] > 0
        assert found["adoption"].different == []
        assert found["before"]["parameters"] - found["after"]["parameters"] == found["own"]
        assert found["left"] == 0


def refuse(paths: dict[str, str]) -> dict[str, Any]:
    """What a rank with all experts takes of offers that don't fit, or are other numbers."""
    engine = start_engine(make_config(paths))
    buffers = [buffer.clone() for buffer in owned(engine)]
    offers = {
        "half of the experts": stored(paths["w8a8"], experts=range(EXPERTS // 2)),
        "half of each expert": stored(paths["w8a8"], part=(0, 2)),
        "another format": stored(paths["nvfp4"]),
    }
    found: dict[str, Any] = {name: engine.adopt_experts(offer) for name, offer in offers.items()}
    changed = stored(paths["w8a8"])
    changed[-1].tensors[-1][-1, -1] += 1e-6
    found["unchanged"] = all(map(torch.equal, owned(engine), buffers))
    found["one other scale"] = engine.adopt_experts(changed)
    engine.offload()
    try:
        engine.adopt_experts(changed)
    except RuntimeError as error:
        found["away"] = str(error)
    return found


def test_what_does_not_fit_is_not_adopted(one_rank, checkpoints):
    found = one_rank(refuse, checkpoints)[0]
    for name in ("half of the experts", "half of each expert", "another format"):
        assert found[name].bytes == {}
        assert found[name].different == []
    assert found["unchanged"]
    last = f"model.layers.{LAYERS - 1}.mlp.experts.w2"
    assert found["one other scale"].different == [last]
    assert len(found["one other scale"].bytes) == 2 * LAYERS - 1
    assert last not in found["one other scale"].bytes
    assert "needs the train state" in found["away"]
