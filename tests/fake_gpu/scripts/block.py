"""Counts of a block of the base size in bf16, forward and backward: block.py SOURCE_TOKENS TARGET_TOKENS."""

from __future__ import annotations

import json
import os
import sys

import fakegpu  # pyright: ignore[reportMissingImports], a module of the stand-in
import torch

from mmcot.models.loss import text_objective
from mmcot.models.t5 import T5ForMultimodalGeneration

ROWS, PATCHES, WIDTH = 8, 145, 1024
SHAPE = {
    "vocab_size": 32128,
    "d_model": 768,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 12,
    "num_heads": 12,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "dropout_rate": 0.1,
}

torch.backends.cuda.enable_cudnn_sdp(False)
num_source, num_target = map(int, sys.argv[1:])
vision = {"vision_num_patches": PATCHES, "vision_dim": WIDTH}
with torch.device("cuda"):
    model = T5ForMultimodalGeneration.start(SHAPE, vision, pad_token_id=0, eos_token_id=1).bfloat16().train()
    inputs = {
        "input_ids": torch.ones(ROWS, num_source, dtype=torch.long),
        "attention_mask": torch.ones(ROWS, num_source, dtype=torch.long),
        "decoder_input_ids": torch.ones(ROWS, num_target, dtype=torch.long),
        "vision_features": torch.zeros(ROWS, PATCHES, WIDTH, dtype=torch.bfloat16),
        "vision_mask": torch.ones(ROWS, PATCHES, dtype=torch.bool),
    }
    labels = torch.ones(ROWS, num_target, dtype=torch.long)
for _ in range(3):
    model.zero_grad()
    fakegpu.reset()
    torch.cuda.reset_peak_memory_stats()
    loss, _ = text_objective(model, inputs, labels)["text"]
    loss.backward()
counts = fakegpu.counts()
print(json.dumps(counts | {"peak_gib": torch.cuda.max_memory_allocated() / 2**30}), flush=True)
os._exit(0)  # the threads of autograd on the stand-in have no orderly end
