"""`mmcot mlflow up`: real servers over SQLite, and over PostgreSQL with a bucket, as a team has them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
import requests

from data_shards.atomic_files import commit_bytes, read_json
from launcher.config.loading import dump_settings, load_settings, tracking_uri
from launcher.runs.journal import Journal
from launcher.runs.run_dir import TUNING, RunDir
from launcher.runs.status import describe_end, mlflow_lines
from launcher.tracking import server as mlflow_server
from launcher.tracking.run_log import open_tracker
from launcher.tracking.server import _hosts_and_origins, plan_server

ROOT = Path(__file__).parents[2]
PASSWORD = "correct horse 100%"  # a percent sign: MLflow reads its settings with configparser
DATABASE_PASSWORD = "elephant%40@:/"

pytestmark = pytest.mark.processes


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def clean_environment(**changes: str) -> dict[str, str]:
    """This process's environment without anything that tells MLflow or a bucket's client where to go."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "AWS_", "PG"))}
    return kept | {"PYTHONPATH": str(ROOT)} | changes


@dataclasses.dataclass
class Running:
    """A `mmcot mlflow up` and what it started."""

    process: subprocess.Popen
    output: Path
    url: str
    folder: Path

    def family(self) -> list[psutil.Process]:
        return [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]

    def end(self, number: int) -> list[psutil.Process]:
        """Send a signal; returns what is alive of the family ten seconds later at most."""
        family = self.family() if self.process.poll() is None else []
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)
        self.process.wait(30)
        return psutil.wait_procs(family, timeout=10)[1]


def start(folder: Path, *arguments: str, **environment: str) -> Running:
    folder.mkdir(exist_ok=True)
    port, output = free_port(), folder / "output.txt"
    command = [
        sys.executable,
        "-m",
        "launcher",
        "mlflow",
        "up",
        "--runs",
        str(folder / "runs"),
        "--port",
        str(port),
        *arguments,
    ]
    with open(output, "w") as file:
        process = subprocess.Popen(command, cwd=folder, env=clean_environment(**environment), stdout=file, stderr=file)
    deadline = time.monotonic() + 120
    while "MLflow: http" not in output.read_text():
        assert process.poll() is None and time.monotonic() < deadline, output.read_text()
        time.sleep(0.1)
    return Running(process, output, f"http://127.0.0.1:{port}", folder)


def track(run: Path, monkeypatch, uri: str | None = None, password: str | None = None):
    """One step of a run, tracked as the pipeline does; returns (client, child's run id, parent's run id)."""
    for name, value in {"URI": uri, "USERNAME": password and "admin", "PASSWORD": password}.items():
        monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", value) if value else monkeypatch.delenv(
            f"MLFLOW_TRACKING_{name}", raising=False
        )
    settings = load_settings(preset="demo", overrides=[f"run.dir={run}"])
    commit_bytes(run / "run.yaml", b"written: by the run\n")
    with open_tracker(settings, RunDir(run)) as tracker, tracker.step("train-rationale") as child:
        child.log_params({"answer": 42})
        child.log_scores({"accuracy": 0.75})
        tracker.parent.log_scores({"test_accuracy_AVG": 98.75})
        with contextlib.closing(Journal(RunDir(run).journal("rationale"))) as journal:
            journal.log(20, {"loss": 0.25})
    from mlflow import MlflowClient

    runs = read_json(RunDir(run).mlflow_state)["runs"]
    return MlflowClient(tracking_uri(settings)), runs["train-rationale"], runs["pipeline"]


def status_of(url: str, data: bytes | None = None, **headers: str) -> int:
    request = urllib.request.Request(url, data, headers)
    try:
        return urllib.request.urlopen(request, timeout=20).status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("mlflow")


# One for a person.


@pytest.fixture(scope="module")
def plain(root):
    """A server of a folder with a run and a tuning of two trials; yields (server, run ids of demo, of the trials)."""
    with pytest.MonkeyPatch.context() as patch:
        ids = track(root / "plain" / "runs" / "demo", patch)[1:]
        trials = write_tuning(root / "plain" / "runs" / "tuned")
    server = start(root / "plain")
    yield server, ids, trials
    server.end(signal.SIGKILL)


