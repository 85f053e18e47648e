"""A start at which attention can look things up: near heads look back, match heads look at equal tokens."""

from __future__ import annotations

import pytest
import torch

from launcher.config.loading import load_settings
from launcher.config.settings import SettingsError
from mmcot.models.attention_start import FARTHEST, start_with_lookup
from mmcot.models.t5 import MultimodalT5Config, T5ForMultimodalGeneration


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = MultimodalT5Config(
        vocab_size=80,
        d_model=64,
        d_kv=16,
        d_ff=32,
        num_layers=2,
        num_heads=4,
        vision_num_patches=3,
        vision_dim=5,
        gate_start=-2.0,
    )
    model = T5ForMultimodalGeneration._from_config(config).eval()
    start_with_lookup(model, near_bias=8.0, match_score=24.0)
    return model


@torch.no_grad()
def test_near_heads_look_at_the_tokens_just_before_and_match_heads_nowhere_in_particular(model):
    bias = model.encoder.block[0].layer[0].SelfAttention.compute_bias(40, 40)[0]  # [heads, queries, keys]
    for head in (0, 1):
        seen = bias[head, 20]
        assert seen.argmax() == 20 - (head + 1)
        assert seen[20 - head] == pytest.approx(seen.max() - 8.0) and seen.min() == pytest.approx(-8.0 * FARTHEST)
    assert torch.equal(bias[2:], torch.zeros_like(bias[2:]))


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 1])
def test_match_heads_of_every_layer_give_equal_tokens_the_score_that_is_asked_for(model, layer):
    block = model.encoder.block[layer].layer[0]
    states = block.layer_norm(model.shared(torch.arange(80)[None]))
    query, key = (getattr(block.SelfAttention, name)(states).view(80, 4, 16).transpose(0, 1) for name in "qk")
    scores = query @ key.transpose(1, 2)  # [heads, tokens, tokens]
    for head in (2, 3):
        equal, others = scores[head].diagonal(), scores[head][~torch.eye(80, dtype=torch.bool)]
        assert equal.mean() == pytest.approx(24.0, rel=0.15)
        assert abs(others.mean()) < 2.0 and (equal > others.std()).float().mean() > 0.95
    assert (query[:2] - key[:2]).abs().max() > 0.1  # near heads keep T5's own start


def test_the_decoder_and_all_other_weights_keep_their_start(model):
    torch.manual_seed(0)
    plain = T5ForMultimodalGeneration._from_config(model.config)
    touched = {name for name, value in plain.state_dict().items() if not torch.equal(value, model.state_dict()[name])}
    assert touched == {
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        *(f"encoder.block.{layer}.layer.0.SelfAttention.{name}.weight" for layer in (0, 1) for name in "qk"),
    }


def test_the_gate_starts_where_it_is_told_and_a_saved_model_keeps_its_own(model, tmp_path):
    assert torch.equal(model.encoder.gate_dense.bias, torch.full((64,), -2.0))
    with torch.no_grad():
        model.encoder.gate_dense.bias.fill_(0.5)
    model.save_pretrained(tmp_path)
    model.encoder.gate_dense.bias.data.fill_(-2.0)
    assert torch.equal(
        T5ForMultimodalGeneration.from_pretrained(tmp_path).encoder.gate_dense.bias, torch.full((64,), 0.5)
    )


def test_half_a_start_and_two_starts_at_once_are_refused():
    with pytest.raises(SettingsError, match=r"near_bias \(8\) and match_score \(0\) go together"):
        load_settings(preset="demo", overrides=["model.shape.match_score=0"])
    with pytest.raises(SettingsError, match="distance_bias and near_bias start the same attention in two ways"):
        load_settings(preset="demo", overrides=["model.shape.distance_bias=1"])
