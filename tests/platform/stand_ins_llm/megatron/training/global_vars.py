"""Megatron's global arguments."""

from argparse import Namespace

import mindspeed


def set_args(arguments: Namespace) -> None:
    """Record them."""
    mindspeed.record("global_vars", arguments)
