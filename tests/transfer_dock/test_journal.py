"""What is in the journal after any death of its writer, and what packed values are."""

from __future__ import annotations

import os
import resource
import signal
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transfer_dock import wire
from transfer_dock.errors import DockError
from transfer_dock.journal import Journal

RECORDS: list[tuple[str, list[Any]]] = [
    ("put", [1, [[1, 0, 0], [1, 0, 1]], "tokens", b"\x00\xff"]),
    ("lease", ["train", 2.5, None, True]),
    ("nothing", []),
    ("ack", [{"lease": 3, 4: ["x"]}, -(1 << 63)]),
]


def write(path: Path, records: list[tuple[str, list[Any]]]) -> list[int]:
    """Where each record ends."""
    journal, ends = Journal(path), []
    for kind, args in records:
        journal.append(kind, args)
        ends.append(journal.size)
    journal.close()
    return ends


def in_child(function: Callable[[], None]) -> int:
    """The signal that ended a forked child, 0 when it returned."""
    pid = os.fork()
    if not pid:
        try:
            function()
        finally:
            os._exit(0)
    return os.WTERMSIG(os.waitpid(pid, 0)[1])


def kill_self(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_records_come_back_in_order_and_appending_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    ends = write(path, RECORDS)
    assert path.stat().st_size == ends[-1]
    assert Journal.read(path) == RECORDS
    again = Journal(path)
    assert again.size == ends[-1]
    again.append("more", (1, 2))
    again.close()
    again.close()
    assert Journal.read(path) == [*RECORDS, ("more", [1, 2])]


def test_every_prefix_of_the_file_holds_the_records_that_are_whole_in_it(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    ends = write(path, RECORDS)
    data = path.read_bytes()
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        whole = [record for record, end in zip(RECORDS, ends, strict=True) if end <= cut]
        assert Journal.read(path) == whole
        assert path.stat().st_size == max([0, *(end for end in ends if end <= cut)])
        write(path, [("next", [cut])])
        assert Journal.read(path) == [*whole, ("next", [cut])]


def test_a_flipped_byte_before_whole_records_is_an_error_and_in_the_last_one_a_torn_tail(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    ends = write(path, RECORDS)
    data = path.read_bytes()
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 0x41
        path.write_bytes(damaged)
        record = sum(end <= place for end in ends)
        if record < len(RECORDS) - 1:
            with pytest.raises(DockError, match=rf"{path}.* byte {([0, *ends])[record]} is damaged"):
                Journal.read(path)
            assert path.read_bytes() == damaged, "what is damaged is left for somebody to look at"
        else:
            assert Journal.read(path) == RECORDS[:-1]


def test_zeros_behind_the_last_record_are_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    [*_, end] = write(path, RECORDS)
    path.write_bytes(path.read_bytes() + bytes(4096))
    assert Journal.read(path) == RECORDS
    assert path.stat().st_size == end


def test_a_record_that_another_program_wrote_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    packed = wire.pack("no kind, no arguments here")
    path.write_bytes(struct.pack("<II", len(packed), zlib.crc32(packed)) + packed)
    with pytest.raises(DockError, match=r"byte 0 is not one of a journal"):
        Journal.read(path)


def test_what_a_killed_process_appended_is_all_there(tmp_path: Path) -> None:
    path = tmp_path / "journal"

    def child() -> None:
        journal = Journal(path)
        for number in range(100):
            journal.append("count", [number])
        kill_self()

    assert in_child(child) == signal.SIGKILL
    assert Journal.read(path) == [("count", [number]) for number in range(100)]


@pytest.mark.parametrize("killed_in", ["fsync", "replace"])
def test_a_process_killed_while_it_rewrites_leaves_the_old_content(tmp_path: Path, killed_in: str) -> None:
    path = tmp_path / "journal"
    write(path, RECORDS)

    def child() -> None:
        journal = Journal(path)
        setattr(os, killed_in, kill_self)
        journal.rewrite(RECORDS[:1])

    assert in_child(child) == signal.SIGKILL
    assert Journal.read(path) == RECORDS
    journal = Journal(path)
    journal.rewrite(RECORDS[1:2])
    assert journal.size == path.stat().st_size
    journal.append(*RECORDS[3])
    journal.close()
    assert Journal.read(path) == [RECORDS[1], RECORDS[3]]
    assert list(tmp_path.iterdir()) == [path], "the rest of the killed one is used up"


@contextmanager
def file_size_limit(nbytes: int) -> Iterator[None]:
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_write_that_the_file_system_refuses_in_the_middle_leaves_no_part_of_a_record(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    [*_, end] = write(path, RECORDS)
    journal = Journal(path)
    with file_size_limit(end + 20):
        with pytest.raises(DockError, match=r"could not be written: File too large"):
            journal.append("large", [b"x" * 100])
        with pytest.raises(DockError, match=r"could not be rewritten: File too large"):
            journal.rewrite([("large", [b"x" * 1000])])
    journal.append("small", [])
    journal.close()
    assert Journal.read(path) == [*RECORDS, ("small", [])]
    assert list(tmp_path.iterdir()) == [path]


def test_arguments_that_cannot_be_written_leave_the_journal_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    write(path, RECORDS)
    journal = Journal(path)
    for append in (lambda: journal.append("bad", [object()]), lambda: journal.rewrite([("bad", [object()])])):
        with pytest.raises(TypeError, match="object cannot be sent"):
            append()
    journal.close()
    assert Journal.read(path) == RECORDS


# ---- packed values -------------------------------------------------------------------------------------------------
class Point(NamedTuple):
    x: int
    y: int


KEYS = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3).map(tuple),
    max_leaves=4,
)
VALUES = st.recursive(
    KEYS.filter(lambda key: not isinstance(key, tuple)) | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(value=VALUES)
def test_a_value_comes_back_as_it_was_packed(value: Any) -> None:
    assert wire.unpack(wire.pack(value)) == value


@pytest.mark.parametrize("dtype", ["int8", "uint64", "float16", "float32", "bool", "complex64", "<U3", "S2", "M8[s]"])
@pytest.mark.parametrize("shape", [(), (3,), (0, 4), (2, 3, 5)])
def test_arrays_come_back_aligned_and_read_only_without_a_copy(dtype: str, shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    data = wire.pack({"odd": b"x", "arrays": [array, (array.T, array[..., ::2] if shape else array)]})
    first, [second, third] = wire.unpack(data)["arrays"]
    for found, expected in ((first, array), (second, array.T), (third, array[..., ::2] if shape else array)):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
        assert not found.flags.writeable
        assert found.flags.aligned
        assert not found.size or np.shares_memory(found, np.frombuffer(data, np.uint8))


def test_tuples_arrive_as_lists_but_as_tuples_where_they_are_keys() -> None:
    assert wire.unpack(wire.pack([Point(1, 2), (3,), {Point(1, 2): (Point(4, 5),)}])) == [
        [1, 2],
        [3],
        {(1, 2): [[4, 5]]},
    ]


@pytest.mark.parametrize(
    "value",
    [
        {1, 2},
        np.int64(1),
        np.float64(1),
        1 << 64,
        object(),
        np.array([object()]),
        np.zeros(2, [("a", "i4")]),
        1j,
        print,
    ],
)
def test_what_only_pickle_could_send_is_refused(value: object) -> None:
    with pytest.raises(TypeError, match="cannot be sent"):
        wire.pack([{"inside": value}])


def test_bytes_that_were_not_packed_are_refused() -> None:
    for data in (b"", b"tdw1", b"\x80" * 64):
        with pytest.raises(ValueError, match="not a packed value"):
            wire.unpack(data)
