"""Settings as people type them: a value is what its setting's type says, and places are resolved once."""

from __future__ import annotations

import json

import pytest

from launcher.config.field_types import kinds_of
from launcher.config.given_values import LOCAL_PLACES
from launcher.config.loading import load_settings, merge_override, value_of
from launcher.config.setting_names import setting_names
from launcher.config.settings import SettingsError
from launcher.tuning.space import check_space, with_values


def given(override):
    return value_of(load_settings(preset="demo", overrides=[override]), override.partition("=")[0])


@pytest.mark.parametrize(
    "text",
    [
        "my set #1/in.jsonl",
        "#1",
        "a: b",
        "1:30",
        "010",
        "yes",
        "1e3",
        "*all",
        "&a",
        "!x",
        "{a}",
        "[a",
        "- a",
        "'a' & 'b'",
        "None",
        " a ",
        "2026-01-01",
        "a\\tb",
        "@x",
        "%x",
        ".inf",
    ],
)
def test_a_text_is_taken_as_it_is_typed(text):
    assert given(f"data.path={text}") == text


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("data.path='my set'", "my set"),
        ('data.path="a # b"', "a # b"),
        ("data.path='it''s'", "it's"),
        ("data.features=null", None),
        ("data.features='null'", "null"),
        ("run.name=010", "010"),
        ("training.schedule= cosine ", "cosine"),
        ("training.learning_rate=1e-3", 1e-3),
        ("training.log_every=1_000", 1000),
        ("training.log_every='5'", 5),
        ("training.tf32=yes", True),
        ("training.tf32=OFF", False),
        ("training.zero_stage=1", 1),
        ("training.zero_stage=auto", "auto"),
        ("cluster.use_gpu=on", True),
        ("cluster.use_gpu=auto", "auto"),
        ("answer.format=", "QCMG-A"),
        ("answer.num_epochs=~", None),
        ("data.splits={train: minitrain}", {"train": "minitrain"}),
        ("data.splits.train=mini #1", {"train": "mini #1"}),
        ("data.mini_sqa.skills=magnets, map", ["magnets", "map"]),
        ("data.mini_sqa.skills=[magnets, map]", ["magnets", "map"]),
        ("training.profile_steps=[1, 3]", (1, 3)),
        ("training.profile_steps=1,3", (1, 3)),
        ("training.deepspeed={zero_optimization: {stage: 1}}", {"zero_optimization": {"stage": 1}}),
        ("training.deepspeed=ds #1.json", "ds #1.json"),
        ("cluster.env={NCCL_DEBUG: INFO, NCCL_IB_DISABLE: 1}", {"NCCL_DEBUG": "INFO", "NCCL_IB_DISABLE": "1"}),
        ("tuning.space={run.seed: {grid: [0, 1]}}", {"run.seed": {"grid": [0, 1]}}),
    ],
)
def test_a_value_has_the_type_of_its_setting(override, value):
    name = override.partition("=")[0].removesuffix(".train")
    assert value_of(load_settings(preset="demo", overrides=[override]), name) == value


def test_a_part_of_a_mapping_has_the_type_of_the_mapping():
    overrides = ["cluster.env.NCCL_IB_DISABLE=1", "cluster.env.CUDA_VISIBLE_DEVICES="]
    overrides.append("training.deepspeed.zero_optimization.stage=1")
    settings = load_settings(preset="demo", overrides=overrides)
    assert settings.cluster.env == {"NCCL_IB_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}
    assert settings.training.deepspeed == {"zero_optimization": {"stage": 1}}


def test_the_settings_of_a_stage_are_typed_too():
    values = merge_override({}, "stages.draft.num_steps=7")
    values = merge_override(values, "stages.draft.rationales=texts #1")
    assert values == {"stages": {"draft": {"num_steps": 7, "rationales": "texts #1"}}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.log_every=010", r"training\.log_every = 010: it begins with a zero; write 10"),
        ("training.log_every=-09", r"it begins with a zero; write -9"),
        ("training.log_every=1:30", r"training\.log_every: 1:30 is 90 in YAML; write one number$"),
        ("training.log_every=yes", r"training\.log_every = 'yes': expected an integer"),
        ("training.log_every=5 #x", r"training\.log_every = '5 #x': expected an integer"),
        ("training.log_every=" + "9" * 30, r"training\.log_every: 9+ is too large"),
        ("training.learning_rate=inf", r"training\.learning_rate = 'inf': expected a finite number"),
        ("training.learning_rate=.nan", r"training\.learning_rate: \.nan is no finite number; give one"),
        ("training.learning_rate=1e999", "expected a finite number"),
        ("training.tf32=maybe", r"training\.tf32 = 'maybe': expected true or false"),
        ("training.zero_stage=true", r"training\.zero_stage = 'true': expected 'auto', 0, 1, 2 or 3"),
        ("training.precision=-1", r"training\.precision = '-1': expected 'fp32' or 'bf16'"),
        ("cluster.use_gpu=some", r"cluster\.use_gpu = 'some': expected 'auto' or true or false$"),
        ("tuning.max_concurrent=None", r"tuning\.max_concurrent = 'None': expected an integer or null"),
        ("run.name=null", r"run\.name = null: expected a text"),
        ("data.splits=x", r"data\.splits = 'x': expected a mapping, such as \{name: value\}"),
        ("data.splits={train: [}", r"data\.splits: no valid YAML"),
        ("data.splits={train: a, train: b}", r"data\.splits: the key 'train' occurs twice"),
        ("training.profile_steps=7", r"training\.profile_steps has too few values; give two"),
        ("data.mini_sqa=5", r"data\.mini_sqa = 5: this is a section"),
        ("run.dir=\udcff", r"run\.dir: '\\udcff' has a character that is no text"),
    ],
)
def test_a_value_of_another_type_is_named_with_what_is_expected(override, message):
    with pytest.raises(SettingsError, match=message):
        load_settings(preset="demo", overrides=[override])


