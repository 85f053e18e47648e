"""Counts of a training step whose blocks are CUDA graphs: graphs.py ZERO_STAGE PRECISION."""

from __future__ import annotations

import json
import os
import sys

import fakegpu  # pyright: ignore[reportMissingImports], a module of the stand-in
import torch

from data_shards.stream import Step
from launcher.config.settings import Training
from launcher.stages.samples import Block
from launcher.training import block_graphs
from launcher.training.deepspeed_engine import build_engine, init_distributed
from launcher.training.engine_steps import optimizer_step
from launcher.training.throughput import Meter
from mmcot.models.loss import OBJECTIVES
from mmcot.models.t5 import T5ForMultimodalGeneration

SHAPE = {"vocab_size": 4096, "d_model": 512, "d_kv": 64, "d_ff": 1024, "num_layers": 4, "num_heads": 8}
VISION = {"vision_num_patches": 9, "vision_dim": 64}

stage, precision = int(sys.argv[1]), sys.argv[2]
for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
    os.environ.setdefault(name, value)
os.environ.setdefault("MASTER_PORT", "29575")
init_distributed(use_gpu=True, gpu_index=0)
engine = build_engine(
    lambda: T5ForMultimodalGeneration.start(
        SHAPE | {"feed_forward_proj": "gated-gelu"}, VISION, pad_token_id=0, eos_token_id=1
    ),
    Training(zero_stage=stage, precision=precision),
    world_size=1,
    random_weights=True,
)
block_graphs._close = lambda *values: True  # the stand-in computes no losses
graphs = block_graphs.BlockGraphs(engine, OBJECTIVES["text"], max_graphs=2)


def make_block(source: int, target: int) -> Block:
    tensors = {
        "input_ids": torch.ones(4, source, dtype=torch.long),
        "attention_mask": torch.ones(4, source, dtype=torch.long),
        "labels": torch.ones(4, target, dtype=torch.long),
        "decoder_input_ids": torch.ones(4, target, dtype=torch.long),
        "vision_features": torch.zeros(4, 9, 64),
        "vision_mask": torch.ones(4, 9, dtype=torch.bool),
    }
    return Block(tensors, ("q",) * 4).pin_memory()


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
