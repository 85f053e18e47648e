"""MLflow: one run tree, points once, a run never stopped by it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import pytest
from typer.testing import CliRunner

from data_shards.atomic_files import commit_bytes, commit_json, read_json
from launcher.cli.main import app
from launcher.config.loading import dump_settings, load_settings, tracking_uri
from launcher.config.settings import SettingsError
from launcher.pipeline.attempt import Attempt
from launcher.runs.journal import Journal, LineFile
from launcher.runs.run_dir import RunDir
from launcher.runs.signals import Stopped, sigterm_stops
from launcher.runs.system_metrics import sampling
from launcher.tracking.environment_tags import describe_environment
from launcher.tracking.mlflow_store import create_store
from launcher.tracking.run_log import RunLog, open_tracker
from launcher.tracking.sending import is_everything_logged, sync_run


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory):
    """An SQLite store to copy: making one takes seconds."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    create_store(f"sqlite:///{path}")
    return path


@pytest.fixture
def make_place(tmp_path, monkeypatch, empty_store):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "runs").mkdir()
    shutil.copy(empty_store, tmp_path / "runs" / "mlflow.db")

    def make(name="a", *overrides):
        changes = [f"run.dir={tmp_path / 'runs' / name}", "tracking.send_every_s=0.1", *overrides]
        settings = load_settings(preset="demo", overrides=changes)
        run_dir = RunDir(settings.run_dir)
        commit_bytes(run_dir.path / "run.yaml", dump_settings(settings).encode())
        return settings, run_dir

    return make


@pytest.fixture
def place(make_place):
    return make_place()


def client_of(settings):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri(settings))


def log_once(settings, run_dir, points, *, said=None):
    with (
        open_tracker(settings, run_dir, report=(said if said is not None else []).append) as tracker,
        tracker.step("train-rationale") as child,
    ):
        journal = Journal(run_dir.journal("rationale"))
        child.follow("rationale-metrics.jsonl")
        for step, loss in points:
            journal.log(step, {"loss": loss})
    return read_json(run_dir.mlflow_state)["runs"].get("train-rationale") if run_dir.mlflow_state.exists() else None


def history(settings, run_id, key="loss"):
    return [(metric.step, metric.value) for metric in client_of(settings).get_metric_history(run_id, key)]


def test_a_restart_continues_the_same_run_and_the_first_value_of_a_step_stands(place):
    settings, run_dir = place
    first = log_once(settings, run_dir, [(1, 0.9), (2, 0.8), (3, 0.7)])
    assert log_once(settings, run_dir, [(2, 5.0), (3, 5.0), (4, 0.6)]) == first
    assert sorted(history(settings, first)) == [(1, 0.9), (2, 0.8), (3, 0.7), (4, 0.6)]


def test_steps_that_an_orphan_and_its_successor_both_wrote_are_sent_once(place):
    settings, run_dir = place
    with open_tracker(settings, run_dir) as tracker, tracker.step("train-rationale") as child:
        journal = Journal(run_dir.journal("rationale"))
        child.follow("rationale-metrics.jsonl")
        for loss in (0.9, 5.0):
            journal.log(6, {"loss": loss})
            time.sleep(1)  # several looks
    assert history(settings, read_json(run_dir.mlflow_state)["runs"]["train-rationale"]) == [(6, 0.9)]


def test_a_run_that_was_made_but_not_written_down_is_found_again(place):
    settings, run_dir = place
    first = log_once(settings, run_dir, [(1, 0.9)])
    run_dir.mlflow_state.unlink()  # killed between the two
    assert log_once(settings, run_dir, [(2, 0.8)]) == first
    assert sorted(history(settings, first)) == [(1, 0.9), (2, 0.8)]
    assert (
        len(client_of(settings).search_runs([client_of(settings).get_experiment_by_name("mmcot").experiment_id])) == 2
    )


