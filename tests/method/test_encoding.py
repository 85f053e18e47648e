"""Token ids, batches and the loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from mmcot.models.loss import count_target_tokens, token_loss_sum
from mmcot.models.t5 import T5ForMultimodalGeneration
from mmcot.texts.encoding import IGNORED_LABEL, EncodedPair, collate, encode_pair
from mmcot.texts.tokenizer import train_tokenizer
from mmcot.vision.patches import patch_features, patch_shape


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = ["The left magnet is red.", "The answer is (B).", "Solution: the magnets attract."] * 4
    return train_tokenizer(texts, tmp_path_factory.mktemp("tokenizer"), vocab_size=400)


@pytest.mark.parametrize("text", ["The answer is (B).", "Ünïcödé 😀 \\n 3.14", "a", "שלום"])
def test_any_text_is_read_back_exactly(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert ids[-1] == tokenizer.eos_token_id == 1 and tokenizer.pad_token_id == 0
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_what_a_limit_cuts_is_counted_and_the_end_token_stays(tokenizer):
    pair = encode_pair(tokenizer, "a b c d e f g h", "a", max_source_tokens=5, max_target_tokens=5)
    assert len(pair.source_ids) == 5 and pair.source_ids[-1] == tokenizer.eos_token_id
    assert pair.source_cut == len(tokenizer("a b c d e f g h").input_ids) - 5 and pair.target_cut == 0


def test_a_block_is_padded_to_its_own_longest_row(tokenizer):
    pairs = [encode_pair(tokenizer, t, t, max_source_tokens=99, max_target_tokens=99) for t in ("a", "a b c d")]
    features = [np.zeros((0, 3), np.float16), np.ones((2, 3), np.float16)]
    batch = collate(pairs, features, feature_shape=(2, 3), pad_token_id=0)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, len(pairs[1].source_ids))
    assert batch["attention_mask"].sum().item() == sum(len(pair.source_ids) for pair in pairs)
    assert (batch["labels"][0, len(pairs[0].target_ids) :] == IGNORED_LABEL).all()
    assert batch["vision_features"].tolist() == [[[0.0] * 3] * 2, [[1.0] * 3] * 2]


def test_padding_adds_nothing_to_the_loss_and_a_dummy_has_no_gradient():
    logits = torch.randn(2, 3, 9, requires_grad=True)
    labels = torch.tensor([[1, 2, IGNORED_LABEL], [3, IGNORED_LABEL, IGNORED_LABEL]])
    alone = token_loss_sum(logits[:1, :2], labels[:1, :2]) + token_loss_sum(logits[1:, :1], labels[1:, :1])
    torch.testing.assert_close(token_loss_sum(logits, labels), alone)
    assert count_target_tokens(labels) == 3
    token_loss_sum(logits, torch.full_like(labels, IGNORED_LABEL)).backward()
    assert logits.grad.abs().sum() == 0


def test_patches_carry_their_ink_and_their_place():

    image = Image.new("RGB", (64, 64), "white")
    image.putpixel((8, 0), (0, 0, 0))
    features = patch_features(image)
    assert features.shape == patch_shape() == (64, 208) and features.dtype == np.float16
    assert features[0, :192].sum() == 0 and features[1, :192].tolist() == [16.0] * 3 + [0.0] * 189
    assert features[9, 192:].tolist() == ([0, 16] + [0] * 6) * 2


def test_lengths_rounded_up_change_neither_loss_nor_gradient():
    torch.manual_seed(0)
    shape = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    model = T5ForMultimodalGeneration.start(
        shape | {"dropout_rate": 0.0}, {"vision_num_patches": 2, "vision_dim": 3}, pad_token_id=0, eos_token_id=1
    )
    pairs = [EncodedPair((5, 6, 7, 1), (9, 1), 0, 0), EncodedPair((8, 1), (4, 5, 6, 7, 8, 9, 3, 2, 1), 0, 0)]
    features = [np.ones((2, 3), np.float32), np.zeros((0, 3), np.float32)]
    found = []
    for multiple in (1, 8):
        batch = collate(
            pairs, features, feature_shape=(2, 3), pad_token_id=0, decoder_start_token_id=0, length_multiple=multiple
        )
        labels = batch.pop("labels")
        loss = token_loss_sum(model(**batch, use_cache=False).logits, labels)
        model.zero_grad()
        loss.backward()
        found.append((loss.item(), model.get_parameter("shared.weight").grad.clone()))
    assert (batch["input_ids"].shape, labels.shape) == ((2, 8), (2, 16))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-6)
    assert torch.allclose(found[1][1], found[0][1], atol=1e-5)


def test_patches_have_the_sizes_that_are_asked():
    image = Image.new("RGB", (50, 90), "white")
    image.paste("black", (0, 0, 25, 45))  # the upper left quarter
    features = patch_features(image, picture_size=32, square_size=16)
    assert features.shape == patch_shape(32, 16) == (4, 772)
    ink = features[:, :768].astype(float).mean(axis=1) / 16
    assert ink[0] > 0.9 and (ink[1:] < 0.1).all()
    assert (features[:, 768:] == 16 * np.array([[1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1]])).all()
