"""What is wrong with a machine's GPUs is a sentence before any work: hand-written drivers and GPUs."""

from __future__ import annotations

import os
import sys

import pytest
import torch
from fake_nvml import FakeGpu, install

from launcher.cluster.gpu_checks import why_fewer
from launcher.cluster.gpus import check_gpus_free, with_device
from launcher.config.loading import load_settings, parse_settings
from launcher.config.settings import Cluster, SettingsError
from launcher.pipeline.preflight import check_machine
from launcher.training.like_gpus import check_alike
from launcher.training.offload_needs import check_offload, find_missing
from launcher.training.ray_worker import _is_refusal
from mmcot.models.device import DeviceError, open_device

CU130 = {"torch_version": "2.13.0+cu130", "torch_cuda": "13.0"}


@pytest.fixture
def no_gpu_for_torch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")


def on_gpus(**cluster):
    return parse_settings({"cluster": cluster, "rationale": {"num_steps": 1}, "answer": {"num_steps": 1}})


def test_a_gpu_run_without_a_driver_is_refused_with_the_reason(monkeypatch, no_gpu_for_torch):
    install(monkeypatch, [], has_driver=False)
    with pytest.raises(SettingsError, match=r"has 0 \(NVIDIA's driver does not answer .*; install NVIDIA's driver"):
        check_machine(on_gpus(use_gpu=True, num_workers=1))


def test_a_driver_too_old_for_torch_is_named_with_the_build_to_install(monkeypatch, no_gpu_for_torch):
    install(monkeypatch, [FakeGpu(), FakeGpu()], cuda=12040, driver="550.54.15")
    with pytest.raises(
        SettingsError,
        match=r"driver 550.54.15 knows 2, but supports CUDA up to 12.4, and torch .* is built for 13.0; update the "
        r"driver, or install torch's build for CUDA 12 \(the variant whose name begins with cu12\)",
    ):
        check_machine(on_gpus(use_gpu=True, num_workers=1))


@pytest.mark.parametrize(
    ("nvml", "found", "torch_build", "reason"),
    [
        ({"cuda": 12040}, 0, {"torch_version": "2.13.0+cpu", "torch_cuda": None}, "is a build without CUDA; install"),
        ({"cuda": 12020}, 0, {"torch_version": "2.11.0+cu128", "torch_cuda": "12.8"}, "which torch cannot open"),
        ({"cuda": 13000}, 1, CU130, "which torch cannot open"),
        ({"cuda": 13000}, 2, CU130, "^$"),
        ({"has_driver": False}, 2, CU130, "^$"),
    ],
)
def test_the_reason_for_too_few_gpus_is_the_one_that_applies(monkeypatch, nvml, found, torch_build, reason):
    install(monkeypatch, [FakeGpu(), FakeGpu()], **nvml)
    text = why_fewer(found, **torch_build)
    assert (text == "") if reason == "^$" else (reason in text)


