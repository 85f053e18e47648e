"""Quality of the plan's batches on real texts, and the time to make a large plan.

    python benchmarks/plan.py DATA_SET            # ScienceQA's folder, or any supported data set

Prints, for QCM-E with a global batch of 32 in blocks of 4: padding (FLOPs computed over
FLOPs needed, tokens weighted by their cost in T5), the largest topic's share of a batch
compared with batches of random questions, and the imbalance of ranks (the busiest rank's tokens
in a step over the mean rank's); blocks by tokens; then the time and memory of a plan of ten million samples.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

from data_shards.plan import Plan
from data_shards.sources.forms import read_questions
from mmcot.texts.prompts import build_pair
from mmcot.texts.text_ids import encode_text
from mmcot.texts.tokenizer import train_tokenizer

LAYER_WEIGHTS = {"encoder": 10, "decoder": 14}  # in units of d_model^2, feed-forward included, a layer a token
D_MODEL = 768


def flops(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """A layer's multiply-adds for sources and targets of these lengths, attention included."""
    encoder = LAYER_WEIGHTS["encoder"] * D_MODEL**2 * source + 2 * D_MODEL * source**2
    decoder = LAYER_WEIGHTS["decoder"] * D_MODEL**2 * target + 2 * D_MODEL * (target**2 + source * target)
    return encoder + decoder


def padding(plan: Plan) -> float:
    """FLOPs of all blocks, padded to their longest rows, over those of the rows alone."""
    computed = needed = 0.0
    for step in range(plan.num_steps):
        for block in plan.batch_blocks(step):
            source, target = plan.source_lengths[block].astype(float), plan.target_lengths[block].astype(float)
            needed += flops(source, target).sum()
            computed += len(block) * flops(source.max(), target.max())
    return computed / needed


def largest_topic_share(plan: Plan, topics: list[str]) -> float:
    """Mean share of the most common topic in a global batch."""
    shares = []
    for step in range(plan.num_steps - 1):
        batch = np.concatenate(plan.batch_blocks(step))
        shares.append(max(Counter(topics[sample] for sample in batch).values()) / len(batch))
    return float(np.mean(shares))


def main(path: str) -> None:
    problems = read_questions(path).problems["train"]
    pairs = [build_pair(problem, "QCM-E") for problem in problems]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = train_tokenizer((text for pair in pairs for text in pair), folder, vocab_size=8000)
    source, target = (np.array([len(encode_text(tokenizer, pair[side])) for pair in pairs]) for side in (0, 1))
    topics = [problem.topic for problem in problems]
    print(
        f"{len(problems):,} questions, source {source.mean():.0f} tokens (longest {source.max()}), "
        f"target {target.mean():.0f} ({target.max()})"
    )
    for group_by_length in (True, False):
        plans = [
            Plan(
                source,
                target,
                np.arange(len(source)) // 128,
                seed=seed,
                epoch=0,
                global_batch_size=32,
                micro_batch_size=4,
                group_by_length=group_by_length,
            )
            for seed in range(5)
        ]
        print(
            f"{'blocks grouped by length' if group_by_length else 'random blocks':<24} padding "
            f"{np.mean([padding(p) for p in plans]):.2f}   "
            f"largest topic's share {np.mean([largest_topic_share(p, topics) for p in plans]):.3f}   "
            + "   ".join(f"imbalance of {w} ranks {np.mean([p.imbalance(w) for p in plans]):.2f}" for w in (2, 4, 8))
        )
    for budget in (1024, 4096, 16384):
        plan = Plan(
            source,
            target,
            np.arange(len(source)) // 128,
            seed=0,
            epoch=0,
            global_batch_size=128,
            micro_batch_size=4,
            window_shards=16,
            max_tokens_per_block=budget,
        )
        blocks = [block for step in range(plan.num_steps) for block in plan.batch_blocks(step)]
        print(
            f"blocks of {budget:6,} tokens    padding {padding(plan):.2f}   {len(source) / len(blocks):5.1f} "
            f"questions a block, {plan.blocks_per_batch} blocks a step, {plan._costs(blocks).mean() / budget:.0%} full"
        )
    random = np.random.default_rng(0)
    lengths = [random.integers(low, high, 10_000_000, dtype=np.int32) for low, high in ((20, 500), (4, 200))]
    shards = (np.arange(10_000_000) // 5000).astype(np.int32)
    started = time.perf_counter()
    Plan(*lengths, shards, seed=0, epoch=0, global_batch_size=256, micro_batch_size=8)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"ten million samples: {time.perf_counter() - started:.1f} s, peak memory of the whole process {peak:.2f} GB")


if __name__ == "__main__":
    main(str(Path(sys.argv[1])))
