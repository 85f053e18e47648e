"""YAML files of settings: nothing is lost, and no number becomes another one."""

from __future__ import annotations

import pytest
import yaml

from launcher.config.loading import dump_settings, load_settings
from launcher.config.settings import SettingsError
from launcher.config.strict_yaml import parse_yaml


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "training:\n  learning_rate: 1\nanswer: {}\ntraining:\n  log_every: 2\n",
            "'training' occurs twice, on line 1 too",
        ),
        ("training:\n  log_every: 1\n  log_every: 2\n", "'log_every' occurs twice"),
        ("a: 010\n", "010 is 8 in YAML; write 10"),
        ("a: -017\n", "-017 is -15 in YAML"),
        ("a: 1:30\n", "1:30 is 90 in YAML; write one number"),
        ("a: 1:30.5\n", "1:30.5 is 90.5 in YAML"),
        ("a: .inf\n", r".inf is no finite number"),
        ("a: [1, -.INF]\n", r"-.INF is no finite number"),
        ("a: .NaN\n", r".NaN is no finite number"),
    ],
)
def test_what_yaml_would_lose_or_read_as_another_number_is_refused(tmp_path, text, message):
    with pytest.raises(yaml.YAMLError, match=message):
        parse_yaml(text)
    (tmp_path / "my.yaml").write_text(text)
    with pytest.raises(SettingsError, match=rf"my\.yaml is no valid YAML: .*{message}(?s:.*)line \d+"):
        load_settings(preset="demo", config=tmp_path / "my.yaml")


def test_in_quotes_they_are_texts_and_other_numbers_are_as_before():
    text = "a: '010'\nb: \"1:30\"\nc: ['.inf', 0, 10, -3, 0x10, 1_000, 1.5, 1e-3, 2.5e+3, 0.5]\n"
    text += "d: &x {e: 1}\nf: {<<: *x, g: 2}\n"
    assert parse_yaml(text) == yaml.safe_load(text)
    assert parse_yaml(text)["a"] == "010" and parse_yaml(text)["f"] == {"e": 1, "g": 2}


def test_every_preset_and_what_is_dumped_are_read_the_same():
    for preset in ("demo", "scienceqa-base"):
        text = dump_settings(load_settings(preset=preset))
        assert parse_yaml(text) == yaml.safe_load(text)


def test_a_mark_before_the_text_does_not_matter_and_another_encoding_is_told(tmp_path):
    (tmp_path / "my.yaml").write_bytes(b"\xef\xbb\xbftraining:\n  log_every: 3\n")
    assert load_settings(preset="demo", config=tmp_path / "my.yaml").training.log_every == 3
    (tmp_path / "my.yaml").write_bytes("run:\n  name: Zü\n".encode("cp1252"))
    with pytest.raises(SettingsError, match="is no UTF-8"):
        load_settings(preset="demo", config=tmp_path / "my.yaml")
