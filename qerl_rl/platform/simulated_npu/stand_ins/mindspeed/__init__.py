"""In place of MindSpeed, which is in no package index: as much as Megatron needs on a simulated NPU, and no more.

What MindSpeed itself does is not simulated: its patches, its switches, its fused modules.
"""
