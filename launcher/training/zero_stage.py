"""The ZeRO stage of a run whose ``training.zero_stage`` is auto: the one that shards least and fits.

Sharding costs communication, and stages 2 and 3 reduce gradients in hooks that every block pays for. So the stage
is the lowest one whose weights, gradients and optimizer state take at most half of a device's memory; the other half
is for activations. Stage 0 keeps no fp32 copy of bf16 weights and is never chosen for them.

The first rank decides at the first start of a run and stores it. It stays the same at every later number of workers,
because another stage stores other files in a checkpoint:

    runs/demo/zero_stage.json    {"zero_stage": 0, "reason": "..."}
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

import torch
from pydantic import ValidationError

from data_shards.atomic_files import commit_json
from data_shards.json_shapes import Whole, read_record
from launcher.config.loading import read_deepspeed
from launcher.config.settings import SettingsError, Training
from launcher.runs.checkpoint_names import MANIFEST, checkpoints_by_step
from launcher.runs.records import read_zero_stage
from launcher.runs.run_dir import RunDir
from launcher.training.collectives import agreed, gather_json
from launcher.training.host_memory import total_bytes
from mmcot.models.trained_parts import ParameterCounts

STATES_SHARE = 0.5  # of a device's memory, for weights, gradients and optimizer state
# Bytes a parameter by stage: on every rank, and divided by the number of ranks. AdamW's two moments are fp32.
# Those of bf16 are the allocator's peaks (docs/scale.md): weights and a block's gradients in bf16, the sum in fp32, the
# optimizer's fp32 weights and moments. In fp32 gradients have a second copy while they are averaged.
_BYTES = {
    "fp32": {0: (20.0, 0.0), 1: (8.0, 16.0), 2: (4.0, 16.0), 3: (0.0, 20.0)},
    "bf16": {1: (8.0, 12.0), 2: (2.0, 16.0), 3: (0.0, 18.0)},
}
_FROZEN_BYTES = {"fp32": 4.0, "bf16": 2.0}  # its weight alone; stage 3 shards it too


def with_zero_stage(
    training: Training, run_dir: RunDir, stage: str, *, world_size: int, count_parameters: Callable[[], ParameterCounts]
) -> tuple[Training, str | None]:
    """Return the settings with their ZeRO stage decided, and a note where it was decided now; every rank calls it.

    Args:
        stage: the training, whose latest checkpoint decides where the run's folder does not.
        count_parameters: called only where nothing was decided before.
    """
    if training.zero_stage != "auto":
        return training, None
    memory = min(gather_json(_memory_of_rank()))

    def decide() -> dict[str, Any]:
        found = _decided(run_dir, stage)
        is_new = found is None
        if found is None:
            number, reason = choose_stage(training, counts=count_parameters(), world_size=world_size, memory=memory)
            found = {"zero_stage": number, "reason": reason}
        if training.offload != "none" and found["zero_stage"] == 0:
            raise SettingsError(
                f"{run_dir.zero_stage} has ZeRO stage 0, which shards nothing that training.offload="
                f"{training.offload} could move; leave that setting out, or start another run.dir"
            )
        if not run_dir.zero_stage.exists():
            commit_json(run_dir.zero_stage, found)
        return {**found, "is_new": is_new}

    found = agreed(decide)
    note = f"ZeRO stage {found['zero_stage']}: {found['reason']}" if found["is_new"] else None
    return training.model_copy(update={"zero_stage": found["zero_stage"]}), note


def choose_stage(training: Training, *, counts: ParameterCounts, world_size: int, memory: float) -> tuple[int, str]:
    """Return the stage, and the reason for it.

    Args:
        memory: bytes of the rank with the least memory.
    """
    if (theirs := stage_of_json(training)) is not None:
        return theirs, "as training.deepspeed says"
    if training.offload == "nvme":
        return 3, "training.offload=nvme needs it"
    lowest = 1 if training.offload == "cpu" else 0
    stages = [number for number in _BYTES[training.precision] if number >= lowest]
    needed = {
        number: counts.trained * state_bytes(number, training.precision, world_size)
        + counts.frozen * frozen_bytes(number, training.precision, world_size)
        for number in stages
    }
    fitting = [number for number in stages if needed[number] <= STATES_SHARE * memory]
    number = fitting[0] if fitting else stages[-1]
    frozen = f" ({counts.frozen:,} of them frozen)" if counts.frozen else ""
    return number, (
        f"{counts.total:,} parameters{frozen} in {training.precision} take {needed[number] / 1e9:.1f} GB on each of "
        f"{world_size} ranks, of {memory / 1e9:.1f} GB"
        + (f"; stage {number - 1} would take {needed[number - 1] / 1e9:.1f} GB" if number - 1 in needed else "")
    )


def stage_of_json(training: Training) -> int | None:
    """The ZeRO stage in ``training.deepspeed``, if it names one.

    Raises:
        SettingsError: the training cannot run with it.
    """
    zero = read_deepspeed(training.deepspeed).get("zero_optimization")
    stage = zero.get("stage", "auto") if isinstance(zero, dict) else "auto"
    if stage == "auto":
        return None
    try:
        Training.model_validate(training.model_dump() | {"zero_stage": stage})
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise SettingsError(f"training.deepspeed sets zero_optimization.stage = {stage!r}: {reason}") from None
    return int(stage)


def state_bytes(stage: int, precision: str, world_size: int) -> float:
    """Bytes a trained parameter of weights, gradients and optimizer state on one of ``world_size`` ranks."""
    whole, sharded = _BYTES[precision][stage]
    return whole + sharded / world_size


def frozen_bytes(stage: int, precision: str, world_size: int) -> float:
    """Bytes of a frozen parameter on one of ``world_size`` ranks."""
    return _FROZEN_BYTES[precision] / (world_size if stage == 3 else 1)


def _decided(run_dir: RunDir, stage: str) -> dict[str, Any] | None:
    """What was decided before: the run's folder has it, or a checkpoint that was fetched from a store."""
    if run_dir.zero_stage.exists():
        return read_zero_stage(run_dir.zero_stage)
    checkpoints = run_dir.checkpoints(stage)
    for path in reversed(checkpoints_by_step(checkpoints)):
        with contextlib.suppress(OSError, ValueError):  # a damaged one is reported where it is loaded
            manifest = read_record(path / MANIFEST, {"zero_stage": Whole(0, 3)})
            return {"zero_stage": manifest["zero_stage"], "reason": "that of its latest checkpoint"}
    return None


def _memory_of_rank() -> int:
    """Bytes of this rank's GPU, or its share of this machine's main memory."""
    if torch.distributed.get_backend() == "nccl":
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return total_bytes() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
