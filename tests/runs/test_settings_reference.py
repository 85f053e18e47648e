"""The reference of settings: the page, the schema for editors, explanations, and the nearest name."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from launcher.cli.main import app
from launcher.config.explanations import source_of
from launcher.config.loading import load_settings, preset_names, setting_layers
from launcher.config.reference import all_settings, json_schema, setting_named, settings_page
from launcher.config.setting_names import nearest_setting
from launcher.tuning.space import check_space

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"
CHECK = jsonschema.Draft202012Validator(json_schema())

WRONG = [
    "training: {learning_rate: fast}",
    "training: {learning_rate: -1}",
    "training: {lr: 1.0e-3}",
    "trainning: {learning_rate: 1.0e-3}",
    "training: {zero_stage: 4}",
    "training: [learning_rate]",
    "cluster: {num_workers: 0}",
    "cluster: {use_gpu: maybe}",
    "data: {splits: {dev: x}}",
    "generation: {top_p: 2}",
    "answer: {rationale_source: mine}",
    "stages: {draft: {num_steps: many}}",
    "extensions: my_parts",
    "run: {chain: three-stages}",
    "model: {fusion: gated}",
    "rationale: {format: QCM-X}",
    "data: {mini_sqa: {skills: magnets}}",
    "cluster: {num_workers: 2.5}",
]
WRONG_SPACES = ["{training.lr: {grid: [1]}}", "{run.seed: [0, 1]}", "{run.seed: {some: [0]}}", "{run.seed: {grid: 3}}"]
RIGHT = [
    "{extensions: [my_parts], run: {chain: mine}, model: {fusion: mean_patch}}",
    "tuning: {space: {stages.draft.learning_rate: {choice: [1.0e-3]}, run.seed: {grid: [0, 1]}}}",
    "training: {learning_rate: 1.0e-3}",
    "stages: {draft: {num_steps: 4}, rationale: {num_steps: 3}}",
    "{run: {name: a}, tuning: {space: {training.learning_rate: {loguniform: [1.0e-5, 1.0e-2]}}}}",
    "rationale: null",
]


def mmcot(*arguments):
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.output


def test_the_page_is_the_one_that_the_command_prints():
    assert PAGE.read_text(encoding="utf-8") == settings_page(), "write it: mmcot config explain --page"


def test_every_setting_has_a_type_and_a_meaning():
    settings = all_settings()
    assert len(settings) > 120 and all(each.type and each.meaning for each in settings)
    units = {each.name: each.unit for each in settings}
    assert units["training.hang_timeout_s"] == "seconds" and units["data.cache_gb"] == "gigabytes"
    assert units["training.schedule"] == "" and units["data.unreadable_pictures"] == ""


@pytest.mark.parametrize("text", WRONG)
def test_the_schema_and_the_loader_refuse_the_same_file(text, tmp_path):
    assert not CHECK.is_valid(yaml.safe_load(text))
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"setting|extension|must hold"):
        load_settings(preset="demo", config=tmp_path / "a.yaml")


@pytest.mark.parametrize("space", WRONG_SPACES)
def test_the_schema_and_the_tuning_refuse_the_same_space(space):
    assert not CHECK.is_valid(yaml.safe_load(f"tuning: {{space: {space}}}"))
    with pytest.raises(ValueError, match="setting"):
        check_space(load_settings(preset="demo", overrides=[f"tuning.space={space}", "tuning.scheduler=none"]))


@pytest.mark.parametrize("text", RIGHT)
def test_the_schema_takes_files_that_name_a_part_of_the_settings(text):
    CHECK.validate(yaml.safe_load(text))


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_fits_the_schema(preset):
    path = resources.files("launcher.config") / "presets" / f"{preset}.yaml"
    CHECK.validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    CHECK.validate(json.loads(json.dumps(load_settings(preset=preset).model_dump())))


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("training.lr", "training.learning_rate"),
        ("lr", "training.learning_rate"),
        ("training.learning_rte", "training.learning_rate"),
        ("data.learning_rate", "training.learning_rate"),
        ("rationale.lr", "rationale.learning_rate"),
        ("answer.epochs", "answer.num_epochs"),
        ("data.batch_size", "training.global_batch_size"),
        ("model.backbone", "model.pretrained"),
        ("cluster.gpus", "cluster.num_workers"),
        ("run.output_dir", "run.dir"),
        ("trainig", "training"),
        ("training.epochs", "rationale.num_epochs and answer.num_epochs"),
        ("training.bf16", "training.precision=bf16"),
        ("seed", "run.seed"),
        ("training.fp16", "training.precision=bf16"),
        ("training.gradient_accumulation_steps", "training.global_batch_size"),
        ("mlflow", "tracking"),
    ],
)
def test_a_wrong_name_is_answered_with_the_nearest_by_its_whole_path(name, nearest):
    assert nearest_setting(name) == f" did you mean {nearest}?"


@pytest.mark.parametrize("name", ["training.optimizer", "generation.num_beams", "model.quantization"])
def test_a_name_that_is_near_to_none_is_answered_with_none(name):
    assert nearest_setting(name) == ""


def test_a_value_is_shown_with_the_place_that_gave_it(tmp_path):
    (tmp_path / "a.yaml").write_text("training: {warmup_steps: 7}\n")
    layers = setting_layers(preset="demo", config=tmp_path / "a.yaml", overrides=["cluster.num_workers=3"])
    places = ("training.learning_rate", "training.warmup_steps", "cluster.num_workers", "tracking.uri")
    assert [source_of(name, layers) for name in places] == [
        "preset demo",
        str(tmp_path / "a.yaml"),
        "--set",
        "default",
    ]
    status, output = mmcot(
        "config", "explain", "cluster.num_workers", "--preset", "demo", "--set", "cluster.num_workers=3"
    )
    assert status == 0 and output.startswith("cluster.num_workers = 3, from --set\n    integer above 0, in processes")


def test_a_stage_is_explained_by_its_own_name_and_an_unknown_setting_names_the_nearest():
    assert setting_named("stages.draft.num_steps")[0].name == "stages.draft.num_steps"
    status, output = mmcot("config", "explain", "training.lr")
    assert status == 1 and "did you mean training.learning_rate?" in output


def test_the_schema_is_printed_as_json():
    status, output = mmcot("config", "schema")
    assert status == 0 and json.loads(output)["title"] == "Settings of mmcot"
