"""Utilisation of the machines of a run: one process per machine samples it into its own file.

    {"step": 30, "time_ms": 1790000000000, "metrics": {"system/node-3/cpu_utilization_percentage": 91.2}}

``step`` counts seconds since the start of the file, so that machines can be plotted together.
"""

from __future__ import annotations

import contextlib
import fcntl
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil

from launcher.runs.background import background_thread
from launcher.runs.journal import Journal, JournalReader

SAMPLE_EVERY_S = 10.0


@contextlib.contextmanager
def sampling(logs: Path, step: str, *, every_s: float = SAMPLE_EVERY_S) -> Iterator[None]:
    """Sample this machine while the block lasts, unless another process on it already does."""
    logs.mkdir(parents=True, exist_ok=True)
    node = re.sub(r"[^A-Za-z0-9_.-]", "-", socket.gethostname())
    path = logs / f"{step}-system-{node}.jsonl"
    with open(path.with_suffix(".lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield
            return
        with background_thread(partial(_sample_until, path, node, every_s), name="system-metrics"):
            yield


def _sample_until(path: Path, node: str, every_s: float, stopped: threading.Event) -> None:
    first = next((point["time_ms"] / 1000 for point in JournalReader(path).read()), time.time())
    journal, network = Journal(path), psutil.net_io_counters()
    psutil.cpu_percent()  # the first call has no earlier value to compare with
    with contextlib.closing(journal):
        while not stopped.wait(every_s):
            before, network = network, psutil.net_io_counters()
            values = _sample(before, network, path.parent)
            journal.log(int(time.time() - first), {f"system/{node}/{name}": value for name, value in values.items()})


def _sample(before, network, folder: Path) -> dict[str, float]:
    """Utilisation under MLflow's names, in percent or megabytes."""
    memory, disk = psutil.virtual_memory(), psutil.disk_usage(str(folder))
    values = {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": memory.used / 1e6,
        "system_memory_usage_percentage": memory.percent,
        "disk_usage_percentage": disk.percent,
        "disk_available_megabytes": disk.free / 1e6,
        "network_receive_megabytes": (network.bytes_recv - before.bytes_recv) / 1e6,
        "network_transmit_megabytes": (network.bytes_sent - before.bytes_sent) / 1e6,
    }
    return values | _sample_gpus()


def _sample_gpus() -> dict[str, float]:
    torch = sys.modules.get("torch")  # in a worker that uses GPUs it is imported already
    if torch is None or not torch.cuda.is_available():
        return {}
    values = {}
    for number in range(torch.cuda.device_count()):
        # Both values come from NVIDIA's management library: a CUDA call would take memory on every GPU.
        with contextlib.suppress(Exception):
            values[f"gpu_{number}_memory_usage_megabytes"] = torch.cuda.device_memory_used(number) / 1e6
            values[f"gpu_{number}_utilization_percentage"] = float(torch.cuda.utilization(number))
    return values
