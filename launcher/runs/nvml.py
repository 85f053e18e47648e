"""This machine's GPUs as NVIDIA's management library (NVML, module pynvml) shows them.

    gpus = visible_gpus(os.environ)                 # [Gpu(...)], or NvmlError with the reason
    gpus[0].sample(print)                           # {"memory_usage_megabytes": 71234.0, ...}
    gpus[0].holders()                               # ["process 4711 (python), 61.2 GB"]

NVML needs the driver alone: it makes no CUDA context, so it takes no memory on a GPU and works where torch does not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import psutil

from mmcot.errors import OperationError


class NvmlError(OperationError):
    """NVML cannot be used on this machine; the message gives the reason."""


class Gpu:
    """One GPU. ``number`` is that of its device file (/dev/nvidia3), the same for every process of the machine."""

    def __init__(self, nvml: Any, index: int) -> None:
        self._nvml, self._handle = nvml, nvml.nvmlDeviceGetHandleByIndex(index)
        self.index, self.number = index, index
        with contextlib.suppress(nvml.NVMLError):
            self.number = nvml.nvmlDeviceGetMinorNumber(self._handle)
        self.name, self.uuid = str(nvml.nvmlDeviceGetName(self._handle)), str(nvml.nvmlDeviceGetUUID(self._handle))
        self._told: set[str] = set()

    def memory(self) -> tuple[int, int]:
        """Used and total bytes."""
        found = self._nvml.nvmlDeviceGetMemoryInfo(self._handle)
        return found.used, found.total

    def sample(self, tell: Callable[[str], None]) -> dict[str, float]:
        """The GPU's metrics now; one that cannot be read is left out, and told once."""
        values = {}
        for name, read in _METRICS.items():
            try:
                values[name] = float(read(self._nvml, self._handle))
            except Exception as error:  # a metric must not end a training
                if name not in self._told:
                    self._told.add(name)
                    tell(f"GPU {self.number} ({self.name}) has no metric {name}: {error}")
        return values

    def holders(self) -> list[str]:
        """The processes that hold memory of the GPU, as far as NVML shows them to this process."""
        found = []
        with contextlib.suppress(self._nvml.NVMLError):
            for process in self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle):
                size = f", {process.usedGpuMemory / 1e9:.1f} GB" if process.usedGpuMemory else ""
                found.append(f"process {process.pid} ({_name_of(process.pid)}){size}")
        return found


# Names and units follow MLflow's own where it has the metric.
_METRICS: dict[str, Callable[[Any, Any], float]] = {
    "memory_usage_megabytes": lambda nvml, gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).used / 1e6,
    "utilization_percentage": lambda nvml, gpu: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu,
    "power_usage_watts": lambda nvml, gpu: nvml.nvmlDeviceGetPowerUsage(gpu) / 1e3,
    "temperature_celsius": lambda nvml, gpu: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU),
    # Since the driver was loaded.
    "ecc_errors_uncorrected": lambda nvml, gpu: nvml.nvmlDeviceGetTotalEccErrors(
        gpu, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
    ),
}


def open_nvml() -> Any:
    """Return the initialised module pynvml.

    Raises:
        NvmlError: it is not installed, or there is no driver.
    """
    try:
        import pynvml
    except ImportError as error:
        raise NvmlError(f"the package nvidia-ml-py is not installed ({error})") from None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise NvmlError(f"NVIDIA's driver does not answer ({error})") from None
    return pynvml


def all_gpus() -> list[Gpu]:
    """All GPUs of this machine.

    Raises:
        NvmlError: NVML cannot be used.
    """
    nvml = open_nvml()
    try:
        return [Gpu(nvml, index) for index in range(nvml.nvmlDeviceGetCount())]
    except nvml.NVMLError as error:
        raise NvmlError(f"NVIDIA's driver does not describe the GPUs ({error})") from None


def visible_gpus(environment: Mapping[str, str]) -> list[Gpu]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves to a process, in its order; without it all of the machine.

    Numbers count as with CUDA_DEVICE_ORDER=PCI_BUS_ID, which the workers of a run have. Like CUDA this stops at the
    first entry that names no GPU; a part of a GPU (MIG) is none to NVML.

    Raises:
        NvmlError: NVML cannot be used.
    """
    gpus = all_gpus()
    if "CUDA_VISIBLE_DEVICES" not in environment:
        return gpus
    chosen = []
    for entry in environment["CUDA_VISIBLE_DEVICES"].split(","):
        if (gpu := _named(entry.strip(), gpus)) is None:
            break
        chosen.append(gpu)
    return chosen


def driver_versions() -> tuple[str, tuple[int, int]]:
    """The driver's version and the newest CUDA that it supports: ("550.54.15", (12, 4)).

    Raises:
        NvmlError: NVML cannot be used.
    """
    nvml = open_nvml()
    try:
        version = int(nvml.nvmlSystemGetCudaDriverVersion_v2())  # 12040 is 12.4
        return str(nvml.nvmlSystemGetDriverVersion()), (version // 1000, version % 1000 // 10)
    except nvml.NVMLError as error:
        raise NvmlError(f"NVIDIA's driver does not give its version ({error})") from None


def _named(entry: str, gpus: list[Gpu]) -> Gpu | None:
    if entry.isdigit():
        return next((gpu for gpu in gpus if gpu.index == int(entry)), None)
    return next((gpu for gpu in gpus if entry.startswith("GPU-") and gpu.uuid.startswith(entry)), None)


def _name_of(pid: int) -> str:
    """The name of a process; of one of another container only its number is known."""
    try:
        return psutil.Process(pid).name()
    except (psutil.Error, ValueError):
        return "not visible from here"