def write_tuning(folder: Path) -> list[str]:
    """A tuning and two trials in the store beside it; returns the trials' run ids."""
    database = f"sqlite:///{folder.parent / 'mlflow.db'}"
    settings = load_settings(
        preset="demo",
        overrides=[
            "run.name=tuned",
            f"run.dir={folder}",
            "tuning.space={training.learning_rate: {grid: [0.004, 0.008]}}",
        ],
    )
    tuning, found = RunDir(folder), []
    with open_tracker(settings, tuning):
        pass
    for name, rate in (("low", 0.004), ("high", 0.008)):
        overrides = [
            f"run.name={name}",
            f"run.dir={folder / 'trials' / name}",
            f"training.learning_rate={rate}",
            f"tracking.uri={database}",
        ]
        trial = RunDir(folder / "trials" / name)
        with contextlib.closing(Journal(trial.journal_of(TUNING))) as journal:
            for step in (1, 2, 3):
                journal.log(step, {"validation_loss": rate * 100 / step})
        with open_tracker(
            load_settings(preset="demo", overrides=overrides), trial, parent_key=f"{tuning.identity()}/pipeline"
        ):
            pass
        found.append(read_json(trial.mlflow_state)["runs"]["pipeline"])
    commit_bytes(folder / "run.yaml", dump_settings(settings).encode())
    return found


def look(browser, server: Running, line: str, *awaited: str, picture: Path):
    """Open the address at a line's end on this server; returns the page's text once it contains all awaited texts."""
    page = browser.open(
        re.search(r"http://\S+", line)[0].replace("http://127.0.0.1:5000", server.url), width=1900, height=1000
    )
    try:
        for text in awaited:
            page.wait_for(f"document.body.innerText.includes({json.dumps(text)})", seconds=30)
    except AssertionError as error:
        raise AssertionError(f"{error}; the page shows:\n{page.run('document.body.innerText')}") from None
    finally:
        page.picture(picture)
    return page.run("document.body.innerText")


def test_the_printed_address_opens_the_runs_own_page_with_its_settings_and_scores(plain, browser, tmp_path):
    server, _, _ = plain
    settings = load_settings(preset="demo", overrides=[f"run.dir={server.folder / 'runs' / 'demo'}"])
    line = describe_end(settings, RunDir(settings.run_dir))[-1]
    text = look(
        browser, server, line, "training.learning_rate", "test_accuracy_AVG", picture=tmp_path / "mlflow-run.png"
    )
    assert "Evaluations" not in text and "Runs\ndemo\nOverview" in text
    assert (
        "training.learning_rate\n0.001" in text
        and "test_accuracy_AVG\n98.75" in text
        and "rationale_loss\n0.25" in text
    )


def test_the_servers_own_address_opens_the_table_of_runs(plain, browser, tmp_path):
    server, _, _ = plain
    text = look(
        browser, server, server.output.read_text(), "Run Name", "demo", "tuned", picture=tmp_path / "mlflow-runs.png"
    )
    assert "Evaluation runs" not in text and "Token Usage" not in text


def test_trials_are_plotted_against_each_other(plain, browser, tmp_path):
    server, _, _ = plain
    settings = load_settings(config=server.folder / "runs" / "tuned" / "run.yaml")
    line = mlflow_lines(settings, RunDir(settings.run_dir))[-1]
    text = look(
        browser, server, line, "Parallel Coordinates Plot", "Run details", picture=tmp_path / "mlflow-trials.png"
    )
    parameters, metrics = re.search(r"Parameters:\n(.*?)Metrics:\n(.*?)Clear All", text, re.DOTALL).groups()
    assert "training.learning_rate" in parameters and "validation_loss" in metrics and "low" in text and "high" in text


def test_it_serves_what_a_run_wrote_before_and_sigterm_leaves_no_process(plain, tmp_path):
    from mlflow import MlflowClient

    server, (child, parent), _ = plain
    try:
        client = MlflowClient(server.url)
        data = client.get_run(child).data
        assert (data.params["answer"], data.metrics["accuracy"]) == ("42", 0.75)
        assert Path(client.download_artifacts(parent, "run.yaml", str(tmp_path))).read_text() == "written: by the run\n"
        assert status_of(f"{server.url}/version", Host="evil.example.org") == 200  # what MLflow exempts
        assert status_of(f"{server.url}/", Host="evil.example.org") == 403
        family = server.family()
        assert len(family) == 3  # this command, MLflow's, one worker: no job runners
        assert {p.laddr.ip for member in family for p in member.net_connections() if p.status == "LISTEN"} == {
            "127.0.0.1"
        }
    finally:
        alive = server.end(signal.SIGTERM)
    assert alive == [] and server.process.returncode == 0
    assert server.output.read_text().splitlines()[-1] == "MLflow: ended"


