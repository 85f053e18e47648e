"""What `benchmarks/scale.py` assumes of machines that were not available, and the arithmetic on it; no measurement.

time_s = all_reduce_s(num_bytes, RANKS, LINKS["400 Gb/s a GPU"])
"""

from __future__ import annotations

import dataclasses
import heapq
import math

import numpy as np

from data_shards.generated_texts import Task
from launcher.cluster.task_queue import TaskQueue

QUESTIONS = 10_000_000
NODES, GPUS = 64, 8
RANKS = NODES * GPUS
SHARD = 512  # questions a shard, the default
BATCHES = (2048, 8192)
FEATURE_BYTES = {
    "patch": 64 * 208 * 2 + 128,
    "vit": 145 * 1024 * 2 + 128,
}  # an .npy member; a picture for every question

PEAK = 989e12  # operations/s of an H100, dense bf16
# Seconds of an optimizer step of two blocks of 8 x (96 + 64) tokens on an H100, measured before the launches were
# reduced (docs/measurements.md#on-a-gpu). The time was the same for all sizes of blocks: it is the launches'.
MEASURED_STEP_S = {"base": 0.465, "large": 0.866}
MEASURED_BLOCKS = 2
LAUNCHES_THEN, LAUNCHES_NOW = 3_547, 1_631  # of such a block of base, counted (docs/measurements.md)
LIKE = {"base": "base", "large": "large", "xl": "large"}  # xl was never run; it has the number of layers of large
SPEEDS = ("as measured", "launches reduced")  # the second is an estimate: time in proportion to launches
NVLINK = 450e9  # bytes/s of a GPU, one direction
EFFICIENCY = 0.8  # of a link's rate that a collective reaches
HOP_S = {"nvlink": 2e-6, "network": 5e-6}
NFS_BYTES_S, NFS_OPERATIONS_S, NFS_ROUND_TRIP_S = 5e9, 50_000, 0.5e-3  # one server, all clients together
STORE_REQUESTS_S = 5_500  # GET a second and prefix, as S3 states


@dataclasses.dataclass(frozen=True)
class Link:
    """A node's network bandwidth, bytes/s, one direction."""

    node_bytes_s: float


LINKS = {"400 Gb/s a GPU": Link(8 * 50e9), "400 Gb/s a node": Link(50e9), "25 Gb/s a node": Link(3.125e9)}


def draw_lengths(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Source and target tokens with the means of ScienceQA's QCM-E (68 and 55) and a longer tail, int32 [N]."""
    chance = np.random.default_rng(seed)
    source = np.clip(chance.lognormal(math.log(58), 0.55, count), 16, 512)
    target = np.clip(chance.lognormal(math.log(46), 0.60, count), 4, 512)
    return source.astype(np.int32), target.astype(np.int32)


def block_s(size: str, speed: str) -> float:
    """Seconds that a rank takes for a block, its share of the update included; the block's size makes no difference."""
    measured = MEASURED_STEP_S[LIKE[size]] / MEASURED_BLOCKS
    return measured if speed == SPEEDS[0] else measured * LAUNCHES_NOW / LAUNCHES_THEN


def all_reduce_s(num_bytes: float, ranks: int, link: Link, *, hierarchical: bool = True) -> float:
    """Seconds of an all-reduce.

    Flat: one ring through all GPUs, which leaves and enters each node once. Hierarchical: reduce-scatter in the node,
    eight rings between nodes over an eighth each, all-gather in the node.
    """
    nodes, inside = max(1, ranks // GPUS), min(ranks, GPUS)
    within = 2 * (inside - 1) * (num_bytes / inside / NVLINK / EFFICIENCY + HOP_S["nvlink"])
    if nodes == 1:
        return within
    if not hierarchical:
        one_ring = min(link.node_bytes_s, NVLINK)
        return 2 * (ranks - 1) * (num_bytes / ranks / one_ring / EFFICIENCY + HOP_S["network"])
    between = 2 * (nodes - 1) * (num_bytes / nodes / link.node_bytes_s / EFFICIENCY + HOP_S["network"])
    return within + between


def step_communication_s(
    parameters: int, *, number_bytes: int, micro_steps: int, ranks: int, link: Link, hierarchical: bool = True
) -> float:
    """Seconds of a ZeRO-2 step's communication, without overlap.

    DeepSpeed all-reduces the gradients in every backward pass and gathers the weights once.
    """
    whole = all_reduce_s(parameters * number_bytes, ranks, link, hierarchical=hierarchical)
    return micro_steps * whole + whole / 2


def simulate_queue(costs: np.ndarray, seconds: np.ndarray, *, workers: int, dispatch_s: float) -> dict[str, float]:
    """Run the real queue on a virtual clock; the driver assigns one task at a time."""
    tasks = [Task("train", f"train-{number // 2:06d}", 256 * (number % 2), 256) for number in range(len(costs))]
    queue: TaskQueue[Task] = TaskQueue(dict(zip(tasks, costs.tolist(), strict=True)), max_attempts=3)
    durations = dict(zip(tasks, seconds.tolist(), strict=True))
    free = [(0.0, worker) for worker in range(workers)]
    driver_free, busy, ends = 0.0, 0.0, np.zeros(workers)
    while queue:
        since, worker = heapq.heappop(free)
        driver_free = max(driver_free, since) + dispatch_s
        task = queue.take()
        busy += durations[task]
        ends[worker] = driver_free + durations[task]
        heapq.heappush(free, (ends[worker], worker))
    total = ends.max()
    return {
        "total_s": total,
        "busy": busy / workers / total,
        "tail_s": total - ends.min(),
        "driver_busy": len(costs) * dispatch_s / total,
    }
