"""What the ledger is told, remembers and answers: settings, requests, and records of samples, groups and tickets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from transfer_dock.columns import MSGPACK, check_dtypes
from transfer_dock.errors import InvalidRequest, UnknownColumn, unknown_name
from transfer_dock.keys import GroupKey, SampleKey

Holder = tuple[str, int, float]
"""(node, pid, start time): the process that did a put or a get."""


def as_holder(data: Sequence[Any] | None) -> Holder | None:
    return None if data is None else (data[0], data[1], data[2])


# The mark of a sample that left a consumer as too old, where an acknowledged one has its lease's ticket.
DROPPED = 0


@dataclass(frozen=True)
class Settings:
    """What a dock is created with.

    Args: dtypes of the columns by name; consumers: the columns that each reads; samples_per_group: samples that make a
    group complete; capacity_bytes: payload of unfinished samples and reservations; lease_timeout: seconds;
    capacity_groups: groups with unfinished samples (None: any number); token_columns: variable-length columns whose
    lengths are a sample's tokens (none: all those that the consumer reads).
    Raises: UnknownColumn, InvalidRequest.
    """

    dtypes: Mapping[str, str]
    consumers: Mapping[str, Sequence[str]]
    samples_per_group: int
    capacity_bytes: int
    lease_timeout: float
    capacity_groups: int | None = None
    token_columns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        reads = {name: tuple(dict.fromkeys(columns)) for name, columns in self.consumers.items()}
        object.__setattr__(self, "dtypes", dict(self.dtypes))
        object.__setattr__(self, "consumers", reads)
        object.__setattr__(self, "token_columns", tuple(dict.fromkeys(self.token_columns)))
        check_dtypes(self.dtypes)
        names = ("samples_per_group", "capacity_bytes", "lease_timeout", "capacity_groups")
        sizes = {name: value for name in names if (value := getattr(self, name)) is not None}
        if wrong := [f"{name}={value}" for name, value in sizes.items() if value <= 0]:
            raise InvalidRequest(f"must be positive: {', '.join(wrong)}")
        for consumer, columns in reads.items():
            for column in columns:
                if column not in self.dtypes:
                    raise UnknownColumn(f"consumer {consumer!r}: {unknown_name('column', column, self.dtypes)}")
            if not columns:
                raise InvalidRequest(f"consumer {consumer!r} reads no column; a consumer reads at least one")
        for column in self.token_columns:
            if column not in self.dtypes:
                raise UnknownColumn(f"token_columns: {unknown_name('column', column, self.dtypes)}")
            if self.dtypes[column] in MSGPACK:
                raise InvalidRequest(f"token column {column!r} is {self.dtypes[column]!r}; tokens are rows of numbers")

    def as_data(self) -> list[Any]:
        """Plain data for a message or a file; `from_data` makes it Settings again."""
        consumers = {name: list(columns) for name, columns in self.consumers.items()}
        numbers = [self.samples_per_group, self.capacity_bytes, self.lease_timeout, self.capacity_groups]
        return [dict(self.dtypes), consumers, *numbers, list(self.token_columns)]

    @classmethod
    def from_data(cls, data: Sequence[Any]) -> Settings:
        dtypes, consumers, samples_per_group, capacity_bytes, lease_timeout, capacity_groups, token_columns = data
        sizes = (samples_per_group, capacity_bytes, lease_timeout, capacity_groups)
        return cls(dtypes, consumers, *sizes, tuple(token_columns))


@dataclass(frozen=True)
class LeaseRequest:
    """What a get asks for: the lowest keys that are ready for `consumer`, `minimum` to `count` samples.

    Args: whole_groups: complete groups only; step: of this step only; max_staleness: of groups of this age at most,
    older ones "wait" or are finished for the consumer ("drop"), as `stale` says; balance: a part of a plan whose parts
    of `count` samples have similar token sums, one for each of `ranks` (None: as many as there are samples for);
    request_id: not empty: asked again, it gets the same lease as long as that is open.
    """

    consumer: str
    count: int
    minimum: int
    whole_groups: bool = False
    step: int | None = None
    max_staleness: int | None = None
    stale: str = "wait"
    balance: bool = False
    rank: int | None = None
    ranks: int | None = None
    request_id: bytes = b""

    def tag(self) -> Tag:
        return Tag(
            *(self.consumer, self.count, self.whole_groups, self.step),
            *(self.max_staleness, self.stale, self.ranks, self.rank),
        )


class Tag(NamedTuple):
    """Which requests may claim a balanced lease."""

    consumer: str
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody calls on a tag
    whole_groups: bool
    step: int | None
    max_staleness: int | None
    stale: str
    ranks: int | None
    rank: int | None


class Reservation(NamedTuple):
    """Leave to write `columns` of a put into `size` bytes at `extent` of the arena of `node`."""

    ticket: int
    columns: list[str]
    node: str
    extent: int
    size: int


class Grant(NamedTuple):
    """A lease on samples, and the age of the group of each."""

    ticket: int
    keys: list[SampleKey]
    ages: list[int]


@dataclass(slots=True, eq=False)
class Extent:
    """The memory of one put; `live` of its blocks are still needed."""

    node: str
    offset: int
    size: int
    live: int = 0


@dataclass(slots=True, eq=False)
class Block:
    """The flat array of one put and column, `nbytes` at `offset`; `live` unfinished samples still need it."""

    extent: Extent
    column: str
    offset: int
    nbytes: int
    live: int = 0


@dataclass(slots=True, eq=False)
class Sample:
    """One sample. `missing` counts, by consumer, the columns that are not there; `left` the consumers that have not
    finished it; holders and finishers are tickets of leases (or DROPPED)."""

    missing: dict[str, int]
    left: int
    digests: dict[str, bytes] = field(default_factory=dict)
    places: dict[str, tuple[Block, int, int]] = field(default_factory=dict)
    leased: dict[str, int] = field(default_factory=dict)
    acked: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Group:
    """Every index that was ever put in this group, how many samples are held, and how many of those have each column.

    `age` is how often an unfinished step was carried over while the group held samples.
    """

    indices: set[int] = field(default_factory=set)
    columns: dict[str, int] = field(default_factory=dict)
    held: int = 0
    age: int = 0


@dataclass(slots=True, eq=False)
class ReservationRecord:
    """A put that is being written. `extent` is None while all that would fit are busy; `entering` are the groups into
    which it brings samples."""

    columns: list[str]
    nbytes: int
    node: str
    size: int
    extent: Extent | None
    holder: Holder | None
    request_id: bytes
    entering: list[GroupKey]


@dataclass(slots=True, eq=False)
class LeaseRecord:
    """What a consumer holds. With whole groups, a group of `units` ends as one piece, when all of it is in `partly`.

    A balanced lease that nobody has claimed yet has a `tag`.
    """

    consumer: str
    whole_groups: bool
    holder: Holder | None
    request_id: bytes
    tag: Tag | None
    held: dict[SampleKey, None]
    units: dict[GroupKey, list[SampleKey]]
    partly: set[SampleKey] = field(default_factory=set)
