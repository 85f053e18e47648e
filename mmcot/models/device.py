"""The device of a process, chosen and prepared in one place.

device = open_device(use_gpu=True)             # the GPU that was assigned to this process
device = open_device(use_gpu=True, index=3)    # one of several visible GPUs
"""

from __future__ import annotations

import torch


class DeviceError(RuntimeError):
    """A requested GPU does not exist; the message names the GPUs that do."""


def open_device(*, use_gpu: bool, index: int | None = None) -> torch.device:
    """Choose the device of this process; every process that computes calls this first.

    cuDNN's attention is disabled: torch uses it in bf16 on Hopper, where its gradients are NaN for some
    masked lengths (pytorch#196678), and it builds a new plan for every new shape.

    Args:
        index: number among the visible GPUs; None keeps torch's current one.

    Raises:
        DeviceError: there is no such GPU.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    if not use_gpu:
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count <= (index or 0):
        raise DeviceError(
            f"GPU {index or 0} is requested, this process sees {count} (torch {torch.__version__}); "
            "start at most one process for each GPU, check CUDA_VISIBLE_DEVICES and the driver, or set "
            "cluster.use_gpu=false"
        )
    if index is not None:
        torch.cuda.set_device(index)
    return torch.device("cuda", torch.cuda.current_device())
