"""What is found before any work is done, and the presets for real backbones."""

from __future__ import annotations

import pytest
import torch

from launcher.config import SettingsError, load_settings
from launcher.engine import _parameter_groups
from launcher.preflight import check_machine, check_settings, fetch_pretrained
from mmcot.model import MultimodalT5Config, T5ForMultimodalGeneration
from mmcot.vision import FEATURES, PUBLISHED_SHAPES

PUBLISHED_PARAMETERS = {"scienceqa-base": 251_907_840, "scienceqa-large": 790_496_256}


@pytest.mark.parametrize("preset", ["demo", "single-gpu", "scienceqa-base", "scienceqa-large"])
def test_the_model_of_every_preset_builds_on_the_meta_device(preset):
    settings = load_settings(preset=preset)
    num_patches, dim = (PUBLISHED_SHAPES | {name: shape for name, (_, shape) in FEATURES.items()})[settings.data.features]
    shape = settings.model.shape.model_dump()
    shape["vocab_size"] = shape["vocab_size"] or 1000
    with torch.device("meta"):
        config = MultimodalT5Config(vision_num_patches=num_patches, vision_dim=dim, decoder_start_token_id=0, **shape)
        model = T5ForMultimodalGeneration(config)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert num_parameters == PUBLISHED_PARAMETERS.get(preset, num_parameters) and num_parameters > 100_000


def test_features_that_cannot_be_made_stop_the_run_before_any_work_and_say_how_to_supply_them(tmp_path):
    settings = load_settings(preset="scienceqa-base", overrides=[f"data.path={tmp_path}"])
    with pytest.raises(SettingsError, match=r"'vit' cannot be made here .* set data.shards_dir to a folder that holds features/vit"):
        check_settings(settings)
    settings = load_settings(preset="scienceqa-base", overrides=[f"data.path={tmp_path}", f"data.shards_dir={tmp_path}"])
    with pytest.raises(SettingsError, match=r"features/vit is missing"):
        check_settings(settings)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.path=nowhere", "data.path nowhere does not exist"),
        ("rationale.format=QCM-X", "rationale.format: .*QCM-X.*did you mean"),
    ],
)
def test_a_setting_that_cannot_be_is_named_before_the_start(override, message):
    with pytest.raises(SettingsError, match=message):
        check_settings(load_settings(preset="demo", overrides=[override]))


def test_a_gpu_that_is_not_there_is_never_replaced_by_the_processor(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SettingsError, match=r"needs a GPU each, this machine has 0"):
        check_machine(load_settings(preset="single-gpu"))


def test_a_full_disk_is_found_before_the_start(tmp_path, monkeypatch):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**12, 10**12, 5_000_000))
    with pytest.raises(SettingsError, match=r"has 0.01 GB left"):
        check_machine(load_settings(preset="demo", overrides=[f"run.dir={tmp_path / 'a'}"]))


def test_a_model_that_cannot_be_fetched_is_named_with_where_to_put_it(tmp_path):
    with pytest.raises(SettingsError, match=r"'nobody/no-such-model' is no folder here .* Put its files into a folder"):
        fetch_pretrained("nobody/no-such-model")
    with pytest.raises(SettingsError, match="has no config.json"):
        fetch_pretrained(str(tmp_path))


@pytest.fixture
def small_model():
    config = MultimodalT5Config(
        vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vision_num_patches=2, vision_dim=3, decoder_start_token_id=0
    )
    return T5ForMultimodalGeneration(config)


def test_the_fusion_layers_may_have_a_learning_rate_of_their_own(small_model):
    training = load_settings(preset="demo", overrides=["training.learning_rate=1e-4", "training.fusion_learning_rate=5e-4"]).training
    groups = _parameter_groups(small_model, training)
    fusion = {id(p) for name, p in small_model.named_parameters() if "image_dense" in name or "mha_layer" in name or "gate_dense" in name}
    for group in groups:
        assert {id(p) in fusion for p in group["params"]} == {group["lr_ratio"] == pytest.approx(5.0)}
        assert {p.dim() > 1 for p in group["params"]} == {group["weight_decay"] > 0}
    assert sum(len(group["params"]) for group in groups) == len(list(small_model.parameters()))


def test_a_frozen_backbone_leaves_the_fusion_alone_to_train(small_model):
    training = load_settings(preset="demo", overrides=["training.freeze_backbone=true"]).training
    trained = [p for group in _parameter_groups(small_model, training) for p in group["params"]]
    assert len(trained) == 8 and sum(p.requires_grad for p in small_model.parameters()) == 8
    with pytest.raises(SettingsError, match="leaves nothing to train"):
        load_settings(preset="demo", overrides=["training.freeze_backbone=true", "data.features=null"])
