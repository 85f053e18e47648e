"""Counts of an optimizer step of two blocks: step.py ZERO_STAGE PRECISION; with TRACE=1 also its waits and copies."""

from __future__ import annotations

import json
import os
import sys

import fakegpu  # pyright: ignore[reportMissingImports], a module of the stand-in
import torch

from data_shards.stream import Step
from launcher.config.settings import Training
from launcher.stages.samples import Block
from launcher.training.deepspeed_engine import build_engine, init_distributed
from launcher.training.engine_steps import optimizer_step
from launcher.training.throughput import COUNTS, Meter
from mmcot.models.loss import OBJECTIVES
from mmcot.models.t5 import T5ForMultimodalGeneration

SHAPE = {"vocab_size": 4096, "d_model": 512, "d_kv": 64, "d_ff": 1024, "num_layers": 4, "num_heads": 8}
VISION = {"vision_num_patches": 9, "vision_dim": 64}

stage, precision = int(sys.argv[1]), sys.argv[2]
for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
    os.environ.setdefault(name, value)
os.environ.setdefault("MASTER_PORT", "29573")
init_distributed(use_gpu=True, gpu_index=0)
engine = build_engine(
    lambda: T5ForMultimodalGeneration.start(
        SHAPE | {"feed_forward_proj": "gated-gelu"}, VISION, pad_token_id=0, eos_token_id=1
    ),
    Training(zero_stage=stage, precision=precision),
    world_size=1,
    random_weights=True,
)


def make_block(number: int) -> Block:
    tensors = {
        "input_ids": torch.ones(4, 32, dtype=torch.long),
        "attention_mask": torch.ones(4, 32, dtype=torch.long),
        "labels": torch.ones(4, 16, dtype=torch.long),
        "decoder_input_ids": torch.ones(4, 16, dtype=torch.long),
        "vision_features": torch.zeros(4, 9, 64),
        "vision_mask": torch.ones(4, 9, dtype=torch.bool),
    }
    return Block(tensors, ("q",) * 4).pin_memory()


step = Step(0, [(index, make_block(index)) for index in range(2)])
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
