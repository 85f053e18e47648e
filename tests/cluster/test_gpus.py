"""Which device a run computes on, how it stays there, and what happens to a GPU that fails."""

from __future__ import annotations

import json

import pytest
import torch

from data_shards.writer import write_manifest
from launcher.cluster.gpu_faults import GpuFault, hold_gpus, is_gpu_fault
from launcher.cluster.gpus import with_device
from launcher.config.loading import parse_settings
from launcher.config.settings import SettingsError
from launcher.runs.run_dir import RunDir
from launcher.runs.run_settings import write_or_verify_settings
from launcher.training import torchrun as rank
from launcher.training.launch import WorkersFailed, _check_gpus_left
from launcher.training.ray_worker import _is_lost_peer
from mmcot.models.device import DeviceError, open_device


def settings_with(**cluster):
    return parse_settings({"cluster": cluster, "rationale": {"num_steps": 1}, "answer": {"num_steps": 1}})


def gpus(number):
    return lambda cluster: (number, "this machine")


@pytest.fixture
def run_dir(tmp_path):
    return RunDir(tmp_path / "run")


@pytest.mark.parametrize(("number", "decided"), [(0, False), (2, True)])
def test_auto_takes_gpus_where_there_are_some_says_so_and_keeps_it(run_dir, number, decided):
    said = []
    first = with_device(settings_with(num_workers=2), run_dir, said.append, count=gpus(number))
    assert first.cluster.use_gpu is decided
    assert len(said) == 1 and ("2 GPUs" in said[0] if decided else "CPU" in said[0])
    assert json.loads(run_dir.device.read_text())["use_gpu"] is decided
    again = with_device(
        settings_with(num_workers=2), run_dir, said.append, count=gpus(2)
    )  # GPUs that came later change nothing
    assert again.cluster.use_gpu is decided
    assert len(said) == 1


def test_a_run_that_began_on_gpus_is_refused_by_name_where_they_are_missing(run_dir):
    with_device(settings_with(), run_dir, print, count=gpus(2))
    with pytest.raises(
        SettingsError, match="run was started on GPUs, and this machine has none; start it where GPUs are"
    ):
        with_device(settings_with(), run_dir, print, count=gpus(0))


def test_a_run_keeps_its_device_against_a_setting_of_another(run_dir):
    with_device(settings_with(), run_dir, print, count=gpus(0))
    with pytest.raises(SettingsError, match="was started with cluster.use_gpu false, now it is true"):
        with_device(settings_with(use_gpu=True), run_dir, print, count=gpus(2))
    assert with_device(settings_with(use_gpu=False), run_dir, print, count=gpus(2)).cluster.use_gpu is False


def test_a_run_folder_that_names_its_device_decides_where_the_setting_is_silent(run_dir):
    run_dir.path.mkdir()
    write_or_verify_settings(run_dir, settings_with(use_gpu=False))  # as a run of before `auto` wrote it
    write_or_verify_settings(run_dir, settings_with())
    assert with_device(settings_with(), run_dir, print, count=gpus(4)).cluster.use_gpu is False


def test_fewer_gpus_than_workers_are_refused_before_any_work_and_nothing_is_kept(run_dir):
    for use_gpu in ("auto", True):
        with pytest.raises(SettingsError, match=r"cluster.num_workers \(4\) needs a GPU each, this machine has 2"):
            with_device(settings_with(use_gpu=use_gpu, num_workers=4), run_dir, print, count=gpus(2))
    assert with_device(settings_with(use_gpu=False), run_dir, print, count=gpus(2)).cluster.use_gpu is False


def test_a_command_without_a_run_takes_as_many_workers_as_there_are_gpus():
    assert with_device(settings_with(num_workers=4), None, print, count=gpus(2)).cluster.num_workers == 2


def test_features_made_in_the_driver_need_no_gpu_there(tmp_path):
    from launcher.data.feature_tasks import FeaturesJob, FeaturesWorker

    settings = settings_with(use_gpu=True)
    (tmp_path / "text").mkdir()
    write_manifest(tmp_path / "text", "text", [], {"counts": {}, "lists": {}, "ceilings": None})
    assert FeaturesWorker(FeaturesJob(settings, None, str(tmp_path))).device == "cpu"


