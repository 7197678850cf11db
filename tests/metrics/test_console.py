import io
import os
import pty
import re
import threading

from rich.console import Console

from qerl_rl.metrics.console import RunDisplay
from qerl_rl.metrics.summary import format_bytes, format_duration, summary_table


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def step_metrics(step: int, seconds: float = 10.0) -> dict[str, float]:
    return {
        "step": step,
        "reward/mean": step / 20,
        "reward/std": 0.5,
        "entropy": 2.0 - step / 20,
        "kl/reference": step / 1000,
        "time/rollout_s": 0.6 * seconds,
        "time/swap_s": 0.0,
        "time/update_s": 0.3 * seconds,
        "time/total_s": seconds,
        "tokens_per_s/rollout": 1000.0 + step,
        "memory/peak_bytes": 2.0**30 * step,
    }


def display(steps=20, mode="auto", **options):
    stream, clock = io.StringIO(), Clock()
    return RunDisplay(steps, 64, mode, stream=stream, clock=clock, **options), stream, clock


def test_a_finished_step_is_one_line():
    shown, stream, _ = display()
    shown.finish_step(3, step_metrics(3))
    assert stream.getvalue() == (
        "step  3/20  reward 0.150 ± 0.500  entropy 1.850  kl 0.0030  10.0 s (rollout 6.0, update 3.0)  ETA 2:50\n"
    )


def pair_metrics(step: int) -> dict[str, float]:
    names = {"preference/margin": step / 10, "preference/accuracy": 0.5 + step / 40, "preference/loss": 0.7 - step / 50}
    return {"step": step, **names, "time/update_s": 4.0, "time/total_s": 5.0, "tokens_per_s/train": 10.0}


def test_a_step_from_pairs_shows_what_it_has():
    shown, stream, _ = display()
    shown.finish_step(3, pair_metrics(3))
    assert stream.getvalue() == "step  3/20  margin 0.300  accuracy 0.575  loss 0.640  5.0 s (update 4.0)  ETA 1:25\n"


def test_a_step_shows_what_its_algorithm_adds():
    shown, stream, _ = display()
    more = {"sampling/reward_mean": 0.1, "critic/explained_variance": 0.25, "eval/avg@8": 0.5, "eval/reward_mean": 0.4}
    shown.finish_step(3, {**step_metrics(3), **more})
    shown.finish_step(4, {**pair_metrics(4), "eval/pass@1": 0.75})
    first, second = stream.getvalue().splitlines()
    assert "reward 0.150 ± 0.500 (of all sampled 0.100)  entropy" in first
    assert "kl 0.0030  critic explains 0.25  avg@8 0.500  10.0 s" in first
    assert "loss 0.620  pass@1 0.750  5.0 s" in second


def test_missing_and_null_metrics_are_dashes():
    shown, stream, clock = display(steps=2)
    clock.now += 4
    shown.finish_step(1, {"reward/mean": None})
    assert stream.getvalue() == "step 1/2  reward - ± -  entropy -  kl -  4.0 s  ETA 0:04\n"


def test_eta_counts_down_inside_a_step_and_forgets_slow_first_steps():
    shown, stream, clock = display(steps=10)
    for step, seconds in enumerate([100.0, 10.0, 10.0, 10.0, 10.0, 10.0], start=1):
        clock.now += seconds
        shown.finish_step(step, step_metrics(step, seconds))
    assert stream.getvalue().splitlines()[0].endswith("ETA 15:00")
    assert stream.getvalue().splitlines()[-1].endswith("ETA 0:40")
    with shown.phase("rollout"):
        clock.now += 7
        shown.progress(32, 64)
    assert stream.getvalue().splitlines()[-1] == ("step  7/10  ... rollout 7 s, 32/64 samples, elapsed 2:37, ETA 0:33")


def test_progress_lines_come_at_most_every_five_seconds_and_name_the_inner_phase():
    shown, stream, clock = display(steps=2)
    with shown.phase("start"):
        for _ in range(12):
            clock.now += 1
            shown.show_progress()
    with shown.phase("rollout"):
        shown.progress(5, 64)
        clock.now += 4
        with shown.phase("eval"):
            shown.show_progress()
        shown.show_progress()
    clock.now += 60
    shown.show_progress()
    assert re.findall(r"\.\.\. (\w+ \d+ s(?:, \d+/\d+ samples)?)", stream.getvalue()) == [
        "start 5 s",
        "start 10 s",
        "eval 0 s",
    ]
    assert "ETA after the first step" in stream.getvalue()


def test_short_phases_print_nothing():
    shown, stream, clock = display()
    for name in ("swap", "rollout", "update"):
        with shown.phase(name):
            clock.now += 1
            shown.progress(64, 64)
    assert stream.getvalue() == ""


def test_quiet_prints_nothing_at_all():
    shown, stream, clock = display(mode="quiet")
    with shown, shown.phase("start"):
        clock.now += 60
        shown.progress(1, 2)
        shown.note("a note")
        shown.finish_step(1, step_metrics(1))
        shown.summary([step_metrics(1)], {"metrics": "metrics.jsonl"})
    assert stream.getvalue() == ""


