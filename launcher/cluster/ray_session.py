"""Connecting to a Ray cluster, or starting a local one."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import threading
from collections.abc import Iterator
from typing import Any

from launcher.cluster.auth_token import keep_token_private
from launcher.cluster.private_folder import private_ray_folder
from launcher.config.settings import Cluster
from launcher.runs.signals import sparing_children
from mmcot.errors import OperationError

_ON_GPUS = {
    # Blocks of many sizes: memory in segments that grow leaves less of it unusable.
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    # CUDA's numbers of GPUs are those of nvidia-smi and of NVML, on machines of unlike GPUs too.
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    # NCCL's watchdog writes the last collectives down (launcher/training/flight_recorder.py).
    "TORCH_FR_BUFFER_SIZE": "2000",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
}
_OLDER_NAMES = {"TORCH_FR_BUFFER_SIZE": "TORCH_NCCL_TRACE_BUFFER_SIZE"}  # torch prefers the newer one


class ClusterError(OperationError):
    """Ray does not have the resources that the settings request."""


def worker_variables(cluster: Cluster) -> dict[str, str]:
    """The environment variables that workers get: those of ``cluster.env``, and on GPUs what torch and CUDA need."""
    given = cluster.env
    on_gpus = {name: value for name, value in _ON_GPUS.items() if _OLDER_NAMES.get(name) not in given}
    # Counts are summed in main memory, over the same network.
    network = given.get("NCCL_SOCKET_IFNAME", "")
    same = {"GLOO_SOCKET_IFNAME": network} if re.fullmatch(r"[\w.,-]+", network) else {}
    return (on_gpus if cluster.use_gpu is True else {}) | same | given


def _print_no_messages_of_ray() -> None:
    """Keep Ray from printing its own messages on lost workers and nodes on standard output, kilobytes for each one.

    Commands report themselves what was lost, and Ray's logs have the rest.
    """
    from ray._private import worker

    if hasattr(worker, "print_to_stdstream"):
        worker.print_to_stdstream = lambda data, **options: None


@contextlib.contextmanager
def ray_session(cluster: Cluster) -> Iterator[None]:
    """Connect to Ray while the block lasts; a local Ray ends with the block.

    Raises:
        ClusterError: the cluster has fewer processors or GPUs than the workers need.
    """
    # Ray passes these to every worker that it starts.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OMP_NUM_THREADS", str(cluster.cpus_per_worker))
    import ray

    if ray.is_initialized():  # in a tuning's trial
        yield
        return
    _print_no_messages_of_ray()
    handler = signal.getsignal(signal.SIGTERM)
    needed = cluster.num_workers * cluster.cpus_per_worker
    # Only where there is any: with variables of its own no worker can be started in advance.
    variables = worker_variables(cluster)
    environment: dict[str, Any] = {"runtime_env": {"env_vars": variables}} if variables else {}
    if cluster.address == "local":
        # Ray's default is 15: beside one busy process of another program a worker would get 3% of a processor.
        os.environ.setdefault("RAY_worker_niceness", "0")
        keep_token_private()
        with sparing_children():  # Ray itself protects its processes from Ctrl-C
            ray.init(
                address="local",
                num_cpus=max(needed, os.cpu_count() or 1),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=private_ray_folder(),
                **environment,
            )
    else:
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR, **environment)
    if callable(handler) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # Ray has set its own, which exits with another status
    try:
        if cluster.address == "local" and cluster.use_gpu is True:
            found = int(ray.cluster_resources().get("GPU", 0))
            if found < cluster.num_workers:
                raise ClusterError(
                    f"cluster.num_workers ({cluster.num_workers}) needs a GPU each, this machine has {found}; "
                    "lower cluster.num_workers, or set cluster.use_gpu=false"
                )
        yield
    finally:
        ray.shutdown()