def test_the_tree_says_what_was_run_with_what_on_which_data(place):
    settings, run_dir = place
    with open_tracker(settings, run_dir) as tracker, tracker.step("data") as child:
        child.log_dataset(
            name="mini/train", digest="abc", source="data/mini", context="training", profile={"num_questions": 64}
        )
        child.log_dataset(
            name="mini/train", digest="abc", source="data/mini", context="training", profile={"num_questions": 64}
        )
        child.log_scores({"num_train": 64.0, "unknown": None})
        child.log_artifact(run_dir.path / "run.yaml", "settings")
    runs, client = read_json(run_dir.mlflow_state)["runs"], client_of(settings)
    parent, child = client.get_run(runs["pipeline"]), client.get_run(runs["data"])
    assert child.data.tags["mlflow.parentRunId"] == runs["pipeline"] and {parent.info.status, child.info.status} == {
        "FINISHED"
    }
    assert parent.data.params["training.learning_rate"] == "0.001" and "mmcot.versions" in parent.data.tags
    (dataset,) = child.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest, dataset.tags[0].value) == ("mini/train", "abc", "training")
    assert child.data.metrics == {"num_train": 64.0}
    assert [file.path for file in client.list_artifacts(runs["data"], "settings")] == ["settings/run.yaml"]


def test_a_step_that_fails_is_marked_failed_and_one_that_is_asked_to_stop_killed(place):
    settings, run_dir = place
    for error, status in ((RuntimeError("boom"), "FAILED"), (Stopped("asked"), "KILLED")):
        with pytest.raises(RuntimeError), open_tracker(settings, run_dir) as tracker, tracker.step("data"):
            raise error
        runs = read_json(run_dir.mlflow_state)["runs"]
        assert {client_of(settings).get_run(run_id).info.status for run_id in runs.values()} == {status}


def test_the_default_store_lies_beside_the_runs_and_the_environment_goes_before_it(place, monkeypatch):
    settings, run_dir = place
    assert tracking_uri(settings) == f"sqlite:///{run_dir.path.parent / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5999")
    assert tracking_uri(settings) == "http://127.0.0.1:5999"


def test_a_password_in_an_address_is_refused(make_place, monkeypatch):
    with pytest.raises(SettingsError, match="MLFLOW_TRACKING_PASSWORD"):
        make_place("b", "tracking.uri=http://me:secret@host:5000")
    with pytest.raises(SettingsError, match="data.shards_dir holds a user"):
        make_place("c", "data.shards_dir=https://me:secret@host/x")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@host:5000")
    with pytest.raises(SettingsError, match="MLFLOW_TRACKING_URI holds a user"):
        tracking_uri(load_settings(preset="demo"))
    assert describe_environment()["mmcot.host"] == socket.gethostname()


def test_one_process_of_a_machine_samples_it(tmp_path):
    with sampling(tmp_path, "train", gpus=False, every_s=0.05), sampling(tmp_path, "train", gpus=False, every_s=0.05):
        time.sleep(0.4)
    (path,) = tmp_path.glob("train-system-*.jsonl")
    points = [json.loads(line) for line in path.read_text().splitlines()]
    assert 2 <= len(points) <= 10
    assert {key.split("/")[0] for point in points for key in point["metrics"]} == {"system"}
    assert all(0 <= point["metrics"][key] <= 100 for point in points for key in point["metrics"] if "cpu" in key)


def test_what_mlflow_refuses_does_not_hold_up_what_follows_and_is_told(place):
    settings, run_dir = place
    said = []
    with open_tracker(settings, run_dir, report=said.append) as tracker, tracker.step("data") as child:
        child.log_tags({"x" * 400: "too long a name"})
        child.log_scores({"after": 1.0})
    state = read_json(run_dir.mlflow_state)
    assert client_of(settings).get_run(state["runs"]["data"]).data.metrics == {"after": 1.0}
    assert [line["do"] for line in state["refused"]] == ["tags"] and any("refused 1 value" in line for line in said)


@pytest.mark.processes
def test_a_kill_while_the_store_is_made_leaves_none_or_a_whole_one(tmp_path):
    path = tmp_path / "mlflow.db"
    code = (
        "import os, sys, threading; from alembic import command; "
        "from launcher.tracking.mlflow_store import create_store\n"
        "upgrade = command.upgrade\n"
        "command.upgrade = lambda *a: (threading.Timer(0.3, lambda: os._exit(9)).start(), upgrade(*a))\n"
        "create_store(sys.argv[1])"
    )
    killed = subprocess.run([sys.executable, "-c", code, f"sqlite:///{path}"], capture_output=True, check=False)
    assert killed.returncode == 9 and not path.exists() and list(tmp_path.glob(".tmp-*"))
    create_store(f"sqlite:///{path}")
    from mlflow import MlflowClient

    assert [e.name for e in MlflowClient(f"sqlite:///{path}").search_experiments()] == ["Default"]
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_run_that_was_ended_before_its_last_words_is_known(place):
    settings, run_dir = place
    assert is_everything_logged(run_dir)
    with open_tracker(settings, run_dir):
        assert not is_everything_logged(run_dir)
    assert is_everything_logged(run_dir)
    LineFile(run_dir.tracking).append({"run": "pipeline", "do": "tags", "time_ms": 0, "values": {"a": "b"}})
    assert not is_everything_logged(run_dir)


