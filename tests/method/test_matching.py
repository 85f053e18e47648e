"""BLIP-2's stage one: its published reference, its masks, its losses, and the model that starts from it."""

from __future__ import annotations

import logging
import re

import pytest
import torch
from blip2_names import QFORMER_NAMES
from torch import nn
from torch.nn import functional as F
from transformers import Blip2QFormerConfig, Blip2QFormerModel
from transformers.models.blip_2.modeling_blip_2 import Blip2TextEmbeddings

from mmcot.errors import InputError
from mmcot.models.loss import IGNORED_LABEL, OBJECTIVES, count_units
from mmcot.models.matching import MATCH, ImageTextMatching
from mmcot.models.matching_losses import (
    apart_mask,
    causal_mask,
    contrastive_loss_sum,
    draw_negatives,
    equal_texts,
    matching_loss_sum,
    similarities,
    together_mask,
)
from mmcot.models.opening import check_start
from mmcot.models.qformer import QFormer
from mmcot.models.resampler import ResamplerShape
from mmcot.models.t5 import T5ForMultimodalGeneration
from mmcot.models.t5_matching import T5ForImageTextMatching

SHAPE = ResamplerShape(vision_dim=7, width=16, num_tokens=3, num_patches=9, depth=3, num_heads=4)
MASKS = {"apart": apart_mask, "causal": causal_mask, "together": together_mask}
VISION = {"inject": "embed", "resample": "qformer", "media_tokens": 3, "vision_num_patches": 5, "vision_dim": 7}
MATCHING = {"max_text_tokens": 6, "projection_width": 8}
SIZES = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
ENDS = {"pad_token_id": 0, "eos_token_id": 1}
_ = IGNORED_LABEL
TEXTS = torch.tensor([[5, 6, 1, _], [7, 8, 9, 1], [5, 6, 1, _], [4, 1, _, _]])


TEXT_NAMES = {
    "encoder.layer": "layers",
    "output.LayerNorm": "feed_forward_norm",
    "intermediate.dense": "feed_forward.fc1",
    "output.dense": "feed_forward.fc2",
}


def randomize(module):
    """Random values for biases and norms too, so that no difference hides behind a start with zeros or ones."""
    for name, parameter in module.named_parameters():
        is_scale = "norm" in name.lower() and name.endswith("weight")
        nn.init.normal_(parameter, mean=1.0 if is_scale else 0.0, std=0.3)


def renamed(name, names):
    """The name of a weight with parts between dots replaced."""
    for old, new in names.items():
        name = f".{name}.".replace(f".{old}.", f".{new}.").strip(".")
    return name


@pytest.fixture(scope="module")
def blip2():
    """BLIP-2's Q-Former with text, its embeddings, and ours with the same weights."""
    config = Blip2QFormerConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        encoder_hidden_size=7,
        max_position_embeddings=12,
        use_qformer_text_input=True,
    )
    torch.manual_seed(0)
    theirs, embeddings = Blip2QFormerModel(config).eval(), Blip2TextEmbeddings(config).eval()
    qformer = QFormer(SHAPE).eval()
    ours = ImageTextMatching(SHAPE, vocab_size=40, max_text_tokens=11, projection_width=8).eval()
    for module in (theirs, embeddings, qformer, ours):
        randomize(module)
    for name, weight in theirs.state_dict().items():
        is_of_text = ".intermediate.dense." in name or re.search(r"layer\.\d+\.output\.", name)
        mine = renamed(name, TEXT_NAMES if is_of_text else QFORMER_NAMES)
        (ours.text if is_of_text else qformer).get_parameter(mine).data.copy_(weight)
    ours.text.words.weight.data.copy_(embeddings.word_embeddings.weight)
    ours.text.positions.weight.data.copy_(embeddings.position_embeddings.weight)
    ours.text.starts.weight.data.copy_(embeddings.word_embeddings.weight[2:4])
    return qformer, ours, theirs, embeddings


