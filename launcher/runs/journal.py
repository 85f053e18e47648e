"""The metrics of a step of the run, written to a local file; readers send them to MLflow.

    {"step": 400, "time_ms": 1790000000000, "metrics": {"loss": 0.41, "learning_rate": 0.0012}}

Instead of metrics a line may have a human-readable ``note``, or the ``total``: the last step of
an attempt that starts at this step. One process appends (rank 0, or the driver), one line a
point, flushed to the file at once: training never waits for a server. After a restart a step
may be written again; readers keep the first.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data_shards.json_shapes import Shape, fault_of_shape
from launcher.runs.records import POINT
from mmcot.errors import InputError


class LineFile:
    """Appends JSON values to a file, one per line."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torn = _last_byte(path) not in (b"", b"\n")
        self._file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 (open until close())
        if torn:  # the last writer was killed in the middle of a line
            self._file.write("\n")

    def append(self, value: Any) -> None:
        """Append one value; it is in the file when this method returns."""
        self._file.write(json.dumps(value) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _last_byte(path: Path) -> bytes:
    if not path.exists() or not path.stat().st_size:
        return b""
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read()


class Journal(LineFile):
    """Appends points to a file."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append the metrics of one step."""
        self.append({"step": step, "time_ms": int(time.time() * 1000), "metrics": metrics})

    def begin(self, step: int, total: int, *, seconds_ago: float = 0.0) -> None:
        """Append the start of an attempt, ``seconds_ago``, with its last step ``total``."""
        self.append({"step": step, "time_ms": int((time.time() - seconds_ago) * 1000), "metrics": {}, "total": total})

    def note(self, step: int, text: str) -> None:
        """Append a human-readable sentence."""
        self.append({"step": step, "time_ms": int(time.time() * 1000), "metrics": {}, "note": text})


class Pace:
    """Progress and remaining time of the last attempt, from a journal's points in their order.

    Only the time of this attempt counts, without earlier attempts and the time between attempts.
    """

    def __init__(self) -> None:
        self._start: dict[str, Any] | None = None
        self._latest: dict[str, Any] | None = None

    def add(self, point: dict[str, Any]) -> None:
        """Add the next point."""
        if "total" in point:
            self._start = self._latest = point
        elif self._start and point["metrics"]:
            self._latest = point

    def progress_of(self) -> tuple[int, int, float | None] | None:
        """Step, total and seconds left; the seconds are None before the attempt's second point.

        Returns:
            None where no attempt has started.
        """
        start, latest = self._start, self._latest
        if start is None or latest is None:
            return None
        seconds = (latest["time_ms"] - start["time_ms"]) / 1000
        return (
            latest["step"],
            start["total"],
            seconds_left(latest["step"] - start["step"], start["total"] - latest["step"], seconds),
        )


def progress_of(points: Iterable[dict[str, Any]]) -> tuple[int, int, float | None] | None:
    """Return ``Pace.progress_of`` after all points of a journal."""
    pace = Pace()
    for point in points:
        pace.add(point)
    return pace.progress_of()


def seconds_left(num_done: int, num_left: int, seconds: float) -> float | None:
    """Return the time for ``num_left`` if ``num_done`` took ``seconds``; None where nothing is done yet."""
    return num_left * seconds / num_done if num_done > 0 else None


class JournalReader:
    """Reads the complete lines that were appended since the last call, from byte ``offset`` on.

    Args:
        shape: of a line (``data_shards/json_shapes.py``), or a function from a line to its shape.
    """

    def __init__(self, path: Path, offset: int = 0, *, shape: Shape = POINT) -> None:
        self._path = path
        self._shape = shape
        self.offset = offset

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield new points in order; an incomplete last line is left for the next call.

        Raises:
            InputError: a line is an object of another shape, which no kill can leave; the message has its number.
        """
        if not self._path.exists():
            return
        with open(self._path, "rb") as file:
            file.seek(self.offset)
            data = file.read()
        complete = data[: data.rfind(b"\n") + 1]
        self.offset += len(complete)
        for number, line in enumerate(complete.split(b"\n")):
            try:
                point: Any = json.loads(line)
            except ValueError:  # also bytes that are no text
                continue  # incomplete after a kill; the restarted writer repeats the step
            except RecursionError:
                continue
            if not isinstance(point, dict):
                continue
            shape = self._shape(point) if callable(self._shape) else self._shape
            if (fault := fault_of_shape(point, shape)) is not None:
                self.offset -= len(complete)  # the next call says it again
                raise InputError(f"{fault}; restore the file, or delete the line").at(
                    self._path, line=self._lines_before() + number + 1
                )
            yield point

    def _lines_before(self) -> int:
        with open(self._path, "rb") as file:
            return file.read(self.offset).count(b"\n")
