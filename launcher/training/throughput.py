"""A rank's counts of work and shares of time between two logged points."""

from __future__ import annotations

import math
import time

import psutil
import torch

from data_shards.stream import Step
from launcher.training.laps import open_laps
from mmcot.models.contract import Model
from mmcot.models.flops import BACKWARD_AND_FORWARD
from mmcot.models.loss import IGNORED_LABEL, UNITS, count_units

# The counts of a step, summed over ranks, in the order of ``count_step``; the units of losses come first.
COUNTS = (*UNITS, "source_tokens", "padded_tokens", "flops", "bytes_read", "bytes_needed")


def count_step(loaded: Step, model: Model) -> list[float]:
    """The ``COUNTS`` of this rank's blocks; of dummies only the padding is counted."""
    units = dict.fromkeys(UNITS, 0.0)
    sources = padded = flops = 0.0
    for _, block in loaded.blocks:
        mask, labels = block.tensors["attention_mask"], block.labels
        padded += mask.numel() + labels.numel()
        if not block.qids:
            continue
        found = count_units(block.tensors)
        units = {unit: units[unit] + found[unit] for unit in UNITS}
        source_lengths, target_lengths = mask.sum(1).tolist(), (labels != IGNORED_LABEL).sum(1).tolist()
        patches = block.tensors["vision_features"].shape[1] if "vision_features" in block.tensors else 0
        flops += BACKWARD_AND_FORWARD * model.forward_flops(source_lengths, target_lengths, num_patches=patches)
        sources += sum(source_lengths)
    return [*units.values(), sources, padded, flops, loaded.bytes_read, loaded.bytes_needed]


_CPU = torch.device("cpu")


class Meter:
    """Sums the counts of all ranks and measures the shares of this rank's time.

    ``lap("forward")`` adds the time since the last lap to "forward"; all other time is "own". On a GPU it is the
    GPU's time (``laps.py``).

    Args:
        peak_flops: operations a second that all ranks together can do; infinite where the count would be wrong.
        device: what this rank computes on.
    """

    def __init__(self, *, peak_flops: float, device: torch.device = _CPU) -> None:
        self._peak_flops, self._laps, self._on_gpu = peak_flops, open_laps(device), device.type == "cuda"
        self._bytes_read = self._bytes_needed = 0.0
        self._process = psutil.Process()
        self.restart()

    def restart(self) -> None:
        """Count from now on: the time and the memory before belong to no step."""
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
        self._start_interval(time.perf_counter())
        self._laps.restart()

    def _start_interval(self, started: float) -> None:
        self._started = started
        self._steps, self._sums = 0, dict.fromkeys(COUNTS, 0.0)

    def lap(self, name: str) -> None:
        """Add the time since the last lap to ``name``."""
        self._laps.lap(name)

    def add(self, counts: list[float]) -> None:
        """Add a step's ``COUNTS``, summed over all ranks."""
        self._steps += 1
        self._laps.fold()
        for name, value in zip(COUNTS, counts, strict=True):
            self._sums[name] += value

    def collect(self) -> dict[str, float]:
        """The metrics since the last call: rates and shares of time; bytes since the start."""
        before = time.perf_counter()
        self.lap("own")
        after = time.perf_counter()  # the mark is between the two, so that shares do not exceed 1
        spent = self._laps.read()
        seconds, sums = after - self._started, self._sums
        real = sums["tokens"] + sums["source_tokens"]
        self._bytes_read += sums["bytes_read"]
        self._bytes_needed += sums["bytes_needed"]
        metrics = {
            "tokens_per_s": real / seconds,
            "questions_per_s": sums["questions"] / seconds,
            "padding_factor": sums["padded_tokens"] / max(1.0, real),
            "interval_s": seconds,
            "step_time_s": seconds / self._steps,
            "gigabytes_read": self._bytes_read / 1e9,
            "bytes_read_per_needed": self._bytes_read / max(1.0, self._bytes_needed),
            **self._utilization(sums["flops"] / seconds),
            **self._memory(),
            **{f"time_share_{name}": part / seconds for name, part in spent.items()},
        }
        self._start_interval(before)
        return metrics

    def _utilization(self, flops_per_s: float) -> dict[str, float]:
        if math.isinf(self._peak_flops):
            return {}
        return {"tflops_per_s": flops_per_s / 1e12, "mfu": flops_per_s / self._peak_flops}

    def _memory(self) -> dict[str, float]:
        values = {"memory_gb": self._process.memory_info().rss / 1e9}
        if self._on_gpu:
            values["gpu_memory_peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
            torch.cuda.reset_peak_memory_stats()  # a point has the peak since the point before
        return values
