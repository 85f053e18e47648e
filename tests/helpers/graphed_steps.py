"""Trains two models of the same weights on one rank, one of them by block graphs: graphed_steps.py PRECISION TRAINS.

Without a GPU the operations of a graph run one by one; what is compared is what the graphs add to them: tensors and
scales at fixed places, gradients in place, dummy blocks, dropout, observed steps, dropped shapes. Prints JSON.
"""

from __future__ import annotations

import json
import os
import sys

import torch

from data_shards.stream import Step
from launcher.config.settings import Training
from launcher.stages.samples import Block
from launcher.training.block_graphs import BlockGraphs
from launcher.training.deepspeed_engine import build_engine, init_distributed
from launcher.training.engine_steps import optimizer_step
from launcher.training.step_checks import gradient_norm
from launcher.training.throughput import Meter
from launcher.training.whole_gradients import use_whole_gradients
from mmcot.models.lora import add_adapters
from mmcot.models.loss import OBJECTIVES
from mmcot.models.t5 import T5ForMultimodalGeneration

SHAPE = {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.1}
SHAPES = [(8, 4), (12, 4), (8, 4), (16, 8)]  # of the blocks of every step; the last one is a dummy


def make_block(source: int, target: int, seed: int, is_dummy: bool) -> Block:
    random = torch.Generator().manual_seed(seed)
    ids, targets = (torch.randint(2, 60, (3, length), generator=random) for length in (source, target))
    tensors = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.full_like(targets, -100) if is_dummy else targets,
        "decoder_input_ids": targets.roll(1, dims=1),
        "vision_features": torch.randn(3, 5, 16, generator=random),
        "vision_mask": torch.ones(3, 5, dtype=torch.bool),
    }
    return Block(tensors, () if is_dummy else ("a", "b", "c"))


def new_engine(stage: int, precision: str, trains: str):
    torch.manual_seed(7)

    def build():
        vision = {"vision_num_patches": 5, "vision_dim": 16}
        model = T5ForMultimodalGeneration.start(SHAPE, vision, pad_token_id=0, eos_token_id=1)
        if trains == "lora":
            add_adapters(model, rank=2, alpha=4.0, dropout=0.1, targets=["q", "v", "wi"], seed=0)
        return model

    return build_engine(
        build,
        Training(zero_stage=stage, precision=precision, learning_rate=1e-2, trains=trains),
        world_size=1,
        random_weights=True,
    )


def main(precision: str, trains: str) -> None:
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ[name] = value
    os.environ["MASTER_PORT"] = "0"
    torch.set_num_threads(1)
    init_distributed(use_gpu=False)
    stage = 0 if precision == "fp32" else 1
    plain, graphed = (new_engine(stage, precision, trains) for _ in range(2))
    if precision == "fp32":
        use_whole_gradients(graphed, clip_norm=1.0, in_place=True)
    graphs, results = BlockGraphs(graphed, OBJECTIVES["text"], max_graphs=2), {"replays": 0}
    replayed = graphs.run

    def run(*arguments, **options):
        parts = replayed(*arguments, **options)
        results["replays"] += parts is not None
        return parts

    graphs.run = run
    losses = {"plain": [], "graphed": []}
    for number in range(5):
        blocks = [
            (index, make_block(*shape, seed=10 * number + index, is_dummy=index == 3))
            for index, shape in enumerate(SHAPES)
        ]
        tokens = sum(block.labels.numel() for _, block in blocks if block.qids)
        for name, engine in {"plain": plain, "graphed": graphed}.items():
            parts = optimizer_step(
                engine,
                Step(number, blocks),
                OBJECTIVES["text"],
                seed=3,
                counts={"tokens": tokens, "questions": 9},
                world_size=1,
                meter=Meter(peak_flops=1e9),
                observe=number == 3,
                graphs=graphs if name == "graphed" else None,
            )
            losses[name].append([parts["text"], gradient_norm(engine)["grad_norm"]])
    pairs = zip(plain.module.parameters(), graphed.module.parameters(), strict=True)
    results |= {
        "losses": losses,
        "difference": max((a - b).abs().max().item() for a, b in pairs),
        "kept": len(graphs._graphs),
        "failure": graphs.failure,
        "watched": [engine.module.watch()["gate_opening"] for engine in (plain, graphed)],
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
