import os
import select
import subprocess
import sys
import textwrap

import psutil
import pytest

from qerl_rl.config.errors import ConfigError
from qerl_rl.config.schema import RewardConfig
from qerl_rl.rewards.scorer import RewardScorer

TRICKY = textwrap.dedent(
    """
    import os, subprocess, sys, time

    def reward(prompt, response, answer):
        print("noise on standard output")
        if response == "hang":
            while True:
                pass
        if response == "hang with a child":
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
            with open(prompt, "w") as file:
                file.write(str(child.pid))
            time.sleep(1000)
        if response == "die":
            os._exit(7)
        if response == "segfault":
            import ctypes
            ctypes.string_at(0)
        if response == "raise":
            raise ValueError("no such answer")
        if response == "exit":
            sys.exit(3)
        if response == "nan":
            return float("nan")
        if response == "text":
            return "much"
        return float(response)
    """
)
FAULTS = {
    "hang": "took longer than 2 s",
    "die": "exit code 7",
    "segfault": "exit code -11",
    "raise": "ValueError: no such answer",
    "exit": "SystemExit: 3",
    "nan": "returned nan",
    "text": "could not convert",
}


def scorer_of(function, *, processes, timeout_s):
    return RewardScorer(RewardConfig(function=function, workers=processes, timeout_s=timeout_s))


def scoring_processes():
    """The scorers' children of this process, which other tests may have given children of their own."""
    children = psutil.Process().children()
    return [child for child in children if "qerl_rl.rewards.process" in child.cmdline()]


@pytest.fixture
def tricky(tmp_path, monkeypatch):
    (tmp_path / "tricky_rewards.py").write_text(TRICKY)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "tricky_rewards.reward"


@pytest.mark.parametrize("processes", [1, 2])
def test_a_sample_that_fails_costs_itself_only(tricky, processes):
    responses = []
    for position, fault in enumerate(FAULTS):
        responses += [str(position), fault]
    responses.append("99.5")
    with scorer_of(tricky, processes=processes, timeout_s=2.0) as scorer:
        scores = scorer.score([("p", response, "a") for response in responses])
        assert scores.values.tolist() == [0.0 if text in FAULTS else float(text) for text in responses]
        assert sorted(scores.failures) == [index for index, text in enumerate(responses) if text in FAULTS]
        for index, reason in scores.failures.items():
            assert FAULTS[responses[index]] in reason
        assert scorer.failed_samples == len(FAULTS)
        assert scorer.score([("p", "0.25", "a")]).values.tolist() == [0.25]
        assert scorer.failed_samples == len(FAULTS)


def test_a_process_that_dies_between_samples_fails_no_sample(tricky):
    with scorer_of(tricky, processes=1, timeout_s=30.0) as scorer:
        assert scorer.score([("p", "1", "a")]).values.tolist() == [1.0]
        (child,) = scoring_processes()
        child.kill()
        assert has_ended(child.pid)
        scores = scorer.score([("p", "2", "a")])
        assert scores.values.tolist() == [2.0]
        assert not scores.failures


def test_a_killed_sample_takes_its_own_children_along(tricky, tmp_path):
    pid_file = tmp_path / "pid"
    with scorer_of(tricky, processes=1, timeout_s=2.0) as scorer:
        scores = scorer.score([(str(pid_file), "hang with a child", "a")])
    assert "longer than 2 s" in scores.failures[0]
    assert has_ended(int(pid_file.read_text()))


def test_closing_leaves_no_process(tricky):
    scorer = scorer_of(tricky, processes=2, timeout_s=30.0)
    scorer.score([("p", "1", "a")] * 4)
    children = scoring_processes()
    assert len(children) == 2
    scorer.close()
    assert all(has_ended(child.pid) for child in children)


def test_processes_end_when_their_owner_is_killed(tricky):
    script = textwrap.dedent(
        f"""
        import os, psutil
        from qerl_rl.config.schema import RewardConfig
        from qerl_rl.rewards.scorer import RewardScorer
        scorer = RewardScorer(RewardConfig(function={tricky!r}, workers=1, timeout_s=30.0))
        scorer.score([("p", "1", "a")])
        print(psutil.Process().children()[0].pid, flush=True)
        os.kill(os.getpid(), 9)
        """
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    owner = subprocess.run([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, check=False)
    assert owner.returncode == -9
    assert has_ended(int(owner.stdout.split()[-1]))


def test_math_scores_in_processes_as_it_does_here():
    samples = [("p", f"so we get {value}", f"#### {value % 3}") for value in range(6)]
    with scorer_of("math", processes=2, timeout_s=30.0) as scorer:
        assert scorer.score(samples).values.tolist() == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]


def test_exact_needs_no_process():
    with scorer_of("exact", processes=4, timeout_s=1.0) as scorer:
        assert not scoring_processes()
        assert scorer.score([("p", "4", "4"), ("p", "5", "4")]).values.tolist() == [1.0, 0.0]


def test_an_unknown_reward_is_refused_before_a_process_starts():
    with pytest.raises(ConfigError, match="math"):
        scorer_of("maths", processes=1, timeout_s=1.0)
    assert not scoring_processes()


def test_a_function_that_only_the_owner_can_import_is_an_error_not_a_zero(tmp_path, monkeypatch):
    module = tmp_path / "vanishing_rewards.py"
    module.write_text("def reward(prompt, response, answer):\n    return 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    __import__("vanishing_rewards")
    module.unlink()
    with (
        scorer_of("vanishing_rewards.reward", processes=1, timeout_s=1.0) as scorer,
        pytest.raises(RuntimeError, match="start"),
    ):
        scorer.score([("p", "1", "a")])


def has_ended(pid: int) -> bool:
    """Whether the process ends within 30 s, reaped by anyone or not."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], 30.0)[0])
    finally:
        os.close(descriptor)
