"""How fast the engine runs quantized experts: `python -m benchmarks.quantize_engine` (about 6 minutes).

A Qwen3-MoE of 432 M random parameters (8 layers, 32 experts, 4 a token) in bfloat16, W8A8 and W4A16, each in a process
of its own with one thread. The engines are measured in turn, one at a time, round after round; a figure is the median
over the rounds of the ratio within a round. Seconds are those of the processor: with one thread they are the clock's on
a machine that does nothing else, and no other process' on one that does. (Noise adds less than rollouts differ by: what
it touches is timed by itself, by the clock.)

Where the machine has AMX, whose bfloat16 products are nearly as fast as int8 ones, prefill is measured a second time as
a CPU without AMX computes it.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.figures import Figure
from tests.ranks import RankPool

ROUNDS, BATCHES = 5, (1, 4, 16)
DECODED, PROMPT, PREFILLED = 48, 16, 512
VOCABULARY = 2048
NOISE_ROUNDS, GROUPS, SAMPLES, RESPONSE = 31, 16, 8, 16
WITHOUT = ", no AMX"
_engine: Any = None
_touched = 0.0


def build(folder: Path) -> dict[str, Path]:
    """The three checkpoints, by format."""
    import torch

    from qerl_rl.make_model.random_model import MoeSizes, save_random_checkpoint
    from qerl_rl.quant.quantize import quantize_checkpoint

    attention = {"heads": 16, "kv_heads": 8, "head_dim": 64}
    experts = {"experts": 32, "top_k": 4, "expert_width": 512}
    sizes = MoeSizes(layers=8, hidden=1024, **attention, **experts, vocabulary=VOCABULARY, max_length=1024)
    folders = {name: folder / name for name in ("bf16", "w8a8", "w4a16")}
    save_random_checkpoint(folders["bf16"], "qwen3_moe", sizes, dtype=torch.bfloat16)
    for format in ("w8a8", "w4a16"):
        quantize_checkpoint(folders["bf16"], folders[format], format)
    return folders


def has_amx() -> bool:
    import torch

    return torch.cpu._is_amx_tile_supported()


def start(folder: Path, lora: dict[str, Any], max_length: int, response: int, hide_amx: bool = False) -> None:
    """The engine of this process."""
    global _engine
    if hide_amx:
        import torch

        # Both oneDNN and vLLM take the paths of a CPU that has none.
        os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE_BF16"
        torch.cpu._is_amx_tile_supported = lambda: False
    from qerl_rl.config.schema import LoraConfig, RolloutConfig
    from qerl_rl.rollout.vllm_engine import VllmEngine

    rollout = RolloutConfig(
        data_parallel=1,
        max_sequences=128,
        max_batched_tokens=4096,
        kv_cache_bytes=128 << 20,
        prefix_caching=False,
        max_response_tokens=response,
    )
    _engine = VllmEngine(folder, rollout, LoraConfig(**lora), max_length=max_length, seed=0)


def _requests(count: int, length: int, samples: int = 1, vocabulary: int = VOCABULARY) -> list[Any]:
    from qerl_rl.rollout.engine import GroupRequest

    random = np.random.default_rng(count)
    prompts = [random.integers(8, vocabulary, length).astype(np.int32) for _ in range(count)]
    return [GroupRequest(group, prompt, samples, seed=group) for group, prompt in enumerate(prompts)]


def speed(batch: int) -> float:
    """Tokens a second: `batch` sequences decoded together, or with 0 prompts of PREFILLED tokens prefilled."""
    if batch == 0:
        # With a token left of the engine's length, a response costs no step beside that of its prompt.
        requests, tokens = _requests(2, PREFILLED), 2 * PREFILLED
        begin = time.process_time()
        list(_engine.generate(requests, greedy=True))
        return tokens / (time.process_time() - begin)
    begin = time.process_time()
    outputs = list(_engine.generate(_requests(batch, PROMPT), greedy=True))
    return sum(len(output.responses[0]) for output in outputs) / (time.process_time() - begin)


def watch_what_noise_touches() -> None:
    """Count the seconds of norms and routers, which are all that noise changes in a rollout.

    Raises: RuntimeError when a layer of the model has not its two norms and its router.
    """
    from qerl_rl.rollout.norm_noise import NOISY, ROUTERS
    from tests.rollout.scenes import model_of

    began: list[float] = []

    def begin(*_: Any) -> None:
        began.append(time.perf_counter())

    def end(*_: Any) -> None:
        global _touched
        _touched += time.perf_counter() - began.pop()

    modules = dict(model_of(_engine).named_modules())
    norms = [module for path, module in modules.items() if NOISY.search(path)]
    routers = [module for path, module in modules.items() if path.endswith(ROUTERS)]
    if not norms or len(norms) != 2 * len(routers):
        raise RuntimeError(f"found {len(norms)} norms and {len(routers)} routers: the engine's names are others")
    for module in norms + routers:
        module.register_forward_pre_hook(begin)
        module.register_forward_hook(end)


def noisy_rollout(sigma: float, step: int, exempt_router: bool) -> tuple[float, float]:
    """Of a rollout of the quickstart's size with noise of this sigma: seconds a token of drawing the noise and of what
    it touches, and of everything."""
    global _touched
    from qerl_rl.quant.noise import Noise

    _touched, begin = 0.0, time.perf_counter()
    _engine.set_noise(Noise(sigma, seed=1, step=step, exempt_router=exempt_router))
    drawing = time.perf_counter() - begin
    outputs = list(_engine.generate(_requests(GROUPS, PROMPT, SAMPLES, 16)))
    seconds, tokens = time.perf_counter() - begin, sum(len(row) for output in outputs for row in output.responses)
    return (drawing + _touched) / tokens, seconds / tokens


def measure() -> list[Figure]:
    """All rows of this file."""
    with tempfile.TemporaryDirectory() as folder:
        return [*decoding(build(Path(folder))), *noise_cost(Path(folder) / "tiny")]


def decoding(folders: dict[str, Path]) -> list[Figure]:
    """Decode and prefill of int8 and int4 over bf16; the adapters' cost beside int8 experts."""
    off = {"attention": False, "experts": False, "shared_experts": False}
    engines = {name: (folder, off) for name, folder in folders.items()}
    engines["w8a8, adapters"] = (folders["w8a8"], {"in_rollout": "adapter"})
    with RankPool(1) as pool:
        amx = pool(has_amx)[0]
    if amx:
        engines |= {f"{name}{WITHOUT}": (folders[name], off) for name in ("bf16", "w8a8")}
    speeds: dict[tuple[str, int], list[float]] = {}
    with ExitStack() as stack:
        pools = {name: stack.enter_context(RankPool(1)) for name in engines}
        for name, (folder, lora) in engines.items():
            pools[name](start, folder, lora, PREFILLED + 1, DECODED, name.endswith(WITHOUT))
        for turn in range(ROUNDS + 1):
            for batch in (*BATCHES, 0):
                for name, pool in pools.items():
                    if batch and name.endswith(WITHOUT):
                        continue
                    seen = pool(speed, batch)[0]
                    # The first round of all warms up.
                    if turn:
                        speeds.setdefault((name, batch), []).append(seen)
    return list(_rows(speeds))


