"""Our training step beside a bare PyTorch loop: the same blocks, real tokens a processor-second, losses compared first.

OMP_NUM_THREADS=1 python benchmarks/training.py [SCIENCEQA] [--steps 8] [--rounds 4] [--stages 0 1 2] [--out DIR]

A T5 of the small size with fusion, batches of 8 questions in blocks of 4, fused AdamW, gradient norms clipped. Without
a data set the blocks have random tokens of about ScienceQA's lengths. One process, one thread, interleaved in one run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_shards.sources.forms import read_questions
from data_shards.stream import Step
from launcher.config.settings import Training
from launcher.stages.samples import Block
from launcher.training.deepspeed_engine import build_engine, init_distributed
from launcher.training.engine_steps import optimizer_step
from launcher.training.step_checks import was_applied
from launcher.training.throughput import Meter, count_step
from mmcot.models.loss import count_target_tokens, objective_named, text_objective
from mmcot.models.t5 import T5ForMultimodalGeneration
from mmcot.texts.encoding import EncodedPair, collate
from mmcot.texts.prompts import build_pair

SMALL = {"vocab_size": 32128, "d_model": 512, "d_kv": 64, "d_ff": 1024, "num_layers": 8, "num_heads": 6}
SHAPE = SMALL | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "dropout_rate": 0.1}
PATCHES = (145, 1024)
VISION = {"vision_num_patches": PATCHES[0], "vision_dim": PATCHES[1]}
BATCH, BLOCK = 8, 4
MOST_SOURCE, MOST_TARGET = 512, 256


def main() -> None:
    """Print the ratio of each ZeRO stage to the bare loop, and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="?", type=Path)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    steps = make_steps(options.data, options.steps)
    join_group()
    loops = {"bare loop": bare_loop(steps)}
    loops |= {f"ours, ZeRO-{stage}": our_loop(steps, stage) for stage in options.stages}
    losses = {name: run()[1] for name, run in loops.items()}
    for name, found in losses.items():
        difference = max(abs(a - b) / b for a, b in zip(found, losses["bare loop"], strict=True))
        print(f"{name:<16}losses differ from the bare loop's by at most {difference:.1e} (relative)")
    tokens = sum(
        int(block.tensors["attention_mask"].sum()) + count_target_tokens(block.labels) for block in blocks_of(steps)
    )
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(options.rounds):
        for name, run in loops.items():
            seconds[name].append(run()[0])
    for name, values in seconds.items():
        ratios = [bare / own for bare, own in zip(seconds["bare loop"], values, strict=True)]
        print(
            f"{name:<16}{tokens / statistics.median(values):7.0f} tokens a processor-second, of the bare loop "
            f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        )
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        report = {"torch": torch.__version__, "tokens": tokens, "seconds": seconds, "losses": losses}
        (options.out / "training.json").write_text(json.dumps(report, indent=2) + "\n")


def make_steps(data: Path | None, number: int) -> list[Step]:
    """Steps of two blocks each, as the loader yields them; random picture features."""
    random = np.random.Generator(np.random.PCG64(0))
    if data is None:
        lengths = [(int(random.integers(40, 180)), int(random.integers(20, 120))) for _ in range(number * BATCH)]
    else:
        problems = read_questions(data).problems["train"][: number * BATCH]
        texts = [build_pair(problem, "QCM-E") for problem in problems]
        lengths = [
            (min(MOST_SOURCE, len(source) // 4 + 2), min(MOST_TARGET, len(target) // 4 + 2)) for source, target in texts
        ]
    lengths.sort()
    pairs = [
        EncodedPair(tuple(random.integers(2, 32000, source)), tuple(random.integers(2, 32000, target)), 0, 0)
        for source, target in lengths
    ]
    steps = []
    for first in range(0, len(pairs), BATCH):
        blocks = []
        for index, start in enumerate(range(first, first + BATCH, BLOCK)):
            features: list[np.ndarray | None] = [
                random.standard_normal(PATCHES, dtype=np.float32) for _ in range(BLOCK)
            ]
            tensors = collate(
                pairs[start : start + BLOCK], features, feature_shape=PATCHES, pad_token_id=0, decoder_start_token_id=0
            )
            blocks.append((index, Block(tensors, ("q",) * BLOCK)))
        steps.append(Step(len(steps), blocks))
    return steps


def blocks_of(steps: list[Step]) -> list[Block]:
    """All blocks of the steps."""
    return [block for step in steps for _, block in step.blocks]


def new_model() -> T5ForMultimodalGeneration:
    """The same random weights at every call."""
    torch.manual_seed(0)
    return T5ForMultimodalGeneration.start(SHAPE, VISION, pad_token_id=0, eos_token_id=1)


def bare_loop(steps: list[Step]) -> Callable[[], tuple[float, list[float]]]:
    """What one writes without a library; returns its processor-seconds and losses."""
    model = new_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def run() -> tuple[float, list[float]]:
        losses, started = [], time.process_time()
        for step in steps:
            tokens = sum(count_target_tokens(block.labels) for _, block in step.blocks)
            total = 0.0
            for index, block in step.blocks:
                torch.manual_seed(step.number * 4_099 + index)
                inputs = {name: tensor for name, tensor in block.tensors.items() if name != "labels"}
                loss = text_objective(model, inputs, block.labels)["text"][0] / tokens
                loss.backward()
                total += loss.item()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(total)
        return time.process_time() - started, losses

    return run


def our_loop(steps: list[Step], stage: int) -> Callable[[], tuple[float, list[float]]]:
    """The step of the training loop with its counts and checks; returns its processor-seconds and losses."""
    training = Training(zero_stage=stage, learning_rate=1e-4, weight_decay=0.01, clip_norm=1.0)  # pyright: ignore[reportArgumentType]
    engine: Any = build_engine(new_model, training, world_size=1, random_weights=True)
    meter, objective = Meter(peak_flops=1e12), objective_named("text")

    def run() -> tuple[float, list[float]]:
        losses, started = [], time.process_time()
        for step in steps:
            counts = count_step(step, engine.module)
            parts = optimizer_step(
                engine,
                step,
                objective,
                seed=0,
                counts={"tokens": counts[0], "questions": counts[3]},
                world_size=1,
                meter=meter,
                observe=False,
            )
            losses.append(sum(parts.values()))
            assert was_applied(engine, losses[-1])
        return time.process_time() - started, losses

    return run


def join_group() -> None:
    """A group of one rank."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", "29579")
    init_distributed(use_gpu=False)


if __name__ == "__main__":
    main()
