"""The device of the proof, times on it, and the places where the host waits for it."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import linecache
import os
import platform
import subprocess
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
ROOT = Path(__file__).parents[2]
NUM_LONGEST, NAME_LENGTH = 12, 100  # kernels named in a profile, and characters of a name
WAITS = "called a synchronizing CUDA operation"  # the beginning of torch's warning


@dataclasses.dataclass(frozen=True)
class Proof:
    """How a part is run.

    ``folder`` takes the files of a part, such as data and runs; ``results`` the part's JSON. ``judged`` is False on a
    device whose values mean nothing: a check may then fail. ``forecast`` is the JSON of the expected memory.
    """

    tiny: bool
    folder: Path = Path("gpu_proof")
    results: Path | None = None
    judged: bool = True
    forecast: Path | None = None

    def keep(self, found: dict[str, Any]) -> None:
        """Write what a part has found so far, for the case that it does not come to its end."""
        if self.results:
            temporary = self.results.with_suffix(".tmp")
            temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            temporary.replace(self.results)


def describe_machine() -> dict[str, Any]:
    asked = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "device": torch.cuda.get_device_name() if ON_GPU else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "commit": os.environ.get("MMCOT_COMMIT") or asked.stdout.strip(),
        "python": platform.python_version(),
    }


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def free_memory() -> float:
    """Give back what no tensor uses and start a new peak; returns the GiB in tensors, on a CPU 0."""
    gc.collect()
    if not ON_GPU:
        return 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated() / 2**30


def peak_gib() -> float:
    """The largest number of GiB in tensors since ``free_memory``; 0 on a CPU, which does not count it."""
    return torch.cuda.max_memory_allocated() / 2**30 if ON_GPU else 0.0


def seconds_of(run: Callable[[], Any], times: int) -> float:
    """The median time of some runs after a warm-up run."""
    run()
    taken = []
    for _ in range(times):
        synchronize()
        started = time.perf_counter()
        run()
        synchronize()
        taken.append(time.perf_counter() - started)
    return float(np.median(taken))


def copy_bytes_per_s(tiny: bool) -> float:
    """Bytes read and written a second by a copy on the device."""
    source = torch.randn(1 << (20 if tiny else 28), device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() * source.element_size() / seconds_of(lambda: target.copy_(source), 10)


def waits_of(run: Callable[[], Any]) -> dict[str, int]:
    """How often each line of Python made the host wait for the device; on a CPU never.

    A line is named with its text: ``mmcot/decoding/generation.py: return logits_BV.argmax(dim=-1).tolist()``.
    """
    if not ON_GPU:
        return {}
    with _warning_at_waits(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    places = Counter(
        f"{_shortened(warning.filename)}: {linecache.getline(warning.filename, warning.lineno).strip()}"
        for warning in caught
        if WAITS in str(warning.message)
    )
    return dict(places)


@contextlib.contextmanager
def _warning_at_waits() -> Iterator[None]:
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # else only the first wait of each kind is reported
    torch.cuda.set_sync_debug_mode("warn")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.set_warn_always(before)


def _shortened(path: str) -> str:
    return path.removeprefix(f"{ROOT}/").split("site-packages/")[-1]


def unexpected(waits: dict[str, int], intended: tuple[str, ...]) -> list[str]:
    """The places that contain none of the intended texts."""
    return [place for place in waits if not any(text in place for text in intended)]


def profile_of(run: Callable[[], Any]) -> dict[str, Any]:
    """Launches, copies between host and device, waits, seconds in kernels and the longest of a run; empty on a CPU."""
    if not ON_GPU:
        return {}
    # Without the CPU's operators there are few events; the calls that launch are among the GPU's.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        synchronize()
    events = list(profile.events() or ())
    names: Counter[str] = Counter(event.name for event in events)
    kernels = [event for event in events if event.device_type == DeviceType.CUDA]
    milliseconds: Counter[str] = Counter()
    for event in kernels:
        milliseconds[event.name[:NAME_LENGTH]] += event.time_range.elapsed_us() / 1e3
    return {
        "launches": sum(count for name, count in names.items() if "LaunchKernel" in name or name == "cudaGraphLaunch"),
        "copies": names["cudaMemcpyAsync"],
        "host_waits": sum(names[f"cuda{what}Synchronize"] for what in ("Stream", "Device", "Event")),
        "kernel_s": sum(milliseconds.values()) / 1e3,
        "longest_kernels_ms": dict(milliseconds.most_common(NUM_LONGEST)),
    }