def test_sigterm_leaves_the_runs_as_killed(place):
    settings, run_dir = place
    before = signal.getsignal(signal.SIGTERM)
    with (
        pytest.raises(Stopped, match="the same command resumes"),
        sigterm_stops(),
        open_tracker(settings, run_dir) as tracker,
        tracker.step("data"),
    ):
        os.kill(os.getpid(), signal.SIGTERM)
    runs = read_json(run_dir.mlflow_state)["runs"]
    assert {client_of(settings).get_run(run_id).info.status for run_id in runs.values()} == {"KILLED"}
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_step_is_marked_done_only_after_its_end_is_told(place, monkeypatch):
    settings, run_dir = place
    commit_json(run_dir.path / "lock.json", {"attempt": 1})
    ends = []

    def mark_done(self, step, marker):  # a driver killed after this never looks at the step again
        lines = [json.loads(line) for line in run_dir.tracking.read_text().splitlines()]
        ends.append([line["status"] for line in lines if line["do"] == "end"])

    monkeypatch.setattr(RunDir, "mark_done", mark_done)
    with contextlib.ExitStack() as resources:
        Attempt(settings, run_dir, 1, lambda line: None, resources).run_step("data", {}, lambda child: {})
    assert ends == [["FINISHED"]]


def test_two_senders_of_a_run_make_it_once(place):
    settings, run_dir = place
    from launcher.tracking.mlflow_sync import MlflowSync

    file = LineFile(run_dir.tracking)
    senders = [MlflowSync(run_dir, uri=tracking_uri(settings), experiment="mmcot") for _ in range(2)]
    RunLog(file, "pipeline", run_dir.path)._append("start", name="a", tags={}, parent_key=None)
    senders[0].send()
    RunLog(file, "data", run_dir.path)._append("start", name="data", tags={}, parent_key=None)
    senders[1].send()
    senders[0].send()
    client = client_of(settings)
    assert len(client.search_runs([client.get_experiment_by_name("mmcot").experiment_id])) == 2


def test_a_run_that_was_deleted_in_mlflow_is_told_again(place):
    settings, run_dir = place
    first = log_once(settings, run_dir, [(1, 0.9)])
    for run_id in read_json(run_dir.mlflow_state)["runs"].values():
        client_of(settings).delete_run(run_id)
    second = log_once(settings, run_dir, [(2, 0.8)])
    assert second != first and sorted(history(settings, second)) == [(1, 0.9), (2, 0.8)]


def test_the_ids_of_an_earlier_version_are_gone_on_with(place):
    settings, run_dir = place
    first = log_once(settings, run_dir, [(1, 0.9)])
    commit_json(run_dir.mlflow_state, read_json(run_dir.mlflow_state)["runs"])
    run_dir.tracking.unlink()
    assert is_everything_logged(run_dir)
    assert log_once(settings, run_dir, [(2, 0.8)]) == first


def make_old(run_dir):
    """Write what the version before this one wrote.

    No experiment, settings on the parent alone, points followed by the child alone.
    """
    lines = [
        line
        for line in map(json.loads, run_dir.tracking.read_text().splitlines())
        if not (line["run"] == "pipeline" and line["do"] == "follow")
    ]
    lines = [line for line in lines if not (line["run"] != "pipeline" and line["do"] == "params")]
    run_dir.tracking.write_text("".join(json.dumps(line) + "\n" for line in lines))
    state = read_json(run_dir.mlflow_state)
    read = {name: offset for name, offset in state["read"].items() if "/" not in name}
    commit_json(
        run_dir.mlflow_state,
        {name: value for name, value in state.items() if name != "experiment_id"}
        | {"applied": len(lines), "read": read},
    )


