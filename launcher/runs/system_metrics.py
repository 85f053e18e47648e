"""Utilisation of the machines and GPUs of a run: one process samples each into a file of its own.

    <step>-system-node-3.jsonl         {"step": 30, ..., "metrics": {"system/node-3/cpu_utilization_percentage": 91.2}}
    <step>-system-node-3-gpu-0.jsonl   {"step": 30, ..., "metrics": {"system/node-3/gpu_0_power_usage_watts": 310.2}}

``step`` counts seconds since the start of the file, so that machines can be plotted together. A worker may see its
own GPU alone, so each GPU is sampled by the first process that sees it.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil

from launcher.runs.background import background_thread
from launcher.runs.journal import Journal, JournalReader
from launcher.runs.nvml import Gpu, NvmlError, visible_gpus

SAMPLE_EVERY_S = 10.0

_LOG = logging.getLogger("mmcot.system")
Sample = Callable[[Callable[[str], None]], dict[str, float]]  # takes what tells of a metric that is missing


@contextlib.contextmanager
def sampling(logs: Path, step: str, *, gpus: bool, every_s: float = SAMPLE_EVERY_S) -> Iterator[None]:
    """Sample this machine while the block lasts, unless another process on it already does.

    What cannot be read is left out, and said once in the log and as a note in the file.

    Args:
        gpus: whether this process computes on GPUs; those that it sees are sampled too.
    """
    logs.mkdir(parents=True, exist_ok=True)
    node = re.sub(r"[^A-Za-z0-9_.-]", "-", socket.gethostname())
    with contextlib.ExitStack() as held:
        samplers = {}
        path = logs / f"{step}-system-{node}.jsonl"
        if _hold(path, held):
            samplers[path] = (f"system/{node}/", _MachineSample(logs))
        found, missing = _gpus() if gpus else ([], "")
        for gpu in found:
            if _hold(path := logs / f"{step}-system-{node}-gpu-{gpu.number}.jsonl", held):
                samplers[path] = (f"system/{node}/gpu_{gpu.number}_", gpu.sample)
        if samplers:
            work = partial(_sample_until, samplers, every_s, missing)
            held.enter_context(background_thread(work, name="system-metrics"))
        yield


def _hold(path: Path, held: contextlib.ExitStack) -> bool:
    """Whether this process is the first to sample into a file; it stays so until ``held`` ends."""
    lock = held.enter_context(path.with_suffix(".lock").open("w"))
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _gpus() -> tuple[list[Gpu], str]:
    """The GPUs that this process sees, or the reason why none can be sampled."""
    try:
        gpus = visible_gpus(os.environ)
    except NvmlError as error:
        return [], f"no metrics of GPUs: {error}"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return gpus, "" if gpus else f"no metrics of GPUs: NVML knows none of CUDA_VISIBLE_DEVICES={visible}"


def _sample_until(
    samplers: dict[Path, tuple[str, Sample]], every_s: float, missing: str, stopped: threading.Event
) -> None:
    with contextlib.ExitStack() as opened:
        files = []
        for path, (prefix, sample) in samplers.items():
            first = next((point["time_ms"] / 1000 for point in JournalReader(path).read()), time.time())
            files.append((opened.enter_context(contextlib.closing(Journal(path))), first, prefix, sample))
        if missing:
            _tell(files[0][0], missing)
        while not stopped.wait(every_s):
            for journal, first, prefix, sample in files:
                values = sample(partial(_tell, journal))
                journal.log(int(time.time() - first), {f"{prefix}{name}": value for name, value in values.items()})


def _tell(journal: Journal, text: str) -> None:
    _LOG.warning(text)
    journal.note(0, text)


class _MachineSample:
    """Utilisation of processors, memory, disk and network under MLflow's names, in percent or megabytes."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._network = str(folder), psutil.net_io_counters()
        psutil.cpu_percent()  # the first call has no earlier value to compare with

    def __call__(self, tell: Callable[[str], None]) -> dict[str, float]:
        before, self._network = self._network, psutil.net_io_counters()
        memory, disk = psutil.virtual_memory(), psutil.disk_usage(self._folder)
        return {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / 1e6,
            "system_memory_usage_percentage": memory.percent,
            "disk_usage_percentage": disk.percent,
            "disk_available_megabytes": disk.free / 1e6,
            "network_receive_megabytes": (self._network.bytes_recv - before.bytes_recv) / 1e6,
            "network_transmit_megabytes": (self._network.bytes_sent - before.bytes_sent) / 1e6,
        }
