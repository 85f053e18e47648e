"""A hand-written stand-in for the module pynvml: GPUs as small dataclasses, no driver."""

from __future__ import annotations

import dataclasses
import types

import pytest


@dataclasses.dataclass
class FakeGpu:
    """A GPU of the fake; a metric that is None is not supported."""

    uuid: str = "GPU-aaaa"
    name: str = "Tesla T4"
    minor: int = 0
    used: int | None = 1_000_000_000
    total: int = 16_000_000_000
    watts: float | None = 70.5
    celsius: int = 44
    percent: int = 97
    ecc: int | None = None
    holders: tuple[tuple[int, int | None], ...] = ()  # (pid, bytes)


class FakeNvmlError(Exception):
    pass


class FakeNvml(types.ModuleType):
    """What this repository calls of pynvml."""

    NVMLError = FakeNvmlError
    NVML_TEMPERATURE_GPU = 0
    NVML_MEMORY_ERROR_TYPE_UNCORRECTED = 1
    NVML_VOLATILE_ECC = 0

    def __init__(self, gpus: list[FakeGpu], *, cuda: int = 13000, driver: str = "580.65.06", has_driver: bool = True):
        super().__init__("pynvml")
        self._gpus, self._cuda, self._driver, self._has_driver = gpus, cuda, driver, has_driver

    def nvmlInit(self):
        if not self._has_driver:
            raise FakeNvmlError("NVML Shared Library Not Found")

    def nvmlDeviceGetCount(self):
        return len(self._gpus)

    def nvmlDeviceGetHandleByIndex(self, index):
        return self._gpus[index]

    def nvmlDeviceGetMinorNumber(self, gpu):
        return gpu.minor

    def nvmlDeviceGetName(self, gpu):
        return gpu.name

    def nvmlDeviceGetUUID(self, gpu):
        return gpu.uuid

    def nvmlDeviceGetMemoryInfo(self, gpu):
        used = _supported(gpu.used)
        return types.SimpleNamespace(used=used, total=gpu.total, free=gpu.total - used)

    def nvmlDeviceGetUtilizationRates(self, gpu):
        return types.SimpleNamespace(gpu=gpu.percent)

    def nvmlDeviceGetPowerUsage(self, gpu):
        return _supported(gpu.watts) * 1000

    def nvmlDeviceGetTemperature(self, gpu, sensor):
        return gpu.celsius

    def nvmlDeviceGetTotalEccErrors(self, gpu, kind, counter):
        return _supported(gpu.ecc)

    def nvmlDeviceGetComputeRunningProcesses(self, gpu):
        return [types.SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in gpu.holders]

    def nvmlSystemGetCudaDriverVersion_v2(self):
        return self._cuda

    def nvmlSystemGetDriverVersion(self):
        return self._driver


def _supported(value):
    if value is None:
        raise FakeNvmlError("Not Supported")
    return value


def install(monkeypatch: pytest.MonkeyPatch, gpus: list[FakeGpu], **options) -> FakeNvml:
    """Let ``import pynvml`` find the fake."""
    fake = FakeNvml(gpus, **options)
    monkeypatch.setitem(__import__("sys").modules, "pynvml", fake)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return fake
