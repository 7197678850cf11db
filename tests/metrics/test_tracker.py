import json
import math

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from qerl_rl.config.schema import TrackConfig
from qerl_rl.metrics.plot import plot_run
from qerl_rl.metrics.tracker import Tracker, read_metrics


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def scalars(folder, name):
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_each_step_is_one_line_on_disk_at_once(tmp_path):
    tracker = Tracker(tmp_path / "run", TrackConfig())
    tracker.log(1, {"reward/mean": np.float32(0.5), "tokens": 7, "note": "first", "loss": torch.tensor(0.25)})
    assert lines_of(tracker.metrics_path) == [
        {"step": 1, "reward/mean": 0.5, "tokens": 7, "note": "first", "loss": 0.25}
    ]
    tracker.log(2, {"step": 2, "entropy": 1.5})
    assert [entry["step"] for entry in lines_of(tracker.metrics_path)] == [1, 2]
    assert tracker.history == lines_of(tracker.metrics_path)
    tracker.close()


def test_numbers_that_are_not_finite_become_null_and_reach_tensorboard_not_at_all(tmp_path):
    with Tracker(tmp_path, TrackConfig()) as tracker:
        tracker.log(1, {"a": math.nan, "b": -math.inf, "c": np.float64("inf"), "d": 1.0})
    assert lines_of(tracker.metrics_path) == [{"step": 1, "a": None, "b": None, "c": None, "d": 1.0}]
    events = EventAccumulator(str(tracker.tensorboard_path))
    events.Reload()
    assert events.Tags()["scalars"] == ["d"]


def test_tensorboard_shows_what_metrics_jsonl_has(tmp_path):
    with Tracker(tmp_path, TrackConfig()) as tracker:
        for step in range(1, 6):
            tracker.log(step, {"reward/mean": step / 8, "note": "text"})
    assert scalars(tracker.tensorboard_path, "reward/mean") == [(step, step / 8) for step in range(1, 6)]


def test_samples_keep_text_as_it_is(tmp_path):
    with Tracker(tmp_path, TrackConfig()) as tracker:
        tracker.sample(3, {"prompt": "größer\n?", "response": "日本", "reward": np.float32(1.0), "group": 2})
    assert "日本" in tracker.samples_path.read_text(encoding="utf-8")
    assert lines_of(tracker.samples_path) == [
        {"step": 3, "prompt": "größer\n?", "response": "日本", "reward": 1.0, "group": 2}
    ]


def test_what_is_switched_off_is_not_written(tmp_path):
    with Tracker(tmp_path, TrackConfig(tensorboard=False, samples=False)) as tracker:
        tracker.log(1, {"a": 1.0})
        tracker.sample(1, {"prompt": "p"})
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_resumed_run_drops_the_steps_it_will_repeat(tmp_path):
    with Tracker(tmp_path, TrackConfig()) as tracker:
        for step in range(1, 6):
            tracker.log(step, {"a": float(step)})
            tracker.sample(step, {"response": str(step)})
    with tracker.metrics_path.open("a") as file:
        file.write('{"step": 6, "a": ')  # killed in the middle of a write
    with Tracker(tmp_path, TrackConfig(), first_step=4) as resumed:
        assert [entry["step"] for entry in resumed.history] == [1, 2, 3]
        for step in range(4, 7):
            resumed.log(step, {"a": 10.0 * step})
    expected = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0), (5, 50.0), (6, 60.0)]
    assert [(entry["step"], entry["a"]) for entry in read_metrics(resumed.metrics_path)] == expected
    assert [entry["response"] for entry in read_metrics(resumed.samples_path)] == ["1", "2", "3"]
    assert scalars(resumed.tensorboard_path, "a") == expected


def test_a_new_run_in_an_old_folder_starts_anew(tmp_path):
    for value in (1.0, 2.0):
        with Tracker(tmp_path, TrackConfig()) as tracker:
            tracker.log(1, {"a": value})
    assert read_metrics(tracker.metrics_path) == [{"step": 1, "a": 2.0}]
    assert scalars(tracker.tensorboard_path, "a") == [(1, 2.0)]


def drawn(tmp_path, entries):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return imread(plot_run(path, tmp_path / "reward.png", title="run"))[..., :3]


def rows_of_colour(image, colour):
    """The mean row of the pixels of a colour in the left and in the right third, counted from the top."""
    rows, columns = np.nonzero(np.abs(image - np.array(colour)).max(axis=-1) < 0.1)
    third = image.shape[1] // 3
    return rows[columns < third].mean(), rows[columns > 2 * third].mean()


@pytest.mark.parametrize("steps", [2, 30, 300])
def test_the_picture_shows_a_rising_reward_above_a_falling_entropy(tmp_path, steps):
    entries = [
        {"step": step, "reward/mean": step / steps, "reward/std": 0.3, "entropy": 2.0 - step / steps}
        for step in range(1, steps + 1)
    ]
    image = drawn(tmp_path, entries)
    reward_left, reward_right = rows_of_colour(image[int(0.12 * len(image)) :], (0.12, 0.37, 0.66))
    entropy_left, entropy_right = rows_of_colour(image, (0.75, 0.35, 0.11))
    assert reward_right < reward_left < entropy_left < entropy_right


def test_the_picture_of_pairs_shows_margins_above_a_rising_accuracy(tmp_path):
    entries = [
        {
            "step": step,
            "preference/reward_chosen": 0.1 * step,
            "preference/reward_rejected": -0.1 * step,
            "preference/margin": 0.2 * step,
            "preference/accuracy": 0.5 + step / 60,
        }
        for step in range(1, 31)
    ]
    # Below the legend, which has samples of the colours.
    image = drawn(tmp_path, entries)[:, 250:]
    chosen, margin, rejected, accuracy = (
        rows_of_colour(image, colour)
        for colour in ((0.23, 0.56, 0.3), (0.12, 0.37, 0.66), (0.69, 0.23, 0.28), (0.75, 0.35, 0.11))
    )
    assert margin[1] < chosen[1] < chosen[0] < rejected[1] < accuracy[1] < accuracy[0]
    assert rejected[0] < rejected[1]


def test_the_picture_survives_gaps_single_steps_and_missing_columns(tmp_path):
    drawn(tmp_path, [{"step": 1, "reward/mean": 0.5, "reward/std": None, "entropy": 1.0}])
    drawn(tmp_path, [{"step": step, "reward/mean": None if step % 3 else 0.5} for step in range(1, 40)])
    with pytest.raises(ValueError, match="no step"):
        drawn(tmp_path, [])
