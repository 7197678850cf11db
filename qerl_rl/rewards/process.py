"""A process that scores one sample at a time, and its other end.

Run as `python -m qerl_rl.rewards.process NAME TIMEOUT_S`. Both directions carry lines of JSON: in [prompt, response,
answer], out {"ready": true} once, then {"score": x} or {"error": text} a sample. The function is imported by name; no
code is sent.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import signal
import subprocess
import sys
import time
from typing import Any, BinaryIO

from qerl_rl.rewards.load import load_reward

START_TIMEOUT_S = 120.0
"""Seconds for the imports of a reward function in a fresh process; a cold, busy machine needs tens of them."""
_ORPHAN_GRACE_S = 5.0


class SampleFailure(Exception):
    """A sample that got no score; the message says why."""


class ScoringProcess:
    """One scoring process; started at once, replaced whenever a sample hangs or kills it."""

    def __init__(self, name: str, timeout_s: float) -> None:
        self._name, self._timeout_s = name, timeout_s
        self._process = self._start()
        self._ready = False

    def score(self, prompt: str, response: str, answer: str) -> float:
        """The reward of a sample.

        Raises: SampleFailure when the function raises, gives no finite number, dies or passes the time limit;
            RuntimeError when the process can't start.
        """
        if self._process.poll() is not None:
            self._replace()
        if not self._ready:
            self._await_ready()
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps([prompt, response, answer]).encode() + b"\n")
            self._process.stdin.flush()
            reply = self._read_line(self._timeout_s)
        except (TimeoutError, EOFError, BrokenPipeError) as error:
            if isinstance(error, TimeoutError):
                self._replace()
                raise SampleFailure(f"took longer than {self._timeout_s:g} s") from None
            # The pipe closes a moment before the exit code is there.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=1.0)
            raise SampleFailure(f"its process died (exit code {self._replace()})") from None
        if "error" in reply:
            raise SampleFailure(reply["error"])
        return reply["score"]

    def close(self) -> int:
        """End the process and whatever it started; returns its exit code."""
        code = self._process.poll()
        if code is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        killed = self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            # The rest of a request may still be buffered for a process that is gone.
            with contextlib.suppress(BrokenPipeError):
                pipe.close()  # type: ignore[union-attr]
        return killed if code is None else code

    def _start(self) -> subprocess.Popen[bytes]:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        # A session of its own: killing it takes its children along, and a Ctrl-C is left to the process that owns it.
        return subprocess.Popen(
            [sys.executable, "-m", __name__, self._name, str(self._timeout_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )

    def _replace(self) -> int:
        code = self.close()
        self._process, self._ready = self._start(), False
        return code

    def _await_ready(self) -> None:
        try:
            self._read_line(START_TIMEOUT_S)
        except (TimeoutError, EOFError) as error:
            code = self.close()
            reason = f"within {START_TIMEOUT_S:g} s" if isinstance(error, TimeoutError) else f"(exit code {code})"
            raise RuntimeError(f"the process of reward {self._name!r} did not start {reason}; see its stderr") from None
        self._ready = True

    def _read_line(self, timeout_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        poller = select.poll()
        poller.register(descriptor, select.POLLIN)
        deadline = time.monotonic() + timeout_s
        line = b""
        while not line.endswith(b"\n"):
            if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000.0):
                raise TimeoutError
            received = os.read(descriptor, 65536)
            if not received:
                raise EOFError
            line += received
        return json.loads(line)


def _evaluate(function: Any, sample: list[str]) -> dict[str, Any]:
    try:
        score = float(function(*sample))
    except BaseException as error:  # noqa: BLE001 - the user's function: even its sys.exit() concerns one sample only
        return {"error": f"raised {type(error).__name__}: {error}"}
    return {"score": score} if math.isfinite(score) else {"error": f"returned {score}"}


def _serve(name: str, timeout_s: float, requests: BinaryIO, replies: BinaryIO) -> None:
    function = load_reward(name)
    replies.write(b'{"ready": true}\n')
    replies.flush()
    for line in requests:
        # Nobody is left to end a hanging sample when the owner has died: the alarm's default action does.
        signal.setitimer(signal.ITIMER_REAL, timeout_s + _ORPHAN_GRACE_S)
        reply = _evaluate(function, json.loads(line))
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write(json.dumps(reply).encode() + b"\n")
        replies.flush()


def _main() -> None:
    # What the function prints must not mix with the replies.
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    requests = os.fdopen(os.dup(0), "rb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    _serve(sys.argv[1], float(sys.argv[2]), requests, replies)


if __name__ == "__main__":
    _main()
