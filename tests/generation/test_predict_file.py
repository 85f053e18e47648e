"""A file of questions, answered by a finished run: what is written, refused and continued."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from launcher.cli.answer_progress import AnswerProgress
from launcher.cli.main import app
from launcher.generation import predict_file
from launcher.generation.predict_output import AnswersFile, CsvRows, JsonLines
from mmcot.errors import OperationError

ROWS = [{"qid": f"q{n}", "question": f"Is {n} bigger?", "choices": ["yes", "no"]} for n in range(5)]


def in_lines(rows):
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with in.jsonl, answered in bulks of two rows."""
    monkeypatch.setattr(predict_file, "BULK_SIZE", 2)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text(in_lines(ROWS))
    return tmp_path


@pytest.fixture
def predict(finished_run, place):
    def run(*arguments, input="in.jsonl", model=finished_run):
        result = CliRunner().invoke(app, ["predict", "--model", str(model), "--input", input, *map(str, arguments)])
        assert "Traceback" not in result.output and result.exit_code in (0, 1)
        return result

    return run


@pytest.fixture
def no_model(monkeypatch):
    import launcher.generation.predictor

    monkeypatch.setattr(
        launcher.generation.predictor, "_open_stage", lambda *arguments: pytest.fail("a model was opened")
    )


