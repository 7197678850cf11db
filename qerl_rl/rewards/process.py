"""A process that scores one sample at a time, and its other end.

Run as `python -m qerl_rl.rewards.process TIMEOUT_S MEMORY_BYTES NAME...`. Both directions carry lines of JSON: in
[name, prompt, response, answer], out {"ready": true} once, then {"score": x} or {"error": text} a sample. The functions
are imported by name; no code is sent.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, BinaryIO

from qerl_rl.rewards.load import load_reward

START_TIMEOUT_S = 120.0
"""Seconds for the imports of a reward function in a fresh process; a cold, busy machine needs tens of them."""
_ORPHAN_GRACE_S = 5.0
_ERROR_CHARACTERS = 500
_LARGEST_SCORE = 3.4e38
"""Of float32, which rewards become; a NaN is not below it either."""
_OUT_OF_MEMORY = {"error": "ran out of memory", "out_of_memory": True}


class SampleFailure(Exception):
    """A sample that got no score; the message says why."""


class ScoringProcess:
    """One scoring process for the functions `names`; started at once, replaced when a sample hangs, kills or fills it.

    Args: timeout_s, memory_bytes: what one function may take for one sample; memory_bytes 0 sets no limit.
    """

    def __init__(self, names: Sequence[str], timeout_s: float, memory_bytes: int) -> None:
        self._names, self._timeout_s, self._memory_bytes = names, timeout_s, memory_bytes
        self._process = self._start()
        self._ready = False
        self._fresh = True

    def score(self, name: str, prompt: str, response: str, answer: str) -> float:
        """What the function `name` gives a sample.

        Raises: SampleFailure when the function raises, gives no finite number, dies or passes a limit;
            RuntimeError when the process can't start.
        """
        request = json.dumps([name, prompt, response, answer]).encode() + b"\n"
        reply = self._ask(request)
        if "out_of_memory" in reply and not self._fresh:
            # Samples before this one may have left their memory behind: only in a process of its own is it to blame.
            self._replace()
            reply = self._ask(request)
        self._fresh = False
        if "out_of_memory" in reply:
            self._replace()
            raise SampleFailure(f"took more than {self._memory_bytes} bytes (reward.memory_bytes)")
        if "error" in reply:
            raise SampleFailure(reply["error"])
        return reply["score"]

    def _ask(self, request: bytes) -> dict[str, Any]:
        if self._process.poll() is not None:
            self._replace()
        if not self._ready:
            self._await_ready()
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(request)
            self._process.stdin.flush()
            return self._read_line(self._timeout_s)
        except (TimeoutError, EOFError, BrokenPipeError) as error:
            if isinstance(error, TimeoutError):
                self._replace()
                raise SampleFailure(f"took longer than {self._timeout_s:g} s") from None
            # The pipe closes a moment before the exit code is there.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=1.0)
            raise SampleFailure(f"its process died (exit code {self._replace()})") from None

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
            [sys.executable, "-m", __name__, str(self._timeout_s), str(self._memory_bytes), *self._names],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )

    def _replace(self) -> int:
        code = self.close()
        self._process, self._ready, self._fresh = self._start(), False, True
        return code

    def _await_ready(self) -> None:
        try:
            self._read_line(START_TIMEOUT_S)
        except (TimeoutError, EOFError) as error:
            code = self.close()
            reason = f"within {START_TIMEOUT_S:g} s" if isinstance(error, TimeoutError) else f"(exit code {code})"
            names = ", ".join(self._names)
            raise RuntimeError(f"the process of reward {names} did not start {reason}; see its stderr") from None
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
    except MemoryError:
        # Text would need memory, which the frames of the function still hold here.
        return _OUT_OF_MEMORY
    except BaseException as error:  # noqa: BLE001 - the user's function: even its sys.exit() concerns one sample only
        return {"error": f"raised {type(error).__name__}: {error}"[:_ERROR_CHARACTERS]}
    return {"score": score} if abs(score) <= _LARGEST_SCORE else {"error": f"returned {score}"}


def _limit_memory(memory_bytes: int) -> None:
    """Let this process, and each one it starts, take `memory_bytes` of address space beyond what the imports took."""
    with open("/proc/self/statm", encoding="ascii") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    limit = taken + memory_bytes if most == resource.RLIM_INFINITY else min(taken + memory_bytes, most)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _serve(names: Sequence[str], timeout_s: float, memory_bytes: int, requests: BinaryIO, replies: BinaryIO) -> None:
    functions = {name: load_reward(name) for name in names}
    if memory_bytes:
        _limit_memory(memory_bytes)
    replies.write(b'{"ready": true}\n')
    replies.flush()
    for line in requests:
        # Nobody is left to end a hanging sample when the owner has died: the alarm's default action does.
        signal.setitimer(signal.ITIMER_REAL, timeout_s + _ORPHAN_GRACE_S)
        name, *sample = json.loads(line)
        reply = _evaluate(functions[name], sample)
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write(json.dumps(reply).encode() + b"\n")
        replies.flush()


def _main() -> None:
    # What the function prints must not mix with the replies.
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    requests = os.fdopen(os.dup(0), "rb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    _serve(sys.argv[3:], float(sys.argv[1]), int(sys.argv[2]), requests, replies)


if __name__ == "__main__":
    _main()
