"""Opening a saved model by its folder."""

from __future__ import annotations

import subprocess
import sys

import pytest


def test_a_folder_is_opened_as_the_class_it_names(model_dir):
    from mmcot import T5ForMultimodalGeneration, open_model

    assert type(open_model(model_dir)) is T5ForMultimodalGeneration


def test_a_folder_without_a_model_says_what_is_expected(tmp_path):
    from mmcot import open_model

    with pytest.raises(ValueError, match="holds no model"):
        open_model(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["BertModel"]}')
    with pytest.raises(ValueError, match=r"\['BertModel'\], expected one of \['T5ForImageTextMatching', 'T5ForM"):
        open_model(tmp_path)


def test_the_package_and_its_function_are_imported_without_torch():
    code = "import sys; from mmcot import open_model; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_a_name_that_the_package_lacks_is_an_attribute_error():
    import mmcot

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mmcot.nothing


def test_a_start_from_another_class_or_shape_is_refused_with_both(model_dir, tmp_path, monkeypatch):
    from mmcot.models import opening

    opening.check_start("T5ForMultimodalGeneration", str(model_dir))
    with pytest.raises(ValueError, match=r"with vision_dim \d+, the new model has 9999"):
        opening.check_start("T5ForMultimodalGeneration", str(model_dir), shape={"vision_dim": 9999})
    with pytest.raises(ValueError, match="with fusion 'gated_cross_attention', the new model has 'another'"):
        opening.check_start("T5ForMultimodalGeneration", str(model_dir), shape={"fusion": "another"})
    monkeypatch.setitem(opening.MODULES, "Other", "other")
    with pytest.raises(ValueError, match="is a T5ForMultimodalGeneration, the new model is a Other"):
        opening.check_start("Other", str(model_dir))


def test_an_unknown_fusion_is_refused_with_what_exists():
    from launcher.config.loading import load_settings
    from launcher.config.settings import SettingsError

    with pytest.raises(SettingsError, match=r"'nothing' is unknown; expected one of gated_cross_attention"):
        load_settings(preset="demo", overrides=["model.fusion=nothing"])


def test_a_model_that_was_trained_without_features_gives_a_model_with_a_fusion_its_language_model(tmp_path):
    import torch

    from mmcot import T5ForMultimodalGeneration, open_model
    from mmcot.models import opening

    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    text = {"vision_num_patches": 1, "vision_dim": 1}
    T5ForMultimodalGeneration.start(sizes, text, pad_token_id=0, eos_token_id=1).save_pretrained(tmp_path)
    opening.check_start("T5ForMultimodalGeneration", str(tmp_path), shape={"vision_dim": 12})
    assert opening.reads_text_alone(str(tmp_path))
    model = T5ForMultimodalGeneration.from_pretrained(
        tmp_path, ignore_mismatched_sizes=True, vision_num_patches=5, vision_dim=12
    )
    assert model.encoder.image_dense.weight.shape == (16, 12)
    assert model.encoder.image_dense.weight.std().item() == pytest.approx(12**-0.5, rel=0.3)
    assert not model.encoder.image_dense.bias.any()
    start = open_model(tmp_path)
    assert torch.equal(model.shared.weight, start.shared.weight)


def test_media_of_another_resampler_are_refused_also_where_an_earlier_version_did_not_name_it(tmp_path):
    import json

    from mmcot import T5ForMultimodalGeneration
    from mmcot.models import opening

    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    media = {"inject": "embed", "resample": "perceiver", "media_tokens": 3, "vision_num_patches": 5, "vision_dim": 12}
    T5ForMultimodalGeneration.start(sizes, media, pad_token_id=0, eos_token_id=1).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    later = ("resample_width", "resample_head_width", "resample_activation", "resample_qk_norm")
    (tmp_path / "config.json").write_text(json.dumps({key: config[key] for key in config if key not in later}))
    same = dict(zip(later, (None, None, "gelu", False), strict=True))
    opening.check_start("T5ForMultimodalGeneration", str(tmp_path), media=same)
    with pytest.raises(ValueError, match="was trained with resample_activation 'gelu', the new model has 'relu'"):
        opening.check_start("T5ForMultimodalGeneration", str(tmp_path), media=same | {"resample_activation": "relu"})