def test_gpus_that_are_hidden_are_counted(monkeypatch):
    install(monkeypatch, [FakeGpu()] * 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert why_fewer(2, **CU130).endswith("knows 4, and CUDA_VISIBLE_DEVICES='0,1' hides the others")


def test_auto_takes_the_processor_and_says_why_the_gpus_cannot_be_used(monkeypatch, no_gpu_for_torch):
    install(monkeypatch, [FakeGpu()], cuda=12040)
    said = []
    settings = with_device(on_gpus(), None, said.append, count=lambda cluster: (0, "this machine"))
    assert settings.cluster.use_gpu is False
    assert "CPU (this machine has no GPU that torch can use: its driver" in said[0] and "up to 12.4" in said[0]


def free_check(monkeypatch, gpus, *, visible=None, **options):
    install(monkeypatch, gpus)
    monkeypatch.delitem(sys.modules, "ray", raising=False)  # another test of this process may have a session open
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    said: list[str] = []
    check_gpus_free(Cluster(use_gpu=True, num_workers=options.pop("num_workers", 1)), said.append, **options)
    return said


FULL = FakeGpu(uuid="GPU-f", minor=0, used=15_500_000_000, holders=((os.getpid(), 15_000_000_000), (999_999_999, None)))
FREE = FakeGpu(uuid="GPU-e", minor=1)


def test_a_full_gpu_is_refused_with_the_processes_that_hold_it_and_the_free_ones(monkeypatch):
    with pytest.raises(SettingsError) as caught:
        free_check(monkeypatch, [FULL, FREE])
    text = str(caught.value)
    assert "GPU 0 (Tesla T4) has 0.5 of 16.0 GB free, held by process " in text
    assert f"process {os.getpid()} (" in text and "15.0 GB" in text
    assert "process 999999999 (not visible from here)" in text and text.endswith("CUDA_VISIBLE_DEVICES=1")


def test_a_full_gpu_that_the_run_does_not_use_is_no_matter(monkeypatch):
    assert free_check(monkeypatch, [FULL, FREE], visible="1,0") == []
    assert free_check(monkeypatch, [FULL, FREE], index=1) == []  # a rank of torchrun checks its own
    with pytest.raises(SettingsError, match="GPU 0 "):
        free_check(monkeypatch, [FULL, FREE], visible="1,0", index=1)


def test_a_gpu_that_is_partly_in_use_is_told(monkeypatch):
    (note,) = free_check(monkeypatch, [FakeGpu(used=8_000_000_000, holders=((999_999_999, 7_900_000_000),))])
    assert note.startswith("note: GPU 0 (Tesla T4) has 8.0 of 16.0 GB free, the rest is held by process 999999999")


def described(name="NVIDIA L4", capability=(8, 9), memory=24_000_000_000, host="a"):
    return {"name": name, "capability": list(capability), "memory": memory, "host": host}


def test_gpus_of_unlike_compute_capability_are_refused_with_their_ranks():
    gpus = [described(), described(host="b"), described("Tesla T4", (7, 5), 16_000_000_000, "c")]
    with pytest.raises(DeviceError) as caught:
        check_alike(gpus)
    text = str(caught.value)
    assert "compute capability 8.9: NVIDIA L4 with 24 GB on a for rank 0, NVIDIA L4 with 24 GB on b for rank 1" in text
    assert "compute capability 7.5: Tesla T4 with 16 GB on c for rank 2" in text
    assert _is_refusal(caught.value)  # a sentence for the user, no traceback


def test_gpus_of_other_memory_or_name_are_told_and_like_ones_are_not():
    assert check_alike([described(), described(host="b", memory=24_100_000_000)]) == []
    (note,) = check_alike([described("A100", (8, 0), 40_000_000_000), described("A100", (8, 0), 80_000_000_000)])
    assert (
        "A100 with 40 GB on a for rank 0, A100 with 80 GB on a for rank 1" in note and "40.0 GB is what every" in note
    )
    assert len(check_alike([described(), described("NVIDIA L40")])) == 1


def training(*overrides):
    return load_settings(preset="demo", overrides=[f"training.{text}" for text in overrides]).training


def test_offload_to_nvme_names_what_is_missing_to_compile_it(monkeypatch, tmp_path):
    nvme = training("offload=nvme", "zero_stage=3", f"nvme_dir={tmp_path}")
    with pytest.raises(SettingsError, match=r"no CUDA toolkit .*, no libaio; install them on every node, or use train"):
        check_offload(nvme, use_gpu=True, missing_parts=lambda use_gpu: ["CUDA toolkit (nvcc)", "libaio"])
    check_offload(nvme, use_gpu=True, missing_parts=lambda use_gpu: [])
    for other in (training("offload=cpu"), training()):
        check_offload(other, use_gpu=True, missing_parts=lambda use_gpu: ["everything"])


def test_a_machine_without_a_compiler_and_cudas_toolkit_is_seen(monkeypatch):
    import torch.utils.cpp_extension as extension

    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr(extension, "CUDA_HOME", None)
    missing = find_missing(True)
    assert [text.partition(" ")[0] for text in missing] == ["g++", "ninja", "CUDA"]
    assert [text.partition(" ")[0] for text in find_missing(False)] == ["g++", "ninja"]


def test_a_t4_takes_the_preset_that_the_refusal_of_bf16_names(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    settings = load_settings(preset="single-gpu", overrides=["training.precision=fp32"])
    for precision in (settings.training.precision, settings.generation.precision):
        assert open_device(use_gpu=True, precision=precision) == torch.device("cuda", 0)
    with pytest.raises(DeviceError, match="does not compute in bf16"):
        open_device(use_gpu=True, precision=load_settings(preset="single-gpu").training.precision)


def test_a_gpu_whose_memory_the_driver_does_not_tell_is_not_refused(monkeypatch):
    install(monkeypatch, [FakeGpu(used=None)])
    told = []
    check_gpus_free(Cluster(use_gpu=True, num_workers=1), told.append)
    assert told == []
