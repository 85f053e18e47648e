"""An initialisation with which attention prefers near tokens.

T5 initialises its relative position bias at random, so every token attends to the mean of all others. A
model with random weights then does not learn which letter belongs to which choice: if each question has
its own order of choices, the loss stays at chance for thousands of steps. A bias that falls with distance,
with one slope per head (ALiBi, arXiv:2108.12409), gives a choice its letter in the first layer, and the rest
is learned within hundreds of steps. It is no constraint: the bias is trained as usual, and the model is a
T5 in every other respect.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from transformers import T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Attention


@torch.no_grad()
def init_distance_bias(model: T5ForConditionalGeneration, slope: float) -> None:
    """Lower the bias of head h by ``slope * 2**-h`` per token of distance, in encoder and decoder, in place."""
    for stack, bidirectional in ((model.encoder, True), (model.decoder, False)):
        attention = cast(Any, stack.block)[0].layer[0].SelfAttention  # torch types no parts of a module
        bias = attention.relative_attention_bias.weight  # [buckets, heads]
        slopes_H = slope * 2.0 ** -torch.arange(bias.shape[1], dtype=bias.dtype)
        bias -= _mean_distances(attention, bidirectional).to(bias.dtype)[:, None] * slopes_H


def _mean_distances(attention: T5Attention, bidirectional: bool) -> torch.Tensor:
    """Mean distance of the tokens of a bucket, [buckets], up to the largest distance that buckets distinguish."""
    num_buckets, farthest = attention.relative_attention_num_buckets, attention.relative_attention_max_distance
    offsets = torch.arange(-farthest, farthest + 1 if bidirectional else 1)  # a decoder attends to no later token
    buckets = attention._relative_position_bucket(
        offsets, bidirectional=bidirectional, num_buckets=num_buckets, max_distance=farthest
    )
    total = torch.zeros(num_buckets).index_add_(0, buckets, offsets.abs().float())
    return total / torch.bincount(buckets, minlength=num_buckets).clamp(min=1)
