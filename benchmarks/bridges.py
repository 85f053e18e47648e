"""Our training step beside a hand-written DeepSpeed loop, for every place where pictures enter the model.

    OMP_NUM_THREADS=1 python benchmarks/bridges.py [DATA_SET] [--steps 3] [--rounds 5] [--tiny] [--out DIR]

Model, questions, blocks and checks are those of ``training.py``: a T5 of the small size, ViT-shaped features, ZeRO-2
with fused AdamW in both loops, one thread, one process; 64 media tokens a picture where there are some. Both loops are
first checked to have the same losses, then they take turns. ``bridges.json`` has all numbers.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import os
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
from results import data_set, ratios, spread, summary, write_results
from training import DEEPSPEED, OURS, check_losses, interleaved, join_group, loop_named
from training_loops import PATCHES, SMALL, TINY, Questions, planned_order, read_pairs, steps_of, typical

NUM_MEDIA = 64
NAME = f"{OURS}2"
MEDIA = {"media_tokens": NUM_MEDIA}
BRIDGES: dict[str, dict[str, Any]] = {
    "encoder, gated cross-attention": {},
    "embed, linear": {"inject": "embed", "resample": "linear", "media_tokens": PATCHES[0], "resample_depth": 1},
    "embed, mean": {"inject": "embed", "resample": "mean"} | MEDIA,
    "embed, qformer": {"inject": "embed", "resample": "qformer"} | MEDIA,
    "layers, perceiver": {"inject": "layers", "resample": "perceiver"} | MEDIA,
}


def main() -> None:
    """Compare the two loops for each bridge, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="?")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the program")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    sizes, found = TINY if options.tiny else SMALL, {}
    with data_set(options.data) as (path, name), tempfile.TemporaryDirectory() as folder:
        questions = read_pairs(path, Path(folder))
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:
            for bridge, values in BRIDGES.items():
                arguments = (bridge, questions, sizes | {"bridge": values}, options.steps, options.rounds)
                found[bridge] = pool.submit(compare, *arguments).result()
    threads = int(os.environ.get("OMP_NUM_THREADS", 1))
    write_results(options.out, "bridges", {"data": name, "threads": threads, "shape": sizes, "bridges": found})


def compare(bridge: str, questions: Questions, shape: dict[str, Any], number: int, rounds: int) -> dict[str, Any]:
    """Differences of the losses, processor-seconds a step of both loops, and ours over the other, round by round."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    join_group()
    questions = with_placeholders(questions, shape["bridge"])
    steps = steps_of(questions, typical(questions, planned_order(questions), number))
    theirs, ours = loop_named(DEEPSPEED, shape), loop_named(NAME, shape)
    checks = check_losses(f"{bridge}: {NAME}", theirs(steps)[1], ours(steps)[1])
    runs = {DEEPSPEED: lambda: theirs(steps)[0] / number, NAME: lambda: ours(steps)[0] / number}
    seconds = interleaved(runs, rounds)
    ratio = ratios(seconds[NAME], seconds[DEEPSPEED])
    print(
        f"{bridge}: ours over bare DeepSpeed {spread(ratio)}, {statistics.median(seconds[NAME]):.2f} s a step",
        flush=True,
    )
    return {"checks": checks, "seconds_per_step": {name: summary(v) for name, v in seconds.items()}, "ratio": ratio}


def with_placeholders(questions: Questions, values: dict[str, Any]) -> Questions:
    """The questions with a picture in front of each source, where the model reads it there."""
    if values.get("inject") != "embed":
        return questions
    front = (0,) * values["media_tokens"]
    pairs = [dataclasses.replace(pair, source_ids=front + pair.source_ids) for pair in questions.pairs]
    return Questions(pairs, questions.features)


if __name__ == "__main__":
    main()
