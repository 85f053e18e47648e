"""Published vision encoders, here small and with random weights."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from transformers.utils import is_timm_available

from data_shards.reader import SplitReader
from launcher.config.loading import load_settings
from launcher.config.settings import Data, SettingsError
from launcher.data.build import prepare_data
from launcher.pipeline.preflight import check_settings
from launcher.report.attention import grid_of
from mmcot.vision.encoder_kinds import ENCODERS, Encoder, open_encoder
from mmcot.vision.encoders import VisionEncoder
from mmcot.vision.model_kinds import MODEL_KINDS

KINDS = ("detr", "clip", "vit", "resnet", "blip2", "siglip")
HEADS = {
    "detr": "DetrForObjectDetection",
    "clip": "CLIPModel",
    "vit": "ViTForImageClassification",
    "resnet": "ResNetForImageClassification",
    "blip2": "Blip2ForConditionalGeneration",
    "siglip": "SiglipModel",
}
INNER = {  # the encoder's name below its head
    "detr": "model",
    "clip": "vision_model",
    "vit": "vit",
    "resnet": "resnet",
    "blip2": "vision_model",
    "siglip": "vision_model",
}
SHAPES = {"detr": (5, 16), "clip": (4, 16), "vit": (10, 16), "resnet": (1, 12), "blip2": (5, 16), "siglip": (4, 16)}
SIZES = {"detr": 224, "clip": 32, "vit": 48, "resnet": 224, "blip2": 28, "siglip": 32}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
USUAL = {
    "detr": {**IMAGENET, "resample": Image.Resampling.BILINEAR},
    "clip": {
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": Image.Resampling.BICUBIC,
    },
    "vit": {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": Image.Resampling.BILINEAR},
    "resnet": {**IMAGENET, "resample": Image.Resampling.BICUBIC},
    "siglip": {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": Image.Resampling.BICUBIC},
}
USUAL["blip2"] = USUAL["clip"]
TRANSFORMER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
DETR = {
    "d_model": 16,
    "num_queries": 5,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic"}


def small_config(kind: str) -> transformers.PreTrainedConfig:
    if kind == "detr":
        backbone = transformers.ResNetConfig(**RESNET, out_features=["stage2"])
        return transformers.DetrConfig(
            use_timm_backbone=False, backbone_config=backbone, encoder_ffn_dim=24, decoder_ffn_dim=24, **DETR
        )
    if kind == "clip":
        text = {**TRANSFORMER, "vocab_size": 50, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2}
        return transformers.CLIPConfig(
            text_config=text, vision_config={**TRANSFORMER, "image_size": 32, "patch_size": 16}, projection_dim=8
        )
    if kind == "vit":
        return transformers.ViTConfig(**TRANSFORMER, image_size=48, patch_size=16)
    if kind == "blip2":
        return transformers.Blip2Config(
            vision_config={**TRANSFORMER, "image_size": 28, "patch_size": 14},
            qformer_config={**TRANSFORMER, "num_hidden_layers": 1},
            text_config={"model_type": "t5", "vocab_size": 20, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1},
            num_query_tokens=2,
        )
    if kind == "siglip":
        text = {**TRANSFORMER, "vocab_size": 50, "max_position_embeddings": 8}
        return transformers.SiglipConfig(
            text_config=text, vision_config={**TRANSFORMER, "image_size": 32, "patch_size": 16}
        )
    return transformers.ResNetConfig(**RESNET)


def picture(seed: int, size: tuple[int, int] = (70, 41)) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def models():
    """A model with a head of every kind; its batch norms have means unlike those they start with."""
    torch.manual_seed(0)
    models = {kind: getattr(transformers, HEADS[kind])(small_config(kind)).eval() for kind in KINDS}
    for parameter in models["blip2"].vision_model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # its start has a standard deviation of 1e-10
    for model in models.values():
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.1)
    return models


@pytest.fixture(scope="module")
def folders(models, tmp_path_factory):
    """`<kind>`: the encoder alone; `<kind>-head`: the same weights below a head."""
    root = tmp_path_factory.mktemp("encoders")
    for kind, model in models.items():
        model.save_pretrained(root / f"{kind}-head")
        getattr(model, INNER[kind]).save_pretrained(root / kind)
    return root


@pytest.fixture(scope="module")
def encoders(folders):
    return {kind: VisionEncoder(kind, folders / kind) for kind in KINDS}


@torch.inference_mode()
def plain_features(kind: str, model: transformers.PreTrainedModel, pixels: torch.Tensor) -> torch.Tensor:
    if kind == "detr":
        return model(pixels, torch.ones(len(pixels), 224, 224, dtype=torch.long)).last_hidden_state
    if kind == "clip":
        return model.vision_model(pixels).last_hidden_state[:, 1:, :]
    if kind == "vit":
        return model.vit(pixels).last_hidden_state
    if kind == "blip2":
        states = model.vision_model.encoder(model.vision_model.embeddings(pixels)).last_hidden_state
        return model.vision_model.post_layernorm(states)
    if kind == "siglip":
        return model.vision_model(pixels).last_hidden_state
    return model.resnet(pixels).pooler_output[:, None, :, 0, 0]


def with_weights(source: Path, target: Path, change) -> Path:
    """A copy of a folder, its weights after `change`."""
    shutil.copytree(source, target)
    weights = load_file(target / "model.safetensors")
    change(weights)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_the_kinds_are_the_published_ones():
    assert tuple(MODEL_KINDS) == KINDS and tuple(ENCODERS) == ("patch", *KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_gives_what_the_plain_model_gives(kind, encoders, models):
    encoder, pictures = encoders[kind], [picture(1), picture(2, (30, 90)), picture(3, (400, 300))]
    features = encoder.encode(pictures)
    assert encoder.shape == SHAPES[kind] and features.shape == (3, *SHAPES[kind]) and features.dtype == np.float16
    assert np.abs(features[0] - features[1]).max() > 0.01
    expected = plain_features(kind, models[kind], torch.stack([encoder.preprocess(p) for p in pictures]))
    np.testing.assert_allclose(features, expected.numpy(), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_alone_gives_what_it_gives_in_a_batch(kind, encoders):
    pictures = [picture(seed, (50 + seed, 60)) for seed in range(3)]
    alone = np.concatenate([encoders[kind].encode([p]) for p in pictures])
    np.testing.assert_allclose(encoders[kind].encode(pictures), alone, rtol=2e-3, atol=2e-3)
    assert encoders[kind].encode([]).shape == (0, *SHAPES[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_with_a_head_gives_the_same(kind, encoders, folders):
    encoder = VisionEncoder(kind, str(folders / f"{kind}-head"))
    assert encoder.shape == SHAPES[kind]
    np.testing.assert_array_equal(encoder.encode([picture(1)]), encoders[kind].encode([picture(1)]))


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_are_prepared_as_transformers_prepares_what_it_does_not_crop(kind, encoders):
    processor = ViTImageProcessorPil(size={"height": SIZES[kind], "width": SIZES[kind]}, **USUAL[kind])
    expected = processor(picture(4), return_tensors="pt").pixel_values[0]
    pixels = encoders[kind].preprocess(picture(4))
    assert pixels.dtype == torch.float32 and pixels.shape == (3, SIZES[kind], SIZES[kind])
    torch.testing.assert_close(pixels, expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("resample", [Image.Resampling.NEAREST, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS])
def test_the_folder_of_the_model_decides_normalisation_and_filter(resample, folders, tmp_path):
    shutil.copytree(folders / "vit", tmp_path / "vit")
    processor = ViTImageProcessorPil(
        size={"height": 48, "width": 48}, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.6, 0.8], resample=resample
    )
    processor.save_pretrained(tmp_path / "vit")
    assert (tmp_path / "vit" / "preprocessor_config.json").is_file()
    expected = processor(picture(5), return_tensors="pt").pixel_values[0]
    torch.testing.assert_close(
        VisionEncoder("vit", tmp_path / "vit").preprocess(picture(5)), expected.float(), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_that_was_prepared_gives_the_same_features(kind, encoders):
    pictures = [picture(1), picture(2, (30, 90)), picture(3, (400, 300))]
    prepared = [encoders[kind].prepare(each) for each in pictures]
    assert {each.size for each in prepared} == {(encoders[kind].image_size,) * 2}
    assert np.array_equal(encoders[kind].encode(prepared), encoders[kind].encode(pictures))


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "CMYK"])
def test_pictures_of_other_modes_become_rgb(mode, encoders):
    other = picture(6).convert(mode)
    np.testing.assert_array_equal(encoders["clip"].encode([other]), encoders["clip"].encode([other.convert("RGB")]))


def test_the_model_is_frozen_and_computes_in_float32_whatever_it_was_saved_in(folders, tmp_path):
    def halve(weights):
        weights.update({name: weight.bfloat16() for name, weight in weights.items()})

    encoder = VisionEncoder("vit", with_weights(folders / "vit", tmp_path / "vit", halve))
    assert not encoder._model.training and {(p.dtype, p.requires_grad) for p in encoder._model.parameters()} == {
        (torch.float32, False)
    }
    assert encoder._model.pooler is None


def test_an_unknown_kind_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'dino'.*detr, clip, vit, resnet, blip2, siglip"):
        VisionEncoder("dino")


@pytest.mark.parametrize(
    ("kind", "other"), [("clip", "vit"), ("vit", "clip"), ("resnet", "detr"), ("detr", "resnet"), ("blip2", "siglip")]
)
def test_a_model_of_another_type_is_refused(kind, other, folders):
    with pytest.raises(ValueError, match=f"{re.escape(str(folders / other))}.*'{other}.*'{kind}'"):
        VisionEncoder(kind, folders / other)


@pytest.mark.skipif(is_timm_available(), reason="timm is installed")
def test_a_backbone_that_needs_timm_says_what_to_install(folders, tmp_path):
    shutil.copytree(folders / "detr", tmp_path / "detr")
    config = json.loads((tmp_path / "detr" / "config.json").read_text())
    config.pop("backbone_config")
    (tmp_path / "detr" / "config.json").write_text(
        json.dumps({**config, "backbone": "resnet101", "use_timm_backbone": True, "dilation": True})
    )
    with pytest.raises(ImportError, match="pip install timm"):
        VisionEncoder("detr", tmp_path / "detr")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_features_that_float16_cannot_hold_are_refused(value, folders, tmp_path):
    def spoil(weights):
        weights["layernorm.weight"].fill_(value)

    folder = with_weights(folders / "vit", tmp_path / "vit", spoil)
    with pytest.raises(ValueError, match=f"^vit features of '{re.escape(str(folder))}': picture 0 of a batch of 2"):
        VisionEncoder("vit", folder).encode([picture(7), picture(8)])


def test_a_checkpoint_that_lacks_weights_is_refused(folders, tmp_path):
    folder = with_weights(folders / "vit", tmp_path / "vit", lambda weights: weights.pop("embeddings.cls_token"))
    with pytest.raises(ValueError, match="lacks 1 weights of a vit encoder, such as 'embeddings.cls_token'"):
        VisionEncoder("vit", folder)


def test_counters_of_batch_norms_may_be_absent(folders, encoders, tmp_path):
    def drop(weights):
        for name in [name for name in weights if name.endswith("num_batches_tracked")]:
            del weights[name]

    encoder = VisionEncoder("resnet", with_weights(folders / "resnet", tmp_path / "resnet", drop))
    np.testing.assert_array_equal(encoder.encode([picture(1)]), encoders["resnet"].encode([picture(1)]))


def test_a_model_that_is_not_square_is_refused(tmp_path):
    transformers.ViTModel(transformers.ViTConfig(**TRANSFORMER, image_size=[32, 48], patch_size=16)).save_pretrained(
        tmp_path
    )
    with pytest.raises(ValueError, match=r"\(vit\) takes pictures of \[32, 48\] pixels; expected a square"):
        VisionEncoder("vit", tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_real_pictures_are_encoded(kind, encoders):
    root = os.environ.get("MMCOT_SCIENCEQA_DIR")
    if not root:
        pytest.skip("MMCOT_SCIENCEQA_DIR is not set: no ScienceQA pictures")
    paths = sorted(Path(root).glob("images/test/*/image.png"))[:5]
    assert paths, f"no images/test/<qid>/image.png below {root}"
    pictures = [Image.open(path) for path in paths]
    features = encoders[kind].encode(pictures)
    assert features.shape == (len(paths), *SHAPES[kind]) and np.isfinite(features).all()
    assert len({row.tobytes() for row in features}) == len(paths)


def mean_colours(images):
    """What somebody else's encoder may be: the mean colour of a picture's upper and lower half, [B, 2, 3]."""
    pixels = np.stack([np.asarray(image.resize((2, 2))) for image in images])
    return pixels.mean(axis=2) / 255


def test_an_encoder_of_one_s_own_is_an_entry_and_a_function(monkeypatch, tmp_path):
    monkeypatch.setitem(ENCODERS, "colours", Encoder(lambda model, device: (mean_colours, (2, 3)), in_driver=True))
    rows = [{"qid": split, "split": split, "image": "a.png"} for split in ("train", "val", "test")]
    rows = [{"question": "Which?", "choices": ["a", "b"], "answer": 0, **row} for row in rows]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png")
    overrides = [f"data.path={tmp_path / 'mine.jsonl'}", f"data.shards_dir={tmp_path / 'out'}", "data.features=colours"]
    settings = load_settings(preset="demo", overrides=overrides)
    check_settings(settings)
    prepare_data(settings, lambda line: None)
    features = SplitReader(tmp_path / "out", "train", features="colours").features(0)
    np.testing.assert_array_equal(features, np.array([[1, 0, 0], [1, 0, 0]], np.float16))


def test_features_beyond_float16_of_any_encoder_are_refused(monkeypatch):
    monkeypatch.setitem(
        ENCODERS, "large", Encoder(lambda model, device: (lambda images: np.full((1, 2, 3), 1e6), (2, 3)))
    )
    encode, shape = open_encoder("large")
    assert shape == (2, 3)
    with pytest.raises(ValueError, match=r"large features .*largest is"):
        encode([Image.new("RGB", (4, 4))])


def test_every_place_that_lists_encoders_names_them_all(monkeypatch):
    monkeypatch.setitem(ENCODERS, "mine", Encoder(lambda model, device: (mean_colours, (2, 3))))
    with pytest.raises(ValueError, match="'dino' cannot be made from pictures") as unknown:
        open_encoder("dino")
    with pytest.raises(SettingsError, match="'dino' cannot be made on this machine") as refused:
        check_settings(load_settings(preset="demo", overrides=["data.features=dino"]))
    assert all(name in str(error.value) for name in ENCODERS for error in (unknown, refused))
    fields, page = Data.model_fields, (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    for name in ("patch", *KINDS):
        assert name in fields["features"].description and f"`{name}`" in page
        assert (name in fields["vision_model"].description) == (ENCODERS[name].default_model is not None)


@pytest.mark.parametrize(("sizes", "expected"), [(None, (64, 208)), ("32/16", (4, 772))])
def test_patches_are_opened_for_the_sizes_of_picture_and_square(sizes, expected):
    encode, shape = open_encoder("patch", sizes)
    assert encode([Image.new("RGB", (9, 5))] * 2).shape == (2, *shape) and shape == expected


def test_a_class_token_makes_no_grid_and_siglips_patches_do():
    grids = {name: ENCODERS[name].grid_of(SHAPES[name][0]) for name in KINDS}
    assert grids == dict.fromkeys(KINDS) | {"siglip": (2, 2)}
    assert ENCODERS["siglip"].grid_of(196) == (14, 14) and ENCODERS["siglip"].grid_of(197) is None
    assert ENCODERS["patch"].grid_of(64) == (8, 8)


def test_the_report_draws_siglips_attention_over_each_of_several_pictures():
    settings = load_settings(preset="demo", overrides=["data.features=siglip", "data.max_pictures=2"])
    assert grid_of(settings, 2 * 196) == {"rows": 14, "columns": 14}
    assert "why" in grid_of(load_settings(preset="demo", overrides=["data.features=blip2"]), 257)
