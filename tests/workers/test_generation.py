"""What the worker asks of the engine for samples that were carried over, and how a background error comes out."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from qerl_rl.config.schema import Config, RolloutConfig
from qerl_rl.rollout.engine import GroupOutput
from qerl_rl.train.background import BackgroundJob
from transfer_dock import Jagged, SampleKey
from workers.actor_hybrid import ActorHybridWorker
from workers.batches import ages_of, group_requests, put_responses, to_samples

KEYS = [SampleKey(3, group, index) for group in (0, 5) for index in (0, 1)]


def lease(ages):
    prompts = [[7, 8], [7, 8], [9], [9]]
    partials = [[1, 2], [], [], [4]]
    columns = {
        "prompts": Jagged.from_rows([np.array(row, np.int32) for row in prompts]),
        "partial_responses": Jagged.from_rows([np.array(row, np.int32) for row in partials]),
        "partial_log_probs": Jagged.from_rows([-0.5 * np.array(row, np.float32) for row in partials]),
        "ages": np.array(ages, np.int32),
    }
    return SimpleNamespace(keys=KEYS, columns=columns)


def test_carried_groups_go_on_from_their_partial_responses_and_old_ones_must_finish():
    requests, keys = group_requests(lease([0, 0, 2, 2]), 1, RolloutConfig(carry_prompts=1, carry_max_age=2))
    assert keys == {0: KEYS[:2], 5: KEYS[2:]}
    assert [(request.group, request.samples, request.must_finish) for request in requests] == [
        (0, 2, False),
        (5, 2, True),
    ]
    assert [request.prompt_tokens.tolist() for request in requests] == [[7, 8], [9]]
    assert [[p.tokens.tolist() for p in request.partials] for request in requests] == [[[1, 2], []], [[], [4]]]
    assert [[p.log_probs.tolist() for p in request.partials] for request in requests] == [
        [[-0.5, -1.0], []],
        [[], [-2.0]],
    ]
    assert ages_of(lease([0, 0, 2, 2]), [KEYS[2]]) == [2]
    fresh, _ = group_requests(lease([0, 0, 0, 0]), 1, RolloutConfig())
    assert [(len(request.partials), request.must_finish) for request in fresh] == [(0, False)] * 2
    # The same group of another step, as which it goes on, draws other numbers.
    assert [request.seed for request in fresh] == [request.seed for request in requests]
    moved = SimpleNamespace(keys=[key._replace(step=4) for key in KEYS], columns=lease([0] * 4).columns)
    assert group_requests(moved, 1, RolloutConfig())[0][0].seed != fresh[0].seed


def test_routed_experts_go_into_the_dock_and_out_to_the_trainer():
    rows = [np.full((length, 2, 2), length, np.uint8) for length in (4, 5)]
    output = GroupOutput(0, [np.array([3, 4, 5]), np.array([3, 4, 5, 2])], [np.zeros(3), np.zeros(4)], ["stop"] * 2)
    written = {}
    dock = SimpleNamespace(put=lambda columns, keys: written.update(columns))
    put_responses(dock, KEYS[:2], output)
    assert not [name for name in written if "experts" in name]
    output = dataclasses.replace(output, routed_experts=rows)
    put_responses(dock, KEYS[:2], output)
    prompts = Jagged.from_rows([np.array([7, 8], np.int32)] * 2)
    batch = SimpleNamespace(keys=KEYS[:2], columns={**written, "prompts": prompts})
    samples = to_samples(batch)
    assert [own.tolist() for own in samples.routed_experts] == [own.tolist() for own in rows]
    del batch.columns["routed_experts"]
    assert to_samples(batch).routed_experts is None
    put_responses(dock, KEYS[:2], dataclasses.replace(output, left=True, routed_experts=[rows[0], rows[0][:0]]))
    assert written["left_routed_experts"].lengths.tolist() == [4, 0]
    partial = lease([0] * 4)
    partial.columns["partial_routed_experts"] = Jagged.from_rows([rows[0], rows[0][:0]] * 2)
    requests, _ = group_requests(partial, 1, RolloutConfig(carry_prompts=1))
    assert [len(own.routed_experts) for own in requests[0].partials] == [4, 0]


class BrokenEngine:
    def generate(self, requests, quota=None):
        raise FloatingPointError("logits are nan")
        yield


def test_an_error_in_the_background_surfaces_at_the_finish_with_its_traceback():
    worker = ActorHybridWorker(dataclasses.asdict(Config()), rank=0, world_size=1)
    noises = []
    worker.rollout, worker.swap = BrokenEngine(), SimpleNamespace(set_noise=noises.append)
    worker._generation = BackgroundJob("generation")
    worker.start_generation(None, None, 4)
    with pytest.raises(FloatingPointError, match="logits are nan") as caught:
        worker.finish_generation()
    assert caught.traceback[-1].path.name == "test_generation.py"
    assert caught.traceback[-1].name == "generate"
    assert noises == [4]
    with pytest.raises(RuntimeError, match="without start_generation"):
        worker.finish_generation()
