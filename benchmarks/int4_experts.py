"""The int4 kernels on a card: whether they give what the host gives, and how long a decode step's experts take.

`python -m benchmarks.int4_experts` on CUDA or an NPU; on a CPU the references stand in for the kernels, and times say
nothing about a card. The shapes are Qwen3-30B-A3B's. The peer is what vllm-ascend launches: two grouped products with
int4 weights and SwiGLU, here without the dealing of tokens around them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from qerl_rl.platform import detect, ops
from qerl_rl.quant.formats import get_format

HIDDEN, WIDTH, EXPERTS, CHOSEN, GROUP = 2048, 768, 128, 8, 32
RUNS = 21
BOUND = 2**-7
"""Of the largest element: the result is rounded to 8 bits, and so are the weights of the peer."""


def measure(device: torch.device, experts: int, runs: int) -> list[str]:
    """Lines to print. Raises: AssertionError when the device's results are not the host's."""
    parts = [_parts(experts, 2 * WIDTH, HIDDEN, 1), _parts(experts, HIDDEN, WIDTH, 2)]
    hosts, cards = [], []
    for packed, scale in parts:
        repacked = ops.repack_int4(packed)
        on_card = ops.repack_int4(packed.to(device))
        assert torch.equal(on_card.cpu(), repacked), "repack_int4 gives other words than on the host"
        scale = scale.transpose(1, 2).contiguous()
        hosts.append(ops.Int4Matrices(repacked, scale))
        cards.append(ops.Int4Matrices(on_card, scale.to(device)))
    return ["repack_int4: the host's words", *(_decoded(hosts, cards, tokens, device, runs) for tokens in (1, 8))]


def _parts(experts: int, outputs: int, inputs: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    weight = torch.randn(experts, outputs, inputs, generator=torch.Generator().manual_seed(seed)) * inputs**-0.5
    parts = get_format("w4a16", GROUP).quantize(weight)
    return parts["_packed"], parts["_scale"]


def _decoded(
    hosts: list[ops.Int4Matrices], cards: list[ops.Int4Matrices], tokens: int, device: torch.device, runs: int
) -> str:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, HIDDEN, generator=generator).bfloat16()
    weights, chosen = torch.randn(tokens, len(hosts[0].packed), generator=generator).softmax(-1).topk(CHOSEN)
    expected = ops.decode_experts_int4(x, chosen, weights, *hosts).float()
    given = (x.to(device), chosen.to(device), weights.to(device))
    found = ops.decode_experts_int4(*given, *cards).cpu().float()
    error = float((found - expected).abs().max() / expected.abs().max())
    assert error < BOUND, f"decode_experts_int4 is off by {error:.1e} of the largest element"
    one = _microseconds(lambda: ops.decode_experts_int4(*given, *cards), device, runs)
    rows, counts = chosen.flatten().argsort(), chosen.flatten().bincount(minlength=len(hosts[0].packed)).tolist()
    sorted_rows, sorted_weights = given[0][rows.to(device) // CHOSEN], given[2].flatten()[rows.to(device)]

    def three() -> torch.Tensor:
        hidden = ops.grouped_matmul_int4(sorted_rows, cards[0].packed, cards[0].scale, counts)
        active = ops.weighted_swiglu(hidden, sorted_weights)
        return ops.grouped_matmul_int4(active, cards[1].packed, cards[1].scale, counts)

    return (
        f"decode_experts_int4, {tokens} of {CHOSEN} experts: {error:.1e} of the largest element, {one:.0f} us; "
        f"grouped products {_microseconds(three, device, runs):.0f} us"
    )


def _microseconds(run: Callable[[], torch.Tensor], device: torch.device, runs: int) -> float:
    """The median; the first, which compiles, is left out."""
    seconds = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        run()
        detect(device.type).synchronize()
        seconds.append(time.perf_counter() - start)
    return 1e6 * statistics.median(seconds[1:])


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--device", default="auto", help="auto, npu, cuda or cpu")
    arguments.add_argument("--experts", type=int, default=EXPERTS)
    arguments.add_argument("--runs", type=int, default=RUNS)
    chosen_arguments = arguments.parse_args()
    where = detect(chosen_arguments.device).current()
    print(f"{where}:")
    for line in measure(where, chosen_arguments.experts, chosen_arguments.runs):
        print(f"  {line}")
