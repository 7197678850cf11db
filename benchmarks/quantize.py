"""How fast quantized weights are made, trained over and run: `python -m benchmarks.quantize` prints a row a figure.

Parts: packing (over compressed-tensors), trainer (quantized experts over frozen bfloat16 ones), engine (int8 and int4
over bfloat16). Each runs in a process of its own, since each sets up torch its own way. Name some to run only those.
Exits 1 when a figure misses its bar, or a part fails.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys

PARTS = ("packing", "trainer", "engine")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantize", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    unknown = set(options.parts) - set(PARTS)
    if unknown:
        parser.error(f"no part is called {', '.join(sorted(unknown))}; parts: {', '.join(PARTS)}")
    if options.here:
        return measure_here(options.parts[0])
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", flush=True)
    codes = [
        subprocess.run([sys.executable, "-m", "benchmarks.quantize", part, "--here"]).returncode
        for part in options.parts or PARTS
    ]
    return int(any(codes))


def measure_here(part: str) -> int:
    """Print the figures of one part; 1 when one misses its bar."""
    figures = importlib.import_module(f"benchmarks.quantize_{part}").measure()
    for figure in figures:
        print(figure, flush=True)
    return int(not all(figure.met for figure in figures))


if __name__ == "__main__":
    sys.exit(main())
