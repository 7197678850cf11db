"""MindSpeed-RL's launch files, read as ours: what each of their keys means here, and which have no meaning."""

from qerl_rl.config.mindspeed.translate import Translation, is_mindspeed, is_theirs, translate

__all__ = ["Translation", "is_mindspeed", "is_theirs", "translate"]