def answers_in(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_bad_row_is_an_error_at_its_place_and_the_others_are_answered(place, predict):
    (place / "in.jsonl").write_text(in_lines([*ROWS[:3], {"qid": "bad", "question": "Which?", "choices": ["x"]}]))
    done = predict("--output", "out.jsonl")
    answers = answers_in(place / "out.jsonl")
    assert [answer["qid"] for answer in answers] == ["q0", "q1", "q2", "bad"]
    assert [answer["prediction"] for answer in answers[:3]] and set(answers[3]) == {"qid", "line", "error"}
    assert answers[3]["line"] == 4 and "the number of choices is 1" in answers[3]["error"]
    assert done.exit_code == 1 and "3 answers in out.jsonl" in done.stdout
    assert "1 of 4 rows have an error in place of an answer" in done.stderr


BAD_ROWS = {
    "invalid JSON": ('{"qid": "a",', "no valid JSON"),
    "no object": ("[1]", "expected an object"),
    "no question": ({"qid": "a", "choices": ["x", "y"]}, "the field 'question' is missing"),
    "half a character": (r'{"qid": "a", "question": "\ud83d", "choices": ["x", "y"]}', "half of a UTF-16 pair"),
    "no picture": ({"qid": "a", "question": "Q", "choices": ["x", "y"], "image": "no.png"}, "no.png does not exist"),
    "a long name": ({"qid": "a", "question": "Q", "choices": ["x", "y"], "image": "n" * 999}, "does not exist"),
    "a wrong type": ({"qid": "a", "question": 5, "choices": ["x", "y"]}, "the field 'question' is 5; expected a text"),
    "no choices": ({"qid": "a", "question": "Q", "choices": 7}, "choices 7 must be a list of texts"),
    "a null id": ({"qid": None, "question": "Q", "choices": ["x", "y"]}, "the field 'qid' is null"),
    "a long integer": ('{"qid": 1' + "0" * 5000 + "}", "an integer has thousands of digits"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_every_kind_of_bad_row_is_told_with_its_line_before_a_model_is_opened(place, predict, no_model, name):
    row, message = BAD_ROWS[name]
    (place / "in.jsonl").write_text(in_lines([ROWS[0], row]))
    done = predict("--strict", "--output", "out.jsonl")
    assert done.exit_code == 1 and "error: in.jsonl, line 2: " in done.stderr and message in done.stderr
    assert not (place / "out.jsonl").exists()


def test_strict_lists_twenty_faults_and_counts_all(place, predict, no_model):
    (place / "in.jsonl").write_text(in_lines([*ROWS, *["{"] * 25]))
    lines = predict("--strict").stderr.splitlines()
    assert len(lines) == 21 and lines[0].startswith("error: in.jsonl, line 6: no valid JSON")
    assert lines[-1] == "error: 25 faults in all, 5 not shown"


def test_a_picture_that_cannot_be_read_is_an_error_of_its_row_alone(place, predict):
    Image.new("RGB", (30, 50), "red").save(place / "good.png")
    (place / "bad.png").write_bytes((place / "good.png").read_bytes()[:40])
    rows = [ROWS[0] | {"image": "bad.png"}, ROWS[1] | {"image": "good.png"}]
    (place / "in.jsonl").write_text(in_lines(rows))
    bad, good = map(json.loads, predict().stdout.splitlines())
    assert "bad.png is damaged or cut off" in bad["error"] and "answer_text" in good


def test_strict_opens_every_picture_before_a_model(place, predict, no_model):
    (place / "bad.png").write_bytes(b"GIF8")
    (place / "in.jsonl").write_text(in_lines([ROWS[0] | {"image": "bad.png"}]))
    assert "in.jsonl, line 1: question q0: picture bad.png is damaged" in predict("--strict").stderr


def test_ids_are_kept_as_written_and_missing_ones_are_line_numbers(place, predict):
    plain = {"question": "Which?", "choices": ["x", "y"]}
    (place / "in.jsonl").write_text(in_lines([{"qid": 0} | plain, {"id": "b"} | plain, "", plain, plain]))
    done = predict()
    assert [json.loads(line)["qid"] for line in done.stdout.splitlines()] == ["0", "b", "4", "5"]
    assert done.stderr.count("2 of 4 rows have no id and get the number of their line") == 1


def test_a_repeated_id_is_an_error_of_the_later_row_with_both_lines(place, predict):
    (place / "in.jsonl").write_text(in_lines([ROWS[0], ROWS[1], ROWS[0]]))
    answers = [json.loads(line) for line in predict().stdout.splitlines()]
    assert "error" not in answers[0] and answers[2]["qid"] == "q0"
    assert "question q0 occurs twice, first on line 1 and again on line 3" in answers[2]["error"]


def test_a_line_number_that_is_another_rows_id_is_an_error(place, predict):
    (place / "in.jsonl").write_text(in_lines([{"question": "Which?", "choices": ["x", "y"]}, ROWS[0] | {"qid": 1}]))
    first, second = (json.loads(line) for line in predict().stdout.splitlines())
    assert "would get its line number, 1, which is the id of the row on line 2" in first["error"]
    assert "error" not in second


def test_rows_of_a_csv_that_do_not_fit_its_header_are_errors(place, predict):
    (place / "in.csv").write_text("qid,question,choices\na,Which?,x|y\nb,Which?,x|y,surplus\nc,Which?\nd,Which?,x|y\n")
    answers = [json.loads(line) for line in predict(input="in.csv").stdout.splitlines()]
    assert [answer["qid"] for answer in answers] == ["a", None, None, "d"]
    assert answers[1]["line"] == 3 and answers[1]["error"].startswith("4 fields, and the header has 3 columns")


def test_fields_that_are_not_used_are_said(place, predict):
    (place / "in.jsonl").write_text(in_lines([ROWS[0] | {"picture": "a.png"}]))
    assert "the field 'picture' of 1 row is not used; did you mean 'image'?" in predict().stderr


def test_an_empty_input_gives_an_empty_output(place, predict, no_model):
    (place / "in.jsonl").write_text("")
    done = predict("--output", "out.jsonl")
    assert done.exit_code == 0 and "in.jsonl: 0 questions" in done.stderr and "0 answers in" in done.stdout
    assert (place / "out.jsonl").read_bytes() == b""


@pytest.mark.parametrize("name", ["out.jsonl", "out.csv"])
def test_an_output_that_was_cut_anywhere_is_continued_to_the_same_bytes(place, predict, name):
    (place / "in.jsonl").write_text(in_lines([*ROWS[:2], "{", *ROWS[2:]]))
    predict("--output", name)
    whole = (place / name).read_bytes()
    for kept in (0, 2, 20, whole.index(b"q1"), whole.index(b"q2") + 9, len(whole) - 1, len(whole)):
        (place / name).write_bytes(whole[:kept])
        done = predict("--output", name)
        assert done.exit_code == 1 and (place / name).read_bytes() == whole
    assert f"6 of 6 rows are in {name} and are kept" in done.stderr
    assert "1 of 6 rows have an error" in done.stderr


def test_answers_that_are_kept_are_not_asked_for_again(place, predict, monkeypatch):
    predict("--output", "out.jsonl")
    monkeypatch.setattr(predict_file, "_answer_bulk", lambda *arguments: pytest.fail("a question was answered"))
    done = predict("--output", "out.jsonl")
    assert done.exit_code == 0 and "5 of 5 rows are in out.jsonl and are kept" in done.stderr


def test_a_line_that_was_cut_off_is_removed_and_said(place, predict):
    predict("--output", "out.jsonl")
    whole = (place / "out.jsonl").read_bytes()
    (place / "out.jsonl").write_bytes(whole[:-10])
    said = predict("--output", "out.jsonl").stderr
    assert "out.jsonl: its last line was cut off" in said and "4 of 5 rows are in out.jsonl and are kept" in said


def other_model(place, finished_run):
    shutil.copytree(finished_run, place / "other")
    path = place / "other" / "answer" / "model" / "model.safetensors"
    save_file({name: value + 1 for name, value in load_file(path).items()}, path, metadata={"format": "pt"})
    return place / "other"


def test_answers_of_another_model_are_not_continued(place, predict, finished_run):
    predict("--output", "out.jsonl")
    before = (place / "out.jsonl").read_bytes()
    done = predict("--output", "out.jsonl", model=other_model(place, finished_run))
    assert done.exit_code == 1 and "its answers are of other models; remove the file, or name another" in done.stderr
    assert (place / "out.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda place: (place / "out.jsonl.made-by.json").unlink(), "there is no out.jsonl.made-by.json"),
        (lambda place: (place / "out.jsonl.made-by.json").write_text("{"), "out.jsonl.made-by.json cannot be read"),
        (lambda place: (place / "in.jsonl").write_text(in_lines(ROWS[:4])), "its answers are to another input"),
        (lambda place: (place / "out.jsonl").write_text("five\n"), "its line for row 1 is no answer"),
        (lambda place: (place / "out.jsonl").write_text('{"qid": "q7"}\n'), "it answers 'q7' in the place of 'q0'"),
        (lambda place: (place / "out.jsonl").write_text(in_lines([*ROWS, ROWS[0]])), "more lines than the input has"),
    ],
)
def test_an_output_with_lines_of_something_else_is_refused_and_left_as_it_is(place, predict, change, message):
    predict("--output", "out.jsonl")
    change(place)
    before = (place / "out.jsonl").read_bytes()
    done = predict("--output", "out.jsonl")
    assert done.exit_code == 1 and message in done.stderr and "remove the file, or name another" in done.stderr
    assert (place / "out.jsonl").read_bytes() == before


def test_a_csv_has_a_column_for_every_field_and_quotes_what_needs_it():
    form = CsvRows(["notes"])
    answer = {"qid": "a", "rationale": 'x, "y"\r\nz', "answer_text": "B\r", "prediction": 1, "choice": "=1+1"}
    error = {"qid": None, "line": 3, "error": "no valid JSON"}
    written = form.head + form.encode(answer | {"texts": {"notes": "n"}}) + form.encode(error)
    rows = list(csv.DictReader(io.StringIO(written.decode("utf-8-sig"), newline="")))
    assert rows[0] == {key: str(value) for key, value in answer.items()} | {"texts.notes": "n", "error": ""}
    assert rows[1]["error"] == "line 3: no valid JSON" and rows[1]["qid"] == "" == rows[1]["prediction"]
    assert len(form.split(written[len(form.head) :])) == 2


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("in.jsonl", "would overwrite --input in.jsonl"),
        ("soft.jsonl", "would overwrite --input in.jsonl"),
        ("hard.jsonl", "would overwrite --input in.jsonl"),
        ("folder.jsonl", "is a folder; name a file in it"),
        ("out.txt", "ends with '.txt'; expected a name in .jsonl or .csv"),
        ("in.jsonl/out.jsonl", "in.jsonl"),
    ],
)
def test_an_output_that_cannot_be_one_is_refused_in_one_sentence(place, predict, no_model, output, message):
    (place / "soft.jsonl").symlink_to("in.jsonl")
    os.link(place / "in.jsonl", place / "hard.jsonl")
    (place / "folder.jsonl").mkdir()
    done = predict("--output", output)
    assert done.exit_code == 1 and message in done.stderr and len(done.stderr.splitlines()) == 1
    assert (place / "in.jsonl").read_text() == in_lines(ROWS)


