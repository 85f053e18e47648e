"""The GPUs of a training's ranks compared: a group must compute alike, and is as fast as its slowest GPU.

describe_gpu(device)       # {"name": "NVIDIA L4", "capability": [8, 9], "memory": 23034396672, "host": "node-3"}
"""

from __future__ import annotations

import socket
from collections import defaultdict
from typing import Any


def describe_gpu() -> dict[str, Any]:
    """This process's GPU; every rank sends it to all."""
    import torch

    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": found.name,
        "capability": [found.major, found.minor],
        "memory": found.total_memory,
        "host": socket.gethostname(),
    }


def check_alike(gpus: list[dict[str, Any]]) -> list[str]:
    """Compare the GPUs of all ranks, in their order; returns notes on a mixture that computes.

    Raises:
        DeviceError: their compute capabilities differ: kernels, and with them results, would depend on the rank.
    """
    from mmcot.models.device import DeviceError  # imports torch

    kinds: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for rank, gpu in enumerate(gpus):
        kinds[tuple(gpu["capability"])].append(rank)
    if len(kinds) > 1:
        shown = "; ".join(
            f"compute capability {'.'.join(map(str, kind))}: {_shown(gpus, ranks)}" for kind, ranks in kinds.items()
        )
        raise DeviceError(
            f"the ranks have unlike GPUs ({shown}), which round differently; train on GPUs of one kind: choose nodes "
            "alike, or on one machine set CUDA_VISIBLE_DEVICES"
        )
    names = {gpu["name"] for gpu in gpus}
    sizes = [gpu["memory"] for gpu in gpus]
    if len(names) == 1 and max(sizes) < 1.05 * min(sizes):  # drivers reserve a little more or less
        return []
    return [
        f"the ranks have unlike GPUs ({_shown(gpus, range(len(gpus)))}): each step takes as long as on the slowest, "
        f"and {min(sizes) / 1e9:.1f} GB is what every rank may use"
    ]


def _shown(gpus: list[dict[str, Any]], ranks: Any) -> str:
    kinds: dict[tuple[str, int, str], list[int]] = defaultdict(list)
    for rank in ranks:
        gpu = gpus[rank]
        kinds[gpu["name"], round(gpu["memory"] / 1e9), gpu["host"]].append(rank)
    return ", ".join(
        f"{name} with {size} GB on {host} for rank {' '.join(map(str, found))}"
        for (name, size, host), found in kinds.items()
    )
