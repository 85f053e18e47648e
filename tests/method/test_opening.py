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
