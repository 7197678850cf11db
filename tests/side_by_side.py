"""`make test`: the tests in two pytest processes beside each other, each about half of the time.

    python -m tests.side_by_side [arguments of pytest for both]

What a session builds once for many tests is built once for whole runs and once for all other tests. `pytest tests` runs
the same tests one after the other.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from typing import IO

WHOLE_RUNS = "tests/trainer"
HALVES = {
    "runs": [WHOLE_RUNS],
    "parts": ["tests", f"--ignore={WHOLE_RUNS}"],
}
"""Arguments of pytest; a new folder is among the parts."""


def main(arguments: list[str]) -> int:
    """Run both to their ends, each line of output with the name of its half; 0 when both passed."""
    begin, printing = time.monotonic(), threading.Lock()
    # Two processes with a thread for each core would wait for one another.
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONUNBUFFERED": "1"}
    processes, readers = {}, []
    for name, selection in HALVES.items():
        command = [sys.executable, "-m", "pytest", *selection, *arguments]
        processes[name] = process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        readers.append(threading.Thread(target=_show, args=(name, process.stdout, printing), daemon=True))
        readers[-1].start()
    try:
        codes = {name: process.wait() for name, process in processes.items()}
    except KeyboardInterrupt:
        # It reached the halves too, which now end what they have started.
        codes = {name: process.wait() for name, process in processes.items()}
    for reader in readers:
        reader.join()
    outcomes = ", ".join(f"{name} {'passed' if code == 0 else f'FAILED ({code})'}" for name, code in codes.items())
    print(f"both halves in {time.monotonic() - begin:.0f} s: {outcomes}")
    return max(map(abs, codes.values()))


def _show(name: str, lines: IO[str], printing: threading.Lock) -> None:
    for line in lines:
        with printing:
            print(f"{name:5} | {line}", end="", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
