"""The computations of a training on its engine: the optimizer step, losses, sums over ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from data_shards.stream import Step
from launcher.runs.hang_guard import HangGuard
from launcher.stages.samples import Block
from launcher.training.loader import StageStream
from launcher.training.throughput import Meter
from mmcot.models.loss import count_target_tokens, token_loss_sum


def optimizer_step(engine: Any, loaded: Step, *, seed: int, scale: float, meter: Meter, observe: bool) -> float:
    """One optimizer step over this rank's blocks; returns the loss summed over the global batch.

    Args:
        scale: world size over the target tokens of the global batch; DeepSpeed averages over ranks.
        observe: let the model measure in this step what its ``watch`` returns.
    """
    engine.train()
    loss_sum = 0.0
    for index, block in loaded.blocks:
        torch.manual_seed(_dropout_seed(seed, loaded.number, index))
        if observe:
            engine.module.observe(block.tensors if block.qids else None)  # a dummy block has no question
        meter.lap("own")
        loss = block_loss(engine, block)
        loss_sum += loss.item()
        meter.lap("forward")
        engine.backward(loss * scale, scale_wrt_gas=False)
        meter.lap("backward")
    if observe:
        engine.module.observe(None)
    engine.step()
    meter.lap("update")
    (total,) = global_sum(engine, [loss_sum])
    meter.lap("wait")
    return total


def validation_loss(
    engine: Any, stream: StageStream, num_steps: int, *, rank: int, world_size: int, hang_guard: HangGuard
) -> float:
    """Teacher-forced loss per target token over a whole split."""
    engine.eval()
    total = [0.0, 0.0]
    for step in stream.steps(rank=rank, world_size=world_size, steps=range(num_steps)):
        hang_guard.progress()
        for _, block in step.blocks:
            with torch.no_grad():
                total[0] += block_loss(engine, block).item()
            total[1] += count_target_tokens(block.labels)
    loss_sum, num_tokens = global_sum(engine, total)
    return loss_sum / num_tokens


def block_loss(engine: Any, block: Block) -> torch.Tensor:
    """The loss of a block, summed over its target tokens."""
    inputs = {name: tensor.to(engine.device, non_blocking=True) for name, tensor in block.tensors.items()}
    labels = inputs.pop("labels")
    decoder_inputs = engine.module._shift_right(labels)
    return token_loss_sum(engine(**inputs, decoder_input_ids=decoder_inputs, use_cache=False).logits, labels)


def global_sum(engine: Any, values: list[float]) -> list[float]:
    """The sums of values over all ranks, on every rank."""
    tensor = torch.tensor(values, dtype=torch.float64, device=engine.device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def _dropout_seed(seed: int, step: int, index: int) -> int:
    """A seed that depends on neither rank nor world size nor restarts."""
    return (seed * 1_000_003 + step) * 4_099 + index
