"""The trainer with the engine's noise on it: against transformers, in every layout, and clean again afterwards."""

import numpy as np
import pytest
import torch

from qerl_rl.quant.noise import Noise, gaussian
from tests.train.models import dequantize_folder, make_config, make_samples, share, start_engine

NOISES = [Noise(0.1, seed=4, step=2), Noise(0.1, seed=4, step=2, exempt_router=True)]
LAYOUTS = [{"tensor_parallel": 2}, {"pipeline_parallel": 2}, {"expert_parallel": 2}]


def scores_by_noise(paths, layout):
    """Log-probs of this rank's samples: clean, with each noise, clean again; None where they don't come out."""
    engine = start_engine(make_config(paths, workers=2 if layout else 1, **layout))
    samples = share(make_samples(), engine.data_parallel_rank, engine.data_parallel_size)
    found = [engine.log_probs(samples, noise=noise) for noise in (None, *NOISES, None)]
    return [None if scores is None else np.concatenate(scores.log_probs) for scores in found]


def hf_scores(folder, noise, temperature):
    """The same by transformers, with noise on the norms' weights and routers that (if exempt) see the clean norm's."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for number, layer in enumerate(model.model.layers):
        for kind in ("input_layernorm", "post_attention_layernorm"):
            norm = getattr(layer, kind)
            clean = norm.weight.data.clone()
            name = f"model.layers.{number}.{kind}.weight"
            norm.weight.data += noise.sigma * torch.from_numpy(gaussian(noise.seed, noise.step, name, clean.shape))
            if noise.exempt_router and kind == "post_attention_layernorm":
                layer.mlp.gate.register_forward_pre_hook(clean_norm_of(norm, clean))
    found = []
    with torch.no_grad():
        samples = make_samples()
        for tokens, length in zip(samples.tokens, samples.response_lengths, strict=True):
            ids = torch.from_numpy(tokens)
            every = torch.log_softmax(model(ids[None]).logits[0, -length - 1 : -1].double() / temperature, -1)
            found.append(every.gather(1, ids[-length:, None])[:, 0])
    return torch.cat(found).numpy()


def clean_norm_of(norm, clean):
    """A router's hook that hands it what the norm would have put out without noise."""
    seen = {}
    norm.register_forward_pre_hook(lambda module, inputs: seen.update(hidden=inputs[0]))

    def replace(module, inputs):
        hidden = torch.nn.functional.rms_norm(seen["hidden"], clean.shape, clean, norm.variance_epsilon)
        return (hidden.reshape(inputs[0].shape), *inputs[1:])

    return replace


@pytest.fixture(scope="module")
def one(one_rank, checkpoints):
    return one_rank(scores_by_noise, checkpoints, {})[0]


def test_noisy_log_probs_equal_those_of_transformers(one, checkpoints, tmp_path):
    dequantize_folder(checkpoints, tmp_path)
    temperature = make_config(checkpoints).rollout.temperature
    clean, *noisy, clean_again = one
    np.testing.assert_array_equal(clean, clean_again)
    for noise, found in zip(NOISES, noisy, strict=True):
        np.testing.assert_allclose(found, hf_scores(tmp_path, noise, temperature), atol=1e-4)
        assert np.abs(found - clean).max() > 0.05
    assert np.abs(noisy[0] - noisy[1]).max() > 0.01, "exempt routers choose otherwise"


@pytest.mark.parametrize("layout", LAYOUTS, ids=["tp2", "pp2", "ep2-dp2"])
def test_every_layout_has_the_same_noise(one, two_ranks, checkpoints, layout):
    ranks = [rank for rank in two_ranks(scores_by_noise, checkpoints, layout) if rank[0] is not None]
    for index, expected in enumerate(one):
        np.testing.assert_allclose(np.concatenate([rank[index] for rank in ranks]), expected, atol=1e-4)
