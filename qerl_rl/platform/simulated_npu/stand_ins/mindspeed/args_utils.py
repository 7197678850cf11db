"""The arguments of this process, which MindSpeed's features would read; nothing here does."""

import argparse

_arguments = argparse.Namespace()


def get_mindspeed_args(get_defaults: bool = False) -> argparse.Namespace:
    """The same object at every call, as in MindSpeed."""
    return _arguments
