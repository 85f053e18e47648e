"""One question or many, answered by a finished run."""

from __future__ import annotations

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from data_shards.atomic_files import commit_bytes, commit_json
from launcher.cli.main import app
from mmcot.texts.sample import Sample


def mmcot(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.output


def test_one_question_with_a_picture_is_answered(finished_run, tmp_path):
    Image.new("RGB", (30, 50), "red").save(tmp_path / "a.png")
    status, output = mmcot(
        "predict",
        "--model",
        finished_run,
        "--question",
        "Which is bigger?",
        "--choice",
        "sun",
        "--choice",
        "moon",
        "--context",
        "Far away.",
        "--image",
        tmp_path / "a.png",
    )
    assert status == 0 and len(output.strip().splitlines()) >= 2


def test_many_questions_give_a_line_each_in_their_order(finished_run, tmp_path):
    rows = [{"qid": f"q{n}", "question": f"Is {n} bigger?", "choices": ["yes", "no"]} for n in range(5)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, output = mmcot(
        "predict", "--model", finished_run, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl"
    )
    assert status == 0 and "5 answers in" in output
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["qid"] for line in lines] == [row["qid"] for row in rows]
    assert set(lines[0]) == {"qid", "rationale", "answer_text", "prediction", "choice"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--question", "Which?", "--choice", "sun"], "the number of choices is 1; expected 2 to 26"),
        (["--question", "Which?", *["--choice", "x"] * 30], "the number of choices is 30; expected 2 to 26"),
        (
            ["--question", "Which?", "--choice", "a", "--choice", "b", "--image", "nowhere.png"],
            "nowhere.png does not exist",
        ),
        ([], "give either --question"),
        (["--input", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
    ],
)
def test_a_wrong_question_is_met_with_a_sentence(finished_run, arguments, message):
    status, output = mmcot("predict", "--model", finished_run, *arguments)
    assert status == 1 and message in output and "Traceback" not in output


def test_a_missing_picture_is_told_before_any_model_is_opened(finished_run, tmp_path, monkeypatch):
    import launcher.generation.predictor

    monkeypatch.setattr(
        launcher.generation.predictor, "_open_stage", lambda *arguments: pytest.fail("a model was opened")
    )
    rows = [
        {"qid": "a", "question": "Which?", "choices": ["a", "b"]},
        {"qid": "b", "question": "Which?", "choices": ["a", "b"], "image": "gone.png"},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for arguments in (
        ["--question", "Which?", "--choice", "a", "--choice", "b", "--image", tmp_path / "gone.png"],
        ["--input", tmp_path / "in.jsonl", "--strict"],
    ):
        status, output = mmcot("predict", "--model", finished_run, *arguments)
        assert status == 1 and f"{tmp_path}/gone.png does not exist" in output


def test_a_long_context_is_cut_and_said_so(finished_run):
    status, output = mmcot(
        "predict",
        "--model",
        finished_run,
        "--question",
        "Which?",
        "--choice",
        "a",
        "--choice",
        "b",
        "--context",
        "word " * 10_000,
    )
    assert status == 0 and "2 prompts were cut at the model's length limit" in output


def test_a_folder_that_is_no_finished_run_is_refused(tmp_path, finished_run):
    assert (
        "holds no run" in mmcot("predict", "--model", tmp_path, "--question", "a", "--choice", "a", "--choice", "b")[1]
    )
    commit_bytes(tmp_path / "run.yaml", (finished_run / "run.yaml").read_bytes())
    status, output = mmcot("predict", "--model", tmp_path, "--question", "a", "--choice", "a", "--choice", "b")
    assert status == 1 and "stage 'rationale' is not trained yet" in output


@pytest.mark.parametrize(
    ("started_on_gpus", "num_gpus", "device"),
    [(True, 1, "cuda"), (True, 0, "cpu"), (False, 1, "cpu"), (None, 1, "cpu")],
)
def test_a_run_that_was_started_on_gpus_answers_on_one_where_there_is_one(
    finished_run, tmp_path, monkeypatch, started_on_gpus, num_gpus, device
):
    from launcher.generation import predictor

    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    text = (run / "run.yaml").read_text().replace("use_gpu: false", "use_gpu: auto").replace("fp32", "bf16")
    (run / "run.yaml").write_text(text)
    if started_on_gpus is not None:
        commit_json(run / "device.json", {"use_gpu": started_on_gpus, "found": 1, "where": "another machine"})
    opened = []

    def open_device(*, use_gpu, precision):
        opened.append(("cuda" if use_gpu else "cpu", precision))
        return torch.device("cpu")

    monkeypatch.setattr("launcher.cluster.gpus.count_own_gpus", lambda: num_gpus)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(predictor, "open_device", open_device)
    stages = predictor.RunPredictor(run).stages
    assert opened == [(device, "bf16")]
    assert {stage.model.dtype for stage in stages.values()} == {torch.bfloat16}


def test_a_gpu_that_lacks_the_runs_precision_is_left_for_the_cpu_and_said_once(finished_run, tmp_path, monkeypatch):
    from launcher.generation.predictor import RunPredictor

    run, said = tmp_path / "run", []
    shutil.copytree(finished_run, run)
    text = (run / "run.yaml").read_text().replace("use_gpu: false", "use_gpu: auto").replace("fp32", "bf16")
    (run / "run.yaml").write_text(text)
    commit_json(run / "device.json", {"use_gpu": True, "found": 1, "where": "another machine"})
    monkeypatch.setattr("launcher.cluster.gpus.count_own_gpus", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "T4")
    predictor = RunPredictor(run, report=said.append)
    predictor.load()
    assert (predictor.device.type, predictor.device.type) == ("cpu", "cpu")
    assert said == [
        "note: this machine's GPU (T4) does not compute in bf16, the run's generation.precision; "
        "the models compute on the CPU"
    ]


def test_requests_of_several_threads_are_answered_one_after_the_other(finished_run, tmp_path, monkeypatch):
    from launcher.generation import predictor as module

    predictor, inside, most = module.RunPredictor(finished_run), [], []
    answer_questions = module.answer_questions

    def count(*arguments, **options):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.1)
        answered = answer_questions(*arguments, **options)
        inside.pop()
        return answered

    monkeypatch.setattr(module, "answer_questions", count)
    problems = [Sample(qid="a", question="Who?", choices=("x", "y"), answer=None)]
    with ThreadPoolExecutor(3) as threads:
        answers = list(threads.map(lambda _: list(predictor.answer(problems, tmp_path)), range(3)))
    assert most == [1, 1, 1] and answers[0] == answers[1] == answers[2]


def test_calls_share_an_engine_until_one_needs_more_rows(finished_run, tmp_path, monkeypatch):
    from launcher.generation.predictor import RunPredictor
    from mmcot.decoding import answering

    opened, open_engine = [], answering.open_engine

    def count(model, tokenizer, *, num_rows, **sizes):
        opened.append(num_rows)
        return open_engine(model, tokenizer, num_rows=num_rows, **sizes)

    monkeypatch.setattr(answering, "open_engine", count)
    predictor = RunPredictor(finished_run)
    problems = [Sample(qid=str(n), question=f"Who is {n}?", choices=("x", "y"), answer=None) for n in range(3)]

    def answer(*numbers):
        return list(predictor.answer([problems[n] for n in numbers], tmp_path))

    one = answer(0) + answer(1)
    assert opened == [1, 1]  # of rationale and answer
    assert answer(0, 1)[:2] == one and opened == [1, 1, 2, 2]
    assert answer(0) == one[:1] and answer(1, 2)[:1] == one[1:] and answer() == [] and len(opened) == 4


@pytest.mark.parametrize("option", ["--question", "--choice", "--context", "--image"])
def test_an_argument_whose_bytes_are_no_utf_8_is_refused_in_one_sentence(finished_run, option):
    given = {"--question": "Which?", "--choice": "a", "--context": "", "--image": "a.png"} | {option: "caf\udce9"}
    arguments = [part for pair in given.items() for part in pair]
    status, output = mmcot("predict", "--model", finished_run, *arguments, "--choice", "b")
    assert status == 1 and len(output.splitlines()) == 1
    assert f"{option} is 'caf\\udce9', whose bytes are no UTF-8" in output


@pytest.mark.parametrize("option", ["--choice", "--context", "--image", "--question"])
def test_an_input_goes_without_the_options_of_one_question(finished_run, option):
    status, output = mmcot("predict", "--model", finished_run, "--input", "in.jsonl", option, "x")
    assert status == 1 and "--input goes with --output and --strict alone" in output


def test_an_output_of_one_question_is_refused(finished_run):
    arguments = ["--question", "Which?", "--choice", "a", "--choice", "b", "--output", "a.jsonl"]
    status, output = mmcot("predict", "--model", finished_run, *arguments)
    assert status == 1 and "--output and --strict go with --input FILE" in output
