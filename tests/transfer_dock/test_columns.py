"""What a stage puts is what a stage gets, wherever the rows lie; without Ray."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transfer_dock import ColumnMismatch, InvalidRequest, Jagged, wire
from transfer_dock.columns import (
    ALIGNMENT,
    NUMERIC,
    ColumnRead,
    ColumnWrite,
    Encoded,
    Place,
    as_values,
    check_dtypes,
    encode,
    flat_rows,
    lay_out,
)
from transfer_dock.jagged import TORCH_ONLY

NUMPY = [dtype for dtype in NUMERIC if dtype not in TORCH_ONLY]


def bytes_of(put: Encoded) -> np.ndarray:
    """What the dock would write."""
    return np.concatenate([piece.reshape(-1).view(np.uint8) for piece in put.pieces])


def read_of(dtype: str, puts: list[Encoded], places: list[tuple[int, int]]) -> ColumnRead:
    """Rows (put, row) out of several encoded puts; block i lies on node "i"."""
    writes = [put.write for put in puts]
    read = ColumnRead(
        dtype,
        writes[0].layout,
        [Place(str(number), 0, write.nbytes, 0, write.nbytes) for number, write in enumerate(writes)],
        np.array([put for put, _ in places], np.int64),
        np.array([writes[put].start[row] for put, row in places], np.int64),
        np.array([writes[put].length[row] for put, row in places], np.int64),
    )
    return ColumnRead.from_data(wire.unpack(wire.pack(read.as_data())))


def values_of(read: ColumnRead, blocks: list[np.ndarray]) -> object:
    return as_values(read, flat_rows(read, lambda places: [blocks[int(place.node)] for place in places]))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    data=st.data(), dtype=st.sampled_from(sorted(set(NUMERIC) - set(TORCH_ONLY))), width=st.sampled_from([(), (2, 3)])
)
def test_any_rows_of_any_puts_come_back_in_order(data: st.DataObject, dtype: str, width: tuple[int, ...]) -> None:
    lengths = data.draw(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=4), min_size=1, max_size=3))
    generator = np.random.default_rng(len(lengths))
    rows = [[generator.integers(0, 2, (length, *width)).astype(dtype) for length in put] for put in lengths]
    puts = [encode("x", dtype, Jagged.from_rows(put), len(put)) for put in rows]
    everywhere = [(put, row) for put in range(len(rows)) for row in range(len(rows[put]))]
    places = data.draw(st.lists(st.sampled_from(everywhere), max_size=8, unique=True))
    found = values_of(read_of(dtype, puts, places), [bytes_of(put) for put in puts])
    assert found.values.dtype == dtype
    assert len(found) == len(places)
    for got, (put, row) in zip(found.rows(), places, strict=True):
        np.testing.assert_array_equal(got, rows[put][row])


@pytest.mark.parametrize("dtype", sorted(TORCH_ONLY))
@pytest.mark.parametrize("shape", [(), (3,)])
def test_numbers_that_numpy_lacks_travel_as_tensors(dtype: str, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(6, *shape, generator=torch.Generator().manual_seed(1)).to(getattr(torch, dtype))
    puts = [encode("x", dtype, Jagged(tensor, [0, 2, 6]), 2), encode("x", dtype, list(tensor.split([2, 4])), 2)]
    whole = encode("x", dtype, tensor, 6)
    assert puts[0].with_digests().digests == puts[1].with_digests().digests
    assert [put.copied for put in (*puts, whole)] == [0, 0, 0]
    jagged = values_of(read_of(dtype, puts, [(0, 1), (1, 0)]), [bytes_of(put) for put in puts])
    assert jagged.torch()[0].dtype == tensor.dtype
    assert torch.equal(jagged.torch()[0].float(), torch.cat([tensor[2:], tensor[:2]]).float())
    assert torch.equal(jagged.row(1).float(), tensor[:2].float())
    rows = values_of(read_of(dtype, [whole], [(0, 4), (0, 5)]), [bytes_of(whole)])
    assert torch.equal(rows.float(), tensor[4:].float())
    with pytest.raises(ColumnMismatch, match=f"{dtype} and takes tensors of that type, got torch.float32"):
        encode("x", dtype, tensor.float(), 6)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3), data=st.data())
def test_fixed_size_rows_of_any_puts_come_back_in_order(sizes: list[int], data: st.DataObject) -> None:
    arrays = [np.random.default_rng(size).normal(size=(size, 3)).astype(np.float32) for size in sizes]
    puts = [encode("x", "float32", array, len(array)) for array in arrays]
    everywhere = [(put, row) for put, size in enumerate(sizes) for row in range(size)]
    places = data.draw(st.permutations(everywhere))
    found = values_of(read_of("float32", puts, places), [bytes_of(put) for put in puts])
    np.testing.assert_array_equal(found, np.stack([arrays[put][row] for put, row in places]))


def test_neighbouring_rows_of_one_put_are_a_view() -> None:
    put = encode("x", "int32", Jagged.from_rows([np.arange(length, dtype=np.int32) for length in (3, 1, 0, 5)]), 4)
    data = bytes_of(put)
    inside = values_of(read_of("int32", [put], [(0, 1), (0, 2), (0, 3)]), [data])
    assert np.shares_memory(inside.values, data)
    tensor, offsets = inside.torch()
    assert tensor.data_ptr() == inside.values.ctypes.data
    assert offsets.tolist() == [0, 1, 1, 6]
    swapped = values_of(read_of("int32", [put], [(0, 3), (0, 0)]), [data])
    assert not np.shares_memory(swapped.values, data)


def test_what_is_written_are_the_callers_own_arrays_and_copies_are_counted() -> None:
    tensor = torch.arange(12, dtype=torch.float32).reshape(4, 3)
    rows = [torch.arange(length, dtype=torch.float32) for length in (3, 1, 2, 5)]
    whole, parts = encode("x", "float32", tensor, 4), encode("x", "float32", rows, 4)
    assert whole.pieces[0].ctypes.data == tensor.data_ptr()
    assert [piece.ctypes.data for piece in parts.pieces] == [row.numpy().ctypes.data for row in rows]
    assert (whole.copied, parts.copied) == (0, 0)
    assert encode("x", "float32", tensor.T, 3).copied == 48
    assert encode("x", "float32", [[1.0, 2.0], [3.0]], 2).copied == 12
    assert encode("x", "str", ["ab", "c"], 2).copied == 5


def test_blocks_of_a_put_lie_apart_and_aligned() -> None:
    writes = {name: encode(name, "uint8", np.zeros(size, np.uint8), size).write for name, size in (("a", 3), ("b", 65))}
    assert lay_out(writes, ["b", "a"]) == ({"b": 0, "a": 2 * ALIGNMENT}, 3 * ALIGNMENT)
    assert lay_out(writes, []) == ({}, ALIGNMENT)


@pytest.mark.parametrize("values", [np.zeros((2, 3), np.int32), Jagged.from_rows([np.zeros(2, np.int32)] * 2)])
def test_metadata_survives_a_message(values: object) -> None:
    write = encode("x", "int32", values, 2).with_digests()
    again = ColumnWrite.from_data(wire.unpack(wire.pack(write.as_data())))
    assert (again.layout, again.digests, again.nbytes) == (write.layout, write.digests, write.nbytes)
    assert again.start.tolist() == write.start.tolist()
    assert again.length.tolist() == write.length.tolist()


def test_selected_rows_name_only_the_blocks_they_lie_in() -> None:
    puts = [encode("x", "int32", np.full(2, value, np.int32), 2) for value in range(3)]
    part = read_of("int32", puts, [(0, 0), (1, 0), (2, 1), (1, 1)]).select([2, 3])
    assert [place.node for place in part.places] == ["1", "2"]
    assert values_of(part, [bytes_of(put) for put in puts]).tolist() == [2, 1]


@pytest.mark.parametrize("width", [2, 3, 5, 9])
def test_equal_rows_have_equal_digests_whatever_they_came_in(width: int) -> None:
    array = np.arange(2 * width, dtype=np.int32).reshape(2, width)
    whole = encode("x", "int32", array, 2).with_digests().digests
    assert encode("x", "int32", torch.tensor(array[:1]), 1).with_digests().digests == whole[:16]
    assert encode("x", "int32", np.asfortranarray(array), 2).with_digests().digests == whole
    other = encode("x", "int32", array + np.array([[0], [1]], np.int32), 2).with_digests()
    assert (other.digest(0), other.digest(1) == whole[16:]) == (whole[:16], False)
    rows = encode("x", "int32", list(array), 2).with_digests()
    assert encode("x", "int32", Jagged.from_rows(list(array)), 2).with_digests().digests == rows.digests


def test_rows_of_other_lengths_have_other_digests() -> None:
    zeros = encode("x", "int8", [np.zeros(length, np.int8) for length in range(20)], 20).with_digests()
    assert len({zeros.digest(row) for row in range(20)}) == 20


@pytest.mark.parametrize(
    ("dtype", "values", "message"),
    [
        ("int32", np.zeros(2, np.int64), "int32, got int64"),
        ("int32", [0.5, 1.0], "do not fit int32"),
        ("int32", np.int32(3), "first dimension is the samples"),
        ("int32", np.zeros(3, np.int32), "3 rows for 2 keys"),
        ("float32", [np.zeros((1, 2), np.float32), np.zeros((1, 3), np.float32)], "differ in more than their length"),
        ("str", ["a", 1], "takes strings, got int"),
        ("str", "ab", "a list with one value a sample"),
        ("object", [{1, 2}, 3], "msgpack"),
    ],
)
def test_a_value_that_is_not_what_the_column_declares_is_refused(dtype: str, values: object, message: str) -> None:
    with pytest.raises(ColumnMismatch, match=message):
        encode("x", dtype, values, 2)


def test_unsupported_dtypes_and_broken_offsets_are_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"unsupported dtype 'float80'.*float32"):
        check_dtypes({"x": "float80"})
    with pytest.raises(ColumnMismatch, match="rise from 0 to the 3 values"):
        Jagged(np.zeros(3), [0, 2])