# One for a team.


@pytest.fixture(scope="module")
def password_file(root):
    path = root / "admin-password"
    path.write_text(PASSWORD + "\n")
    return path


@pytest.fixture(scope="module")
def guarded(root, password_file):
    server = start(root / "guarded", "--auth", MLFLOW_AUTH_ADMIN_PASSWORD_FILE=str(password_file))
    yield server
    server.end(signal.SIGKILL)


def test_a_wrong_password_is_refused_and_the_right_one_logs_a_metric(guarded, monkeypatch):
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    assert status_of(f"{guarded.url}/api/2.0/mlflow/experiments/get?experiment_id=0") == 401
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong horse 100%")
    with pytest.raises(MlflowException, match="401|not authenticated"):
        MlflowClient(guarded.url).create_experiment("team")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    client = MlflowClient(guarded.url)
    run = client.create_run(client.create_experiment("team")).info.run_id
    client.log_metric(run, "loss", 0.5)
    assert client.get_run(run).data.metrics == {"loss": 0.5}


def test_a_colleague_logs_into_the_experiment_somebody_else_made_and_may_not_delete_it(guarded, monkeypatch, tmp_path):
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from mlflow.server import get_app_client

    def become(name: str, password: str) -> MlflowClient:
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", name)
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
        return MlflowClient(guarded.url)

    experiment = become("admin", PASSWORD).create_experiment("shared")
    browser = requests.Session()
    browser.auth = ("admin", PASSWORD)
    token = re.search(r'name="csrf_token" value="([^"]+)"', browser.get(f"{guarded.url}/signup").text)[1]
    form = {"csrf_token": token, "username": "ada.lovelace", "password": "another long one"}
    assert browser.post(f"{guarded.url}/api/2.0/mlflow/users/create-ui", data=form).ok
    ada = become("ada.lovelace", "another long one")
    run = ada.create_run(experiment).info.run_id
    (tmp_path / "note.txt").write_text("hers")
    ada.log_artifact(run, str(tmp_path / "note.txt"))
    assert Path(ada.download_artifacts(run, "note.txt")).read_text() == "hers"
    with pytest.raises(MlflowException, match="[Pp]ermission"):
        ada.delete_experiment(experiment)
    become("admin", PASSWORD)
    get_app_client("basic-auth", tracking_uri=guarded.url).update_user_password("ada.lovelace", "a third long one")
    with pytest.raises(
        MlflowException, match="401|not authenticated"
    ):  # at once, although passwords are remembered for a while
        become("ada.lovelace", "another long one").get_experiment(experiment)
    assert become("ada.lovelace", "a third long one").get_experiment(experiment).name == "shared"


def test_no_secret_is_printed_listed_or_readable_by_others(guarded):
    key = (guarded.folder / "runs" / "mlflow-auth.key").read_text()
    commands = " ".join(" ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"]))
    for secret in (PASSWORD, key):
        assert len(secret) > 12 and secret not in guarded.output.read_text() and secret not in commands
    private = sorted((guarded.folder / "runs").glob("mlflow-auth.*"))
    assert [path.suffix for path in private] == [".db", ".ini", ".key"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in private} == {0o600}


def test_a_command_that_is_killed_outright_leaves_no_server(guarded):
    assert len(guarded.family()) == 3
    assert guarded.end(signal.SIGKILL) == []


