"""The rollout engine on vLLM, inside the worker's own process."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from qerl_rl.config.schema import LoraConfig, RolloutConfig
from qerl_rl.layout.architecture import MoeArchitecture
from qerl_rl.layout.engine import EngineLayout
from qerl_rl.layout.stored_experts import StoredExperts
from qerl_rl.layout.tensors import Adapters, Tensors, Weights, full_tensors
from qerl_rl.quant.noise import Noise
from qerl_rl.quant.requantize import Survival
from qerl_rl.rollout.adapters import AdapterSet
from qerl_rl.rollout.ascend.capture import before_graphs_are_captured
from qerl_rl.rollout.collector import Collector, unfinished_samples
from qerl_rl.rollout.engine import GroupOutput, GroupRequest, LiveTarget
from qerl_rl.rollout.engine_memory import engine_memory
from qerl_rl.rollout.engine_options import engine_arguments
from qerl_rl.rollout.environment import configure_environment
from qerl_rl.rollout.families import check_family
from qerl_rl.rollout.full_tensors import exchange_format, put
from qerl_rl.rollout.lending import Lending
from qerl_rl.rollout.limits import check_engine
from qerl_rl.rollout.load_plan import LoadPlan
from qerl_rl.rollout.merge import MergedAdapters, has_adapters, merges_adapters
from qerl_rl.rollout.merge_shards import ShardFinder
from qerl_rl.rollout.norm_noise import NormNoise
from qerl_rl.rollout.quota import Quota
from qerl_rl.rollout.routing import no_experts, routing_engine
from qerl_rl.rollout.score import score
from qerl_rl.rollout.vllm_objects import engine_worker, model_runner
from qerl_rl.rollout.weight_memory import ByteStore, drop_unused_copies
from qerl_rl.rollout.weight_target import WeightTarget


class VllmEngine:
    """One rank of the engine; see `RolloutEngine` for what its methods do.

    Construct it on every rank of tensor_parallel x data_parallel, with the default process group (gloo) initialised and
    RANK and LOCAL_RANK set; a single process needs neither. With expert_parallel, data-parallel ranks step together;
    without, each of them is an engine of its own. max_length: tokens of prompt and response together.
    record_routing: outputs say which experts each token went to (routing replay). quantize_to: the format that the
    weights of a float checkpoint are rounded to when they are loaded (full training), with the group size group_size
    (0: its own); None takes them as they are.
    """

    def __init__(
        self,
        model_path: str | Path,
        rollout: RolloutConfig,
        lora: LoraConfig,
        *,
        max_length: int,
        seed: int,
        record_routing: bool = False,
        quantize_to: str | None = None,
        group_size: int = 0,
    ) -> None:
        check_family(model_path)
        configure_environment(rollout)
        self._rollout, self._max_length = rollout, max_length
        self._stop_tokens = end_of_sequence_tokens(Path(model_path))
        with _process_state_kept(), warnings.catch_warnings():
            # vLLM touches names that torch has deprecated.
            warnings.simplefilter("ignore", FutureWarning)
            from vllm import LLMEngine

            from qerl_rl.rollout.vllm_patches import apply_patches, platform_name

            apply_patches(rollout)
            self._plan = LoadPlan(model_path, platform_name(), quantize_to, group_size)
            check_engine(self._plan, rollout)
            arguments = engine_arguments(self._plan, rollout, max_length, seed)
            self._adapters: AdapterSet | MergedAdapters | None = None
            self._architecture = MoeArchitecture.from_folder(model_path)
            self._rank, self._adapter_kinds = dist.get_rank() if dist.is_initialized() else 0, Adapters(lora)
            attach = functools.partial(self._attach_adapters, lora=lora, seed=seed)
            with before_graphs_are_captured(attach):
                self._engine = routing_engine(arguments) if record_routing else LLMEngine.from_engine_args(arguments)
        worker = engine_worker(self._engine)
        runner = worker.model_runner
        drop_unused_copies(runner.model)
        self._weight_memory, self._kv_cache = engine_memory(worker)
        if self._adapters is None:
            attach(worker)
        self._lending = Lending(runner.model, writes_weights=not isinstance(self._adapters, AdapterSet))
        self._weight_target: WeightTarget | None = None
        self._noise = NormNoise(runner.model)
        self._no_experts = no_experts(self._architecture) if record_routing else None

    def _attach_adapters(self, worker: Any, lora: LoraConfig, seed: int) -> None:
        """Make what adapters change of the worker's model, if there are some."""
        model = worker.model_runner.model
        if merges_adapters(model, lora):
            finder = ShardFinder(self._architecture, self._layout(Weights()), self._rank)
            shapes = self._layout(self._adapter_kinds).local_shapes(self._rank)
            self._adapters = MergedAdapters(model, worker.vllm_config, self._plan, lora, seed, finder, shapes)
        elif has_adapters(lora):
            self._adapters = AdapterSet(model, lora)

    def generate(
        self,
        requests: Sequence[GroupRequest],
        *,
        temperature: float | None = None,
        greedy: bool = False,
        quota: int | None = None,
    ) -> Iterator[GroupOutput]:
        """Yield each group when its last sample is finished; iterate to the end on every rank.

        Closed early, it drops what is unfinished. Raises: RuntimeError while the KV cache is released; ValueError for a
        group number given twice, a prompt that leaves no room for a response, partial responses that are not one a
        sample, or more groups that must finish than the quota has places.
        """
        self._check_in_memory("generate()")
        waiting = {request.group: self._collector(request) for request in requests}
        if len(waiting) != len(requests):
            raise ValueError("two requests have the same group number")
        places = Quota(len(requests) if quota is None else quota, [r.group for r in requests if r.must_finish])
        temperature = 0.0 if greedy else self._rollout.temperature if temperature is None else temperature
        for request in requests:
            self._add(request, waiting[request.group], temperature)
        try:
            for group in [request.group for request in requests if waiting[request.group].is_complete]:
                if places.takes(group):
                    yield waiting.pop(group).output()
            while self._goes_on(waiting, places):
                for output in self._engine.step():
                    group, index = map(int, output.request_id.split(":"))
                    if waiting[group].finish(index, output.outputs[0]) and places.takes(group):
                        yield waiting.pop(group).output()
            for collector in waiting.values():
                yield collector.output(left=True)
            waiting = {}
        finally:
            self._abort(waiting)

    def _check_in_memory(self, call: str) -> None:
        if self._kv_cache.nbytes == 0:
            raise RuntimeError(f"{call} while the KV cache is released: call restore_kv_cache() first")
        if self._weight_memory.is_away:
            raise RuntimeError(f"{call} while the weights are released: call restore_weights() first")

    def _collector(self, request: GroupRequest) -> Collector:
        dense = self._architecture.dense_layers
        return Collector(request, self._budget(request), self._stop_tokens, self._no_experts, dense)

    def _budget(self, request: GroupRequest) -> int:
        """Tokens that a response to this request may have."""
        room = self._max_length - len(request.prompt_tokens)
        if room < 1:
            raise ValueError(
                f"group {request.group}: a prompt of {len(request.prompt_tokens)} tokens leaves no room for a response "
                f"(max_length {self._max_length})"
            )
        return min(self._rollout.max_response_tokens, room)

    def _add(self, request: GroupRequest, collector: Collector, temperature: float) -> None:
        """Hand the samples of a group that have tokens left to draw to the engine."""
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        for index in collector.unfinished:
            partial = collector.partials[index].tokens
            params = SamplingParams(
                temperature=temperature,
                top_p=self._rollout.top_p,
                top_k=self._rollout.top_k,
                min_p=self._rollout.min_p,
                seed=sample_seed(request.seed, index, len(partial)),
                max_tokens=collector.budget - len(partial),
                stop_token_ids=self._stop_tokens,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
                # One array of numbers instead of a dictionary of objects a token.
                logprobs=0,
                flat_logprobs=True,
            )
            tokens = np.concatenate([request.prompt_tokens, partial]).tolist()
            self._engine.add_request(f"{request.group}:{index}", TokensPrompt(prompt_token_ids=tokens), params)

    def _goes_on(self, waiting: Mapping[int, Collector], places: Quota) -> bool:
        """Whether there is a step to take; ranks that step together ask each other, so all of them call it as often.

        Once the quota is met, what unfinished samples have so far is taken out of the engine.
        """
        if places.is_met and self._engine.output_processor.has_unfinished_requests():
            for name, sample in unfinished_samples(self._engine).items():
                group, index = map(int, name.split(":"))
                waiting[group].interrupt(index, sample)
            self._abort(waiting)
        return self._engine.has_unfinished_requests()

    def _abort(self, waiting: Mapping[int, Collector]) -> None:
        names = [f"{group}:{index}" for group, own in waiting.items() for index in range(len(own.partials))]
        if names:
            self._engine.abort_request(names)

    def set_adapters(self, tensors: Mapping[str, torch.Tensor], step: int = 0) -> int:
        """See RolloutEngine."""
        target, kinds = self.adapter_target(step), self._adapter_kinds
        full = exchange_format(full_tensors(self._architecture, kinds), tensors)
        put(target, self._layout(kinds), self._rank, full)
        return target.finish()

    def adapter_target(self, step: int = 0) -> LiveTarget:
        """See RolloutEngine; cached prefixes of the old policy are forgotten in the end."""
        if self._adapters is None:
            raise RuntimeError("adapters for an engine built without: lora.rank is 0, or nothing is to be adapted")
        if isinstance(self._adapters, MergedAdapters) and self._weight_memory.is_away:
            raise RuntimeError("adapters are merged into weights that are released: call restore_weights() first")
        self._adapters.begin(step)
        return _Served(self._adapters, self._served)

    def weight_target(self) -> LiveTarget:
        """See RolloutEngine; cached prefixes of the old policy are forgotten in the end.

        Raises: RuntimeError on an engine with adapters, which change the weights that it was built with.
        """
        if self._adapters is not None:
            raise RuntimeError("weights for an engine with adapters: set lora.rank to 0")
        self._weight_memory.make_writable()
        self.set_noise(Noise())
        if self._weight_target is None:
            self._weight_target = WeightTarget(self.model, self._engine.vllm_config, self._plan)
        self._weight_target.begin()
        return _Served(self._weight_target, self._served)

    def _served(self) -> None:
        """Another policy is served from now on."""
        if not isinstance(self._adapters, AdapterSet):
            self._weight_memory.changed()
        self._engine.reset_prefix_cache()

    def _layout(self, tensors: Tensors) -> EngineLayout:
        rollout = self._rollout
        sizes = rollout.tensor_parallel, rollout.data_parallel, rollout.expert_parallel
        return EngineLayout(self._architecture, *sizes, tensors)

    def score(self, tokens: Sequence[np.ndarray], *, temperature: float | None = None) -> list[np.ndarray]:
        """See RolloutEngine; nothing of it stays in the prefix cache.

        Raises: RuntimeError while the KV cache is released or samples are being generated; ValueError for fewer than 2
        tokens or max_length of them.
        """
        self._check_in_memory("score()")
        if self._engine.get_num_unfinished_requests():
            raise RuntimeError("score() while samples are being generated")
        wrong = next((len(row) for row in tokens if not 2 <= len(row) < self._max_length), None)
        if wrong is not None:
            raise ValueError(f"score() takes 2 to {self._max_length - 1} tokens, not {wrong}")
        rows = score(self._engine, tokens, self._rollout.temperature if temperature is None else temperature)
        self._engine.reset_prefix_cache()
        return rows

    @property
    def description(self) -> str:
        """See RolloutEngine."""
        if self._adapters is None:
            return self._plan.line()
        how = "merged into the weights" if isinstance(self._adapters, MergedAdapters) else "beside the weights"
        return f"{self._plan.line()}; adapters {how}"

    @property
    def survival(self) -> Survival | None:
        """See RolloutEngine."""
        return self._adapters.survival if isinstance(self._adapters, MergedAdapters) else None

    def set_noise(self, noise: Noise) -> None:
        """See RolloutEngine; cached prefixes computed under other noise are forgotten."""
        self._noise.set(noise)
        self._engine.reset_prefix_cache()

    def lendable_experts(self) -> list[StoredExperts]:
        """See RolloutEngine; none where adapters, or trained weights, are written into the engine's."""
        return self._lending.experts()

    def lend(self, nbytes: Mapping[str, int]) -> None:
        """See RolloutEngine."""
        self._lending.lend(nbytes)

    def release_kv_cache(self) -> int:
        """See RolloutEngine. Raises: RuntimeError while samples are being generated."""
        if self._engine.get_num_unfinished_requests():
            raise RuntimeError("release_kv_cache() while samples are being generated")
        self._engine.reset_prefix_cache()
        return self._kv_cache.release()

    def restore_kv_cache(self) -> None:
        """See RolloutEngine."""
        self._kv_cache.restore()

    def release_weights(self, store: ByteStore | None) -> int:
        """See RolloutEngine. Raises: RuntimeError while samples are being generated."""
        if self._engine.get_num_unfinished_requests():
            raise RuntimeError("release_weights() while samples are being generated")
        return self._weight_memory.release(store, keep=self._lending.storages())

    def restore_weights(self) -> None:
        """See RolloutEngine. Raises: RuntimeError when they were given up."""
        self._weight_memory.restore()

    @property
    def model(self) -> torch.nn.Module:
        """vLLM's model on this rank."""
        return model_runner(self._engine).model

    def held_bytes(self) -> dict[str, int]:
        """Bytes of this rank's weights (its shard, as packed) but those lent, of these, of adapters and KV cache."""
        shared, adapters = self._lending.nbytes, 0 if self._adapters is None else self._adapters.nbytes
        weights = {"weights": self._weight_memory.nbytes - shared, "shared": shared}
        return {**weights, "adapters": adapters, "kv_cache": self._kv_cache.nbytes}


