"""Matrices that vllm-ascend's latent attention derives from its weights follow them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from qerl_rl.rollout.ascend.rewrite import rewrite
from qerl_rl.rollout.repack import refresh_attention
from tests.rollout.ascend import layers, models, wheel

MLA = "vllm_ascend.attention.mla_v1"
HEADS, LATENT, PLAIN, VALUES = 4, 32, 16, 8


def _attention(load: layers.Importer, projection: torch.nn.Module) -> Any:
    """What vllm-ascend's method asks of its object."""
    attention = SimpleNamespace(kv_b_proj=projection, kv_lora_rank=LATENT, num_heads=HEADS)
    attention.qk_nope_head_dim, attention.v_head_dim = PLAIN, VALUES
    attention.enable_mlapo = attention.fa_quant_layer = False
    attention.layer_sharding_kwargs = []
    process = load(MLA).AscendMLAImpl.process_weights_after_loading
    attention.process_weights_after_loading = lambda dtype: process(attention, dtype)
    return attention


def _weight(seed: int) -> dict[str, torch.Tensor]:
    rows = HEADS * (PLAIN + VALUES)
    return {"weight": torch.randn(rows, LATENT, generator=torch.Generator().manual_seed(seed)).bfloat16()}


def test_latent_attention_follows_the_projection_that_was_written() -> None:
    given = wheel.given({}, wheel.AscendConfig())
    given["torch_npu"] = given["torch_npu"] | {"npu_format_cast": lambda weight, acl_format: weight}
    with wheel.wheel(*wheel.MODULES, MLA, given=given) as load:
        kind = layers.LINEAR_KINDS["bfloat16"]
        first, second = (layers.linear_of(load, kind, LATENT, HEADS * (PLAIN + VALUES)) for _ in range(2))
        layers.fill(first, _weight(1))
        layers.fill(second, _weight(2))
        live, fresh = _attention(load, first), _attention(load, second)
        for attention in (live, fresh):
            attention.process_weights_after_loading(torch.bfloat16)
        before = live.W_UV.data_ptr(), live.W_UK_T.data_ptr()
        assert not torch.equal(live.W_UV, fresh.W_UV)
        config = models.vllm_config()
        context = config.compilation_config.static_forward_context
        context |= {"mla": SimpleNamespace(impl=live), "other": SimpleNamespace(impl=object()), "none": object()}
        rewrite(first, _weight(2))
        refresh_attention(first, config)
    assert torch.equal(live.W_UV, fresh.W_UV)
    assert torch.equal(live.W_UK_T, fresh.W_UK_T)
    assert (live.W_UV.data_ptr(), live.W_UK_T.data_ptr()) == before
