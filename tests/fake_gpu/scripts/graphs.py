"""Counts of a training step whose blocks are CUDA graphs: graphs.py ZERO_STAGE PRECISION TRAINS [INJECT]."""

from __future__ import annotations

import json
import os
import sys

import fakegpu  # pyright: ignore[reportMissingImports], a module of the stand-in
import torch
from small_training import make_block, open_engine

from data_shards.stream import Step
from launcher.training import block_graphs
from launcher.training.engine_steps import optimizer_step
from launcher.training.throughput import Meter
from mmcot.models.loss import OBJECTIVES

engine = open_engine(int(sys.argv[1]), *sys.argv[2:])
block_graphs._close = lambda *values: True  # the stand-in computes no losses
graphs = block_graphs.BlockGraphs(engine, OBJECTIVES["text"], max_graphs=2)


def run(*shapes: tuple[int, int]) -> dict:
    """The counts of a step with a block of each shape."""
    step = Step(0, [(index, make_block(*shape)) for index, shape in enumerate(shapes)])
    counts = {"tokens": 128.0, "questions": 8.0}
    fakegpu.reset()
    torch.cuda.reset_peak_memory_stats()
    fakegpu.trace(True)
    optimizer_step(
        engine,
        step,
        OBJECTIVES["text"],
        seed=0,
        counts=counts,
        world_size=1,
        meter=Meter(peak_flops=1e12),
        observe=False,
        graphs=graphs,
    )
    found = fakegpu.counts()
    found["device_waits"] = sum(times for (what, _), times in fakegpu.events.items() if "DeviceSynchronize" in what)
    found["waits_of_our_code"] = sum(
        times
        for (what, where), times in fakegpu.events.items()
        if "Synchronize" in what and "launcher/" in where.split(" <- ")[0]
    )
    return {name: found[name] for name in ("launch", "graph", "device_waits", "waits_of_our_code", "sync")}


first = run((32, 16), (32, 16))  # without a graph, then captured
results = {"eager": run((64, 16)), "replayed": run((32, 16), (32, 16))}
run((64, 16), (48, 16), (48, 16))  # a third shape: the first one is dropped
results |= {"dropped": run((32, 16)), "again": run((32, 16)), "kept": len(graphs._graphs), "failure": graphs.failure}
print(json.dumps(results), flush=True)
os._exit(0)  # the stand-in's NCCL has no orderly end
