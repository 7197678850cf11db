"""The files a run writes as it goes: metrics.jsonl, TensorBoard events, samples.jsonl."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from qerl_rl.config.schema import TrackConfig


class Tracker:
    """Writes every step's metrics and some of its samples below `output_dir`, a line at a time, each flushed.

    Args: first_step: the first step this process will log. Lines of that and later steps, left by an earlier run or by
        one that was killed after its last checkpoint, are dropped; 1 starts the files anew.
    """

    def __init__(self, output_dir: str | Path, track: TrackConfig, *, first_step: int = 1) -> None:
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.metrics_path = folder / "metrics.jsonl"
        self.samples_path = folder / "samples.jsonl"
        self.tensorboard_path = folder / "tensorboard"
        self.history = keep_before(self.metrics_path, first_step)
        """The metrics of every step in metrics.jsonl, oldest first."""
        self._metrics = self.metrics_path.open("a", encoding="utf-8")
        self._samples = None
        if track.samples:
            keep_before(self.samples_path, first_step)
            self._samples = self.samples_path.open("a", encoding="utf-8")
        self._events = None
        if track.tensorboard:
            self._events = EventFileWriter(str(self.tensorboard_path))
            # Tells TensorBoard to forget what older event files say about this and later steps.
            start = SessionLog(status=SessionLog.START)
            self._events.add_event(Event(wall_time=time.time(), step=first_step, session_log=start))

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one object to metrics.jsonl: `step` and the metrics; a number that is not finite becomes null."""
        entry = {"step": step} | {name: _plain(value) for name, value in metrics.items()}
        self._metrics.write(json.dumps(entry, allow_nan=False) + "\n")
        self._metrics.flush()
        self.history.append(entry)
        if self._events is not None:
            values = [
                Summary.Value(tag=name, simple_value=value)
                for name, value in entry.items()
                if name != "step" and isinstance(value, int | float)
            ]
            self._events.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
            self._events.flush()

    def sample(self, step: int, fields: Mapping[str, Any]) -> None:
        """Append one object to samples.jsonl: `step` and the fields; does nothing without track.samples."""
        if self._samples is not None:
            entry = {"step": step} | {name: _plain(value) for name, value in fields.items()}
            self._samples.write(json.dumps(entry, ensure_ascii=False, allow_nan=False) + "\n")
            self._samples.flush()

    def close(self) -> None:
        """Close the files; TensorBoard's last events are on disk afterwards."""
        self._metrics.close()
        if self._samples is not None:
            self._samples.close()
        if self._events is not None:
            self._events.close()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl or samples.jsonl, oldest first.

    A last line without its end, as a kill in the middle of a write leaves it, is not one of them.
    """
    lines = Path(path).read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in lines]


def keep_before(path: Path, first_step: int) -> list[dict[str, Any]]:
    """Drop the lines of `first_step` and later from a file of JSON lines with a `step`; returns what stays."""
    if not path.exists():
        return []
    kept = [entry for entry in read_metrics(path) if entry["step"] < first_step]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in kept), encoding="utf-8")
    partial.replace(path)
    return kept


def _plain(value: Any) -> Any:
    if isinstance(value, str | bool | int) or value is None:
        return value
    number = float(value)
    return number if math.isfinite(number) else None