def test_a_long_phase_without_any_call_still_shows_progress():
    reached = threading.Event()

    class Waker(io.StringIO):
        def write(self, text):
            if "start" in text:
                reached.set()
            return super().write(text)

    clock = Clock()
    with RunDisplay(5, 64, "lines", stream=Waker(), clock=clock) as shown, shown.phase("start"):
        clock.now += 6
        assert reached.wait(30)


def summary_text(history, paths, **options):
    stream = io.StringIO()
    table = summary_table(
        history, paths, steps=20, samples_per_step=64, **({"elapsed_s": 250.0, "phase_seconds": {}} | options)
    )
    Console(file=stream, width=120, force_terminal=False, color_system=None).print(table)
    return stream.getvalue()


def cell(text, label):
    (line,) = [line for line in text.splitlines() if line.startswith(f"│ {label} ")]
    return line.split("│")[2].strip()


def test_summary_compares_the_first_and_the_last_five_steps():
    text = summary_text([step_metrics(step) for step in range(1, 21)], {})
    assert cell(text, "steps") == "20 of 20 in 4:10, 64 samples each"
    assert cell(text, "reward") == "first 0.150, last 0.900 (+0.750; mean of 5 steps)"
    assert cell(text, "entropy") == "first 1.850, last 1.100 (-0.750; mean of 5 steps)"
    assert cell(text, "rollout speed") == "1,010 tokens/s, median of the steps"
    assert cell(text, "peak memory") == "20.00 GiB"
    assert "train speed" not in text


def test_summary_tells_how_the_engine_runs_and_what_merging_kept():
    history = [step_metrics(step) | {"swap/update_survival": 0.9 + 0.01 * step} for step in range(1, 21)]
    text = summary_text(history, {}, facts={"rollout engine": "mxfp4: dequantized"})
    assert cell(text, "rollout engine") == "mxfp4: dequantized"
    assert cell(text, "updates that merging kept") == "first 0.930, last 1.080 (+0.150; mean of 5 steps)"


def test_summary_of_pairs_has_rows_of_its_own():
    text = summary_text([pair_metrics(step) for step in range(1, 21)], {})
    assert cell(text, "margin of pairs") == "first 0.300, last 1.800 (+1.500; mean of 5 steps)"
    assert cell(text, "accuracy of pairs") == "first 0.575, last 0.950 (+0.375; mean of 5 steps)"
    assert "reward" not in text
    assert "rollout" not in text


def test_summary_compares_evaluations_of_the_steps_that_had_one():
    history = [step_metrics(step) | ({"eval/pass@1": step / 20} if step % 5 == 0 else {}) for step in range(1, 21)]
    text = summary_text(history, {})
    assert cell(text, "held-out pass@1") == "first 0.375, last 0.875 (+0.500; mean of 2 steps)"
    assert "critic" not in text


def test_summary_windows_never_overlap():
    text = summary_text([step_metrics(step) for step in range(1, 5)], {})
    assert "first 0.075, last 0.175" in cell(text, "reward")
    assert "mean of 2 steps" in cell(text, "reward")


def test_summary_shares_cover_the_whole_run():
    history = [step_metrics(step) for step in range(1, 21)]
    text = summary_text(history, {}, phase_seconds={"start": 30.0, "rollout": 120.0, "export": 0.1})
    found = re.findall(r"│ +(?:where the time went)? *│ (.+?)  +([\d.]+) s +(\d+) %", text)
    assert found == [
        ("rollout", "120.0", "48"),
        ("update", "60.0", "24"),
        ("start", "30.0", "12"),
        ("not in a phase", "39.9", "16"),
    ]


def test_summary_lists_what_was_written_and_folds_nothing():
    path = "/a/rather/long/folder/of/someone/outputs/quickstart-2026-11-22/metrics.jsonl"
    shown, stream, _ = display()
    with shown:
        shown.summary([step_metrics(1)], {"metrics": path, "HF export": "export/hf"})
    assert cell(stream.getvalue(), "metrics") == path
    assert cell(stream.getvalue(), "HF export") == "export/hf"


def test_summary_of_a_run_without_a_step():
    assert cell(summary_text([], {}), "steps") == "0 of 20 in 4:10, 64 samples each"


def test_durations_and_bytes_are_readable():
    assert [format_duration(seconds) for seconds in (0, 59.6, 75, 3675)] == ["0:00", "1:00", "1:15", "1:01:15"]
    assert [format_bytes(count) for count in (0, 1023, 2048, 3 * 2**30)] == ["0 B", "1023 B", "2.00 KiB", "3.00 GiB"]


def test_a_terminal_gets_a_live_block_that_is_gone_after_an_error(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    leader, follower = pty.openpty()
    received = bytearray()
    seen = threading.Event()

    def read():
        while True:
            try:
                data = os.read(leader, 4096)
            except OSError:  # the other end is closed
                return
            received.extend(data)
            if b"40/64 samples" in received:
                seen.set()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        with os.fdopen(follower, "w") as stream, RunDisplay(2, 64, "auto", stream=stream) as shown:
            with shown.phase("rollout"):
                shown.progress(40, 64)
                assert seen.wait(30)
            shown.finish_step(1, step_metrics(1))
            raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    reader.join(30)
    os.close(leader)
    text = received.decode()
    assert "step 1/2  reward 0.050" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l"), "the cursor is visible again"
