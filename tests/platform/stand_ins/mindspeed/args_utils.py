"""As in MindSpeed: the command line is read once, and every later call gives the same object."""

from __future__ import annotations

import argparse
import sys

import mindspeed

_kept = argparse.Namespace()


def get_mindspeed_args(get_defaults: bool = False) -> argparse.Namespace:
    """The arguments of this process."""
    if not vars(_kept):
        _kept.words = sys.argv[1:]
        mindspeed.record("args_utils", _kept)
    return _kept
