"""Gated cross-attention to media before the blocks of the decoder (Flamingo)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import T5ForConditionalGeneration

from mmcot.decoding.generation import generate_rows
from mmcot.decoding.rows import Rows
from mmcot.models.cuda_graphs import StaticDecoder
from mmcot.models.gated import GatedCrossAttention, own_picture_mask
from mmcot.models.opening import open_model
from mmcot.models.resampling import RESAMPLERS
from mmcot.models.step_decoder import StepDecoder
from mmcot.models.t5 import T5ForMultimodalGeneration
from mmcot.texts.encoding import EncodedPair, collate

GOLDEN = Path(__file__).parents[1] / "golden" / "bridges"  # its make.py says how the files were made
PAD, EOS = 0, 1
SHAPE = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
PAIRS = [
    EncodedPair(source, (9, 12, EOS), 0, 0) for source in ((5, 6, 7, EOS), (8, EOS), (11, 12, 13, 14, EOS), (7, EOS))
]
NUM_PICTURES = (1, 2, 0, 1)


def start(resample="perceiver", *, max_pictures=2, gate=0.7, inject="layers", **options):
    """A model whose gates are open, so that media matter."""
    torch.manual_seed(0)
    vision = {
        "inject": inject,
        "resample": resample,
        "media_tokens": 5 if resample == "linear" else 3,
        "vision_num_patches": 5 * max_pictures,
        "vision_dim": 12,
        "max_pictures": max_pictures,
    }
    model = T5ForMultimodalGeneration.start(SHAPE | options, vision, pad_token_id=PAD, eos_token_id=EOS).eval()
    for name, parameter in model.named_parameters():
        if gate is not None and name.endswith("gate.scale"):
            parameter.data.fill_(gate)
    return model


@pytest.fixture
def batch():
    torch.manual_seed(1)
    features = [torch.randn(5 * number, 12).numpy() for number in NUM_PICTURES]
    return collate(PAIRS, features, feature_shape=(10, 12), pad_token_id=PAD, decoder_start_token_id=PAD)


def test_with_closed_gates_the_model_is_the_language_model(batch):
    model = start(gate=0.0)
    plain = T5ForConditionalGeneration(model.config).eval()
    names = plain.state_dict().keys()
    plain.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if name in names})
    text = {name: tensor for name, tensor in batch.items() if not name.startswith("vision")}
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, plain(**text).logits, rtol=0, atol=1e-6)


def test_a_new_model_has_closed_gates_that_get_a_gradient(batch):
    model = start(gate=None)
    model(**batch).loss.backward()
    for block in model.decoder.block:
        for gate in (block.gated.attention_gate, block.gated.feed_forward_gate):
            assert gate.scale.item() == 0.0 and gate.scale.grad.abs() > 0


def test_a_token_reads_its_own_picture_alone_and_none_before_the_first():
    is_picture = torch.tensor([[False, True, False, True, False]])
    mask = own_picture_mask(is_picture, num_pictures=2, tokens_per_picture=3)
    assert mask[0].int().tolist() == [[0] * 6, [1] * 3 + [0] * 3, [1] * 3 + [0] * 3, *[[0] * 3 + [1] * 3] * 2]
    torch.manual_seed(0)
    block = GatedCrossAttention(width=16, media_width=12, num_heads=2, head_width=8)
    for gate in (block.attention_gate, block.feed_forward_gate):
        gate.scale.data.fill_(0.5)
    x, media = torch.randn(1, 5, 16), torch.randn(1, 6, 12)
    other = media.clone()
    other[:, 3:] += 1.0
    first, second = block(x, media, mask), block(x, other, mask)
    assert torch.equal(first[:, :3], second[:, :3]) and not torch.allclose(first[:, 3:], second[:, 3:])
    torch.testing.assert_close(first[:, 0], block.transform(x)[:, 0])


@pytest.mark.parametrize("peer", ["flamingo_pytorch", "open_flamingo"])
def test_the_block_is_that_of_the_ports_of_flamingo(peer):
    tensors = load_file(GOLDEN / f"{peer}_block.safetensors")
    weights = {name.removeprefix("weights."): w for name, w in tensors.items() if name.startswith("weights.")}
    keys, values = weights["attn.to_kv.weight"].chunk(2)
    ours = {
        "attention_norm.weight": weights["attn.norm.weight"],
        "attention_norm.bias": weights["attn.norm.bias"],
        "attention.q_proj.weight": weights["attn.to_q.weight"],
        "attention.k_proj.weight": keys,
        "attention.v_proj.weight": values,
        "attention.out_proj.weight": weights["attn.to_out.weight"],
        "attention_gate.scale": weights["attn_gate"],
        "feed_forward_norm.weight": weights["ff.0.weight"],
        "feed_forward_norm.bias": weights["ff.0.bias"],
        "feed_forward.fc1.weight": weights["ff.1.weight"],
        "feed_forward.fc2.weight": weights["ff.3.weight"],
        "feed_forward_gate.scale": weights["ff_gate"],
    }
    media = tensors["inputs.media"]  # [B, M, K, C]
    block = GatedCrossAttention(width=8, media_width=media.shape[3], num_heads=2, head_width=3)
    block.load_state_dict(ours)
    mask = own_picture_mask(
        tensors["inputs.media_locations"].bool(), num_pictures=media.shape[1], tokens_per_picture=media.shape[2]
    )
    found = block(tensors["inputs.x"], media.flatten(1, 2), mask)
    torch.testing.assert_close(found, tensors["outputs.x"], rtol=0, atol=2e-6)


def test_a_picture_changes_its_own_row_and_a_row_without_one_reads_no_media(batch):
    model = start()
    first = model(**batch).logits
    batch["vision_features"][0, :5] += 1.0
    batch["vision_features"][:, 5:][[0, 2, 3]] += 1.0  # absent patches
    second = model(**batch).logits
    assert not torch.allclose(first[0], second[0]) and torch.equal(first[1:], second[1:])
    text = {name: tensor for name, tensor in batch.items() if not name.startswith("vision")}
    torch.testing.assert_close(model(**text).logits[2], second[2])


def decoder_of(kind, model, num_rows):
    if kind == "static":
        return StaticDecoder(model, num_rows=num_rows, max_source_tokens=6, max_new_tokens=7)
    return StepDecoder(model, num_rows=num_rows, max_new_tokens=7)


@pytest.mark.parametrize("kind", ["step", "static"])
@pytest.mark.parametrize("resample", sorted(RESAMPLERS))
def test_the_engine_writes_what_the_models_own_forward_chooses(batch, kind, resample):
    model = start(resample)
    features = [row[: 5 * number].numpy() for row, number in zip(batch["vision_features"], NUM_PICTURES, strict=True)]
    written = generate_rows(
        model,
        [pair.source_ids for pair in PAIRS],
        features,
        feature_shape=(10, 12),
        max_new_tokens=[7, 3, 5, 7],
        num_rows=3,
        eos_token_ids=(EOS,),
        with_log_probs=True,
        rows=Rows(model.read, decoder_of(kind, model, 3)),
    )
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "vision_features", "vision_mask")}
    scores = decoder_of(kind, model, 3).score(model.read(**inputs), [row.ids for row in written])
    for found, scored in zip(written, scores, strict=True):
        assert scored == pytest.approx(found.log_probs, abs=2e-6)
    for number, found in enumerate(written):
        inputs = {name: batch[name][number : number + 1] for name in ("vision_features", "vision_mask")}
        inputs |= {"input_ids": torch.tensor([PAIRS[number].source_ids])}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        logits = model(**inputs, decoder_input_ids=torch.tensor([[PAD, *found.ids[:-1]]])).logits[0]
        assert logits.argmax(-1).tolist() == found.ids
        expected = logits.log_softmax(-1)[range(len(found.ids)), found.ids]
        torch.testing.assert_close(torch.tensor(found.log_probs), expected, rtol=0, atol=2e-6)


def test_the_decoder_chooses_the_same_tokens_itself(batch):
    model = start()
    features = [row[: 5 * number].numpy() for row, number in zip(batch["vision_features"], NUM_PICTURES, strict=True)]
    options = {"feature_shape": (10, 12), "max_new_tokens": 7, "num_rows": 3, "eos_token_ids": (EOS,)}
    sources = [pair.source_ids for pair in PAIRS]
    ours, static = (
        generate_rows(model, sources, features, **options, rows=Rows(model.read, decoder_of(kind, model, 3)))
        for kind in ("step", "static")
    )
    assert [row.ids for row in ours] == [row.ids for row in static]


def test_beam_search_reads_the_media(batch):
    model = start()
    inputs = {name: tensor for name, tensor in batch.items() if "labels" not in name and "decoder" not in name}
    greedy = model.generate(**inputs, max_new_tokens=6, num_beams=1, do_sample=False)
    features = [row[: 5 * number].numpy() for row, number in zip(batch["vision_features"], NUM_PICTURES, strict=True)]
    written = generate_rows(
        model,
        [pair.source_ids for pair in PAIRS],
        features,
        feature_shape=(10, 12),
        max_new_tokens=6,
        num_rows=4,
        eos_token_ids=(EOS,),
    )
    for row, found in zip(greedy.tolist(), written, strict=True):
        assert row[1 : 1 + len(found.ids)] == found.ids
    assert model.generate(**inputs, max_new_tokens=6, num_beams=3).shape[0] == 4


def test_recomputed_activations_give_the_same_gradients(batch):
    model = start()
    model.train()
    gradients = []
    for recomputes in (False, True):
        if recomputes:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(**batch, use_cache=False).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    assert len(gradients[0]) == len(list(model.parameters()))
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_a_saved_model_opens_and_its_new_parts_are_bridge_and_gated_layers(tmp_path, batch):
    model = start()
    model.save_pretrained(tmp_path)
    opened = open_model(tmp_path).eval()
    assert torch.equal(opened(**batch).logits, model(**batch).logits)
    assert opened.new_parts == ("encoder.bridge.", "decoder.block.0.gated.", "decoder.block.1.gated.")


def test_pretrained_weights_of_a_t5_fit_by_their_own_names(tmp_path, batch):
    T5ForConditionalGeneration(start().config).save_pretrained(tmp_path)
    vision = {
        name: getattr(start().config, name)
        for name in ("inject", "resample", "media_tokens", "vision_num_patches", "vision_dim", "max_pictures")
    }
    model, report = T5ForMultimodalGeneration.from_pretrained(tmp_path, output_loading_info=True, **vision)
    assert report["missing_keys"] and all(name.startswith(model.new_parts) for name in report["missing_keys"])
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("gate.scale"))
    assert model.decoder.block[0].gated.feed_forward.fc1.weight.std().item() == pytest.approx(16**-0.5, rel=0.1)


@pytest.mark.parametrize("inject", ["layers", "embed"])
def test_maps_are_the_media_tokens_shares_of_their_own_pictures_patches(batch, inject):
    model = start(inject=inject)
    vision = {name: batch[name] for name in ("vision_features", "vision_mask")}
    maps = model.attention_maps(batch["input_ids"], batch["attention_mask"], **vision)
    assert maps.of_media and maps.attention_BSP.shape == (4, 6, 10)
    first, second = maps.attention_BSP[1].split(3)
    assert not first[:, 5:].any() and not second[:, :5].any()
    torch.testing.assert_close(maps.attention_BSP[1].sum(-1), torch.ones(6))
    assert not maps.attention_BSP[2].any()  # a row without a picture
    assert start("vit", inject=inject).attention_maps(batch["input_ids"], batch["attention_mask"], **vision) is None


def test_openings_of_all_gates_are_watched(batch):
    model = start(gate=0.7)
    model(**batch)
    assert model.watch() == {}
    model.observe(batch)
    model(**batch)
    opening = pytest.approx(float(torch.tensor(0.7).tanh()))
    names = {f"{kind}_gate_{number}" for kind in ("attention", "feed_forward") for number in (0, 1)}
    assert model.watch() == dict.fromkeys(names, opening) and model.watch() == {}


def test_operations_count_the_gated_layers_by_target_and_media():
    model = start(max_pictures=1)
    text, short, long = (
        model.forward_flops([20], [target], num_patches=patches) for target, patches in ((5, 0), (5, 5), (9, 5))
    )
    gated = model.decoder.block[0].gated
    resampler = model.encoder.fusion.resampler.forward_flops(5)
    read = gated.forward_flops(5, 3) - gated.forward_flops(5, 0)
    assert short - text == pytest.approx(resampler + 2 * read)
    added = {target: gated.forward_flops(target, 3) - gated.forward_flops(target, 0) for target in (5, 9)}
    longer = model.forward_flops([20], [9], num_patches=0) - text
    assert long - short == pytest.approx(longer + 2 * (added[9] - added[5]))
