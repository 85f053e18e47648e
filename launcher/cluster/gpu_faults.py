"""GPUs with a hardware fault: a worker records them, and an actor reserves them so that Ray does not assign them."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_shards.atomic_files import commit_json, read_json

# Faults of the hardware or its driver. A device-side assert or an illegal address is a fault of the code.
_SIGNS_OF_A_GPU_FAULT = (
    "uncorrectable ECC error",
    "unspecified launch failure",
    "CUBLAS_STATUS_EXECUTION_FAILED",
    "CUBLAS_STATUS_INTERNAL_ERROR",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "hardware stack error",
    "GPU has fallen off the bus",
    "CUDA error: unknown error",
    "CUDA-capable device(s) is/are busy or unavailable",
    "cudaErrorDevicesUnavailable",
    "CUDNN_STATUS_EXECUTION_FAILED",
    "NVLink",
)


_HOLD_TIMEOUT_S = 30.0


@dataclasses.dataclass(frozen=True)
class GpuFault:
    """A GPU whose hardware failed: Ray's node, the GPU's number on it, the host's name, and the error."""

    node_id: str
    gpu: int
    host: str
    error: str

    def __str__(self) -> str:
        return f"GPU {self.gpu} of {self.host}"


def is_gpu_fault(error: BaseException) -> bool:
    """Whether an error is a hardware fault, after which a restart on another GPU can succeed."""
    return any(sign in str(error) for sign in _SIGNS_OF_A_GPU_FAULT)


def note_fault(path: Path, error: BaseException) -> None:
    """Record in a file, from the Ray worker on it, that a GPU failed."""
    import ray

    context = ray.get_runtime_context()
    import torch

    number = torch.cuda.current_device() if torch.cuda.is_initialized() else int(os.environ.get("LOCAL_RANK", 0))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")  # those of all ranks of this node
    gpu = int(visible[number]) if number < len(visible) and visible[number].isdecimal() else number
    commit_json(
        path, {"node_id": context.get_node_id(), "gpu": gpu, "host": socket.gethostname(), "error": str(error)[:500]}
    )


def read_faults(paths: Iterator[Path]) -> list[GpuFault]:
    """Read the faults that workers recorded."""
    return [GpuFault(**read_json(path)) for path in sorted(paths)]


def hold_gpus(faults: list[GpuFault]) -> list[Any]:
    """Reserve failed GPUs, so that Ray does not assign them; returns the handles of the reserving actors.

    Ray chooses the GPU of an actor itself, so actors are started on the node until one has the GPU.
    """
    import ray
    from ray.exceptions import GetTimeoutError, RayActorError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    held, actor_class = [], ray.remote(_Holder)
    for fault in faults:
        others: list[Any] = []
        strategy = NodeAffinitySchedulingStrategy(fault.node_id, soft=False)
        with contextlib.suppress(GetTimeoutError, RayActorError):  # none is free, or the node is gone
            while True:
                actor = actor_class.options(num_cpus=0, num_gpus=1, scheduling_strategy=strategy).remote()
                others.append(actor)
                if fault.gpu in ray.get(actor.gpus.remote(), timeout=_HOLD_TIMEOUT_S):
                    held.append(others.pop())
                    break
        for actor in others:
            ray.kill(actor)
    return held


class _Holder:
    """An actor that reserves a GPU and does not use it."""

    def gpus(self) -> list[int]:
        import ray

        return [int(gpu) for gpu in ray.get_gpu_ids()]
