"""The device a process computes on, chosen and prepared in one place.

device = open_device(use_gpu=True)             # the GPU this process was given
device = open_device(use_gpu=True, index=3)    # of several that it sees
"""

from __future__ import annotations

import torch


class DeviceError(RuntimeError):
    """A GPU that is asked for and not there; the message says what is there."""


def open_device(*, use_gpu: bool, index: int | None = None) -> torch.device:
    """Choose the device of this process; every process that computes calls this first.

    cuDNN's attention is off: torch takes it in bf16 on Hopper, where its gradients are NaN for some
    masked lengths (pytorch#196678), and it plans every new shape anew.

    Args:
        index: which of the GPUs that this process sees; None leaves torch's current one.

    Raises:
        DeviceError: there is no such GPU.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    if not use_gpu:
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count <= (index or 0):
        raise DeviceError(
            f"GPU {index or 0} was asked for, this process sees {count} (torch {torch.__version__}); "
            "start at most one process for each GPU, check CUDA_VISIBLE_DEVICES and the driver, or set "
            "cluster.use_gpu=false"
        )
    if index is not None:
        torch.cuda.set_device(index)
    return torch.device("cuda", torch.cuda.current_device())