def test_a_missing_folder_of_the_output_is_made(place, predict):
    assert predict("--output", "new/folder/out.jsonl").exit_code == 0
    assert len(answers_in(place / "new" / "folder" / "out.jsonl")) == 5


def test_an_input_of_another_ending_is_refused(place, predict):
    (place / "in.txt").write_text("")
    assert "expected a file of questions in .jsonl or .csv" in predict(input="in.txt").stderr


def test_a_second_command_on_the_same_output_is_refused_while_the_first_writes(place, predict, monkeypatch):
    said, answer_bulk = [], predict_file._answer_bulk

    def meanwhile(*arguments):
        monkeypatch.setattr(predict_file, "_answer_bulk", answer_bulk)
        said.append(predict("--output", "out.jsonl").stderr)
        return answer_bulk(*arguments)

    monkeypatch.setattr(predict_file, "_answer_bulk", meanwhile)
    assert predict("--output", "out.jsonl").exit_code == 0
    assert "another command writes to out.jsonl" in said[0] and len(answers_in(place / "out.jsonl")) == 5


def test_a_full_disk_is_a_sentence_that_names_the_file(tmp_path):
    class Full(io.BytesIO):
        def flush(self):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OperationError, match="out.jsonl cannot be written further .No space left on device.*run the"):
        AnswersFile(tmp_path / "out.jsonl", JsonLines(), Full(), []).append([{"qid": "a"}])


