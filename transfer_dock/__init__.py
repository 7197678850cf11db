"""TransferDock: named columns of samples, passed between the stages of a Ray program exactly once per consumer."""

from transfer_dock.batch import Batch, Lease
from transfer_dock.dock import TransferDock
from transfer_dock.errors import (
    ColumnMismatch,
    ConflictingPut,
    DockClosed,
    DockError,
    DockTimeout,
    InvalidRequest,
    LeaseLost,
    PayloadLost,
    StepClosed,
    UnknownColumn,
    UnknownConsumer,
)
from transfer_dock.jagged import Jagged
from transfer_dock.keys import SampleKey

__all__ = [
    "Batch",
    "ColumnMismatch",
    "ConflictingPut",
    "DockClosed",
    "DockError",
    "DockTimeout",
    "InvalidRequest",
    "Jagged",
    "Lease",
    "LeaseLost",
    "PayloadLost",
    "SampleKey",
    "StepClosed",
    "TransferDock",
    "UnknownColumn",
    "UnknownConsumer",
]
