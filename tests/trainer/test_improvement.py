"""DAPO and DPO get better at what they are after, on the quickstart's model, within seconds.

GRPO does in test_rollouts.py, PPO in test_ppo.py.
"""

import numpy as np


def gain(steps, name):
    """The mean of the last four steps over that of the first four."""
    values = np.array([step[name] for step in steps])
    return values[-4:].mean() - values[:4].mean()


def test_dapo_earns_more_and_learns_from_groups_with_signal(trained):
    steps = trained("dapo_quickstart_cpu.yaml")
    # Of all that was sampled: what is learned from has been chosen.
    assert gain(steps, "sampling/reward_mean") > 0.03
    assert all(16 < step["sampling/groups"] <= 48 for step in steps)
    assert sum(step["reward/groups_without_signal"] for step in steps) < 0.1 * len(steps)
    assert all(-1.0 < step["reward/overlong_mean"] <= 0.0 for step in steps)


def test_dpo_ranks_pairs_right_and_answers_held_out_sums_better(trained):
    steps = trained("dpo_quickstart_cpu.yaml", "run.steps=9", "eval.every=4")
    # Measured with seeds 1, 2 and 3: margin 0.43, 0.45, 0.43; accuracy 0.64, 0.50, 0.55; answers 0.087, 0.083, 0.073.
    assert gain(steps, "preference/margin") > 0.2
    assert steps[-1]["preference/accuracy"] > steps[0]["preference/accuracy"] + 0.2
    # After three updates and after seven.
    first, last = (step["eval/avg@8"] for step in steps if "eval/avg@8" in step)
    assert last > first + 0.02
