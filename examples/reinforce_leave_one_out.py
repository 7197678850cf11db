"""REINFORCE with a leave-one-out baseline and a reward of its own, as a loop of its own.

python -m examples.reinforce_leave_one_out configs/quickstart_cpu.yaml [section.key=value ...]
"""

import sys

import torch

from qerl_rl.algorithms.advantages import leave_one_out_advantages
from qerl_rl.config.loader import load_config
from trainer.preflight import preflight
from trainer.run import connected
from trainer.shares import even_rows, group_rows
from transfer_dock import SampleKey, TransferDock
from workers import WorkerGroup

NUMBERS = ("rollout_log_probs", "truncated", "old_log_probs", "reference_log_probs", "advantages")
COLUMNS = {"prompts": "int32", "responses": "int32", "answers": "str", **dict.fromkeys(NUMBERS, "float32")}
CONSUMERS = {"generate": ["prompts"], "score": ["responses", "answers"]}
CONSUMERS["log_probs"] = ["prompts", "responses", "rollout_log_probs"]
CONSUMERS["update"] = ["prompts", "responses", "old_log_probs", "reference_log_probs", "advantages"]


def reward(response, answer):
    """The share of right characters, with a price on each character that is too many."""
    return sum(map(str.__eq__, response, answer)) / len(answer) - 0.1 * max(len(response) - len(answer), 0)


def train_step(plan, workers, dock, step):
    config, size, limit = plan.config, plan.config.algorithm.samples_per_prompt, plan.config.fault.train_timeout_s
    prompts = [prompt for prompt in plan.prompts.next(config.algorithm.prompts_per_step) for _ in range(size)]
    keys = [SampleKey(step, *divmod(row, size)) for row in range(len(prompts))]
    dock.put({"prompts": [p.tokens for p in prompts], "answers": [p.answer for p in prompts]}, keys)

    def on_ranks(stage, layout, rows, arguments):
        shares = workers.by_data_rank(layout, dock.get(stage, len(keys)).split(rows))
        workers.call_each(stage, [arguments(share) for share in shares]).wait(timeout_s=limit)

    workers.call("swap_to_rollout", step).wait(timeout_s=limit)
    on_ranks("generate", "rollout", group_rows(keys, config.rollout.data_parallel), lambda share: (dock, share))
    batch = dock.get("score", len(keys))
    texts = plan.tokenizer.batch_decode(batch.columns["responses"].rows(), skip_special_tokens=True)
    rewards = torch.tensor([reward(*pair) for pair in zip(texts, batch.columns["answers"], strict=True)])
    dock.put({"advantages": leave_one_out_advantages(rewards, torch.tensor([key.group for key in keys]))}, keys)
    workers.call("swap_to_train").wait(timeout_s=limit)
    rows = even_rows(len(keys), config.train_data_parallel)
    on_ranks("log_probs", "train", rows, lambda share: (dock, share))
    on_ranks("update", "train", rows, lambda share: ([share], step, 0.0))
    dock.close_step(step, carry_unfinished=False)
    return f"step {step}: reward {rewards.mean():.3f}"


if __name__ == "__main__":
    plan = preflight(load_config(sys.argv[1], sys.argv[2:]))
    options = {"samples_per_group": plan.config.algorithm.samples_per_prompt, "capacity_bytes": 1 << 28}
    options |= {"columns": COLUMNS, "consumers": CONSUMERS}
    with connected(plan.config.cluster), WorkerGroup(plan.config) as workers, TransferDock.create(**options) as dock:
        for step in range(1, plan.config.run.steps + 1):
            print(train_step(plan, workers, dock, step), flush=True)
