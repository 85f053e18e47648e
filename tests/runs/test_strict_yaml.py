"""YAML files of settings: nothing is lost, and no number becomes another one."""

from __future__ import annotations

import time

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
    (tmp_path / "my.yaml").write_text(text)
    with pytest.raises(SettingsError, match=rf"my\.yaml, line \d+: .*{message}"):
        load_settings(preset="demo", config=tmp_path / "my.yaml")


NESTED = "a: &a0 [x, x]\n" + "".join(f"b{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))
CHAIN = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 200))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: [1", r"line 2: no valid YAML: expected ',' or '\]', but got '<stream end>'"),
        ("a:\n\t- b\n", "line 2: no valid YAML: found a tab .*; indent with spaces"),
        ("a: b: c\n", "line 1: no valid YAML: a colon is not expected here; check the indentation"),
        ("a: 1\n---\nb: 2\n", "line 2: no valid YAML: a second document begins here"),
        (
            "a: !!python/object/apply:os.system [ls]\n",
            "line 1: the tag !!python/object/apply:os.system is not supported",
        ),
        ("a: !!binary aGk=\n", "line 1: the tag !!binary is not supported"),
        ("a: !!int x\n", "line 1: 'x' is no number"),
        ("a: 1\nb: " + "[" * 100_000, "line 2: values are nested more than 50 levels deep"),
        (NESTED, "line 6: more than 100,000 values, with what aliases"),
        (CHAIN, "line 50: more than 50 levels, with what aliases"),
        ("a: &a [*a]\n", r"line 1: the alias \*a stands inside of what it repeats"),
        ("a: *b\n", "line 1: no valid YAML: found undefined alias 'b'"),
        ("a: 1\n1: 2\n", "line 2: the key 1 is no text; write '1' in quotes"),
        ("? [a]\n: 2\n", "line 1: a list or mapping as a key is no text"),
        ("a: " + "9" * 6000 + "\n", "line 1: .* is no number that can be used"),
        ("a: 0x" + "f" * 6000 + "\n", "line 1: .* is too large"),
        ("a: 1.0e+999\n", "line 1: .* is too large"),
        ('a: "\\U99999999"\n', "line 1: no valid YAML: an escape .* names no character"),
        ('a: "\\ud83d"\n', "line 1: an escape names a zero or half of a pair"),
        ("a: 1\nb: \x01\n", r"line 2: the character U\+0001 is not allowed"),
    ],
)
def test_what_is_no_plain_yaml_is_one_sentence_with_file_and_line(tmp_path, text, message):
    (tmp_path / "my.yaml").write_text(text)
    start = time.process_time()
    with pytest.raises(SettingsError, match=rf"my\.yaml, {message}") as error:
        load_settings(preset="demo", config=tmp_path / "my.yaml")
    assert "\n" not in str(error.value) and "unicode string" not in str(error.value)
    assert time.process_time() - start < 10


def test_a_large_file_that_is_no_file_of_settings_is_refused_unread(tmp_path):
    (tmp_path / "table.csv").write_text("a,b\n" * 300_000)
    with pytest.raises(SettingsError, match=r"table\.csv has 1,200,000 bytes"):
        load_settings(preset="demo", config=tmp_path / "table.csv")


def test_dates_and_equals_signs_are_texts():
    assert parse_yaml("a: 2026-01-01\nb: =\n", "my.yaml") == {"a": "2026-01-01", "b": "="}


def test_in_quotes_they_are_texts_and_other_numbers_are_as_before():
    text = "a: '010'\nb: \"1:30\"\nc: ['.inf', 0, 10, -3, 0x10, 1_000, 1.5, 1e-3, 2.5e+3, 0.5]\n"
    text += "d: &x {e: 1}\nf: {<<: *x, g: 2}\n"
    assert parse_yaml(text, "my.yaml") == yaml.safe_load(text)
    assert parse_yaml(text, "my.yaml")["a"] == "010" and parse_yaml(text, "my.yaml")["f"] == {"e": 1, "g": 2}


def test_every_preset_and_what_is_dumped_are_read_the_same():
    for preset in ("demo", "scienceqa-base"):
        text = dump_settings(load_settings(preset=preset))
        assert parse_yaml(text, "my.yaml") == yaml.safe_load(text)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_mark_before_the_text_does_not_matter(tmp_path, encoding):
    (tmp_path / "my.yaml").write_bytes("training:\n  log_every: 3\n".encode(encoding))
    assert load_settings(preset="demo", config=tmp_path / "my.yaml").training.log_every == 3


def test_another_encoding_is_told_with_its_line(tmp_path):
    (tmp_path / "my.yaml").write_bytes("run:\n  name: Zü\n".encode("cp1252"))
    with pytest.raises(SettingsError, match=r"my\.yaml, line 2: the byte 0xfc is no UTF-8"):
        load_settings(preset="demo", config=tmp_path / "my.yaml")
