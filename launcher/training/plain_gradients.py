"""The gradients of a training without sharding (ZeRO-0): averaged over ranks at once, then clipped.

DeepSpeed's own way copies them into a buffer and back, with one rank as well, and keeps no norm of them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist


def use_plain_gradients(engine: Any, *, clip_norm: float) -> None:
    """Let ``engine.step()`` average and clip gradients with this module; the engine's own clipping must be off.

    ``engine.get_global_grad_norm()`` then returns the norm before clipping, a float32 scalar.

    Args:
        clip_norm: largest norm of all gradients together; 0 clips nothing.
    """
    engine.buffered_allreduce_fallback = partial(_average_and_clip, engine, clip_norm)


@torch.no_grad()
def _average_and_clip(engine: Any, clip_norm: float, **_: Any) -> None:
    """Average by one collective; several ranks have afterwards gradients that are parts of one tensor."""
    parameters = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    for parameter in parameters:
        if parameter.grad is None:  # a rank without it would wait for the others
            parameter.grad = torch.zeros_like(parameter)
    if (world_size := dist.get_world_size()) > 1:
        flat = torch.cat([parameter.grad.reshape(-1) for parameter in parameters])
        for parameter in parameters:
            parameter.grad = None
        dist.all_reduce(flat)
        flat.div_(world_size)
        sizes = [parameter.numel() for parameter in parameters]
        for parameter, part in zip(parameters, flat.split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
    if clip_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
    engine._global_grad_norm = norm