@pytest.fixture(scope="module")
def postgres():
    """A throwaway PostgreSQL cluster that asks for a password; yields its address without it."""
    programs = Path(shutil.which("initdb") or "/none").resolve().parent
    if not (programs / "postgres").exists():
        pytest.skip("no PostgreSQL on this machine (initdb, postgres)")
    folder, port = Path(tempfile.mkdtemp(prefix="mmcot-pg-", dir="/tmp")), free_port()
    (folder / "password").write_text(DATABASE_PASSWORD)
    someone = {}
    if os.getuid() == 0:  # PostgreSQL refuses root
        someone = {"user": "nobody", "group": "nogroup", "extra_groups": []}
        shutil.chown(folder, "nobody", "nogroup")
        shutil.chown(folder / "password", "nobody", "nogroup")
    options = [
        "--auth=scram-sha-256",
        "--username=mlflow",
        f"--pwfile={folder / 'password'}",
        "--locale=C",
        "--encoding=UTF8",
        "--no-sync",
    ]
    subprocess.run(
        [programs / "initdb", "-D", folder / "data", *options], check=True, capture_output=True, cwd=folder, **someone
    )
    command = [
        programs / "postgres",
        "-D",
        folder / "data",
        "-k",
        folder,
        "-h",
        "127.0.0.1",
        "-p",
        str(port),
        "-c",
        "fsync=off",
    ]
    with open(folder.parent / f"{folder.name}.log", "w") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, **someone)
    deadline = time.monotonic() + 30
    while not (folder / f".s.PGSQL.{port}").exists():
        assert process.poll() is None and time.monotonic() < deadline, Path(log.name).read_text()
        time.sleep(0.05)
    yield f"postgresql://mlflow@127.0.0.1:{port}/postgres"
    process.send_signal(signal.SIGINT)
    process.wait(20)
    Path(log.name).unlink()
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def bucket():
    """A bucket of a real S3 server; yields (its client, what the server's environment needs)."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    client = boto3.client(
        "s3", endpoint_url=url, region_name="us-east-1", aws_access_key_id="testing", aws_secret_access_key="testing"
    )
    client.create_bucket(Bucket="team")
    yield (
        client,
        {
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "MLFLOW_S3_ENDPOINT_URL": url,
        },
    )
    server.stop()


def test_a_run_lies_in_postgresql_and_its_files_in_a_bucket_the_client_has_no_key_to(
    root, postgres, bucket, password_file, monkeypatch, tmp_path
):
    import psycopg

    s3, keys = bucket
    (root / "database-password").write_text(DATABASE_PASSWORD)
    server = start(
        root / "team",
        "--auth",
        "--backend-store-uri",
        postgres,
        "--artifacts",
        "s3://team/mlflow",
        "--host",
        "0.0.0.0",
        "--allowed-hosts",
        "mlflow.team",
        MLFLOW_AUTH_ADMIN_PASSWORD_FILE=str(password_file),
        PGPASSWORD_FILE=str(root / "database-password"),
        **keys,
    )
    try:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(name)
        client, child, parent = track(tmp_path / "run", monkeypatch, server.url, PASSWORD)
        data = client.get_run(child).data
        assert (data.params["answer"], data.metrics["accuracy"]) == ("42", 0.75)
        assert Path(client.download_artifacts(parent, "run.yaml", str(tmp_path))).read_text() == "written: by the run\n"
        objects = {found["Key"]: found for found in s3.list_objects_v2(Bucket="team")["Contents"]}
        (name,) = [name for name in objects if name.endswith(f"{parent}/artifacts/run.yaml")]
        assert (
            name.startswith("mlflow/")
            and s3.get_object(Bucket="team", Key=name)["Body"].read() == b"written: by the run\n"
        )
        with psycopg.connect(postgres, password=DATABASE_PASSWORD) as connection:
            assert connection.execute("select value from metrics where run_uuid = %s", [child]).fetchone() == (0.75,)
            assert connection.execute("select username from users").fetchall() == [("admin",)]
        page = f"{server.url}/api/2.0/mlflow/experiments/search?max_results=1"
        assert [status_of(page, Host=host) for host in ("mlflow.team", "evil.example.org")] == [401, 403]
        post = (
            f"{server.url}/ajax-api/2.0/mlflow/runs/search"  # a browser's, from the server's own pages and from others
        )
        origins = ("http://mlflow.team", "https://mlflow.team", "https://evil.example.org")
        assert [status_of(post, b"{}", Host="mlflow.team", Origin=origin) for origin in origins] == [401, 401, 403]
        commands = " ".join(" ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"]))
        written = server.output.read_text() + (server.folder / "runs" / "mlflow-auth.ini").read_text()
        assert DATABASE_PASSWORD not in commands + written and PASSWORD not in commands + written
        assert not list((server.folder / "runs").glob("*.db"))
    finally:
        assert server.end(signal.SIGINT) == []


# What is refused, before anything is started.


def plan(tmp_path, environment=(), **settings):
    return plan_server(runs=tmp_path / "runs", environment=dict(environment), **{"port": free_port(), **settings})


def test_a_taken_port_is_named(tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        command = [sys.executable, "-m", "launcher", "mlflow", "up", "--port", str(port)]
        done = subprocess.run(command, cwd=tmp_path, env=clean_environment(), capture_output=True, text=True)
    assert (
        done.returncode == 1 and f"port {port} of 127.0.0.1 is taken" in done.stderr and "Traceback" not in done.stderr
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "somewhere"])
def test_beyond_loopback_nothing_is_served_without_auth(tmp_path, host):
    with pytest.raises(ValueError, match=r"without --auth .* add --auth, or keep 127\.0\.0\.1"):
        plan(tmp_path, host=host)


@pytest.mark.parametrize(
    "missing, settings, named",
    [
        ("flask_wtf", {"auth": True}, "Flask-WTF"),
        ("boto3", {"artifacts": "s3://bucket/x"}, "boto3"),
    ],
)
def test_a_missing_package_is_named_with_the_way_to_install_it(tmp_path, monkeypatch, missing, settings, named):
    monkeypatch.setattr(mlflow_server, "_installed", lambda name: name != missing)
    with pytest.raises(RuntimeError, match=f"not installed: pip install {named}$"):
        plan(tmp_path, {"MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD}, **settings)


def test_a_missing_database_driver_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)  # what an import then finds: nothing
    with pytest.raises(RuntimeError, match=r"postgresql needs .*: pip install 'psycopg\[binary\]'$"):
        plan(tmp_path, backend_store_uri="postgresql://mlflow@db/mlflow")


@pytest.mark.parametrize(
    "environment, settings, message",
    [
        ({}, {"auth": True}, "administrator's password: set MLFLOW_AUTH_ADMIN_PASSWORD"),
        ({"MLFLOW_AUTH_ADMIN_PASSWORD_FILE": "/none"}, {"auth": True}, "names /none, which is no file"),
        ({"PGPASSWORD_FILE": "/none", "PGPASSWORD": "x"}, {}, "both set; keep one"),
        ({}, {"backend_store_uri": "postgresql://mlflow:hush@db/mlflow"}, "MLFLOW_BACKEND_STORE_URI_FILE"),
        ({"MLFLOW_BACKEND_STORE_URI": "hush"}, {}, "is no database address"),
        ({"MLFLOW_BACKEND_STORE_URI": "paper://u:hush@db/x"}, {}, "kind, paper, is not known"),
        ({}, {"port": 70000}, "must be between 1 and 65535"),
        ({}, {"host": "192.0.2.1", "auth": True}, "give an address of this machine"),
        ({}, {"workers": 0}, "must be at least 1"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_remedy_and_no_secret(tmp_path, environment, settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        plan(tmp_path, environment, **settings)
    assert "hush" not in str(caught.value)


def test_hosts_and_a_browsers_own_origin_are_listed_as_mlflow_compares_them():
    hosts, origins = _hosts_and_origins("mlflow.team, proxy.team:8443, fd00::7", 5000)
    assert hosts == [
        "mlflow.team",
        "mlflow.team:5000",
        "proxy.team:8443",
        "[fd00::7]",
        "[fd00::7]:5000",
        "localhost",
        "localhost:5000",
        "127.0.0.1",
        "127.0.0.1:5000",
    ]
    assert (
        "https://mlflow.team" in origins
        and "http://mlflow.team:5000" in origins
        and "https://proxy.team:8443" in origins
    )


def test_a_proxy_on_the_same_machine_may_pass_on_its_name(tmp_path):
    command = plan(tmp_path, allowed_hosts="mlflow.team").command
    assert "--allowed-hosts" not in plan(tmp_path).command
    assert "https://mlflow.team" in command[command.index("--cors-allowed-origins") + 1].split(",")


def test_the_line_at_the_end_of_a_run_serves_that_run(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    page = "http://127.0.0.1:5000/#/experiments?workflowType=machine_learning"
    settings = load_settings(preset="demo", overrides=["run.dir=elsewhere/demo"])
    assert describe_end(settings, RunDir(settings.run_dir))[-2:] == [
        "MLflow: mmcot mlflow up --runs elsewhere   then open",
        f"  {page}",
    ]
    settings = load_settings(preset="demo")
    assert describe_end(settings, RunDir(settings.run_dir))[-2:] == ["MLflow: mmcot mlflow up   then open", f"  {page}"]
    settings = load_settings(preset="demo", overrides=["tracking.uri=sqlite:////else/where.db"])
    assert describe_end(settings, RunDir(settings.run_dir))[-2].startswith(
        "MLflow: mmcot mlflow up --backend-store-uri sqlite:////else/where.db "
    )
