"""A start at which attention looks near before it looks far.

T5 starts its relative position bias at random, so every token sees the mean of all others. A model of
random weights then never finds out which letter stands before which choice: with choices in an order
of their own the loss stays at chance for thousands of steps. A bias that falls with distance, a
slope a head (ALiBi, arXiv:2108.12409), hands a choice its letter at the first layer, and the rest is
learned within hundreds. It is a start and no constraint: the bias is trained as ever, and the model
is a T5 in every other respect.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from transformers import T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Attention


@torch.no_grad()
def init_distance_bias(model: T5ForConditionalGeneration, slope: float) -> None:
    """Lower the attention of head h by ``slope * 2**-h`` a token of distance, in encoder and decoder, in place."""
    for stack, bidirectional in ((model.encoder, True), (model.decoder, False)):
        attention = cast(Any, stack.block)[0].layer[0].SelfAttention  # torch types no parts of a module
        bias = attention.relative_attention_bias.weight  # [buckets, heads]
        slopes_H = slope * 2.0 ** -torch.arange(bias.shape[1], dtype=bias.dtype)
        bias -= _mean_distances(attention, bidirectional).to(bias.dtype)[:, None] * slopes_H


def _mean_distances(attention: T5Attention, bidirectional: bool) -> torch.Tensor:
    """[buckets]: how far the tokens of a bucket are on average, as far as buckets tell distances apart."""
    num_buckets, farthest = attention.relative_attention_num_buckets, attention.relative_attention_max_distance
    offsets = torch.arange(-farthest, farthest + 1 if bidirectional else 1)  # a decoder sees none of what comes
    buckets = attention._relative_position_bucket(
        offsets, bidirectional=bidirectional, num_buckets=num_buckets, max_distance=farthest
    )
    total = torch.zeros(num_buckets).index_add_(0, buckets, offsets.abs().float())
    return total / torch.bincount(buckets, minlength=num_buckets).clamp(min=1)
