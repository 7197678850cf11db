"""Rollouts carried over and one step ahead: whole runs of their launch files, real engines, two workers."""

import numpy as np
import pytest

from qerl_rl.config.schema import Config, RolloutConfig, RolloutCorrectionConfig
from tests.trainer.runs import launch, rows, tensors, untimed
from trainer.run import off_policy_lines

STEPS, GROUPS, SIZE, MORE = 8, 8, 4, 4
SIZES = [
    f"run.steps={STEPS}",
    "checkpoint.every=4",
    "checkpoint.keep=9",
    "track.plot=false",
    "eval.every=3",
    "eval.prompts=4",
    f"algorithm.prompts_per_step={GROUPS}",
    f"algorithm.samples_per_prompt={SIZE}",
    "algorithm.prompts_per_mini_batch=4",
    "train.learning_rate=4e-3",
    "rollout.max_response_tokens=12",
    "reward.function=tests.trainer.reward_functions.share_of_digits",
]
WAYS = {
    # Prompts begin a few at a time, so that their samples do not end together and some are cut in the middle.
    "partial_rollout": [
        *(f"rollout.carry_prompts={MORE}", "rollout.max_sequences=10", "rollout.max_batched_tokens=64"),
        *("router_replay.mode=R3", "rollout_correction.rollout_is_batch_normalize=true"),
    ],
    "one_step_off": [
        *("noise.enabled=true", "noise.stages=2", "lora.in_rollout=merge"),
        *("rollout_correction.rollout_rs=token_k2,seq_mean_k3", "rollout_correction.rollout_rs_threshold=4.5,1"),
    ],
}


def run(way, model, folder, *arguments):
    return launch(f"grpo_{way}_quickstart_cpu.yaml", model, folder, *SIZES, *WAYS[way], *arguments)


@pytest.fixture(scope="module")
def straight(tiny_w8a8, tmp_path_factory):
    """`straight(way)` -> the folder of a run without a break, made once."""
    made = {}

    def make(way):
        if way not in made:
            folder = tmp_path_factory.mktemp(way)
            run(way, tiny_w8a8("qwen3_moe"), folder)
            made[way] = folder
        return made[way]

    return make


@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_run_equals_one_without_a_break_bit_for_bit(way, straight, tiny_w8a8, tmp_path):
    """The samples that wait for step 5 are in the checkpoint of step 4."""
    expected = straight(way)
    middle = expected / "checkpoints" / "step_00000004"
    assert (middle / "dock").is_file()
    printed = run(way, tiny_w8a8("qwen3_moe"), tmp_path, "--resume", str(middle))
    assert "resume: after step 4" in printed
    how = "merged into" if way == "one_step_off" else "beside"
    assert f"rollout engine: w8a8: native, int8 products; adapters {how} the weights" in printed
    for name in ("metrics.jsonl", "samples.jsonl"):
        later = [row for row in untimed(expected / name) if row["step"] > 4]
        assert untimed(tmp_path / name) == later
    found, wanted = tensors(tmp_path, STEPS), tensors(expected, STEPS)
    assert found.keys() == wanted.keys()
    assert all(found[name].equal(tensor) for name, tensor in wanted.items())


def test_updates_survive_in_merged_weights(straight):
    """No update yet has nothing to lose; later ones are rounded without bias, in about a million weights."""
    survival = [row["swap/update_survival"] for row in rows(straight("one_step_off") / "metrics.jsonl")]
    assert survival[0] == 1.0
    assert survival[1:] == pytest.approx([1.0] * (STEPS - 1), abs=0.1)
    assert survival[1] != 1.0


@pytest.mark.parametrize("way", WAYS)
def test_grpo_earns_more(way, straight):
    # Measured gains of the seeds 1, 2, 3: carried over 0.37, 0.36, 0.15; one step ahead 0.25, 0.23, 0.17.
    rewards = [row["reward/mean"] for row in rows(straight(way) / "metrics.jsonl")]
    assert np.mean(rewards[-2:]) > np.mean(rewards[:2]) + 0.1


def test_carried_samples_are_counted_once_and_grow_no_older_than_they_may(straight):
    steps = rows(straight("partial_rollout") / "metrics.jsonl")
    assert steps[0]["rollout/age_max"] == 0
    assert max(step["rollout/age_max"] for step in steps) in (1, 2)
    assert all(0 <= step["rollout/age_mean"] <= step["rollout/age_max"] for step in steps)
    assert any(0 < step["rollout/carried"] <= MORE * SIZE for step in steps)
    learned = [step["response/length_mean"] * GROUPS * SIZE for step in steps]
    drawn = [step["rollout/tokens"] for step in steps]
    # What was drawn and not learned from is left in the dock at the end: at most all that is carried, whole.
    assert 0 <= sum(drawn) - sum(learned) <= MORE * SIZE * 12
    assert all(step["rollout_correction/ess"] <= 1 + 1e-6 for step in steps)
    assert steps[3]["rollout_correction/ess"] < 1
    # What the updates divide their weights by is the mean that was taken of them with the old log-probs.
    for step in steps:
        mean = step["rollout_correction/is_mean"]
        assert step["rollout_correction/is_batch_norm_factor"] == pytest.approx(mean, rel=1e-6)


def test_every_token_that_a_step_learns_from_goes_where_the_engine_sent_it(straight):
    """Also those of samples that were finished in an earlier step, which the engine does not see again."""
    steps = rows(straight("partial_rollout") / "metrics.jsonl")
    assert any(step["rollout/age_max"] > 0 for step in steps)
    assert all(step["router_replay/missing"] == 0.0 for step in steps)
    assert all(0.0 < step["router_replay/changed"] < 0.2 for step in steps)


def test_one_step_ahead_keeps_both_engines_in_memory_and_still_evaluates(straight):
    folder = straight("one_step_off")
    steps, ledger = rows(folder / "metrics.jsonl"), rows(folder / "swaps.jsonl")
    assert [step["step"] for step in steps if "eval/pass@1" in step] == [3, 6]
    assert {row["phase"] for row in ledger} == {"rollout"}
    for row in ledger:
        held = row["held_bytes"]
        assert min(held["train/parameters"], held["train/gradients"], held["rollout/kv_cache"]) > 0
        assert row["released_bytes"] == {}
    # The first step learns from its own policy, later ones from the one before: further from what sampled.
    assert min(step["rollout_vs_train/k3_kl"] for step in steps[1:]) > 0
    assert steps[4]["rollout_vs_train/k3_kl"] > 2 * steps[0]["rollout_vs_train/k3_kl"]
    for step in steps:
        tokens, samples = (step[f"rollout_correction/{name}"] for name in ("rs_masked", "rs_sequences_masked"))
        assert 0 <= max(tokens, samples) < 0.5
        assert (tokens == 0) == (samples == 0)


def test_an_uncorrected_run_says_so_and_names_the_key():
    def lines(correction, **rollout):
        return off_policy_lines(Config(rollout=RolloutConfig(**rollout), rollout_correction=correction))

    none = RolloutCorrectionConfig()
    assert lines(none) == []
    (carried,), (ahead,) = lines(none, carry_prompts=3), lines(none, ahead=True)
    assert carried.startswith("rollout.carry_prompts=3")
    assert ahead.startswith("rollout.ahead=true")
    assert "rollout_correction.rollout_is" in carried
    for correction in (RolloutCorrectionConfig(rollout_is="token"), RolloutCorrectionConfig(bypass_mode=True)):
        assert lines(correction, ahead=True) == []
