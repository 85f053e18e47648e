"""What a rank's time is spent on: the seconds between marks, by the host's clock or by its GPU's.

    laps = open_laps(device)
    laps.restart()
    laps.lap("data")               # what has passed since the last mark was spent on "data"
    laps.lap("forward")
    laps.read()                    # {"data": 0.8, "forward": 0.2}, and counts from here

The host launches a GPU's work ahead of it, so its clock charges the backward pass to whatever waits for it next. On a
GPU a mark is therefore an event in the stream, which the GPU passes when the work before it is done. Marking waits
for nothing; the times are read late.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

# The host launches nothing in these: the GPU waits for data, or for the host's own work between its kernels.
IDLE_LAPS = ("data", "own")
DEVICE_IDLE = "device_idle"


class Laps(Protocol):
    """Seconds by the name of what they were spent on."""

    def restart(self) -> None:
        """Forget what was counted, and count from now on."""

    def lap(self, name: str) -> None:
        """Count the time since the last mark as ``name``."""

    def fold(self) -> None:
        """Add up what can be read without waiting; called once a step, so that marks do not pile up."""

    def read(self) -> dict[str, float]:
        """The seconds since the last call, by name; the last mark is waited for."""
        ...


def open_laps(device: torch.device) -> Laps:
    """The clock of a device: CUDA's events on a GPU, otherwise the host's."""
    return DeviceLaps() if device.type == "cuda" else HostLaps()


class HostLaps:
    """Laps by the host's clock, where the host computes itself."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forget what was counted, and count from now on."""
        self._last = time.perf_counter()
        self._seconds: dict[str, float] = defaultdict(float)

    def lap(self, name: str) -> None:
        """Count the time since the last mark as ``name``."""
        now = time.perf_counter()
        self._seconds[name] += now - self._last
        self._last = now

    def fold(self) -> None:
        """Nothing is left to add up."""

    def read(self) -> dict[str, float]:
        """The seconds since the last call, by name."""
        seconds, self._seconds = dict(self._seconds), defaultdict(float)
        return seconds


class DeviceLaps:
    """Laps by the clock of the current GPU.

    Between two marks lies what the GPU did from the end of the work before the first to the end of the work before
    the second. Where the host launches nothing in between (``IDLE_LAPS``), it did nothing: the sum of these is
    ``device_idle``. Pauses between the kernels of one lap are not seen.

    Args:
        make_event: makes an event with ``record()``, ``query()``, ``synchronize()`` and ``elapsed_time(later)`` in
            milliseconds; by default CUDA's.
    """

    def __init__(self, make_event: Any = None) -> None:
        self._make = make_event or _cuda_event
        self._unused: list[Any] = []
        self.restart()

    def restart(self) -> None:
        """Forget what was counted, and count from now on."""
        self._seconds: dict[str, float] = defaultdict(float)
        self._marks: deque[tuple[str, Any]] = deque()  # the first one is the last that was added up
        self.lap("")

    def lap(self, name: str) -> None:
        """Put a mark into the stream: what the GPU does up to it is spent on ``name``."""
        event = self._unused.pop() if self._unused else self._make()
        event.record()
        self._marks.append((name, event))

    def fold(self) -> None:
        """Add up the laps whose marks the GPU has passed."""
        while len(self._marks) > 1 and self._marks[1][1].query():
            _, before = self._marks.popleft()
            name, event = self._marks[0]
            self._seconds[name] += before.elapsed_time(event) / 1000
            self._unused.append(before)

    def read(self) -> dict[str, float]:
        """The seconds since the last call, by name, and the sum of ``IDLE_LAPS`` as ``device_idle``."""
        self._marks[-1][1].synchronize()
        self.fold()
        seconds, self._seconds = dict(self._seconds), defaultdict(float)
        return seconds | {DEVICE_IDLE: sum(seconds.get(name, 0.0) for name in IDLE_LAPS)}


def _cuda_event() -> torch.cuda.Event:
    import torch

    return torch.cuda.Event(enable_timing=True)