def test_a_run_of_an_earlier_version_is_synced_and_gone_on_with(place):
    settings, run_dir = place
    first = log_once(settings, run_dir, [(1, 0.9), (2, 0.8)])
    make_old(run_dir)
    assert sync_run(run_dir, settings) == 0 and read_json(run_dir.mlflow_state)["experiment_id"] == "1"
    make_old(run_dir)
    assert log_once(settings, run_dir, [(2, 5.0), (3, 0.7)]) == first
    parent = read_json(run_dir.mlflow_state)["runs"]["pipeline"]
    assert (
        sorted(history(settings, first))
        == sorted(history(settings, parent, "rationale_loss"))
        == [(1, 0.9), (2, 0.8), (3, 0.7)]
    )


def test_settings_losses_and_scores_stand_on_the_same_run(place):
    settings, run_dir = place
    with open_tracker(settings, run_dir) as tracker, tracker.step("train-answer") as child:
        with contextlib.closing(Journal(run_dir.journal("answer"))) as journal:
            child.follow("answer-metrics.jsonl")
            journal.log(10, {"loss": 0.5, "grad_norm": 1.0})
            journal.log(10, {"validation_loss": 0.4})
            journal.log(20, {"loss": 0.3, "grad_norm": 1.0})
            journal.log(20, {"validation_loss": 0.2})
        tracker.parent.log_scores({"val_accuracy_AVG": 75.0})
    runs, client = read_json(run_dir.mlflow_state)["runs"], client_of(settings)
    parent, child = (client.get_run(runs[name]).data for name in ("pipeline", "train-answer"))
    assert parent.metrics == {"answer_loss": 0.3, "answer_validation_loss": 0.2, "val_accuracy_AVG": 75.0}
    assert child.metrics == {"loss": 0.3, "validation_loss": 0.2, "grad_norm": 1.0}
    assert (
        parent.params == child.params
        and parent.params["training.learning_rate"] == "0.001"
        and parent.params["answer.num_steps"] == "900"
    )
    assert not [name for name in parent.params if name.startswith("tuning.")]


def test_a_setting_that_changes_between_attempts_breaks_nothing_and_a_later_step_has_the_new_value(make_place):
    said = []
    for workers, step in ((2, "train-rationale"), (1, "train-rationale"), (1, "train-answer")):
        settings, run_dir = make_place("a", f"cluster.num_workers={workers}")
        with open_tracker(settings, run_dir, report=said.append) as tracker, tracker.step(step):
            pass
    runs, client = read_json(run_dir.mlflow_state)["runs"], client_of(settings)
    found = {name: client.get_run(run_id).data.params["cluster.num_workers"] for name, run_id in runs.items()}
    assert found == {"pipeline": "2", "train-rationale": "2", "train-answer": "1"} and said == []


def test_a_setting_longer_than_mlflow_takes_says_that_it_is_cut(place):
    settings, run_dir = place
    with open_tracker(settings, run_dir) as tracker:
        tracker.parent.log_params({"long": "x" * 6001, "fits": "y" * 6000})
    params = client_of(settings).get_run(read_json(run_dir.mlflow_state)["runs"]["pipeline"]).data.params
    assert (
        len(params["long"]) == 6000
        and params["long"].endswith("x ... (cut; run.yaml has all of it)")
        and params["fits"] == "y" * 6000
    )


class Server:
    """A real MLflow server that can be taken away and brought back."""

    def __init__(self, folder) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri, self._folder = f"http://127.0.0.1:{self.port}", folder
        self.start()

    def start(self) -> None:
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--workers",
            "1",
            "--port",
            str(self.port),
            "--backend-store-uri",
            f"sqlite:///{self._folder}/mlflow.db",
            "--artifacts-destination",
            str(self._folder / "artifacts"),
        ]
        with open(self._folder / "server.log", "a") as log:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.time() + 60
        while True:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=1)
                return
            except OSError:
                assert time.time() < deadline and self._process.poll() is None, (
                    self._folder / "server.log"
                ).read_text()
                time.sleep(0.2)

    def stop(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("mlflow"))
    yield server
    server.stop()


