"""Checks of an optimizer step: finite, and applied on every rank."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, NoReturn

import torch

from data_shards.stream import Step
from launcher.training.collectives import gather_json
from mmcot.errors import OperationError


class TrainingError(OperationError):
    """The training cannot continue; the message names the step and the reason."""


@contextlib.contextmanager
def full_memory_explained(loaded: Step) -> Iterator[None]:
    """Raise a TrainingError where a GPU's memory gets full in a step, with what needs less."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        shapes = [(*block.tensors["input_ids"].shape, block.labels.shape[1]) for _, block in loaded.blocks]
        rows, source, target = max(shapes, key=lambda shape: shape[0] * (shape[1] + shape[2]))
        raise TrainingError(
            f"step {loaded.number}: the GPU's memory is full; the largest block of the step has {rows} questions of "
            f"{source} + {target} tokens. Set training.activation_checkpointing=true, with which this run continues; "
            "or start another run.dir with a smaller training.micro_batch_size (or training.max_tokens_per_block below "
            f"{rows * (source + target):,}), a higher training.zero_stage or training.offload=cpu. torch says: "
            f"{str(error).splitlines()[0]}"
        ) from error


def gradient_norm(engine: Any) -> dict[str, float]:
    """The gradient norm before clipping; empty before the first step."""
    norm = engine.get_global_grad_norm()
    return {} if norm is None else {"grad_norm": float(norm)}


def check_finite(values: dict[str, float], step: int, last_checkpoint: int, culprits: str = "") -> None:
    """Raise TrainingError if one of the named values of a step is NaN or infinite."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise TrainingError(
                f"step {step}: the {name} is {value}; nothing of this step was kept, the last checkpoint is that of "
                f"step {last_checkpoint}. Lower training.learning_rate, or use training.precision=fp32.{culprits}"
            )


def was_applied(engine: Any, loss: float) -> bool:
    """Whether a step was finite and DeepSpeed updated the weights; the same on every rank."""
    values = (loss, *gradient_norm(engine).values())
    return all(map(math.isfinite, values)) and not engine.skipped_steps


def raise_not_applied(engine: Any, loaded: Step, loss: float, last_checkpoint: int) -> NoReturn:
    """Raise on every rank for a step that was not finite, or whose update DeepSpeed skipped without a message.

    Raises:
        TrainingError: its message lists the questions of the global batch.
    """
    norm = gradient_norm(engine).get("grad_norm")
    values = {"loss": loss} if norm is None else {"loss": loss, "gradient norm": norm}
    qids = gather_json([qid for _, block in loaded.blocks for qid in block.qids])
    culprits = f" The questions of its batch: {', '.join(qid for share in qids for qid in share)}"
    check_finite(values, loaded.number, last_checkpoint, culprits)
    raise TrainingError(
        f"step {loaded.number}: DeepSpeed skipped the update; the last checkpoint is that of step {last_checkpoint}. "
        f"Lower training.learning_rate.{culprits}"
    )
