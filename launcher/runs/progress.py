"""What a long step prints while it runs: a line every few seconds.

Three kinds of lines are classes of their own, so that ``launcher/cli/console.py`` can treat them in
its own way: ``StepHeading``, ``Phase`` and ``ProgressLine``. Elsewhere they are printed like any other line.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from launcher.runs.background import background_thread
from launcher.runs.journal import Journal, JournalReader, Pace, seconds_left

SHOW_EVERY_S = 3.0


class Phase(str):
    """What is going on from now on, such as "  starting 2 workers", until the next line."""


class StepHeading(str):
    """The beginning of a step, such as "[2/5] train-rationale"."""


class ProgressLine(str):
    """How far a step is."""


def describe_retrieval(metrics: Mapping[str, float]) -> str:
    """A sentence on ``launcher/training/retrieval.py``'s metrics."""
    return (
        f"retrieval@1 on the validation split: {metrics['retrieval_at_1']:.1%} of its pictures find their own text "
        f"among {metrics['retrieval_texts']:,.0f} different ones"
    )


class TrainingLine:
    """Prints journal points as lines: step, losses, tokens/s, time left."""

    def __init__(self, num_steps: int, report: Callable[[str], None]) -> None:
        self._num_steps, self._report = num_steps, report
        self._shown_at = time.monotonic()
        self._started_ms = time.time() * 1000
        self._seconds_of: dict[int, float] = {}  # of each step's last computation; earlier ones were lost
        self._pace = Pace()
        self._validation = ""

    def show(self, point: dict[str, Any]) -> None:
        """Show a point, unless one was shown a moment ago."""
        metrics, step = point["metrics"], point["step"]
        self._pace.add(point)
        if "validation_loss" in metrics:
            self._validation = f"  validation {metrics['validation_loss']:.4f}"
            if "retrieval_at_1" in metrics:
                self._validation += f"  retrieval {metrics['retrieval_at_1']:.1%}"
        if "note" in point and point["time_ms"] >= self._started_ms:
            self._report(f"  {point['note']}")
        if "loss" not in metrics:
            return
        if point["time_ms"] >= self._started_ms:
            other_share = metrics.get("time_share_validation", 0.0) + metrics.get("time_share_checkpoint", 0.0)
            self._seconds_of[step] = metrics["interval_s"] * (1.0 - other_share)
        if time.monotonic() - self._shown_at < SHOW_EVERY_S and step < self._num_steps:
            return
        self._shown_at = time.monotonic()
        line = (
            f"  step {step:,}/{self._num_steps:,}  loss {metrics['loss']:.4f}{self._validation}  "
            f"{metrics['tokens_per_s']:,.0f} tokens/s  {self._time_left()}"
        )
        self._report(line if step == self._num_steps else ProgressLine(line))  # a live display keeps the last one
        if step == self._num_steps:
            self._report(
                f"  {metrics['gigabytes_read']:.3f} GB of shards read, {metrics['bytes_read_per_needed']:.2f} bytes "
                "for each byte needed"
            )
            self._report(Phase("  writing the model"))

    def _time_left(self) -> str:
        found = self._pace.progress_of()
        return format_time_left(found[2] if found else None)

    def goodput(self) -> str:
        """The share of this command's training time that was spent on steps of the result."""
        total = time.time() - self._started_ms / 1000
        useful = sum(self._seconds_of.values())
        return (
            f"goodput {100 * useful / total:.0f}% of {format_seconds(total)} (the rest: start, validation, "
            "checkpoints, lost steps)"
        )


@contextlib.contextmanager
def showing(journal: Path, on_point: Callable[[dict[str, Any]], None], *, every_s: float = 1.0) -> Iterator[None]:
    """Pass a journal's points to ``on_point`` while they are written, in a thread, and the rest at the end."""
    reader = JournalReader(journal)

    def show(stopped: threading.Event) -> None:
        last = False
        while not last:
            last = stopped.wait(every_s)
            for point in reader.read():
                on_point(point)

    with background_thread(show, name="progress"):
        yield


class GenerationLine:
    """Prints a generation's progress (questions, tokens/s, time left) and appends it to a journal."""

    def __init__(self, report: Callable[[str], None], journal: Journal | None = None) -> None:
        self._report, self._journal = report, journal
        self._shown_at = time.monotonic()
        self._started = False

    def __enter__(self) -> GenerationLine:
        return self

    def __exit__(self, *error: object) -> None:
        if self._journal:
            self._journal.close()

    def show(self, progress: Any) -> None:
        """Show the progress, unless it was shown a moment ago."""
        if self._journal and not self._started:
            self._journal.begin(progress.num_before, progress.num_total, seconds_ago=progress.seconds)
            self._started = True
        if time.monotonic() - self._shown_at < SHOW_EVERY_S and progress.num_done < progress.num_total:
            return
        self._shown_at = time.monotonic()
        if self._journal:
            values = {
                "generation_tokens_per_s": progress.tokens_per_s,
                "generation_waiting_share": progress.waiting_share,
                "generation_rows_share": progress.rows_share,
            }
            self._journal.log(progress.num_done, values)
        left = seconds_left(
            progress.num_done - progress.num_before, progress.num_total - progress.num_done, progress.seconds
        )
        self._report(
            ProgressLine(
                f"  {progress.num_done:,}/{progress.num_total:,} questions  {progress.tokens_per_s:,.0f} tokens/s  "
                f"{format_time_left(left)}"
            )
        )


def format_time_left(seconds: float | None) -> str:
    """Format the time left as text; None is shown as unknown."""
    return "time left unknown" if seconds is None else f"time left {format_seconds(seconds)}"


def format_seconds(seconds: float) -> str:
    """Format seconds as minutes: 75 is "1:15"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def describe_values(values: dict[str, Any]) -> str:
    """The values of a trial as text, each named by the last part of its setting's name."""
    return ", ".join(f"{name.split('.')[-1]} {_short(value)}" for name, value in values.items()) or "the settings given"


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