@pytest.mark.processes
def test_two_runs_at_once_and_an_outage_in_both_lose_nothing_and_double_nothing(make_place, server):
    places = [make_place(name, f"tracking.uri={server.uri}", "tracking.experiment=outage") for name in ("a", "b")]
    slowest, errors = [], []

    def train(settings, run_dir):
        try:
            with open_tracker(settings, run_dir) as tracker, tracker.step("train-rationale") as child:
                journal = Journal(run_dir.journal("rationale"))
                child.follow("rationale-metrics.jsonl")
                for step in range(1, 61):
                    started = time.perf_counter()
                    journal.log(step, {"loss": 1 / step})
                    child.log_scores({f"score_{step}": 1.0})
                    slowest.append(time.perf_counter() - started)
                    if step == 20:
                        halfway.wait()
                        away.wait()
                    time.sleep(0.02)
                back.wait()
        except Exception as error:
            errors.append(error)

    halfway, away, back = threading.Barrier(3), threading.Event(), threading.Event()
    threads = [threading.Thread(target=train, args=place) for place in places]
    for thread in threads:
        thread.start()
    halfway.wait()
    time.sleep(1)
    server.stop()
    away.set()
    time.sleep(2)
    server.start()
    back.set()
    for thread in threads:
        thread.join()
    assert not errors and sorted(slowest)[-3] < 0.05  # a server that is away holds nobody up
    ids = [read_json(run_dir.mlflow_state)["runs"] for _, run_dir in places]
    for (settings, _), runs in zip(places, ids, strict=True):
        assert [step for step, _ in history(settings, runs["train-rationale"])] == list(range(1, 61))
        assert len(client_of(settings).get_run(runs["train-rationale"]).data.metrics) == 61
    client = client_of(places[0][0])
    assert len(client.search_runs([client.get_experiment_by_name("outage").experiment_id])) == 4


def test_without_a_server_a_run_goes_on_and_sync_sends_it_afterwards_once(make_place, server):
    nobody = "http://127.0.0.1:9"
    settings, run_dir = make_place("c", f"tracking.uri={nobody}", "tracking.experiment=late")
    said, started = [], time.perf_counter()
    log_once(settings, run_dir, [(1, 0.9), (2, 0.8)], said=said)
    assert time.perf_counter() - started < 20
    assert any("mmcot sync" in line and nobody in line for line in said)
    failed = CliRunner().invoke(app, ["sync", str(run_dir.path)])
    assert failed.exit_code == 1 and "nothing is lost" in failed.output
    for sent in (True, False):
        done = CliRunner().invoke(app, ["sync", str(run_dir.path), "--uri", server.uri])
        assert done.exit_code == 0 and done.output.startswith("0 values") is not sent, done.output
    runs = read_json(run_dir.mlflow_state)["runs"]
    settings, _ = make_place("c", f"tracking.uri={server.uri}")
    assert history(settings, runs["train-rationale"]) == [(1, 0.9), (2, 0.8)]
    assert client_of(settings).get_run(runs["pipeline"]).info.status == "FINISHED"


def test_a_trained_model_is_one_logged_model_with_its_parameters_and_the_scores_of_both_its_runs(place):
    settings, run_dir = place
    for _ in range(2):  # the second time as after a restart
        with open_tracker(settings, run_dir) as tracker:
            with tracker.step("train-answer") as child:
                child.log_trained("answer", params={"format": "QCMG-A"}, tags={"mmcot.data": "d"})
                child.log_scores({"final_loss": 0.5}, trained_by="train-answer")
            with tracker.step("evaluate") as child:
                child.log_scores({"test_accuracy_AVG": 75.0}, trained_by="train-answer")
    client, runs = client_of(settings), read_json(run_dir.mlflow_state)["runs"]
    experiment = client.get_experiment_by_name("mmcot").experiment_id
    (model,) = client.search_logged_models([experiment])
    assert (model.name, model.status, model.params) == ("answer", "READY", {"format": "QCMG-A"})
    assert {metric.key: metric.value for metric in model.metrics} == {"final_loss": 0.5, "test_accuracy_AVG": 75.0}
    for name in ("train-answer", "pipeline"):
        outputs = client.get_run(runs[name]).outputs.model_outputs
        assert [output.model_id for output in outputs] == [model.model_id]


def test_every_run_has_a_description_of_what_it_does(place):
    settings, run_dir = place
    steps = {"data": "shards", "train-rationale": "rationale", "rationales": "rationales", "evaluate": "Answers"}
    with open_tracker(settings, run_dir) as tracker:
        for step in steps:
            with tracker.step(step):
                pass
    client, runs = client_of(settings), read_json(run_dir.mlflow_state)["runs"]
    texts = {name: client.get_run(run_id).data.tags["mlflow.note.content"] for name, run_id in runs.items()}
    assert "two-stage" in texts["pipeline"] and "`train-answer`" in texts["pipeline"]
    assert all(word in texts[step] for step, word in steps.items())
