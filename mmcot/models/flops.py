"""The number of operations that the model needs for a batch, without its padding.

    model.forward_flops(source_lengths=[57, 110], target_lengths=[30, 64], num_patches=64)

A multiply-add counts as two operations. As usual, only matrix products are counted
(arXiv:2204.02311, appendix B). A training step takes three times a forward pass: the backward
pass computes gradients of inputs and of weights. The recomputation of activation checkpointing
is not counted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from mmcot.models.bridge import Bridge
from mmcot.models.t5_config import open_bridge

BACKWARD_AND_FORWARD = 3


def forward_flops(
    config: Any,
    source_lengths: Sequence[int],
    target_lengths: Sequence[int],
    *,
    num_patches: int,
    bridge: Bridge | None = None,
) -> float:
    """Operations of a forward pass of a T5 with a bridge over questions of these lengths in tokens.

    Args:
        config: a ``MultimodalT5Config``.
        num_patches: vision features of a question; 0 for text alone, which passes no bridge.
        bridge: the model's; by default one is made from ``config``, without memory for its weights.
    """
    if bridge is None:
        with torch.device("meta"):
            bridge = open_bridge(config)
    s, t = np.asarray(source_lengths, dtype=np.float64), np.asarray(target_lengths, dtype=np.float64)
    width, inner = config.d_model, config.num_heads * config.d_kv
    feed_forward = (3 if config.is_gated_act else 2) * width * config.d_ff
    projections = 4 * width * inner  # query, key, value and output
    has_own_states = num_patches and not bridge.in_layers
    read = bridge.num_states(s, num_patches) if has_own_states else s  # what T5's decoder attends to
    encoder = config.num_layers * (s * (projections + feed_forward) + 2 * s * s * inner)
    num_decoder_layers = config.num_layers if config.num_decoder_layers is None else config.num_decoder_layers
    decoder = num_decoder_layers * (
        t * (projections + feed_forward)
        + 2 * t * t * inner  # attention to the target
        + projections / 2 * (t + read)
        + 2 * t * read * inner  # attention to the source: its keys and values are computed once
    )
    head = t * width * config.vocab_size
    fusion = bridge.forward_flops(s, num_patches) if num_patches else 0.0
    return float((2 * (encoder + decoder + head) + fusion).sum())


def measure_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of large matrix products on this device, the peak for MFU.

    Takes some tenths of a second.
    """
    size = 8192 if device.type == "cuda" else 768
    a = torch.randn(size, size, device=device).to(dtype)
    best = math.inf
    for _ in range(6):
        _synchronize(device)
        started = time.perf_counter()
        torch.matmul(a, a)
        _synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
