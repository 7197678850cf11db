"""Ray actors of a run and the group that places and calls them."""

from workers.actor_hybrid import ActorHybridWorker
from workers.group import Pending, WorkerError, WorkerGroup
from workers.reward import RewardWorker

__all__ = ["ActorHybridWorker", "Pending", "RewardWorker", "WorkerError", "WorkerGroup"]
