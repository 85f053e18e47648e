"""A start at which attention looks near: the bias falls with distance, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from mmcot.models.distance_bias import init_distance_bias


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_attention_starts_lower_the_farther_a_token_is_with_half_the_slope_from_head_to_head(side):
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2))
    attention = getattr(model, side).block[0].layer[0].SelfAttention
    before, others = (
        attention.compute_bias(60, 60),
        {name: value.clone() for name, value in model.state_dict().items() if "relative" not in name},
    )
    init_distance_bias(model, 0.5)
    lowered = (before - attention.compute_bias(60, 60))[0, :, 59]  # [heads, keys], seen from the last token
    distances = torch.arange(59, -1, -1).float()
    assert torch.allclose(lowered[0, -8:], 0.5 * distances[-8:], atol=1e-5)  # a bucket a token near by
    assert torch.allclose(lowered[0], 0.5 * distances, rtol=0.35, atol=1e-5)  # and a bucket of many farther off
    assert torch.allclose(lowered[1], lowered[0] / 2, atol=1e-5)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in others.items())
