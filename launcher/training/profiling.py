"""A profile of some steps, as a trace that Perfetto (https://ui.perfetto.dev) and chrome://tracing open."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

_LOG = logging.getLogger("mmcot.train")


class StepProfile:
    """Profiles the steps ``first`` to ``last - 1`` of a rank and writes their trace.

    Args:
        path: the trace, gzipped JSON.
        steps: first and last; None profiles nothing.
    """

    def __init__(self, path: Path, steps: tuple[int, int] | None) -> None:
        self._path, self._steps = path, steps
        self._profile: Any = None

    def before(self, step: int) -> None:
        """Start, where this is the first step."""
        if self._steps and step == self._steps[0]:
            from torch.profiler import ProfilerActivity, profile, supported_activities

            wanted = {ProfilerActivity.CPU, ProfilerActivity.CUDA} & supported_activities()
            self._profile = profile(activities=wanted, profile_memory=True)
            self._profile.start()

    def after(self, done: int) -> None:
        """Write the trace, where the last step is done."""
        if self._profile is not None and self._steps and done >= self._steps[1]:
            self.close()

    def close(self) -> None:
        """Write the trace of what was profiled, where the training ends in between."""
        if self._profile is None:
            return
        self._profile.stop()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._profile.export_chrome_trace(str(self._path))
        self._profile = None
        _LOG.info("the trace of the profiled steps is %s", self._path)
