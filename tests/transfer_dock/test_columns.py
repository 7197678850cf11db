"""What a stage puts is what a stage gets, wherever the rows lie; without Ray."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transfer_dock import ColumnMismatch, InvalidRequest, Jagged
from transfer_dock.columns import NUMERIC, ColumnRead, check_dtypes, decode, encode


def read_of(dtype: str, puts: list, places: list[tuple[int, int]]) -> ColumnRead:
    """Rows (put, row) out of several encoded puts."""
    writes = [write for write, _ in puts]
    return ColumnRead(
        dtype,
        writes[0].layout,
        list(range(len(puts))),
        np.array([put for put, _ in places], np.int64),
        np.array([writes[put].start[row] for put, row in places], np.int64),
        np.array([writes[put].length[row] for put, row in places], np.int64),
    )


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data(), dtype=st.sampled_from(NUMERIC), width=st.sampled_from([(), (2, 3)]))
def test_any_rows_of_any_puts_come_back_in_order(data: st.DataObject, dtype: str, width: tuple[int, ...]) -> None:
    lengths = data.draw(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=4), min_size=1, max_size=3))
    generator = np.random.default_rng(len(lengths))
    rows = [[generator.integers(0, 2, (length, *width)).astype(dtype) for length in put] for put in lengths]
    puts = [encode("x", dtype, Jagged.from_rows(put), len(put)) for put in rows]
    everywhere = [(put, row) for put in range(len(rows)) for row in range(len(rows[put]))]
    places = data.draw(st.lists(st.sampled_from(everywhere), max_size=8, unique=True))
    found = decode(read_of(dtype, puts, places), lambda refs: [puts[ref][1] for ref in refs])
    assert found.values.dtype == dtype
    assert len(found) == len(places)
    for got, (put, row) in zip(found.rows(), places, strict=True):
        np.testing.assert_array_equal(got, rows[put][row])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3), data=st.data())
def test_fixed_size_rows_of_any_puts_come_back_in_order(sizes: list[int], data: st.DataObject) -> None:
    arrays = [np.random.default_rng(size).normal(size=(size, 3)).astype(np.float32) for size in sizes]
    puts = [encode("x", "float32", array, len(array)) for array in arrays]
    everywhere = [(put, row) for put, size in enumerate(sizes) for row in range(size)]
    places = data.draw(st.permutations(everywhere))
    found = decode(read_of("float32", puts, places), lambda refs: [puts[ref][1] for ref in refs])
    np.testing.assert_array_equal(found, np.stack([arrays[put][row] for put, row in places]))


def test_neighbouring_rows_of_one_put_are_a_view() -> None:
    put = encode("x", "int32", Jagged.from_rows([np.arange(length, dtype=np.int32) for length in (3, 1, 0, 5)]), 4)
    inside = decode(read_of("int32", [put], [(0, 1), (0, 2), (0, 3)]), lambda refs: [put[1]])
    assert np.shares_memory(inside.values, put[1])
    tensor, offsets = inside.torch()
    assert tensor.data_ptr() == inside.values.ctypes.data
    assert offsets.tolist() == [0, 1, 1, 6]
    swapped = decode(read_of("int32", [put], [(0, 3), (0, 0)]), lambda refs: [put[1]])
    assert not np.shares_memory(swapped.values, put[1])


def test_a_put_of_a_contiguous_array_or_tensor_makes_no_copy() -> None:
    tensor = torch.arange(12, dtype=torch.float32).reshape(4, 3)
    _, flat = encode("x", "float32", tensor, 4)
    assert flat.ctypes.data == tensor.data_ptr()


def test_selected_rows_name_only_the_blocks_they_lie_in() -> None:
    puts = [encode("x", "int32", np.full(2, value, np.int32), 2) for value in range(3)]
    part = read_of("int32", puts, [(0, 0), (1, 0), (2, 1), (1, 1)]).select([2, 3])
    assert part.refs == [1, 2]
    assert decode(part, lambda refs: [puts[ref][1] for ref in refs]).tolist() == [2, 1]


def test_equal_rows_have_equal_digests_whatever_they_came_in() -> None:
    array = np.array([[1, 2], [3, 4]], np.int32)
    whole = encode("x", "int32", array, 2)[0].digests
    assert encode("x", "int32", torch.tensor(array[:1]), 1)[0].digests == whole[:1]
    assert encode("x", "int32", np.asfortranarray(array), 2)[0].digests == whole
    assert encode("x", "int32", array + 1, 2)[0].digests != whole


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
    with pytest.raises(InvalidRequest, match=r"unsupported dtype 'complex64'.*float32"):
        check_dtypes({"x": "complex64"})
    with pytest.raises(ColumnMismatch, match="rise from 0 to the 3 values"):
        Jagged(np.zeros(3), [0, 2])
