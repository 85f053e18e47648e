"""Metrics of the GPUs that a run uses, from a hand-written NVML."""

from __future__ import annotations

import json
import logging
import re
import sys
import time

import pytest
from fake_nvml import FakeGpu, install

from launcher.runs.nvml import NvmlError, visible_gpus
from launcher.runs.system_metrics import sampling


def points_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def sample(logs, step="train", seconds=0.2):
    with sampling(logs, step, gpus=True, every_s=0.02):
        time.sleep(seconds)


def test_memory_power_temperature_utilisation_and_ecc_errors_of_a_gpu_are_sampled(tmp_path, monkeypatch):
    install(monkeypatch, [FakeGpu(minor=3, ecc=2)])
    sample(tmp_path)
    (path,) = tmp_path.glob("train-system-*-gpu-3.jsonl")
    found = {key.rpartition("gpu_3_")[2]: value for key, value in points_of(path)[-1]["metrics"].items()}
    assert found == {
        "memory_usage_megabytes": 1000.0,
        "utilization_percentage": 97.0,
        "power_usage_watts": 70.5,
        "temperature_celsius": 44.0,
        "ecc_errors_uncorrected": 2.0,
    }
    assert all(key.startswith("system/") for point in points_of(path) for key in point["metrics"])


def test_a_metric_that_a_gpu_does_not_have_is_told_once_and_the_others_are_sampled(tmp_path, monkeypatch, caplog):
    install(monkeypatch, [FakeGpu(watts=None)])
    monkeypatch.setattr(logging.getLogger("mmcot"), "propagate", True)  # a worker's own log switches it off
    sample(tmp_path)
    (path,) = tmp_path.glob("train-system-*-gpu-0.jsonl")
    points = points_of(path)
    assert len([point for point in points if point["metrics"]]) > 2
    notes = [point["note"] for point in points if "note" in point]
    assert notes == [
        "GPU 0 (Tesla T4) has no metric power_usage_watts: Not Supported",
        "GPU 0 (Tesla T4) has no metric ecc_errors_uncorrected: Not Supported",
    ]
    assert [record.getMessage() for record in caplog.records] == notes


@pytest.mark.parametrize(
    ("without", "reason"),
    [
        ("driver", r"no metrics of GPUs: NVIDIA's driver does not answer \(NVML Shared Library Not Found\)"),
        ("package", "no metrics of GPUs: the package nvidia-ml-py is not installed"),
    ],
)
def test_a_missing_driver_or_package_is_told_once_and_the_machine_is_sampled(tmp_path, monkeypatch, without, reason):
    install(monkeypatch, [FakeGpu()], has_driver=False)
    if without == "package":
        monkeypatch.setitem(sys.modules, "pynvml", None)
    sample(tmp_path)
    (path,) = tmp_path.glob("train-system-*.jsonl")
    points = points_of(path)
    with pytest.raises(NvmlError):
        visible_gpus({})
    (note,) = [point["note"] for point in points if "note" in point]
    assert re.match(reason, note) and len(points) > 2


def test_a_run_on_processors_samples_no_gpu(tmp_path, monkeypatch):
    install(monkeypatch, [FakeGpu()])
    with sampling(tmp_path, "train", gpus=False, every_s=0.02):
        time.sleep(0.1)
    assert not list(tmp_path.glob("*-gpu-*"))


def test_each_gpu_is_sampled_by_one_process_also_where_a_worker_sees_only_its_own(tmp_path, monkeypatch):
    install(monkeypatch, [FakeGpu(uuid="GPU-a", minor=0), FakeGpu(uuid="GPU-b", minor=1)])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with sampling(tmp_path, "rationales", gpus=True, every_s=0.02):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
        with sampling(tmp_path, "rationales", gpus=True, every_s=0.02):
            time.sleep(0.2)
    for number in (0, 1):
        (path,) = tmp_path.glob(f"*-gpu-{number}.jsonl")
        seconds = [point["time_ms"] for point in points_of(path)]
        assert len(seconds) <= 12  # of two processes it would be twice as many


@pytest.mark.parametrize(
    ("visible", "expected"),
    [(None, [0, 1, 2]), ("2,0", [2, 0]), ("GPU-bb", [1]), ("1,9,0", [1]), ("", []), ("MIG-x", []), ("-1", [])],
)
def test_the_visible_gpus_are_those_that_cuda_would_take(monkeypatch, visible, expected):
    install(monkeypatch, [FakeGpu(uuid="GPU-aa"), FakeGpu(uuid="GPU-bbcc"), FakeGpu(uuid="GPU-dd")])
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert [gpu.index for gpu in visible_gpus(environment)] == expected
