"""The product's own optimizer step on one device, without data on a disk."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from benchmarks.gpu_parts.machine import DEVICE, ON_GPU, free_memory, peak_gib
from benchmarks.gpu_parts.models import new_model, patches_of, random_batch, shape_of
from data_shards.stream import Step
from launcher.config.settings import Training
from launcher.stages.samples import Block
from launcher.training.block_graphs import BlockGraphs, reason_without_graphs
from launcher.training.throughput import Meter
from mmcot.models.flops import BACKWARD_AND_FORWARD
from mmcot.models.loss import OBJECTIVES, UNITS, count_target_tokens


class BlockShape(NamedTuple):
    """Rows of a block, their most source and target tokens, and the shortest row relative to the longest."""

    rows: int
    source: int
    target: int
    shortest: float = 1 / 3

    def __str__(self) -> str:
        """Such as "8 x (96 + 64)"."""
        like = ", like lengths" if self.shortest > 0.5 else ""
        return f"{self.rows} x ({self.source} + {self.target}){like}"


# The last one of base has about as little padding as blocks of max_tokens_per_block.
SHAPES = {
    "base": [
        BlockShape(8, 96, 64),
        BlockShape(8, 256, 128),
        BlockShape(16, 512, 128),
        BlockShape(32, 384, 128),
        BlockShape(32, 384, 128, 0.8),
    ],
    "large": [BlockShape(2, 96, 64), BlockShape(8, 96, 64), BlockShape(8, 256, 128)],
    "tiny": [BlockShape(2, 12, 8), BlockShape(2, 24, 8), BlockShape(4, 12, 8, 0.8)],
}
BLOCKS = 2  # of a step
PRECISION = "bf16" if ON_GPU else "fp32"
# Where a step may wait for the device: DeepSpeed reads the gradient's norm, and we the losses.
INTENDED_WAITS = ("launcher/training/engine_steps.py: losses = ", "deepspeed/")


@contextlib.contextmanager
def one_rank(port: int = 29571) -> Iterator[None]:
    """Open a process group of this process alone."""
    sys.modules.setdefault("mlflow", None)  # pyright: ignore[reportArgumentType], DeepSpeed imports it if it can
    os.environ.setdefault("DS_ACCELERATOR", DEVICE.type)
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", str(port))
    from launcher.training.deepspeed_engine import init_distributed

    init_distributed(use_gpu=ON_GPU, gpu_index=0 if ON_GPU else None)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


class Trainer:
    """An engine of a size of ``SHAPES``, and its steps.

    Args:
        settings: fields of ``Training`` that differ from the proof's own (ZeRO-1, bf16 on a GPU).
    """

    def __init__(self, size: str, *, dropout: float = 0.0, **settings: Any) -> None:
        from launcher.training.deepspeed_engine import build_engine

        self.before_gib = free_memory()  # DeepSpeed keeps some buffers of an engine that was closed
        self.patches = patches_of(size)
        ours = {"zero_stage": 1, "precision": PRECISION, "learning_rate": 1e-5, "cuda_graphs": False}
        self.training = Training(**{**ours, **settings})
        torch.backends.cuda.matmul.allow_tf32 = self.training.tf32
        self.engine: Any = build_engine(
            lambda: new_model(shape_of(size), patches=self.patches, device=DEVICE.type, dropout=dropout),
            self.training,
            world_size=1,
            random_weights=True,
        )
        self.graphs: BlockGraphs | None = None
        if self.training.cuda_graphs and reason_without_graphs(self.training) is None:
            self.graphs = BlockGraphs(self.engine, OBJECTIVES["text"])

    def close(self) -> None:
        """Give the engine's memory back."""
        self.graphs = None
        self.engine.destroy()
        del self.engine
        free_memory()

    def step_of(self, shape: BlockShape) -> tuple[Step, dict[str, float]]:
        """Two blocks of this size in pinned memory; and their tokens, questions and operations."""
        config, blocks = self.engine.module.config, []
        counts = {"tokens": 0.0, "questions": 0.0, "flops": 0.0, "real_tokens": 0.0}
        for index in range(BLOCKS):
            batch = random_batch(config, **shape._asdict(), seed=index)
            sources, targets = batch["attention_mask"].sum(1).tolist(), (batch["labels"] != -100).sum(1).tolist()
            counts["tokens"] += count_target_tokens(batch["labels"])
            counts["questions"] += shape.rows
            counts["real_tokens"] += sum(sources) + sum(targets)
            forward = self.engine.module.forward_flops(sources, targets, num_patches=self.patches[0])
            counts["flops"] += BACKWARD_AND_FORWARD * forward
            batch["decoder_input_ids"] = self.engine.module._shift_right(batch["labels"])
            block = Block(batch, tuple(f"q{row}" for row in range(shape.rows)))
            blocks.append((index, block.pin_memory() if ON_GPU else block))
        return Step(0, blocks), counts

    def run(self, step: Step, counts: dict[str, float]) -> float:
        """An optimizer step; returns its loss."""
        from launcher.training.engine_steps import optimizer_step

        parts = optimizer_step(
            self.engine,
            step,
            OBJECTIVES["text"],
            seed=0,
            counts={unit: counts[unit] for unit in UNITS if unit in counts},
            world_size=1,
            meter=Meter(peak_flops=1.0),
            observe=False,
            graphs=self.graphs,
        )
        return sum(parts.values())

    def peak_gib(self) -> float:
        """The peak since ``free_memory``, of this engine alone."""
        return peak_gib() - self.before_gib
