"""A run.yaml that something cut, emptied or altered is one sentence in every command that reads it."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from launcher.cli.main import app
from launcher.config.loading import dump_settings, load_settings
from launcher.config.settings import SettingsError
from launcher.runs.run_dir import RunDir
from launcher.runs.run_settings import keep_name, keep_zero_stage, read_run_settings

WHOLE = dump_settings(load_settings(preset="demo")).encode()


@pytest.fixture
def run(tmp_path):
    """The folder of a run whose data step is done."""
    folder = tmp_path / "run"
    (folder / "steps").mkdir(parents=True)
    (folder / "steps" / "data.json").write_text("{}")
    (folder / "run.yaml").write_bytes(WHOLE)
    return folder


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"run: [", "run.yaml, line 1: no valid YAML"),
        (WHOLE[:200] + b"\n  x: 'cut", "run.yaml, line .*: no valid YAML"),
        (b"", "run.yaml is empty"),
        (b"\0\1\2\3" * 50, "run.yaml, line 1: a byte of zero"),
        (b"run:\n  name: \xff\n", "run.yaml, line 2: the byte 0xff is no UTF-8"),
        (b"- 1\n", "run.yaml holds a list"),
        (b"run\n", "run.yaml holds a text"),
        (b"run: {seed: 1}\nrun: {seed: 2}\n", "run.yaml, line 2: the key 'run' occurs twice"),
    ],
)
def test_a_broken_run_yaml_is_one_sentence_with_its_remedy(run, content, message):
    (run / "run.yaml").write_bytes(content)
    with pytest.raises(SettingsError, match=f"{message}.*; restore this file from a copy") as error:
        read_run_settings(run)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "command",
    [
        "status RUN",
        "predict --model RUN --question why",
        "report RUN",
        "sync RUN",
        "evaluate RUN --split val",
        "data ledger RUN",
        "run --preset demo --set run.dir=RUN",
        "run --config RUN/run.yaml",
        "config show --config RUN/run.yaml",
    ],
)
def test_every_command_names_the_broken_file(run, command):
    (run / "run.yaml").write_text("run: [")
    result = CliRunner().invoke(app, [word.replace("RUN", str(run)) for word in command.split()])
    assert result.exit_code == 1 and f"error: {run}/run.yaml, line 1: no valid YAML" in result.output


@pytest.mark.parametrize("section", ["null", "5", "[1]", "{name: [1]}"])
def test_a_section_that_is_none_is_left_to_validation(run, section):
    (run / "run.yaml").write_text(f"run: {section}\ntraining: {section}\nextensions: 5\n")
    settings = load_settings(preset="demo", overrides=[f"run.dir={run}"])
    assert keep_name(RunDir(run), settings) == settings == keep_zero_stage(RunDir(run), settings)
    with pytest.raises(SettingsError, match=r"run\.yaml: setting"):
        read_run_settings(run)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_run_yaml_that_an_editor_stored_with_a_mark_is_read(run, encoding):
    (run / "run.yaml").write_bytes(WHOLE.decode().encode(encoding))
    assert read_run_settings(run) == load_settings(preset="demo")