def pictures(rows=4):
    x = torch.randn(rows, 5, 7, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(rows, 1, 5, dtype=torch.bool)
    mask[1, :, 3:] = False
    return x, mask


@pytest.mark.parametrize("name", MASKS)
def test_queries_and_text_are_those_of_blip_2_under_each_mask(blip2, name):
    qformer, ours, theirs, embeddings = blip2
    x, mask = pictures()
    is_word = TEXTS != IGNORED_LABEL
    ids = torch.cat([torch.full((4, 1), 2), TEXTS.masked_fill(~is_word, 0)], dim=1)  # 2: the start of matching
    joint = MASKS[name](3, F.pad(is_word, (1, 0), value=True))
    embedded = embeddings(input_ids=ids, query_embeds=qformer.queries(3).expand(4, -1, -1))
    expected = theirs(
        embedded,
        query_length=3,
        attention_mask=joint[:, None],
        encoder_hidden_states=x,
        encoder_attention_mask=mask[:, None],
    ).last_hidden_state
    text = ours.text.embed(ids[:, 1:], MATCH)
    found = torch.cat(ours.text(qformer, x, mask, text, joint), dim=1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)  # measured 0.0


@pytest.mark.parametrize("mask", [apart_mask, causal_mask])
def test_queries_that_do_not_see_the_text_are_the_media_of_stage_two(blip2, mask):
    qformer, ours, *_ = blip2
    x, patches = pictures()
    text = ours.text.embed(TEXTS.clamp(min=0), MATCH)
    queries, _ = ours.text(qformer, x, patches, text, mask(3, torch.ones(4, 5, dtype=torch.bool)))
    torch.testing.assert_close(queries, qformer.resample(x, patches), rtol=0, atol=1e-5)  # measured 1.4e-6


def test_the_masks_of_two_queries_and_three_text_positions_of_which_the_last_is_padding():
    text = torch.tensor([[True, True, False]])
    for mask, rows in (
        (apart_mask, ["11000", "11000", "00110", "00110", "00110"]),
        (causal_mask, ["11000", "11000", "11100", "11110", "11110"]),
        (together_mask, ["11110"] * 5),
    ):
        assert ["".join(str(int(value)) for value in row) for row in mask(2, text)[0]] == rows


def test_a_pictures_similarity_is_that_of_its_most_similar_query():
    queries = torch.eye(2)[None]
    texts = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), dim=-1)
    torch.testing.assert_close(similarities(queries, texts), torch.tensor([[1.0, 0.5**0.5]]))


def test_the_contrastive_loss_of_different_texts_is_the_smoothed_cross_entropy_of_both_directions():
    scores = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    found = contrastive_loss_sum(scores, torch.eye(3).bool(), torch.ones(3).bool())
    directions = [
        F.cross_entropy(each, torch.arange(3), label_smoothing=0.1, reduction="sum") for each in (scores, scores.T)
    ]
    torch.testing.assert_close(found, sum(directions) / 2)


def test_equal_texts_are_positives_of_each_other():
    equal, pairs = equal_texts(TEXTS), torch.ones(4).bool()
    scores = torch.zeros(4, 4)
    scores[0, 2] = scores[2, 0] = 9.0  # the other picture of the same text
    as_positives = contrastive_loss_sum(scores, equal, pairs)
    assert as_positives < contrastive_loss_sum(scores, torch.eye(4).bool(), pairs)
    even = torch.zeros(4, 4, requires_grad=True)
    contrastive_loss_sum(even, equal, pairs).backward()
    assert even.grad[0, 0] == even.grad[0, 2] < 0 < even.grad[0, 1]


def test_negatives_are_never_equal_texts_nor_rows_without_a_pair_and_follow_the_scores():
    equal, pairs = equal_texts(TEXTS), torch.tensor([True, True, True, False])
    scores = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    drawn = [draw_negatives(scores, equal, pairs, generator=torch.Generator().manual_seed(seed)) for seed in range(50)]
    for pictures_of, texts_of, has_negative in drawn:
        assert has_negative.tolist() == [True, True, True, False]
        for negatives in (pictures_of, texts_of):
            assert [negatives[0], negatives[2]] == [1, 1] and negatives[1] in (0, 2)
    scores[1, 2] = scores[1, 0] + 3.0  # the softmax of these two is 95%
    texts = [draw_negatives(scores, equal, pairs, generator=torch.Generator().manual_seed(n))[1][1] for n in range(200)]
    assert 180 <= sum(int(text) == 2 for text in texts) < 200


def test_a_block_of_one_text_has_no_negative_and_the_loss_of_its_own_pairs_alone():
    labels = TEXTS[[0, 0]]
    *_, has_negative = draw_negatives(torch.zeros(2, 2), equal_texts(labels), torch.ones(2).bool(), generator=None)
    logits = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    found = matching_loss_sum(logits, torch.ones(2).bool(), has_negative)
    torch.testing.assert_close(found, F.cross_entropy(logits[:2], torch.ones(2).long(), reduction="sum") / 3)
    whole = matching_loss_sum(logits, torch.ones(2).bool(), torch.ones(2).bool())
    torch.testing.assert_close(whole, 2 * F.cross_entropy(logits, torch.tensor([1, 1, 0, 0, 0, 0])))


def start(kind=T5ForImageTextMatching, **vision):
    torch.manual_seed(0)
    matching = MATCHING if kind is T5ForImageTextMatching else {}
    return kind.start(SIZES, VISION | matching | vision, **ENDS)


def block(texts=TEXTS):
    x, mask = pictures(len(texts))
    return {"vision_features": x, "vision_mask": mask[:, 0]}, texts


def losses(model, inputs, labels, seed=0):
    torch.manual_seed(seed)
    return {name: part for name, (part, _) in OBJECTIVES["matching"](model, inputs, labels).items()}


