"""Places workers on the cluster, calls all of them, and ends them."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from qerl_rl.config.schema import Config
from qerl_rl.platform.determinism import deterministic_variables
from workers.actor_hybrid import ActorHybridWorker
from workers.reward import RewardWorker

POLL_SECONDS = 0.5
"""How often a waiting caller looks at its progress."""


class WorkerError(RuntimeError):
    """A worker raised, died, or passed its deadline; the message says which, in what, and why."""


class Pending:
    """Calls under way on workers; `wait` gives their results in order."""

    def __init__(self, calls: list[Any], names: list[str]) -> None:
        self._calls, self._names = calls, names

    def wait(self, *, timeout_s: float, on_wait: Callable[[], None] | None = None) -> list[Any]:
        """Results of all calls. The first failure ends the wait at once: its peers may be stuck in a collective.

        Raises: WorkerError on a failure, or when `timeout_s` seconds pass.
        """
        deadline = time.monotonic() + timeout_s
        results: dict[int, Any] = {}
        waiting = {call: index for index, call in enumerate(self._calls)}
        while waiting:
            done, _ = ray.wait(list(waiting), num_returns=1, timeout=POLL_SECONDS)
            for call in done:
                index = waiting.pop(call)
                results[index] = self._result(call, index)
            if on_wait is not None:
                on_wait()
            if waiting and time.monotonic() > deadline:
                names = ", ".join(self._names[index] for index in waiting.values())
                raise WorkerError(f"waited {timeout_s:.0f} s for {names}.")
        return [results[index] for index in range(len(self._calls))]

    def _result(self, call: Any, index: int) -> Any:
        try:
            return ray.get(call)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause if getattr(error, "cause", None) is not None else error
            trace = re.sub(r"\x1b\[\d+m", "", str(error))
            raise WorkerError(f"{self._names[index]} failed: {type(cause).__name__}: {cause}\n{trace}") from None
        except ray.exceptions.RayError as error:
            reason = " ".join(str(error).split())
            raise WorkerError(f"{self._names[index]} died: {reason}") from None


class WorkerGroup:
    """The `ActorHybridWorker` of every card and the reward worker, placed by one placement group.

    `with WorkerGroup(config) as workers:` starts them, and ends their processes on the way out, whatever happened.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.actors: list[ActorHandle] = []
        self.places: list[dict[str, Any]] = []
        self._placement: Any = None

    def __enter__(self) -> WorkerGroup:
        try:
            self._place()
            self._start()
        except BaseException:
            self.shutdown()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()

    def _place(self) -> None:
        cluster = self.config.cluster
        bundles = [{"CPU": float(cluster.cpus_per_worker)}] * cluster.workers + [{"CPU": 0.0, "memory": 1.0}]
        self._placement = placement_group(bundles, strategy=cluster.placement)
        ready, _ = ray.wait([self._placement.ready()], timeout=self.config.fault.start_timeout_s)
        if not ready:
            has = ray.cluster_resources().get("CPU", 0)
            raise WorkerError(
                f"{cluster.workers} workers x {cluster.cpus_per_worker} CPUs found no place within "
                f"fault.start_timeout_s={self.config.fault.start_timeout_s:.0f} s; the cluster has {has:.0f} CPUs."
            )

    def _start(self) -> None:
        cluster = self.config.cluster
        values = dataclasses.asdict(with_absolute_paths(self.config))
        environment = worker_environment(self.config)
        for rank in range(cluster.workers):
            options = self._options(rank, float(cluster.cpus_per_worker), environment)
            self.actors.append(ray.remote(ActorHybridWorker).options(**options).remote(values, rank, cluster.workers))
        options = self._options(cluster.workers, 0.0, environment)
        self.reward = ray.remote(RewardWorker).options(**options).remote(values)
        timeout_s = self.config.fault.start_timeout_s
        address, port = self.call_one(0, "reserve_address").wait(timeout_s=timeout_s)[0]
        places = local_ranks(self.call("node").wait(timeout_s=timeout_s))
        self.places = self.call_each("start", [(address, port, place) for place in places]).wait(timeout_s=timeout_s)

    def _options(self, bundle: int, cpus: float, environment: dict[str, str]) -> dict[str, Any]:
        strategy = PlacementGroupSchedulingStrategy(self._placement, placement_group_bundle_index=bundle)
        return {"num_cpus": cpus, "scheduling_strategy": strategy, "runtime_env": {"env_vars": environment}}

    def call(self, method: str, *arguments: Any) -> Pending:
        """Call `method(*arguments)` on every worker."""
        return self.call_each(method, [arguments] * len(self.actors))

    def call_each(self, method: str, arguments: Sequence[Sequence[Any]]) -> Pending:
        """Call `method` on every worker with its own arguments, in rank order."""
        calls = [getattr(actor, method).remote(*own) for actor, own in zip(self.actors, arguments, strict=True)]
        return Pending(calls, [f"worker {rank} in {method}" for rank in range(len(calls))])

    def call_one(self, rank: int, method: str, *arguments: Any) -> Pending:
        """Call `method` on one worker (only for what uses no collective)."""
        return Pending([getattr(self.actors[rank], method).remote(*arguments)], [f"worker {rank} in {method}"])

    def call_reward(self, method: str, *arguments: Any) -> Pending:
        """Call `method` on the reward worker."""
        return Pending([getattr(self.reward, method).remote(*arguments)], [f"the reward worker in {method}"])

    def by_data_rank(self, layout: str, shares: Sequence[Any]) -> list[Any]:
        """The share of each worker, in rank order: `shares` has one a data-parallel rank of `train` or `rollout`."""
        return [shares[place[f"{layout}_data_rank"]] for place in self.places]

    def shutdown(self) -> None:
        """End every worker process and give its place back."""
        for actor in [*self.actors, getattr(self, "reward", None)]:
            if actor is not None:
                ray.kill(actor)
        self.actors = []
        if self._placement is not None:
            remove_placement_group(self._placement)
            self._placement = None


def local_ranks(nodes: Sequence[str]) -> list[int]:
    """Of each rank, its number among the ranks of its machine: which card is its own."""
    return [nodes[:rank].count(node) for rank, node in enumerate(nodes)]


def with_absolute_paths(config: Config) -> Config:
    """The configuration for a process whose working folder may be another."""

    def absolute(section: Any, key: str) -> Any:
        path = getattr(section, key)
        return dataclasses.replace(section, **{key: str(Path(path).resolve()) if path else ""})

    return dataclasses.replace(
        config,
        run=absolute(config.run, "output_dir"),
        model=absolute(config.model, "path"),
        critic=absolute(config.critic, "path"),
        reward_model=absolute(config.reward_model, "path"),
    )


def worker_environment(config: Config) -> dict[str, str]:
    """Environment of a worker process, set before it imports anything."""
    threads = str(config.cluster.threads_per_worker)
    fixed = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    if not config.cluster.address:
        # One machine: the loopback interface is always there, whatever its host name resolves to.
        fixed["GLOO_SOCKET_IFNAME"] = "lo"
    if config.run.deterministic:
        fixed |= deterministic_variables(config.train.device)
    return fixed | config.cluster.environment
