"""The device of a process, chosen and prepared in one place.

device = open_device(use_gpu=True)             # the GPU that was assigned to this process
device = open_device(use_gpu=True, index=3)    # one of several visible GPUs
"""

from __future__ import annotations

import numpy as np
import torch

from mmcot.errors import OperationError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # by the name of a precision
_FIRST_WITH_BF16 = (8, 0)  # compute capability of Ampere; before it bf16 is slower than fp32, or has no operations


class DeviceError(OperationError):
    """A requested GPU does not exist, or cannot compute as requested; the message names those that do."""


def open_device(
    *, use_gpu: bool, index: int | None = None, precision: str = "fp32", tf32: bool = False
) -> torch.device:
    """Choose the device of this process; every process that computes calls this first.

    cuDNN's attention is disabled: torch uses it in bf16 on Hopper, where its gradients are NaN for some
    masked lengths (pytorch#196678), and it builds a new plan for every new shape.

    Args:
        index: number among the visible GPUs; None keeps torch's current one.
        precision: a key of ``DTYPES``, in which this process computes.
        tf32: let matrix products and convolutions in fp32 round their factors to 10 bits of mantissa, on GPUs from
            Ampere on; torch's own default does so in convolutions.

    Raises:
        DeviceError: there is no such GPU, or it cannot compute in this precision.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
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
    device = torch.device("cuda", torch.cuda.current_device())
    capability = torch.cuda.get_device_capability(device)
    if not has_precision(device, precision):
        raise DeviceError(
            f"GPU {device.index} ({torch.cuda.get_device_name(device)}, compute capability "
            f"{'.'.join(map(str, capability))}) does not compute in bf16, which needs 8.0 (Ampere) or newer; use "
            "training.precision=fp32 and generation.precision=fp32, such as `--preset single-gpu "
            "--set training.precision=fp32`"
        )
    return device


def has_precision(device: torch.device | int, precision: str) -> bool:
    """Whether a GPU computes in a precision, a key of ``DTYPES``."""
    return precision != "bf16" or torch.cuda.get_device_capability(device) >= _FIRST_WITH_BF16


def to_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """Whole numbers as a tensor on the device, without waiting for what it computes."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