def test_the_generation_loss_is_that_of_each_token_after_those_before_it():
    model, (inputs, labels) = start().eval(), block()
    whole = losses(model, inputs, labels)["generation"].item()
    changed = labels.clone()
    changed[1, 3] = 2  # the last token of one text
    qformer, rows = model.encoder.fusion.resampler, (inputs["vision_features"], inputs["vision_mask"][:, None])
    text = model.matching.text.embed(labels[1:2, :3], 1)
    mask = causal_mask(3, torch.ones(1, 4, dtype=torch.bool))
    _, states = model.matching.text(qformer, rows[0][1:2], rows[1][1:2], text, mask)
    log_probabilities = model.matching.word_head(states)[0, 3].log_softmax(-1)
    difference = losses(model, inputs, changed)["generation"].item() - whole
    assert difference == pytest.approx((log_probabilities[1] - log_probabilities[2]).item(), abs=1e-4)


def test_rows_without_a_picture_or_a_text_have_no_part_and_are_not_counted():
    model, (inputs, labels) = start().eval(), block(TEXTS[[0, 1, 3, 1]])
    expected = losses(model, {name: tensor[:2] for name, tensor in inputs.items()}, labels[:2])
    inputs["vision_mask"][2] = False
    labels = labels.clone()
    labels[3] = torch.tensor([1, _, _, _])  # an end token alone
    found = losses(model, inputs, labels)
    assert {name: part.item() for name, part in found.items()} == pytest.approx(
        {name: part.item() for name, part in expected.items()}, rel=1e-4
    )
    assert count_units({"labels": labels, **inputs}) == {
        "tokens": 10.0,
        "questions": 4.0,
        "pairs": 2.0,
        "pair_tokens": 7.0,
    }


def test_a_dummy_block_has_no_loss_and_zero_gradients_of_all_that_is_trained():
    model, (inputs, labels) = start(), block()
    parts = losses(model, inputs, torch.full_like(labels, IGNORED_LABEL))
    assert [part.item() for part in parts.values()] == [0.0, 0.0, 0.0]
    sum(parts.values()).backward()
    trained = {name: weight.grad for name, weight in model.named_parameters() if name.startswith(model.new_parts)}
    assert all(grad is not None and not grad.any() for grad in trained.values()), trained


def test_all_parts_that_are_trained_have_a_gradient_and_the_language_model_has_none():
    model, (inputs, labels) = start(), block()
    sum(losses(model, inputs, labels).values()).backward()
    for name, weight in model.named_parameters():
        assert (weight.grad is not None and bool(weight.grad.any())) == name.startswith(model.new_parts) or (
            name.endswith("k_proj.bias")  # the softmax cancels it
        ), name


def test_draws_follow_torchs_seed_in_training_and_the_block_alone_otherwise():
    model, (inputs, labels) = start(), block(torch.arange(4 * 3).view(4, 3) + 2)
    in_training = {losses(model.train(), inputs, labels, seed)["matching"].item() for seed in range(8)}
    assert len(in_training) > 1
    assert losses(model, inputs, labels, 3)["matching"] == losses(model, inputs, labels, 3)["matching"]
    assert len({losses(model.eval(), inputs, labels, seed)["matching"].item() for seed in range(8)}) == 1


def test_watch_has_the_temperature_and_the_share_of_pairs_without_a_negative():
    model, (inputs, labels) = start(), block(TEXTS[[0, 0]])
    assert model.watch() == {}
    model.observe(inputs)
    losses(model, inputs, labels)
    model.observe(None)
    losses(model, inputs, labels)
    assert model.watch() == {"temperature": pytest.approx(0.07), "pairs_without_negative": 1.0}
    assert model.watch() == {}


def test_it_starts_with_the_weights_of_the_model_of_stage_two():
    plain, matching = start(T5ForMultimodalGeneration).state_dict(), start().state_dict()
    assert all(torch.equal(matching[name], weight) for name, weight in plain.items())
    assert {name.split(".")[0] for name in matching.keys() - plain.keys()} == {"matching"}


def test_the_model_of_stage_two_starts_from_its_folder_with_the_same_bridge_and_no_warning(tmp_path, caplog):
    randomize(model := start())
    model.save_pretrained(tmp_path)
    check_start("T5ForMultimodalGeneration", str(tmp_path))
    check_start("T5ForImageTextMatching", str(tmp_path))
    options = VISION | {"max_text_tokens": 0, "projection_width": 0}
    with caplog.at_level(logging.WARNING, logger="transformers"):
        loaded = T5ForMultimodalGeneration.from_pretrained(tmp_path, **options)
    assert "matching" not in caplog.text
    weights = model.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in loaded.state_dict().items())
    loaded.save_pretrained(tmp_path / "two")
    assert '"max_text_tokens": 0' in (tmp_path / "two" / "config.json").read_text()


@pytest.mark.parametrize("vision", [{"resample": "perceiver"}, {"inject": "encoder"}, {"max_pictures": 5}])
def test_a_model_without_the_q_former_of_one_picture_is_refused(vision):
    with pytest.raises(InputError, match=r"matching trains the Q-Former of one picture, .* expected embed, qformer"):
        start(**vision)
