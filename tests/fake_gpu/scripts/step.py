"""Counts of an optimizer step of two blocks: step.py ZERO_STAGE PRECISION; with TRACE=1 also its waits and copies."""

from __future__ import annotations

import json
import os
import sys

import fakegpu  # pyright: ignore[reportMissingImports], a module of the stand-in
import torch
from small_training import make_block, open_engine

from data_shards.stream import Step
from launcher.training.engine_steps import optimizer_step
from launcher.training.throughput import COUNTS, Meter
from mmcot.models.loss import OBJECTIVES

stage, precision = int(sys.argv[1]), sys.argv[2]
engine = open_engine(stage, precision)


step = Step(0, [(index, make_block()) for index in range(2)])
meter = Meter(peak_flops=1e12, device=engine.device)
options = {"seed": 0, "counts": {"tokens": 128, "questions": 8}, "world_size": 1, "meter": meter, "observe": False}
for _ in range(3):
    fakegpu.reset()
    torch.cuda.reset_peak_memory_stats()
    fakegpu.trace(True)
    optimizer_step(engine, step, OBJECTIVES["text"], **options)
counts = fakegpu.counts()
waits = {event: times for event, times in fakegpu.events.items() if "Synchronize" in event[0]}
if os.environ.get("TRACE"):
    for (what, where), times in sorted(fakegpu.events.items(), key=lambda item: -item[1]):
        print(times, what, where)
counts["device_waits"] = sum(times for (what, _), times in waits.items() if "DeviceSynchronize" in what)
counts["waits_of_our_code"] = sum(times for (_, where), times in waits.items() if "launcher/" in where.split(" <- ")[0])
parameters = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in engine.module.parameters())
counts["peak_bytes_per_parameter"] = torch.cuda.max_memory_allocated() / parameters
fakegpu.reset()
meter.add([1.0] * len(COUNTS))
counts["point"] = meter.collect()
counts["waits_of_a_point"] = fakegpu.counts()["sync"]
print(json.dumps(counts), flush=True)
os._exit(0)  # the stand-in's NCCL has no orderly end
