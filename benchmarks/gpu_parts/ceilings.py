"""What the device can do: matrix products, copies, launches."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu_parts.machine import DEVICE, Proof, copy_bytes_per_s, seconds_of
from benchmarks.gpu_parts.models import relative_error
from mmcot.models.device import open_device
from mmcot.models.flops import measure_peak_flops

LAUNCHES = 1000


def ceilings(proof: Proof) -> dict[str, Any]:
    """Operations and bytes a second, and the cost of a launch."""
    open_device(use_gpu=DEVICE.type == "cuda")
    small = torch.zeros(16, device=DEVICE)

    def launch_often() -> None:
        for _ in range(LAUNCHES):
            small.add_(1.0)

    found = {f"matmul_{name}_tflops": measure_peak_flops(DEVICE, dtype) / 1e12 for name, dtype in DTYPES.items()}
    found |= {
        "copy_gigabytes_per_s": copy_bytes_per_s(proof.tiny) / 1e9,
        "launch_us": seconds_of(launch_often, 3) / LAUNCHES * 1e6,
    }
    first, second = (torch.randn(512, 512, device=DEVICE) for _ in range(2))
    picture, kernel = torch.randn(1, 64, 64, 64, device=DEVICE), torch.randn(64, 64, 3, 3, device=DEVICE)
    errors = {
        "matrix products": relative_error(first @ second, first.double() @ second.double()),
        "convolutions": relative_error(
            torch.nn.functional.conv2d(picture, kernel),
            torch.nn.functional.conv2d(picture.double(), kernel.double()),
        ),
    }
    return {
        **found,
        "headline": f"bf16 {found['matmul_bf16_tflops']:.0f} TFLOP/s, fp32 {found['matmul_fp32_tflops']:.0f}, "
        f"copies {found['copy_gigabytes_per_s']:,.0f} GB/s, a launch {found['launch_us']:.1f} µs",
        # TF32 keeps 10 bits of a factor: its error is near 3e-4, that of fp32 near 1e-6.
        "checks": {f"{what} in fp32 do not use TF32": error < 3e-5 for what, error in errors.items()},
    }


DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