def test_all_ranks_of_a_run_whose_folder_names_its_device_decide_alike(run_dir):
    run_dir.path.mkdir()
    write_or_verify_settings(run_dir, settings_with(use_gpu=False))
    assert [
        with_device(settings_with(), run_dir, print, count=gpus(2), keep=rank == 0).cluster.use_gpu for rank in range(2)
    ] == [False, False]


def test_demo_and_ablation_compute_on_the_cpu_everywhere():
    from launcher.config.loading import load_settings

    assert [load_settings(preset=name).cluster.use_gpu for name in ("demo", "ablation")] == [False, False]


def test_opening_a_device_turns_cudnn_attention_off():
    torch.backends.cuda.enable_cudnn_sdp(True)
    assert open_device(use_gpu=False) == torch.device("cpu")
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("tf32", [False, True])
def test_products_and_convolutions_use_tf32_only_where_it_is_asked_for(tf32):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not tf32
    open_device(use_gpu=False, tf32=tf32)
    found = (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    open_device(use_gpu=False)
    assert found == (tf32, tf32)


@pytest.mark.parametrize(("capability", "precision", "refused"), [((7, 5), "bf16", True), ((7, 5), "fp32", False)])
def test_bf16_is_refused_before_ampere_with_what_to_use(monkeypatch, capability, precision, refused):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    if not refused:
        assert open_device(use_gpu=True, precision=precision) == torch.device("cuda", 0)
        return
    with pytest.raises(DeviceError, match=r"Tesla T4, compute capability 7\.5.*--set training\.precision=fp32"):
        open_device(use_gpu=True, precision=precision)


def test_a_gpu_that_is_not_there_is_told_in_a_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(
        DeviceError, match="GPU 1 is requested, this process sees 1 .*; start at most one process for each GPU"
    ):
        open_device(use_gpu=True, index=1)


@pytest.mark.parametrize(
    ("environment", "visible", "index"),
    [
        ({"LOCAL_RANK": "3", "TORCHELASTIC_RUN_ID": "x"}, 4, 3),  # torchrun shows every rank all GPUs
        (
            {"LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "x"},
            1,
            1,
        ),  # and one GPU for two ranks is an error that open_device tells
        ({"LOCAL_RANK": "3"}, 4, 3),  # srun without binding
        ({"LOCAL_RANK": "3"}, 1, 0),  # srun --gpus-per-task 1
    ],
)
def test_a_rank_takes_the_gpu_of_its_place_on_the_machine(monkeypatch, environment, visible, index):
    for name in ("LOCAL_RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(rank, "count_own_gpus", lambda: visible)
    assert rank.gpu_index() == index


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: uncorrectable ECC error encountered\nCompile with TORCH_USE_CUDA_DSA",
        "CUDA error: unspecified launch failure",
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(...)`",
    ],
)
def test_a_hardware_fault_is_worth_another_start(text):
    assert is_gpu_fault(RuntimeError(text))


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: device-side assert triggered",
        "CUDA out of memory. Tried to allocate 2 GiB",
        "index 7 is out of range",
    ],
)
def test_an_error_of_code_is_not_taken_for_the_hardware(text):
    assert not is_gpu_fault(RuntimeError(text))
    assert not _is_lost_peer(RuntimeError(text))


@pytest.mark.ray
def test_a_failed_gpu_is_held_so_that_nobody_else_gets_it():
    import ray

    from launcher.cluster.auth_token import keep_token_private

    keep_token_private()
    ray.init(address="local", num_cpus=1, num_gpus=3, include_dashboard=False, log_to_driver=False)
    try:
        node = ray.nodes()[0]["NodeID"]
        fault = GpuFault(node, 1, "here", "CUDA error: uncorrectable ECC error encountered")
        held = hold_gpus([fault])
        assert len(held) == 1

        @ray.remote(num_gpus=2, num_cpus=0)
        def given():
            return sorted(int(gpu) for gpu in ray.get_gpu_ids())

        assert ray.get(given.remote(), timeout=60) == [0, 2]
        with pytest.raises(WorkersFailed, match="needs 3 GPUs, 2 are left without GPU 1 of here"):
            _check_gpus_left(
                type("Job", (), {"stage": "answer", "settings": settings_with(num_workers=3)})(), [fault], num_held=1
            )
    finally:
        ray.shutdown()
