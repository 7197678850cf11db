"""A job beside the main thread: what it returns and what it raises reach whoever waits, once."""

import threading

import pytest

from qerl_rl.train.background import BackgroundJob


def test_the_result_comes_once_and_the_main_thread_goes_on_meanwhile():
    job, gate = BackgroundJob("named"), threading.Event()
    assert job.wait() is None
    seen = []

    def work():
        gate.wait()
        seen.append(threading.current_thread().name)
        return 7

    job.start(work)
    assert seen == []
    gate.set()
    assert job.wait() == 7
    assert seen == ["named"]
    assert job.wait() is None


def test_an_error_is_raised_where_it_is_waited_for_with_its_own_traceback():
    job = BackgroundJob("named")

    def broken():
        raise OSError("disk full")

    for wait in (job.wait, lambda: job.start(lambda: None)):
        job.start(broken)
        with pytest.raises(OSError, match="disk full") as caught:
            wait()
        assert caught.traceback[-1].name == "broken"
        assert job.wait() is None
