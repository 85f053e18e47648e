"""The fusion and the fused T5."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from mmcot.models.fusion import GatedCrossAttention, SingleHeadAttention
from mmcot.models.t5 import MultimodalT5Config, T5ForMultimodalGeneration


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = MultimodalT5Config(
        vocab_size=50,
        d_model=16,
        d_kv=4,
        d_ff=32,
        num_layers=1,
        num_heads=4,
        tie_word_embeddings=False,
        vision_num_patches=5,
        vision_dim=7,
        decoder_start_token_id=0,
    )
    return T5ForMultimodalGeneration(config).eval()


def test_one_head_is_that_of_torch():
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(16, 1, batch_first=True)
    ours = SingleHeadAttention(16)
    ours.load_state_dict(theirs.state_dict())
    query, memory = torch.randn(2, 6, 16), torch.randn(2, 4, 16)
    torch.testing.assert_close(ours(query, memory), theirs(query, memory, memory)[0])


def test_a_masked_patch_changes_nothing_and_a_fully_masked_row_is_finite():
    torch.manual_seed(0)
    fusion = GatedCrossAttention(d_model=16, vision_dim=7)
    text, vision = torch.randn(2, 6, 16), torch.randn(2, 4, 7)
    mask = torch.tensor([[True, True, False, True], [False] * 4])
    words = torch.ones(2, 6)
    fused, states_mask = fusion(text, words, vision, mask)
    assert states_mask is words
    vision[0, 2] = 1e3
    torch.testing.assert_close(fusion(text, words, vision, mask)[0], fused)
    assert torch.isfinite(fused).all()


def test_the_picture_changes_what_is_said_and_its_absence_is_plain_t5(model):
    ids, vision = torch.randint(2, 50, (2, 8)), torch.randn(2, 5, 7)
    with_picture = model(input_ids=ids, vision_features=vision, labels=ids).logits
    without = model(input_ids=ids, labels=ids).logits
    assert not torch.allclose(with_picture, without)


def test_cached_and_uncached_decoding_agree(model):
    ids, vision = torch.randint(2, 50, (3, 8)), torch.randn(3, 5, 7)
    texts = [model.generate(ids, vision_features=vision, max_new_tokens=12, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*texts)


def test_features_of_another_shape_are_refused_with_both(model):
    with pytest.raises(ValueError, match=r"shape \(1, 4, 7\), this model expects \[batch, 5, 7\]"):
        model(
            input_ids=torch.ones(1, 3, dtype=torch.long),
            vision_features=torch.zeros(1, 4, 7),
            labels=torch.ones(1, 2, dtype=torch.long),
        )


def test_fusion_weights_start_at_the_scale_of_t5(model):
    assert model.encoder.image_dense.weight.std() < 1 / 7**0.5 * 1.3
    assert model.encoder.mha_layer.in_proj_weight.std() < 0.3 and model.encoder.gate_dense.weight.std() < 0.25


def test_every_weight_of_t5_starts_as_transformers_own_t5_does():
    sizes = {"vocab_size": 500, "d_model": 64, "d_kv": 16, "d_ff": 256, "num_layers": 2, "num_heads": 4}
    plain = dict(T5ForConditionalGeneration(T5Config(**sizes)).named_parameters())
    fused = dict(
        T5ForMultimodalGeneration._from_config(
            MultimodalT5Config(**sizes, vision_num_patches=3, vision_dim=5)
        ).named_parameters()
    )
    for name, weight in plain.items():
        if weight.std() > 0:
            assert 0.8 < (fused[name].std() / weight.std()).item() < 1.25, name


def test_the_new_parts_are_all_parameters_that_a_plain_t5_does_not_have(model):
    plain = T5ForConditionalGeneration(model.config).state_dict()  # names each tied copy too
    new = {name for name, _ in model.named_parameters()} - plain.keys()
    assert new and new == {name for name, _ in model.named_parameters() if name.startswith(model.new_parts)}
