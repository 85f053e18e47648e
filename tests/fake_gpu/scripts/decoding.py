"""Counts of writing texts with one engine: decoding.py ROWS NUM_TASKS PRECISION [layers].

The model has the base size. A task has 256 sources of 24 to 96 tokens; texts end at lengths that are given, 16 to 64
tokens. Printed are the nodes of a graph, and for the last task (graphs are captured in the earlier ones) its captures,
replays, synchronisations and copies.
"""

from __future__ import annotations

import json
import os
import random
import sys

import fakegpu  # pyright: ignore[reportMissingImports], a module of the stand-in
import numpy as np
import torch

from mmcot.decoding.generation import generate_ids
from mmcot.decoding.rows import open_rows
from mmcot.models.device import DTYPES, open_device
from mmcot.models.t5 import T5ForMultimodalGeneration

SHAPE = {
    "vocab_size": 32128,
    "d_model": 768,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 12,
    "num_heads": 12,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}

num_rows, num_tasks, precision = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
in_layers = sys.argv[4:] == ["layers"]
device = open_device(use_gpu=True, precision=precision)
vision = {"vision_num_patches": 145, "vision_dim": 1024}
vision |= {"inject": "layers", "resample": "perceiver", "media_tokens": 64} if in_layers else {}
with torch.device("cuda"):
    model = T5ForMultimodalGeneration.start(SHAPE, vision, pad_token_id=0, eos_token_id=1).to(DTYPES[precision]).eval()

nodes: list[int] = []
num_replays = 0
capture_of, replay_of = torch.cuda.graph, torch.cuda.CUDAGraph.replay


class CountedCapture(capture_of):
    """A capture that counts the launches within it."""

    def __enter__(self):
        super().__enter__()
        self.before = fakegpu.counts()

    def __exit__(self, *arguments):
        after = fakegpu.counts()
        nodes.append(sum(after[name] - self.before[name] for name in ("launch", "d2d", "memset")))
        return super().__exit__(*arguments)


def replay(graph):
    global num_replays
    num_replays += 1
    return replay_of(graph)


torch.cuda.graph, torch.cuda.CUDAGraph.replay = CountedCapture, replay
rows = open_rows(model, num_rows=num_rows, max_source_tokens=512, max_new_tokens=256)
counts, last = {}, {}
picture = np.ones((145, 1024), dtype=np.float16)
empty = np.zeros((0, 1024), dtype=np.float16) if in_layers else None
for task in range(num_tasks):
    chance = random.Random(task % 2)
    sources = [[2] * chance.randint(24, 96) for _ in range(256)]
    limits = [chance.randint(16, 64) for _ in sources]
    captures, num_replays = len(nodes), 0
    fakegpu.reset()
    fakegpu.trace(True)
    generate_ids(
        model,
        sources,
        [picture if in_layers and number % 3 else empty for number in range(len(sources))],
        feature_shape=(145, 1024),
        max_new_tokens=limits,
        num_rows=num_rows,
        eos_token_ids=(),
        rows=rows,
    )
    events = dict(fakegpu.events)
    counts = fakegpu.counts()
    last = {
        "captures": len(nodes) - captures,
        "steps": num_replays,
        "tokens": sum(limits),
        "looks": sum(
            times for (what, where), times in events.items() if "Synchronize" in what and "cuda_graphs.py" in where
        ),
    }
    if os.environ.get("TRACE"):
        for (what, where), times in sorted(events.items(), key=lambda item: -item[1])[:20]:
            print(times, what, where)
print(json.dumps(counts | last | {"nodes": max(nodes), "all_captures": len(nodes)}), flush=True)
os._exit(0)
