"""The optimizer's update in main memory, as training.offload=cpu computes it: torch's AdamW, fused and not.

    OMP_NUM_THREADS=1 python benchmarks/update.py [--parameters 251907840] [--rounds 3]

DeepSpeed hands the optimizer one flat fp32 tensor a parameter group; here there is one of the base size's parameters.
Processor seconds and seconds of an update, one way after the other; the weights after five of them are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from typing import Any

import torch

PLAIN = "one operation at a time"
WAYS: dict[str, Any] = {"fused": {"fused": True}, "foreach": {"foreach": True}, PLAIN: {"foreach": False}}


def main() -> None:
    """Print the seconds of an update for each way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=int, default=251_907_840)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    differences = {way: compare(way) for way in WAYS}
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    weights = torch.zeros(options.parameters, requires_grad=True)
    weights.grad = torch.full_like(weights, 1e-3)
    for way, settings in WAYS.items():  # one after the other: their states would not fit beside each other
        optimizer = torch.optim.AdamW([weights], lr=1e-4, **settings)
        optimizer.step()  # makes the state
        for _ in range(options.rounds):
            processor, wall = time.process_time(), time.perf_counter()
            optimizer.step()
            times[way].append((time.process_time() - processor, time.perf_counter() - wall))
        del optimizer
    for way, found in times.items():
        processor, wall = (statistics.median(column) for column in zip(*found, strict=True))
        print(
            json.dumps(
                {
                    "way": way,
                    "threads": torch.get_num_threads(),
                    "processor_s": round(processor, 3),
                    "wall_s": round(wall, 3),
                    "spread_processor_s": [round(min(p for p, _ in found), 3), round(max(p for p, _ in found), 3)],
                    "largest_difference": differences[way],
                }
            )
        )


def compare(way: str) -> float:
    """The largest difference of weights after five updates to those of the plainest way."""
    ends = []
    for settings in (WAYS[PLAIN], WAYS[way]):
        torch.manual_seed(0)
        weights = torch.randn(10_000, requires_grad=True)
        optimizer = torch.optim.AdamW([weights], lr=1e-2, **settings)
        for _ in range(5):
            weights.grad = torch.sin(weights.detach() * 3)
            optimizer.step()
        ends.append(weights.detach())
    return float((ends[0] - ends[1]).abs().max())


if __name__ == "__main__":
    main()
