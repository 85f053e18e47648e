"""An initialisation with which an encoder's attention can do lookups.

The choices of each question have their own order, so a letter must be looked up: a choice takes its letter
from the tokens just before it, and a word of the rationale is matched with the same word among the choices.
With T5's random initialisation, where every token attends to the mean of all others, a small model does not
learn this in thousands of steps. With this initialisation half of the heads of every encoder layer attend
one, two, ... tokens back, and the other half attends to equal tokens (queries and keys are proportional;
compare "mimetic initialisation", arXiv:2305.09828). It is no constraint: all parameters are trained as
usual, and the model is a T5 in every other respect. Measurements are in docs/mini_sqa.md.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from transformers import T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Attention

# Of the match heads' keys; the queries take the rest of the score. It is learned sooner than with equal halves.
KEY_SCALE = 2.0
FARTHEST = 12  # tokens; the bias of farther tokens does not fall further


@torch.no_grad()
def start_with_lookup(model: T5ForConditionalGeneration, *, near_bias: float, match_score: float) -> None:
    """Set the encoder's relative position bias and the match heads' queries and keys, in place.

    Args:
        near_bias: how much the bias of near head h falls per token of distance to the token h + 1 positions back.
        match_score: the attention score of two equal tokens in a match head, on average before training.
    """
    blocks = cast(Any, model.encoder.block)  # torch types no parts of a module
    first = blocks[0].layer[0].SelfAttention
    num_near = first.n_heads // 2
    bias = first.relative_attention_bias.weight  # [buckets, heads], shared by all layers
    bias.zero_()
    for head in range(num_near):
        bias[:, head] = -near_bias * _mean_distances(first, offset=-(head + 1)).to(bias)
    for block in blocks:
        attention = block.layer[0].SelfAttention
        width = attention.key_value_proj_dim
        # T5's initialisation gives the key of a normalised state a squared length of `width`.
        keys = attention.k.weight[num_near * width :]
        attention.q.weight[num_near * width :] = keys * (match_score / width / KEY_SCALE)
        keys.mul_(KEY_SCALE)


def _mean_distances(attention: T5Attention, *, offset: int) -> torch.Tensor:
    """Mean distance of a bucket's positions to the one at ``offset``, [buckets], in tokens up to ``FARTHEST``."""
    num_buckets, reach = attention.relative_attention_num_buckets, attention.relative_attention_max_distance
    positions = torch.arange(-reach, reach + 1)
    buckets = attention._relative_position_bucket(
        positions, bidirectional=True, num_buckets=num_buckets, max_distance=reach
    )
    distances = (positions - offset).abs().clamp(max=FARTHEST).float()
    total = torch.zeros(num_buckets).index_add_(0, buckets, distances)
    return total / torch.bincount(buckets, minlength=num_buckets).clamp(min=1)