@pytest.mark.parametrize("name", ["data.path", "run.name", "training.log_every", "training.tf32", "run.dir"])
def test_an_empty_value_is_refused_and_a_shell_variable_named_as_a_reason(name):
    with pytest.raises(SettingsError, match=rf"{name} is empty: a variable of the shell in it may not be set; give"):
        load_settings(preset="demo", overrides=[f"{name}="])


def test_an_empty_text_in_a_file_is_refused_with_the_file(tmp_path):
    (tmp_path / "my.yaml").write_text("data: {path: ''}\n")
    with pytest.raises(SettingsError, match=r"my\.yaml: setting data\.path is empty: .*give a text, or null for none"):
        load_settings(preset="demo", config=tmp_path / "my.yaml")


def test_every_local_place_is_a_setting():
    assert set(LOCAL_PLACES) <= set(setting_names()) and all(str in (kinds_of(name) or ()) for name in LOCAL_PLACES)


@pytest.mark.parametrize("name", [*LOCAL_PLACES, "answer.rationales"])
def test_the_home_folder_is_put_into_every_local_place(monkeypatch, name):
    monkeypatch.setenv("HOME", "/home/me")
    assert merge_override({}, f"{name}=~/a b") == merge_override({}, f"{name}=/home/me/a b")


def test_places_in_a_file_are_resolved_as_well(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATA", "/big")
    text = "data: {path: $DATA/in.csv, shards_dir: '${DATA}/shards', captions: ~/c.json}\nrun.dir: ~/runs/exp\n"
    (tmp_path / "my.yaml").write_text(text)
    settings = load_settings(preset="demo", config=tmp_path / "my.yaml")
    assert (settings.data.path, settings.data.shards_dir) == ("/big/in.csv", "/big/shards")
    assert (settings.data.captions, settings.run.dir, settings.run.name) == (
        "/home/me/c.json",
        "/home/me/runs/exp",
        "exp",
    )


def test_the_default_cache_stays_in_the_home_folder_of_each_machine():
    default = load_settings(preset="demo").data.cache_dir
    assert default.startswith("~") and given(f"data.cache_dir={default}") == default


@pytest.mark.parametrize("value", ["s3://bucket/~/$x", "hf://datasets/a/b", "sqlite:///~/m.db"])
def test_a_url_stays_as_it_is(value):
    assert merge_override({}, f"tracking.uri={value}") == {"tracking": {"uri": value}}


def test_a_variable_that_is_not_set_is_named(monkeypatch):
    monkeypatch.delenv("NOT_SET", raising=False)
    with pytest.raises(SettingsError, match=r"data\.path = '\$NOT_SET/x': the environment variable NOT_SET is not set"):
        load_settings(preset="demo", overrides=["data.path=$NOT_SET/x"])


def test_a_file_whose_name_has_such_characters_is_used(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("a$b", "~c"):
        (tmp_path / name).touch()
        assert given(f"data.path={name}") == name


def test_places_that_a_tuning_searches_are_resolved(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    space = "tuning.space={data.path: {choice: [~/a, ~/b]}}"
    settings = load_settings(preset="demo", overrides=[space, "tuning.arms={x: {data.captions: ~/c}}"])
    assert settings.tuning.space == {"data.path": {"choice": ["/home/me/a", "/home/me/b"]}}
    assert with_values(settings, {"arm": "x"}).data.captions == "/home/me/c"


def test_a_chain_that_is_no_text_in_a_search_is_refused():
    settings = load_settings(preset="demo", overrides=["tuning.space={run.chain: {grid: [[a]]}}"])
    with pytest.raises(SettingsError, match=r"setting run\.chain = \['a'\]: expected a text"):
        check_space(settings)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: {log_every: true}", r"setting training\.log_every = true: expected a number"),
        ("run: {name: 5}", r"my\.yaml: setting run\.name = 5: expected a text; in quotes it is a text: '5'"),
        ("stages: [1]", r"setting stages = \[1\]: expected a mapping"),
        ("extensions: 5", r"setting extensions = 5: expected a list"),
        ("run: null", r"setting run = null: this is a section"),
        ("run: {seed: '" + "9" * 400 + "'}", r"setting run\.seed: the number is too large"),
        ("training: {global_batch_size: '" + "9" * 400 + "', micro_batch_size: 7}", "must be a multiple of"),
    ],
)
def test_wrong_types_in_a_file_are_sentences(tmp_path, text, message):
    (tmp_path / "my.yaml").write_text(text)
    with pytest.raises(SettingsError, match=message):
        load_settings(preset="demo", config=tmp_path / "my.yaml")


def test_a_part_of_deepspeeds_settings_keeps_jsons_types():
    override = 'training.deepspeed={"bf16": {"enabled": "auto"}, "a": [1, null]}'
    assert given(override) == json.loads(override.partition("=")[2])


def test_a_message_about_a_long_value_is_cut():
    with pytest.raises(SettingsError) as error:
        load_settings(preset="demo", overrides=["run.chain=" + "x" * 5000])
    assert len(str(error.value)) < 1100
