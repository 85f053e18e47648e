"""The process group of a training under Ray Train, whose sockets listen on the cluster's network alone."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import ray
from ray.train._internal.utils import get_address_and_port
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group, _TorchBackend

LOOPBACK = "127.0.0.1"


@dataclass
class GroupConfig(TorchConfig):
    """Ray Train's, and whether all ranks are on this machine."""

    local: bool = False

    @property
    def backend_cls(self) -> type:
        """Opens the group."""
        return _Group


class _Group(_TorchBackend):
    """As Ray Train opens the group, with an address chosen by us; it is closed as Ray does."""

    def on_start(self, worker_group: Any, backend_config: GroupConfig) -> None:
        address, port = worker_group.execute_single(0, get_address_and_port)
        worker_group.execute(_set_torch_distributed_env_vars)
        ray.get(
            [
                worker_group.execute_single_async(
                    rank,
                    _join,
                    address=LOOPBACK if backend_config.local else address,
                    port=port,
                    backend=backend_config.backend,
                    world_rank=rank,
                    world_size=len(worker_group),
                    timeout_s=backend_config.timeout_s,
                )
                for rank in range(len(worker_group))
            ]
        )


def _join(*, address: str, port: int, backend: str, world_rank: int, world_size: int, timeout_s: int) -> None:
    """Join the group, in a worker."""
    from launcher.training.rank_sockets import listen_on_ranks_network

    os.environ.update({"MASTER_ADDR": address, "MASTER_PORT": str(port)})
    listen_on_ranks_network()
    _setup_torch_process_group(backend, world_rank, world_size, "env://", timeout_s)
