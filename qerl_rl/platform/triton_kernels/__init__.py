"""Triton kernels for what a device's own library lacks, in the part of Triton that Triton-Ascend has too.

`platform.ops` calls all of them on CUDA, and on an NPU those of `int4` (routers have an operator of torch_npu there,
and noise is drawn on the host, which gives the same bits everywhere). Tests compile each for both, as far as that goes
without a card. Importing a module of this package imports Triton.
"""