@dataclass(frozen=True)
class _Served:
    """A target whose end the engine hears of."""

    target: AdapterSet | MergedAdapters | WeightTarget
    finished: Callable[[], None]

    @property
    def locals(self) -> dict[str, tuple[int, ...]]:
        return self.target.locals

    def write(self, local: str) -> torch.Tensor:
        return self.target.write(local)

    def complete(self, local: str) -> None:
        self.target.complete(local)

    def finish(self) -> int:
        written = self.target.finish()
        self.finished()
        return written


def sample_seed(seed: int, index: int, done: int = 0) -> int:
    """The seed of sample `index` of a group that has `done` tokens: hashed, so that neighbouring seeds share no sample.

    One that goes on must not draw the numbers of its beginning again.
    """
    text = f"{seed}:{index}:{done}" if done else f"{seed}:{index}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def end_of_sequence_tokens(folder: Path) -> list[int]:
    """Token ids that end a response, from generation_config.json or else config.json."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        found = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
        if found is not None:
            return found if isinstance(found, list) else [found]
    return []


@contextlib.contextmanager
def _process_state_kept() -> Iterator[None]:
    """Undo what constructing vLLM does to its process: it seeds every generator and disables set_num_threads.

    On CPU it also takes streams and events of any card away from torch, which a trainer on another device needs.
    """
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    set_num_threads = torch.set_num_threads
    of_card = ("Event", "Stream", "stream", "set_stream", "current_stream") if torch.cuda.is_available() else ()
    kept = {name: getattr(torch.cuda, name) for name in of_card}
    try:
        yield
    finally:
        torch.set_num_threads = set_num_threads
        for name, function in kept.items():
            setattr(torch.cuda, name, function)
        torch.set_rng_state(torch_state)
        np.random.set_state(numpy_state)
        random.setstate(python_state)
