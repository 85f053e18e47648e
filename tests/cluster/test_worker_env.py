"""The environment variables of workers."""

from __future__ import annotations

import os

import pytest

from launcher.cluster.ray_session import ray_session, worker_variables
from launcher.config.loading import load_settings
from launcher.config.settings import SettingsError
from launcher.runs.run_dir import RunDir
from launcher.runs.run_settings import without_free
from launcher.runs.status import describe_start


def settings_of(*overrides):
    return load_settings(preset="demo", overrides=overrides)


def test_the_variables_are_shown_and_no_result_depends_on_them():
    settings = settings_of("cluster.env={NCCL_SOCKET_IFNAME: eth0, NCCL_IB_DISABLE: 1}")
    assert settings.cluster.env == {"NCCL_SOCKET_IFNAME": "eth0", "NCCL_IB_DISABLE": "1"}
    lines = describe_start(settings, RunDir(settings.run_dir))
    assert "environment of the workers: NCCL_SOCKET_IFNAME=eth0, NCCL_IB_DISABLE=1" in lines
    assert without_free(settings.model_dump()) == without_free(settings_of().model_dump())


@pytest.mark.parametrize("name", ["HOME", "PYTHONPATH", "LD_PRELOAD", "RAY_ADDRESS"])
def test_a_variable_of_another_kind_is_refused_by_name(name):
    with pytest.raises(SettingsError, match=f"{name} is no variable of communication"):
        settings_of(f"cluster.env.{name}=x")


def test_on_gpus_memory_is_taken_in_segments_that_grow_unless_it_is_set_otherwise():
    assert worker_variables(settings_of().cluster) == {}
    on_gpus = settings_of("cluster.use_gpu=true").cluster
    assert worker_variables(on_gpus)["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    network = settings_of("cluster.env.NCCL_SOCKET_IFNAME=eth0").cluster
    assert worker_variables(network) == {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "eth0"}
    other = settings_of("cluster.use_gpu=true", "cluster.env.PYTORCH_ALLOC_CONF=backend:native").cluster
    assert worker_variables(other)["PYTORCH_ALLOC_CONF"] == "backend:native"


def test_how_often_a_training_validates_decides_a_result_where_the_best_model_is_exported():
    often, seldom = "training.validate_every=10", "training.validate_every=20"
    best = "training.export=best"
    assert without_free(settings_of(often).model_dump()) == without_free(settings_of(seldom).model_dump())
    assert without_free(settings_of(often, best).model_dump()) != without_free(settings_of(seldom, best).model_dump())


@pytest.mark.ray
@pytest.mark.processes
def test_every_worker_of_ray_has_the_variables():
    import ray

    with ray_session(settings_of("cluster.num_workers=1", "cluster.env.NCCL_DEBUG=INFO").cluster):
        found = ray.get(ray.remote(lambda: os.environ.get("NCCL_DEBUG")).remote())
    assert found == "INFO"


def test_the_numbers_of_gpus_are_those_of_the_driver_unless_it_is_set_otherwise():
    assert worker_variables(settings_of("cluster.use_gpu=true").cluster)["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    other = settings_of("cluster.use_gpu=true", "cluster.env.CUDA_DEVICE_ORDER=FASTEST_FIRST").cluster
    assert worker_variables(other)["CUDA_DEVICE_ORDER"] == "FASTEST_FIRST"


def test_nccl_writes_its_last_collectives_down_unless_it_is_set_otherwise():
    variables = worker_variables(settings_of("cluster.use_gpu=true").cluster)
    assert variables["TORCH_FR_BUFFER_SIZE"] == "2000" and variables["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    older = settings_of("cluster.use_gpu=true", "cluster.env.TORCH_NCCL_TRACE_BUFFER_SIZE=20").cluster
    assert "TORCH_FR_BUFFER_SIZE" not in worker_variables(older)  # which torch would read instead
    none = settings_of("cluster.use_gpu=true", "cluster.env.TORCH_NCCL_DUMP_ON_TIMEOUT=0").cluster
    assert worker_variables(none)["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "0"
