"""Tiles of int8 and bfloat16 in loops that numba compiles: a processor's instructions with AMX (Intel's Architecture
Instruction Set Extensions, chapter 3), each by LLVM's name for it.

A thread has eight tiles of 16 rows of 64 bytes. They can't be used before `configure`; `release` gives them back,
without which a thread's state stays larger. A tile is named by a number written out.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_BYTE, _WORD = ir.IntType(8), ir.IntType(32)
_ADDRESS = _BYTE.as_pointer()


@functools.cache
def has_amx() -> bool:
    """Whether this process may use them: the system gives the tiles' state to a process that asks for it."""
    return torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx()


def _full_tiles() -> np.ndarray:
    """What all eight tiles with all rows are configured by: 64 bytes, palette 1."""
    configuration = np.zeros(64, np.uint8)
    configuration[0] = 1
    configuration[16:32].view(np.uint16)[:] = 64
    configuration[48:56] = 16
    return configuration


FULL_TILES = _full_tiles()


def _emitted(name: str, signature: Any, tiles: tuple[Any, ...] = (), addressed: bool = False) -> Any:
    """The signature of an instruction and what emits it: LLVM's `name` of tiles, then what else it was given."""

    def emit(context: Any, builder: Any, signature: Any, arguments: tuple[Any, ...]) -> Any:
        operands = [ir.Constant(_BYTE, tile.literal_value) for tile in tiles]
        if addressed:
            address, *stride = arguments[len(tiles) :]
            operands += [builder.inttoptr(address, _ADDRESS), *stride]
        kind = ir.FunctionType(ir.VoidType(), [operand.type for operand in operands])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, name), operands)
        return context.get_dummy_value()

    return signature, emit


def _are_literal(*tiles: Any) -> bool:
    """Whether their numbers are known; what returns None instead is asked again with numbers."""
    return all(isinstance(tile, types.IntegerLiteral) for tile in tiles)


@intrinsic
def configure(typing, configuration):
    """Give this thread tiles as 64 bytes at an address say."""
    return _emitted("llvm.x86.ldtilecfg", types.void(types.uintp), addressed=True)


@intrinsic
def release(typing):
    """Give this thread's tiles back."""
    return _emitted("llvm.x86.tilerelease", types.void())


@intrinsic
def zero(typing, tile):
    """tile = 0."""
    return _emitted("llvm.x86.tilezero", types.void(tile), (tile,)) if _are_literal(tile) else None


@intrinsic
def load(typing, tile, address, stride):
    """tile = rows at an address, that many bytes apart."""
    signature = types.void(tile, types.uintp, types.intp)
    return _emitted("llvm.x86.tileloadd64", signature, (tile,), addressed=True) if _are_literal(tile) else None


@intrinsic
def store(typing, tile, address, stride):
    """Rows at an address, that many bytes apart, = tile."""
    signature = types.void(tile, types.uintp, types.intp)
    return _emitted("llvm.x86.tilestored64", signature, (tile,), addressed=True) if _are_literal(tile) else None


@intrinsic
def add_product(typing, total, left, right):
    """total int32 [16, 16] += left int8 [16, 64] @ right int8 [64, 16], of which four rows lie together, a column's
    numbers side by side: [16, 16, 4]."""
    tiles = (total, left, right)
    return _emitted("llvm.x86.tdpbssd", types.void(*tiles), tiles) if _are_literal(*tiles) else None


@intrinsic
def add_product_bfloat16(typing, total, left, right):
    """total float32 [16, 16] += left bfloat16 [16, 32] @ right bfloat16 [32, 16], of which two rows lie together:
    [16, 16, 2]."""
    tiles = (total, left, right)
    return _emitted("llvm.x86.tdpbf16ps", types.void(*tiles), tiles) if _are_literal(*tiles) else None


@intrinsic
def prefetch(typing, address):
    """Ask for the 64 bytes around an address, which need not exist, for the cache behind the first."""

    def emit(context: Any, builder: Any, signature: Any, arguments: tuple[Any, ...]) -> Any:
        # To read; kept for a while (2 of 3); data.
        options = [ir.Constant(_WORD, option) for option in (0, 2, 1)]
        kind = ir.FunctionType(ir.VoidType(), [_ADDRESS, _WORD, _WORD, _WORD])
        fetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(fetch, [builder.inttoptr(arguments[0], _ADDRESS), *options])
        return context.get_dummy_value()

    return types.void(types.uintp), emit
