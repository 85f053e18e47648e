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

PEAK = 768e12  # operations/s of bf16 products, measured on an H200
# Seconds of an optimizer step of two blocks by the tokens of a block, padding included: bf16, ZeRO-1, one H200, blocks
# of 8 x (96 + 64) and up (benchmarks/gpu_proof.py, part `training`; docs/measurements.md#on-a-gpu). Without graphs a
# step is bound by launches, and its time is the same for blocks of up to some 10,000 tokens.
MEASURED_STEP_S = {
    "without graphs": {"base": {1_280: 0.157}, "large": {1_280: 0.317}},
    "with graphs": {
        "base": {1_280: 0.0241, 3_072: 0.0316, 10_240: 0.0722, 16_384: 0.0967},
        "large": {1_280: 0.0562, 3_072: 0.0762},
    },
}
SPEEDS = tuple(MEASURED_STEP_S)  # with graphs: training.cuda_graphs, the default under ZeRO-0 and, in bf16, ZeRO-1
MEASURED_BLOCKS = 2
# xl was never run. Launches: those of large, which has as many layers. Kernels: large's in proportion to operations.
XL_OPERATIONS = 1_039 / 282  # of a question, over large's (`scale.py network` prints both)
PADDING = 1.06  # of blocks of 16 (`scale.py plan` prints it)
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


def block_s(size: str, speed: str, tokens: float | np.ndarray = 0) -> float | np.ndarray:
    """Seconds that a rank takes for a block of ``tokens``, padding included, with its share of the update.

    Between measured blocks the time is interpolated; smaller ones take as long as the smallest, which is too long.
    """
    measured = MEASURED_STEP_S[speed]["large" if size == "xl" else size]
    seconds = np.interp(tokens, list(measured), list(measured.values())) / MEASURED_BLOCKS
    return seconds * XL_OPERATIONS if size == "xl" and speed == "with graphs" else seconds


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


def step_communication_s(parameters: int, *, ranks: int, link: Link, reductions: int = 1) -> float:
    """Seconds of a bf16 step's communication, without overlap.

    Gradients are all-reduced in fp32, under ZeRO-1 once a step, under ZeRO-2 in every backward pass (``reductions``);
    bf16 weights are gathered once, which is half of an all-reduce.
    """
    gradients, weights = (all_reduce_s(size * parameters, ranks, link) for size in (4, 2))
    return reductions * gradients + weights / 2


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
