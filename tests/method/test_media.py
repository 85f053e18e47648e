"""Pictures become media tokens that stand in the source where its placeholders are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmcot.decoding.generation import generate_rows
from mmcot.errors import InputError
from mmcot.models.opening import check_start, open_model
from mmcot.models.resampler import ResamplerShape
from mmcot.models.resampling import RESAMPLERS
from mmcot.models.t5 import MultimodalT5Config, T5ForMultimodalGeneration
from mmcot.texts.encoding import PictureTokens, collate, encode_pair
from mmcot.texts.prompts import IMAGE_MARKER, PICTURE_MARK, build_pair
from mmcot.texts.sample import Part, Sample
from mmcot.texts.tokenizer import train_tokenizer

SHAPE = ResamplerShape(vision_dim=12, width=16, num_patches=5, num_tokens=3, depth=2, num_heads=2)
PAD, EOS = 0, 1


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(["Question: Which is bigger? The sun."] * 4, tmp_path_factory.mktemp("t"), vocab_size=300)


@pytest.fixture(params=sorted(RESAMPLERS))
def resampler(request):
    torch.manual_seed(0)
    return RESAMPLERS[request.param](SHAPE).eval()


def start(resample="perceiver", *, max_pictures=2, inject="embed", media=None, **options):
    torch.manual_seed(0)
    vision = (media or {}) | {
        "inject": inject,
        "resample": resample,
        "media_tokens": 5 if resample == "linear" else 3,
        "vision_num_patches": 5 * max_pictures,
        "vision_dim": 12,
        "max_pictures": max_pictures,
    }
    shape = {
        "vocab_size": 40,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 2,
        "num_heads": 2,
        "dropout_rate": 0.0,
    }
    return T5ForMultimodalGeneration.start(shape | options, vision, pad_token_id=PAD, eos_token_id=EOS).eval()


def test_media_are_those_of_each_picture_alone(resampler):
    vision = torch.randn(2, 3, 5, 12)
    media = resampler(vision)
    alone = torch.stack([resampler(vision[:, number : number + 1])[:, 0] for number in range(3)], dim=1)
    torch.testing.assert_close(media, alone)
    assert media.shape[:2] == (2, 3) and media.shape[3] == 16


def test_a_mask_of_present_patches_changes_nothing_and_absent_ones_do_not_count(resampler):
    vision, mask = torch.randn(1, 1, 5, 12), torch.ones(1, 1, 5, dtype=torch.bool)
    torch.testing.assert_close(resampler(vision, mask), resampler(vision))
    mask[..., 3:] = False
    other = vision.clone()
    other[..., 3:, :] = 99.0
    torch.testing.assert_close(resampler(vision, mask), resampler(other, mask))


def test_a_picture_without_a_patch_has_finite_media_and_gradients(resampler):
    vision = torch.randn(1, 2, 5, 12, requires_grad=True)
    mask = torch.tensor([[[True] * 5, [False] * 5]])
    media = resampler(vision, mask)
    media.square().sum().backward()
    assert media.isfinite().all() and vision.grad.isfinite().all() and not vision.grad[0, 1].any()


def test_marks_stand_for_pictures_where_a_document_has_them_and_in_front_of_a_question():
    parts = [
        Part("Look:"),
        Part(image="a.png"),
        Part("What is <image>?", role="user"),
        Part("A map.", role="assistant"),
    ]
    source, _ = build_pair(Sample.of_document("d", parts), "P-T", marks_pictures=True)
    assert source == f"Look: {PICTURE_MARK} User: What is <image>?" and IMAGE_MARKER in source
    question = Sample("q", "Hot?", ("a", "b"), 0, images=("a.png", "b.png"))
    marked, plain = (build_pair(question, "QCM-A", marks_pictures=marks)[0] for marks in (True, False))
    assert marked == f"{PICTURE_MARK} {PICTURE_MARK} {plain}"


def test_a_question_may_say_where_its_pictures_are():
    question = Sample("q", "Is <image> or <image> hot?", ("<image>", "b"), 0, images=("a.png", "b.png", "c.png"))
    source, target = build_pair(question, "QCMG-AL", rationale="As in <image>.", marks_pictures=True)
    assert source == (
        f"Question: Is {PICTURE_MARK} or {PICTURE_MARK} hot? Context: N/A Options: (A) {PICTURE_MARK} (B) b "
        "As in <image>. Solution:"
    )
    assert target == build_pair(question, "QCMG-AL", rationale="As in <image>.")[1]


@pytest.mark.parametrize("images", [(), ("a.png", "b.png")], ids=["more-marks", "fewer-marks"])
def test_another_number_of_marks_than_pictures_is_refused(images):
    question = Sample("q", "Is <image> hot?", ("a", "b"), 0, images=images)
    expected = f"sample q: its text has 1 <image>, and it has {len(images)} pictures; write <image> once"
    with pytest.raises(InputError, match=expected):
        build_pair(question, "QCM-A", marks_pictures=True)
    assert "<image>" in build_pair(question, "QCM-A")[0]  # a model that reads no picture there sees a text


def test_a_text_with_the_mark_itself_is_refused():
    with pytest.raises(InputError, match=r"sample q: its text contains the code point U\+FDD0"):
        build_pair(Sample("q", f"Hot{PICTURE_MARK}?", ("a", "b"), 0), "QCM-A", marks_pictures=True)


def test_placeholders_are_counted_in_lengths_and_limits(tokenizer):
    pictures = PictureTokens(per_picture=3, token_id=PAD, max_pictures=2)

    def ids(source, limit=99):
        return encode_pair(tokenizer, source, "x", max_source_tokens=limit, max_target_tokens=9, pictures=pictures)

    text = encode_pair(tokenizer, "The sun.", "x", max_source_tokens=99, max_target_tokens=9).source_ids
    assert ids(f"{PICTURE_MARK} The sun.").source_ids == (PAD,) * 3 + text
    assert ids(PICTURE_MARK * 5 + "The sun.").source_ids == (PAD,) * 6 + text  # beyond the most pictures
    cut = ids(f"{PICTURE_MARK} The sun.", limit=5)
    assert len(cut.source_ids) == 5 and cut.source_cut == len(text) - 2 and cut.source_ids[-1] == EOS


def batch(tokenizer, sources, *, num_pictures):
    pictures = PictureTokens(per_picture=3, token_id=PAD, max_pictures=2)
    pairs = [
        encode_pair(tokenizer, source, "sun", max_source_tokens=60, max_target_tokens=9, pictures=pictures)
        for source in sources
    ]
    features = [torch.randn(5 * number, 12).numpy() for number in num_pictures]
    return collate(pairs, features, feature_shape=(10, 12), pad_token_id=PAD, decoder_start_token_id=PAD)


def test_a_picture_changes_the_source_it_stands_in_and_no_other(tokenizer):
    model = start(vocab_size=len(tokenizer))
    inputs = batch(tokenizer, [f"{PICTURE_MARK} The sun.", "The sun."], num_pictures=(1, 0))
    first = model(**inputs).logits
    inputs["vision_features"][0, :5] += 1.0
    second = model(**inputs).logits
    assert not torch.allclose(first[0], second[0]) and torch.equal(first[1], second[1])
    inputs["vision_features"][:, 5:] += 1.0  # absent patches
    assert torch.equal(second, model(**inputs).logits)


def test_a_source_without_pictures_is_read_as_by_the_language_model_alone(tokenizer):
    model = start(vocab_size=len(tokenizer))
    inputs = batch(tokenizer, ["The sun.", "Which is bigger?"], num_pictures=(0, 0))
    plain = {name: tensor for name, tensor in inputs.items() if not name.startswith("vision")}
    torch.testing.assert_close(model(**inputs).logits, model(**plain).logits)


@pytest.mark.parametrize("resample", sorted(RESAMPLERS))
def test_the_engine_writes_what_the_models_own_forward_chooses(tokenizer, resample):
    model = start(resample, max_pictures=2, vocab_size=len(tokenizer))
    pictures = model.config.picture_tokens
    pairs = [
        encode_pair(tokenizer, source, "", max_source_tokens=60, max_target_tokens=9, pictures=pictures)
        for source in (f"{PICTURE_MARK} The sun.", f"{PICTURE_MARK} bigger {PICTURE_MARK} sun", "Which?")
    ]
    torch.manual_seed(1)
    features = [torch.randn(5 * number, 12).numpy() for number in (1, 2, 0)]
    sources = [pair.source_ids for pair in pairs]
    written = generate_rows(
        model, sources, features, feature_shape=(10, 12), max_new_tokens=6, num_rows=2, eos_token_ids=(EOS,)
    )
    for pair, feature, found in zip(pairs, features, written, strict=True):
        inputs = collate([pair], [feature], feature_shape=(10, 12), pad_token_id=PAD)
        inputs = {name: tensor for name, tensor in inputs.items() if name != "labels"}
        ids = [PAD]
        for _ in found.ids:
            ids.append(int(model(**inputs, decoder_input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        assert list(found.ids) == ids[1:]


def test_a_saved_model_opens_with_its_media(tmp_path, tokenizer):
    model = start(vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path)
    opened = open_model(tmp_path).eval()
    inputs = batch(tokenizer, [f"{PICTURE_MARK} The sun."], num_pictures=(1,))
    assert torch.equal(opened(**inputs).logits, model(**inputs).logits)
    assert opened.config.picture_tokens == PictureTokens(3, PAD, 2) and opened.new_parts == ("encoder.bridge.",)


def test_the_language_model_has_a_t5s_own_names_so_that_pretrained_weights_fit(tmp_path):
    start(inject="encoder", resample="none").save_pretrained(tmp_path)
    media = {"inject": "embed", "resample": "mean", "media_tokens": 3, "vision_num_patches": 10, "max_pictures": 2}
    model, report = T5ForMultimodalGeneration.from_pretrained(tmp_path, output_loading_info=True, **media)
    assert all(name.startswith("encoder.bridge.") for name in report["missing_keys"]) and report["missing_keys"]
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_operations_count_the_resampler_for_every_picture():
    one, two = (start(max_pictures=number) for number in (1, 2))
    text = one.forward_flops([20], [5], num_patches=0)
    first = one.forward_flops([20], [5], num_patches=5) - text
    assert first > 0 and two.forward_flops([20], [5], num_patches=10) - text == pytest.approx(2 * first)


def test_an_unknown_place_is_refused():
    with pytest.raises(InputError, match="inject 'sideways' is unknown; expected one of encoder, embed"):
        MultimodalT5Config(inject="sideways")


@pytest.mark.parametrize("width", [24, 16])
def test_media_of_a_resampler_of_its_own_width_pass_a_linear_layer(tokenizer, width):
    model = start("qformer", media={"resample_width": width, "resample_head_width": 5}, vocab_size=len(tokenizer))
    bridge = model.encoder.fusion
    assert isinstance(bridge.project, nn.Linear) and tuple(bridge.project.weight.shape) == (16, width)
    assert bridge.resampler.blocks[0].attention.q_proj.out_features == 4 * 5
    inputs = batch(tokenizer, [f"{PICTURE_MARK} The sun."], num_pictures=(1,))
    media = bridge.project(bridge.resampler(inputs["vision_features"].unflatten(1, (2, 5))))[0, 0]
    placed = bridge.place(torch.zeros(1, 4, 16), torch.tensor([[True, True, True, False]]), inputs["vision_features"])
    assert torch.equal(placed[0], torch.cat([media, torch.zeros(1, 16)]))


def test_a_projection_is_counted_in_operations_and_opens_from_a_folder(tmp_path):
    model = start("perceiver", media={"resample_width": 24})
    bridge = model.encoder.fusion
    expected = 2 * (bridge.resampler.forward_flops(5) + 2 * 3 * 24 * 16)
    assert bridge.forward_flops(torch.tensor([3.0]), 10) == expected
    model.save_pretrained(tmp_path)
    assert torch.equal(open_model(tmp_path).encoder.fusion.project.weight, bridge.project.weight)


def test_a_start_with_media_of_another_resampler_is_refused(tmp_path):
    start("perceiver", media={"resample_width": 24}).save_pretrained(tmp_path)
    same = {"resample": "perceiver", "resample_width": 24, "resample_qk_norm": False}
    check_start("T5ForMultimodalGeneration", str(tmp_path), media=same)
    with pytest.raises(InputError, match="trained with resample_width 24, the new model has None"):
        check_start("T5ForMultimodalGeneration", str(tmp_path), media=same | {"resample_width": None})


def test_media_are_new_where_the_model_to_start_from_has_none(tmp_path):
    start("none", inject="encoder").save_pretrained(tmp_path)
    check_start("T5ForMultimodalGeneration", str(tmp_path), media={"resample": "perceiver", "resample_width": 24})
