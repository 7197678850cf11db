"""Every algorithm gets better at what it is after, on the quickstart's model, within seconds."""

import numpy as np


def gain(steps, name):
    """The mean of the last four steps over that of the first four."""
    values = np.array([step[name] for step in steps])
    return values[-4:].mean() - values[:4].mean()


def test_grpo_earns_more(trained):
    sizes = ["run.steps=12", "algorithm.prompts_per_step=16", "algorithm.prompts_per_mini_batch=8"]
    steps = trained("quickstart_cpu.yaml", *sizes)
    assert gain(steps, "reward/mean") > 0.03


def test_dapo_earns_more_and_learns_from_groups_with_signal(trained):
    steps = trained("dapo_quickstart_cpu.yaml")
    # Of all that was sampled: what is learned from has been chosen.
    assert gain(steps, "sampling/reward_mean") > 0.03
    assert all(16 < step["sampling/groups"] <= 48 for step in steps)
    assert sum(step["reward/groups_without_signal"] for step in steps) < 0.1 * len(steps)
    assert all(-1.0 < step["reward/overlong_mean"] <= 0.0 for step in steps)
