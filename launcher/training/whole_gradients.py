"""The step's gradients where every rank has all of them: under ZeRO-0, and in bf16 under ZeRO-1.

They are averaged over ranks in one collective for each of a few large tensors, in fp32. DeepSpeed copies
them into a buffer and back, with one rank as well, in bf16 sends them in bf16 although it has added them up in fp32,
adds, measures and clips them parameter by parameter, and under ZeRO-0 keeps no norm.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

VALUES_AT_ONCE = 50_000_000  # of a block's bf16 gradients, copied into one tensor before they are added up


def no_whole_gradients(engine: Any) -> str | None:
    """Why this engine's gradients are not added up by this module; None where they are."""
    if engine.zero_optimization_stage() == 0 or isinstance(engine.optimizer, BF16_Optimizer):
        return None
    return f"DeepSpeed's {type(engine.optimizer).__name__} has buffers of its own for gradients"


def use_whole_gradients(engine: Any, *, clip_norm: float, in_place: bool = False) -> None:
    """Let ``engine.backward()`` and ``engine.step()`` add up, average and clip gradients with this module.

    ``engine.get_global_grad_norm()`` returns the norm before clipping, a float32 scalar.

    Args:
        clip_norm: largest norm of all gradients together, 0 clips nothing. In fp32 the engine's own clipping must be
            off; in bf16 it is not asked.
        in_place: let fp32 gradients be parts of one tensor in all steps, at the same addresses, as CUDA graphs need
            it. Those of bf16 always are, and those of several ranks: one collective averages them where they are.
    """
    if not engine.bfloat16_enabled():
        if in_place or dist.get_world_size() > 1:
            _keep_in_place(engine)
        engine.buffered_allreduce_fallback = partial(_average_and_clip, engine, clip_norm)
        return
    optimizer, parts = engine.optimizer, _parts(engine.optimizer)
    _forget_autograd(optimizer)
    totals = optimizer.fp32_groups_actual_gradients_flat
    engine.buffered_allreduce_fallback = partial(_average, totals)
    optimizer.update_hp_grads = partial(_add_up, optimizer, parts)
    optimizer.step = partial(_update, optimizer, clip_norm)


def _forget_autograd(optimizer: Any) -> None:
    """Detach DeepSpeed's views of the bf16 weights.

    It made them with autograd on, and so keeps a node of the default stream for every weight: no CUDA graph could be
    captured.
    """
    optimizer.bf16_groups_flat = [flat.detach() for flat in optimizer.bf16_groups_flat]
    optimizer.bf16_partitioned_groups = [[part.detach() for part in g] for g in optimizer.bf16_partitioned_groups]
    for parameters in optimizer.bf16_groups:
        for parameter in parameters:
            if (mapping := getattr(parameter, "_hp_mapping", None)) is not None:
                mapping.lp_fragment = mapping.lp_fragment.detach()


def _keep_in_place(engine: Any) -> None:
    """Make the gradients parts of one tensor of zeros, ``engine.flat_gradients``, to which backward passes add."""
    parameters = _trained(engine)
    engine.flat_gradients = torch.zeros(
        sum(parameter.numel() for parameter in parameters), dtype=parameters[0].dtype, device=parameters[0].device
    )
    parts = engine.flat_gradients.split([parameter.numel() for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view_as(parameter)
    engine.zero_grad = engine.flat_gradients.zero_


@torch.no_grad()
def _average_and_clip(engine: Any, clip_norm: float, **_: Any) -> None:
    """Average fp32 gradients over ranks and clip them; of several ranks they are parts of one tensor."""
    parameters, world_size = _trained(engine), dist.get_world_size()
    if world_size > 1:
        dist.all_reduce(engine.flat_gradients)
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]) / world_size
    engine._global_grad_norm = norm
    if (flat := getattr(engine, "flat_gradients", None)) is None:
        if clip_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
        return
    factor = (clip_norm / (norm + 1e-6)).clamp(max=1.0) if clip_norm > 0 else torch.ones_like(norm)
    flat.mul_(factor / world_size)  # one pass for both


def _trained(engine: Any) -> list[torch.nn.Parameter]:
    return [parameter for parameter in engine.module.parameters() if parameter.requires_grad]


@torch.no_grad()
def _update(optimizer: Any, clip_norm: float) -> None:
    """The step of a ``BF16_Optimizer``: clip, update the fp32 weights, round them to the bf16 weights.

    The engine sets the gradients to zero afterwards. DeepSpeed's step waits for the GPU four times: it looks whether
    the norm is finite, and whether to clip. Here a norm that is not finite makes weights that are not; the training
    ends at the step's loss and norm, which it reads anyway.
    """
    totals = optimizer.fp32_groups_actual_gradients_flat
    norm = torch.nn.utils.get_total_norm(totals)
    optimizer._global_grad_norm, optimizer.overflow = norm, False
    if clip_norm > 0:
        factor = (clip_norm / (norm + 1e-6)).clamp(max=1.0)
        for total in totals:
            total.mul_(factor)
    partitions = zip(optimizer.fp32_groups_flat_partition, optimizer.fp32_groups_gradient_flat_partition, strict=True)
    for weights, gradients in partitions:
        weights.grad = gradients
    optimizer.optimizer.step()
    optimizer._lazy_init_hp_params_optimizer_state()
    optimizer.update_lp_params()


@torch.no_grad()
def _average(tensors: list[torch.Tensor], **_: Any) -> None:
    if (world_size := dist.get_world_size()) > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)
            tensor.div_(world_size)


def _parts(optimizer: Any) -> list[tuple[list[torch.nn.Parameter], torch.Tensor]]:
    """Neighbouring parameters with their part of the fp32 total, each of about ``VALUES_AT_ONCE`` values or less."""
    parts = []
    for parameters, total in zip(optimizer.bf16_groups, optimizer.fp32_groups_actual_gradients_flat, strict=True):
        chosen: list[torch.nn.Parameter] = []
        start = size = 0
        for parameter in parameters:
            if chosen and size + parameter.numel() > VALUES_AT_ONCE:
                parts.append((chosen, total[start : start + size]))
                chosen, start, size = [], start + size, 0
            chosen.append(parameter)
            size += parameter.numel()
        parts.append((chosen, total[start : start + size]))
    return parts


@torch.no_grad()
def _add_up(optimizer: Any, parts: list[tuple[list[torch.nn.Parameter], torch.Tensor]], **_: Any) -> None:
    """Add a block's bf16 gradients to the fp32 totals, and drop them."""
    for parameters, total in parts:
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        total.add_(torch.cat([gradient.reshape(-1) for gradient in gradients]))
        for parameter in parameters:
            parameter.grad = None
    optimizer.fp32_groups_has_gradients = [[True] * len(group) for group in optimizer.bf16_groups]
