"""Phi-3.5-MoE follows recorded experts, and stays within the context that its rotary factors are for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from qerl_rl.config.errors import ConfigError
from qerl_rl.config.schema import TrainConfig
from qerl_rl.layout.architecture import MoeArchitecture
from tests.model import harness
from tests.model.test_hf_parity import hf_logits, hf_model
from tests.ranks import RankPool


@torch.no_grad()
def _replay(folder: Path) -> dict[str, np.ndarray]:
    """Logits with the experts that transformers chose, with those in the other order, and what transformers gives."""
    train = TrainConfig()
    harness.start(train)
    from qerl_rl.model.forced_experts import ForcedExperts
    from qerl_rl.model.routing_replay import RoutedSequences

    loaded, oracle = harness.load(folder, train), hf_model(folder)
    tokens = harness.sequences(loaded.architecture.vocabulary_size)
    chosen: list[list[torch.Tensor]] = [[] for _ in oracle.model.layers]
    for layer, rows in zip(oracle.model.layers, chosen, strict=True):
        layer.mlp.router.register_forward_hook(lambda module, inputs, output, rows=rows: rows.append(output[2]))
    expected = hf_logits(oracle, tokens)
    experts = torch.stack([torch.cat(rows) for rows in chosen], 1).to(torch.uint8)
    found = {"expected": expected.numpy()}
    for name, forced in (("replayed", experts), ("exchanged", experts.flip(-1))):
        known = torch.ones(len(experts), dtype=torch.bool)
        arguments = harness.packed(tokens)
        sequences = RoutedSequences(ForcedExperts(forced, known), **vars(arguments["packed_seq_params"]))
        found[name] = loaded.model(**{**arguments, "packed_seq_params": sequences})[0].numpy()
    return found


def test_replayed_experts_of_transformers_give_its_logits(
    tiny_checkpoint: Callable[..., Path], one_rank: RankPool
) -> None:
    [found] = one_rank(_replay, tiny_checkpoint("phimoe"))
    np.testing.assert_allclose(found["replayed"], found["expected"], atol=1e-4)
    # Which expert came first counts: the second is weighed without the first.
    assert abs(found["exchanged"] - found["expected"]).max() > 0.1


def test_positions_end_where_the_other_rotary_factors_begin(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint("phimoe")
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    found = MoeArchitecture.from_folder(folder)
    assert found.max_positions == rope["original_max_position_embeddings"] == 512
    assert found.long_rope is not None
    assert found.long_rope.factors == tuple(rope["short_factor"])


def test_published_spelling_is_read_too(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """transformers 4 has rope_scaling and rope_theta where 5 has rope_parameters."""
    folder = tiny_checkpoint("phimoe")
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = {**rope, "type": rope.pop("rope_type")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert MoeArchitecture.from_folder(tmp_path) == MoeArchitecture.from_folder(folder)
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_experts_per_tok": 4}))
    with pytest.raises(ConfigError, match="num_experts_per_tok=4"):
        MoeArchitecture.from_folder(tmp_path)
