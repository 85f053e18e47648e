"""Attention and gate, measured beside the model."""

from __future__ import annotations

import pytest
import torch

from mmcot.models.t5 import MultimodalT5Config, T5ForMultimodalGeneration


def make_model(**settings):
    torch.manual_seed(0)
    config = MultimodalT5Config(
        vocab_size=50,
        d_model=16,
        d_kv=4,
        d_ff=32,
        num_layers=1,
        num_heads=4,
        vision_num_patches=5,
        vision_dim=7,
        decoder_start_token_id=0,
        dropout_rate=0.0,
        **settings,
    )
    model = T5ForMultimodalGeneration(config).eval()
    for parameter in model.encoder.fusion.parameters():  # biases too: fresh ones are zeros and would hide a mistake
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def make_batch():
    torch.manual_seed(1)
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    patches = torch.tensor([[True] * 3 + [False] * 2, [False] * 5])
    return torch.randint(2, 50, (2, 8)), mask, torch.randn(2, 5, 7) * patches[..., None], patches


@pytest.mark.parametrize("mask_absent_patches", [False, True])
def test_the_measured_states_are_those_of_the_model(mask_absent_patches):
    model, (ids, mask, features, patches) = make_model(mask_absent_patches=mask_absent_patches), make_batch()
    # In float64 the two ways of computing differ by 5e-14. In float32 they differ by up to 4e-5, which depends on the
    # processor's instructions: 2.8e-5 with AVX2 alone, 9e-6 with AVX-512, for values up to 26 and inputs of the sigmoid
    # up to 49.
    model, features = model.double(), features.double()
    look = model.attention_maps(ids, mask, features, patches)
    fused = model.encoder(
        input_ids=ids, attention_mask=mask, vision_features=features, vision_mask=patches
    ).last_hidden_state
    torch.testing.assert_close(look.fused_BSD, fused, rtol=1e-9, atol=1e-9)


def test_a_token_shares_its_attention_among_the_patches_it_may_see():
    model, (ids, mask, features, patches) = make_model(mask_absent_patches=True), make_batch()
    look = model.attention_maps(ids, mask, features, patches)
    torch.testing.assert_close(look.attention_BSP[0].sum(dim=-1), torch.ones(8))
    assert look.attention_BSP[0, :, 3:].max() == 0 and look.attention_BSP[1].max() == 0
    assert look.gate_BS.shape == (2, 8) and look.gate_BS.min() > 0 and look.gate_BS.max() < 1


def test_a_patch_that_shouts_is_looked_at():
    model, (ids, mask, features, _) = make_model(), make_batch()
    fusion = model.encoder.fusion
    with torch.no_grad():  # queries are all the same direction, and patch 2 lies far along it
        w_q, w_k, _ = fusion.mha_layer.in_proj_weight.chunk(3)
        w_q.zero_()
        fusion.mha_layer.in_proj_bias[:16] = 5.0
        direction = (w_k @ fusion.image_dense.weight).sum(dim=0)
    features[0, 2] = 10 * direction / direction.norm()
    assert (model.attention_maps(ids, mask, features).attention_BSP[0].argmax(dim=-1) == 2).all()
