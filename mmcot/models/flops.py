"""The number of operations that the model needs for a batch, without its padding.

    forward_flops(config, source_lengths=[57, 110], target_lengths=[30, 64], num_patches=64)

A multiply-add counts as two operations. As usual, only matrix products are counted
(arXiv:2204.02311, appendix B). A training step takes three times a forward pass: the backward
pass computes gradients of inputs and of weights. The recomputation of activation checkpointing
is not counted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np
import torch

from mmcot.models.t5 import MultimodalT5Config

BACKWARD_AND_FORWARD = 3


def forward_flops(
    config: MultimodalT5Config, source_lengths: Sequence[int], target_lengths: Sequence[int], *, num_patches: int
) -> float:
    """Operations of a forward pass over questions of these lengths in tokens.

    Args:
        num_patches: vision features of a question; 0 for text alone.
    """
    s, t = np.asarray(source_lengths, dtype=np.float64), np.asarray(target_lengths, dtype=np.float64)
    width, inner = config.d_model, config.num_heads * config.d_kv
    feed_forward = (3 if config.is_gated_act else 2) * width * config.d_ff
    projections = 4 * width * inner  # query, key, value and output
    encoder = config.num_layers * (s * (projections + feed_forward) + 2 * s * s * inner)
    num_decoder_layers = config.num_layers if config.num_decoder_layers is None else config.num_decoder_layers
    decoder = num_decoder_layers * (
        t * (projections + feed_forward)
        + 2 * t * t * inner  # attention to the target
        + projections / 2 * (t + s)
        + 2 * t * s * inner  # attention to the source: its keys and values are computed once
    )
    head = t * width * config.vocab_size
    return 2 * float((encoder + decoder + head + _fusion(config, s, num_patches)).sum())


def _fusion(config: MultimodalT5Config, s: np.ndarray, num_patches: int) -> np.ndarray:
    """Multiply-adds of the gated cross-attention (see ``mmcot/models/fusion.py``)."""
    if not num_patches:
        return np.zeros_like(s)
    width = config.d_model
    patches = num_patches * (config.vision_dim + 2 * width) * width  # image_dense, keys and values
    return patches + s * (2 + 2) * width * width + 2 * s * num_patches * width  # query, output and gate; attention


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
