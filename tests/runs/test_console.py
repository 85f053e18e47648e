"""What a long command prints: lines and silences in a pipe, steps and losses on a terminal."""

from __future__ import annotations

import io
import pickle
import time

import pytest
from rich.console import Console

import launcher.cli.console as console_module
from launcher.cli.console import PlainConsole, RunDisplay, open_console
from launcher.config.loading import load_settings
from launcher.evaluation.tables import WIDTH, format_table
from launcher.runs.journal import Journal
from launcher.runs.progress import Phase, ProgressLine, StepHeading, TrainingLine, describe_values
from launcher.runs.run_dir import RunDir
from mmcot.metrics.metrics import COLUMNS


@pytest.fixture
def settings(tmp_path):
    return load_settings(preset="demo", overrides=[f"run.dir={tmp_path}/run"])


def drawn(display):
    terminal = Console(file=io.StringIO(), width=WIDTH, force_terminal=False)
    terminal.print(display)
    return terminal.file.getvalue()


def test_after_a_silence_the_phase_and_its_seconds_are_printed(monkeypatch, capsys):
    monkeypatch.setattr(console_module, "SILENCE_S", 0.3)
    monkeypatch.setattr(console_module, "_LOOK_EVERY_S", 0.05)
    with open_console() as console:
        console(Phase("  starting 2 workers"))
        time.sleep(0.5)
        console(StepHeading("\n[2/5] train-rationale"))
        console("  step 1")
        time.sleep(0.5)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "  starting 2 workers" and lines[1].startswith("  starting 2 workers, 0:0")
    assert "  step 1" in lines and lines[-1].startswith("  train-rationale: at work, 0:0")


def test_a_command_that_prints_often_is_not_interrupted(monkeypatch, capsys):
    monkeypatch.setattr(console_module, "SILENCE_S", 60.0)
    console = PlainConsole()
    console("a")
    console(ProgressLine("b"))
    assert capsys.readouterr().out == "a\nb\n"


def test_a_console_can_be_pickled_as_ray_tune_does_with_its_callbacks(capsys):
    pickle.loads(pickle.dumps(PlainConsole()))("a")
    assert capsys.readouterr().out == "a\n"


def test_the_live_display_marks_steps_and_shows_the_losses_of_the_one_that_runs(settings):
    run_dir = RunDir(settings.run_dir)
    display = RunDisplay(settings)
    display.phase = "starting 2 workers"
    assert "▶  data" in drawn(display) and "starting 2 workers" in drawn(display)
    run_dir.mark_done("data", {"seconds": 7.0})
    journal = Journal(run_dir.journal("rationale"))
    journal.begin(0, 950)
    journal.log(100, {"loss": 0.25, "tokens_per_s": 1234.0})
    journal.log(100, {"validation_loss": 0.5})
    text = drawn(display)
    assert "✓  data" in text and "0:07" in text and "▶  train-rationale" in text and "·  evaluate" in text
    for shown in ("100 of 950 steps", "loss 0.2500", "validation loss 0.5000", "1,234 tokens/s", "left"):
        assert shown in text
    assert all(len(line) <= WIDTH for line in text.splitlines())


def test_the_live_display_ends_with_the_step_that_was_asked_for_and_draws_in_plain_letters(settings):
    text = drawn(RunDisplay(settings, until="train-rationale", can_draw=False))
    assert text.split() == [">", "data", "0:00", ".", "train-rationale"]


def test_a_training_s_line_has_the_validation_loss_once_there_is_one():
    lines = []
    line = TrainingLine(20, lines.append)
    line.show({"step": 10, "time_ms": 0, "metrics": {"validation_loss": 0.5}})
    metrics = {"loss": 0.25, "tokens_per_s": 10.0, "gigabytes_read": 0.0, "bytes_read_per_needed": 1.0}
    line.show({"step": 20, "time_ms": 0, "metrics": metrics})
    assert lines[0] == "  step 20/20  loss 0.2500  validation 0.5000  10 tokens/s  time left unknown"
    assert not isinstance(lines[0], ProgressLine)  # the last one stays on a terminal
    assert isinstance(lines[-1], Phase)


def test_a_table_fits_80_columns_and_has_no_column_of_dashes():
    row = dict.fromkeys(COLUMNS, 100.0)
    table = format_table({"test, 800": row, "a name that is much longer than the room": row | {"SOC": None}})
    assert max(map(len, table.splitlines())) <= WIDTH and table.endswith("[1] a name that is much longer than the room")
    few = {column: (50.0 if column in ("AVG", "NO") else None) for column in COLUMNS}
    assert format_table({"test, 8": few}).split() == ["NO", "AVG", "test,", "8", "50.00", "50.00"]


def test_a_trial_is_named_by_its_values():
    assert describe_values({"training.learning_rate": 0.00012345, "run.seed": 3}) == "learning_rate 0.000123, seed 3"
