"""The computations of a training on its engine: the optimizer step, losses, sums over ranks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from data_shards.stream import Step
from launcher.runs.hang_guard import HangGuard
from launcher.stages.samples import Block
from launcher.training.block_graphs import BlockGraphs
from launcher.training.collectives import host_sum
from launcher.training.loader import StageStream
from launcher.training.throughput import Meter
from mmcot.models.loss import UNITS, LossParts, Objective, count_units


def optimizer_step(
    engine: Any,
    loaded: Step,
    objective: Objective,
    *,
    seed: int,
    counts: Mapping[str, float],
    world_size: int,
    meter: Meter,
    observe: bool,
    graphs: BlockGraphs | None = None,
) -> dict[str, float]:
    """One optimizer step over this rank's blocks; returns each part of the loss over the global batch.

    Args:
        counts: by unit of a part, its number in the global batch.
        world_size: DeepSpeed averages gradients over ranks, so each part's sum is scaled by it.
        observe: let the model measure in this step what its ``watch`` returns.
        graphs: run blocks by them where they can; of an observed step all blocks but the first that has questions.
    """
    engine.train()
    found: dict[str, list[torch.Tensor]] = defaultdict(list)  # by name, a sum a block; the device is not waited for
    units: dict[str, str] = {}
    scales = {unit: world_size / max(1.0, count) for unit, count in counts.items()}
    for index, block in loaded.blocks:
        block_seed = _dropout_seed(seed, loaded.number, index)
        observed = observe and bool(block.qids)  # a dummy block has no question
        parts = graphs.run(block, seed=block_seed, scales=scales) if graphs and not observed else None
        if parts is not None:
            meter.lap("forward_and_backward")
        else:
            torch.manual_seed(block_seed)
            engine.module.observe(block.tensors if observed else None)
            parts = _forward_and_backward(engine, block, objective, scales, meter)
            engine.module.observe(None)
            observe = observe and not (graphs and observed)
        for name, (part, unit) in parts.items():
            found[name].append(part)
            units[name] = unit
    engine.step()
    meter.lap("update")
    totals = torch.stack([torch.stack(sums).double().sum() for sums in found.values()])
    dist.all_reduce(totals)
    losses = {name: total / max(1.0, counts[units[name]]) for name, total in zip(found, totals.tolist(), strict=True)}
    meter.lap("wait")
    return losses


def _forward_and_backward(
    engine: Any, block: Block, objective: Objective, scales: Mapping[str, float], meter: Meter
) -> LossParts:
    """Add a block's gradients; the parts of its loss keep nothing of the forward pass alive, which a graph forbids."""
    meter.lap("own")
    parts = block_loss(engine, block, objective)
    meter.lap("forward")
    scaled = [part * scales[unit] for part, unit in parts.values()]
    engine.backward(sum(scaled[1:], scaled[0]), scale_wrt_gas=False)
    meter.lap("backward")
    return {name: (part.detach(), unit) for name, (part, unit) in parts.items()}


def validation_loss(
    engine: Any,
    stream: StageStream,
    objective: Objective,
    num_steps: int,
    *,
    rank: int,
    world_size: int,
    hang_guard: HangGuard,
) -> dict[str, float]:
    """Each part of the teacher-forced loss, per unit, over a whole split."""
    engine.eval()
    sums: defaultdict[str, float] = defaultdict(float)
    units: dict[str, str] = {}
    counts: dict[str, float] = dict.fromkeys(UNITS, 0.0)
    for step in stream.steps(rank=rank, world_size=world_size, steps=range(num_steps)):
        hang_guard.progress()
        for _, block in step.blocks:
            with torch.no_grad():
                for name, (part, unit) in block_loss(engine, block, objective).items():
                    sums[name] += part.item()
                    units[name] = unit
            if block.qids:  # a dummy block has none
                counts = {unit: counts[unit] + count for unit, count in count_units(block.tensors).items()}
    totals = host_sum([*sums.values(), *counts.values()])
    number_of: dict[str, float] = dict(zip(counts, totals[len(sums) :], strict=True))
    return {name: total / max(1.0, number_of[units[name]]) for name, total in zip(sums, totals, strict=False)}


def block_loss(engine: Any, block: Block, objective: Objective) -> LossParts:
    """The parts of a block's loss, each summed over its target tokens or questions; 0 for a dummy block."""
    inputs = {name: tensor.to(engine.device, non_blocking=True) for name, tensor in block.tensors.items()}
    labels = inputs.pop("labels")
    parts = objective(engine, inputs, labels)
    if block.qids:
        return parts
    return {name: (part * 0.0, unit) for name, (part, unit) in parts.items()}  # its rows are no questions of their own


def named_losses(parts: Mapping[str, float], name: str) -> dict[str, float]:
    """The loss under ``name``, and where it has several parts each of them under ``<name>_<part>``."""
    of_parts = {f"{name}_{part}": value for part, value in parts.items()} if len(parts) > 1 else {}
    return {name: sum(parts.values())} | of_parts


def _dropout_seed(seed: int, step: int, index: int) -> int:
    """A seed that depends on neither rank nor world size nor restarts."""
    return (seed * 1_000_003 + step) * 4_099 + index