def test_without_an_output_standard_output_has_the_answers_alone(place, predict):
    assert [json.loads(line)["qid"] for line in predict().stdout.splitlines()] == [row["qid"] for row in ROWS]


def test_progress_is_a_line_now_and_then_where_standard_error_is_no_terminal(capsys, monkeypatch):
    monkeypatch.setattr("launcher.cli.answer_progress.PLAIN_EVERY_S", 0.02)
    with AnswerProgress().counting(10, 30) as count:
        count(20)
        time.sleep(0.1)
    shown = capsys.readouterr()
    assert "20 of 30 questions answered, " in shown.err and "time left" in shown.err and shown.out == ""


def test_progress_is_one_line_that_is_rewritten_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    progress = AnswerProgress()
    with progress.counting(0, 30):
        time.sleep(0.7)
        progress.say("note")
    shown = capsys.readouterr().err
    assert "\r\x1b[K  0 of 30 questions answered, at work for 0:0" in shown and "\r\x1b[Knote" in shown


def spoken_run(finished_run, folder):
    """A run that writes a few tokens of nonsense, other ones for every question."""
    shutil.copytree(finished_run, folder)
    text = (folder / "run.yaml").read_text()
    lines = [f"{line.split(':')[0]}: 6" if "max_target_tokens" in line else line for line in text.splitlines()]
    (folder / "run.yaml").write_text("\n".join(lines))
    for stage in ("rationale", "answer"):
        path = folder / stage / "model" / "model.safetensors"
        draw = torch.Generator().manual_seed(1)
        weights = {
            name: torch.randn(value.shape, generator=draw) / 2 if value.dim() > 1 else value
            for name, value in load_file(path).items()
        }
        save_file(weights, path, metadata={"format": "pt"})
    return folder


@pytest.mark.processes
def test_a_killed_command_is_continued_to_the_bytes_of_an_undisturbed_one(finished_run, tmp_path):
    run, killed = spoken_run(finished_run, tmp_path / "run"), tmp_path / "killed.jsonl"
    rows = [{"qid": f"q{n}", "question": f"Is {n} bigger?", "choices": ["yes", "no"]} for n in range(140)]
    (tmp_path / "in.jsonl").write_text(in_lines([*rows[:70], "{", *rows[70:]]))

    def command(output):
        options = ["--model", run, "--input", tmp_path / "in.jsonl", "--output", output]
        return [sys.executable, "-m", "launcher", "predict", *map(str, options)]

    process = subprocess.Popen(command(killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not (killed.exists() and killed.stat().st_size) and time.monotonic() < until:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    num_before = killed.read_bytes().count(b"\n")
    again = subprocess.run(command(killed), capture_output=True, text=True, timeout=300)
    undisturbed = subprocess.run(command(tmp_path / "whole.jsonl"), capture_output=True, text=True, timeout=300)
    assert (again.returncode, undisturbed.returncode) == (1, 1) and "1 of 141 rows have an error" in again.stderr
    assert 0 < num_before < 141 and f"{num_before} of 141 rows are in {killed} and are kept" in again.stderr
    assert killed.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert len({answer.get("answer_text") for answer in answers_in(killed)}) > 20
