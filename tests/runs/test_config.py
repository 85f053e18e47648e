"""Settings: presets load, and every wrong one is met with a sentence that helps."""

from __future__ import annotations

import pytest

from launcher.config.loading import (
    dump_settings,
    load_settings,
    parse_settings,
    preset_names,
    setting_names,
)
from launcher.config.settings import SettingsError


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_loads_and_survives_a_round_trip(preset):
    import yaml

    settings = load_settings(preset=preset)
    assert settings.run.name == preset
    assert parse_settings(yaml.safe_load(dump_settings(settings))) == settings


def test_a_file_is_laid_over_the_preset_and_set_over_both(tmp_path):
    (tmp_path / "a.yaml").write_text("training: {learning_rate: 0.5, warmup_steps: 7}\n")
    settings = load_settings(preset="demo", config=tmp_path / "a.yaml", overrides=["training.learning_rate=1e-3"])
    assert settings.training.learning_rate == 1e-3 and settings.training.warmup_steps == 7
    assert settings.training.beta2 == 0.98


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.learning_rte=1", r"training.learning_rte is unknown; did you mean training.learning_rate\?"),
        ("training.global_batch_size=30", r"must be a multiple of micro_batch_size \(16\); try 32"),
        ("rationale={num_epochs: 2, num_steps: 3}", "must look like section.key=value"),
        ("rationale.num_steps=null", "exactly one of num_steps and num_epochs"),
        ("training.learning_rate=fast", "training.learning_rate = 'fast'"),
        ("learning_rate=1", "must look like section.key=value"),
        ("training.zero_stage=4", "training.zero_stage = 4"),
    ],
)
def test_a_wrong_setting_is_named_with_its_remedy(override, message):
    with pytest.raises(SettingsError, match=message):
        load_settings(preset="demo", overrides=[override])


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(SettingsError, match="did you mean demo"):
        load_settings(preset="dem")


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(SettingsError, match="does not exist"):
        load_settings(config=tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(SettingsError, match="no valid YAML"):
        load_settings(config=tmp_path / "bad.yaml")


def test_a_wrong_value_of_a_file_is_told_with_the_file_and_a_missing_file_with_the_nearest(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("training: 5\nrationale: {num_stps: 3}\n")
    with pytest.raises(SettingsError) as error:
        load_settings(preset="demo", config=path)
    section, name = str(error.value).splitlines()
    assert section.startswith(f"{path}: setting training = 5: this is a section") and "explain training" in section
    assert name.startswith(f"{path}: setting rationale.num_stps is unknown; did you mean rationale.num_steps?")
    with pytest.raises(SettingsError, match=r"mne\.yaml does not exist; did you mean .*mine\.yaml\?"):
        load_settings(preset="demo", config=tmp_path / "mne.yaml")


def test_a_dotted_name_in_a_file_is_the_setting_and_epochs_replace_a_presets_steps(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("training.learning_rate: 2.0e-3\nrationale:\n  num_epochs: 2\n")
    settings = load_settings(preset="demo", config=path)
    assert settings.training.learning_rate == 2e-3
    assert (settings.rationale.num_epochs, settings.rationale.num_steps) == (2, None)
    assert settings.answer.num_steps == load_settings(preset="demo").answer.num_steps
    again = load_settings(preset="demo", config=path, overrides=["rationale.num_steps=7"])
    assert (again.rationale.num_epochs, again.rationale.num_steps) == (None, 7)
    with pytest.raises(SettingsError, match="exactly one of num_steps and num_epochs"):
        load_settings(preset="demo", overrides=["rationale.num_steps=7", "rationale.num_epochs=3"])
    for text, message in (("", "is empty"), ("- 1", "holds a list")):
        path.write_text(text)
        with pytest.raises(SettingsError, match=f"mine.yaml {message}; it must have sections"):
            load_settings(config=path)
    with pytest.raises(SettingsError, match="cannot be read: Is a directory"):
        load_settings(config=tmp_path)


def test_every_setting_has_a_description():
    from launcher.config.settings import Settings

    def undescribed(section, prefix=""):
        for name, field in section.model_fields.items():
            if isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields"):
                yield from undescribed(field.annotation, f"{prefix}{name}.")
            elif not field.description:
                yield prefix + name

    assert list(undescribed(Settings)) == [] and len(setting_names()) > 50


def test_settings_written_whole_by_a_version_without_extra_choices_are_of_data_without_any():
    sizes = {"num_train": 64, "num_val": 8, "num_test": 8, "seed": 0, "shuffle_choices": False}
    values = {"rationale": {"num_steps": 1}, "answer": {"num_steps": 1}}
    assert parse_settings({**values, "data": {"mini_sqa": sizes}}).data.mini_sqa.extra_choices == 0
    assert parse_settings({**values, "data": {"mini_sqa": {"num_train": 64}}}).data.mini_sqa.extra_choices == 1


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["run.dir=runs/mine"], "mine"),
        (["run.dir=runs/my run"], "my-run"),
        (["run.name=other", "run.dir=runs/mine"], "other"),
        (["run.dir=runs/mine", "run.name=other"], "other"),
        ([], "demo"),
    ],
)
def test_a_run_is_named_after_its_folder_unless_a_name_is_given_with_it(overrides, name):
    assert load_settings(preset="demo", overrides=overrides).run.name == name


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.picture_size=100"], r"picture_size \(100\) must be a multiple of square_size \(8\); try 96"),
        (
            ["data.features=clip", "data.square_size=16"],
            r"\(64/16\) are of the features patch, and data\.features is",
        ),
    ],
)
def test_sizes_of_squares_that_do_not_fit_are_refused(overrides, message):
    with pytest.raises(SettingsError, match=message):
        load_settings(preset="demo", overrides=overrides)
