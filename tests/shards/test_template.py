"""The table to begin with runs as it is written, and replaces no file."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from data_shards.sources.forms import read_questions
from launcher.cli import app
from launcher.data.template import FORMS


def mmcot(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("form", FORMS)
def test_the_template_is_described_and_sharded_without_an_edit(tmp_path, form):
    path = tmp_path / f"mine.{form}"
    assert mmcot("data", "template", form, "--out", path).exit_code == 0
    described = mmcot("data", "describe", path)
    assert described.exit_code == 0 and "12 questions" in described.output and "note:" not in described.output
    sharded = mmcot(
        *("data", "shard", "--preset", "demo", "--set", f"data.path={path}"),
        *("--set", f"data.shards_dir={tmp_path / 'out'}"),
    )
    assert sharded.exit_code == 0, sharded.output
    assert "6 train, 3 val, 3 test" in sharded.output


def test_both_templates_have_the_same_questions(tmp_path):
    for form in FORMS:
        (tmp_path / f"mine.{form}").write_text(mmcot("data", "template", form).stdout)
    one, other = (read_questions(tmp_path / f"mine.{form}").problems for form in FORMS)
    assert one == other and all(len(part) >= 3 for part in one.values())
    assert all(sample.solution and sample.lecture and sample.subject for part in one.values() for sample in part)


@pytest.mark.parametrize(
    ("form", "name", "message"),
    [
        ("csv", "there.csv", "exists; give another name"),
        ("csv", "mine.jsonl", "does not end with .csv"),
        ("xlsx", "mine.xlsx", "there is no template in 'xlsx'; give one of csv, jsonl"),
        ("csv", "nowhere/mine.csv", "cannot be written"),
    ],
)
def test_a_template_that_cannot_be_written_is_refused_in_a_sentence(tmp_path, form, name, message):
    (tmp_path / "there.csv").write_text("mine")
    result = mmcot("data", "template", form, "--out", tmp_path / name)
    assert result.exit_code == 1 and message in " ".join(result.output.split())
    assert (tmp_path / "there.csv").read_text() == "mine"