def _rows(speeds: dict[tuple[str, int], list[float]]) -> list[Figure]:
    rows = []
    for batch in (*BATCHES, 0):
        what = f"decode, batch {batch}" if batch else f"prefill of {PREFILLED} tokens"
        base = speeds["bf16", batch]
        print(f"{what}: " + ", ".join(f"{n} {statistics.median(s):.0f}" for (n, b), s in speeds.items() if b == batch))
        for name in ("w8a8", "w4a16"):
            ratio = statistics.median(own / other for own, other in zip(speeds[name, batch], base, strict=True))
            bar = {(16, "w8a8"): 1.5, (16, "w4a16"): 1.5, (0, "w8a8"): 2.0}.get((batch, name))
            rows.append(Figure(f"engine {what}: {name} / bf16", ratio, bar, at_least=True))
        both = zip(speeds["w8a8, adapters", batch], speeds["w8a8", batch], strict=True)
        ratio = statistics.median(own / other for own, other in both)
        rows.append(Figure(f"engine {what}: w8a8 with adapters / without", ratio, None, at_least=True))
    slow = speeds.get((f"bf16{WITHOUT}", 0))
    if slow:
        ratio = statistics.median(o / b for o, b in zip(speeds[f"w8a8{WITHOUT}", 0], slow, strict=True))
        rows.append(Figure(f"engine prefill of {PREFILLED} tokens{WITHOUT}: w8a8 / bf16", ratio, 2.0, at_least=True))
    return rows


def noise_cost(folder: Path) -> list[Figure]:
    """What noise adds to a rollout of the quickstart's size, in percent: as there, and with the router exempt."""
    import torch

    from qerl_rl.make_model.random_model import save_random_checkpoint
    from qerl_rl.make_model.tiny import SIZES
    from qerl_rl.quant.quantize import quantize_checkpoint

    save_random_checkpoint(folder / "float", "qwen3_moe", SIZES, dtype=torch.bfloat16)
    quantize_checkpoint(folder / "float", folder / "w8a8", "w8a8")
    ways = {"off": (0.0, False), "on": (0.01, False), "on, router exempt": (0.01, True)}
    seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    with RankPool(1) as pool:
        pool(start, folder / "w8a8", {"in_rollout": "adapter"}, 64, RESPONSE)
        pool(watch_what_noise_touches)
        for turn in range(NOISE_ROUNDS + 1):
            # Which comes first changes from round to round: a drift of the machine's speed cancels out.
            order = list(ways)[turn % 3 :] + list(ways)[: turn % 3]
            for way in order:
                seen = pool(noisy_rollout, ways[way][0], turn + 1, ways[way][1])[0]
                if turn:
                    seconds[way].append(seen)
    # A rollout's time differs by several percent from one to the next, most of it in what noise leaves alone.
    touched = {way: statistics.median(part for part, _ in values) for way, values in seconds.items()}
    whole = statistics.median(every for _, every in seconds["off"])
    return [
        Figure(
            f"noise {way}, of a quickstart's rollout", 100 * (touched[way] - touched["off"]) / whole, 1.0, False, "%"
        )
        for way in list(ways)[1:]
    ]


def main() -> int:
    figures = measure()
    print(*figures, sep="\n")
    return 0 if all(figure.met for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
