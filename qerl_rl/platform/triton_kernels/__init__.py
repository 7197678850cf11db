"""Triton kernels for what a device's own library lacks, in the part of Triton that Triton-Ascend has too.

They run on CUDA, where `platform.ops` calls them; on Ascend not before a card has shown that they compile there (64-bit
integer products are the doubtful part of `noise`). Importing a module of this package imports Triton.
"""
